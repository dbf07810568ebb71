"""What threads that ask and the thread that runs steps hand to one another, and how threads wait for it."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..errors import RequestError
from .scheduling.request import Request
from .turn_lock import TurnLock


class Mailbox:
    """The small state of an engine that all threads see, guarded by ``changed``. No thread waits for the lock of
    steps while it holds that.

    Attributes:
        incoming, cancels: requests that are new, and that shall end.
        abandoned: the same, from the garbage collector, without a lock.
        unfinished: requests that have not ended, by name.
        streams: requests whose new tokens a caller reads.
        sleepers: event loops to wake once something has changed.
        is_closed: no request comes any more.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.incoming: list[Request] = []
        self.cancels: list[Request] = []
        self.abandoned: deque[Request] = deque()
        self.unfinished: dict[str, Request] = {}
        self.streams: dict[Request, None] = {}
        self.sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []
        self.is_closed = False

    def put(self, requests: list[Request], rename: Callable[[Request], str]) -> None:
        """Hand requests over; ``changed`` is held.

        Args:
            rename: gives another name to a request whose made name a caller has given to another.
        """
        named: dict[str, Request] = {}
        for request in requests:
            name = request.request_id
            while request.has_made_id and name in self.unfinished:  # A caller has given that to another.
                name = rename(request)
            if name in self.unfinished or name in named:
                raise RequestError(
                    f"request_id {name!r} is that of a request that has not ended: give another, or None."
                )
            named[name] = request
        self.unfinished |= named
        self.incoming += requests

    def take(self) -> tuple[list[Request], list[Request]]:
        """New requests, and requests that shall end."""
        with self.changed:
            incoming, self.incoming = self.incoming, []
            cancels, self.cancels = self.cancels, []
        while self.abandoned:
            cancels.append(self.abandoned.popleft())
        return incoming, cancels

    def abandon(self, request: Request) -> None:
        """No caller can ask for the rest of a request: it is cancelled with the next step.

        Takes no lock: it is called by the garbage collector, from any thread, whatever that holds.
        """
        self.abandoned.append(request)

    def num_new_tokens(self, request: Request) -> int:
        """New tokens of all sequences that a stream can give by now; from the first call on they are collected.
        ``changed`` is held."""
        if request.output is not None:
            return sum(len(sequence.token_ids) for sequence in request.output.sequences)
        self.streams[request] = None
        return sum(len(sequence.stream) for sequence in request.sequences)

    def new_tokens(self, request: Request, given: int, index: int = 0) -> tuple[list[int], str | None]:
        """New tokens of a sequence behind the first ``given``; and how it ended, None: there may be more."""
        with self.changed:
            if request.output is not None:
                sequence = request.output.sequences[index]
                return sequence.token_ids[given:], sequence.finish_reason
            running = request.sequences[index]
            return running.stream[given:], running.stream_end

    def wake_sleepers(self, sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]]) -> None:
        """Wake event loops that have waited; ``changed`` is not held."""
        for loop, future in sleepers:
            # An event loop that was closed has no task left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)


class Steps(Protocol):
    """What waiting needs of an engine.

    Attributes:
        background: a thread of the engine's own runs the steps.
        mail: where what is waited for is seen.
        drive: held while a step runs.
    """

    background: bool
    mail: Mailbox
    drive: TurnLock

    def step(self) -> bool:
        """Run a step; returns whether there was one."""

    def wake_loop(self) -> None:
        """Have a thread run steps; ``mail.changed`` is held."""

    def cancel_request(self, request: Request) -> bool:
        """End a request with what it has."""


def wait_for(engine: Steps, predicate: Callable[[], bool], timeout_s: float | None, request_id: str) -> None:
    """Block until ``predicate()``; without a background loop, run steps meanwhile.

    Raises:
        TimeoutError: ``timeout_s`` seconds passed.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        with engine.mail.changed:
            if predicate():
                return
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{request_id} has not ended in {timeout_s} seconds.")
            if engine.background:
                engine.wake_loop()
                engine.mail.changed.wait(1.0 if left is None else min(left, 1.0))
                continue
        if not engine.drive.acquire(blocking=False):
            # Another thread runs a step.
            with engine.mail.changed:
                if not predicate():
                    engine.mail.changed.wait(0.01)
            continue
        try:
            moved = engine.step()
        finally:
            engine.drive.release()
        if not moved:
            with engine.mail.changed:
                if not predicate():
                    engine.mail.changed.wait(0.005)


async def wait_async(engine: Steps, predicate: Callable[[], bool]) -> None:
    """As :func:`wait_for`, without blocking the event loop."""
    loop = asyncio.get_running_loop()
    while True:
        with engine.mail.changed:
            if predicate():
                return
            future = loop.create_future()
            engine.mail.sleepers.append((loop, future))
            if engine.background:
                engine.wake_loop()
        if engine.background:
            await future
        elif not await loop.run_in_executor(None, engine.step):
            await asyncio.sleep(0.001)


def _wake(future: "asyncio.Future") -> None:
    if not future.done():
        future.set_result(None)
