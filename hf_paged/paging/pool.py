"""The page tensors of every layer, and the pages' owners.

Layers are grouped by their sliding window: the layers of a group hold the same tokens, so one page table serves them
all, and page ``p`` means the same page in every layer of the group. Groups share one budget.
"""

from collections.abc import Iterable

import torch

from ..errors import OutOfPagesError
from .allocator import PageAllocator
from .sequences import SequenceTable

FIRST_PAGES = 64
"""Pages of a growing group when its first token comes."""


class LayerPages:
    """Keys and values of one layer: ``k``, ``v`` ``[num_pages, num_kv_heads, page_size, head_dim]``.

    Quantised pages come with scales ``k_scale``, ``v_scale`` ``[num_pages, num_kv_heads, page_size]`` float32.
    """

    def __init__(
        self, key: torch.Tensor, value: torch.Tensor, page_size: int, num_pages: int, dtype: torch.dtype | None
    ) -> None:
        """Pages for keys like ``key`` ``[B, H, L, D]`` and values like ``value``, in ``dtype`` (None: their own)."""
        heads, device = key.shape[1], key.device
        self.model_dtype = key.dtype
        self.is_quantized = dtype is not None
        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.k, self.v = (
                torch.empty(num_pages, heads, page_size, x.shape[3], dtype=dtype or x.dtype, device=device)
                for x in (key, value)
            )
            self.k_scale: torch.Tensor | None = None
            self.v_scale: torch.Tensor | None = None
            if self.is_quantized:
                self.k_scale, self.v_scale = (torch.empty(num_pages, heads, page_size, device=device) for _ in "kv")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, keys and values first."""
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys, values and scales."""
        return sum(t.stride(0) * t.element_size() for t in self.tensors)

    def check_like(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values must be of the kind that the pages were made for."""
        expected = (self.k.shape[1], self.k.shape[3], self.v.shape[3], self.model_dtype, self.k.device)
        got = (key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        if expected != got:
            raise ValueError(
                f"the pages hold (heads, key dim, value dim, dtype, device) {expected}, the step brings {got}: call "
                f"reset() on the cache, or give the model a pool of its own."
            )

    def grow(self, num_pages: int) -> None:
        """Have ``num_pages`` pages; what is there stays."""
        for name in ("k", "v", "k_scale", "v_scale"):
            old = getattr(self, name)
            if old is not None:
                with torch.inference_mode(False):
                    grown = old.new_empty(num_pages, *old.shape[1:])
                    grown[: old.shape[0]] = old
                setattr(self, name, grown)


class PageGroup:
    """The pages of the layers that share a sliding window (None: full attention)."""

    def __init__(self, pool: "PagePool", window: int | None, num_layers: int) -> None:
        self.pool, self.window, self.num_layers = pool, window, num_layers
        self.allocator = PageAllocator(0)
        self.layers: dict[int, LayerPages] = {}
        self.tables: list[SequenceTable] = []

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerPages:
        """The pages of a layer, made for keys like ``key`` the first time."""
        if index not in self.layers:
            pool = self.pool
            self.layers[index] = LayerPages(key, value, pool.page_size, self.allocator.num_pages, pool.page_dtype)
        return self.layers[index]

    def make_room(self, count: int) -> None:
        """Have ``count`` free pages, growing within the pool's budget.

        Raises:
            OutOfPagesError: the budget is spent.
        """
        missing = count - self.allocator.num_free
        if missing <= 0:
            return
        old = self.allocator.num_pages
        wanted = max(FIRST_PAGES, 2 * old, old + missing)
        limit = self.pool.pages_left(self)
        if limit is not None:
            if missing > limit:
                raise OutOfPagesError(count, self.allocator.num_free + limit, old + limit)
            # What one group takes, the others cannot have: no more than it needs, unless it is alone.
            wanted = old + (limit if len(self.pool.groups) == 1 else missing)
        self.allocator.grow(wanted)
        for pages in self.layers.values():
            pages.grow(wanted)

    def held(self) -> Iterable[int]:
        """Every page reference of the sequences in this group."""
        for table in self.tables:
            yield from table.held()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over the group's layers."""
        return sum(pages.page_bytes for pages in self.layers.values())


class PagePool:
    """Pages for one cache, or shared by several caches of one model.

    Args:
        page_size: token slots of a page.
        num_pages: a budget: pages of the whole model (every layer). Groups of layers draw on it as they need, a page of
            one layer being the unit; None: the pool grows as tokens come.
        page_dtype: dtype of quantised pages (float8_e4m3fn or int8); None: that of the model's keys and values.
    """

    def __init__(
        self, page_size: int = 16, num_pages: int | None = None, page_dtype: torch.dtype | None = None
    ) -> None:
        self.page_size, self.num_pages, self.page_dtype = page_size, num_pages, page_dtype
        self.groups: dict[int | None, PageGroup] = {}

    def set_layers(self, windows: dict[int | None, int]) -> None:
        """Make the groups of a model: number of layers by sliding window. A shared pool serves one kind of model."""
        if not self.groups:
            self.groups = {window: PageGroup(self, window, count) for window, count in windows.items()}
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

    def check(self) -> None:
        """Prove that every page of every group is owned or free; see :meth:`PageAllocator.check`."""
        for group in self.groups.values():
            group.allocator.check(group.held())
            for pages in group.layers.values():
                for tensor in pages.tensors:
                    assert tensor.shape[0] == group.allocator.num_pages, "a layer has other pages than its group"
            for table in group.tables:
                for held, length in zip(table.pages, table.lengths):
                    assert len(held) == -(-length // table.page_size), "a sequence has other pages than it needs"
