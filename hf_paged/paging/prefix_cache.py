"""Full pages kept after use, found again by a chained hash of their tokens. Plain Python on ints.

A prefix is a chain of nodes, one per logical page; a node has one page id per group of layers (full attention, each
sliding window), or None where a group gave its page back:

    page_size 4      [ a b c d ] <-- [ e f g h ] <-- [ i j k l ]
    full attention        7               2               5         needed by a match of 12 tokens: 7, 2, 5; of 8: 7, 2
    window of 3         None              4               1         needed by a match of 12 tokens: 1; of 8: 4

Every list of nodes in here that is ordered by use has children before their parents: the least recently used node
without a user has nothing behind it, so eviction takes chains from their tails and never has to search.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .allocator import PageAllocator


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix that a sequence can go on from.

    Attributes:
        num_tokens: tokens found, a multiple of the page size.
        pages: per group, ``num_tokens / page_size`` entries: a page of which the caller is now one owner, or None where
            the group's window has moved past the page.
    """

    num_tokens: int
    pages: tuple[list[int | None], ...]


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """Counts since the cache was made; pages are counted over all groups.

    Attributes:
        queries: calls of :meth:`PrefixCache.match`.
        hits: queries that found at least one page.
        tokens_asked: tokens of all queries.
        tokens_found: tokens that the queries found.
        pages_cached: pages that the cache took into its ownership.
        evictions: pages that :meth:`PrefixCache.evict` gave up.
    """

    queries: int
    hits: int
    tokens_asked: int
    tokens_found: int
    pages_cached: int
    evictions: int


@dataclass(slots=True, eq=False, repr=False)
class PrefixNode:
    """One logical page of a prefix: its tokens, after those of ``parent``.

    Attributes:
        event_hash: its name in page events, None: no event has named it.
    """

    parent: "PrefixNode | None"
    salt: Hashable
    tokens: tuple[int, ...]
    key: int
    depth: int
    pages: list[int | None]
    children: "dict[PrefixNode, None]" = field(default_factory=dict)
    event_hash: int | None = None


def _hash(parent: Hashable, tokens: tuple[int, ...]) -> int:
    """The key of a page: ``parent`` is the key of the page before it, or the salt for the first page."""
    return hash((parent, tokens))


class PrefixCache:
    """Owns full pages of finished and running sequences, and shares them with later sequences of equal tokens.

    Taking, finding and giving up a page is O(1) amortised. Eviction that passes over pages in use marks them as just
    used, so that the next one does not pass over them again; one that cannot free enough looks at every page.

    Args:
        page_size: tokens of a page.
        allocators: per group of layers, the allocator of its pages.
        windows: per group, the tokens that a query sees, itself counted, or None for all.

    Attributes:
        changes: (True, node) for each node that came, (False, node) for each that went, (False, None): all went. A
            reader takes them out; None: there is none, and nothing is written.

    Raises:
        ValueError: an argument is not one of those described.
    """

    def __init__(self, page_size: int, allocators: Sequence[PageAllocator], windows: Sequence[int | None]) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {page_size}.")
        if not allocators or len(allocators) != len(windows):
            raise ValueError(
                f"allocators and windows must have one entry per group of layers, got {len(allocators)} and "
                f"{len(windows)}."
            )
        for group, window in enumerate(windows):
            if window is not None and window < 1:
                raise ValueError(f"windows[{group}] must be None or at least 1 token, got {window}.")
        self.page_size = page_size
        self.allocators = tuple(allocators)
        self.windows = tuple(windows)
        # Nodes of one key: several only when their hashes collide.
        self._nodes: dict[int, list[PrefixNode]] = {}
        # Every node, least recently used first, children before their parents.
        self._order: OrderedDict[PrefixNode, None] = OrderedDict()
        # Per group, page -> the node that holds it.
        self._holders: tuple[dict[int, PrefixNode], ...] = tuple({} for _ in allocators)
        self.changes: list[tuple[bool, PrefixNode | None]] | None = None
        self._queries = self._hits = self._tokens_asked = self._tokens_found = 0
        self._pages_cached = self._evictions = 0

    # Introspection

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Per group, the pages that the cache owns."""
        return tuple(len(holders) for holders in self._holders)

    @property
    def num_tokens(self) -> int:
        """Tokens of all cached prefixes, a shared beginning counted once."""
        return len(self._order) * self.page_size

    @property
    def stats(self) -> PrefixCacheStats:
        """Counts since the cache was made."""
        return PrefixCacheStats(
            queries=self._queries,
            hits=self._hits,
            tokens_asked=self._tokens_asked,
            tokens_found=self._tokens_found,
            pages_cached=self._pages_cached,
            evictions=self._evictions,
        )

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node, parents before their children; chains in one piece."""
        return reversed(self._order)

    def held(self, group: int) -> Iterator[int]:
        """Every page reference that the cache holds of a group, for :meth:`PageAllocator.check`."""
        return iter(self._holders[group])

    def check(self) -> None:
        """Prove the books of the cache itself (AssertionError if wrong); the allocators prove the owners."""
        assert sorted(map(id, self._order)) == sorted(id(n) for nodes in self._nodes.values() for n in nodes)
        assert all(self._nodes.values()), "a key without nodes"
        held: list[dict[int, PrefixNode]] = [{} for _ in self.allocators]
        seen: set[PrefixNode] = set()
        for node in self._order:
            assert node.parent is None or (node.parent in self._order and node in node.parent.children), "a lost parent"
            assert node.parent not in seen, "a parent is less recently used than its child"
            assert all(child in seen for child in node.children), "a child is lost or more recently used"
            assert node.children or any(page is not None for page in node.pages), "a chain ends without a page"
            seen.add(node)
            for group, page in enumerate(node.pages):
                if page is not None:
                    assert page not in held[group], f"page {page} of group {group} is held twice"
                    held[group][page] = node
        assert tuple(held) == self._holders, "the holders of pages are wrong"

    # Finding

    def match(self, tokens: Sequence[int], salt: Hashable = None, max_tokens: int | None = None) -> PrefixMatch:
        """Share the longest usable cached prefix of ``tokens`` with the caller, and mark it as just used.

        Usable: every group has all the pages that the next token's query sees. The caller frees what it gets.

        Args:
            tokens: the sequence.
            salt: only pages inserted with an equal salt are found.
            max_tokens: limit of the match; a caller that needs the logits of the last token passes ``len(tokens) - 1``.

        Raises:
            ValueError: ``max_tokens`` is negative.
        """
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be None or at least 0, got {max_tokens}.")
        limit = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
        chain = self._find_chain(tokens, limit // self.page_size, salt)
        del chain[self._usable_length(chain) :]
        num_pages = len(chain)
        pages: list[list[int | None]] = []
        for group, allocator in enumerate(self.allocators):
            first = self._first_needed(group, num_pages)
            found = [None if i < first else node.pages[group] for i, node in enumerate(chain)]
            allocator.share(page for page in found if page is not None)
            pages.append(found)
        self._touch(chain[-1:])
        self._queries += 1
        self._hits += num_pages > 0
        self._tokens_asked += len(tokens)
        self._tokens_found += num_pages * self.page_size
        return PrefixMatch(num_pages * self.page_size, tuple(pages))

    def has_beginning(self, tokens: Sequence[int], salt: Hashable = None) -> bool:
        """Whether the first page of ``tokens`` is there."""
        return bool(self._find_chain(tokens, 1, salt))

    def _find_chain(self, tokens: Sequence[int], num_pages: int, salt: Hashable) -> list[PrefixNode]:
        """The cached nodes of the first ``num_pages`` pages, as far as they go."""
        chain: list[PrefixNode] = []
        for i in range(num_pages):
            page_tokens = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            parent = chain[-1] if chain else None
            for node in self._nodes.get(_hash(parent.key if parent else salt, page_tokens), ()):
                # The same parent means that all tokens before are the same; a hash alone would only make it likely.
                if node.parent is parent and node.tokens == page_tokens and node.salt == salt:
                    chain.append(node)
                    break
            else:
                break
        return chain

    def _usable_length(self, chain: Sequence[PrefixNode]) -> int:
        """The largest n for which every group has the pages that a query after n pages sees."""
        usable = 0
        # Per group, how many pages up to here are there without a gap.
        present = [0] * len(self.allocators)
        for i, node in enumerate(chain):
            present = [0 if page is None else count + 1 for page, count in zip(node.pages, present)]
            if all(count >= i + 1 - self._first_needed(group, i + 1) for group, count in enumerate(present)):
                usable = i + 1
        return usable

    def _first_needed(self, group: int, num_pages: int) -> int:
        """The first of ``num_pages`` pages that the query of the token after them sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, num_pages * self.page_size - (window - 1)) // self.page_size

    # Keeping

    def insert(self, tokens: Sequence[int], pages: Sequence[Sequence[int | None]], salt: Hashable = None) -> int:
        """Keep every full page of ``tokens``, and mark them as just used.

        A page that is cached for the same tokens already stays, the newcomer's is not kept; where a group has none, the
        newcomer's fills the gap. The cache becomes one more owner of each page that it keeps.

        Args:
            tokens: tokens whose keys and values are in the pages.
            pages: ``pages[group][i]`` holds tokens ``i * page_size`` and on; None: given back.
            salt: keeps sequences apart that must not share pages.

        Returns:
            The pages newly kept, over all groups.

        Raises:
            ValueError: pages are missing, free, or cached for other tokens; nothing was changed.
        """
        num_pages = len(tokens) // self.page_size
        if len(pages) != len(self.allocators):
            raise ValueError(f"pages must have one entry for each of {len(self.allocators)} groups, got {len(pages)}.")
        for group, of_group in enumerate(pages):
            if len(of_group) < num_pages:
                raise ValueError(
                    f"pages[{group}] must have the {num_pages} full pages of {len(tokens)} tokens, got {len(of_group)}."
                )
        # A tail without any page would be of no use and would never be evicted for its pages.
        while num_pages and all(of_group[num_pages - 1] is None for of_group in pages):
            num_pages -= 1
        chain = self._find_chain(tokens, num_pages, salt)
        gaps = [
            {
                i: page
                for i, page in enumerate(of_group[:num_pages])
                if page is not None and (i >= len(chain) or chain[i].pages[group] is None)
            }
            for group, of_group in enumerate(pages)
        ]
        self._take(gaps)
        for i in range(len(chain), num_pages):
            page_tokens = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            chain.append(self._add_node(chain[-1] if chain else None, page_tokens, salt))
        for group, new_pages in enumerate(gaps):
            for i, page in new_pages.items():
                chain[i].pages[group] = page
                self._holders[group][page] = chain[i]
        self._touch(chain[-1:])
        num_new = sum(len(new_pages) for new_pages in gaps)
        self._pages_cached += num_new
        return num_new

    def _take(self, gaps: Sequence[dict[int, int]]) -> None:
        """Become an owner of ``gaps[group]``'s pages: all of them or, with ValueError, none."""
        for group, new_pages in enumerate(gaps):
            seen: set[int] = set()
            for i, page in new_pages.items():
                if not 0 <= page < self.allocators[group].num_pages:
                    raise ValueError(
                        f"pages[{group}][{i}] must be 0 to {self.allocators[group].num_pages - 1}, got {page}."
                    )
                if page in seen or page in self._holders[group]:
                    raise ValueError(f"pages[{group}][{i}] is page {page}, which is cached for other tokens already.")
                seen.add(page)
        taken: list[tuple[PageAllocator, int]] = []
        try:
            for allocator, new_pages in zip(self.allocators, gaps):
                for page in new_pages.values():
                    allocator.keep(page)
                    taken.append((allocator, page))
        except ValueError:
            for allocator, page in taken:
                allocator.drop(page)
            raise

    def _add_node(self, parent: PrefixNode | None, tokens: tuple[int, ...], salt: Hashable) -> PrefixNode:
        """A node without pages; the caller touches it."""
        key = _hash(parent.key if parent else salt, tokens)
        depth = parent.depth + 1 if parent else 0
        node = PrefixNode(parent, salt, tokens, key, depth, pages=[None] * len(self.allocators))
        self._nodes.setdefault(key, []).append(node)
        if parent is not None:
            parent.children[node] = None
        if self.changes is not None:
            self.changes.append((True, node))
        return node

    def _touch(self, nodes: Iterable[PrefixNode]) -> None:
        """Make nodes and all before them in their chains the most recently used, children before their parents."""
        touched: dict[PrefixNode, None] = {}
        for node in nodes:
            current: PrefixNode | None = node
            while current is not None and current not in touched:
                touched[current] = None
                current = current.parent
        for node in sorted(touched, key=lambda node: node.depth, reverse=True):
            self._order[node] = None
            self._order.move_to_end(node)

    # Giving up

    def evict(self, group: int, count: int) -> int:
        """Give up least recently used pages until ``count`` pages of ``group`` are back in its allocator, if possible.

        Chains are taken from their tails, with the pages of all groups. Pages that have other owners would not come
        back: they are passed over, and given up only where pages that do come back are found nowhere else but before
        them in their chain (a window has moved past those).

        Returns:
            The pages of ``group`` that came back; it may be less than ``count``, never more.

        Raises:
            ValueError: ``group`` or ``count`` is out of range.
        """
        if not 0 <= group < len(self.allocators):
            raise ValueError(f"group must be 0 to {len(self.allocators) - 1}, got {group}.")
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}.")
        pages_before = sum(self.num_pages)
        freed = 0
        passed_over: list[PrefixNode] = []
        while freed < count and self._order and self._holders[group]:
            node, _ = self._order.popitem(last=False)
            frees = self._would_free(node, group)
            # Without this group's page the end of a chain matches nothing, and it stands before pages that come back.
            if not node.children and (frees or node.pages[group] is None):
                self._drop(node)
                freed += frees
            else:
                passed_over.append(node)
        self._touch(passed_over)
        for node in passed_over:
            if freed == count:
                break
            # Children come first: what is dropped with a node is behind this loop already.
            if self._would_free(node, group):
                self._drop_with_descendants(node)
                freed += 1
        self._evictions += pages_before - sum(self.num_pages)
        return freed

    def forget(self, group: int, pages: Iterable[int]) -> None:
        """Give up those of ``pages`` of a group that are cached, with the pages of other groups for the same tokens and
        all that continues them."""
        for page in pages:
            node = self._holders[group].get(page)
            if node is not None:
                self._drop_with_descendants(node)

    def clear(self) -> None:
        """Give up every page, for example because the weights changed."""
        for allocator, holders in zip(self.allocators, self._holders):
            for page in holders:
                allocator.drop(page)
            holders.clear()
        self._nodes.clear()
        self._order.clear()
        if self.changes is not None:
            self.changes.append((False, None))

    def _would_free(self, node: PrefixNode, group: int) -> bool:
        """Whether the node holds a page of ``group`` that has no other owner."""
        page = node.pages[group]
        return page is not None and not self.allocators[group].is_shared(page)

    def _drop_with_descendants(self, node: PrefixNode) -> None:
        """Forget a node and all that continue it."""
        subtree = [node]
        for current in subtree:
            subtree.extend(current.children)
        for current in reversed(subtree):
            # The last child may have taken with it a parent that holds no page.
            if current in self._order:
                self._drop(current)

    def _drop(self, node: PrefixNode) -> None:
        """Forget a node that nothing continues, and those before it that hold no page and led only here."""
        last: PrefixNode | None = node
        while last is not None:
            for allocator, holders, page in zip(self.allocators, self._holders, last.pages):
                if page is not None:
                    allocator.drop(page)
                    del holders[page]
            self._order.pop(last, None)
            if self.changes is not None:
                self.changes.append((False, last))
            same_key = self._nodes[last.key]
            same_key.remove(last)
            if not same_key:
                del self._nodes[last.key]
            parent = last.parent
            if parent is not None:
                del parent.children[last]
                if parent.children or any(page is not None for page in parent.pages):
                    parent = None
            last = parent
