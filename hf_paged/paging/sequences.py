"""Page tables of a batch of sequences, as lists of page ids.

    sequence of 5 tokens, page_size 4:      pages   [ 7        , 2        ]
                                            slots   28 29 30 31  8 (9 ...)

Sequences may share pages (forks, beams). A shared page is copied only when a sharer writes into it: appending to a
sequence whose last page is shared and not full gives that sequence a page of its own, and reports the copy to make.
"""

from collections.abc import Sequence

from .allocator import PageAllocator


class SequenceTable:
    """The logical pages and lengths of a batch of sequences.

    Attributes:
        pages: per sequence, the page ids of its tokens in order.
        lengths: per sequence, its number of tokens.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, num_seqs: int = 0) -> None:
        self.allocator = allocator
        self.page_size = page_size
        self.pages: list[list[int]] = [[] for _ in range(num_seqs)]
        self.lengths: list[int] = [0] * num_seqs

    def __len__(self) -> int:
        return len(self.lengths)

    def pages_needed(self, counts: Sequence[int]) -> int:
        """Pages that :meth:`append` would take for ``counts[i]`` new tokens of sequence i."""
        needed = 0
        for pages, length, count in zip(self.pages, self.lengths, counts):
            if count:
                needed += -(-(length + count) // self.page_size) - len(pages)
                needed += self._must_copy(pages, length)
        return needed

    def append(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """Make room for ``counts[i]`` new tokens at the end of sequence i.

        Returns:
            Pairs ``(source, target)`` of pages to copy before the new tokens are written.

        Raises:
            OutOfPagesError: nothing was changed.
        """
        taken = self.allocator.allocate(self.pages_needed(counts))
        copies = []
        for i, count in enumerate(counts):
            if not count:
                continue
            pages, length = self.pages[i], self.lengths[i]
            if self._must_copy(pages, length):
                source, target = pages[-1], taken.pop()
                copies.append((source, target))
                self.allocator.free([source])
                pages[-1] = target
            for _ in range(-(-(length + count) // self.page_size) - len(pages)):
                pages.append(taken.pop())
            self.lengths[i] = length + count
        # When every sharer of a page writes in one step, the last one no longer needs its copy.
        self.allocator.free(taken)
        return copies

    def truncate(self, lengths: Sequence[int]) -> None:
        """Shorten the sequences to ``lengths`` and give back the pages behind."""
        for i, length in enumerate(lengths):
            if not 0 <= length <= self.lengths[i]:
                raise ValueError(f"lengths[{i}] must be 0 to {self.lengths[i]}, got {length}.")
            keep = -(-length // self.page_size)
            self.allocator.free(self.pages[i][keep:])
            del self.pages[i][keep:]
            self.lengths[i] = length

    def select(self, indices: Sequence[int]) -> None:
        """Make the batch ``[old[i] for i in indices]``: drop, reorder and fork sequences without touching K/V."""
        for i in indices:
            if not 0 <= i < len(self):
                raise ValueError(f"indices must be 0 to {len(self) - 1}, got {i}.")
        old = self.pages
        kept = [old[i] for i in indices]
        for pages in kept:
            self.allocator.share(pages)
        for pages in old:
            self.allocator.free(pages)
        self.pages = [list(pages) for pages in kept]
        self.lengths = [self.lengths[i] for i in indices]

    def clear(self) -> None:
        """Give every page back and forget the sequences."""
        self.select([])

    def _must_copy(self, pages: list[int], length: int) -> bool:
        return length % self.page_size != 0 and self.allocator.is_shared(pages[-1])
