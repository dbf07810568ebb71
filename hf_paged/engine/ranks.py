"""What an engine asks of the other processes that hold a part of its model; here: there are none.

Every rank of a sharded model runs the same scheduler over the same requests. Whatever could differ among them, the
first rank decides: see :mod:`.group`.
"""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Alone:
    """The process has the whole model.

    Attributes:
        rank, size: of this process, and how many there are.
        leads: this process takes requests and decides.
        is_joint: there are others.
        can_capture: a CUDA graph can hold how the model communicates.
    """

    rank, size = 0, 1
    leads, is_joint, can_capture = True, False, True

    def decide(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, or raises, on the first rank; the others do not call it. Called by the thread that
        runs steps, on all ranks at the same place."""
        return make()

    def sendable(self, error: BaseException) -> BaseException:
        """The error as it may be part of what :meth:`decide` gives."""
        return error

    def least(self, number: int) -> int:
        """The smallest ``number`` of all ranks."""
        return number

    def first_text(self, text: str | None) -> str | None:
        """The ``text`` of the first rank that has one."""
        return text

    def decide_call(self, make: Callable[[], T]) -> T:
        """As :meth:`decide`, in a call that all ranks make, by the thread that makes it."""
        return make()

    def check(self) -> None:
        """Raises RankError: another rank has failed, and what this one has computed with it is of no use."""


ALONE = Alone()
