"""Pages of preempted sequences in host memory."""

from dataclasses import dataclass

import torch

from ...paging import GONE
from .request import Sequence
from .slot_pages import SlotPages
from .slots import Slots


@dataclass(frozen=True, slots=True)
class SwappedPages:
    """A sequence's pages in host memory.

    Attributes:
        computed: tokens in the pages.
        held: for each group, whether each logical page was held.
        layers: for each group, layer index -> uint8 ``[pages, page_bytes]``.
        num_bytes: host memory.
    """

    computed: int
    held: list[list[bool]]
    layers: list[dict[int, torch.Tensor]]
    num_bytes: int


class Swapping:
    """Copies the pages of sequences to host memory and back.

    Args:
        slots, pages: of the sequences.
        space: bytes of host memory.

    Attributes:
        space_left: of these.
    """

    def __init__(self, slots: Slots, pages: SlotPages, space: int) -> None:
        self.slots, self.pages, self.space_left = slots, pages, space

    def swap_out(self, sequence: Sequence) -> SwappedPages | None:
        """Copy a sequence's pages to host memory; None where there is no room for them."""
        slot = sequence.slot
        if not self.space_left:
            return None
        held = [[page != GONE for page in table.pages[slot]] for table in self.pages.tables]
        num_bytes = sum(sum(h) * table.group.page_bytes for h, table in zip(held, self.pages.tables))
        if num_bytes > self.space_left:
            return None
        layers = []
        for table in self.pages.tables:
            ids = torch.tensor([page for page in table.pages[slot] if page != GONE], dtype=torch.int64)
            copies = {}
            for index, pages in table.group.layers.items():
                raw = pages.raw()[ids.to(pages.device)]
                host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=raw.device.type == "cuda")
                # Queued on the stream that will overwrite the pages, so they can be given back at once.
                copies[index] = host.copy_(raw, non_blocking=True)
            layers.append(copies)
        self.space_left -= num_bytes
        # The token of a step on its way is lost: its sequence computes the last one that is known again.
        computed = min(int(self.slots.computed[slot]), int(self.slots.length[slot]) - 1)
        return SwappedPages(computed, held, layers, num_bytes)

    def swap_in(self, sequence: Sequence) -> bool:
        """Bring back the pages of a sequence whose slot has none; False: there are too few, compute it again."""
        swapped: SwappedPages = sequence.swapped
        self.space_left += swapped.num_bytes
        if not self.pages.ensure_free([sum(held) for held in swapped.held]):
            return False
        adopted: list[list[int | None]] = []
        for table, held, layers in zip(self.pages.tables, swapped.held, swapped.layers):
            taken = table.allocator.allocate(sum(held))
            for index, host in layers.items():
                pages = table.group.layers[index]
                ids = torch.tensor(taken, dtype=torch.int64, device=pages.device)
                pages.raw()[ids] = host.to(pages.device, non_blocking=True)
            remaining = iter(taken)
            adopted.append([next(remaining) if is_held else None for is_held in held])
        self.pages.adopt(sequence.slot, adopted)
        self.slots.computed[sequence.slot] = swapped.computed
        return True

    def drop(self, sequence: Sequence) -> None:
        """Forget what a sequence has in host memory: it is computed again."""
        if sequence.swapped is not None:
            self.space_left += sequence.swapped.num_bytes
            sequence.swapped = None
