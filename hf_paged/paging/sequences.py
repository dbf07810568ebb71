"""Page tables of a batch of sequences, as lists of page ids.

    sequence of 5 tokens, page_size 4:      pages   [ 7        , 2        ]
                                            slots   28 29 30 31  8 (9 ...)

Sequences may share pages (forks, beams). A shared page is copied only when a sharer writes into it: appending to a
sequence whose last page is shared and not full gives that sequence a page of its own, and reports the copy to make.

Layers with a sliding window give pages back as the window moves: such a page's entry becomes GONE, and the sequence
holds the tokens from its first page that is not::

    sequence of 11 tokens, 6 of them kept:  pages   [ GONE , 7 , 2 ]
"""

from collections.abc import Sequence

from .allocator import PageAllocator

GONE = -1
"""The entry of a page that was given back because no later query sees it."""


class SequenceTable:
    """The logical pages and lengths of a batch of sequences.

    Attributes:
        pages: per sequence, the page ids of its tokens in order, GONE where given back.
        lengths: per sequence, its number of tokens.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, num_seqs: int = 0) -> None:
        self.allocator = allocator
        self.page_size = page_size
        self.pages: list[list[int]] = [[] for _ in range(num_seqs)]
        self.lengths: list[int] = [0] * num_seqs

    def __len__(self) -> int:
        return len(self.lengths)

    def held(self) -> list[int]:
        """Every page reference that the sequences hold."""
        return [page for pages in self.pages for page in pages if page != GONE]

    def first_tokens(self) -> list[int]:
        """Per sequence, the first token that is still held."""
        return [_first_held(pages) * self.page_size for pages in self.pages]

    def pages_needed(self, counts: Sequence[int], keep_from: Sequence[int] | None = None) -> int:
        """Pages that :meth:`append` would take with these arguments."""
        needed = 0
        for i, count in enumerate(counts):
            if count:
                needed += self._new_pages(i, count) - self._skipped(i, keep_from)
                needed += self._must_copy(i)
        return needed

    def append(self, counts: Sequence[int], keep_from: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """Make room for ``counts[i]`` new tokens at the end of sequence i.

        Args:
            counts: new tokens of each sequence.
            keep_from: per sequence, the first token worth keeping: pages wholly before it are never taken.

        Returns:
            Pairs ``(source, target)`` of pages to copy before the new tokens are written.

        Raises:
            OutOfPagesError: nothing was changed.
        """
        taken = self.allocator.allocate(self.pages_needed(counts, keep_from))
        copies = []
        for i, count in enumerate(counts):
            if not count:
                continue
            pages = self.pages[i]
            if self._must_copy(i):
                source, target = pages[-1], taken.pop()
                copies.append((source, target))
                self.allocator.free([source])
                pages[-1] = target
            new, skipped = self._new_pages(i, count), self._skipped(i, keep_from)
            pages.extend(GONE if k < skipped else taken.pop() for k in range(new))
            self.lengths[i] += count
        # When every sharer of a page writes in one step, the last one no longer needs its copy.
        self.allocator.free(taken)
        return copies

    def release_before(self, tokens: Sequence[int]) -> None:
        """Give back the pages of sequence i that lie wholly before its token ``tokens[i]``."""
        for pages, token in zip(self.pages, tokens):
            first = _first_held(pages)
            last = min(max(token, 0) // self.page_size, len(pages))
            if last > first:
                self.allocator.free(pages[first:last])
                pages[first:last] = [GONE] * (last - first)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Shorten the sequences to ``lengths`` and give back the pages behind."""
        for i, length in enumerate(lengths):
            if not 0 <= length <= self.lengths[i]:
                raise ValueError(f"lengths[{i}] must be 0 to {self.lengths[i]}, got {length}.")
            keep = -(-length // self.page_size)
            self.allocator.free(page for page in self.pages[i][keep:] if page != GONE)
            del self.pages[i][keep:]
            self.lengths[i] = length

    def select(self, indices: Sequence[int]) -> None:
        """Make the batch ``[old[i] for i in indices]``: drop, reorder and fork sequences without touching K/V."""
        for i in indices:
            if not 0 <= i < len(self):
                raise ValueError(f"indices must be 0 to {len(self) - 1}, got {i}.")
        old, before = self.pages, self.held()
        self.pages = [list(old[i]) for i in indices]
        self.lengths = [self.lengths[i] for i in indices]
        self.allocator.share(self.held())
        self.allocator.free(before)

    def adopt(self, pages: Sequence[list[int]], lengths: Sequence[int]) -> None:
        """Become a batch whose pages the caller already owns, and hands over."""
        if len(self):
            raise ValueError(f"a table that holds {len(self)} sequences cannot adopt others: clear() it first.")
        self.pages, self.lengths = [list(p) for p in pages], list(lengths)

    def clear(self) -> None:
        """Give every page back and forget the sequences."""
        self.select([])

    def _new_pages(self, i: int, count: int) -> int:
        return -(-(self.lengths[i] + count) // self.page_size) - len(self.pages[i])

    def _skipped(self, i: int, keep_from: Sequence[int] | None) -> int:
        return 0 if keep_from is None else max(0, keep_from[i] // self.page_size - len(self.pages[i]))

    def _must_copy(self, i: int) -> bool:
        return self.lengths[i] % self.page_size != 0 and self.allocator.is_shared(self.pages[i][-1])


def _first_held(pages: Sequence[int]) -> int:
    """Index of the first page that was not given back; pages are given back from the front only."""
    if not pages or pages[0] != GONE:
        return 0
    low, high = 0, len(pages)  # pages[low] is GONE, everything from high on is held
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pages[middle] == GONE else (low, middle)
    return high
