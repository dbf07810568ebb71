"""One request: what was asked, its sequences, and what it gives."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..sampling.token_selector import RequestParams


Key = tuple[float, int, int]
"""Seconds, new tokens of an offline batch's request as a negative number, order of submission."""


class ActiveAdapters(enum.Enum):
    """Stands for what is active on the model, where a request names no adapter."""

    ACTIVE = "what is active on the model"

    def __repr__(self) -> str:
        return self.name


ACTIVE = ActiveAdapters.ACTIVE
Adapter = str | ActiveAdapters | None
"""The name of a LoRA adapter; None: the base model."""


class State(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Seconds of one request.

    Attributes:
        queued_s: from submit until it first ran.
        first_token_s: from submit until its first new token; None if there was none.
        total_s: from submit to the end.
        preemptions: how often it lost its pages.
    """

    queued_s: float | None
    first_token_s: float | None
    total_s: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One sequence of a request.

    Attributes:
        token_ids: new tokens, the eos included.
        finish_reason: "stop" (eos, a stop string or criterion), "length", "cancelled", "deadline" or "error".
        logprobs: per new token, where asked for.
        stop_reason: what ended it, for "stop": the eos token, or the stop string; None: a criterion, or another reason.
        score: of a beam.
        beam_indices: of a beam: for each new token, the beam it came from.
    """

    token_ids: list[int]
    finish_reason: str
    logprobs: list[Any] | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    beam_indices: list[int] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request gives when it ends; the fields without a number are those of its first sequence.

    Attributes:
        request_id: as given to submit, or made there.
        prompt_ids: the prompt.
        token_ids: new tokens of the first sequence.
        finish_reason: "stop" (eos, a stop string or criterion), "length", "cancelled", "deadline" (it has passed) or
            "error".
        stop_reason: which eos token or stop string ended the first sequence, see :class:`SequenceOutput`.
        error: what ended it, for "error" and "deadline".
        logprobs: of the first sequence, one entry for each new token, where asked for.
        prompt_logprobs: of the prompt's tokens, None for the first one, where asked for.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        timing: seconds.
        sequences: all sequences: one, ``num_return_sequences`` samples, or the best beams.
    """

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    error: BaseException | None
    logprobs: list[Any] | None
    prompt_logprobs: list[Any] | None
    cached_tokens: int
    timing: RequestTiming
    sequences: tuple[SequenceOutput, ...]


class Sequence:
    """One sequence of a request that runs: in a slot, or with its tokens saved.

    Attributes:
        slot: its slot, -1 while it has none.
        saved: int64 tokens while it has no slot.
        swapped: its pages in host memory, if it was swapped out.
        finish_reason: None while it runs.
        stop_reason: see :class:`SequenceOutput`.
        logprobs: of its new tokens.
        stream: new tokens that iterators over the handle may give, guarded by ``mail.changed``; ``stream_end``: its
            finish reason, once they are all there.
    """

    __slots__ = (
        "finish_reason", "index", "logprobs", "request", "saved", "slot", "stop_reason", "stream", "stream_end",
        "swapped",
    )  # fmt: skip

    def __init__(self, request: "Request", index: int) -> None:
        self.request, self.index = request, index
        self.slot = -1
        self.saved: np.ndarray | None = request.prompt
        self.swapped: Any = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[Any] = []
        self.stream: list[int] = []
        self.stream_end: str | None = None

    @property
    def tokens(self) -> np.ndarray:
        """int64, the tokens of a sequence without a slot."""
        assert self.saved is not None, "the tokens of a running sequence are in its slot"
        return self.saved


@dataclass(eq=False, slots=True)
class Request:
    """A request inside the engine.

    Attributes:
        number: order of submission.
        key: order of service: the smallest goes first; see :class:`EngineConfig.ageing_s`.
        has_made_id: its id was not given, and may be exchanged while no caller has seen it.
        is_offline: its caller waits for the end of all requests of the same call, not for its first token, and it ends
            with its last token that is allowed.
        sequences: its own.
        forked: whether the other sequences have their share of the prompt's pages already.
        beams: the search over its sequences, for beam requests.
        is_watched: stopping criteria beyond eos and length.
        output: what it gave, once it has ended; ``is_public``: whether its caller may know.
        uses_prefixes: whether cached prefixes may stand for the beginning of its prompt.
        most_pages: of each group of layers, what it holds at most.
        message: for the other ranks of the model, where there are any.
        adapter: that its rows are computed with.
    """

    number: int
    request_id: str
    prompt: np.ndarray
    rules: "RequestParams"
    priority: float
    salt: Any
    submitted: float
    key: Key
    has_made_id: bool = False
    deadline: float | None = None
    is_watched: bool = False
    is_offline: bool = False
    uses_prefixes: bool = True
    most_pages: list[int] = field(default_factory=list)
    state: State = State.WAITING
    forked: bool = False
    beams: Any = None
    sequences: list[Sequence] = field(default_factory=list)
    error: BaseException | None = None
    output: RequestOutput | None = None
    is_public: bool = False
    cached_tokens: int = 0
    preemptions: int = 0
    started: float | None = None
    first_token: float | None = None
    prompt_logprobs: list[Any] | None = None
    message: bytes = b""
    adapter: Adapter = ACTIVE

    @property
    def live(self) -> list[Sequence]:
        """Sequences that have not ended."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]
