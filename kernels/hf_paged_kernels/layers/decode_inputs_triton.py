"""The inputs of a decode step, from tables by slot that live on the device, in Triton."""

import torch
import triton
import triton.language as tl

from ..backend import contiguous_rows, device_guard
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import launch
from ..settings import cdiv

ROWS = 128
PAGES = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _decode_inputs(
    slots,
    computed,
    last_token,
    input_ids,
    positions,
    seq_lens,
    num_rows,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: ROWS rows. Many rows may name one slot that has no tokens, and all write its -1 again."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    slot = tl.load(slots + row, mask=mask, other=0)
    before = tl.load(computed + slot, mask=mask, other=-1)
    tl.store(input_ids + row, tl.load(last_token + slot, mask=mask, other=0), mask=mask)
    tl.store(positions + row, tl.maximum(before, 0), mask=mask)
    tl.store(seq_lens + row, (before + 1).to(tl.int32), mask=mask)
    tl.store(computed + slot, tl.where(before >= 0, before + 1, -1), mask=mask)


def decode_inputs_launch(
    slots: torch.Tensor, computed: torch.Tensor, last_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; see :func:`hf_paged_kernels.layers.ops.decode_inputs_op`."""
    num_rows, slots, counts = len(slots), slots.contiguous(), computed.contiguous()
    input_ids, positions = torch.empty_like(slots), torch.empty_like(slots)
    seq_lens = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    if num_rows:
        with device_guard(slots):
            launch(
                _decode_inputs, (cdiv(num_rows, ROWS),),
                slots, counts, last_token.contiguous(), input_ids, positions, seq_lens, num_rows,
                ROWS=ROWS,
                num_warps=4,
                **dependent_launch(slots.device),
            )  # fmt: skip
    if counts is not computed:
        computed.copy_(counts)
    return input_ids, positions, seq_lens


@triton.jit
def _decode_rows(
    slots,
    seq_lens,
    page_table,
    rows,
    slot_mapping,
    stride_p,
    stride_r,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row. Only the entries of its pages are copied, PAGES at a time."""
    row = tl.cast(tl.program_id(0), tl.int64)
    offs = tl.arange(0, PAGES)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    length = tl.load(seq_lens + row)
    source = page_table + tl.load(slots + row) * stride_p
    num_pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    for start in range(0, num_pages, PAGES):
        mask = start + offs < num_pages
        tl.store(rows + row * stride_r + start + offs, tl.load(source + start + offs, mask=mask, other=0), mask=mask)
    last = tl.maximum(length - 1, 0)
    page = tl.load(source + last // PAGE_SIZE).to(tl.int64)
    tl.store(slot_mapping + row, tl.where(length > 0, page * PAGE_SIZE + last % PAGE_SIZE, -1))


def decode_rows_launch(
    slots: torch.Tensor, seq_lens: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; see :func:`hf_paged_kernels.layers.ops.decode_rows_op`."""
    num_rows, table = len(slots), contiguous_rows(page_table)
    rows = torch.empty(num_rows, page_table.shape[1], dtype=page_table.dtype, device=page_table.device)
    slot_mapping = torch.empty(num_rows, dtype=torch.int64, device=slots.device)
    if num_rows:
        with device_guard(slots):
            launch(
                _decode_rows, (num_rows,),
                slots.contiguous(), seq_lens.contiguous(), table, rows, slot_mapping, table.stride(0), rows.stride(0),
                PAGE_SIZE=page_size,
                PAGES=PAGES,
                num_warps=4,
                **dependent_launch(slots.device),
            )  # fmt: skip
    return rows, slot_mapping
