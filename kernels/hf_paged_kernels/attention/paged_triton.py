"""Attention of packed queries over pages of keys and values, in portable Triton: prefill, decode and mixed steps.

One sequence, one step (query_len new tokens, seq_len tokens in the cache after this step's write):

    tokens in the cache   0 ........................ seq_len - query_len ........ seq_len
                          |         context          |       this step's query    |
    query token t                                      position seq_len - query_len + t

Rows of a program are ``BLOCK_Q`` consecutive query tokens times the GROUP query heads that share one key/value head, so
every key tile is read once for the whole group:

    row m  ->  token m // GROUP of the block,  query head  kv_head * GROUP + m % GROUP

Long contexts with short queries are split into fixed runs of SPLIT_LEN keys; each program leaves unnormalised partial
results and their log-sum-exp, and ``_merge_splits`` folds a row's partials in their order:

    keys   | split 0 | split 1 | split 2 | .. |    partial[s], lse[s]   ->   out = sum_s exp(lse[s] - lse) * partial[s]

Keys are found through the page table tile by tile; nothing is gathered or copied (Kwon et al. 2023, "PagedAttention").
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..backend import MAX_GRID, contiguous, contiguous_rows, device_guard, scale_strides
from ..launch_triton import launch
from ..settings import (
    LOG2_E,
    SPLIT_LENGTH,
    AttentionSettings,
    cdiv,
    dot_precision,
    hadamard_bits,
    is_short_query,
    next_power_of_2,
    paged_settings,
)
from .pages_triton import hadamard
from .primitives_triton import (
    add_sink,
    find_sequence,
    finish_softmax,
    key_bounds,
    online_softmax_update,
    scale_scores,
    unmasked_bounds,
    visible_mask,
)


@triton.jit
def _attend_pages(
    accumulator,
    running_max,
    running_sum,
    query,
    k_head,
    v_head,
    k_scale_head,
    v_scale_head,
    table_row,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    stride_sp,
    stride_ss,
    positions,
    run_start,
    run_stop,
    low,
    stop,
    scale_log2,
    softcap,
    window_left,
    window_right,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys run_start..run_stop of one sequence into the running softmax; it may read low..stop."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start in range(run_start, run_stop, BLOCK_N):
        keys = start + offs_n
        if MASKED:
            # Below `low` the page may have been given back: its table entry is not read.
            in_range = (keys >= low) & (keys < stop)
            page = tl.load(table_row + keys // PAGE_SIZE, mask=in_range, other=0).to(tl.int64)
        else:
            page = tl.load(table_row + keys // PAGE_SIZE).to(tl.int64)
        slot = tl.cast(keys % PAGE_SIZE, tl.int64)
        k_tile = k_head + (page * stride_kp + slot * stride_ks)[:, None] + offs_d[None, :]
        v_tile = v_head + (page * stride_vp + slot * stride_vs)[:, None] + offs_dv[None, :]
        # [BLOCK_N, BLOCK_D]
        if MASKED:
            key = tl.load(k_tile, mask=in_range[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            key = tl.load(k_tile)
        else:
            key = tl.load(k_tile, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
        if HAS_SCALES:
            # One scale per (token, head) factors out of the dot product: it is applied to a column of scores.
            scales = page * stride_sp + slot * stride_ss
            if MASKED:
                k_scales = tl.load(k_scale_head + scales, mask=in_range, other=0.0)
                v_scales = tl.load(v_scale_head + scales, mask=in_range, other=0.0)
            else:
                k_scales = tl.load(k_scale_head + scales)
                v_scales = tl.load(v_scale_head + scales)
            scores = scores * k_scales[None, :]
        scores = scale_scores(scores, scale_log2, softcap, HAS_SOFTCAP)
        if MASKED:
            mask = visible_mask(positions, keys, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(mask, scores, float("-inf"))
        weights, correction, running_max, running_sum = online_softmax_update(scores, running_max, running_sum)
        # [BLOCK_N, BLOCK_DV]
        if MASKED:
            value = tl.load(v_tile, mask=in_range[:, None] & (offs_dv < V_DIM)[None, :], other=0.0)
        elif V_DIM == BLOCK_DV:
            value = tl.load(v_tile)
        else:
            value = tl.load(v_tile, mask=(offs_dv < V_DIM)[None, :], other=0.0)
        if HAS_SCALES:
            weights = weights * v_scales[None, :]
        accumulator = accumulator * correction[:, None]
        accumulator += tl.dot(weights.to(query.dtype), value.to(query.dtype), input_precision=PRECISION)
    return accumulator, running_max, running_sum


@triton.jit(
    do_not_specialize=["num_seqs", "stride_table", "stride_lt", "stride_lh", "stride_ls", "window_left", "window_right"]
)
def _paged_forward(
    q,
    k_pages,
    v_pages,
    k_scale,
    v_scale,
    page_table,
    seq_lens,
    cu_seqlens_q,
    sinks,
    out,
    lse,
    num_seqs,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_ks,
    stride_vp,
    stride_vh,
    stride_vs,
    stride_sp,
    stride_sh,
    stride_ss,
    stride_table,
    stride_ot,
    stride_oh,
    stride_os,
    stride_lt,
    stride_lh,
    stride_ls,
    scale_log2,
    softcap,
    window_left,
    window_right,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HADAMARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Later blocks of a sequence see more keys: start them first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if ONE_BLOCK:
        seq = block
        first_block = block
    else:
        seq = find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q)
        first_block = tl.load(cu_seqlens_q + seq) // BLOCK_Q + seq
    q_start = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - q_start
    first_token = (block - first_block) * BLOCK_Q
    if first_token >= query_len:
        return
    seq_len = tl.load(seq_lens + seq)
    context_len = seq_len - query_len
    last_token = tl.minimum(first_token + BLOCK_Q, query_len) - 1

    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    tokens = first_token + rows // GROUP
    heads = tl.cast(kv_head, tl.int64) * GROUP + rows % GROUP
    row_valid = (rows < BLOCK_Q * GROUP) & (tokens < query_len)
    # Rows past the end repeat the last token's position, so that they never widen the mask.
    positions = context_len + tl.minimum(tokens, last_token)
    packed = tl.cast(q_start + tokens, tl.int64)

    start, stop = key_bounds(
        context_len + first_token, context_len + last_token, seq_len, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if SPLIT_LEN > 0:
        if split * SPLIT_LEN >= seq_len:
            return
        start = tl.maximum(start, split * SPLIT_LEN)
        stop = tl.minimum(stop, (split + 1) * SPLIT_LEN)
    # Tiles start at multiples of BLOCK_N in the sequence: a row sums in the same order in every batch.
    low = start
    start = start // BLOCK_N * BLOCK_N

    # [BLOCK_M, BLOCK_D]
    query = tl.load(
        q + packed[:, None] * stride_qt + heads[:, None] * stride_qh + offs_d[None, :],
        mask=row_valid[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )
    if HADAMARD > 0:
        query = hadamard(query, HADAMARD).to(query.dtype)
    k_head = k_pages + tl.cast(kv_head, tl.int64) * stride_kh
    v_head = v_pages + tl.cast(kv_head, tl.int64) * stride_vh
    k_scale_head = k_scale
    v_scale_head = v_scale
    if HAS_SCALES:
        k_scale_head = k_scale + tl.cast(kv_head, tl.int64) * stride_sh
        v_scale_head = v_scale + tl.cast(kv_head, tl.int64) * stride_sh
    table_row = page_table + tl.cast(seq, tl.int64) * stride_table

    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    full_start, full_stop = unmasked_bounds(
        context_len + first_token, context_len + last_token, start, stop,
        window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N,
    )  # fmt: skip
    if HAS_LEFT:
        accumulator, running_max, running_sum = _attend_pages(
            accumulator, running_max, running_sum, query, k_head, v_head, k_scale_head, v_scale_head, table_row,
            stride_kp, stride_ks, stride_vp, stride_vs, stride_sp, stride_ss, positions,
            start, tl.minimum(full_start, stop), low, stop, scale_log2, softcap, window_left, window_right,
            PAGE_SIZE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            HAS_SCALES, True, PRECISION,
        )  # fmt: skip
    accumulator, running_max, running_sum = _attend_pages(
        accumulator, running_max, running_sum, query, k_head, v_head, k_scale_head, v_scale_head, table_row,
        stride_kp, stride_ks, stride_vp, stride_vs, stride_sp, stride_ss, positions,
        full_start, full_stop, low, stop, scale_log2, softcap, window_left, window_right,
        PAGE_SIZE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_SCALES, False, PRECISION,
    )  # fmt: skip
    accumulator, running_max, running_sum = _attend_pages(
        accumulator, running_max, running_sum, query, k_head, v_head, k_scale_head, v_scale_head, table_row,
        stride_kp, stride_ks, stride_vp, stride_vs, stride_sp, stride_ss, positions,
        full_stop, stop, low, stop, scale_log2, softcap, window_left, window_right,
        PAGE_SIZE, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_SCALES, True, PRECISION,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=row_valid, other=0.0).to(tl.float32) * 1.4426950408889634
        accumulator, running_max, running_sum = add_sink(accumulator, running_max, running_sum, sink)

    result, row_lse = finish_softmax(accumulator, running_max, running_sum)
    out_rows = out + packed[:, None] * stride_ot + heads[:, None] * stride_oh + tl.cast(split, tl.int64) * stride_os
    tl.store(
        out_rows + offs_dv[None, :],
        result.to(out.dtype.element_ty),
        mask=row_valid[:, None] & (offs_dv < V_DIM)[None, :],
    )
    split_lse = lse + tl.cast(split, tl.int64) * stride_ls
    tl.store(split_lse + packed * stride_lt + heads * stride_lh, row_lse, mask=row_valid)


@triton.jit(do_not_specialize=["num_seqs", "stride_plt", "stride_plh", "stride_pls", "stride_lt", "stride_lh"])
def _merge_splits(
    partials,
    partial_lse,
    seq_lens,
    cu_seqlens_q,
    sinks,
    out,
    lse,
    num_seqs,
    stride_pt,
    stride_ph,
    stride_ps,
    stride_plt,
    stride_plh,
    stride_pls,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program: one query token of one head. Partials are folded in order, so the sum never depends on the batch."""
    token = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    num_splits = tl.cdiv(tl.load(seq_lens + find_sequence(cu_seqlens_q, token, num_seqs, 0)), SPLIT_LEN)

    row = tl.cast(token, tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    running_max = token * 0.0 + float("-inf")
    running_sum = token * 0.0
    for split in range(0, num_splits):
        split_lse = tl.load(partial_lse + row * stride_plt + head * stride_plh + split * stride_pls)
        # NaN too is a result: of the split that has it, and so of the row.
        if split_lse != float("-inf"):
            partial = tl.load(
                partials + row * stride_pt + head * stride_ph + split * stride_ps + offs_dv,
                mask=offs_dv < V_DIM,
                other=0.0,
            )
            new_max = tl.maximum(running_max, split_lse)
            old = tl.exp(running_max - new_max)
            new = tl.exp(split_lse - new_max)
            accumulator = accumulator * old + partial * new
            running_sum = running_sum * old + new
            running_max = new_max
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        new_max = tl.maximum(running_max, sink)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        old = tl.exp(running_max - pivot)
        accumulator = accumulator * old
        running_sum = running_sum * old + tl.exp(sink - pivot)
        running_max = new_max
    empty = running_sum == 0.0
    safe_sum = tl.where(empty, 1.0, running_sum)
    tl.store(
        out + row * stride_ot + head * stride_oh + offs_dv,
        (accumulator / safe_sum).to(out.dtype.element_ty),
        mask=offs_dv < V_DIM,
    )
    row_lse = tl.where(empty, float("-inf"), running_max + tl.log(safe_sum))
    tl.store(lse + row * stride_lt + head * stride_lh, row_lse)


def attend_by_heads(
    attend: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    sinks: torch.Tensor | None,
    num_kv_heads: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention for at most ``most`` query heads of each key/value head at a time, where a block cannot hold all.

    Args:
        attend: attention of ``q [T, heads, D]`` and ``sinks [heads]`` over the key/value heads: ``(out, lse)``.
        q: ``[T, Hq, D]``.
        sinks: ``[Hq]`` or None.
        num_kv_heads: key/value heads; a divisor of Hq.
        most: at least 1.

    Returns:
        ``out [T, Hq, Dv]``, ``lse [Hq, T]`` float32.
    """
    queries = q.unflatten(1, (num_kv_heads, -1))
    of_heads = None if sinks is None else sinks.unflatten(0, (num_kv_heads, -1))
    outs, sums = [], []
    for first in range(0, queries.shape[2], most):
        part = slice(first, first + most)
        out, lse = attend(
            queries[:, :, part].flatten(1, 2), None if of_heads is None else of_heads[:, part].flatten()
        )  # fmt: skip
        outs.append(out.unflatten(1, (num_kv_heads, -1)))
        sums.append(lse.unflatten(0, (num_kv_heads, -1)))
    return torch.cat(outs, 2).flatten(1, 2), torch.cat(sums, 1).flatten(0, 1)


def paged_attention_launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    settings: AttentionSettings | None = None,
    split_length: int = SPLIT_LENGTH,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch over pages on checked arguments; shapes as in :func:`hf_paged_kernels.paged_attention`.

    Every grid is an upper bound made from shapes and ``max_query_len``; lengths are read on the device.

    Returns:
        ``(out [T, Hq, v_dim] in q's dtype, lse [Hq, T] float32)``.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    v_dim = v_pages.shape[-1]
    num_seqs, max_pages = page_table.shape
    group = num_q_heads // num_kv_heads
    out = q.new_empty(num_tokens, num_q_heads, v_dim)
    lse = q.new_empty(num_q_heads, num_tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    page_table, seq_lens, cu_seqlens_q = contiguous_rows(page_table), seq_lens.contiguous(), cu_seqlens_q.contiguous()
    sinks = contiguous(sinks)

    chosen, block_q = paged_settings(q.device, head_dim, v_dim, q.element_size(), group, max_query_len)
    if settings is not None:
        chosen, block_q = settings, max(1, settings.block_m // group)
    elif chosen.block_m < group:
        return attend_by_heads(
            lambda q, sinks: paged_attention_launch(
                q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, max_query_len, window_left, window_right,
                softcap, sinks, scale, k_scale, v_scale,
            ),
            q, sinks, num_kv_heads, chosen.block_m,
        )  # fmt: skip
    short_query = is_short_query(group, max_query_len)
    num_splits = cdiv(max_pages * page_size, split_length) if short_query else 1
    if num_splits > MAX_GRID:
        raise ValueError(
            f"page_table has room for {max_pages * page_size} tokens of a sequence: at most {MAX_GRID * split_length} "
            f"are accepted here. Pass a table of fewer columns."
        )
    if split_length % chosen.block_n:
        raise ValueError(f"split_length must be a multiple of the {chosen.block_n} keys of a tile, got {split_length}.")
    one_block = max_query_len <= block_q
    num_blocks = num_seqs if one_block else num_tokens // block_q + num_seqs
    split = num_splits > 1
    if split:
        target = q.new_empty(num_tokens, num_q_heads, num_splits, v_dim, dtype=torch.float32)
        target_lse = q.new_empty(num_tokens, num_q_heads, num_splits, dtype=torch.float32)
        out_strides = (target.stride(0), target.stride(1), target.stride(2))
        lse_strides = target_lse.stride()
    else:
        target, target_lse = out, lse
        out_strides = (out.stride(0), out.stride(1), 0)
        lse_strides = (lse.stride(1), lse.stride(0), 0)
    block_dv = max(16, next_power_of_2(v_dim))
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    with device_guard(q):
        launch(
            _paged_forward, (num_blocks, num_kv_heads, num_splits),
            q, k_pages, v_pages, k_scale, v_scale, page_table, seq_lens, cu_seqlens_q, sinks,
            target, target_lse, num_seqs,
            *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            *scale_strides(k_scale, v_scale), page_table.stride(0),
            *out_strides, *lse_strides,
            scale_log2, softcap or 0.0, window_left or 0, window_right or 0,
            PAGE_SIZE=page_size,
            GROUP=group,
            HEAD_DIM=head_dim,
            V_DIM=v_dim,
            BLOCK_Q=block_q,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_DV=block_dv,
            SPLIT_LEN=split_length if split else 0,
            ONE_BLOCK=one_block,
            HAS_LEFT=window_left is not None,
            HAS_RIGHT=window_right is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None and not split,
            HAS_SCALES=k_scale is not None,
            HADAMARD=hadamard_bits(k_pages.dtype, head_dim),
            PRECISION=dot_precision(q),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )  # fmt: skip
        if split:
            launch(
                _merge_splits, (num_tokens, num_q_heads),
                target, target_lse, seq_lens, cu_seqlens_q, sinks, out, lse, num_seqs,
                *out_strides, *lse_strides, *out.stride()[:2], lse.stride(1), lse.stride(0),
                V_DIM=v_dim,
                BLOCK_DV=block_dv,
                SPLIT_LEN=split_length,
                HAS_SINKS=sinks is not None,
                num_warps=1 if block_dv <= 128 else 4,
            )  # fmt: skip
    return out, lse
