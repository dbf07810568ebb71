"""RMSNorm with the addition of a residual before it, in Triton: one program a row.

    total = x + residual                                   rounded to the dtype of x
    normed = (offset + weight) * total * rsqrt(mean(total^2) + eps)

The sums are in float32; see ``rms_norm_op`` for where results are rounded. x may come as
float32 parts of a sum, which are added in their order: what a matmul leaves that was split along its inner dimension.
"""

import torch
import triton
import triton.language as tl

from ..backend import contiguous, contiguous_rows, device_guard
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import launch
from ..settings import next_power_of_2


@triton.jit
def _rms_norm(
    x,
    weight,
    residual,
    normed,
    total,
    stride_x,
    stride_r,
    eps,
    weight_offset,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row. Strides are those of rows; parts lie one behind the other."""
    row = tl.cast(tl.program_id(0), tl.int64)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    values = tl.load(x + row * stride_x + offs, mask=mask, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        values += tl.load(x + (part * tl.num_programs(0) + row) * stride_x + offs, mask=mask, other=0.0)
    values = values.to(normed.dtype.element_ty)
    if HAS_WEIGHT:
        factor = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if HAS_RESIDUAL:
        added = tl.load(residual + row * stride_r + offs, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(normed.dtype.element_ty)
        tl.store(total + row * N + offs, values, mask=mask)
    values = values.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / N + eps)
    if ROUND_FIRST:
        values = values.to(normed.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        values *= factor
    tl.store(normed + row * N + offs, values.to(normed.dtype.element_ty), mask=mask)


def rms_norm_warps(row_length: int) -> int:
    """Warps of a program: 8 elements, 16 bytes of a small float, for each thread of up to 16 warps."""
    return min(16, max(1, next_power_of_2(row_length) // 256))


def rms_norm_launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; see ``rms_norm_op``."""
    n = x.shape[-1]
    rows = contiguous_rows(x.reshape(-1, n))
    added = None if residual is None else contiguous_rows(residual.reshape(-1, n))
    normed, total = _launch(rows, 1, weight, eps, weight_offset, round_first, added, x.dtype)
    return normed.view(x.shape), total if residual is None else total.view(x.shape)


def rms_norm_parts_launch(
    parts: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; see :func:`hf_paged_kernels.layers.ops.rms_norm_parts_op`."""
    num_parts, _, n = parts.shape
    rows = contiguous_rows(parts.reshape(-1, n))
    return _launch(
        rows, num_parts, weight, eps, weight_offset, round_first, contiguous_rows(residual), residual.dtype
    )


def _launch(
    x: torch.Tensor,
    num_parts: int,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, total)`` of rows ``[num_parts * T, N]``, in ``dtype``; parts of more than one are added first."""
    num_rows, n = len(x) // num_parts, x.shape[1]
    normed = torch.empty(num_rows, n, dtype=dtype, device=x.device)
    total = torch.empty((0,) if residual is None else (num_rows, n), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return normed, total
    with device_guard(x):
        launch(
            _rms_norm, (num_rows,),
            x, contiguous(weight), residual, normed, total, x.stride(0), 0 if residual is None else residual.stride(0),
            eps, weight_offset,
            N=n,
            BLOCK_N=next_power_of_2(n),
            HAS_WEIGHT=weight is not None,
            HAS_RESIDUAL=residual is not None,
            NUM_PARTS=num_parts,
            ROUND_FIRST=round_first,
            num_warps=rms_norm_warps(n),
            **dependent_launch(x.device),
        )  # fmt: skip
    return normed, total
