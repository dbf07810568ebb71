"""One step after the other over the sequences in slots: plan, launch, collect. Knows nothing of threads.

    plan()      host: which rows compute how many tokens, pages for them
    launch()    device: forward, choice of tokens; nothing is waited for
    collect()   host: tokens into histories, who has ended

A step may be planned and launched before the one ahead of it is collected, as far as it needs none of its tokens on the
host. Rows that end with a token that was on its way compute one token too many, which is dropped.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hf_paged_kernels.settings import longest_short_query

from ..errors import InvalidScoresError
from ..mixed_precision import enables_autocast
from ..paging import GONE, PagePool
from .async_copy import Arrival, send
from .config import EngineConfig
from .execution.chunk_graphs import ChunkGraphs, chunk_sizes
from .execution.compiled import CompiledModules
from .execution.decode_graphs import Capture, CudaCapture, DecodeGraphs, reason_against
from .execution.engine_cache import EngineCache
from .execution.model_runner import Runner, StepLogits
from .execution.step_inputs import SlotTables
from .sampling.beam_search import BeamSearch
from .sampling.logprobs import prompt_logprobs
from .sampling.request_params import num_logits_of
from .sampling.token_selector import Selection, TokenSelector, invalid_scores_error, merged
from .scheduling.page_budget import PageRoom, split_pages
from .scheduling.request import Request, RequestOutput, RequestTiming, Row, SequenceOutput, State
from .scheduling.scheduler import Scheduler, StepWork, job_tokens, mixed_prompt_tokens
from .scheduling.slot_pages import SlotPages
from .scheduling.slots import Slots


@dataclass(slots=True)
class Launched:
    """A step whose results are on their way.

    Attributes:
        work: its rows.
        slots: int64 ``[n]`` on the host: rows whose tokens ``selection`` has.
        generation: int64 ``[n]``, of these slots: tokens of rows that have left meanwhile are dropped.
        selection: their tokens, None where there are none.
        tokens: the same on their way to the host.
        firsts: requests whose first token this is.
        drafted: rows whose candidates are verified, with their logits ``[candidates + 1, vocab]``.
        beams: rows of beam searches, with their logits ``[1, vocab]``.
        prompts: rows whose prompt's log-probabilities were asked for: row, first token computed, logits.
    """

    work: StepWork
    slots: np.ndarray
    selection: Selection | None
    generation: np.ndarray | None = None
    tokens: Arrival | None = None
    firsts: list[Request] = field(default_factory=list)
    drafted: list[tuple[Row, torch.Tensor]] = field(default_factory=list)
    beams: dict[Request, list[tuple[Row, torch.Tensor]]] = field(default_factory=dict)
    prompts: list[tuple[Row, int, torch.Tensor]] = field(default_factory=list)

    @property
    def has_arrived(self) -> bool:
        """Whether its tokens are on the host."""
        return self.tokens is None or self.tokens.is_here

    @property
    def num_tokens(self) -> int:
        """Tokens that the step chooses, those of verified candidates counted as one."""
        return len(self.slots) + len(self.drafted) + sum(len(rows) for rows in self.beams.values())


@dataclass(frozen=True, slots=True)
class SwappedRow:
    """A row's pages in host memory.

    Attributes:
        computed: tokens in the pages.
        held: for each group, whether each logical page was held.
        layers: for each group, layer index -> uint8 ``[pages, page_bytes]``.
        num_bytes: host memory.
    """

    computed: int
    held: list[list[bool]]
    layers: list[dict[int, torch.Tensor]]
    num_bytes: int


class EngineCore:
    """The sequences of one model, and the steps over them.

    Args:
        model: a causal LM.
        config: options.
        num_pages: pages of every layer.
        max_model_len: tokens of a request at most.
        clock: seconds.

    Attributes:
        finished: requests that have ended since the caller last emptied it.
        runs_ahead: a step may be launched before the tokens of the one ahead of it are on the host.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        num_pages: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.config, self.clock, self.max_model_len = model, config, clock, max_model_len
        self.device = model.get_input_embeddings().weight.device
        self.num_parameters = sum(p.numel() for p in model.parameters())
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
        self.tables = SlotTables(self.slots, self.pages, self.device)
        # Logits may be of more tokens than the vocabulary has.
        self.num_logits = num_logits_of(model)
        self.selector = TokenSelector(num_slots, self.num_logits, self.device)
        self.runner = Runner(model, self.cache, self.slots, self.tables, self.selector.sampling)
        if config.compile:
            self.runner.compiled = CompiledModules(model)
        self.scheduler = Scheduler(
            self.slots,
            self.pages,
            max_batch_tokens=config.max_batch_tokens,
            mixed_prompt_tokens=mixed_prompt_tokens(config.mixed_prompt_tokens, self.num_parameters),
            job_tokens=job_tokens(config.mixed_prompt_tokens, self.num_parameters, config.max_batch_tokens),
            whole_prompts=self.cache.has_states,
            prefix_caching=config.prefix_caching and not self.cache.has_states,
            on_admit=self._admit,
            on_release=self._release,
            swap_out=self._swap_out,
            swap_in=self._swap_in,
            clock=clock,
        )
        self.swap_left = int(config.swap_space_gib * 2**30)
        self.wants_prompt = np.zeros(num_slots, dtype=bool)
        # On a CPU there is nothing to hide: a step has run when it was launched.
        self.runs_ahead = not on_host and not self.cache.has_states
        self.finished: list[Request] = []

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
        reason = None if capture is not None else reason_against(self.model, self.device)
        if self.cache.has_states:
            reason = "the model keeps recurrent states"
        if self.runner.needs_lengths:
            reason = "the model computes keys behind the cache"
        if reason is None:
            # A pool of memory for each kind: what a decode step gave is read when a chunk of the same step has run.
            captures = [capture or CudaCapture(self.config.compile) for _ in range(2)]
            runner, device = self.runner, self.device
            graphs = DecodeGraphs(runner.static_decode, self.slots.num_slots, device, captures[0])
            sizes = chunk_sizes(self.config.max_batch_tokens, self.num_parameters)
            chunk_graphs = ChunkGraphs(
                runner.static_chunk, self.slots, sizes, device, captures[1], self.scheduler.mixed_prompt_tokens,
                self._row_tokens(), self.scheduler.job_tokens,
            )  # fmt: skip
            runner.use_graphs(graphs, chunk_graphs)
            self.scheduler.fill = chunk_graphs.fill
        return reason

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

    def _admit(self, row: Row) -> None:
        rules = row.request.rules
        self.selector.admit(row.slot, rules, row.index, self.slots.tokens(row.slot))
        self.tables.stale[row.slot] = True
        self.wants_prompt[row.slot] = rules.num_prompt_logprobs is not None and row.index == 0

    def _release(self, row: Row) -> None:
        self.selector.release(row.slot)
        self.wants_prompt[row.slot] = False

    def _swap_out(self, row: Row) -> SwappedRow | None:
        """Copy a row's pages to host memory; None where there is no room for them, or it has states beside them."""
        slot = row.slot
        if self.cache.has_states or not self.swap_left:
            return None
        held = [[page != GONE for page in table.pages[slot]] for table in self.pages.tables]
        num_bytes = sum(sum(h) * table.group.page_bytes for h, table in zip(held, self.pages.tables))
        if num_bytes > self.swap_left:
            return None
        layers = []
        for table in self.pages.tables:
            ids = torch.tensor([page for page in table.pages[slot] if page != GONE], dtype=torch.int64)
            copies = {}
            for index, pages in table.group.layers.items():
                raw = pages.raw()[ids.to(pages.device)]
                host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=raw.device.type == "cuda")
                # Queued on the stream that will overwrite the pages, so they can be given back at once.
                copies[index] = host.copy_(raw, non_blocking=True)
            layers.append(copies)
        self.swap_left -= num_bytes
        # The token of a step on its way is lost: its row computes the last one that is known again.
        computed = min(int(self.slots.computed[slot]), int(self.slots.length[slot]) - 1)
        return SwappedRow(computed, held, layers, num_bytes)

    def _swap_in(self, row: Row) -> bool:
        swapped: SwappedRow = row.swapped
        self.swap_left += swapped.num_bytes
        if not self.pages.make_room([sum(held) for held in swapped.held]):
            return False
        adopted: list[list[int | None]] = []
        for table, held, layers in zip(self.pages.tables, swapped.held, swapped.layers):
            taken = table.allocator.allocate(sum(held))
            for index, host in layers.items():
                pages = table.group.layers[index]
                ids = torch.tensor(taken, dtype=torch.int64, device=pages.device)
                pages.raw()[ids] = host.to(pages.device, non_blocking=True)
            remaining = iter(taken)
            adopted.append([next(remaining) if is_held else None for is_held in held])
        self.pages.adopt(row.slot, adopted)
        self.slots.computed[row.slot] = swapped.computed
        return True

    def forget_swapped(self) -> None:
        """Drop what is in host memory: those requests are computed again."""
        for _, request in self.scheduler.waiting:
            for row in request.rows:
                self._drop_swapped(row)

    def _drop_swapped(self, row: Row) -> None:
        if row.swapped is not None:
            self.swap_left += row.swapped.num_bytes
            row.swapped = None

    # Steps

    def plan(self, is_ahead: bool = False) -> StepWork | None:
        """The next step, or None; requests that cannot go on are ended.

        Args:
            is_ahead: the tokens of the step before are on their way: None may mean to wait for them.
        """
        work = self.scheduler.schedule(may_give_up=not is_ahead)
        while self.scheduler.impossible:
            request, error = self.scheduler.impossible.pop()
            self.end(request, "error", error)
            if work is None:
                work = self.scheduler.schedule(may_give_up=not is_ahead)
        return work

    def can_plan_ahead(self) -> bool:
        """Whether the next step needs none of the tokens that are on their way."""
        return not self.slots.draft.any()

    def can_wait(self, launched: Launched) -> bool:
        """Whether the next step may be launched before this one is collected."""
        if not self.runs_ahead or launched.drafted or launched.beams or launched.prompts:
            return False
        return not self.slots.watched[launched.slots].any() and not self.selector.needs_host(launched.slots)

    def run(self, work: StepWork) -> StepLogits:
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

    def launch(self, work: StepWork, result: StepLogits) -> Launched:
        """Choose the tokens of a step whose forward has been queued."""
        slots = self.slots
        starts = slots.computed[work.slots]
        prompts = work.slots[work.num_decode :][work.samples[work.num_decode :]]
        firsts = [request for request in (slots.row(slot).request for slot in prompts) if request.first_token is None]
        forks = self.scheduler.launched(work)
        for leader, others in forks:
            if self.cache.has_states and others:
                self.cache.copy_states([row.slot for row in others], [leader.slot] * len(others))
        sampled = np.flatnonzero(work.samples)
        chosen = work.slots[sampled]
        rows = sampled
        together = slots.is_row[chosen]
        launched = Launched(work, chosen, None, firsts=firsts)
        if not together.all():
            for i in sampled[~together].tolist():
                row = slots.row(work.slots[i])
                if row.request.rules.mode == "beams":
                    entry = (row, result.of(result.last[i] - 1, result.last[i]))
                    launched.beams.setdefault(row.request, []).append(entry)
                else:
                    # Without candidates these are the logits of its last token.
                    wanted = int(slots.draft[row.slot]) + 1
                    launched.drafted.append((row, result.of(result.last[i] - wanted, result.last[i])))
            chosen, rows = chosen[together], rows[together]
        for leader, others in forks:
            place = np.flatnonzero(chosen == leader.slot)
            if len(place) and others:
                # Fresh samples of one prompt: each chooses its first token from the same logits.
                more = np.array([row.slot for row in others], dtype=np.int64)
                chosen = np.concatenate([chosen, more])
                rows = np.concatenate([rows, np.full(len(more), rows[place[0]])])
        asked = self.wants_prompt[work.slots[work.num_decode :]]
        for i in (np.flatnonzero(asked) + work.num_decode).tolist():
            row = slots.row(work.slots[i])
            launched.prompts.append((row, int(starts[i]), result.of(result.first[i], result.last[i])))
        launched.slots = chosen
        if len(chosen):
            launched.generation = slots.generation[chosen]
            self._select(launched, result, rows)
        return launched

    def _select(self, launched: Launched, result: StepLogits, rows: np.ndarray) -> None:
        """Choose the tokens of ``launched.slots`` from the logits of the step's ``rows``, and let them go on.

        What the step has chosen by itself stays; the logits of those rows are not touched unless they are reported.
        """
        host, chosen, index = self.slots, launched.slots, result.last[rows] - 1
        # Rows that only now fork from a prompt choose from its logits, each for itself.
        places = np.where(launched.work.slots[rows] == chosen, result.places[rows], -1)
        known, others = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
        selections = []
        if len(known):
            tokens, lse = result.tokens, result.lse
            assert tokens is not None
            assert lse is not None
            if not np.array_equal(places, np.arange(len(tokens))):
                where = send(places[known], tokens.device)
                tokens, lse = tokens[where], lse[where]
            selections.append(
                self.selector.chosen(chosen[known], tokens, lse, lambda some: result.take(index[known[some]]))
            )
        if len(others):
            # A row's tokens may be on their way, but how many it has is known: all of them have been computed.
            slots = chosen[others]
            selection = self.selector.select(result.take(index[others]), slots, host.history, host.computed)
            self.tables.put_tokens(slots, selection.token_ids)
            selections.append(selection)
        launched.selection = selections[0]
        if len(selections) > 1:
            launched.selection = merged(selections, send(np.concatenate([known, others]).argsort(), self.device))
        launched.tokens = Arrival(launched.selection.token_ids)
        host.decoding[chosen] = host.computed[chosen] + 1 < host.max_length[chosen]

    def collect(self, launched: Launched) -> int:
        """Take the tokens of a step; requests that end are put in ``finished``.

        Returns:
            How many tokens were dropped, because their rows have left.
        """
        tokens = None if launched.tokens is None else launched.tokens.wait()
        now = self.clock()
        for request in launched.firsts:
            request.first_token = now if request.first_token is None else request.first_token
        for row, start, logits in launched.prompts:
            self._guarded(row.request, self._take_prompt_logprobs, row, start, logits)
        dropped = 0
        if tokens is not None and launched.selection is not None:
            slots = launched.slots
            is_there = self.slots.generation[slots] == launched.generation
            dropped = len(slots) - int(is_there.sum())
            if len(slots) > dropped:
                self._take_tokens(slots[is_there], tokens[is_there], launched.selection)
        for row, logits in launched.drafted:
            self._guarded(row.request, self._verify, row, logits)
        for request, rows in launched.beams.items():
            if request.state is State.RUNNING:
                rows.sort(key=lambda entry: entry[0].index)
                self._guarded(request, self._step_beams, request, torch.cat([logits for _, logits in rows]))
        return dropped

    def _guarded(self, request: Request, function: Callable[..., None], *args: Any) -> None:
        """Whatever a request's own code raises ends that request alone."""
        try:
            function(*args)
        except BaseException as error:
            self.end(request, "error", error)

    def _take_tokens(self, slots: np.ndarray, ids: np.ndarray, selection: Selection) -> None:
        """One token for each of ``slots``."""
        errors: dict[int, BaseException] = dict(selection.errors)
        for slot in slots[ids < 0].tolist():
            errors.setdefault(slot, invalid_scores_error(slot))
        if errors:
            slots, ids = self._drop_failed(slots, ids, errors)
            if not len(slots):
                return
        host = self.slots
        lengths = host.length[slots]
        host.reserve(int(lengths.max()) + 2)
        host.history[slots, lengths] = ids
        lengths = lengths + 1
        host.length[slots] = lengths
        logprobs = selection.logprobs
        if logprobs:
            for slot in slots.tolist():
                if slot in logprobs:
                    host.row(slot).logprobs.append(logprobs[slot])
        is_eos = (ids[:, None] == host.eos[slots]).any(1)
        ended = is_eos | (lengths >= host.max_length[slots])
        if host.watched[slots].any():
            stopped, errors = self.selector.stopped(slots[host.watched[slots]], host.history, host.length)
            if errors:
                self._end_failed(errors)
            is_eos |= np.isin(slots, list(stopped))
            ended |= is_eos
        if ended.any():
            for slot, is_stop in zip(slots[ended].tolist(), is_eos[ended].tolist()):
                ended_row = host.rows[slot]
                if ended_row is not None:
                    self._finish_row(ended_row, "stop" if is_stop else "length")

    def _end_failed(self, errors: dict[int, BaseException]) -> None:
        for slot, error in errors.items():
            row = self.slots.rows[slot]
            if row is not None and not (isinstance(error, InvalidScoresError) and self._begins_again(row)):
                self.end(row.request, "error", error)

    def _begins_again(self, row: Row) -> bool:
        """Let a row whose scores are invalid compute what others computed for it, once: NaN may have come from their
        pages. Returns whether it does."""
        request = row.request
        if not (request.uses_prefixes and request.cached_tokens and request.rules.is_plain and len(request.rows) == 1):
            return False
        self.pages.forget_prefix(row.slot)
        request.uses_prefixes, request.cached_tokens = False, 0
        self.slots.computed[row.slot] = 0  # Nothing of it is stored.
        self.scheduler.preempt(request, allow_swap=False)
        return True

    def _drop_failed(
        self, slots: np.ndarray, ids: np.ndarray, errors: dict[int, BaseException]
    ) -> tuple[np.ndarray, np.ndarray]:
        """End the requests of failed rows; returns the slots that still run, and their tokens."""
        self._end_failed(errors)
        runs = np.array([self.slots.rows[slot] is not None for slot in slots.tolist()], dtype=bool)
        return slots[runs], ids[runs]

    def _verify(self, row: Row, logits: torch.Tensor) -> None:
        """Take the tokens of a row that had candidates, and propose the next ones."""
        host, slot = self.slots, row.slot
        if slot < 0:
            return
        length, draft = int(host.length[slot]), int(host.draft[slot])
        host.draft[slot] = 0
        candidates = host.history[slot, length : length + draft].copy()
        tokens = self.selector.verify(slot, candidates, logits, host.history, length)
        host.reserve(length + len(tokens) + 1)
        host.history[slot, length : length + len(tokens)] = tokens
        length += len(tokens)
        host.length[slot] = length
        # What was rejected is behind the sequence's end: its slots are written again.
        host.computed[slot] = length - 1
        self.pages.shrink(slot, length - 1)
        self.tables.stale[slot] = host.decoding[slot] = True
        is_stop = tokens[-1] in row.request.rules.eos_token_ids
        if host.watched[slot]:
            stopped, errors = self.selector.stopped(np.array([slot]), host.history, host.length)
            if errors:
                raise errors[slot]
            is_stop |= slot in stopped
        if is_stop or length >= host.max_length[slot]:
            self._finish_row(row, "stop" if is_stop else "length")
        elif not self.cache.has_states:
            proposed = self.selector.propose(slot, host.history, length)
            host.reserve(length + len(proposed) + 1)
            host.history[slot, length : length + len(proposed)] = proposed
            host.draft[slot] = len(proposed)

    def _step_beams(self, request: Request, logits: torch.Tensor) -> None:
        """Move the rows of a beam search; ``logits`` are ``[num_beams, vocab]``, or ``[1, vocab]`` at the start."""
        if request.beams is None:
            request.beams = BeamSearch(request.rules, request.prompt.tolist())
        step = request.beams.step(logits)
        if step.is_done:
            self._finish_beams(request)
            return
        host = self.slots
        slots = [row.slot for row in request.rows]
        parents = [slots[parent] for parent in step.parents]
        length = int(host.length[slots[0]])
        host.reserve(length + 2)
        host.history[slots, :length] = host.history[parents, :length]
        host.history[slots, length] = step.tokens
        host.length[slots] = length + 1
        self.pages.permute(slots, parents)
        if self.cache.has_states:
            self.cache.copy_states(slots, parents)
        host.shares[slots] = host.decoding[slots] = self.tables.stale[slots] = True

    def _finish_beams(self, request: Request) -> None:
        prompt = len(request.prompt)
        eos = request.rules.eos_token_ids
        sequences = []
        for beam in request.beams.finalize():
            at_limit = prompt + len(beam.token_ids) >= request.rules.max_length
            ended = "length" if at_limit and (not beam.token_ids or beam.token_ids[-1] not in eos) else "stop"
            sequences.append(SequenceOutput(beam.token_ids, ended, None, beam.score, beam.beam_indices))
        for row in request.rows:
            row.finish_reason = sequences[0].finish_reason
            self.scheduler.finish_row(row)
        self._finalize(request, tuple(sequences))

    def _take_prompt_logprobs(self, row: Row, start: int, logits: torch.Tensor) -> None:
        request = row.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        known = request.prompt_logprobs
        # A prompt that is computed again has some of them already.
        skip = len(known) - 1 - start
        following = request.prompt[start + 1 + skip : start + 1 + len(logits)]
        if skip >= 0 and len(following):
            ids = torch.from_numpy(following).to(logits.device)
            count = request.rules.num_prompt_logprobs or 0
            known.extend(prompt_logprobs(logits[skip : skip + len(following)], ids, count))

    # Ends

    def _finish_row(self, row: Row, reason: str) -> None:
        row.finish_reason = reason
        self.scheduler.finish_row(row)
        if not row.request.live:
            self._finalize(row.request)

    def end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a request that has not ended, wherever it is."""
        if request.state is State.FINISHED:
            return
        for row in request.live:
            row.finish_reason = reason
            self._drop_swapped(row)
        for row in request.rows:
            if row.slot >= 0 and isinstance(error, InvalidScoresError):
                self.pages.forget_prefix(row.slot)
        self.scheduler.remove(request)
        request.error = error
        self._finalize(request)

    def fail(self, work: StepWork, error: BaseException) -> None:
        """A step's forward has raised: its requests end with the cause, their pages come back."""
        for slot in work.slots.tolist():
            row = self.slots.rows[slot]
            if row is not None:
                self.end(row.request, "error", error)
        self.scheduler.failed()

    def _finalize(self, request: Request, sequences: tuple[SequenceOutput, ...] | None = None) -> None:
        now, prompt = self.clock(), len(request.prompt)
        if sequences is None:
            sequences = tuple(
                SequenceOutput(row.tokens[prompt:].tolist(), row.finish_reason or "error", row.logprobs or None)
                for row in request.rows[: request.rules.num_return_sequences]
            )
        first = sequences[0]
        reason = first.finish_reason
        for row in request.rows:
            if row.finish_reason in ("error", "cancelled", "deadline"):
                reason = row.finish_reason
        request.output = RequestOutput(
            request_id=request.request_id,
            prompt_ids=request.prompt.tolist(),
            token_ids=first.token_ids,
            finish_reason=reason,
            error=request.error,
            logprobs=first.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            cached_tokens=request.cached_tokens,
            timing=RequestTiming(
                queued_s=None if request.started is None else request.started - request.submitted,
                first_token_s=None if request.first_token is None else request.first_token - request.submitted,
                total_s=now - request.submitted,
                preemptions=request.preemptions,
            ),
            sequences=sequences,
        )
        request.state = State.FINISHED
        self.finished.append(request)

    def abandon(self, request: Request, error: BaseException) -> None:
        """Give an output to a request whose books cannot be trusted any more."""
        for row in request.rows:
            row.finish_reason = "error"
            row.saved = request.prompt if row.saved is None else row.saved
        request.error = error
        self._finalize(request)

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
