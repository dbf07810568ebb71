"""Which sequences compute how many tokens in the next step, and who has to wait or give pages back. No tensors here.

There is no prefill phase and no decode phase: each sequence has ``computed`` tokens chasing its ``length``, under one
budget of tokens for a step. Running sequences go first, then waiting requests in the order of their keys; a key is the
time of arrival less the priority's advance, so it never changes, and no request is overtaken forever.

    budget 16     | decode rows: 1 token each | chunks of prompts, best key first        |
                  | a  b  c  d                | e e e e  (rest of e)   f f f f f f f f   |

How many prompt tokens that are is in :mod:`.pacing`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .prefix_sharing import PrefixSharing
from .queue import RequestQueue
from .request import Request, Sequence, State
from .slot_pages import SlotPages
from .slots import Slots
from .step import ScheduledStep
from .step_budget import StepBudget, StepLimits
from .swapping import Swapping


@dataclass(slots=True)
class SchedulerCounts:
    """Counts since the start."""

    recomputed: int = 0
    swapped: int = 0
    prefix_tokens: int = 0
    prompt_tokens: int = 0


class Scheduler:
    """Plans steps over slots and pages.

    Args:
        slots: sequences that run.
        pages: their pages.
        limits: of a step.
        prefix_caching: look for cached prefixes, and store them.
        on_admit, on_release: called with a sequence that just got a slot, or is about to lose it.
        swapping: keeps the pages of preempted requests; None: they are computed again.
        clock: seconds, for timing.
    """

    def __init__(
        self,
        slots: Slots,
        pages: SlotPages,
        limits: StepLimits,
        *,
        prefix_caching: bool = True,
        on_admit: Callable[[Sequence], None] = lambda sequence: None,
        on_release: Callable[[Sequence], None] = lambda sequence: None,
        swapping: Swapping | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.slots, self.pages, self.limits, self.swapping = slots, pages, limits, swapping
        self.prefixes = PrefixSharing(slots, pages, prefix_caching)
        self.on_admit, self.on_release = on_admit, on_release
        self.clock = clock
        self.waiting = RequestQueue()
        self.running: dict[Request, None] = {}
        self.prefilling: list[Sequence] = []
        self.budget = StepBudget(slots, pages, limits, self.waiting, self.running, self.prefilling)
        self.unservable: list[tuple[Request, Exception]] = []
        self.counts = SchedulerCounts()
        self._blocked: tuple[int, int, int] | None = None
        # Of the step that is being planned: tokens of sequences that do not decode yet, and slots that were given up.
        self._chunks: dict[Sequence, int] = {}
        self._vacated: list[int] = []

    # Requests come and go

    def add(self, request: Request) -> None:
        """Put a request in the queue."""
        self.waiting.push(request)
        self._blocked = None

    def remove(self, request: Request) -> None:
        """Take a request out of the queue or out of its slots, its pages with it."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        for sequence in request.sequences:
            if sequence.slot >= 0:
                self._leave(sequence)
            sequence.swapped = None
        self.running.pop(request, None)
        self._blocked = None

    def finish_sequence(self, sequence: Sequence) -> None:
        """A sequence has ended: store its full pages as a prefix, give its slot and pages back."""
        if sequence.slot >= 0:
            self.prefixes.store(sequence)
            self._leave(sequence)
        if not sequence.request.live:
            self.running.pop(sequence.request, None)
        self._blocked = None

    # A step

    def schedule(self, may_give_up: bool = True) -> ScheduledStep | None:
        """Plan a step and take its pages; None when there is nothing to compute.

        Requests that turn out unservable are put in ``unservable``; they hold their pages until removed.

        Args:
            may_give_up: False: sequences may be about to end, so no request is unservable for the want of their pages.
        """
        decode = self._plan_decode()
        budget = self.limits.max_batch_tokens - int((1 + self.slots.draft[decode]).sum())
        chunks = self._chunks
        chunks.clear()
        self._vacated.clear()
        self.prefixes.begin_step()
        is_paced = self.budget.has_room_for_all()
        if is_paced:
            decode, num_due, total = self.budget.plan_offline_step(decode)
            budget = total - num_due
        elif self.prefilling or self.waiting:
            budget = min(budget, self.budget.prompt_tokens(decode, self._blocked is not None))
        sequences, may_admit = sorted(self.prefilling, key=lambda sequence: sequence.request.key), True
        while budget > 0 and (sequences or (self.waiting and may_admit)):
            if may_admit and self.waiting and (not sequences or self.waiting.first.key < sequences[0].request.key):
                admitted = self._admit()
                may_admit = admitted is not None
                sequences[:0] = admitted or []
            else:
                budget -= self._plan_chunk(sequences.pop(0), budget)
        if is_paced:
            # Those that can wait take the places that prompts leave.
            decode = np.sort(decode[: max(num_due, total - sum(chunks.values()))] if chunks else decode)
        if self._vacated:
            # What was preempted for a chunk is out of the step, whichever sequence has its slot now.
            decode = decode[~np.isin(decode, self._vacated)]
        if not len(decode) and not chunks:
            if self.prefilling and may_give_up:
                self._reject(min(self.running, key=lambda r: r.key), self.pages.want_of_pages())
            return None
        slots = np.concatenate([decode, np.array([sequence.slot for sequence in chunks], dtype=np.int64)])
        counts = np.concatenate([1 + self.slots.draft[decode], np.array(list(chunks.values()), dtype=np.int64)])
        samples = self.slots.computed[slots] + counts >= self.slots.length[slots]
        return ScheduledStep(slots, counts, len(decode), samples)

    def launched(self, work: ScheduledStep) -> list[tuple[Sequence, list[Sequence]]]:
        """A planned step was launched: its tokens count as computed.

        Returns:
            Requests whose prompt is now computed for one sequence, as (that one, those that share it from here on).
        """
        self.slots.computed[work.slots] += work.counts
        self.prefixes.sharers.clear()
        forks = []
        for slot in work.slots[work.num_decode :].tolist():
            sequence = self.slots.sequence(slot)
            computed = self.slots.computed[slot]
            if computed == len(sequence.request.prompt):
                # Others with the same beginning find it while this one still runs.
                self.prefixes.store(sequence)
            if not sequence.request.forked and computed >= len(sequence.request.prompt):
                forks.append((sequence, self._fork(sequence)))
            if computed >= self.slots.target(sequence):
                self.prefilling.remove(sequence)
                self._start_together(sequence.request)
        return forks

    def step_failed(self) -> None:
        """The planned step could not be launched, and its requests have ended: sequences that share what it was to
        compute start again."""
        for sequence in list(self.prefixes.sharers):
            if sequence.slot >= 0:
                self.slots.computed[sequence.slot] = sequence.request.cached_tokens = 0
                self.preempt(sequence.request, allow_swap=False)

    def _start_together(self, request: Request) -> None:
        """Let beams that were computed again decode once all of them are ready."""
        slots, host = [sequence.slot for sequence in request.live], self.slots
        if request.rules.mode != "beams" or (host.length[slots] == len(request.prompt)).any():
            return
        if (host.computed[slots] == host.length[slots] - 1).all():
            host.decoding[slots] = True

    def _plan_decode(self) -> np.ndarray:
        """Slots that compute one token (and their drafts), with pages for it."""
        slots, pages = self.slots, self.pages
        while True:
            decode = np.flatnonzero(slots.decoding)
            if int((1 + slots.draft[decode]).sum()) > self.limits.max_batch_tokens:
                slots.draft[decode] = 0
            ends = slots.computed[decode] + 1 + slots.draft[decode]
            missing = -(-ends // pages.page_size) - pages.num_pages[decode]
            short = decode[missing > 0]
            copies = [s for s in decode[slots.shares[decode]].tolist() if pages.shares_page(s, int(slots.computed[s]))]
            needed = int(missing[missing > 0].sum()) + len(copies)
            if needed == 0:
                break
            pages.free_behind_window(short.tolist(), slots.computed)
            if pages.ensure_free(needed):
                if (missing[missing > 0] == 1).all():
                    pages.extend_one(short)
                else:
                    for slot, end in zip(short.tolist(), ends[missing > 0].tolist()):
                        pages.extend(slot, end)
                pages.copy_on_write(copies, slots.computed[copies].tolist())
                break
            if not self._preempt_worst():
                break
        slots.shares[decode] = False
        return decode

    def _plan_chunk(self, sequence: Sequence, budget: int) -> int:
        """Plan the next tokens of a sequence whose prompt is not computed; returns how many."""
        if sequence.slot < 0 or sequence in self._chunks:
            return 0  # It was preempted for a better one just now, or admitted again after that.
        slots, pages, slot = self.slots, self.pages, sequence.slot
        computed = int(slots.computed[slot])
        count = self.slots.target(sequence) - computed
        if not self.limits.whole_prompts:
            count = min(count, budget)
        elif count > budget and (self._chunks or budget < self.limits.max_batch_tokens):
            return 0  # A prompt longer than the budget has a step for itself.
        if count <= 0:
            return 0
        pages.free_behind_window([slot], slots.computed)
        if slots.shares[slot]:
            while pages.shares_page(slot, computed):
                if pages.ensure_free(1):
                    pages.copy_on_write([slot], [computed])
                elif not self._preempt_worst(better_than=sequence):
                    return 0
            slots.shares[slot] = False
        while True:
            missing = pages.pages_of(computed + count) - int(pages.num_pages[slot])
            if missing <= 0 or pages.ensure_free(missing):
                break
            fits = (int(pages.num_pages[slot]) + pages.num_free()) * pages.page_size - computed
            if fits > 0 and not self.limits.whole_prompts:
                count = min(count, fits)
                break
            if not self._preempt_worst(better_than=sequence):
                return 0
        pages.extend(slot, computed + count)
        self._chunks[sequence] = count
        return count

    def _admit(self) -> list[Sequence] | None:
        """Let the first waiting request run if it can; returns its sequences that compute tokens before they decode.

        None: it has to wait.
        """
        request = self.waiting.first
        state = (self.pages.num_free(), self.slots.num_free, len(self.running))
        if self._blocked == state:
            return None
        while not self._can_start(request):
            worst = max(self.running, key=lambda r: r.key, default=None)
            if worst is None or worst.priority >= request.priority or worst.key < request.key:
                self._blocked = (self.pages.num_free(), self.slots.num_free, len(self.running))
                return None
            self.preempt(worst)
        # Preempted requests of a lower priority are behind this one in the queue.
        self.waiting.pop()
        self._blocked = None
        request.state = State.RUNNING
        request.started = self.clock() if request.started is None else request.started
        self.running[request] = None
        sequences = request.live
        try:
            # States cannot go on from a prompt that is computed again: each sequence computes all that it has.
            has_more = max(len(sequence.tokens) for sequence in sequences) > len(request.prompt)
            request.forked = len(sequences) == 1 or (self.limits.whole_prompts and has_more)
            for sequence in sequences:
                self.slots.admit(sequence)
                self.on_admit(sequence)
            # Otherwise the others share the prompt that the first one computes.
            return [sequence for sequence in (sequences if request.forked else sequences[:1]) if self._begin(sequence)]
        except Exception as error:
            # What no check at submit foresaw is that request's own fault.
            self._reject(request, error)
            return []

    def _begin(self, sequence: Sequence) -> bool:
        """Give a sequence that just got its slot what is known of its beginning.

        Returns:
            Whether it has tokens to compute before it decodes.
        """
        slot, request = sequence.slot, sequence.request
        is_back = sequence.swapped is not None and self.swapping is not None and self.swapping.swap_in(sequence)
        if not is_back:
            found = self.prefixes.find(sequence, self.prefilling, self._chunks)
            if found is not None:
                self.slots.computed[slot] = found
                if not request.preemptions:
                    request.cached_tokens = found
                    self.counts.prefix_tokens += found
                    self.counts.prompt_tokens += int(self.slots.length[slot])
        sequence.swapped = None
        if is_back and self.slots.computed[slot] + 1 == self.slots.length[slot]:
            self.slots.decoding[slot] = True
            return False
        self.prefilling.append(sequence)
        return True

    def _can_start(self, request: Request) -> bool:
        """Whether there are slots, and pages for all tokens that the request has, beside what others still need."""
        sequences = request.live
        if len(sequences) > self.slots.num_free:
            return False
        if not self.running:
            return True
        pages = self.pages
        most = max(len(sequence.tokens) for sequence in sequences)
        needed = []
        for group, table in enumerate(pages.tables):
            # One more page, so that it is not preempted at once.
            count = pages.pages_for(len(request.prompt), most + 1, len(sequences), group, self.limits.whole_prompts)
            for sequence in self.prefilling:
                missing = pages.pages_of(int(self.slots.length[sequence.slot])) - int(pages.num_pages[sequence.slot])
                whole = pages.most_pages(table, int(self.slots.length[sequence.slot]), pages.page_size)
                count += min(missing, whole)
            needed.append(count)
        return pages.ensure_free(needed)

    def _fork(self, source: Sequence) -> list[Sequence]:
        """Let the other sequences of a request share the prompt that ``source`` has computed."""
        request = source.request
        others = [sequence for sequence in request.live if sequence is not source]
        self.pages.fork(source.slot, [sequence.slot for sequence in others])
        request.forked = True
        prompt = len(request.prompt)
        for sequence in [source, *others]:
            self.slots.shares[sequence.slot] = prompt % self.pages.page_size != 0
        for sequence in others:
            self.slots.computed[sequence.slot] = prompt
            if self.slots.target(sequence) > prompt:
                self.prefilling.append(sequence)
        return others

    # Giving back

    def _preempt_worst(self, better_than: Sequence | None = None) -> bool:
        """Preempt the running request with the worst key; False if there is none to preempt.

        Args:
            better_than: preempt only a request whose key is worse than this sequence's.
        """
        worst = max(self.running, key=lambda r: r.key, default=None)
        if worst is None or (better_than is not None and worst.key <= better_than.request.key):
            return False
        if len(self.running) == 1:
            self._reject(worst, self.pages.want_of_pages())
        else:
            self.preempt(worst)
        return True

    def _reject(self, request: Request, error: Exception) -> None:
        """Let a running request take no further part; the caller of :meth:`schedule` ends it."""
        self.unservable.append((request, error))
        for sequence in request.live:
            if sequence.slot >= 0:
                self.slots.decoding[sequence.slot] = False
            if sequence in self.prefilling:
                self.prefilling.remove(sequence)
        self.running.pop(request)

    def preempt(self, request: Request, allow_swap: bool = True) -> None:
        """Take slots and pages back from a running request; it waits for them in the queue again."""
        sequences = request.live
        # Sequences that share pages would each come back with a copy: they are computed again, and share again.
        can_swap = allow_swap and len(request.sequences) == 1 and self.slots.computed[sequences[0].slot] > 0
        swapped = self.swapping.swap_out(sequences[0]) if self.swapping is not None and can_swap else None
        if swapped is not None:
            sequences[0].swapped = swapped
            self.counts.swapped += 1
        else:
            self.counts.recomputed += 1
            for sequence in sequences:
                self.prefixes.store(sequence)
        for sequence in sequences:
            self._leave(sequence)
        request.preemptions += 1
        request.state = State.WAITING
        self.running.pop(request, None)
        self.add(request)

    def _leave(self, sequence: Sequence) -> None:
        self.on_release(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        self._chunks.pop(sequence, None)
        self.prefixes.sharers.pop(sequence, None)
        self._vacated.append(sequence.slot)
        self.pages.free(sequence.slot)
        self.slots.release(sequence)

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        self.slots.check()
        self.pages.check()
        self.waiting.check()
        for sequence in self.prefilling:
            assert sequence.slot >= 0, "a sequence without a slot is to be computed"
        for request in self.running:
            assert request.state is State.RUNNING, "a request that does not run is among those that do"
