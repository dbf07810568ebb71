"""What happens to the process while engines run: Ctrl-C, its end, a fork."""

import _signal  # What signal wraps in enums, which cost more than all else here.
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

INTERRUPT = 2
"""Ctrl-C."""


class Running(Protocol):
    """What an engine is here."""

    @property
    def may_run(self) -> bool:
        """Whether any thread runs steps."""

    def close(self) -> None:
        """End it."""

    def after_fork(self) -> None:
        """In a forked child."""


_engines: "weakref.WeakSet[Any]" = weakref.WeakSet()
_is_exiting = threading.Event()


def register(engine: Running) -> None:
    """Close an engine before the interpreter goes, and tell it of a fork."""
    _engines.add(engine)


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Ctrl-C in the main thread is raised at the end of the block; a second one at once."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or _signal.getsignal(INTERRUPT) is not _signal.default_int_handler:
        yield
        return
    num_came = 0

    def note(number: int, frame: Any) -> None:
        nonlocal num_came
        num_came += 1
        if num_came > 1:
            raise KeyboardInterrupt

    _signal.signal(INTERRUPT, note)
    try:
        yield
    finally:
        _signal.signal(INTERRUPT, _signal.default_int_handler)
    if num_came:
        raise KeyboardInterrupt


def wait_if_exiting() -> None:
    """A daemon thread goes no further once the interpreter ends: stopped inside PyTorch it would abort the process."""
    if _is_exiting.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


def is_exiting() -> bool:
    """Whether the interpreter is about to end."""
    return _is_exiting.is_set()


def _close_all() -> None:
    """Before the interpreter goes: no step runs from here on."""
    _is_exiting.set()
    for engine in list(_engines):
        if engine.may_run:
            with contextlib.suppress(Exception):
                engine.close()


def _after_fork() -> None:
    _is_exiting.clear()
    for engine in list(_engines):
        engine.after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
