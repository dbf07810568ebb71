"""How an engine follows the first rank of a sharded model, and what it does once another rank has failed."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from ..errors import RankError
from .core import EngineCore, no_gradients
from .group import RankGroup
from .loop import StepLoop
from .news import StepNews
from .process import is_exiting
from .turn_lock import TurnLock
from .waiting import Mailbox

STUCK_WAIT_S = 5.0
"""Seconds for the step that runs to end after another rank has failed, before requests end without it."""


class Joint(Protocol):
    """What an engine is here."""

    drive: TurnLock
    mail: Mailbox
    loop: StepLoop

    @property
    def core(self) -> EngineCore:
        """The sequences and steps."""

    def step_with(self, news: StepNews | None) -> bool:
        """Run a step."""


def follow(engine: Joint, group: RankGroup) -> bool:
    """Do what the first rank does next; False: no more comes."""
    try:
        news = group.receive_news(1.0)
    except RankError as error:
        with engine.drive:
            engine.loop.mark_broken(error)
        return False
    if news is None:
        return True
    if news.command is None:
        engine.step_with(news)
    else:
        with engine.drive, no_gradients(), engine.core.on_device(), contextlib.suppress(Exception):
            # What it raises it has noted; before the next step all ranks compare that.
            engine.loop.command(news.command[0], *news.command[1])
            engine.loop.note_counts()
    if not engine.mail.is_closed:
        return True
    group.leave()
    return False


def wait_for_end(engine: Joint, thread: threading.Thread | None, group: RankGroup) -> None:
    """Until the first rank closes its engine, or this process ends.

    Args:
        thread: that follows.
    """
    while thread is not None and thread.is_alive() and not engine.mail.is_closed:
        if is_exiting():
            group.fail("has ended")
        thread.join(0.1)


def watcher(reference: "weakref.ref[Joint]") -> Callable[[RankError | None], bool]:
    """What :meth:`RankGroup.tell` is given."""

    def on_failure(error: RankError | None) -> bool:
        engine = reference()
        if engine is None or error is None:
            return engine is not None
        _end_with_ranks(engine, error)
        return True

    return on_failure


def _end_with_ranks(engine: Joint, error: RankError) -> None:
    """Another rank has failed. The thread that runs steps sees that with its next message, unless it waits for that
    rank inside of the model's own communication."""
    end = time.monotonic() + STUCK_WAIT_S
    while not engine.drive.acquire(blocking=False):
        if engine.mail.is_closed or time.monotonic() > end:
            engine.loop.abandon(error)
            return
        time.sleep(0.02)
    try:
        if not engine.mail.is_closed:
            engine.loop.mark_broken(error)
    finally:
        engine.drive.release()
