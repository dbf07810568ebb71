"""A sequence's pages in host memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..paging import GONE

if TYPE_CHECKING:
    from .layer_group import LayerGroup


@dataclass(frozen=True, slots=True)
class SwappedPages:
    """One group's part of a sequence that was swapped out.

    Attributes:
        held: per logical page, whether it was held (False: given back by a sliding window).
        layers: layer index -> uint8 ``[pages, page_bytes]`` in host memory, pinned where a GPU copies it.
    """

    held: list[bool]
    layers: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SwappedSequence:
    """A sequence of a :class:`PagedCache` in host memory; give it back with ``cache.swap_in``.

    Attributes:
        row: its row in the batch.
        length: its tokens.
        groups: its pages, by the sliding window of their layers.
    """

    row: int
    length: int
    groups: dict[int | None, SwappedPages]

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(x.numel() for group in self.groups.values() for x in group.layers.values())


def swap_out(group: "LayerGroup", row: int) -> SwappedPages:
    """Copy a row's pages to host memory and give them back. On a GPU the copies are queued, not waited for."""
    pages = [page for page in group.table.pages[row] if page != GONE]
    layers = {}
    for index, layer in group.pages.layers.items():
        raw = layer.raw()[torch.tensor(pages, dtype=torch.int64, device=layer.device)]
        host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=raw.device.type == "cuda")
        # Queued on the stream that will overwrite the pages, so the pages can be given back at once.
        layers[index] = host.copy_(raw, non_blocking=True)
    swapped = SwappedPages([page != GONE for page in group.table.pages[row]], layers)
    group.table.vacate(row)
    return swapped


def swap_in(group: "LayerGroup", row: int, length: int, swapped: SwappedPages) -> None:
    """Take pages for a row again and copy what it held back into them.

    Raises:
        OutOfPagesError: too few pages; nothing was changed.
    """
    group.pages.make_room(sum(swapped.held))
    taken = group.table.allocator.allocate(sum(swapped.held))
    for index, host in swapped.layers.items():
        layer = group.pages.layers[index]
        device_pages = torch.tensor(taken, dtype=torch.int64, device=layer.device)
        layer.raw()[device_pages] = host.to(layer.device, non_blocking=True)
    remaining = iter(taken)
    group.table.refill(row, [next(remaining) if held else GONE for held in swapped.held], length)
