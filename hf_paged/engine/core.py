"""One step after the other over the sequences in slots: plan, launch, collect. Knows nothing of threads.

    plan()      host: which sequences compute how many tokens, pages for them
    launch()    device: forward, choice of tokens; nothing is waited for
    collect()   host: tokens into histories, who has ended

A step may be planned and launched before the one ahead of it is collected, as far as it needs none of its tokens on the
host. Sequences that end with a token that was on its way compute one token too many, which is dropped.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from hf_paged_kernels.settings import longest_short_query

from ..errors import RequestError
from ..mixed_precision import enables_autocast
from ..paging import PagePool
from .async_copy import HostCopy, send
from .collect import Collector
from .config import EngineConfig
from .endings import Endings
from .execution.adapters import ModelAdapters
from .execution.chunk_graphs import ChunkGraphs, chunk_sizes
from .execution.compiled import CompiledModules
from .execution.decode_graphs import Capture, CaptureError, CudaCapture, DecodeGraphs, Out, capture_blocker
from .execution.engine_cache import EngineCache
from .execution.model_runner import Runner, StepLogits
from .execution.step_inputs import DeviceSlotState
from .in_flight import InFlightStep
from .ranks import ALONE, Alone
from .sampling.request_params import num_logits_of
from .sampling.token_selector import TokenSelector, merged
from .scheduling.pacing import mixed_prompt_tokens, offline_step_tokens
from .scheduling.page_budget import PageRoom, split_pages
from .scheduling.request import ACTIVE, Request, Sequence
from .scheduling.scheduler import Scheduler
from .scheduling.slot_pages import SlotPages
from .scheduling.slots import Slots
from .scheduling.step import ScheduledStep
from .scheduling.step_budget import StepLimits
from .scheduling.swapping import Swapping


class EngineCore:
    """The sequences of one model, and the steps over them.

    Args:
        model: a causal LM.
        config: options.
        num_pages: pages of every layer.
        max_model_len: tokens of a request at most.
        clock: seconds.
        ranks: the processes that hold the model.

    Attributes:
        endings: ends requests, and has those that have ended.
        runs_ahead: a step may be launched before the tokens of the one ahead of it are on the host.
        named: new requests that name an adapter, until :meth:`settle_adapters`.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        num_pages: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        ranks: Alone = ALONE,
    ) -> None:
        self.model, self.config, self.clock, self.max_model_len = model, config, clock, max_model_len
        self.ranks = ranks
        self.device = model.get_input_embeddings().weight.device
        # Shards may be of different sizes, and how many tokens a step has follows from this.
        self.num_parameters = ranks.least(sum(p.numel() for p in model.parameters()))
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self.pool = PagePool(config.page_size, None, config.kv_dtype)
        num_slots = config.max_num_seqs
        self.cache = EngineCache(model.config, self.pool, num_slots)
        self.cache.has_autocast = enables_autocast(model)
        self.slots = Slots(num_slots, capacity=min(1024, max_model_len + 1))
        width = -(-max_model_len // config.page_size)
        on_host = self.device.type == "cpu"
        self.pages = SlotPages(self.pool, num_slots, width, self.cache.copy_pages, track_changes=not on_host)
        useful = [
            num_slots * self.pages.most_pages(table, max_model_len, config.max_batch_tokens) + 1
            for table in self.pages.tables
        ]
        groups = list(self.pool.groups.values())
        for group, count in zip(groups, split_pages(num_pages, [g.num_layers for g in groups], useful)):
            group.allocator.grow(count)
        self.allocators = [group.allocator for group in groups]
        self.tables = DeviceSlotState(self.slots, self.pages, self.device)
        # Logits may be of more tokens than the vocabulary has.
        self.num_logits = num_logits_of(model)
        self.selector = TokenSelector(num_slots, self.num_logits, self.device, ranks)
        self.runner = Runner(model, self.cache, self.slots, self.tables, self.selector.sampling)
        if config.compile:
            self.runner.compiled = CompiledModules(model)
        self.swapping = Swapping(self.slots, self.pages, int(config.swap_space_gib * 2**30))
        self.limits = StepLimits(
            config.max_batch_tokens,
            mixed_prompt_tokens(config.mixed_prompt_tokens, self.num_parameters),
            offline_step_tokens(config.mixed_prompt_tokens, self.num_parameters, config.max_batch_tokens),
            whole_prompts=self.cache.has_states,
        )
        self.scheduler = Scheduler(
            self.slots,
            self.pages,
            self.limits,
            prefix_caching=config.prefix_caching and not self.cache.has_states,
            on_admit=self._admit,
            on_release=self._release,
            swapping=None if self.cache.has_states else self.swapping,
            clock=clock,
        )
        self.wants_prompt = np.zeros(num_slots, dtype=bool)
        self.named: list[Request] = []
        self._settled: ModelAdapters | None = None
        # On a CPU there is nothing to hide: a step has run when it was launched.
        self.runs_ahead = not on_host and not self.cache.has_states
        self.endings = Endings(self.scheduler, self.swapping, lambda: self.clock(), ranks)
        self.collector = Collector(self.scheduler, self.selector, self.tables, self.cache, self.endings, ranks)

    def commit_as_used(
        self, kinds: dict[int | None, dict[int, tuple[torch.Tensor, torch.Tensor]]], room: PageRoom
    ) -> None:
        """Pages get memory as they are first used, as far as there is ``room``; before the first step.

        Args:
            kinds: what the keys and values of each layer are like, by sliding window.
            room: gives the bytes that pages may take.
        """
        self.pool.room = room
        for window, group in self.pool.groups.items():
            group.kinds |= kinds[window]
            group.commit_as_used()

    def use_graphs(self, capture: Capture | None = None) -> str | None:
        """Capture steps from now on, with ``capture`` (None: as CUDA graphs); returns the reason why not."""
        reason = None if capture is not None else capture_blocker(self.model, self.device)
        if self.cache.has_states:
            reason = "the model keeps recurrent states"
        if self.runner.needs_lengths:
            reason = "the model computes keys behind the cache"
        if self.ranks.is_joint and not self.ranks.can_capture and capture is None:
            reason = "the model's processes communicate over a backend whose work no graph can hold (NCCL's can)"
        if capture is None:
            reason = self.ranks.first_text(reason)  # on all ranks or on none
        if reason is None:
            # A pool of memory for each kind: what a decode step gave is read when a chunk of the same step has run.
            captures = [self._on_all_ranks(capture or CudaCapture(self.config.compile)) for _ in range(2)]
            runner, device = self.runner, self.device
            graphs = DecodeGraphs(runner.static_decode, self.slots.num_slots, device, captures[0])
            sizes = chunk_sizes(self.config.max_batch_tokens, self.num_parameters)
            chunk_graphs = ChunkGraphs(
                runner.static_chunk, self.slots, sizes, device, captures[1], self._row_tokens()
            )
            runner.use_graphs(graphs, chunk_graphs)
            self.limits.tokens_to_fill_graph = chunk_graphs.tokens_to_fill_graph
        return reason

    def _on_all_ranks(self, capture: Capture) -> Capture:
        """A capture that fails on all ranks where it fails on one: steps with a graph choose tokens in another way."""
        if not self.ranks.is_joint:
            return capture

        def on_all(step: Callable[[torch.Tensor], Out], static: torch.Tensor, /) -> Callable[[], Out]:
            failure = None
            try:
                replay = capture(step, static)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:400]
            failure = self.ranks.first_text(failure)
            if failure is not None:
                raise CaptureError(failure)
            return replay

        return on_all

    def _row_tokens(self) -> int | None:
        """Tokens of a chunk that attend as one row in small steps; None: chunks have a launch of their own.

        The kernel over quantised pages takes too few for chunks.
        """
        if self.config.kv_dtype != "auto":
            return None
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if not isinstance(heads, int) or not isinstance(kv_heads, int):
            return longest_short_query(1)
        return longest_short_query(heads // kv_heads)

    def on_device(self) -> AbstractContextManager:
        """Make the model's device current: events, graphs and streams are those of the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # Slots come and go

    def _admit(self, sequence: Sequence) -> None:
        rules = sequence.request.rules
        self.selector.admit(sequence.slot, rules, sequence.index, self.slots.tokens(sequence.slot))
        self.tables.stale[sequence.slot] = True
        self._set_adapter(sequence)
        self.wants_prompt[sequence.slot] = rules.num_prompt_logprobs is not None and sequence.index == 0

    def _release(self, sequence: Sequence) -> None:
        self.selector.release(sequence.slot)
        self.wants_prompt[sequence.slot] = False

    # Adapters that requests name

    def has_unsettled_adapters(self) -> bool:
        """Whether :meth:`settle_adapters` has something to do."""
        adapters = self.runner.adapters
        return bool(self.named) or adapters is not self._settled or (adapters is not None and bool(adapters.blocker))

    def settle_adapters(self) -> None:
        """Before a step: requests whose adapter cannot be computed (any more) end, slots know those of the others. No
        step may be on its way."""
        named, self.named = self.named, []
        runner = self.runner
        if runner.adapters is None or runner.adapters is not self._settled or runner.adapters.blocker is not None:
            named = [request for request in self._unfinished() if request.adapter is not ACTIVE]
        if named and runner.adapters is None:
            self._read_adapters(named)
        adapters = runner.adapters
        if adapters is not None:
            for request in named:
                reason = adapters.reason_against(request.adapter)
                if reason is not None:
                    self.endings.end_request(request, "error", RequestError(reason))
            if adapters.blocker is not None:
                # No request names one any more: what is active on the model runs as it is.
                runner.misfit = adapters.misfit
                runner.use_adapters(None)
        self._settled = runner.adapters
        for sequence in self.slots.sequences:
            if sequence is not None:
                self._set_adapter(sequence)

    def _read_adapters(self, named: list[Request]) -> None:
        """Compute with the adapters that the model has now; where that fails, the requests that name one end."""
        runner = self.runner
        try:
            runner.use_adapters(ModelAdapters(self.model, runner.misfit))
            runner.try_adapters()
        except Exception as error:
            if runner.adapters is not None and runner.adapters.misfit is not None:
                return  # A reason for each of them.
            for request in named:
                self.endings.end_request(request, "error", error)
            runner.use_adapters(None)

    def _unfinished(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _set_adapter(self, sequence: Sequence) -> None:
        adapters = self.runner.adapters
        if adapters is not None:
            self.tables.set_adapter(sequence.slot, adapters.number(sequence.request.adapter))

    def forget_swapped(self) -> None:
        """Drop what is in host memory: those requests are computed again."""
        for request in self.scheduler.waiting:
            for sequence in request.sequences:
                self.swapping.drop(sequence)

    # Steps

    def plan(self, is_ahead: bool = False) -> ScheduledStep | None:
        """The next step, or None; requests that cannot go on are ended.

        Args:
            is_ahead: the tokens of the step before are on their way: None may mean to wait for them.
        """
        work = self.scheduler.schedule(may_give_up=not is_ahead)
        while self.scheduler.unservable:
            request, error = self.scheduler.unservable.pop()
            self.endings.end_request(request, "error", error)
            if work is None:
                work = self.scheduler.schedule(may_give_up=not is_ahead)
        return work

    def can_plan_ahead(self) -> bool:
        """Whether the next step needs none of the tokens that are on their way."""
        return not self.slots.draft.any()

    def can_wait(self, launched: InFlightStep) -> bool:
        """Whether the next step may be launched before this one is collected."""
        if not self.runs_ahead or launched.drafted or launched.beams or launched.prompts:
            return False
        return not self.slots.watched[launched.slots].any() and not self.selector.needs_host(launched.slots)

    def run(self, work: ScheduledStep) -> StepLogits:
        """The forward of a step."""
        num_logits = work.samples.astype(np.int64)
        decode = work.num_decode
        if decode and int(work.counts[:decode].max()) > 1:
            num_logits[:decode] = work.counts[:decode]
        chunks = work.slots[decode:]
        asked = self.wants_prompt[chunks]
        if asked.any():
            num_logits[decode:][asked] = work.counts[decode:][asked]
        return self.runner.run(work, num_logits)

    def launch(
        self, work: ScheduledStep, result: StepLogits, pending: InFlightStep | None = None
    ) -> InFlightStep:
        """Choose the tokens of a step whose forward has been queued.

        Args:
            work: its rows.
            result: of the forward.
            pending: the step before, if its tokens have not been collected.
        """
        slots = self.slots
        starts = slots.computed[work.slots]
        prompts = work.slots[work.num_decode :][work.samples[work.num_decode :]]
        requests = (slots.sequence(slot).request for slot in prompts)
        firsts = [request for request in requests if request.first_token is None]
        forks = self.scheduler.launched(work)
        for source, others in forks:
            if self.cache.has_states and others:
                self.cache.copy_states([sequence.slot for sequence in others], [source.slot] * len(others))
        sampled = np.flatnonzero(work.samples)
        chosen = work.slots[sampled]
        rows = sampled
        together = slots.is_row[chosen]
        launched = InFlightStep(work, chosen, None, firsts=firsts)
        if not together.all():
            for i in sampled[~together].tolist():
                sequence = slots.sequence(work.slots[i])
                if sequence.request.rules.mode == "beams":
                    entry = (sequence, result.of(result.last[i] - 1, result.last[i]))
                    launched.beams.setdefault(sequence.request, []).append(entry)
                else:
                    # Without candidates these are the logits of its last token.
                    wanted = int(slots.draft[sequence.slot]) + 1
                    launched.drafted.append((sequence, result.of(result.last[i] - wanted, result.last[i])))
            chosen, rows = chosen[together], rows[together]
        for source, others in forks:
            place = np.flatnonzero(chosen == source.slot)
            if len(place) and others:
                # Fresh samples of one prompt: each chooses its first token from the same logits.
                more = np.array([sequence.slot for sequence in others], dtype=np.int64)
                chosen = np.concatenate([chosen, more])
                rows = np.concatenate([rows, np.full(len(more), rows[place[0]])])
        asked = self.wants_prompt[work.slots[work.num_decode :]]
        for i in (np.flatnonzero(asked) + work.num_decode).tolist():
            sequence = slots.sequence(work.slots[i])
            launched.prompts.append((sequence, int(starts[i]), result.of(result.first[i], result.last[i])))
        launched.slots = chosen
        if len(chosen):
            launched.generation = slots.generation[chosen]
            self._select(launched, result, rows, pending)
        return launched

    def _select(
        self, launched: InFlightStep, result: StepLogits, rows: np.ndarray, pending: InFlightStep | None
    ) -> None:
        """Choose the tokens of ``launched.slots`` from the logits of the step's ``rows``, and let them go on.

        What the step has chosen by itself stays; the logits of those rows are not touched unless they are reported.
        """
        host, chosen, index = self.slots, launched.slots, result.last[rows] - 1
        # Sequences that only now fork from a prompt choose from its logits, each for itself.
        token_index = np.where(launched.work.slots[rows] == chosen, result.token_index[rows], -1)
        known, others = np.flatnonzero(token_index >= 0), np.flatnonzero(token_index < 0)
        selections = []
        if len(known):
            tokens, lse = result.tokens, result.lse
            assert tokens is not None
            assert lse is not None
            if not np.array_equal(token_index, np.arange(len(tokens))):
                where = send(token_index[known], tokens.device)
                tokens, lse = tokens[where], lse[where]
            selections.append(
                self.selector.chosen(chosen[known], tokens, lse, lambda some: result.take(index[known[some]]))
            )
        if len(others):
            # A sequence's tokens may be on their way, but how many it has is known: all of them have been computed.
            slots = chosen[others]
            coming = dict if pending is None else partial(pending.tokens_by_slot, host.generation)
            selection = self.selector.select(result.take(index[others]), slots, host.history, host.computed, coming)
            self.tables.put_tokens(slots, selection.token_ids)
            selections.append(selection)
        launched.selection = selections[0]
        if len(selections) > 1:
            launched.selection = merged(selections, send(np.concatenate([known, others]).argsort(), self.device))
        launched.tokens = HostCopy(launched.selection.token_ids)
        host.decoding[chosen] = host.computed[chosen] + 1 < host.max_length[chosen]

    def collect(self, launched: InFlightStep) -> int:
        """Take the tokens of a step, see :meth:`Collector.collect`."""
        return self.collector.collect(launched)

    # Between steps

    def preempt_all(self, allow_swap: bool) -> None:
        """Take the pages of every running request back; they go on later."""
        for request in list(self.scheduler.running):
            self.scheduler.preempt(request, allow_swap)
        if not allow_swap:
            self.forget_swapped()

    def holds_computed(self) -> bool:
        """Whether keys and values are kept that the weights have been read for."""
        prefixes = self.pool.prefixes
        return bool(self.scheduler.running) or (prefixes is not None and any(prefixes.num_pages))

    def would_reuse(self, requests: list[Request]) -> bool:
        """Whether a cached prefix is the beginning of one of these."""
        prefixes, size = self.pool.prefixes, self.config.page_size
        return prefixes is not None and any(
            request.uses_prefixes
            and len(request.prompt) > size
            and prefixes.has_beginning(request.prompt[:size].tolist(), request.salt)
            for request in requests
        )

    def drop_prefixes(self) -> None:
        """Forget every cached prefix."""
        if self.pool.prefixes is not None:
            self.pool.prefixes.clear()

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        self.scheduler.check()
        if self.pool.prefixes is not None:
            self.pool.prefixes.check()


@contextmanager
def no_gradients() -> Iterator[None]:
    """What is made inside lasts longer than the caller's ``torch.inference_mode()``, whose tensors are of no use behind
    it."""
    with torch.inference_mode(False), torch.no_grad():
        yield
