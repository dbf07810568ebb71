"""The engine as a gRPC service in vLLM's protocol, as smg-grpc-proto defines it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from ..engine import (
    Engine,
    PageEventBatch,
    PageEvents,
    PagesCleared,
    PagesStored,
    RequestHandle,
    RequestOutput,
    TokenEvent,
    TokenEvents,
)
from ..engine.scheduling.request import ACTIVE, Adapter
from ..engine.waiting import wait_async
from ..errors import QueueFullError, RequestError
from .grammar import Grammars
from .limits import Limits
from .metrics import Metrics
from .requests import ModelFacts, constraint_of, submit_arguments

SERVICE = "vllm.grpc.engine.VllmEngine"
MESSAGE_S = 4e-4
"""Seconds between two messages of a stream, for each stream there is. A message took 0.15 to 0.18 ms of the interpreter
on a CPU: all of them, but for first and last ones, take less than half of its time, whatever the number of streams."""
STUCK_S = 600.0
"""A step that has run for so long, in seconds, is taken for one that does not end; the first steps compile kernels."""


class _Stream:
    """A request that a client waits for.

    Attributes:
        handle: of the engine.
        num_prompt_tokens: of its prompt.
        events: its tokens, None: the client waits for the end.
        news: set once there is something to take.
        has_begun: something was taken.
    """

    def __init__(self, handle: RequestHandle, num_prompt_tokens: int, is_streamed: bool) -> None:
        self.handle, self.num_prompt_tokens = handle, num_prompt_tokens
        self.events: TokenEvents | None = handle.events() if is_streamed else None
        self.news, self.has_begun = asyncio.Event(), False

    @property
    def is_urgent(self) -> bool:
        """Whether its news are its first token, or its end."""
        return not self.has_begun or self.handle.is_done

    def has_news(self) -> bool:
        """Whether there is something to take; ``mail.changed`` is held."""
        return self.handle.is_done or (self.events is not None and self.events.has_news())


class Servicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Serves one engine; its methods run in one event loop.

    Args:
        engine: that computes.
        tokenizer: finds stop strings.
        model_name: what clients call the model.
        facts: of the model.
        limits: of requests.
        metrics: are told of requests.
        tokenizer_path: a folder with the tokenizer's files, for a gateway on this machine.
        adapter: that its requests run with.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        model_name: str,
        facts: ModelFacts,
        limits: Limits,
        metrics: Metrics,
        tokenizer_path: str,
        adapter: Adapter = ACTIVE,
    ) -> None:
        self._adapter = adapter
        self.tokenizer_path = tokenizer_path
        self.engine, self.tokenizer, self.model_name, self.facts = engine, tokenizer, model_name, facts
        self.limits, self.metrics, self.is_draining = limits, metrics, False
        self._grammars: Grammars | None = None
        self._next_messages = 0.0
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="hf-paged-grammar")
        self._streams: dict[str, _Stream] = {}
        self._listeners: set[PageEvents] = set()
        self._started = time.time()

    @property
    def num_requests(self) -> int:
        """Requests that clients wait for."""
        return len(self._streams)

    async def pump(self) -> None:
        """Wake the requests that a step has given something; one wait for all, so that a step wakes the loop once.

        Messages cost this process time that steps need too. So with many streams a message has the tokens of several
        steps, but for first tokens and ends.
        """
        while True:
            await wait_async(self.engine, lambda: any(self._with_news()))
            self._wake_streams()

    def _wake_streams(self) -> None:
        """A method of its own: variables of the pump would keep streams that have ended until there is news again."""
        now = time.monotonic()
        with self.engine.mail.changed:
            found = list(self._with_news())
        if now >= self._next_messages:
            self._next_messages = now + MESSAGE_S * len(self._streams)
        for stream in found:
            stream.news.set()

    def _with_news(self) -> Iterator[_Stream]:
        """Requests to wake now; ``mail.changed`` is held."""
        is_due = time.monotonic() >= self._next_messages
        return (
            stream
            for stream in self._streams.values()
            if (is_due or stream.is_urgent) and not stream.news.is_set() and stream.has_news()
        )

    # Generation

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Tokens of a request, one message for each sequence and step, and one at the end of each sequence."""
        try:
            stream = await self._submitted(request)
        except QueueFullError as error:
            self.metrics.refused("queue_full")
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except (ValueError, TypeError) as error:
            is_gone = isinstance(error, RequestError) and not self.engine.health().is_serving
            self.metrics.refused("closed" if is_gone else "invalid")
            code = grpc.StatusCode.UNAVAILABLE if is_gone else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))
        key = stream.handle.request_id
        self._streams[key] = stream
        with self.engine.mail.changed:
            if stream.has_news():  # It may have ended, and no step wakes anything any more.
                stream.news.set()
        try:
            async for message in self._messages(stream):
                yield message
            output = stream.handle.result()
            if output.finish_reason == "error":
                await context.abort(grpc.StatusCode.INTERNAL, f"the request failed: {output.error}")
        finally:
            # A client that is gone ends here too.
            del self._streams[key]
            if not stream.handle.is_done:
                stream.handle.cancel()
            self.metrics.ended(stream.handle)

    async def _submitted(self, request: pb.GenerateRequest) -> _Stream:
        """Hand a request over.

        Raises:
            QueueFullError, ValueError, TypeError: it is not served.
        """
        if self.is_draining:
            raise RequestError("the server is stopping: send the request to another.")
        prompt = self._prompt_of(request)
        params = request.sampling_params
        arguments = submit_arguments(params, len(prompt), self.facts, self.limits, self.tokenizer)
        constraint = constraint_of(params)
        if constraint is not None:
            work = asyncio.get_running_loop().run_in_executor(self._workers, self._prepared, *constraint)
            try:
                arguments["grammar"] = await asyncio.wait_for(work, self.limits.grammar_seconds)
            except (TimeoutError, asyncio.TimeoutError):
                seconds = self.limits.grammar_seconds
                raise ValueError(f"{constraint[0]} takes more than {seconds} s to prepare: simplify it.") from None
        handle = self.engine.submit(
            prompt, request_id=request.request_id or None, adapter=self._adapter, **arguments
        )
        return _Stream(handle, len(prompt), request.stream)

    def _prompt_of(self, request: pb.GenerateRequest) -> list[int]:
        """The prompt's tokens.

        Raises:
            ValueError: it has something else than tokens or text.
        """
        for name in ("mm_inputs", "media_refs", "kv_transfer_params"):
            if request.HasField(name):
                raise ValueError(f"{name} is not served: text and token ids are.")
        if request.extra_mm_inputs or request.HasField("kv_transfer_params_json"):
            raise ValueError("media and transferred caches are not served: text and token ids are.")
        if request.HasField("data_parallel_rank") and request.data_parallel_rank > 0:
            raise ValueError(f"data_parallel_rank must be 0, got {request.data_parallel_rank}: there is one engine.")
        if request.WhichOneof("input") == "text":
            return self.tokenizer(request.text).input_ids
        return list(request.tokenized.input_ids)

    def _prepared(self, kind: str, text: str) -> Any:
        if self._grammars is None:
            num_logits, eos = self.engine.core.num_logits, self.facts.eos_token_ids
            self._grammars = Grammars(self.tokenizer, num_logits, eos, self.limits.grammar_bytes)
        return self._grammars.prepared(kind, text)

    async def _messages(self, stream: _Stream) -> AsyncIterator[pb.GenerateResponse]:
        """What a client gets: parts of sequences as they come, if it asked for them, and the end of each."""
        handle, events = stream.handle, stream.events
        has_prompt = set[int]()
        while True:
            await stream.news.wait()
            stream.news.clear()
            stream.has_begun = True
            is_done = handle.is_done
            for index, part in _by_sequence(events.take() if events is not None else []):
                chunk = pb.GenerateStreamChunk(
                    token_ids=[event.token_id for event in part], prompt_tokens=stream.num_prompt_tokens,
                    completion_tokens=len(part), cached_tokens=handle.cached_tokens,
                    output_logprobs=_logprobs_of_events(part), index=index,
                )  # fmt: skip
                if index not in has_prompt and is_done:
                    chunk.input_logprobs.MergeFrom(_prompt_logprobs(handle.result()))
                has_prompt.add(index)
                yield pb.GenerateResponse(chunk=chunk)
            if is_done:
                break
        output = handle.result()
        if output.finish_reason != "error":
            for index in range(len(output.sequences)):
                yield pb.GenerateResponse(complete=_complete(output, index, is_streamed=events is not None))

    # Control

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """End requests with what they have."""
        for request_id in request.request_ids:
            self.engine.cancel(request_id)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Whether requests are taken."""
        return pb.HealthCheckResponse(healthy=self.is_healthy(), message=self.engine.health().state)

    def is_healthy(self) -> bool:
        """Whether the engine serves, and its steps end."""
        health = self.engine.health()
        return health.is_serving and not self.is_draining and (health.step_s or 0.0) < STUCK_S

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What the model is."""
        config, facts = self.engine.model.config, self.facts
        defaults = self.engine.model.generation_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(defaults, name, None) for name in names}
        bos = config.get_text_config(decoder=True).bos_token_id
        return pb.GetModelInfoResponse(
            model_path=self.model_name, served_model_name=self.model_name, is_generation=True,
            tokenizer_path=self.tokenizer_path,
            max_context_length=facts.max_model_len, max_req_input_len=facts.max_model_len - 1,
            vocab_size=self.engine.core.vocab_size, model_type=config.model_type,
            architectures=config.architectures or [type(self.engine.model).__name__],
            eos_token_ids=facts.eos_token_ids, pad_token_id=facts.pad_token_id,
            bos_token_id=bos if isinstance(bos, int) else 0,
            default_sampling_params_json=json.dumps({k: v for k, v in given.items() if v is not None}),
        )  # fmt: skip

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """What the server does."""
        health = self.engine.health()
        return pb.GetServerInfoResponse(
            active_requests=health.unfinished, is_paused=health.state in ("paused", "asleep"),
            uptime_seconds=time.time() - self._started, server_type="vllm-grpc", data_parallel_size=1,
            block_size=self.engine.config.page_size, max_num_seqs=self.engine.config.max_num_seqs,
            model_dtype=str(self.engine.model.dtype),
        )  # fmt: skip

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """How busy the engine is."""
        stats, size = self.engine.stats(), self.engine.config.page_size
        used = stats.pages_used - stats.pages_cached
        load = pb.SchedulerLoad(
            num_running_reqs=stats.running, num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting, num_used_tokens=used * size,
            max_total_num_tokens=stats.pages_total * size,
            token_usage=used / stats.pages_total if stats.pages_total else 0.0,
            gen_throughput=stats.tokens_per_s, cache_hit_rate=stats.prefix_hit_rate,
            max_running_requests=self.engine.config.max_num_seqs, num_waiting_uncached_tokens=stats.waiting_tokens,
        )  # fmt: skip
        return pb.GetLoadsResponse(dp_rank_count=1, loads=[load])

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.KvEventBatch]:
        """What enters and leaves the prefix cache. No history is kept: whatever number a client wants to go on from, it
        gets all that is cached by now first."""
        events = await asyncio.to_thread(self.engine.page_events)
        self._listeners.add(events)
        try:
            while not events.has_ended():
                await wait_async(self.engine, events.has_news)
                for batch in events.take():
                    yield _kv_batch(batch, self._adapter)
        finally:
            self._listeners.discard(events)
            events.close()

    def end_subscriptions(self) -> None:
        """Let clients that listen to page events have their end, which nothing else brings."""
        for events in list(self._listeners):
            events.close()


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The usual health service of gRPC, about a :class:`Servicer`."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Whether a service, or all of them, takes requests."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.service!r} is not served: {SERVICE} is.")
        is_healthy = self._servicer.is_healthy()
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if is_healthy else states.NOT_SERVING)


# Messages


def _kv_batch(batch: PageEventBatch, adapter: Adapter) -> common_pb2.KvEventBatch:
    """Page events in the protocol: of pages that requests with ``adapter`` find, since that is a model of its own."""
    message = common_pb2.KvEventBatch(sequence_number=batch.sequence, timestamp=batch.timestamp)
    for event in batch.events:
        salt = event.salt if isinstance(event, PagesStored) else None
        if isinstance(event, PagesStored) and adapter is not ACTIVE:
            if not isinstance(salt, tuple) or salt[:2] != ("adapter", adapter):
                continue
            salt = salt[2]
        entry = message.events.add(event_id=0 if batch.is_snapshot else batch.sequence)
        if isinstance(event, PagesCleared):
            entry.cleared.SetInParent()
        elif isinstance(event, PagesStored):
            size = event.page_size
            entry.stored.MergeFrom(
                common_pb2.KvBlocksStored(
                    parent_block_hash=event.parent_hash, cache_salt=None if salt is None else str(salt),
                    tier=common_pb2.KV_CACHE_TIER_DEVICE, locality=common_pb2.KV_CACHE_LOCALITY_LOCAL,
                )
            )  # fmt: skip
            for i, name in enumerate(event.hashes):
                tokens = event.token_ids[i * size : (i + 1) * size]
                entry.stored.blocks.add(block_hash=name, token_ids=tokens, block_size=size)
        else:
            entry.removed.MergeFrom(common_pb2.KvBlocksRemoved(block_hashes=event.hashes))
    if batch.is_snapshot:
        num_blocks = sum(len(entry.stored.blocks) for entry in message.events)
        message.snapshot.MergeFrom(common_pb2.KvSnapshotChunk(index=0, count=1, blocks=num_blocks))
    return message


def _by_sequence(events: list[TokenEvent]) -> list[tuple[int, list[TokenEvent]]]:
    found: dict[int, list[TokenEvent]] = {}
    for event in events:
        found.setdefault(event.index, []).append(event)
    return sorted(found.items())


def _output_logprobs(entries: list[tuple[int, float, Any, Any]]) -> pb.OutputLogProbs:
    """Of tokens: id, log-probability, the best ids, theirs."""
    return pb.OutputLogProbs(
        token_logprobs=[entry[1] for entry in entries],
        token_ids=[entry[0] for entry in entries],
        top_logprobs=[pb.TopLogProbs(token_ids=entry[2], values=entry[3]) for entry in entries],
    )


def _logprobs_of_events(events: list[TokenEvent]) -> pb.OutputLogProbs | None:
    entries = [(e.token_id, e.logprob, e.top_ids, e.top_logprobs) for e in events if e.logprob is not None]
    return _output_logprobs(entries) if entries else None


def _prompt_logprobs(output: RequestOutput) -> pb.InputLogProbs:
    message = pb.InputLogProbs()
    for token, entry in zip(output.prompt_ids, output.prompt_logprobs or ()):
        message.token_ids.append(token)
        message.token_logprobs.append(pb.InputTokenLogProb(value=None if entry is None else entry.logprob))
        top = ((), ()) if entry is None else (entry.top_ids, entry.top_logprobs)
        message.top_logprobs.append(pb.TopLogProbs(token_ids=top[0], values=top[1]))
    return message


FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "deadline": "length"}


def _complete(output: RequestOutput, index: int, is_streamed: bool) -> pb.GenerateComplete:
    """The end of a sequence; its tokens as well, unless the client has them."""
    sequence = output.sequences[index]
    message = pb.GenerateComplete(
        output_ids=[] if is_streamed else sequence.token_ids,
        finish_reason=FINISH_REASONS[sequence.finish_reason],
        prompt_tokens=len(output.prompt_ids),
        completion_tokens=len(sequence.token_ids),
        cached_tokens=output.cached_tokens,
        index=index,
    )
    if sequence.logprobs and not is_streamed:
        entries = [(e.token_id, e.logprob, e.top_ids, e.top_logprobs) for e in sequence.logprobs]
        message.output_logprobs.MergeFrom(_output_logprobs(entries))
    if output.prompt_logprobs:
        message.input_logprobs.MergeFrom(_prompt_logprobs(output))
    if isinstance(sequence.stop_reason, str):
        message.matched_stop_str = sequence.stop_reason
    elif sequence.stop_reason is not None:
        message.matched_token_id = sequence.stop_reason
    return message
