"""The page tensors of every layer, and the pages' owners.

Layers are grouped by their sliding window: the layers of a group hold the same tokens, so one page table serves them
all, and page ``p`` means the same page in every layer of the group. Groups share one budget.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OutOfPagesError
from .allocator import PageAllocator
from .arena import make_arena, reservable_bytes
from .prefix_cache import PrefixCache
from .sequences import SequenceTable

FIRST_PAGES = 16
"""Pages of a growing group when its first token comes; after that it grows by a quarter."""
ALIGNMENT = 16
"""Bytes to which the parts of a page are aligned, the width of the widest load."""


class LayerPages:
    """Keys and values of one layer: ``k``, ``v`` ``[num_pages, num_kv_heads, page_size, head_dim]``.

    Quantised pages come with scales ``k_scale``, ``v_scale`` ``[num_pages, num_kv_heads, page_size]`` float32. A page
    is one run of bytes in an arena, which grows in place::

        page 0                            page 1
        | k | v | k_scale | v_scale |     | k | v | k_scale | v_scale |     ...  (reserved, not yet committed)
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, page_size: int, dtype: torch.dtype | None) -> None:
        """Pages for keys like ``key`` ``[B, H, L, D]`` and values like ``value``, in ``dtype`` (None: their own)."""
        self.model_dtype, self.device = key.dtype, key.device
        self.is_quantized = dtype is not None
        heads = key.shape[1]
        self.kind = heads, key.shape[3], value.shape[3], key.dtype, key.device
        self._parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": ((heads, page_size, key.shape[3]), dtype or key.dtype),
            "v": ((heads, page_size, value.shape[3]), dtype or value.dtype),
        }
        if self.is_quantized:
            self._parts |= dict.fromkeys(("k_scale", "v_scale"), ((heads, page_size), torch.float32))
        self._offsets: dict[str, int] = {}
        self.page_bytes = 0
        for name, (shape, part_dtype) in self._parts.items():
            self._offsets[name] = self.page_bytes
            size = math.prod(shape) * part_dtype.itemsize
            self.page_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self.k_scale: torch.Tensor | None = None
        self.v_scale: torch.Tensor | None = None
        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.arena = make_arena(key.device, reservable_bytes(key.device) // self.page_bytes * self.page_bytes)
        self.grow(0)

    def grow(self, num_pages: int, shown: int | None = None) -> None:
        """Have ``num_pages`` pages; what is there stays where it is.

        Args:
            num_pages: that have memory.
            shown: pages of the tensors, where the arena grows in place: they stay as they are when it does, and what
                has no memory yet must not be touched. None: as many as have.

        Raises:
            torch.OutOfMemoryError: the device has no memory left; the pages are as before.
        """
        self.arena.commit(num_pages * self.page_bytes, exactly=shown is not None)
        self.show(num_pages if shown is None or not self.arena.grows_in_place else shown)

    def shrink(self, num_pages: int) -> None:
        """Have ``num_pages`` pages, no more than there are; the memory behind them goes back to the device.

        Raises:
            RuntimeError: a CUDA graph is being captured; the pages are as before.
        """
        self.arena.decommit(num_pages * self.page_bytes)
        self.show(num_pages)

    def show(self, num_pages: int) -> None:
        """Make the tensors that look at the first pages of the arena."""
        with torch.inference_mode(False):
            for name, (shape, dtype) in self._parts.items():
                strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
                view = self.arena.buffer.view(dtype).as_strided(
                    (num_pages, *shape),
                    (self.page_bytes // dtype.itemsize, *strides),
                    self._offsets[name] // dtype.itemsize if num_pages else 0,
                )
                setattr(self, name, view)

    def raw(self) -> torch.Tensor:
        """All pages as bytes, uint8 ``[num_pages, page_bytes]``."""
        num_pages = self.k.shape[0]
        return self.arena.buffer[: num_pages * self.page_bytes].view(num_pages, self.page_bytes)

    def __reduce__(self) -> Any:
        raise TypeError(
            "pages cannot be pickled or saved: pages of several sequences share one reserved memory. Take the keys and "
            "values of a PagedCache out of it (cache.layers[i].keys, .values), or copy.deepcopy it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerPages":
        """The copy has an arena of its own; copying the views would copy the whole reservation."""
        twin = object.__new__(LayerPages)
        twin.__dict__.update(self.__dict__)
        twin.arena = copy.deepcopy(self.arena, memo)
        twin.show(self.k.shape[0])
        return twin

    k: torch.Tensor
    v: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, keys and values first."""
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def check_like(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values must be of the kind that the pages were made for."""
        (_, heads, _, key_dim), value_dim = key.shape, value.shape[3]
        if self.kind != (heads, key_dim, value_dim, key.dtype, key.device):
            got = (heads, key_dim, value_dim, key.dtype, key.device)
            raise ValueError(
                f"the pages hold (heads, key dim, value dim, dtype, device) {self.kind}, the step brings {got}: call "
                f"reset() on the cache, or give the model a pool of its own."
            )


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """What the pages of one group of layers are used for, in pages and bytes of all its layers.

    Attributes:
        window: the group's sliding window in tokens; None: full attention.
        num_layers: layers of the group.
        page_bytes: bytes of one page over these layers.
        held: pages that sequences hold; each counts once.
        shared: of these, pages with several owners.
        cached: pages that only the prefix cache holds.
        free: pages without an owner.
        committed_bytes: memory taken from the device, in steps larger than pages.
    """

    window: int | None
    num_layers: int
    page_bytes: int
    held: int
    shared: int
    cached: int
    free: int
    committed_bytes: int

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that sequences hold."""
        return self.held * self.page_bytes


class PageGroup:
    """The pages of the layers that share a sliding window (None: full attention)."""

    def __init__(self, pool: "PagePool", window: int | None, num_layers: int) -> None:
        # The pool owns its groups. With a reference back the pages of a dropped pool would wait for garbage collection.
        self._pool = weakref.ref(pool)
        self.window, self.num_layers = window, num_layers
        self.allocator = PageAllocator(0)
        self.layers: dict[int, LayerPages] = {}
        # What the keys and values of each layer are like: tensors [1, H, 0, D].
        self.is_lazy = self.is_released = False
        self.kinds: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tables: list[SequenceTable] = []

    @property
    def pool(self) -> "PagePool":
        """The pool that the group is one of."""
        pool = self._pool()
        assert pool is not None, "a group of pages is used without its pool"
        return pool

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": self.pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_pool": weakref.ref(state["_pool"])})

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerPages:
        """The pages of a layer, made for keys like ``key`` the first time."""
        if index not in self.layers:
            self.kinds[index] = (key[:1, :, :0].clone(), value[:1, :, :0].clone())
            self._make_layer(index)
        return self.layers[index]

    def _make_layer(self, index: int) -> None:
        """Make the pages of a layer whose kind is known."""
        allocator, pool = self.allocator, self.pool
        pages = LayerPages(*self.kinds[index], pool.page_size, KV_DTYPES[pool.kv_dtype])
        is_whole = allocator.num_backed == allocator.num_pages or not pages.arena.grows_in_place
        pages.grow(allocator.num_pages) if is_whole else pages.grow(allocator.num_backed, shown=allocator.num_pages)
        self.layers[index] = pages  # Last: no thread may find pages without memory.

    def back(self, count: int) -> None:
        """Have memory behind ``count`` more of the ids that the allocator knows, or as many as there is memory for.

        Where a layer cannot grow in place, all ids have had memory since its pages were made.
        """
        allocator = self.allocator
        before, made = allocator.num_backed, set(self.layers)
        wanted = min(before + count, allocator.num_pages)
        if wanted == before:
            return
        try:
            for index in self.kinds.keys() - made:
                self._make_layer(index)
            growing = [pages for pages in self.layers.values() if pages.arena.grows_in_place]
            ample = min(wanted + max(FIRST_PAGES, wanted // 4), allocator.num_pages)
            target = max(before, min(ample, before + self._num_affordable()))
            for pages in growing:
                pages.grow(target, shown=allocator.num_pages)
        except torch.OutOfMemoryError:
            # Somebody else was faster. What was taken in vain goes back: no step knows of it yet.
            for index in self.layers.keys() - made:
                del self.layers[index]
            for pages in self.layers.values():
                if pages.arena.grows_in_place:
                    pages.arena.decommit(before * pages.page_bytes)
            return
        allocator.back(target if growing or not self.layers else allocator.num_pages)

    def commit_as_used(self) -> None:
        """From now on the ids that the allocator knows get memory as they are needed; none has an owner yet."""
        self.is_lazy = True
        self.allocator.back(min(FIRST_PAGES, self.allocator.num_pages))

    def drop_layers(self) -> None:
        """Give the memory of all pages back; their contents are lost, the ids stay."""
        self.is_released = False
        self.layers.clear()
        if self.is_lazy and not self.allocator.num_used:
            self.commit_as_used()

    def release(self, num_wanted: int) -> bool:
        """Give the memory of all pages back, and keep their addresses: captured CUDA graphs stay valid.

        Contents are lost, the ids stay. No page may be touched before :meth:`restore`.

        Args:
            num_wanted: pages to have memory for at :meth:`restore`, where pages get theirs as they are used.

        Returns:
            False: a layer's addresses cannot stay, so that all were given back as well.
        """
        keeps_addresses = all(pages.arena.grows_in_place for pages in self.layers.values())
        layers = dict(self.layers) if keeps_addresses else {}
        for pages in layers.values():
            pages.arena.decommit(0)
        self.drop_layers()
        self.layers.update(layers)
        self.is_released = keeps_addresses
        if keeps_addresses and self.is_lazy:
            self.allocator.back(max(num_wanted, self.allocator.num_backed))
        return keeps_addresses

    def restore(self) -> None:
        """Have memory behind the pages again, after :meth:`release`.

        Raises:
            torch.OutOfMemoryError: the device has less; some layers may have theirs.
        """
        for pages in self.layers.values():
            pages.arena.commit(self.allocator.num_backed * pages.page_bytes, exactly=True)
        self.is_released = False

    def _num_affordable(self) -> int:
        """Pages of all layers that the devices have memory for, as far as it is theirs to take."""
        pool = self.pool
        if pool.room is None:
            return self.allocator.num_pages
        by_device: dict[torch.device, list[LayerPages]] = {}
        for pages in self.layers.values():
            by_device.setdefault(pages.device, []).append(pages)
        return min(
            (
                # A layer's last step is rounded up.
                max(0, pool.room(device) - sum(pages.arena.granularity for pages in of_device))
                // sum(pages.page_bytes for pages in of_device)
                for device, of_device in by_device.items()
            ),
            default=self.allocator.num_pages,
        )

    def ensure_free(self, count: int) -> None:
        """Have ``count`` free pages, growing within the pool's budget. Growing copies nothing.

        Raises:
            OutOfPagesError: the budget is spent.
            torch.OutOfMemoryError: the device has no memory left. Nothing was changed.
        """
        missing = count - self.allocator.num_free
        if missing <= 0:
            return
        old = self.allocator.num_pages
        wanted = old + max(FIRST_PAGES, old // 4, missing)
        limit = self.pool.pages_left(self)
        if limit is not None:
            if missing > limit:
                self.pool.evict(self, missing - limit)
                missing = count - self.allocator.num_free
                if missing <= 0:
                    return
            if missing > limit:
                raise OutOfPagesError(count, self.allocator.num_free + limit, old + limit)
            # What one group takes, the others cannot have: no more than it needs, unless it is alone.
            wanted = min(wanted, old + limit) if len(self.pool.groups) == 1 else old + missing
        for pages in self.layers.values():
            pages.grow(wanted)
        self.allocator.grow(wanted)

    @property
    def is_sparse(self) -> bool:
        """Whether at most a quarter of the pages have an owner, all of them in the first half."""
        count = self.allocator.num_pages
        return 4 * self.allocator.num_used <= count and 2 * self.allocator.end <= count

    def trim(self, keep_free: int = 0) -> None:
        """Give back what is behind the last page with an owner; ``keep_free`` pages stay free if there are as many."""
        left = self.allocator.num_left(keep_free)
        for pages in self.layers.values():
            pages.shrink(left)
        self.allocator.shrink(left)

    def held(self) -> Iterable[int]:
        """Every page reference of the sequences in this group."""
        for table in self.tables:
            yield from table.held()

    def memory(self) -> GroupMemory:
        """What the pages are used for."""
        held = set(self.held())
        used = self.allocator.num_used
        return GroupMemory(
            window=self.window,
            num_layers=self.num_layers,
            page_bytes=self.page_bytes,
            held=len(held),
            shared=sum(self.allocator.is_shared(page) for page in held),
            cached=used - len(held),
            free=self.allocator.num_free,
            committed_bytes=sum(pages.arena.committed for pages in self.layers.values()),
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over the group's layers."""
        return sum(pages.page_bytes for pages in self.layers.values())


KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Dtypes of pages by name; None: that of the model's keys and values."""


class PagePool:
    """Pages for one cache, or shared by several caches of one model.

    Args:
        page_size: token slots of a page.
        num_pages: a budget: pages of the whole model (every layer). Groups of layers draw on it as they need, a page of
            one layer being the unit; None: the pool grows as tokens come.
        kv_dtype: "auto": pages have the dtype of the model's keys and values; "fp8" or "int8": quantised pages.

    Attributes:
        room: gives the bytes of a device that pages may take now, for pools whose ids come before their memory; None:
            all.
        prefixes: full pages kept after use, to be found again; see :meth:`PagedCache.store_prefix`. With a budget, the
            least recently used make room for new tokens.

    Raises:
        ValueError: an argument is not one of those accepted.
    """

    def __init__(self, page_size: int = 16, num_pages: int | None = None, kv_dtype: str = "auto") -> None:
        if page_size < 1 or (num_pages is not None and num_pages < 1):
            raise ValueError(f"page_size and num_pages must be at least 1, got {page_size!r} and {num_pages!r}.")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {tuple(KV_DTYPES)}, got {kv_dtype!r}.")
        self.page_size, self.num_pages, self.kv_dtype = page_size, num_pages, kv_dtype
        self.groups: dict[int | None, PageGroup] = {}
        self.room: Callable[[torch.device], int] | None = None
        self.prefixes: PrefixCache | None = None

    def set_layers(self, windows: dict[int | None, int]) -> None:
        """Make the groups of a model: number of layers by sliding window. A shared pool serves one kind of model."""
        if not self.groups:
            self.groups = {window: PageGroup(self, window, count) for window, count in windows.items()}
            if self.groups:
                allocators = [group.allocator for group in self.groups.values()]
                self.prefixes = PrefixCache(self.page_size, allocators, list(self.groups))
        have = {window: group.num_layers for window, group in self.groups.items()}
        if have != windows:
            raise ValueError(
                f"the pool serves a model with {have} layers by sliding window, this one has {windows}: give it a pool "
                f"of its own."
            )

    def pages_left(self, group: PageGroup) -> int | None:
        """Pages that ``group`` may still add; None without a budget."""
        if self.num_pages is None:
            return None
        budget = self.num_pages * sum(g.num_layers for g in self.groups.values())
        return (budget - sum(g.allocator.num_pages * g.num_layers for g in self.groups.values())) // group.num_layers

    def ensure_free(self, needs: Mapping[PageGroup, int]) -> None:
        """Have ``needs[group]`` free pages in each group, or raise and leave all that is held as it is.

        Where the budget is spent, what other groups have free at their ends is taken.

        Raises:
            OutOfPagesError, torch.OutOfMemoryError: see :meth:`PageGroup.ensure_free`.
        """
        try:
            for group, count in needs.items():
                group.ensure_free(count)
        except OutOfPagesError:
            if len(self.groups) == 1:
                raise
            for group in self.groups.values():
                group.trim(keep_free=needs.get(group, 0))
            for group, count in needs.items():
                group.ensure_free(count)

    def evict(self, group: PageGroup, count: int) -> None:
        """Let the prefix cache give back up to ``count`` pages of a group."""
        if self.prefixes is not None:
            self.prefixes.evict(list(self.groups.values()).index(group), count)

    @property
    def committed_bytes(self) -> int:
        """Memory taken from the devices, pages without an owner included."""
        return sum(pages.arena.committed for group in self.groups.values() for pages in group.layers.values())

    def trim(self, only_sparse: bool = False) -> int:
        """Give memory that no page with an owner needs back to the devices: of each group, what is behind its last one.

        No page moves, so a page near the end keeps all before it. A GPU is waited for. A pool that a
        :class:`PagedCache` made for itself is trimmed by its ``reset``, and by ``crop`` and ``batch_select_indices``
        when they leave it sparse; a pool that was given to it is not.

        Args:
            only_sparse: trim only groups that use at most a quarter of their pages, all in the first half: then what
                is given back is much more than what the next tokens take again.

        Returns:
            Bytes given back.

        Raises:
            RuntimeError: a CUDA graph is being captured; nothing was changed.
        """
        before = self.committed_bytes
        for group in self.groups.values():
            if not only_sparse or group.is_sparse:
                group.trim()
        return before - self.committed_bytes

    @property
    def pages_in_use(self) -> int:
        """Pages with an owner, over all groups; a shared page counts once."""
        return sum(group.allocator.num_used for group in self.groups.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer."""
        return sum(group.page_bytes for group in self.groups.values())

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use, all layers."""
        return sum(group.allocator.num_used * group.page_bytes for group in self.groups.values())

    def drop_tensors(self) -> None:
        """Forget the page tensors, for example because the next tokens are of another dtype or device."""
        for group in self.groups.values():
            group.layers.clear()
        self.trim()

    def check(self) -> None:
        """Prove that every page of every group is owned or free; see :meth:`PageAllocator.check`."""
        for index, group in enumerate(self.groups.values()):
            cached = self.prefixes.held(index) if self.prefixes is not None else ()
            group.allocator.check([*group.held(), *cached])
            for pages in group.layers.values():
                for tensor in pages.tensors:
                    assert tensor.shape[0] >= group.allocator.num_pages, "a layer has fewer pages than its group"
                has = pages.arena.committed
                enough = group.is_released or has >= group.allocator.num_backed * pages.page_bytes
                assert enough, "pages are handed out that have no memory"
            for table in group.tables:
                for held, length in zip(table.pages, table.lengths):
                    assert len(held) == -(-length // table.page_size), "a sequence has other pages than it needs"
