"""How requests end: their slots and pages come back, and they get an output."""

from collections.abc import Callable

import numpy as np

from ..errors import InvalidScoresError
from .ranks import ALONE, Alone
from .sampling.stopping import stop_reason
from .scheduling.request import Request, RequestOutput, RequestTiming, Sequence, SequenceOutput, State
from .scheduling.scheduler import Scheduler
from .scheduling.step import ScheduledStep
from .scheduling.swapping import Swapping


class Endings:
    """Ends requests.

    Attributes:
        finished: requests that have ended since the caller last emptied it.
    """

    def __init__(
        self, scheduler: Scheduler, swapping: Swapping, clock: Callable[[], float], ranks: Alone = ALONE
    ) -> None:
        self.ranks = ranks
        self.scheduler, self.slots, self.pages = scheduler, scheduler.slots, scheduler.pages
        self.swapping, self.clock = swapping, clock
        self.finished: list[Request] = []

    def finish_sequence(self, sequence: Sequence, reason: str) -> None:
        """A sequence has ended, and with its last one the request."""
        sequence.finish_reason = reason
        self.scheduler.finish_sequence(sequence)
        if reason == "stop":
            sequence.stop_reason = self.stop_reason(sequence.request, sequence.tokens)
        if not sequence.request.live:
            self.finalize(sequence.request)

    def stop_reason(self, request: Request, tokens: np.ndarray) -> int | str | None:
        """What ended a sequence that has stopped, see :func:`~.stopping.stop_reason`."""
        if not request.is_watched:
            return stop_reason(request.rules, tokens)
        return self.ranks.decide(lambda: stop_reason(request.rules, tokens))

    def end_request(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a request that has not ended, wherever it is."""
        if request.state is State.FINISHED:
            return
        for sequence in request.live:
            sequence.finish_reason = reason
            self.swapping.drop(sequence)
        for sequence in request.sequences:
            if sequence.slot >= 0 and isinstance(error, InvalidScoresError):
                self.pages.forget_prefix(sequence.slot)
        self.scheduler.remove(request)
        request.error = error
        self.finalize(request)

    def fail_step(self, work: ScheduledStep, error: BaseException) -> None:
        """A step's forward has raised: its requests end with the cause, their pages come back."""
        for slot in work.slots.tolist():
            sequence = self.slots.sequences[slot]
            if sequence is not None:
                self.end_request(sequence.request, "error", error)
        self.scheduler.step_failed()

    def finalize(self, request: Request, sequences: tuple[SequenceOutput, ...] | None = None) -> None:
        """Give a request its output.

        Args:
            sequences: None: those of its sequences.
        """
        now, prompt = self.clock(), len(request.prompt)
        if sequences is None:
            sequences = tuple(
                SequenceOutput(
                    one.tokens[prompt:].tolist(), one.finish_reason or "error", one.logprobs or None, one.stop_reason
                )
                for one in request.sequences[: request.rules.num_return_sequences]
            )
        first = sequences[0]
        reason = first.finish_reason
        for sequence in request.sequences:
            if sequence.finish_reason in ("error", "cancelled", "deadline"):
                reason = sequence.finish_reason
        request.output = RequestOutput(
            request_id=request.request_id,
            prompt_ids=request.prompt.tolist(),
            token_ids=first.token_ids,
            finish_reason=reason,
            stop_reason=first.stop_reason,
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

    def end_unaccounted(self, request: Request, error: BaseException) -> None:
        """Give an output to a request whose books cannot be trusted any more."""
        for sequence in request.sequences:
            sequence.finish_reason = "error"
            sequence.saved = request.prompt if sequence.saved is None else sequence.saved
        request.error = error
        self.finalize(request)
