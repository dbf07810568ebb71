"""Merging two attention results over disjoint sets of keys, in Triton.

    lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b
"""

import torch
import triton
import triton.language as tl

from ..backend import device_guard
from ..launch_triton import launch
from ..settings import next_power_of_2


@triton.jit
def _merge_states(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    stride_at,
    stride_ah,
    stride_bt,
    stride_bh,
    stride_ot,
    stride_oh,
    stride_lat,
    stride_lah,
    stride_lbt,
    stride_lbh,
    stride_lt,
    stride_lh,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program: one token of one head."""
    token = tl.cast(tl.program_id(0), tl.int64)
    head = tl.cast(tl.program_id(1), tl.int64)
    a = tl.load(lse_a + token * stride_lat + head * stride_lah)
    b = tl.load(lse_b + token * stride_lbt + head * stride_lbh)
    highest = tl.maximum(a, b)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    weight_a = tl.exp(a - pivot)
    weight_b = tl.exp(b - pivot)
    total = weight_a + weight_b
    safe_total = tl.where(total == 0.0, 1.0, total)
    offs = tl.arange(0, BLOCK_DV)
    mask = offs < V_DIM
    # A side that saw no key may hold anything: it must not reach the sum even as 0 * nan. One that saw some must.
    partial_a = tl.load(out_a + token * stride_at + head * stride_ah + offs, mask=mask, other=0.0).to(tl.float32)
    partial_b = tl.load(out_b + token * stride_bt + head * stride_bh + offs, mask=mask, other=0.0).to(tl.float32)
    partial_a = tl.where(a == float("-inf"), 0.0, partial_a)
    partial_b = tl.where(b == float("-inf"), 0.0, partial_b)
    result = (partial_a * weight_a + partial_b * weight_b) / safe_total
    tl.store(out + token * stride_ot + head * stride_oh + offs, result.to(out.dtype.element_ty), mask=mask)
    merged = tl.where(total == 0.0, float("-inf"), pivot + tl.log(safe_total))
    tl.store(lse + token * stride_lt + head * stride_lh, merged)


def merge_attention_states_launch(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked arguments; shapes as in :func:`hf_paged_kernels.merge_attention_states`."""
    num_tokens, num_heads, v_dim = out_a.shape
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out, lse
    with device_guard(out_a):
        launch(
            _merge_states, (num_tokens, num_heads),
            out_a, lse_a, out_b, lse_b, out, lse,
            *out_a.stride()[:2], *out_b.stride()[:2], *out.stride()[:2],
            *reversed(lse_a.stride()), *reversed(lse_b.stride()), *reversed(lse.stride()),
            V_DIM=v_dim, BLOCK_DV=next_power_of_2(v_dim), num_warps=1,
        )  # fmt: skip
    return out, lse
