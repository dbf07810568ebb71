"""Page tables of a batch of sequences, as lists of page ids.

    sequence of 5 tokens, page_size 4:      pages   [ 7        , 2        ]
                                            slots   28 29 30 31  8 (9 ...)

Sequences may share pages (forks, beams). A shared page is copied only when a sharer writes into it: appending to a
sequence whose last page is shared and not full gives that sequence a page of its own, and reports the copy to make.

Layers with a sliding window give pages back as the window moves: such a page's entry becomes GONE, and the sequence
holds the tokens from its first page that is not::

    sequence of 11 tokens, 6 of them kept:  pages   [ GONE , 7 , 2 ]
"""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import torch

from .allocator import PageAllocator

GONE = -1
"""The entry of a page that was given back because no later query sees it."""


class SequenceTable:
    """The logical pages and lengths of a batch of sequences.

    Attributes:
        pages: per sequence, the page ids of its tokens in order, GONE where given back. To be changed by the methods
            only: :meth:`as_tensor` follows them.
        lengths: per sequence, its number of tokens.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, num_seqs: int = 0) -> None:
        self.allocator = allocator
        self.page_size = page_size
        self.pages: list[list[int]] = [[] for _ in range(num_seqs)]
        self.lengths: list[int] = [0] * num_seqs
        # pages as a tensor with room to grow, and per sequence the first entry of it that is out of date.
        self._tensor = _empty(num_seqs, 0)
        self._outdated: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def held(self) -> list[int]:
        """Every page reference that the sequences hold."""
        return [page for pages in self.pages for page in pages if page != GONE]

    def as_tensor(self) -> torch.Tensor:
        """int32 ``[num_seqs, max_pages]`` on CPU, GONE where there is no page: a view, good until the next change."""
        width = max(map(len, self.pages), default=0)
        if width > self._tensor.shape[1]:
            wider = _empty(len(self), max(16, 2 * width))
            wider[:, : self._tensor.shape[1]] = self._tensor
            self._tensor = wider
        rows = self._tensor.numpy()  # takes a list several times faster than the tensor does
        for i, first in self._outdated.items():
            pages = self.pages[i]
            rows[i, first : len(pages)] = pages[first:]
            rows[i, len(pages) :] = GONE
        self._outdated.clear()
        return self._tensor[:, :width]

    def first_tokens(self) -> list[int]:
        """Per sequence, the first token that is still held."""
        return [_first_held(pages) * self.page_size for pages in self.pages]

    def are_alike(self, leaders: Sequence[int]) -> bool:
        """Whether every sequence i has the pages and the length of sequence ``leaders[i]``."""
        return all(
            self.lengths[i] == self.lengths[leader] and self.pages[i] == self.pages[leader]
            for i, leader in enumerate(leaders)
        )

    def pages_needed(
        self, counts: Sequence[int], keep_from: Sequence[int] | None = None, leaders: Sequence[int] | None = None
    ) -> int:
        """Pages that :meth:`append` would take with these arguments."""
        sharers = None if leaders is None else Counter(leaders)
        needed = 0
        for i, count in enumerate(counts):
            if count and (leaders is None or leaders[i] == i):
                needed += self._new_pages(i, count) - self._skipped(i, keep_from)
                needed += self._must_copy(i, 1 if sharers is None else sharers[i])
        return needed

    def append(
        self, counts: Sequence[int], keep_from: Sequence[int] | None = None, leaders: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Make room for ``counts[i]`` new tokens at the end of sequence i.

        Args:
            counts: new tokens of each sequence.
            keep_from: per sequence, the first token worth keeping: pages wholly before it are never taken.
            leaders: per sequence, the one in whose pages its new tokens are: itself, or an earlier one that is its own
                leader and has the same pages, the same length, count and ``keep_from``. The two go on sharing all
                pages, and the new tokens are to be written once.

        Returns:
            Pairs ``(source, target)`` of pages to copy before the new tokens are written.

        Raises:
            OutOfPagesError: nothing was changed.
        """
        # Low ids first, from the end of the list: what a crop gives back then lies at the end of the pool.
        taken = self.allocator.allocate(self.pages_needed(counts, keep_from, leaders))[::-1]
        sharers = None if leaders is None else Counter(leaders)
        copies = []
        for i, count in enumerate(counts):
            if not count:
                continue
            if leaders is not None and leaders[i] != i:
                self._follow(i, leaders[i])
                continue
            pages = self.pages[i]
            if self._must_copy(i, 1 if sharers is None else sharers[i]):
                source, target = pages[-1], taken.pop()
                copies.append((source, target))
                self.allocator.free([source])
                self._set(i, [target], len(pages) - 1)
            new, skipped = self._new_pages(i, count), self._skipped(i, keep_from)
            if new:
                self._set(i, [GONE if k < skipped else taken.pop() for k in range(new)], len(pages))
            self.lengths[i] += count
        # When every sharer of a page writes in one step, the last one no longer needs its copy.
        self.allocator.free(taken)
        return copies

    def release_before(self, tokens: Sequence[int]) -> None:
        """Give back the pages of sequence i that lie wholly before its token ``tokens[i]``."""
        for i, (pages, token) in enumerate(zip(self.pages, tokens)):
            first = _first_held(pages)
            last = min(max(token, 0) // self.page_size, len(pages))
            if last > first:
                self.allocator.free(pages[first:last])
                self._outdate(i, first)
                pages[first:last] = [GONE] * (last - first)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Shorten the sequences to ``lengths`` and give back the pages behind."""
        for i, length in enumerate(lengths):
            if not 0 <= length <= self.lengths[i]:
                raise ValueError(f"lengths[{i}] must be 0 to {self.lengths[i]}, got {length}.")
            keep = -(-length // self.page_size)
            self.allocator.free(page for page in reversed(self.pages[i][keep:]) if page != GONE)
            self._set(i, [], keep)
            self.lengths[i] = length

    def select(self, indices: Sequence[int]) -> None:
        """Make the batch ``[old[i] for i in indices]``: drop, reorder and fork sequences without touching K/V.

        What a sequence that goes and one that is forked have in common changes hands: beams cost as many operations as
        they have pages of their own, however long their prompt is.
        """
        for i in indices:
            if not 0 <= i < len(self):
                raise ValueError(f"indices must be 0 to {len(self) - 1}, got {i}.")
        uses = Counter(indices)
        forked = sorted((uses - Counter(uses.keys())).elements())
        dropped = [i for i in range(len(self)) if i not in uses]
        # Beams are dropped and forked in equal numbers among the rows of each prompt, so in order they pair up.
        for fork, drop in zip_longest(forked, dropped):
            gained = [] if fork is None else self.pages[fork]
            lost = [] if drop is None else self.pages[drop]
            common = _num_common(gained, lost)
            self.allocator.share(page for page in gained[common:] if page != GONE)
            self.allocator.free(page for page in lost[common:] if page != GONE)
        kept: set[int] = set()
        old, self.pages = self.pages, []
        for i in indices:
            self.pages.append(list(old[i]) if i in kept else old[i])
            kept.add(i)
        self.lengths = [self.lengths[i] for i in indices]
        self._tensor = self._tensor[list(indices)]
        self._outdated = {new: self._outdated[i] for new, i in enumerate(indices) if i in self._outdated}

    def adopt(self, pages: Sequence[list[int]], lengths: Sequence[int]) -> None:
        """Become a batch whose pages the caller already owns, and hands over."""
        if len(self):
            raise ValueError(f"a table that holds {len(self)} sequences cannot adopt others: clear() it first.")
        self.pages, self.lengths = [list(p) for p in pages], list(lengths)
        self._tensor = _empty(len(self), 0)
        self._outdated = dict.fromkeys(range(len(self)), 0)

    def vacate(self, i: int) -> None:
        """Give back all pages of sequence i, which stays in the batch without tokens."""
        self.allocator.free(page for page in self.pages[i] if page != GONE)
        self._set(i, [], 0)
        self.lengths[i] = 0

    def refill(self, i: int, pages: Sequence[int], length: int) -> None:
        """Give a sequence without tokens ``length`` of them, in pages that the caller already owns, and hands over."""
        if self.pages[i]:
            raise ValueError(f"sequence {i} holds {self.lengths[i]} tokens: vacate() it first.")
        self._set(i, pages, 0)
        self.lengths[i] = length

    def clear(self) -> None:
        """Give every page back and forget the sequences."""
        self.select([])

    def _set(self, i: int, pages: Sequence[int], first: int) -> None:
        """Let ``pages`` be the pages of sequence i from its logical page ``first`` on."""
        self.pages[i][first:] = pages
        self._outdate(i, first)

    def _outdate(self, i: int, first: int) -> None:
        self._outdated[i] = min(self._outdated.get(i, first), first)

    def _follow(self, i: int, leader: int) -> None:
        """Share what a leader has, beyond what sequence i shared with it already."""
        pages, theirs = self.pages[i], self.pages[leader]
        first = len(pages)
        if pages and pages[-1] != theirs[first - 1]:  # the leader has copied it
            first -= 1
            self.allocator.free(pages[first:])
        self.allocator.share(page for page in theirs[first:] if page != GONE)
        self._set(i, theirs[first:], first)
        self.lengths[i] = self.lengths[leader]

    def _new_pages(self, i: int, count: int) -> int:
        return -(-(self.lengths[i] + count) // self.page_size) - len(self.pages[i])

    def _skipped(self, i: int, keep_from: Sequence[int] | None) -> int:
        return 0 if keep_from is None else max(0, keep_from[i] // self.page_size - len(self.pages[i]))

    def _must_copy(self, i: int, sharers: int) -> bool:
        """Whether others than the ``sharers`` that write together have the page that the next token goes to."""
        return self.lengths[i] % self.page_size != 0 and self.allocator.num_owners(self.pages[i][-1]) > sharers


def _empty(num_seqs: int, width: int) -> torch.Tensor:
    return torch.full((num_seqs, width), GONE, dtype=torch.int32)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning. Compares slices: no Python code runs for each element."""
    high = min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    low = 0  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _first_held(pages: Sequence[int]) -> int:
    """Index of the first page that was not given back; pages are given back from the front only."""
    if not pages or pages[0] != GONE:
        return 0
    low, high = 0, len(pages)  # pages[low] is GONE, everything from high on is held
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pages[middle] == GONE else (low, middle)
    return high
