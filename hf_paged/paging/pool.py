"""The K and V page tensors of every layer, and the allocator of their pages."""

from collections.abc import Callable, Iterable

import torch

from ..errors import OutOfPagesError
from .allocator import PageAllocator

FIRST_PAGES = 64
"""Pages of a growing pool when its first token comes."""


class PagePool:
    """Page ``p`` means the same page in every layer: ``k_pages[layer][p]`` is ``[num_kv_heads, page_size, head_dim]``.

    A layer's tensors are made when its first keys arrive, with their heads, head dims, dtype and device.

    Args:
        page_size: token slots of a page.
        num_pages: a fixed number of pages; None: the pool doubles when it is full.
    """

    def __init__(self, page_size: int, num_pages: int | None) -> None:
        self.page_size = page_size
        self.can_grow = num_pages is None
        self.allocator = PageAllocator(num_pages or 0)
        self.k_pages: dict[int, torch.Tensor] = {}
        self.v_pages: dict[int, torch.Tensor] = {}

    def make_room(self, count: int) -> None:
        """Have ``count`` free pages, growing if the pool may.

        Raises:
            OutOfPagesError: the pool is fixed and has fewer.
        """
        missing = count - self.allocator.num_free
        if missing <= 0:
            return
        if not self.can_grow:
            raise OutOfPagesError(count, self.allocator.num_free, self.allocator.num_pages)
        old = self.allocator.num_pages
        self.allocator.grow(max(FIRST_PAGES, 2 * old, old + missing))
        for pages in (self.k_pages, self.v_pages):
            for layer, tensor in pages.items():
                grown = tensor.new_empty(self.allocator.num_pages, *tensor.shape[1:])
                grown[:old] = tensor
                pages[layer] = grown

    def layer(
        self, layer: int, make: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(k_pages, v_pages)`` of a layer, made by ``make(num_pages)`` the first time."""
        if layer not in self.k_pages:
            self.k_pages[layer], self.v_pages[layer] = make(self.allocator.num_pages)
        return self.k_pages[layer], self.v_pages[layer]

    def drop_tensors(self) -> None:
        """Forget the page tensors, for example because the next tokens are of another dtype or device."""
        self.k_pages.clear()
        self.v_pages.clear()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        tensors = [*self.k_pages.values(), *self.v_pages.values()]
        return sum(t[0].numel() * t.element_size() for t in tensors if t.shape[0])

    def check(self, held: Iterable[int]) -> None:
        """Prove that every page is owned or free; see :meth:`PageAllocator.check`."""
        self.allocator.check(held)
        for tensor in (*self.k_pages.values(), *self.v_pages.values()):
            assert tensor.shape[0] == self.allocator.num_pages, "a layer has another number of pages than the pool"
