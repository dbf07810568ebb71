"""What is done to the pages of several layers at once: gathered, copied, moved to host memory and back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from hf_paged_kernels.attention.ops import copy_pages_op
from hf_paged_kernels.attention.reference import dequantize, hadamard
from hf_paged_kernels.settings import hadamard_bits

from ..paging import GONE, LayerPages, PageGroup, SequenceTable
from .step_plan import send_together


def gather(pages: LayerPages, page: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[tokens, H, D]`` in the model's dtype, from ``offset`` of each ``page``, both int64."""
    states = []
    bits = hadamard_bits(pages.k.dtype, pages.k.shape[-1])
    for stored, scale, rotated in ((pages.k, pages.k_scale, bits), (pages.v, pages.v_scale, 0)):
        # Not every device indexes quantised dtypes.
        raw = stored.view(torch.uint8) if pages.is_quantized else stored
        found = raw[page, :, offset].view(stored.dtype)
        scales = None if scale is None else scale[page, :, offset]
        if rotated:
            # Rounded to the model's dtype once, after the way back.
            state = hadamard(dequantize(found, scales, torch.float32), rotated).to(pages.model_dtype)
        else:
            state = dequantize(found, scales, pages.model_dtype)
        states.append(state)
    return states[0], states[1]


def copy_pages(layers: Iterable[LayerPages], sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy pages ``sources[i]`` to ``targets[i]`` in every layer; no target is a source."""
    ends: dict[torch.device, list[torch.Tensor]] = {}
    for pages in layers:
        device = pages.k.device
        if device not in ends:
            ends[device] = send_together([torch.tensor(ids, dtype=torch.int32) for ids in (sources, targets)], device)
        copy_pages_op(pages.k, pages.v, *ends[device])
        if pages.k_scale is not None and pages.v_scale is not None:
            copy_pages_op(pages.k_scale[..., None], pages.v_scale[..., None], *ends[device])


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


def swap_out(group: PageGroup, table: SequenceTable, row: int) -> SwappedPages:
    """Copy a row's pages to host memory and give them back. On a GPU the copies are queued, not waited for."""
    pages = [page for page in table.pages[row] if page != GONE]
    layers = {}
    for index, layer in group.layers.items():
        raw = layer.raw()[torch.tensor(pages, dtype=torch.int64, device=layer.device)]
        host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=raw.device.type == "cuda")
        # Queued on the stream that will overwrite the pages, so the pages can be given back at once.
        layers[index] = host.copy_(raw, non_blocking=True)
    swapped = SwappedPages([page != GONE for page in table.pages[row]], layers)
    table.vacate(row)
    return swapped


def swap_in(group: PageGroup, table: SequenceTable, row: int, length: int, swapped: SwappedPages) -> None:
    """Take pages for a row again and copy what it held back into them.

    Raises:
        OutOfPagesError: too few pages; nothing was changed.
    """
    group.ensure_free(sum(swapped.held))
    taken = table.allocator.allocate(sum(swapped.held))
    for index, host in swapped.layers.items():
        layer = group.layers[index]
        device_pages = torch.tensor(taken, dtype=torch.int64, device=layer.device)
        layer.raw()[device_pages] = host.to(layer.device, non_blocking=True)
    remaining = iter(taken)
    table.refill(row, [next(remaining) if held else GONE for held in swapped.held], length)
