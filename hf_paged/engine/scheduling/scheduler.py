"""Which sequences compute how many tokens in the next step, and who has to wait or give pages back. No tensors here.

There is no prefill phase and no decode phase: each sequence has ``computed`` tokens chasing its ``length``, under one
budget of tokens for a step. Running sequences go first, then waiting requests in the order of their keys; a key is the
time of arrival less the priority's advance, so it never changes, and nobody is overtaken forever.

    budget 16     | decode rows: 1 token each | chunks of prompts, best key first        |
                  | a  b  c  d                | e e e e  (rest of e)   f f f f f f f f   |

Whoever decodes waits for the chunks of a mixed step. So it computes few prompt tokens, ``mixed_prompt_tokens``, as
long as few are queued, and more with the square of their number, up to the whole budget: then more sequences wait for
prompts than are slowed down by them::

    queued prompt tokens, in whole budgets     1/4    1/2    1     1.4 and more
    computed in a mixed step                   1/32   1/8    1/2   1

Where nobody waits for a first token, all ends are known (a *job*) and there is room for all at once, the last tokens
of the longest request end the job, and the others have time. A step of few tokens takes hardly less time than one of
:data:`JOB_TOKENS`, since the weights are read anyway, and more tokens take time in proportion. So all steps have about
as many: the longest requests go first, rows that would end early wait while there are prompts to compute in their
place, and with the last prompts everyone decodes::

    tokens     | c c c c c c c c c c c c d d |    c  chunks of prompts
    of a step  | c c c c c c c c d d d d d d |    d  rows with as many tokens to go as the job has steps
               | c c c d d d d d d d d d d d |
    steps ->   | d d d d d d d d d d d d d d |    all end together
"""

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from ...errors import OutOfPagesError, RequestError
from .request import Key, Request, Row, State
from .slot_pages import SlotPages
from .slots import Slots

MOST_LEADERS = 8
"""Rows with the same first page that a row looks through for most tokens in common, the last ones."""
MIXED_WORK = 300_000_000_000
"""Prompt tokens times parameters of a mixed step: at two operations for each, a millisecond of an H200."""
MIXED_TOKENS = (192, 1024)
"""Fewest and most prompt tokens that follow from that: with fewer, reading the weights costs more than the tokens."""

JOB_TOKENS = 256
"""Tokens of a step of a job at least: fewer take hardly less time, since the weights are read anyway."""

LONG_QUEUE = 2
"""Of the queued prompt tokens a mixed step computes the part that they are of so many whole budgets."""


def mixed_prompt_tokens(option: int | str | None, num_parameters: int) -> int | None:
    """``EngineConfig.mixed_prompt_tokens`` with "auto" resolved for a model of ``num_parameters``."""
    if option != "auto":
        return option  # type: ignore[return-value]
    least, most = MIXED_TOKENS
    return min(max(least, MIXED_WORK // max(1, num_parameters)), most)


def enough(count: int) -> int:
    """Prompt tokens that will do where ``count`` are wanted: a captured step that is somewhat smaller is better filled
    than a larger one."""
    return 3 * count // 4


def job_tokens(option: int | str | None, num_parameters: int, max_batch_tokens: int) -> int | None:
    """Tokens of a job's steps at least; None: a job's steps are like others, since ``mixed_prompt_tokens`` is given.

    Of small models a step's own costs are more than their weights' reading: whole budgets keep the number of steps with
    prompts low.
    """
    if option != "auto":
        return None
    is_small = MIXED_WORK // max(1, num_parameters) > MIXED_TOKENS[0]
    return max_batch_tokens if is_small else min(JOB_TOKENS, max_batch_tokens)


@dataclass(slots=True)
class StepWork:
    """The rows of one step; decode rows come first.

    Attributes:
        slots: int64 ``[num_rows]``.
        counts: int64 ``[num_rows]``, tokens that each computes.
        num_decode: rows at the front that compute one token and have computed all before it.
        samples: bool ``[num_rows]``, whether the row's last logits choose a token.
    """

    slots: np.ndarray
    counts: np.ndarray
    num_decode: int
    samples: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.counts.sum())


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
        max_batch_tokens: budget of a step.
        mixed_prompt_tokens: prompt tokens of a step beside decode rows while few are queued; None: the whole budget.
        job_tokens: tokens of a step at least where there are only requests of jobs; None: such steps are like others.
        whole_prompts: a prompt is computed in one step (models whose states cannot go on from a chunk).
        prefix_caching: look for cached prefixes, and store them.
        on_admit, on_release: called with a row that just got a slot, or is about to lose it.
        swap_out: called with a row that is preempted; returns what ``swap_in`` needs, or None to recompute it.
        swap_in: called with such a row in a slot without pages; brings its pages and computed tokens back, or returns
            False to recompute it.
        clock: seconds, for timing.

    Attributes:
        fill: called with a number of decode rows, of prompt tokens, and of tokens of a step: prompt tokens that fill a
            captured step of at least so many; None: there is none.
    """

    def __init__(  # noqa: PLR0913
        self,
        slots: Slots,
        pages: SlotPages,
        *,
        max_batch_tokens: int,
        mixed_prompt_tokens: int | None = None,
        job_tokens: int | None = None,
        whole_prompts: bool = False,
        prefix_caching: bool = True,
        on_admit: Callable[[Row], None] = lambda row: None,
        on_release: Callable[[Row], None] = lambda row: None,
        swap_out: Callable[[Row], object] = lambda row: None,
        swap_in: Callable[[Row], bool] = lambda row: False,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.slots, self.pages, self.max_batch_tokens = slots, pages, max_batch_tokens
        self.mixed_prompt_tokens, self.job_tokens = mixed_prompt_tokens, job_tokens
        self.fill: Callable[[int, int, int], int | None] = lambda num_decode, count, least: None
        self.whole_prompts, self.prefix_caching = whole_prompts, prefix_caching
        self.on_admit, self.on_release, self.swap_out, self.swap_in = on_admit, on_release, swap_out, swap_in
        self.clock = clock
        self.waiting: list[tuple[Key, Request]] = []
        self.running: dict[Request, None] = {}
        self.prefilling: list[Row] = []
        self.impossible: list[tuple[Request, Exception]] = []
        self.counts = SchedulerCounts()
        self._waiting_tokens = self._waiting_others = 0
        self._blocked: tuple[int, int, int] | None = None
        # Of the step that is being planned: tokens of rows that do not decode yet, slots that were given up, and rows
        # that share what others compute in it.
        self._chunks: dict[Row, int] = {}
        self._vacated: list[int] = []
        self._followers: dict[Row, None] = {}
        # Rows whose prompts are being computed, by salt and the tokens of their first page; None: not looked at yet.
        self._beginnings: dict[tuple[Hashable, bytes], list[Row]] | None = None

    # Requests come and go

    def add(self, request: Request) -> None:
        """Put a request in the queue."""
        heapq.heappush(self.waiting, (request.key, request))
        self._count_waiting(request, 1)
        self._blocked = None

    def _count_waiting(self, request: Request, change: int) -> None:
        self._waiting_tokens += change * len(request.prompt)
        self._waiting_others += change * (not request.is_job)

    def remove(self, request: Request) -> None:
        """Take a request out of the queue or out of its slots, its pages with it."""
        if request.state is State.WAITING:
            others = [entry for entry in self.waiting if entry[1] is not request]
            self._count_waiting(request, len(others) - len(self.waiting))
            self.waiting = others
            heapq.heapify(self.waiting)
        for row in request.rows:
            if row.slot >= 0:
                self._leave(row)
            row.swapped = None
        self.running.pop(request, None)
        self._blocked = None

    def finish_row(self, row: Row) -> None:
        """A row has ended: store its full pages as a prefix, give its slot and pages back."""
        if row.slot >= 0:
            self._store_prefix(row)
            self._leave(row)
        if not row.request.live:
            self.running.pop(row.request, None)
        self._blocked = None

    def pages_for(self, prompt: int, total: int, num_rows: int, group: int) -> int:
        """Pages of a group that a request holds at most: a prompt that ``num_rows`` rows of ``total`` tokens share."""
        table, pages = self.pages.tables[group], self.pages
        chunk = prompt if self.whole_prompts else pages.page_size
        if num_rows == 1:
            return pages.most_pages(table, total, chunk)
        if table.window is not None or self.whole_prompts:
            return num_rows * pages.most_pages(table, total, chunk)
        shared = prompt // pages.page_size
        return shared + num_rows * (pages.pages_of(total) - shared) + 1

    # A step

    def schedule(self, may_give_up: bool = True) -> StepWork | None:
        """Plan a step and take its pages; None when there is nothing to compute.

        Requests that turn out impossible are put in ``impossible``; they hold their pages until removed.

        Args:
            may_give_up: False: rows may be about to end, so that nobody is impossible for the want of their pages.
        """
        decode = self._plan_decode()
        budget = self.max_batch_tokens - int((1 + self.slots.draft[decode]).sum())
        chunks = self._chunks
        chunks.clear()
        self._vacated.clear()
        self._followers.clear()
        self._beginnings = None
        is_paced = self._is_unhurried_job()
        if is_paced:
            decode, num_due, total = self._pace(decode)
            budget = total - num_due
        elif self.prefilling or self.waiting:
            budget = min(budget, self._prompt_budget(decode))
        rows, may_admit = sorted(self.prefilling, key=lambda row: row.request.key), True
        while budget > 0 and (rows or (self.waiting and may_admit)):
            if may_admit and self.waiting and (not rows or self.waiting[0][0] < rows[0].request.key):
                admitted = self._admit()
                may_admit = admitted is not None
                rows[:0] = admitted or []
            else:
                budget -= self._plan_chunk(rows.pop(0), budget)
        if is_paced:
            # Those that can wait take the places that prompts leave.
            decode = np.sort(decode[: max(num_due, total - sum(chunks.values()))] if chunks else decode)
        if self._vacated:
            # What was preempted for a chunk is out of the step, whoever has its slot now.
            decode = decode[~np.isin(decode, self._vacated)]
        if not len(decode) and not chunks:
            if self.prefilling and may_give_up:
                self._give_up(min(self.running, key=lambda r: r.key))
            return None
        slots = np.concatenate([decode, np.array([row.slot for row in chunks], dtype=np.int64)])
        counts = np.concatenate([1 + self.slots.draft[decode], np.array(list(chunks.values()), dtype=np.int64)])
        samples = self.slots.computed[slots] + counts >= self.slots.length[slots]
        return StepWork(slots, counts, len(decode), samples)

    def _prompt_budget(self, decode: np.ndarray) -> int:
        """Prompt tokens that a step computes beside the decode rows in slots ``decode``."""
        if self.mixed_prompt_tokens is None or self.whole_prompts:
            return self.max_batch_tokens
        if not len(decode) or (self.job_tokens == self.max_batch_tokens and self._has_only_jobs()):
            return self.max_batch_tokens
        queued = sum(self._target(row) - int(self.slots.computed[row.slot]) for row in self.prefilling)
        if self._blocked is None and self.waiting:
            # Those that find a slot, at their mean length; what prefixes will save is not known yet.
            queued += self._waiting_tokens * min(len(self.waiting), self.slots.num_free) // len(self.waiting)
        count = max(self.mixed_prompt_tokens, queued * queued // (LONG_QUEUE * self.max_batch_tokens))
        return self.fill(len(decode), enough(count), 0) or count

    def _has_only_jobs(self) -> bool:
        """Whether every request that runs or waits is one of a job."""
        return not self._waiting_others and all(request.is_job for request in self.running)

    def _is_unhurried_job(self) -> bool:
        """Whether there are prompts to compute, of requests of jobs alone, and slots and pages for all of them."""
        if self.job_tokens in (None, self.max_batch_tokens) or self.whole_prompts:
            return False
        if not (self.prefilling or self.waiting) or not self._has_only_jobs():
            return False
        free, waiting = self.slots.num_free, [request for _, request in self.waiting]
        if len(waiting) > free or sum(len(request.live) for request in waiting) > free:
            return False
        pages = np.array([request.most_pages for request in [*self.running, *waiting]]).sum(axis=0)
        return all(count <= table.allocator.num_pages for count, table in zip(pages, self.pages.tables))

    def _queue(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of prompts, in the order of service: tokens to compute, rows that go on from it, and the steps these take."""
        slots, queue = self.slots, []
        for row in sorted(self.prefilling, key=lambda row: row.request.key):
            request, target = row.request, self._target(row)
            num_rows = 1 if request.forked else len(request.live)
            queue.append((target - int(slots.computed[row.slot]), num_rows, request.rules.max_length - 1 - target))
        for _, request in sorted(self.waiting):
            known = [len(row.tokens) for row in request.live]
            count = sum(known) if request.forked else known[0]
            queue.append((count, len(known), request.rules.max_length - 1 - max(known)))
        tokens, rows, steps = np.array(queue).T
        return tokens, rows, steps

    def _pace(self, decode: np.ndarray) -> tuple[np.ndarray, int, int]:
        """A step of a job that all of it has room for.

        The job takes as many steps as the row with most tokens to go. Of these each other row can spare some, and a
        prompt is due when its rows have none to spare. Of the work that must be done by then, whichever prompt that is,
        a step takes its share.

        Args:
            decode: slots of rows that may decode.

        Returns:
            The same slots, those with most tokens to go first; how many of them cannot wait; tokens of the step.
        """
        slots, least = self.slots, self.job_tokens
        assert least is not None, "the model's jobs have steps like others"
        left = slots.max_length[decode] - 1 - slots.computed[decode]
        order = np.argsort(-left, kind="stable")
        decode, left = decode[order], left[order]
        tokens, rows, steps = self._queue()
        horizon = max(int(left.max(initial=1)), int(steps.max()))
        num_due = int((left >= horizon).sum())
        # By the time that each prompt is due, and at the end: tokens of it and those before it, and of rows that could
        # not spare all of the steps till then.
        due = np.append(horizon - steps, horizon)
        spare = horizon - np.concatenate([left, steps])
        order = np.argsort(spare)
        spare, rows = spare[order], np.concatenate([np.ones(len(left), dtype=np.int64), rows])[order]
        started = np.searchsorted(spare, due)
        num_rows, spared = (np.append(0, x.cumsum())[started] for x in (rows, rows * spare))
        work = np.append(tokens, 0).cumsum() + num_rows * due - spared
        rate = int(np.ceil(work / np.maximum(due, 1)).max())
        prompt_tokens = self.fill(num_due, rate - num_due, least) or max(rate - num_due, least - num_due, 1)
        return decode, num_due, min(num_due + prompt_tokens, self.max_batch_tokens)

    def launched(self, work: StepWork) -> list[tuple[Row, list[Row]]]:
        """A planned step was launched: its tokens count as computed.

        Returns:
            Requests whose prompt is now computed for one row, as (that row, the rows that share it from here on).
        """
        self.slots.computed[work.slots] += work.counts
        self._followers.clear()
        forks = []
        for slot in work.slots[work.num_decode :].tolist():
            row = self.slots.row(slot)
            computed = self.slots.computed[slot]
            if computed == len(row.request.prompt):
                # Others with the same beginning find it while this one still runs.
                self._store_prefix(row)
            if not row.request.forked and computed >= len(row.request.prompt):
                forks.append((row, self._fork(row)))
            if computed >= self._target(row):
                self.prefilling.remove(row)
                self._start_together(row.request)
        return forks

    def failed(self) -> None:
        """The planned step could not be launched, and its requests have ended: rows that share what it was to compute
        start again."""
        for row in list(self._followers):
            if row.slot >= 0:
                self.slots.computed[row.slot] = row.request.cached_tokens = 0
                self.preempt(row.request, allow_swap=False)

    def _target(self, row: Row) -> int:
        """Tokens that a row computes before it decodes."""
        length, prompt = int(self.slots.length[row.slot]), len(row.request.prompt)
        if not row.request.forked:
            return prompt  # The other rows go on from the prompt that the first computes.
        if row.request.rules.mode == "beams" and length > prompt:
            return length - 1  # Beams choose their tokens together, so they wait for one another.
        return length

    def _start_together(self, request: Request) -> None:
        """Let beams that were computed again decode once all of them are ready."""
        slots, host = [row.slot for row in request.live], self.slots
        if request.rules.mode != "beams" or (host.length[slots] == len(request.prompt)).any():
            return
        if (host.computed[slots] == host.length[slots] - 1).all():
            host.decoding[slots] = True

    def _plan_decode(self) -> np.ndarray:
        """Slots that compute one token (and their drafts), with pages for it."""
        slots, pages = self.slots, self.pages
        while True:
            decode = np.flatnonzero(slots.decoding)
            if int((1 + slots.draft[decode]).sum()) > self.max_batch_tokens:
                slots.draft[decode] = 0
            ends = slots.computed[decode] + 1 + slots.draft[decode]
            missing = -(-ends // pages.page_size) - pages.num_pages[decode]
            short = decode[missing > 0]
            copies = [s for s in decode[slots.shares[decode]].tolist() if pages.shares_page(s, int(slots.computed[s]))]
            needed = int(missing[missing > 0].sum()) + len(copies)
            if needed == 0:
                break
            pages.pass_window(short.tolist(), slots.computed)
            if pages.make_room(needed):
                if (missing[missing > 0] == 1).all():
                    pages.extend_one(short)
                else:
                    for slot, end in zip(short.tolist(), ends[missing > 0].tolist()):
                        pages.extend(slot, end)
                pages.own_pages(copies, slots.computed[copies].tolist())
                break
            if not self._preempt_worst():
                break
        slots.shares[decode] = False
        return decode

    def _plan_chunk(self, row: Row, budget: int) -> int:
        """Plan the next tokens of a row whose prompt is not computed; returns how many."""
        if row.slot < 0 or row in self._chunks:
            return 0  # It was preempted for a better one just now, or admitted again after that.
        slots, pages, slot = self.slots, self.pages, row.slot
        computed = int(slots.computed[slot])
        count = self._target(row) - computed
        if not self.whole_prompts:
            count = min(count, budget)
        elif count > budget and (self._chunks or budget < self.max_batch_tokens):
            return 0  # A prompt longer than the budget has a step for itself.
        if count <= 0:
            return 0
        pages.pass_window([slot], slots.computed)
        if slots.shares[slot]:
            while pages.shares_page(slot, computed):
                if pages.make_room(1):
                    pages.own_pages([slot], [computed])
                elif not self._preempt_worst(better_than=row):
                    return 0
            slots.shares[slot] = False
        while True:
            missing = pages.pages_of(computed + count) - int(pages.num_pages[slot])
            if missing <= 0 or pages.make_room(missing):
                break
            fits = (int(pages.num_pages[slot]) + pages.num_free()) * pages.page_size - computed
            if fits > 0 and not self.whole_prompts:
                count = min(count, fits)
                break
            if not self._preempt_worst(better_than=row):
                return 0
        pages.extend(slot, computed + count)
        self._chunks[row] = count
        return count

    def _admit(self) -> list[Row] | None:
        """Let the first waiting request run if it can; returns its rows that have tokens to compute before they decode.

        None: it has to wait.
        """
        request = self.waiting[0][1]
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
        heapq.heappop(self.waiting)
        self._count_waiting(request, -1)
        self._blocked = None
        request.state = State.RUNNING
        request.started = self.clock() if request.started is None else request.started
        self.running[request] = None
        rows = request.live
        try:
            # States cannot go on from a prompt that is computed again: each row computes all that it has.
            has_more = max(len(row.tokens) for row in rows) > len(request.prompt)
            request.forked = len(rows) == 1 or (self.whole_prompts and has_more)
            for row in rows:
                self.slots.admit(row)
                self.on_admit(row)
            # Otherwise the others share the prompt that the first one computes.
            return [row for row in (rows if request.forked else rows[:1]) if self._begin(row)]
        except Exception as error:
            # What no check at submit foresaw is that request's own fault.
            self._reject(request, error)
            return []

    def _begin(self, row: Row) -> bool:
        """Give a row that just got its slot what is known of its beginning.

        Returns:
            Whether it has tokens to compute before it decodes.
        """
        is_back = False
        slot = row.slot
        if row.swapped is not None and self.swap_in(row):
            is_back = True
        elif self.prefix_caching and row.request.uses_prefixes and self.pages.pool.prefixes is not None:
            tokens = self.slots.tokens(slot)
            limit = min(len(tokens) - 1, len(row.request.prompt) - 1 if not row.request.forked else len(tokens))
            match = self.pages.pool.prefixes.match(tokens.tolist(), row.request.salt, max_tokens=limit)
            self.pages.adopt(slot, match.pages)
            found = self._follow(row, tokens[:limit], match.num_tokens)
            self.slots.computed[slot] = found
            if not row.request.preemptions:
                row.request.cached_tokens = found
                self.counts.prefix_tokens += found
                self.counts.prompt_tokens += len(tokens)
        row.swapped = None
        if is_back and self.slots.computed[slot] + 1 == self.slots.length[slot]:
            self.slots.decoding[slot] = True
            return False
        self.prefilling.append(row)
        return True

    def _follow(self, row: Row, tokens: np.ndarray, found: int) -> int:
        """Share full pages with the row that has most of ``tokens`` by the end of this step: every layer writes the
        keys and values of all rows before any row attends.

        Args:
            row: that has pages of the first ``found`` tokens.
            tokens: int64 ``[n]``, what it may share.
            found: a multiple of the page size.

        Returns:
            Tokens that need not be computed.
        """
        slots, page_size = self.slots, self.pages.page_size
        if self._beginnings is None:
            self._beginnings = {}
            for other in self.prefilling:
                self._beginnings.setdefault(self._beginning(other), []).append(other)
        alike = self._beginnings.setdefault(self._beginning(row), [])
        leader, most = None, found
        # Samples of a prompt come one after the other.
        for other in alike[: -MOST_LEADERS - 1 : -1]:
            if other.slot < 0:
                continue
            end = min(len(tokens), int(slots.computed[other.slot]) + self._chunks.get(other, 0))
            differs = np.flatnonzero(slots.history[other.slot, :end] != tokens[:end])
            same = (int(differs[0]) if len(differs) else end) // page_size * page_size
            if same > most and self.pages.can_share_on(other.slot, row.slot, same):
                leader, most = other, same
        alike.append(row)
        if leader is not None:
            self.pages.share_on(leader.slot, row.slot, most)
            self._followers[row] = None
        return most

    def _beginning(self, row: Row) -> tuple[Hashable, bytes]:
        """What rows have in common that may share pages."""
        return row.request.salt, self.slots.history[row.slot, : self.pages.page_size].tobytes()

    def _can_start(self, request: Request) -> bool:
        """Whether there are slots, and pages for all tokens that the request has, beside what others still need."""
        rows = request.live
        if len(rows) > self.slots.num_free:
            return False
        if not self.running:
            return True
        pages = self.pages
        most = max(len(row.tokens) for row in rows)
        needed = []
        for group, table in enumerate(pages.tables):
            # One more page, so that it is not preempted at once.
            count = self.pages_for(len(request.prompt), most + 1, len(rows), group)
            for row in self.prefilling:
                missing = pages.pages_of(int(self.slots.length[row.slot])) - int(pages.num_pages[row.slot])
                whole = pages.most_pages(table, int(self.slots.length[row.slot]), pages.page_size)
                count += min(missing, whole)
            needed.append(count)
        return pages.make_room(needed)

    def _fork(self, leader: Row) -> list[Row]:
        """Let the other rows of a request share the prompt that ``leader`` has computed."""
        request = leader.request
        others = [row for row in request.live if row is not leader]
        self.pages.fork(leader.slot, [row.slot for row in others])
        request.forked = True
        prompt = len(request.prompt)
        for row in [leader, *others]:
            self.slots.shares[row.slot] = prompt % self.pages.page_size != 0
        for row in others:
            self.slots.computed[row.slot] = prompt
            if self._target(row) > prompt:
                self.prefilling.append(row)
        return others

    # Giving back

    def _preempt_worst(self, better_than: Row | None = None) -> bool:
        """Preempt the running request with the worst key; False if there is none to preempt.

        Args:
            better_than: preempt only a request whose key is worse than this row's.
        """
        worst = max(self.running, key=lambda r: r.key, default=None)
        if worst is None or (better_than is not None and worst.key <= better_than.request.key):
            return False
        if len(self.running) == 1:
            self._give_up(worst)
        else:
            self.preempt(worst)
        return True

    def _give_up(self, request: Request) -> None:
        """Admission checks promise that a request alone always fits into the pool. Where the device has no memory for
        the pool, the promise is broken: that ends the request, not the loop."""
        free = self.pages.num_free()
        allocators = [table.allocator for table in self.pages.tables]
        total, backed = sum(a.num_pages for a in allocators), sum(a.num_backed for a in allocators)
        error: Exception = OutOfPagesError(free + 1, free, total)
        if backed < total:
            error = RequestError(
                f"the device has memory for {backed} of the pool's {total} pages at the moment, which is too little "
                f"for this request alone: free memory of the device, or ask for fewer new tokens."
            )
        self._reject(request, error)

    def _reject(self, request: Request, error: Exception) -> None:
        """Let a running request take no further part; the caller of :meth:`schedule` ends it."""
        self.impossible.append((request, error))
        for row in request.live:
            if row.slot >= 0:
                self.slots.decoding[row.slot] = False
            if row in self.prefilling:
                self.prefilling.remove(row)
        self.running.pop(request)

    def preempt(self, request: Request, allow_swap: bool = True) -> None:
        """Take slots and pages back from a running request; it waits for them in the queue again."""
        rows = request.live
        # Rows that share pages would each come back with a copy: they are computed again, and share again.
        can_swap = allow_swap and len(request.rows) == 1 and self.slots.computed[rows[0].slot] > 0
        swapped = self.swap_out(rows[0]) if can_swap else None
        if swapped is not None:
            rows[0].swapped = swapped
            self.counts.swapped += 1
        else:
            self.counts.recomputed += 1
            for row in rows:
                self._store_prefix(row)
        for row in rows:
            self._leave(row)
        request.preemptions += 1
        request.state = State.WAITING
        self.running.pop(request, None)
        self.add(request)

    def _leave(self, row: Row) -> None:
        self.on_release(row)
        if row in self.prefilling:
            self.prefilling.remove(row)
        self._chunks.pop(row, None)
        self._followers.pop(row, None)
        self._vacated.append(row.slot)
        self.pages.free(row.slot)
        self.slots.release(row)

    def _store_prefix(self, row: Row) -> None:
        if not self.prefix_caching or row.slot < 0 or row in self._followers:
            return
        computed = int(self.slots.computed[row.slot])
        self.pages.store_prefix(row.slot, self.slots.tokens(row.slot)[:computed], row.request.salt)

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        self.slots.check()
        self.pages.check()
        for row in self.prefilling:
            assert row.slot >= 0, "a row without a slot is to be computed"
        for request in self.running:
            assert request.state is State.RUNNING, "a request that does not run is among those that do"
        tokens = sum(len(request.prompt) for _, request in self.waiting)
        assert self._waiting_tokens == tokens, f"{tokens} prompt tokens wait, {self._waiting_tokens} were counted"
        others = sum(not request.is_job for _, request in self.waiting)
        assert self._waiting_others == others, f"{others} requests of no job wait, {self._waiting_others} were counted"
        for _, request in self.waiting:
            assert request.state is State.WAITING, "a request that does not wait is in the queue"
            assert all(row.slot < 0 for row in request.rows), "a waiting request has a slot"
