"""Flash attention, forward, in portable Triton: dense and variable length.

    out = softmax(softcap(scale * q @ k.T) + mask) @ v,    lse = log(sum(exp(...)))

One program computes BLOCK_M query rows of one head (Dao 2023, "FlashAttention-2", algorithm 1). Its keys come in three
runs, so that the long middle one needs no mask:

    keys   | left edge of the window | every row sees every key | causal diagonal, end of the sequence |
    loop   |         masked          |         unmasked         |               masked                 |
"""

import torch
import triton
import triton.language as tl

from ..backend import MAX_GRID, contiguous, device_guard
from ..launch_triton import launch
from ..settings import LOG2_E, AttentionSettings, cdiv, dot_precision, flash_settings, next_power_of_2
from .primitives_triton import (
    add_sink,
    finish_softmax,
    key_bounds,
    online_softmax_update,
    scale_scores,
    unmasked_bounds,
    visible_mask,
)


@triton.jit
def _attend(
    accumulator,
    running_max,
    running_sum,
    query,
    k_head,
    v_head,
    stride_kt,
    stride_vt,
    positions,
    run_start,
    run_stop,
    stop,
    scale_log2,
    softcap,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys run_start..run_stop into the running softmax. k_head, v_head point at key 0 of one head."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = tl.cast(offs_n, tl.int64)[:, None]
    for start in range(run_start, run_stop, BLOCK_N):
        keys = start + offs_n
        k_tile = k_head + tl.cast(start, tl.int64) * stride_kt + rows * stride_kt + offs_d[None, :]
        v_tile = v_head + tl.cast(start, tl.int64) * stride_vt + rows * stride_vt + offs_dv[None, :]
        # [BLOCK_N, BLOCK_D]
        if MASKED:
            key = tl.load(k_tile, mask=(keys < stop)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            key = tl.load(k_tile)
        else:
            key = tl.load(k_tile, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = scale_scores(scores, scale_log2, softcap, HAS_SOFTCAP)
        if MASKED:
            mask = visible_mask(positions, keys, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(mask, scores, float("-inf"))
        weights, correction, running_max, running_sum = online_softmax_update(scores, running_max, running_sum)
        # [BLOCK_N, BLOCK_DV]
        if MASKED:
            value = tl.load(v_tile, mask=(keys < stop)[:, None] & (offs_dv < V_DIM)[None, :], other=0.0)
        elif V_DIM == BLOCK_DV:
            value = tl.load(v_tile)
        else:
            value = tl.load(v_tile, mask=(offs_dv < V_DIM)[None, :], other=0.0)
        accumulator = accumulator * correction[:, None]
        accumulator += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return accumulator, running_max, running_sum


@triton.jit(
    do_not_specialize=["seqlen_q", "seqlen_k", "stride_lb", "stride_lh", "window_left", "window_right", "first_seq"]
)
def _flash_forward(
    q,
    k,
    v,
    sinks,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqlen_q,
    seqlen_k,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lb,
    stride_lh,
    scale_log2,
    softcap,
    window_left,
    window_right,
    first_seq,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Longest rows first: under a causal mask the last blocks have the most keys.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    kv_head = tl.cast(tl.program_id(1) // GROUP, tl.int64)
    batch = tl.cast(first_seq + tl.program_id(2), tl.int64)
    if VARLEN:
        q_start = tl.cast(tl.load(cu_seqlens_q + batch), tl.int64)
        k_start = tl.cast(tl.load(cu_seqlens_k + batch), tl.int64)
        num_queries = tl.cast(tl.load(cu_seqlens_q + batch + 1) - q_start, tl.int32)
        num_keys = tl.cast(tl.load(cu_seqlens_k + batch + 1) - k_start, tl.int32)
        q_base = q_start * stride_qt
        k_base = k_start * stride_kt
        v_base = k_start * stride_vt
        o_base = q_start * stride_ot
        l_base = q_start
    else:
        num_queries = seqlen_q
        num_keys = seqlen_k
        q_base = batch * stride_qb
        k_base = batch * stride_kb
        v_base = batch * stride_vb
        o_base = batch * stride_ob
        l_base = batch * stride_lb
    first_row = block * BLOCK_M
    if first_row >= num_queries:
        return

    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_valid = offs_m < num_queries
    # The last query sits on the last key (bottom-right alignment).
    offset = num_keys - num_queries
    positions = tl.where(row_valid, offs_m + offset, offset + num_queries - 1)
    first_position = first_row + offset
    last_position = tl.minimum(first_row + BLOCK_M, num_queries) - 1 + offset

    # [BLOCK_M, BLOCK_D]
    query = tl.load(
        q + q_base + head * stride_qh + tl.cast(offs_m, tl.int64)[:, None] * stride_qt + offs_d[None, :],
        mask=row_valid[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )
    k_head = k + k_base + kv_head * stride_kh
    v_head = v + v_base + kv_head * stride_vh

    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    start, stop = key_bounds(
        first_position, last_position, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    full_start, full_stop = unmasked_bounds(
        first_position, last_position, start, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if HAS_LEFT:
        accumulator, running_max, running_sum = _attend(
            accumulator, running_max, running_sum, query, k_head, v_head, stride_kt, stride_vt, positions,
            start, tl.minimum(full_start, stop), stop, scale_log2, softcap, window_left, window_right,
            HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True, PRECISION,
        )  # fmt: skip
    accumulator, running_max, running_sum = _attend(
        accumulator, running_max, running_sum, query, k_head, v_head, stride_kt, stride_vt, positions,
        full_start, full_stop, stop, scale_log2, softcap, window_left, window_right,
        HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, False, PRECISION,
    )  # fmt: skip
    accumulator, running_max, running_sum = _attend(
        accumulator, running_max, running_sum, query, k_head, v_head, stride_kt, stride_vt, positions,
        full_stop, stop, stop, scale_log2, softcap, window_left, window_right,
        HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True, PRECISION,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        accumulator, running_max, running_sum = add_sink(accumulator, running_max, running_sum, sink)

    result, row_lse = finish_softmax(accumulator, running_max, running_sum)
    tl.store(
        out + o_base + head * stride_oh + tl.cast(offs_m, tl.int64)[:, None] * stride_ot + offs_dv[None, :],
        result.to(out.dtype.element_ty),
        mask=row_valid[:, None] & (offs_dv < V_DIM)[None, :],
    )
    tl.store(lse + l_base + head * stride_lh + offs_m, row_lse, mask=row_valid)


def flash_attention_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    settings: AttentionSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel on checked arguments; shapes as in :func:`hf_paged_kernels.flash_attention`.

    Args:
        window_left: keys to the left that a query sees, itself not counted; None: all of them.
        window_right: the same to the right; 0 is causal, None: all of them.
        settings: tile sizes; the default comes from :func:`hf_paged_kernels.settings.flash_settings`.

    Returns:
        ``(out, lse)``; out like q with v's head dim, lse float32 ``[B, Hq, Lq]`` or packed ``[Hq, T]``.
    """
    varlen = cu_seqlens_q is not None
    cu_seqlens_q, cu_seqlens_k, sinks = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), contiguous(sinks)
    num_q_heads, head_dim = q.shape[-2:]
    num_kv_heads, v_dim = v.shape[-2:]
    if cu_seqlens_q is not None:
        num_seqs = cu_seqlens_q.shape[0] - 1
        out = q.new_empty(q.shape[0], num_q_heads, v_dim)
        lse = q.new_empty(num_q_heads, q.shape[0], dtype=torch.float32)
        strides = [(0, *x.stride()[:2]) for x in (q, k, v, out)]
        lse_strides = (0, lse.stride(0))
        seqlen_q, seqlen_k = max_seqlen_q, 0
    else:
        num_seqs, seqlen_q = q.shape[:2]
        seqlen_k = k.shape[1]
        out = q.new_empty(num_seqs, seqlen_q, num_q_heads, v_dim)
        lse = q.new_empty(num_seqs, num_q_heads, seqlen_q, dtype=torch.float32)
        strides = [x.stride()[:3] for x in (q, k, v, out)]
        lse_strides = lse.stride()[:2]
    if out.numel() == 0:
        return out, lse

    s = settings or flash_settings(q.device, head_dim, v_dim, q.element_size())
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    with device_guard(q):
        for first_seq in range(0, num_seqs, MAX_GRID):
            grid = (cdiv(seqlen_q, s.block_m), num_q_heads, min(MAX_GRID, num_seqs - first_seq))
            launch(
                _flash_forward, grid,
                q, k, v, sinks, out, lse, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k,
                *strides[0], *strides[1], *strides[2], *strides[3], *lse_strides,
                scale_log2, softcap or 0.0, window_left or 0, window_right or 0, first_seq,
                GROUP=num_q_heads // num_kv_heads,
                HEAD_DIM=head_dim,
                V_DIM=v_dim,
                BLOCK_M=s.block_m,
                BLOCK_N=s.block_n,
                BLOCK_D=max(16, next_power_of_2(head_dim)),
                BLOCK_DV=max(16, next_power_of_2(v_dim)),
                VARLEN=varlen,
                HAS_LEFT=window_left is not None,
                HAS_RIGHT=window_right is not None,
                HAS_SOFTCAP=softcap is not None,
                HAS_SINKS=sinks is not None,
                PRECISION=dot_precision(q),
                num_warps=s.num_warps,
                num_stages=s.num_stages,
            )  # fmt: skip
    return out, lse
