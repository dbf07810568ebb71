"""Requests that wait, in the order of their keys."""

import heapq
from collections.abc import Iterator

from .request import Key, Request, State


class RequestQueue:
    """A heap of requests, the smallest key first.

    Attributes:
        num_tokens: of their prompts.
        num_others: requests of no offline batch.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Request]] = []
        self.num_tokens = self.num_online = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        """In no order but the first."""
        return (request for _, request in self._heap)

    def ordered(self) -> list[Request]:
        """In the order of service."""
        return [request for _, request in sorted(self._heap)]

    @property
    def first(self) -> Request:
        """The next request; there must be one."""
        return self._heap[0][1]

    def push(self, request: Request) -> None:
        """Put a request in."""
        heapq.heappush(self._heap, (request.key, request))
        self._count(request, 1)

    def pop(self) -> Request:
        """Take the first request out."""
        request = heapq.heappop(self._heap)[1]
        self._count(request, -1)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out, if it is there."""
        others = [entry for entry in self._heap if entry[1] is not request]
        self._count(request, len(others) - len(self._heap))
        self._heap = others
        heapq.heapify(self._heap)

    def _count(self, request: Request, change: int) -> None:
        self.num_tokens += change * len(request.prompt)
        self.num_online += change * (not request.is_offline)

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        tokens = sum(len(request.prompt) for request in self)
        assert self.num_tokens == tokens, f"{tokens} prompt tokens wait, {self.num_tokens} were counted"
        others = sum(not request.is_offline for request in self)
        assert self.num_online == others, f"{others} requests of no offline batch wait, {self.num_online} were counted"
        for request in self:
            assert request.state is State.WAITING, "a request that does not wait is in the queue"
            assert all(sequence.slot < 0 for sequence in request.sequences), "a waiting request has a slot"
