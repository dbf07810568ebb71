"""The thread that runs the steps of an engine while it has requests."""

import threading
import weakref
from typing import Protocol


class Turns(Protocol):
    """What the thread needs of an engine."""

    def turn(self) -> bool:
        """One turn of the loop; False: the thread ends."""


def loop_thread(engine: Turns) -> threading.Thread:
    """A thread that runs turns, and holds the engine between two of them only weakly; not started yet."""
    return threading.Thread(target=_run_loop, args=(weakref.ref(engine),), name="hf_paged engine", daemon=True)


def _run_loop(reference: "weakref.ref[Turns]") -> None:
    """The thread ends once no reference to the engine is left."""
    while True:
        engine = reference()
        if engine is None or not engine.turn():
            return
        del engine
