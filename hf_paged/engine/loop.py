"""The steps of an engine: one after the other, the next launched before the tokens of the last are on the host."""

import contextlib
import heapq
from typing import Any

import torch
from transformers.utils import logging

from ..errors import QueueFullError, RankError, RequestError
from ..fusion import FusedModel
from .core import EngineCore
from .group import RankGroup
from .in_flight import InFlightStep
from .joint_steps import JointSteps
from .news import StepNews
from .page_events import PagePublisher
from .scheduling.page_budget import give_back_unused
from .scheduling.request import ACTIVE, Request, RequestOutput
from .scheduling.step import ScheduledStep
from .trace import Counters, RequestRecord, StepRecord, Trace
from .waiting import Mailbox

logger = logging.get_logger(__name__)

MOST_ENDED = 16
"""Ended requests among those with a deadline, beyond as many as have not ended, before they are taken out; all are once
none is left that has not ended."""


class StepLoop:
    """Runs steps, and lets other threads see what has happened. The caller holds the engine's lock of steps.

    Args:
        core: the sequences.
        mail: what other threads ask, and see.
        fused: modules that run fused, None: none do.

    Attributes:
        pending: the step that is on its way, None: there is none.
        deadlines: heap of (when, number, request).
        is_paused, is_asleep: no step runs; pages have no memory either.
        broken: what has ended the engine.
        seen: of the end of the last step, for statistics.
        step_began: when the running step did, None: none runs.
        joint: what other processes are told, and tell, of a sharded model's steps; None: there are none.
        pages: tells those who listen what the prefix cache holds.
    """

    def __init__(self, core: EngineCore, mail: Mailbox, fused: FusedModel | None) -> None:
        self.core, self.mail, self.fused = core, mail, fused
        self.trace = Trace(core.config.trace_steps, core.clock())
        self.counters = Counters()
        self.pending: InFlightStep | None = None
        self.deadlines: list[tuple[float, int, Request]] = []
        self._num_deadlines = 0
        self.is_paused = self.is_asleep = False
        self._weights_change = True
        self.broken: BaseException | None = None
        self._to_raise: BaseException | None = None
        self.step_began: float | None = None
        self.joint = JointSteps(core.ranks, mail) if isinstance(core.ranks, RankGroup) else None
        self.pages = PagePublisher(core.pool.prefixes, core.config.page_size)
        self.note_counts()

    def note_counts(self) -> None:
        """Let the statistics be those of now."""
        self.seen = self.counters.snapshot(self.core)

    def check_open(self) -> None:
        """
        Raises:
            RequestError: the engine is closed, or has stopped with an error.
        """
        for kind in (RequestError, RankError):
            if isinstance(self.broken, kind):
                raise kind(str(self.broken))
        if self.broken is not None:
            raise RequestError(f"the engine has stopped with an error of its own: {self.broken!r}.") from self.broken
        if self.mail.is_closed:
            raise RequestError("the engine is closed: make another, hf_paged.Engine(model).")

    def check_room(self, request: Request) -> None:
        """``mail.changed`` is held.

        Raises:
            QueueFullError: ``EngineConfig(max_waiting=)`` requests wait, and there is no slot for one more.
        """
        config = self.core.config
        if config.max_waiting is None:
            return
        # Slots that were free after the last step go to what has come since, unless others wait for these already.
        free = 0 if self.seen.queued else config.max_num_seqs - self.seen.rows
        room = max(0, free - request.rules.num_sequences + 1)
        num_waiting = len(self.mail.unfinished) - self.seen.running - room
        if num_waiting >= config.max_waiting:
            raise QueueFullError(num_waiting, config.max_waiting)

    def step(self, news: StepNews | None = None) -> bool:
        """Run one step, if there is anything to compute; returns whether there was.

        Args:
            news: what the first rank has sent, on the others.
        """
        self.step_began = self.core.clock()
        try:
            moved = self._run_step(news)
        except BaseException as error:
            # Not a request's fault: the books cannot be trusted any more. No caller shall wait forever.
            self.mark_broken(error)
            self._note(error)
            moved = True
        self.step_began = None
        return moved

    def take_error(self) -> BaseException | None:
        """What is meant for the thread that ran the step."""
        error, self._to_raise = self._to_raise, None
        return error

    def _note(self, error: BaseException) -> None:
        """What is no Exception is meant for the thread that runs the step, once that has ended; a thread of the
        engine's own goes on."""
        if not isinstance(error, Exception):
            self._to_raise = error

    def _run_step(self, news: StepNews | None) -> bool:
        core, clock = self.core, self.core.clock
        start = clock()
        if not self.intake(start, news) or self.is_paused or self.mail.is_closed:
            self.publish()
            return False
        if core.has_unsettled_adapters():
            self.collect_pending()
            core.settle_adapters()
        if not core.can_plan_ahead():
            self.collect_pending()
        work = core.plan(is_ahead=self.pending is not None)
        if work is None:
            moved = self.collect_pending()
            self.publish()
            return moved
        num_tokens, forward_s = work.num_tokens, 0.0
        try:
            result = core.run(work)
            forward_s = clock() - start
            launched = core.launch(work, result, self.pending)
            self.counters.new_tokens += launched.num_tokens
            self.collect_pending()
            self.pending = launched
            if not core.can_wait(launched):
                self.collect_pending()
        except BaseException as error:
            self._fail(error)
            self.collect_pending()
            core.endings.fail_step(work, error)
            self._note(error)
        self.counters.steps += 1
        self.counters.prompt_tokens += num_tokens - work.num_decode
        duration = clock() - start
        self.counters.busy_s += duration
        self.trace.steps.append(_step_record(core, work, start - self.trace.start, duration, forward_s, num_tokens))
        self.publish()
        return True

    def collect_pending(self) -> bool:
        """Take the tokens of the step that is on its way; returns whether there was one."""
        launched, self.pending = self.pending, None
        if launched is None:
            return False
        try:
            self.counters.new_tokens -= self.core.collect(launched)
            if self.joint is not None and launched.tokens is not None:
                self.joint.note_tokens(launched.tokens.wait())
        except BaseException as error:
            self._fail(error)
            self.core.endings.fail_step(launched.work, error)
            self._note(error)
        return True

    def _fail(self, error: BaseException) -> None:
        """A step has raised: if it does so on all ranks, they go on without its requests."""
        if isinstance(error, RankError):
            raise error
        if self.joint is not None:
            self.joint.note_failure(error)

    def intake(self, now: float, news: StepNews | None = None) -> bool:
        """Take in what other threads asked for, or the first rank has sent, and end what is late.

        Returns:
            Whether there may be a step: ranks that do not lead were told of one.
        """
        if news is None:
            incoming, cancels = self.mail.take()
            late = _take_late(self.deadlines, now)
            if self.joint is not None:
                scheduler = self.core.scheduler
                has_work = bool(self.pending or scheduler.running or scheduler.waiting) and not self.is_paused
                if not self.joint.tell(incoming, cancels, late, has_work):
                    return False
        else:
            assert self.joint is not None
            incoming, cancels, late = self.joint.understood(news, now)
        if not self.is_paused and not self.mail.is_closed:
            self._look_for_changes(incoming)
        for request in incoming:
            self.core.scheduler.add(request)
            if request.adapter is not ACTIVE:
                self.core.named.append(request)
            if request.deadline is not None:
                self._num_deadlines += 1
                if news is None:
                    heapq.heappush(self.deadlines, (request.deadline, request.number, request))
        for request in cancels:
            self.core.endings.end_request(request, "cancelled")
        # Those that have come too late already have been taken in.
        for request in late + (_take_late(self.deadlines, now) if self.joint is None else []):
            assert request.deadline is not None
            seconds = request.deadline - request.submitted
            self.core.endings.end_request(
                request, "deadline", RequestError(f"the deadline of {seconds:.3g} seconds has passed.")
            )
        return True

    def _look_for_changes(self, incoming: list[Request]) -> None:
        """Drop what was computed with other weights than the model has now."""
        core = self.core
        change = core.runner.change(look_closely=bool(incoming))
        if change is None and incoming and not core.scheduler.running and core.would_reuse(incoming):
            change = core.runner.change_of_values()
        change = self._of_any_rank(change)
        if change is not None:
            self.start_over(change)

    def _of_any_rank(self, change: str | None) -> str | None:
        """What has changed, on this rank or another."""
        return change if self.joint is None else self.joint.compare(change, self.counters.steps)

    def command(self, name: str, *arguments: Any) -> Any:
        """Call a method between steps, on all ranks."""
        if self.joint is not None:
            self.joint.send_command(name, arguments)
        try:
            return getattr(self, name)(*arguments)
        except Exception as error:
            if isinstance(error, RankError):
                self.mark_broken(error)
            elif self.joint is not None:
                self.joint.note_failure(error, in_step=False)
            raise
        finally:
            if self.pages.has_news():
                self.publish()

    def start_over(self, change: str | None, keep_graphs: bool = False) -> None:
        """Drop captured steps and prefixes; running requests compute their tokens again."""
        core = self.core
        if change is not None and core.holds_computed():
            logger.warning_once(
                f"{type(core.model).__name__} has changed ({change}): what an engine has computed with it is dropped, "
                f"running requests compute their tokens again."
            )
        self.collect_pending()
        if not keep_graphs:
            core.runner.drop_graphs()
        core.preempt_all(allow_swap=False)
        core.drop_prefixes()

    def publish(self) -> None:
        """Let other threads see what has happened."""
        core = self.core
        if core.endings.finished and not core.scheduler.running and core.holds_computed():
            # Before a caller knows that nothing runs, and may write to the weights.
            core.runner.remember_values()
        # A rank that does not answer may hold the lock of steps, and with it the prefix cache.
        tells_pages = self.broken is None and self.pages.has_news()
        if not core.endings.finished and not self.mail.streams and not self.mail.sleepers and not tells_pages:
            self.seen = self.counters.snapshot(self.core)
            return
        with self.mail.changed:
            if tells_pages:
                self.pages.publish()
            for request in core.endings.finished:
                self.mail.unfinished.pop(request.request_id, None)
                self.mail.streams.pop(request, None)
                if self.joint is not None:
                    self.joint.forget(request)
                self._num_deadlines -= request.deadline is not None
                output = request.output
                assert output is not None
                reason = output.finish_reason
                # Another one: a reader of the statistics has the one before.
                self.counters.finished = {**self.counters.finished, reason: self.counters.finished.get(reason, 0) + 1}
                self.trace.requests.append(_record_of(request, output, self.trace.start))
            self.seen = self.counters.snapshot(self.core)
            # Last: a caller that gets a result may look at the statistics at once.
            for request in core.endings.finished:
                request.is_public = True
            core.endings.finished.clear()
            if len(self.deadlines) > (2 * self._num_deadlines + MOST_ENDED if self._num_deadlines else 0):
                self.deadlines = [entry for entry in self.deadlines if entry[2].output is None]
                heapq.heapify(self.deadlines)
            for request in self.mail.streams:
                _fill_streams(request, core)
            sleepers, self.mail.sleepers = self.mail.sleepers, []
            self.mail.changed.notify_all()
        self.mail.wake_sleepers(sleepers)

    def mark_broken(self, error: BaseException) -> None:
        """End every request with an error that no request has caused."""
        self.broken = error
        if self.joint is not None:
            self.joint.end(error)
        unfinished = self._shut()
        for request in unfinished:
            with contextlib.suppress(Exception):
                self.core.endings.end_request(request, "error", error)
            if request.output is None:
                self.core.endings.end_unaccounted(request, error)
        self.publish()

    def _shut(self) -> list[Request]:
        """Take no request any more; returns those that have not ended."""
        with self.mail.changed:
            self.mail.is_closed = True
            if self.joint is not None:
                self.joint.end_claims()
            return list(self.mail.unfinished.values())

    def abandon(self, error: RankError) -> None:
        """End every request while a step waits for a rank that does not answer, without the lock of steps."""
        self.broken = error
        for request in self._shut():
            if request.output is None:
                self.core.endings.end_unaccounted(request, error)
        self.publish()

    # Between steps

    def drop_prefixes(self) -> None:
        """See :meth:`Engine.drop_prefixes`."""
        self.core.drop_prefixes()

    def pause(self, keep_graphs: bool, weights_change: bool) -> None:
        """See :meth:`Engine.pause`."""
        self.collect_pending()
        if not self.is_paused and self.core.holds_computed():
            self.core.runner.remember_values()
        if not keep_graphs:
            self.core.runner.drop_graphs()
        self.is_paused, self._weights_change = True, weights_change

    def resume(self) -> None:
        """Run steps again after a pause; what was computed with another model is dropped."""
        if self.is_paused:
            runner = self.core.runner
            change = runner.change(look_closely=True)
            if change is None and self._weights_change and self.core.holds_computed():
                change = runner.change_of_values()
            change = self._of_any_rank(change)
            if change is not None:
                self.start_over(change)
            elif self.fused is not None:
                self.fused.compare_tables()
            self.is_paused = False

    def sleep(self, keep_graphs: bool) -> None:
        """Pause, and give the memory of the pages back."""
        cache, num_used = self.core.cache, self.core.cache.num_used()
        self.start_over(None, keep_graphs)
        self.pause(keep_graphs, weights_change=True)
        if not keep_graphs:
            cache.drop()
        elif not self.core.ranks.least(cache.release(num_used)):
            self.core.runner.drop_graphs()
        give_back_unused(self.core.device)
        self.is_asleep = True

    def wake(self) -> None:
        """Have memory for the pages again; the pause goes on."""
        if self.is_asleep:
            try:
                self.core.cache.restore()
                has_room = True
            except torch.OutOfMemoryError:
                has_room = False
            if not self.core.ranks.least(has_room):
                # The device is full: pages are made as they are needed, at other addresses.
                self.core.runner.drop_graphs()
                self.core.cache.drop()
        self.is_asleep = False

    def warm_up(self, sizes: list[int] | None, progress: bool) -> int:
        """Capture steps, see :meth:`Engine.warm_up`; returns how many graphs there are."""
        if self.is_paused:
            raise RequestError("the engine is paused: call resume().")
        runner = self.core.runner
        if sizes is None and self.core.device.type != "cpu":
            runner.warm_up_prompts(self.core.config.max_batch_tokens)
        graphs, chunk_graphs = runner.graphs, runner.chunk_graphs
        if graphs is None or chunk_graphs is None:
            return 0
        graphs.warm_up(sizes, progress)
        if sizes is None and graphs.failure is None:
            chunk_graphs.warm_up(progress)
        return len(graphs) + len(chunk_graphs)

    def close_now(self, reason: str) -> None:
        """End every request with ``reason``, and give all memory back."""
        if self.mail.is_closed:
            return
        unfinished = self._shut()
        self.collect_pending()
        self.core.runner.drop_graphs()
        for request in self.mail.take()[0]:
            self.core.scheduler.add(request)
        for request in unfinished:
            self.core.endings.end_request(request, reason)
        self.core.drop_prefixes()
        self.core.cache.drop()
        if self.fused is not None:
            self.fused.restore()
        # Last: a caller that gets a result may go on with the model at once.
        self.publish()
        with self.mail.changed:
            self.mail.changed.notify_all()


def _take_late(deadlines: list[tuple[float, int, Request]], now: float) -> list[Request]:
    """Take requests whose deadline has passed out of a heap."""
    late = []
    while deadlines and deadlines[0][0] <= now:
        late.append(heapq.heappop(deadlines)[2])
    return late


def _fill_streams(request: Request, core: EngineCore) -> None:
    """Let those who read a request's tokens as they come have the new ones."""
    for sequence in request.sequences:
        tokens = core.slots.tokens(sequence.slot) if sequence.slot >= 0 else sequence.tokens
        sequence.stream.extend(tokens[len(request.prompt) + len(sequence.stream) :].tolist())
        sequence.stream_end = sequence.finish_reason


def _step_record(
    core: EngineCore, work: ScheduledStep, at: float, duration: float, forward_s: float, num_tokens: int
) -> StepRecord:
    """A step, for the trace."""
    counts = core.scheduler.counts
    return StepRecord(
        at,
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


def _record_of(request: Request, output: RequestOutput, origin: float) -> RequestRecord:
    """A request that has ended, for the trace that began at ``origin``."""
    timing = output.timing
    at = request.submitted - origin
    return RequestRecord(
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
