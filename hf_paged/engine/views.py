"""What an engine shows to other threads: statistics, requests, health. Nothing here waits for a step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .core import EngineCore
from .execution.adapters import ModelAdapters
from .loop import StepLoop
from .scheduling.request import Request, State
from .trace import EngineStats, engine_stats
from .turn_lock import TurnLock
from .waiting import Mailbox


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """A request that has not ended.

    Attributes:
        request_id: as given to submit, or made there.
        state: "waiting" or "running".
        priority: as given to submit.
        prompt_tokens: of its prompt; ``cached_tokens`` of these were found in the prefix cache.
        new_tokens: so far, over all of its sequences.
        preemptions: how often it lost its pages.
        age_s: seconds since submit.
        first_token_s: seconds from submit to its first new token; None: there is none yet.
    """

    request_id: str
    state: str
    priority: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    age_s: float
    first_token_s: float | None


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether an engine serves.

    Attributes:
        state: "open", "paused", "asleep", "closed", or "broken" (an error that no request has caused has ended it).
        error: what has broken it.
        step_s: seconds since the running step began, None: none runs. The first steps compile kernels and may take
            minutes; later ones take milliseconds, so a large value means that the device does not answer.
        unfinished: requests that have not ended.
    """

    state: str
    error: BaseException | None
    step_s: float | None
    unfinished: int

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken and run."""
        return self.state == "open"


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment.

    Attributes:
        stats: counts.
        health: whether it serves.
        requests: those that have not ended, in the order of submission.
    """

    stats: EngineStats
    health: EngineHealth
    requests: tuple[RequestSnapshot, ...]


class EngineViews:
    """The part of :class:`Engine` that looks and changes nothing.

    Attributes:
        config: options.
        model: a causal LM.
        drive: held while a step runs.
        mail: what other threads see.
    """

    config: EngineConfig
    model: Any
    drive: TurnLock
    mail: Mailbox
    _core: EngineCore
    loop: StepLoop

    def stats(self) -> EngineStats:
        """What the engine holds and has done. Waits for nothing: while a step runs, as of the end of the one before."""
        if self.drive.acquire(blocking=False):
            try:
                self.loop.note_counts()
            finally:
                self.drive.release()
        with self.mail.changed:
            seen, num_unfinished = self.loop.seen, len(self.mail.unfinished)
        return engine_stats(seen, num_unfinished)

    def adapters(self) -> dict[str, str | None]:
        """The adapters that are loaded into the model, by name: why requests cannot name them, None: they can.

        LoRA of linear layers can be named, of any rank and scaling, with ``use_rslora`` or without. That a model is
        sharded, or ``EngineConfig(compile=True)``, :meth:`Engine.submit` refuses besides.
        """
        found = ModelAdapters(self.model, self._core.runner.misfit)
        return {name: found.reason_against(name) for name in found.refusals}

    def health(self) -> EngineHealth:
        """Whether the engine serves. Waits for nothing."""
        loop = self.loop
        began = loop.step_began
        return EngineHealth(
            state=self._state(),
            error=loop.broken,
            step_s=None if began is None else max(0.0, self._core.clock() - began),
            unfinished=len(self.mail.unfinished),
        )

    def snapshot(self) -> EngineSnapshot:
        """Statistics, health and the requests that have not ended. Waits for nothing: while a step runs, a request may
        be shown as it was before or after it."""
        stats, health = self.stats(), self.health()
        with self.mail.changed:
            unfinished = list(self.mail.unfinished.values())
        now = self._core.clock()
        return EngineSnapshot(stats, health, tuple(self._seen(request, now) for request in unfinished))

    def _seen(self, request: Request, now: float) -> RequestSnapshot:
        new_tokens, lengths = 0, self._core.slots.length
        for sequence in request.sequences:
            # A sequence that leaves its slot meanwhile has its tokens saved first.
            slot, saved = sequence.slot, sequence.saved
            length = int(lengths[slot]) if saved is None and slot >= 0 else 0 if saved is None else len(saved)
            new_tokens += max(0, length - len(request.prompt))
        first = request.first_token
        return RequestSnapshot(
            request_id=request.request_id,
            state=(State.WAITING if request.state is State.WAITING else State.RUNNING).value,
            priority=request.priority,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            new_tokens=new_tokens,
            preemptions=request.preemptions,
            age_s=now - request.submitted,
            first_token_s=None if first is None else first - request.submitted,
        )

    def trace(self, path: str | Path) -> Path:
        """Write what the engine did: ``.json`` (Chrome trace), ``.csv`` (steps), or ``.png`` (matplotlib)."""
        with self.drive:
            return self.loop.trace.write(path)

    def check(self) -> None:
        """Prove that every page and slot is owned or free (AssertionError if not)."""
        with self.drive:
            self._core.check()

    def _state(self) -> str:
        loop = self.loop
        if loop.broken is not None:
            return "broken"
        if self.mail.is_closed:
            return "closed"
        return "asleep" if loop.is_asleep else "paused" if loop.is_paused else "open"

    def __repr__(self) -> str:
        return f"Engine({type(self.model).__name__}, {self._state()}, {len(self.mail.unfinished)} requests)"
