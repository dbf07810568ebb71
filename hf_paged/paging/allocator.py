"""Ownership of pages: reference counts and a free list, on plain ints."""

from collections import Counter
from collections.abc import Iterable

from ..errors import OutOfPagesError


class PageAllocator:
    """Hands out page ids ``0 .. num_pages - 1``; a page with several owners is shared.

    Taking and giving back a page is O(1). A fixed allocator raises :class:`OutOfPagesError` when it is empty; one
    that may grow is given more ids by its owner (:meth:`grow`), and rid of those at the end (:meth:`shrink`).

    Ids may be known before there is memory for them: those from ``num_backed`` on are not handed out (:meth:`back`).
    They are the bottom of the stack of free ids, the last ones first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = self.num_backed = 0
        self._free: list[int] = []
        self._owners: list[int] = []
        self._kept: set[int] = set()
        self._num_kept_alone = 0
        self.grow(num_pages)

    @property
    def num_free(self) -> int:
        """Pages without an owner, which can be allocated."""
        return len(self._free) - (self.num_pages - self.num_backed)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self.num_pages - len(self._free)

    @property
    def num_kept_alone(self) -> int:
        """Pages whose only owner is the one that :meth:`keep` made."""
        return self._num_kept_alone

    def grow(self, num_pages: int) -> None:
        """Add ids up to a total of ``num_pages``."""
        if num_pages < self.num_pages:
            raise ValueError(f"num_pages can only grow, got {num_pages} with {self.num_pages} pages.")
        # Low ids on top of the stack: they are handed out first, which keeps the used part of the pool compact.
        self._free = [*range(num_pages - 1, self.num_pages - 1, -1), *self._free]
        self._owners.extend([0] * (num_pages - self.num_pages))
        if self.num_backed == self.num_pages:
            self.num_backed = num_pages
        self.num_pages = num_pages

    def back(self, num_pages: int) -> None:
        """Say that there is memory for the ids below ``num_pages``, and for no others; those are free.

        Raises:
            ValueError: one of them has an owner.
        """
        if num_pages < self.num_backed:
            if num_pages < self.end:
                raise ValueError(
                    f"num_pages must be at least {self.end}, behind the last page in use, got {num_pages}."
                )
            self._free.sort(reverse=True)
        self.num_backed = min(num_pages, self.num_pages)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages, each with one owner; all of them or, with :class:`OutOfPagesError`, none."""
        if count > self.num_free:
            raise OutOfPagesError(count, self.num_free, self.num_pages)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one owner to each page; a page may be named several times."""
        for page in pages:
            if self._owners[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared.")
            if self._owners[page] == 1 and page in self._kept:
                self._num_kept_alone -= 1
            self._owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Remove one owner from each page; the last one gives it back."""
        for page in pages:
            if self._owners[page] < 1:
                raise ValueError(f"page {page} is free already.")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
            elif self._owners[page] == 1 and page in self._kept:
                self._num_kept_alone += 1

    def keep(self, page: int) -> None:
        """Add an owner that keeps a page after use (the prefix cache); there is one of these at most."""
        self.share([page])
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """Remove the owner that :meth:`keep` has added."""
        self._kept.remove(page)
        self._num_kept_alone -= self._owners[page] == 1
        self.free([page])

    @property
    def end(self) -> int:
        """The id behind the last page with an owner; 0 where no page has one."""
        end = self.num_pages
        while end and self._owners[end - 1] == 0:
            end -= 1
        return end

    def num_left(self, keep_free: int = 0) -> int:
        """Pages that can be left by :meth:`shrink`, with ``keep_free`` free ones among them if there are as many."""
        end = self.end
        return min(self.num_pages, end + max(0, keep_free - (end - self.num_used)))

    def shrink(self, num_pages: int) -> None:
        """Forget the ids from ``num_pages`` on, all of them free.

        Raises:
            ValueError: one of them has an owner.
        """
        if not self.end <= num_pages <= self.num_pages:
            raise ValueError(f"num_pages must be {self.end} to {self.num_pages}, got {num_pages}.")
        self._free = sorted((page for page in self._free if page < num_pages), reverse=True)  # as grow(): low ids first
        del self._owners[num_pages:]
        self.num_pages, self.num_backed = num_pages, min(num_pages, self.num_backed)

    def num_owners(self, page: int) -> int:
        """Owners of a page, 0 if it is free."""
        return self._owners[page]

    def is_shared(self, page: int) -> bool:
        """Whether a page has more than one owner, so that writing into it needs a copy first."""
        return self._owners[page] > 1

    def check(self, held: Iterable[int]) -> None:
        """Prove the books: ``held`` is every page reference that the owners hold, one entry each.

        Raises:
            AssertionError: a page is lost, freed twice, or counted wrongly.
        """
        expected = Counter(held)
        for page, owners in enumerate(self._owners):
            assert owners == expected[page], f"page {page} counts {owners} owners, {expected[page]} hold it"
        assert len(set(self._free)) == len(self._free), "a page is on the free list twice"
        assert all(self._owners[page] == 0 for page in self._free), "an owned page is on the free list"
        behind = [*range(self.num_pages - 1, self.num_backed - 1, -1)]
        assert self._free[: len(behind)] == behind, "a page without memory was handed out"
        alone = sum(self._owners[page] == 1 for page in self._kept)
        assert self._num_kept_alone == alone, f"{alone} pages are kept alone, {self._num_kept_alone} were counted"
        assert len(self._free) + sum(owners > 0 for owners in self._owners) == self.num_pages, "a page is lost"
