"""The engine: requests in from any thread, tokens out, one loop over steps.

Two locks. ``_drive`` is held by whoever runs a step, or changes what steps run on; everything below it
(:class:`EngineCore`) is touched under it only. Who waits for it has it after the running step, in the order of asking.
``_changed`` guards the small state that other threads see: new and cancelled requests, streams, outputs. Nobody waits
for ``_drive`` while holding ``_changed``.

A request's own code (processors, criteria) may raise anything, SystemExit and KeyboardInterrupt too: it ends that
request. Ctrl-C in the main thread is another matter: it waits for the end of the step, so that no books are left half
written, and then reaches the caller. A second one does not wait.
"""

import _signal  # What signal wraps in enums, which cost more than all else here.
import asyncio
import atexit
import contextlib
import heapq
import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..errors import RequestError, UnsupportedModelError
from ..fusion import FusedModel
from ..mixed_precision import enables_autocast
from ..transformers_internals import is_tested_version
from .config import EngineConfig
from .core import EngineCore, Launched
from .execution.compiled import as_written
from .execution.decode_graphs import reason_against
from .execution.model_fingerprint import read_buffers, written_buffers
from .handle import RequestHandle
from .sampling.request_params import TokenRules, check_token_ids
from .scheduling.page_budget import PageRoom, choose_num_pages, give_back_unused, model_length, working_bytes
from .scheduling.request import Request, RequestOutput, Row
from .startup.fusion_steps import fuse
from .startup.self_check import probe, run_reference
from .startup.support import is_supported
from .trace import RequestRecord, StepRecord, Trace
from .turn_lock import TurnLock

logger = logging.get_logger(__name__)

SEEDS = 1 << 62
FORKED = (
    "the process was forked while the engine had requests, and they run in the parent alone: make an engine of the "
    "child's own there."
)
INTERRUPT = 2
"""Ctrl-C."""
PROGRESS_S = 0.5
"""A bar is drawn again after so many seconds."""
MOST_ENDED = 16
"""Ended requests among those with a deadline, beyond as many as have not ended, before they are taken out."""

_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds and has done.

    Attributes:
        running, waiting: requests.
        rows: sequences in slots.
        pages_total, pages_used, pages_cached, pages_free: over all groups of layers; cached pages are those in use by
            the prefix cache alone.
        steps, prompt_tokens, new_tokens: since the start; prompt tokens without those found in the prefix cache.
        tokens_per_s: new tokens per second of stepping.
        prefix_hit_rate: the part of the prompts' tokens that was found in the prefix cache.
        preemptions: requests that lost their pages, by recomputing and by swapping.
        recomputed, swapped: the same, apart.
        finished: requests that have ended, by finish reason.
    """

    running: int
    waiting: int
    rows: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    steps: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    prefix_hit_rate: float
    preemptions: int
    recomputed: int
    swapped: int
    finished: dict[str, int]


@dataclass(slots=True)
class _Job:
    """Requests of one call that returns when all have ended.

    Attributes:
        started: on the engine's clock.
        coming: those that were made and not handed over yet; ``num_tokens``: of their prompts.
    """

    started: float
    coming: list[Request] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, request: Request) -> None:
        """One more is coming."""
        self.coming.append(request)
        self.num_tokens += len(request.prompt)

    def take(self) -> list[Request]:
        """Those that were coming."""
        coming, self.coming, self.num_tokens = self.coming, [], 0
        return coming


class Engine:
    """Continuous batching for one model: the same weights, the same module objects.

    The engine's forwards run "paged_flash", whatever the model's attention implementation is: everybody else's run that
    one, in other threads meanwhile too.

    Args:
        model: a causal LM of transformers.
        config: options.
        background: steps run in a thread of the engine while it has requests. False: they run in the threads that wait
            for results, or call :meth:`step`.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message says why.

    Example::

        with hf_paged.Engine(model) as engine:
            handle = engine.submit(prompt_ids, generation_config=GenerationConfig(max_new_tokens=64))
            for token in handle: ...
    """

    def __init__(self, model: Any, config: EngineConfig | None = None, *, background: bool = True) -> None:
        if config is not None and not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig or None, got {type(config).__name__}.")
        _wait_if_exiting()
        self.config = EngineConfig() if config is None else config
        self.model, self.background = model, bool(background)
        reasons = is_supported(model)
        if reasons:
            raise UnsupportedModelError(
                f"the engine cannot serve this model: {'; '.join(reasons)}. Use the model's own generate()."
            )
        self.max_model_len = self.config.max_model_len or model_length(model.config)
        self._core = self._start()
        self._drive = TurnLock()
        self._changed = threading.Condition(threading.Lock())
        self._incoming: list[Request] = []
        self._cancels: list[Request] = []
        self._abandoned: deque[Request] = deque()
        self._unfinished: dict[str, Request] = {}
        self._streams: dict[Request, None] = {}
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._num_deadlines = 0
        self._numbers, self._thread = itertools.count(), None
        self._stop: str | None = None
        self._closed = self._in_step = self._paused = self._asleep = False
        self._weights_change = True
        self._broken: BaseException | None = None
        self._to_raise: BaseException | None = None
        self._pending: Launched | None = None
        self._steps = self._new_tokens = self._prompt_tokens = 0
        self._busy_s = 0.0
        self._finished: dict[str, int] = {}
        self._trace = Trace(self.config.trace_steps, self._core.clock())
        self._seen = self._counts()
        _engines.add(self)

    _thread: threading.Thread | None
    fused: FusedModel | None = None
    """Modules that run fused while the engine computes, and why others do not; None: none do."""

    def _start(self) -> EngineCore:
        """Check the model, see what a page costs, make the pages."""
        model, config = self.model, self.config
        with _no_gradients(), as_written(model):
            reference = run_reference(model) if config.self_check else None
            try:
                buffers = read_buffers(model)
                learned = probe(model, config, reference)
                written = written_buffers(model, buffers)
                self.fused = self._fuse(learned.needs_lengths)
                pages_of_one = -(-self.max_model_len // config.page_size)
                num_pages = config.num_pages
                reserve = working_bytes(model, config) if any(d.type == "cuda" for d in learned.page_bytes) else 0
                if num_pages is None:
                    # One more: rows that share a prompt copy its last page before they write into it.
                    most = config.max_num_seqs * pages_of_one + 1
                    num_pages = choose_num_pages(learned.page_bytes, config.memory_fraction, most, reserve)
                core = EngineCore(model, config, num_pages, self.max_model_len)
                room = PageRoom(reserve, learned.page_bytes)
                core.commit_as_used(learned.kinds, room)
                core.runner.needs_lengths = core.cache.may_gather = learned.needs_lengths
                core.runner.ignore_buffers(written)
                if self.fused is not None:
                    core.runner.use_fused(self.fused)
                if config.cuda_graphs is not False:
                    reason = core.use_graphs()
                    if reason is not None and config.cuda_graphs:
                        raise ValueError(f"cuda_graphs=True cannot be: {reason}. Leave it None.")
                    if reason is not None and core.device.type == "cuda":
                        logger.warning_once(f"decode steps run without CUDA graphs: {reason}.")
                if core.device.type == "cuda":
                    largest = min(config.max_batch_tokens, config.max_num_seqs * self.max_model_len)
                    with core.on_device():
                        step_bytes = room.measure(lambda: core.runner.warm_up_prompts(largest))
                    room.reserve = working_bytes(model, config, step_bytes)
                return core
            except BaseException:
                if self.fused is not None:
                    self.fused.restore()
                raise

    def _fuse(self, needs_lengths: bool) -> FusedModel | None:
        """Modules that run fused; None: none do.

        Raises:
            ValueError: some were asked for, and there are none.
        """
        wanted = self.config.fuse
        device = self.model.get_input_embeddings().weight.device
        if wanted is False or (wanted is None and reason_against(self.model, device) is not None):
            return None
        if enables_autocast(self.model):
            raise ValueError("fuse=True cannot be: the model's forward enables autocast. Leave it None.")
        fused = fuse(self.model, self.config, needs_lengths, self.max_model_len)
        # On a transformers that nobody has tried, what no longer matches a pattern is said aloud.
        say = logger.info if is_tested_version() or not fused.refusals else logger.warning_once
        say(f"{type(self.model).__name__} in the engine: {fused}")
        if not len(fused) and wanted:
            raise ValueError(f"fuse=True cannot be: {fused}. Leave it None.")
        return fused if len(fused) else None

    # Requests

    def submit(  # noqa: PLR0913
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        *,
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        priority: float = 0,
        deadline_s: float | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        cache_salt: Any = None,
        rules: TokenRules | None = None,
        _job: _Job | None = None,
    ) -> RequestHandle:
        """Hand over a request; it runs as soon as there is room.

        Args:
            prompt_ids: at least one token; ``[L]`` or ``[1, L]``.
            generation_config: as for ``generate()``; None: the model's own.
            request_id: a name, unique among the requests that have not ended; None: one is made.
            priority: larger goes first; see :class:`EngineConfig` for ageing.
            deadline_s: seconds from now after which the request ends with what it has, and ``finish_reason`` is
                "deadline".
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: as for ``generate()``, called with the full
                history of one row.
            seed: of the sampled tokens.
            tokenizer: needed for ``stop_strings``.
            logprobs, prompt_logprobs: report log-probabilities, and this many of the best tokens'.
            cache_salt: cached prefixes are shared only among requests with an equal salt.
            rules: made beforehand, in the place of the arguments from ``generation_config`` to ``prompt_logprobs``.

        Raises:
            RequestError: it can never be served (too long for the model or the pool, too many rows), its id is taken,
                or the engine is closed.
            ValueError, TypeError: an argument is not valid.
        """
        _wait_if_exiting()
        self._check_open()
        prompt = self._checked_prompt(prompt_ids)
        if not isinstance(priority, Real):
            raise TypeError(f"priority must be a number, got {priority!r}.")
        if not math.isfinite(priority):
            raise ValueError(f"priority must be a finite number, got {priority!r}.")
        # NaN is not at least 0 either.
        if deadline_s is not None and not (isinstance(deadline_s, Real) and deadline_s >= 0):
            raise ValueError(f"deadline_s must be None or a number of seconds of at least 0, got {deadline_s!r}.")
        hash(cache_salt)
        number = next(self._numbers)
        if rules is None:
            if seed is None and self.config.seed is not None:
                seed = (self.config.seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % SEEDS
            rules = TokenRules.make(
                self.model, generation_config, prompt_ids=prompt, logits_processor=logits_processor,
                stopping_criteria=stopping_criteria, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, seed=seed,
                tokenizer=tokenizer, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
        check_token_ids(rules.config, self._core.num_logits)
        most_pages = self._checked_pages(prompt, rules)
        now = self._core.clock()
        # Longest first: whoever waits for all of a job waits for its longest request.
        came, length = (now, 0) if _job is None else (_job.started, len(prompt) - rules.max_length)
        request = Request(
            number=number,
            request_id=f"request-{number}" if request_id is None else str(request_id),
            has_made_id=request_id is None,
            prompt=prompt,
            rules=rules,
            priority=float(priority),
            salt=cache_salt,
            submitted=now,
            key=(came - float(priority) * self.config.ageing_s, length, number),
            deadline=None if deadline_s is None else now + float(deadline_s),
            is_watched=rules.has_criteria,
            is_job=_job is not None and rules.mode == "rows" and rules.ends_by_length,
            uses_prefixes=rules.num_prompt_logprobs is None,
            most_pages=most_pages,
        )
        request.rows = [Row(request, index) for index in range(rules.num_rows)]
        if _job is None:
            self._hand_over([request])
        else:
            _job.add(request)
        return RequestHandle(self, request)

    def _hand_over(self, requests: list[Request]) -> None:
        """Let the loop have requests."""
        with self._changed:
            self._check_open()
            named: dict[str, Request] = {}
            for request in requests:
                name = request.request_id
                while request.has_made_id and name in self._unfinished:  # A caller has given that to another.
                    name = request.request_id = f"request-{next(self._numbers)}"
                if name in self._unfinished or name in named:
                    raise RequestError(
                        f"request_id {name!r} is that of a request that has not ended: give another, or None."
                    )
                named[name] = request
            self._unfinished |= named
            self._incoming += requests
            self._wake_loop()

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        *,
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[RequestOutput]:
        """Serve many prompts; outputs come in the order of the prompts. A failed request has its error in its output.

        The call returns when all have ended, so the longest go first. Where every request has a known length (there is
        no eos token, and no criterion that may end it), nothing else runs, and there are slots and pages for all at
        once, steps of larger models all get about as many tokens: shorter requests wait, before their first token and
        between others, and all end together. First tokens come later, the last one earlier.

        Args:
            prompts: token ids.
            generation_config: one for all, or one for each.
            progress: show a bar.
            options: as for :meth:`submit`, the same for all.

        Raises:
            RequestError, ValueError, TypeError: a prompt cannot be served; none of them is then.
        """
        prompts = list(prompts)
        if generation_config is None or isinstance(generation_config, GenerationConfig):
            configs: list[Any] = [generation_config] * len(prompts)
        else:
            configs = list(generation_config)
        if len(configs) != len(prompts):
            raise ValueError(
                f"generation_config must be one, or one for each of {len(prompts)} prompts, got {len(configs)}."
            )
        handles: list[RequestHandle] = []
        job, coming = _Job(self._core.clock()), list[RequestHandle]()
        try:
            for number, (prompt, config) in enumerate(zip(prompts, configs), 1):
                coming.append(self.submit(prompt, generation_config=config, _job=job, **options))
                # What is enough for a step runs while the others are prepared.
                if job.num_tokens >= self.config.max_batch_tokens or number == len(prompts):
                    self._hand_over(job.take())
                    handles += coming
                    coming = []
                    self._advance()
            if progress:
                self._show_progress(handles)
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def _show_progress(self, handles: list[RequestHandle]) -> None:
        """A bar until all have ended, which may be at the same time: tokens show that something happens."""
        before, num_done, shown = self._new_tokens, 0, time.monotonic()

        def has_news() -> bool:
            is_late = self._new_tokens > before and time.monotonic() > shown + PROGRESS_S
            return is_late or sum(handle.is_done for handle in handles) > num_done

        with tqdm(total=len(handles), desc="generate", unit="prompt") as bar:
            while num_done < len(handles):
                self.wait_for(has_news, None, "generate")
                num_ended, shown = sum(handle.is_done for handle in handles), time.monotonic()
                bar.set_postfix(new_tokens=self._new_tokens - before, refresh=False)
                bar.update(num_ended - num_done)
                bar.refresh()
                num_done = num_ended

    def _advance(self) -> None:
        """Launch a step if nobody else does and none is on its way."""
        if not self.background and self._drive.acquire(blocking=False):
            try:
                if not self._in_step and (self._pending is None or self._pending.has_arrived):
                    self.step()
            finally:
                self._drive.release()

    def cancel(self, request_id: str) -> bool:
        """End a request with what it has; returns whether it had not ended yet."""
        request = self._unfinished.get(request_id)
        return request is not None and self.cancel_request(request)

    def cancel_request(self, request: Request) -> bool:
        """As :meth:`cancel`, of this request: another one may have its id by now."""
        with self._changed:
            if self._unfinished.get(request.request_id) is not request:
                return False
            self._cancels.append(request)
            self._wake_loop()
        if not self.background and self._drive.acquire(blocking=False):
            try:
                if not self._in_step:
                    self._intake()
                    self._publish()
            finally:
                self._drive.release()
        return True

    def abandon(self, request: Request) -> None:
        """Nobody will ask for the rest of a request: it is cancelled with the next step.

        Takes no lock: it is called by the garbage collector, from any thread, whatever that holds.
        """
        self._abandoned.append(request)

    def _checked_prompt(self, prompt_ids: Any) -> np.ndarray:
        """int64 ``[L]``."""
        if isinstance(prompt_ids, (str, bytes)) or (
            isinstance(prompt_ids, (list, tuple)) and any(isinstance(item, str) for item in prompt_ids)
        ):
            raise TypeError(
                f"prompt_ids must be token ids, got the text {prompt_ids!r:.60}: tokenise it first, with "
                f"tokenizer(text).input_ids."
            )
        if isinstance(prompt_ids, Mapping):
            raise TypeError(
                f"prompt_ids must be token ids, got a {type(prompt_ids).__name__} with {list(prompt_ids)}: give its "
                f'"input_ids".'
            )
        if isinstance(prompt_ids, torch.Tensor):
            prompt_ids = prompt_ids.detach().cpu().numpy()
        prompt = np.asarray(prompt_ids)
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
            raise ValueError(
                f"prompt_ids must be token ids [L] or [1, L], got the shape {list(prompt.shape)} of {prompt.dtype}."
            )
        if not prompt.size:
            raise ValueError("prompt_ids must have at least one token, got none.")
        size = self._core.vocab_size
        bad = np.flatnonzero((prompt < 0) | (prompt >= size))
        if bad.size:
            raise ValueError(
                f"prompt_ids[{bad[0]}] must be 0 to {size - 1}, the model's vocabulary, got {prompt[bad[0]]}."
            )
        return prompt.astype(np.int64)

    def _checked_pages(self, prompt: np.ndarray, rules: TokenRules) -> list[int]:
        """Pages of each group of layers that a request holds at most; what can never be served is refused."""
        core = self._core
        if rules.num_rows < 1:
            raise ValueError(f"a request runs at least one sequence, the rules given have num_rows={rules.num_rows!r}.")
        if rules.max_length > self.max_model_len:
            raise RequestError(
                f"the prompt of {len(prompt)} tokens and its new ones come to {rules.max_length} tokens, the engine "
                f"serves {self.max_model_len}: ask for fewer new tokens, or set EngineConfig(max_model_len=)."
            )
        if rules.num_rows > self.config.max_num_seqs:
            raise RequestError(
                f"the request runs {rules.num_rows} sequences (beams or samples), the engine "
                f"{self.config.max_num_seqs} at a time: set EngineConfig(max_num_seqs=)."
            )
        most_pages = []
        for group, table in enumerate(core.pages.tables):
            needed = core.scheduler.pages_for(len(prompt), rules.max_length, rules.num_rows, group)
            most_pages.append(needed)
            total = table.allocator.num_pages
            if needed > total:
                raise RequestError(
                    f"the request needs up to {needed} pages for {rules.num_rows} sequences of {rules.max_length} "
                    f"tokens, the pool has {total}: ask for fewer new tokens, or set EngineConfig(num_pages=)."
                )
        return most_pages

    # Waiting, from any thread

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None, request_id: str) -> None:
        """Block until ``predicate()``; without a background loop, run steps meanwhile.

        Raises:
            TimeoutError: ``timeout_s`` seconds passed.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._changed:
                if predicate():
                    return
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{request_id} has not ended in {timeout_s} seconds.")
                if self.background:
                    self._wake_loop()
                    self._changed.wait(1.0 if left is None else min(left, 1.0))
                    continue
            if not self._drive.acquire(blocking=False):
                # Another thread runs a step.
                with self._changed:
                    if not predicate():
                        self._changed.wait(0.01)
                continue
            try:
                moved = self.step()
            finally:
                self._drive.release()
            if not moved:
                with self._changed:
                    if not predicate():
                        self._changed.wait(0.005)

    async def wait_async(self, predicate: Callable[[], bool]) -> None:
        """As :meth:`wait_for`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if predicate():
                    return
                future = loop.create_future()
                self._sleepers.append((loop, future))
                if self.background:
                    self._wake_loop()
            if self.background:
                await future
            elif not await loop.run_in_executor(None, self.step):
                await asyncio.sleep(0.001)

    def num_new_tokens(self, request: Request) -> int:
        """New tokens that a stream of a request can give by now; from the first call on they are collected."""
        if request.output is not None:
            return len(request.output.token_ids)
        self._streams[request] = None
        return len(request.stream)

    def new_tokens(self, request: Request, given: int) -> list[int]:
        """New tokens behind the first ``given``."""
        with self._changed:
            tokens = request.stream if request.output is None else request.output.token_ids
            return tokens[given:]

    # The loop

    def _wake_loop(self) -> None:
        """Have a thread run steps; ``_changed`` is held."""
        self._changed.notify_all()
        if self.background and self._thread is None and self._unfinished and not self._closed:
            self._thread = threading.Thread(
                target=_run_loop, args=(weakref.ref(self),), name="hf_paged engine", daemon=True
            )
            self._thread.start()

    def turn(self) -> bool:
        """One turn of the background loop; False: the thread may end, there is nothing left to do."""
        if self.step():
            return True
        with self._changed:
            if self._incoming or self._cancels:
                return True
            if not self._unfinished:
                self._thread = None
                return False
            timeout = 1.0
            if self._deadlines:
                timeout = min(timeout, max(0.0, self._deadlines[0][0] - self._core.clock()))
            self._changed.wait(timeout)
        return True

    def step(self) -> bool:
        """Run one step, if there is anything to compute; returns whether there was."""
        if threading.current_thread() is not self._thread:
            _wait_if_exiting()
        with self._drive:
            if self._in_step:
                raise RequestError("a step cannot run inside another: do not wait for results in a logits processor.")
            self._in_step = True
            try:
                with _held_interrupts(), _no_gradients(), self._core.on_device():
                    moved = self._guarded_step()
            finally:
                self._in_step = False
                if self._stop is not None and not self._closed:
                    self._shut(self._stop)
            error, self._to_raise = self._to_raise, None
            if error is not None and not self.background:
                raise error
            return moved

    def _guarded_step(self) -> bool:
        try:
            moved = self._step()
        except BaseException as error:
            # Not a request's fault: the books cannot be trusted any more. Nobody shall wait forever.
            self._break(error)
            self._note(error)
            moved = True
        return moved

    def _note(self, error: BaseException) -> None:
        """What is no Exception is meant for the thread that runs the step, once that has ended; a thread of the
        engine's own goes on."""
        if not isinstance(error, Exception):
            self._to_raise = error

    def _step(self) -> bool:
        core, clock = self._core, self._core.clock
        start = clock()
        self._intake()
        self._expire(start)
        if self._paused or self._closed:
            self._publish()
            return False
        if not core.can_plan_ahead():
            self._collect_pending()
        work = core.plan(is_ahead=self._pending is not None)
        if work is None:
            moved = self._collect_pending()
            self._publish()
            return moved
        num_tokens, forward_s = work.num_tokens, 0.0
        try:
            result = core.run(work)
            forward_s = clock() - start
            launched = core.launch(work, result)
            self._new_tokens += launched.num_tokens
            self._collect_pending()
            self._pending = launched
            if not core.can_wait(launched):
                self._collect_pending()
        except BaseException as error:
            self._collect_pending()
            core.fail(work, error)
            self._note(error)
        self._steps += 1
        self._prompt_tokens += num_tokens - work.num_decode
        duration = clock() - start
        self._busy_s += duration
        self._record(work, start, duration, forward_s, num_tokens)
        self._publish()
        return True

    def _collect_pending(self) -> bool:
        """Take the tokens of the step that is on its way; returns whether there was one."""
        launched, self._pending = self._pending, None
        if launched is None:
            return False
        try:
            self._new_tokens -= self._core.collect(launched)
        except BaseException as error:
            self._core.fail(launched.work, error)
            self._note(error)
        return True

    def _record(self, work: Any, start: float, duration: float, forward_s: float, num_tokens: int) -> None:
        core = self._core
        counts = core.scheduler.counts
        self._trace.steps.append(
            StepRecord(
                start - self._trace.start,
                duration,
                forward_s,
                len(work.slots),
                work.num_decode,
                num_tokens,
                len(core.scheduler.running),
                len(core.scheduler.waiting),
                core.pool.pages_in_use,
                counts.recomputed + counts.swapped,
            )
        )

    def _intake(self) -> None:
        """Take in what other threads asked for."""
        with self._changed:
            incoming, self._incoming = self._incoming, []
            cancels, self._cancels = self._cancels, []
        while self._abandoned:
            cancels.append(self._abandoned.popleft())
        if not self._paused and not self._closed:
            self._look_for_changes(incoming)
        for request in incoming:
            self._core.scheduler.add(request)
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, request.number, request))
                self._num_deadlines += 1
        for request in cancels:
            self._core.end(request, "cancelled")

    def _look_for_changes(self, incoming: list[Request]) -> None:
        """Drop what was computed with other weights than the model has now."""
        core = self._core
        change = core.runner.change(look_closely=bool(incoming))
        if change is None and incoming and not core.scheduler.running and core.would_reuse(incoming):
            change = core.runner.change_of_values()
        if change is not None:
            self._start_over(change)

    def _start_over(self, change: str | None, keep_graphs: bool = False) -> None:
        """Drop captured steps and prefixes; running requests compute their tokens again."""
        core = self._core
        if change is not None and core.holds_computed():
            logger.warning_once(
                f"{type(self.model).__name__} has changed ({change}): what an engine has computed with it is dropped, "
                f"running requests compute their tokens again."
            )
        self._collect_pending()
        if not keep_graphs:
            core.runner.drop_graphs()
        core.preempt_all(allow_swap=False)
        core.drop_prefixes()

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            assert request.deadline is not None
            seconds = request.deadline - request.submitted
            self._core.end(request, "deadline", RequestError(f"the deadline of {seconds:.3g} seconds has passed."))

    def _publish(self) -> None:
        """Let other threads see what has happened."""
        core = self._core
        if core.finished and not core.scheduler.running and core.holds_computed():
            # Before anybody knows that nothing runs, and may write to the weights.
            core.runner.remember_values()
        if not core.finished and not self._streams and not self._sleepers:
            self._seen = self._counts()
            return
        with self._changed:
            for request in core.finished:
                self._unfinished.pop(request.request_id, None)
                self._streams.pop(request, None)
                self._num_deadlines -= request.deadline is not None
                output = request.output
                assert output is not None
                reason = output.finish_reason
                # Another one: who looks at the statistics has the one before.
                self._finished = {**self._finished, reason: self._finished.get(reason, 0) + 1}
                self._record_request(request, output)
            self._seen = self._counts()
            # Last: whoever gets a result may look at the statistics at once.
            for request in core.finished:
                request.is_public = True
            core.finished.clear()
            if len(self._deadlines) > 2 * self._num_deadlines + MOST_ENDED:
                self._deadlines = [entry for entry in self._deadlines if entry[2].output is None]
                heapq.heapify(self._deadlines)
            for request in self._streams:
                row = request.rows[0]
                tokens = core.slots.tokens(row.slot) if row.slot >= 0 else row.tokens
                request.stream.extend(tokens[len(request.prompt) + len(request.stream) :].tolist())
            sleepers, self._sleepers = self._sleepers, []
            self._changed.notify_all()
        for loop, future in sleepers:
            # An event loop that was closed has nobody left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    def _record_request(self, request: Request, output: RequestOutput) -> None:
        origin, timing = self._trace.start, output.timing
        at = request.submitted - origin
        self._trace.requests.append(
            RequestRecord(
                request.request_id,
                at,
                None if timing.queued_s is None else at + timing.queued_s,
                None if timing.first_token_s is None else at + timing.first_token_s,
                at + timing.total_s,
                len(request.prompt),
                sum(len(s.token_ids) for s in output.sequences),
                output.finish_reason,
                timing.preemptions,
            )
        )

    def _break(self, error: BaseException) -> None:
        self._broken = error
        with self._changed:
            self._closed = True
            unfinished = list(self._unfinished.values())
        for request in unfinished:
            with contextlib.suppress(Exception):
                self._core.end(request, "error", error)
            if request.output is None:
                self._core.abandon(request, error)
        self._publish()

    @property
    def may_run(self) -> bool:
        """Whether a thread of the engine's own, or any other one, runs steps."""
        return self._thread is not None or self._drive.is_held

    def after_fork(self) -> None:
        """In a forked child: the threads that hold the locks and run the loop are not there."""
        is_busy = bool(self._unfinished) or (self._drive.is_held and not self._in_step)
        self._drive, self._changed = TurnLock(), threading.Condition(threading.Lock())
        self._thread, self._in_step = None, False
        if not is_busy or self._closed:
            return
        self._broken, self._closed = RequestError(FORKED), True
        for request in list(self._unfinished.values()):
            if request.output is None:
                self._core.abandon(request, self._broken)
        self._publish()

    # Life

    def close(self, *, drain: bool = False) -> None:
        """End the engine: what has not ended gets the result "cancelled".

        Args:
            drain: let requests end first.
        """
        if drain and not self._closed:
            self.wait_for(lambda: not self._unfinished, None, "the engine")
        with self._drive:
            if self._in_step:
                self._stop = "cancelled"  # Called from a request's own code: at the end of the step.
                return
            with _held_interrupts():
                self._shut("cancelled")
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _shut(self, reason: str) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._collect_pending()
        self._core.runner.drop_graphs()
        self._intake()
        for request in list(self._unfinished.values()):
            self._core.end(request, reason)
        self._core.drop_prefixes()
        self._core.cache.drop()
        if self.fused is not None:
            self.fused.restore()
        # Last: whoever gets a result may go on with the model at once.
        self._publish()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> "Engine":
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "an Engine cannot be pickled or copied, it has a thread, locks and pages of this process: send the model "
            "and engine.config to the worker, and make one there, hf_paged.Engine(model, config)."
        )

    def pause(self, *, keep_graphs: bool = False, weights_change: bool = True) -> None:
        """Stop once the running step has ended; requests keep their pages.

        What happens to weights, modules and PEFT adapters meanwhile is seen by :meth:`resume`, which then drops what
        was computed before: prefixes, captured steps, and the keys and values of running requests, which compute their
        tokens again. Other changes to what the model computes (an attribute of a module, say) are not seen: call
        :meth:`refresh_weights`. Without a pause, changes are seen by the next step; those that leave no trace (through
        ``parameter.data``, or by kernels of somebody's own) when a request finds a prefix of its prompt in an engine
        that was idle, and not while requests run.

        Args:
            keep_graphs: captured decode steps are replayed again after :meth:`resume`, if nothing has changed. False:
                they are captured again.
            weights_change: False: nothing writes to the weights meanwhile, so :meth:`resume` need not compare all of
                their bytes.
        """
        with self._between_steps("pause"):
            self._collect_pending()
            if not self._paused and self._core.holds_computed():
                self._core.runner.remember_values()
            if not keep_graphs:
                self._core.runner.drop_graphs()
            self._paused, self._weights_change = True, weights_change

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self._drive:
            self._check_open()
            if self._asleep:
                raise RequestError("the engine sleeps: call wake().")
            if self._paused:
                runner = self._core.runner
                change = runner.change(look_closely=True)
                if change is None and self._weights_change and self._core.holds_computed():
                    change = runner.change_of_values()
                if change is not None:
                    self._start_over(change)
                elif self.fused is not None:
                    self.fused.compare_tables()
                self._paused = False
        with self._changed:
            self._wake_loop()

    def warm_up(self, batch_sizes: Sequence[int] | None = None, *, progress: bool = False) -> int:
        """Capture the decode steps of these batch sizes before they are needed.

        Args:
            batch_sizes: None: all up to ``max_num_seqs``, and steps over chunks of prompts as well. On a GPU a step of
                ``max_batch_tokens`` is run too, so that its kernels are compiled.
            progress: show a progress bar.

        Returns:
            CUDA graphs that the engine now has; 0 where it captures none.
        """
        sizes = None if batch_sizes is None else list(batch_sizes)
        for size in sizes or ():
            if not 1 <= size <= self.config.max_num_seqs:
                raise ValueError(f"batch_sizes must be 1 to {self.config.max_num_seqs} (max_num_seqs), got {size!r}.")
        with self._between_steps("warm_up"), _no_gradients(), self._core.on_device():
            if self._paused:
                raise RequestError("the engine is paused: call resume().")
            runner = self._core.runner
            if sizes is None and self._core.device.type != "cpu":
                runner.warm_up_prompts(self.config.max_batch_tokens)
            graphs, chunk_graphs = runner.graphs, runner.chunk_graphs
            if graphs is None or chunk_graphs is None:
                return 0
            graphs.warm_up(sizes, progress)
            if sizes is None and graphs.failure is None:
                chunk_graphs.warm_up(progress)
            return len(graphs) + len(chunk_graphs)

    def refresh_weights(self) -> None:
        """Say that the model has changed in a way that the engine does not see, see :meth:`pause`.

        Prefixes are dropped, running requests compute their tokens again.
        """
        with self._between_steps("refresh_weights"):
            self._start_over(None)

    def drop_prefixes(self) -> None:
        """Forget every cached prefix; running requests keep their pages."""
        with self._between_steps("drop_prefixes"):
            self._core.drop_prefixes()

    def sleep(self, *, keep_graphs: bool = False) -> None:
        """Give the memory of the pages back, and pause.

        Requests wait, and compute their tokens again after :meth:`wake`.

        Args:
            keep_graphs: captured steps stay, with the memory of their intermediate results, so that :meth:`wake` need
                not capture them again; see :meth:`pause` for the changes of the model that are seen.
        """
        with self._between_steps("sleep"):
            cache, device = self._core.cache, self._core.device
            num_used = cache.num_used()
            self._start_over(None, keep_graphs)
            self.pause(keep_graphs=keep_graphs)
            if not keep_graphs:
                cache.drop()
            elif not cache.release(num_used):
                self._core.runner.drop_graphs()
            give_back_unused(device)
            self._asleep = True

    def wake(self) -> None:
        """Go on after :meth:`sleep`."""
        with self._drive:
            self._check_open()
            if self._asleep:
                try:
                    self._core.cache.restore()
                except torch.OutOfMemoryError:
                    # The device is full: pages are made as they are needed, at other addresses.
                    self._core.runner.drop_graphs()
                    self._core.cache.drop()
            self._asleep = False
            self.resume()

    @contextlib.contextmanager
    def _between_steps(self, name: str) -> Iterator[None]:
        """No step runs meanwhile.

        Raises:
            RequestError: the engine is closed, or a request's own code asks.
        """
        _wait_if_exiting()
        with self._drive:
            if self._in_step:
                raise RequestError(
                    f"{name}() was called inside a step, by a request's own code (a logits processor or a criterion): "
                    f"call it from outside."
                )
            self._check_open()
            yield
            self._seen = self._counts()

    def _check_open(self) -> None:
        if isinstance(self._broken, RequestError):
            raise RequestError(str(self._broken))
        if self._broken is not None:
            raise RequestError(f"the engine has stopped with an error of its own: {self._broken!r}.") from self._broken
        if self._closed:
            raise RequestError("the engine is closed: make another, hf_paged.Engine(model).")

    # Looking in

    def stats(self) -> EngineStats:
        """What the engine holds and has done. Waits for nothing: while a step runs, as of the end of the one before."""
        if self._drive.acquire(blocking=False):
            try:
                self._seen = self._counts()
            finally:
                self._drive.release()
        with self._changed:
            seen, num_unfinished = self._seen, len(self._unfinished)
        running, rows, steps, prompts, new, busy_s, found, asked, recomputed, swapped, finished, pages = seen
        total, used, cached = (sum(counts) for counts in zip(*pages))
        return EngineStats(
            running=running,
            waiting=max(0, num_unfinished - running),
            rows=rows,
            pages_total=total,
            pages_used=used,
            pages_cached=cached,
            pages_free=total - used,
            steps=steps,
            prompt_tokens=prompts,
            new_tokens=new,
            tokens_per_s=new / busy_s if busy_s else 0.0,
            prefix_hit_rate=found / asked if asked else 0.0,
            preemptions=recomputed + swapped,
            recomputed=recomputed,
            swapped=swapped,
            finished=dict(finished),
        )

    def _counts(self) -> tuple[Any, ...]:
        """What :meth:`stats` is made of, as of now: it is taken after every step."""
        core, counts = self._core, self._core.scheduler.counts
        return (
            len(core.scheduler.running), core.slots.num_used, self._steps, self._prompt_tokens, self._new_tokens,
            self._busy_s, counts.prefix_tokens, counts.prompt_tokens, counts.recomputed, counts.swapped, self._finished,
            [(a.num_pages, a.num_used, a.num_kept_alone) for a in core.allocators],
        )  # fmt: skip

    def trace(self, path: str | Path) -> Path:
        """Write what the engine did: ``.json`` (Chrome trace), ``.csv`` (steps), or ``.png`` (matplotlib)."""
        with self._drive:
            return self._trace.write(path)

    def check(self) -> None:
        """Prove that every page and slot is owned or free (AssertionError if not)."""
        with self._drive:
            self._core.check()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "asleep" if self._asleep else "paused" if self._paused else "open"
        return f"Engine({type(self.model).__name__}, {state}, {len(self._unfinished)} requests)"


@contextlib.contextmanager
def _no_gradients() -> Iterator[None]:
    """What is made inside lasts longer than the caller's ``torch.inference_mode()``, whose tensors are of no use behind
    it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _run_loop(reference: "weakref.ref[Engine]") -> None:
    """The background thread; an engine that nobody holds any more ends it."""
    while True:
        engine = reference()
        if engine is None or not engine.turn():
            return
        del engine


@contextlib.contextmanager
def _held_interrupts() -> Iterator[None]:
    """Ctrl-C in the main thread is raised at the end of the block; a second one at once."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or _signal.getsignal(INTERRUPT) is not _signal.default_int_handler:
        yield
        return
    num_came = 0

    def note(number: int, frame: Any) -> None:
        nonlocal num_came
        num_came += 1
        if num_came > 1:
            raise KeyboardInterrupt

    _signal.signal(INTERRUPT, note)
    try:
        yield
    finally:
        _signal.signal(INTERRUPT, _signal.default_int_handler)
    if num_came:
        raise KeyboardInterrupt


_is_exiting = threading.Event()


def _wait_if_exiting() -> None:
    """A daemon thread goes no further once the interpreter ends: stopped inside PyTorch it would abort the process."""
    if _is_exiting.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


def _close_all() -> None:
    """Before the interpreter goes: no step runs from here on."""
    _is_exiting.set()
    for engine in list(_engines):
        if engine.may_run:
            with contextlib.suppress(Exception):
                engine.close()


def _after_fork() -> None:
    _is_exiting.clear()
    for engine in list(_engines):
        engine.after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _wake(future: "asyncio.Future") -> None:
    if not future.done():
        future.set_result(None)
