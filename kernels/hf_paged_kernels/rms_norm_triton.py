"""RMSNorm with the addition of a residual before it, in Triton: one program a row.

    total = x + residual                                   rounded to the dtype of x
    normed = (offset + weight) * total * rsqrt(mean(total^2) + eps)

The sums are in float32; see :func:`hf_paged_kernels.fused_ops.rms_norm_op` for where results are rounded.
"""

import torch
import triton
import triton.language as tl

from .backend import device_guard
from .dependent_launch_triton import dependent_launch, start_next, wait_for_previous


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
    ROUND_FIRST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row. Strides are those of rows."""
    row = tl.cast(tl.program_id(0), tl.int64)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    values = tl.load(x + row * stride_x + offs, mask=mask, other=0.0)
    if HAS_WEIGHT:
        factor = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if HAS_RESIDUAL:
        added = tl.load(residual + row * stride_r + offs, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * N + offs, values, mask=mask)
    values = values.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / N + eps)
    if ROUND_FIRST:
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        values *= factor
    tl.store(normed + row * N + offs, values.to(x.dtype.element_ty), mask=mask)


def rms_norm_warps(row_length: int) -> int:
    """Warps of a program: 8 elements, 16 bytes of a small float, for each thread of up to 16 warps."""
    return min(16, max(1, triton.next_power_of_2(row_length) // 256))


def rms_norm_launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; see :func:`hf_paged_kernels.fused_ops.rms_norm_op`."""
    n = x.shape[-1]
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return normed, total
    rows = x.view(-1, n)
    added = None if residual is None else residual.view(-1, n)
    with device_guard(x):
        _rms_norm[(len(rows),)](
            rows, weight, added, normed, total, rows.stride(0), 0 if added is None else added.stride(0),
            eps, weight_offset,
            N=n,
            BLOCK_N=triton.next_power_of_2(n),
            HAS_WEIGHT=weight is not None,
            HAS_RESIDUAL=residual is not None,
            ROUND_FIRST=round_first,
            num_warps=rms_norm_warps(n),
            **dependent_launch(x.device),
        )  # fmt: skip
    return normed, total
