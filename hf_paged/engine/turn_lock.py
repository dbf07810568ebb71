"""A lock that is handed over in the order of asking."""

import threading
from collections import deque


class TurnLock:
    """A reentrant lock whose waiters get it one after the other, in the order in which they asked.

    ``threading.RLock`` lets the thread that gives it back take it again at once, before those who wait for it: a loop
    that holds it for every step would keep them waiting for many steps.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    @property
    def is_held(self) -> bool:
        """Whether any thread has it."""
        return self._owner is not None

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; returns whether it was taken, which without ``blocking`` may be False."""
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return True
        turn = threading.Lock()
        turn.acquire()
        try:
            with self._state:
                if self._owner is None:
                    self._owner = me
                    return True
                if not blocking:
                    return False
                self._waiting.append((me, turn))
            turn.acquire()
            return True
        except BaseException:  # Ctrl-C
            self._withdraw(me, turn)
            raise

    def release(self) -> None:
        """Give the lock to the thread that has waited longest."""
        if self._depth:
            self._depth -= 1
            return
        with self._state:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            turn.release()
        else:
            self._owner = None

    def _withdraw(self, me: int, turn: threading.Lock) -> None:
        """Wait no longer; what was handed over meanwhile goes on to the next."""
        with self._state:
            if (me, turn) in self._waiting:
                self._waiting.remove((me, turn))
            elif self._owner == me:
                self._hand_over()

    def __enter__(self) -> "TurnLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
