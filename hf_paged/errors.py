"""The package's own errors. Bad arguments are plain ``ValueError`` and ``TypeError``."""


class UnsupportedModelError(ValueError):
    """The model, or one of its layers, cannot be served exactly; the message says why and what to use instead."""


class OutOfPagesError(RuntimeError):
    """A pool with a fixed number of pages cannot give what a step needs. The pool stays usable; nothing was taken.

    Attributes:
        needed: pages that the step asked for.
        free: pages that were free.
        total: pages of the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.needed, self.free, self.total = needed, free, total
        super().__init__(
            f"the step needs {needed} more pages, {free} of {total} are free: give the cache more with num_pages=, "
            f"free sequences, or leave num_pages=None for a pool that grows."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.needed, self.free, self.total)


class RequestError(ValueError):
    """A request that the engine cannot take, or had to end; the message names what was asked and what is possible."""


class QueueFullError(RequestError):
    """More requests wait than the engine lets wait: try again later.

    Attributes:
        waiting: requests that wait.
        max_waiting: see :class:`EngineConfig`.
    """

    def __init__(self, waiting: int, max_waiting: int) -> None:
        self.waiting, self.max_waiting = waiting, max_waiting
        super().__init__(
            f"{waiting} requests wait for a slot, the engine lets {max_waiting} wait: try again later, or set "
            f"EngineConfig(max_waiting=)."
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.waiting, self.max_waiting)


class RankError(RuntimeError):
    """The processes that hold the parts of a model do not do the same, or one of them has failed: what they were to do
    together has ended on all of them."""


class InvalidScoresError(ValueError):
    """No token can be chosen: scores have NaN, or leave no token with a probability."""
