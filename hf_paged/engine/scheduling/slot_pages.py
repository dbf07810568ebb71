"""Pages of the sequences in slots: who holds which, and the page tables that kernels read. Plain ints and NumPy."""

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import OutOfPagesError, RequestError
from ...paging import GONE, PageGroup, PagePool, SequenceTable


class GroupPageTable(SequenceTable):
    """The pages of every slot in the layers that share a sliding window.

    Attributes:
        rows: int32 ``[num_slots + 1, width]``, the page table; what is behind a sequence's pages has no meaning. The
            last row belongs to no slot.
        changed: slots and columns of ``rows`` written since the last :meth:`take_changes`.
        first_held: per slot, the first page that was not given back.
    """

    def __init__(self, group: PageGroup, num_slots: int, width: int, track_changes: bool) -> None:
        super().__init__(group.allocator, group.pool.page_size, num_slots)
        self.group, self.window = group, group.window
        self.rows = np.zeros((num_slots + 1, width), dtype=np.int32)
        self.first_held = [0] * num_slots
        self.changed: list[tuple[np.ndarray, np.ndarray]] | None = [] if track_changes else None
        group.tables.append(self)

    def put(self, slots: np.ndarray, columns: np.ndarray) -> None:
        """Remember that ``rows[slots, columns]`` was written."""
        if self.changed is not None:
            self.changed.append((slots, columns))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """``(slots, columns, pages)`` written since the last call, None if nothing was."""
        if not self.changed:
            return None
        slots, columns = (np.concatenate(x) for x in zip(*self.changed))
        self.changed.clear()
        return slots, columns, self.rows[slots, columns]

    def extend_one(self, slots: np.ndarray, column: np.ndarray) -> None:
        """One new page for each of ``slots``, at the end; ``column[i]`` is its logical page."""
        taken = self.allocator.allocate(len(slots))
        for slot, page in zip(slots.tolist(), taken):
            self.pages[slot].append(page)
            self.lengths[slot] += self.page_size
        self.rows[slots, column] = taken
        self.put(slots, column)

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Make a slot's logical pages from ``first`` on these, which the caller hands over."""
        del self.pages[slot][first:]
        self.pages[slot].extend(pages)
        self.lengths[slot] = len(self.pages[slot]) * self.page_size
        last = first + len(pages)
        self.rows[slot, first:last] = np.maximum(np.asarray(pages, dtype=np.int64), 0)
        columns = np.arange(first, last)
        self.put(np.full(len(columns), slot), columns)

    def first_seen(self, tokens: int) -> int:
        """The first page that a query behind ``tokens`` sees."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.page_size

    def free_behind_window(self, slot: int, computed: int) -> None:
        """Give back the pages that no query after ``computed`` tokens sees.

        A little more is kept: what a query sees at the last page boundary, so that the full pages can be stored as a
        prefix that a later sequence can go on from.
        """
        first = min(self.first_seen(computed // self.page_size * self.page_size), len(self.pages[slot]))
        held = self.first_held[slot]
        if first > held:
            pages = self.pages[slot]
            self.allocator.free(pages[held:first])
            pages[held:first] = [GONE] * (first - held)
            self.first_held[slot] = first

    def drop(self, slot: int) -> None:
        """Give every page of a slot back."""
        self.allocator.free(self.pages[slot][self.first_held[slot] :])
        self.pages[slot] = []
        self.lengths[slot] = self.first_held[slot] = 0


class SlotPages:
    """The pages of every slot, in all groups of layers. Logical pages are the same in each.

    Attributes:
        num_pages: int64 ``[num_slots]``, logical pages taken by each slot.
        copy: called with ``(table index, source pages, target pages)`` to copy pages in all layers of a group at once.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        width: int,
        copy: Callable[[int, Sequence[int], Sequence[int]], None],
        track_changes: bool = False,
    ) -> None:
        self.pool, self.page_size, self.copy = pool, pool.page_size, copy
        self.tables = [GroupPageTable(group, num_slots, width, track_changes) for group in pool.groups.values()]
        self.num_pages = np.zeros(num_slots, dtype=np.int64)

    # Counting

    def pages_of(self, tokens: int) -> int:
        """Logical pages of a sequence."""
        return -(-tokens // self.page_size)

    def num_free(self) -> int:
        """Pages free in the group that has fewest."""
        return min((table.allocator.num_free for table in self.tables), default=1 << 40)

    def ensure_free(self, count: int | Sequence[int]) -> bool:
        """Have ``count`` free pages in every group (or ``count[i]`` in group i); stored prefixes give way to them."""
        has_room = True
        for index, table in enumerate(self.tables):
            wanted, allocator = count if isinstance(count, int) else count[index], table.allocator
            if wanted > allocator.num_free:
                table.group.back(wanted - allocator.num_free)
            missing = wanted - allocator.num_free
            if missing > 0:
                freed = self.pool.prefixes.evict(index, missing) if self.pool.prefixes is not None else 0
                has_room &= freed >= missing
        return has_room

    def most_pages(self, table: GroupPageTable, tokens: int, chunk: int) -> int:
        """Pages of a group that a sequence of ``tokens`` holds at most, computed in chunks of ``chunk`` tokens."""
        if table.window is None:
            return self.pages_of(tokens)
        return min(self.pages_of(tokens), self.pages_of(table.window + chunk) + 2)

    def pages_for(self, prompt: int, total: int, num_sequences: int, group: int, whole_prompts: bool) -> int:
        """Pages of a group that a request holds at most: a prompt that ``num_sequences`` of ``total`` tokens share.

        Args:
            whole_prompts: a prompt is computed in one step.
        """
        table = self.tables[group]
        chunk = prompt if whole_prompts else self.page_size
        if num_sequences == 1:
            return self.most_pages(table, total, chunk)
        if table.window is not None or whole_prompts:
            return num_sequences * self.most_pages(table, total, chunk)
        shared = prompt // self.page_size
        return shared + num_sequences * (self.pages_of(total) - shared) + 1

    def want_of_pages(self) -> Exception:
        """What ends a request that has the pool for itself and finds it too small.

        Admission checks promise that a request alone always fits into the pool. Where the device has no memory for the
        pool, the promise is broken: that ends the request, not the loop.
        """
        free = self.num_free()
        allocators = [table.allocator for table in self.tables]
        total, backed = sum(a.num_pages for a in allocators), sum(a.num_backed for a in allocators)
        if backed == total:
            return OutOfPagesError(free + 1, free, total)
        return RequestError(
            f"the device has memory for {backed} of the pool's {total} pages at the moment, which is too little "
            f"for this request alone: free memory of the device, or ask for fewer new tokens."
        )

    # Taking and giving back

    def extend_one(self, slots: np.ndarray) -> None:
        """One new page for each of ``slots``; there must be room."""
        columns = self.num_pages[slots]
        for table in self.tables:
            table.extend_one(slots, columns)
        self.num_pages[slots] += 1

    def extend(self, slot: int, tokens: int) -> None:
        """Pages for a sequence's first ``tokens``; there must be room."""
        have = int(self.num_pages[slot])
        missing = self.pages_of(tokens) - have
        if missing > 0:
            for table in self.tables:
                table.set_pages(slot, have, table.allocator.allocate(missing))
            self.num_pages[slot] += missing

    def free_behind_window(self, slots: Sequence[int], computed: np.ndarray) -> None:
        """Give back pages that the windows have passed; ``computed`` is by slot."""
        for table in self.tables:
            if table.window is not None:
                for slot in slots:
                    table.free_behind_window(slot, int(computed[slot]))

    def free(self, slot: int) -> None:
        """Give every page of a slot back."""
        for table in self.tables:
            table.drop(slot)
        self.num_pages[slot] = 0

    def shrink(self, slot: int, tokens: int) -> None:
        """Give back the pages behind a sequence's first ``tokens``."""
        keep = self.pages_of(tokens)
        if keep < self.num_pages[slot]:
            for table in self.tables:
                table.allocator.free(page for page in table.pages[slot][keep:] if page != GONE)
                table.set_pages(slot, keep, [])
                table.first_held[slot] = min(table.first_held[slot], keep)
            self.num_pages[slot] = keep

    # Sharing

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Make each of ``targets``, which hold nothing, share all pages of ``source``."""
        for table in self.tables:
            pages = list(table.pages[source])
            for target in targets:
                table.allocator.share(page for page in pages if page != GONE)
                table.set_pages(target, 0, pages)
                table.first_held[target] = table.first_held[source]
        self.num_pages[list(targets)] = self.num_pages[source]

    def permute(self, slots: Sequence[int], parents: Sequence[int]) -> None:
        """Slot ``slots[i]`` goes on from what ``parents[i]`` (one of ``slots``) holds."""
        for table in self.tables:
            before = {slot: list(table.pages[slot]) for slot in slots}
            held = {slot: table.first_held[slot] for slot in slots}
            for parent in parents:
                table.allocator.share(page for page in before[parent] if page != GONE)
            for slot in slots:
                table.allocator.free(page for page in before[slot] if page != GONE)
            for slot, parent in zip(slots, parents):
                table.set_pages(slot, 0, before[parent])
                table.first_held[slot] = held[parent]
        self.num_pages[list(slots)] = self.num_pages[list(parents)]

    def shares_page(self, slot: int, token: int) -> bool:
        """Whether the page of a token that is about to be written has other owners."""
        index = token // self.page_size
        return index < self.num_pages[slot] and any(
            table.allocator.is_shared(table.pages[slot][index]) for table in self.tables
        )

    def copy_on_write(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Copy shared pages: of ``slots[i]`` that of ``tokens[i]``, about to be written; there must be room."""
        for number, table in enumerate(self.tables):
            sources, targets = [], []
            for slot, token in zip(slots, tokens):
                index = token // self.page_size
                source = table.pages[slot][index]
                if table.allocator.is_shared(source):
                    (target,) = table.allocator.allocate(1)
                    # It has other owners, the last of which keeps it as it is.
                    table.allocator.free([source])
                    table.pages[slot][index] = target
                    table.rows[slot, index] = target
                    table.put(np.array([slot]), np.array([index]))
                    sources.append(source)
                    targets.append(target)
            if sources:
                self.copy(number, sources, targets)

    # Prefixes

    def adopt(self, slot: int, pages: Sequence[Sequence[int | None]]) -> None:
        """Begin an empty slot with pages that the caller owns, and hands over; one list for each group."""
        for table, of_group in zip(self.tables, pages):
            ids = [GONE if page is None else page for page in of_group]
            table.set_pages(slot, 0, ids)
            table.first_held[slot] = next((i for i, page in enumerate(ids) if page != GONE), len(ids))
        self.num_pages[slot] = len(pages[0])

    def can_share_prefix_from(self, source: int, target: int, tokens: int) -> bool:
        """Whether ``source`` holds what ``target`` has not got of the first ``tokens``, full pages, and will need: not
        what windows have passed by then."""
        have = int(self.num_pages[target])
        return all(table.first_held[source] <= max(have, table.first_seen(tokens)) for table in self.tables)

    def share_prefix_from(self, source: int, target: int, tokens: int) -> None:
        """Let ``target`` go on behind the first ``tokens``, full pages, with its own pages and those of ``source``."""
        last = tokens // self.page_size
        for table in self.tables:
            have, held = int(self.num_pages[target]), table.first_held[source]
            if held > have:
                # Its own pages end before those that any query will see.
                table.drop(target)
                table.first_held[target], have = held, 0
            pages = table.pages[source][have:last]
            table.allocator.share(page for page in pages if page != GONE)
            table.set_pages(target, have, pages)
        self.num_pages[target] = last

    def store_prefix(self, slot: int, tokens: np.ndarray, salt: object) -> None:
        """Keep the full pages of a slot that hold ``tokens`` for later sequences."""
        count = min(len(tokens) // self.page_size, int(self.num_pages[slot]))
        if count and self.pool.prefixes is not None:
            pages = [[None if p == GONE else p for p in table.pages[slot][:count]] for table in self.tables]
            self.pool.prefixes.insert(tokens[: count * self.page_size].tolist(), pages, salt)  # type: ignore[arg-type]

    def forget_prefix(self, slot: int) -> None:
        """Take the pages of a slot out of the prefix cache, with all that continues them: they hold something else than
        it says."""
        for index, table in enumerate(self.tables):
            if self.pool.prefixes is not None:
                self.pool.prefixes.forget(index, table.pages[slot][table.first_held[slot] :])

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        self.pool.check()
        for table in self.tables:
            for slot, pages in enumerate(table.pages):
                assert len(pages) == self.num_pages[slot], f"slot {slot} has another number of pages than it counts"
                first = table.first_held[slot]
                assert all(page == GONE for page in pages[:first]), f"slot {slot} holds a page it gave back"
                assert all(page != GONE for page in pages[first:]), f"slot {slot} lost a page"
                shown = table.rows[slot, first : len(pages)].tolist()
                assert shown == pages[first:], f"the page table of slot {slot} names other pages than it holds"
