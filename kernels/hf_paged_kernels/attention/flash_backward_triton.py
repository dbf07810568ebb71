"""Flash attention, backward, in portable Triton: dense and variable length.

With ``S = softcap(scale * q @ k.T) + mask`` and ``P = exp(S - lse)`` as in the forward pass, for each query row::

    delta = rowsum(dout * out) - dlse        dP = dout @ v.T        dS = P * (dP - delta) * softcap'
    dv = P.T @ dout        dk = scale * dS.T @ q        dq = scale * dS @ k        dsink = -sum(exp(sink - lse) * delta)

P is computed again, tile by tile (Dao 2023, "FlashAttention-2", algorithm 2). One program owns BLOCK_N keys of one
key/value head and folds in the queries of all heads of its group, on transposed tiles ``[keys, queries]``: P.T and dS.T
are then left operands as they come out of the matrix units. What a key sees of the queries is what a query sees of the
keys with the window turned around, so the runs are the forward's::

    run        0                  1                     2
    queries | causal diagonal | every key is seen | edge of the window, end of the sequence |
    loop    |     masked      |     unmasked      |                masked                   |

dq is a sum over key blocks, so a second kernel owns BLOCK_M queries of one head and walks their keys as the forward
does. It computes P and dP once more, seven matmuls in all instead of five, but no two programs add to the same numbers:
the gradients have the same bits every time. Adding dq by atomics in the first kernel was slower at every length
measured (eval/results/backward_h200.md). On Hopper GPUs ``hopper_backward_gluon`` sums dq in order and is faster.

With DESCRIPTORS, tiles come through tensor descriptors (TMA on Hopper): a few instructions for a tile instead of an
address a thread. A masked tile of a packed sequence still takes pointers, since a descriptor would read its neighbour.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..backend import MAX_GRID, contiguous, contiguous_rows, device_guard, new_like
from ..launch_triton import Launch, Launches, Places, Series, Tile
from ..settings import (
    LOG2_E,
    AttentionSettings,
    BackwardSettings,
    cdiv,
    dot_precision,
    flash_backward_settings,
    next_power_of_2,
)
from .flash_backward_parts_triton import (
    count_blocks,
    find_block,
    find_stats,
    find_tokens,
    load_tile,
    row_sums,
    run_bounds,
    score_gradient,
)
from .primitives_triton import key_bounds, scale_scores, unmasked_bounds, visible_mask

LENGTHS = ["num_seqs", "seqlen_q", "seqlen_k", "first_batch", "window_left", "window_right"]
"""Numbers that change from call to call: one compilation serves them all."""


@triton.jit(do_not_specialize=LENGTHS)
def _flash_backward_keys(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    lse_log2,
    delta,
    q_desc,
    dout_desc,
    lse_desc,
    delta_desc,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    seqlen_q,
    seqlen_k,
    first_batch,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    stats_strides,
    scale,
    scale_log2,
    softcap,
    window_left,
    window_right,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys, queries in the runs above. Strides: batch, token, head."""
    # Longest first: under a causal mask the first key blocks are seen by the most queries.
    place, places = tl.program_id(0), tl.num_programs(0)
    sequence, batch_index, block, _ = find_block(cu_seqlens_k, num_seqs, first_batch, place, places, BLOCK_N, VARLEN)
    q_start, num_queries = find_tokens(cu_seqlens_q, seqlen_q, sequence, VARLEN)
    k_start, num_keys = find_tokens(cu_seqlens_k, seqlen_k, sequence, VARLEN)
    first_key = block * BLOCK_N
    if first_key >= num_keys:
        return

    # int32 for descriptors, int64 for pointers.
    kv_head_index = tl.program_id(1)
    kv_head, batch = tl.cast(kv_head_index, tl.int64), tl.cast(batch_index, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    row_offsets = tl.cast(offs_m, tl.int64)[:, None]
    offs_n = first_key + tl.arange(0, BLOCK_N)
    held_keys = offs_n < num_keys
    tokens = (k_start + offs_n).to(tl.int64)[:, None]
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k_tile = k + batch * k_strides[0] + kv_head * k_strides[2] + tokens * k_strides[1]
    v_tile = v + batch * v_strides[0] + kv_head * v_strides[2] + tokens * v_strides[1]
    key = load_tile(k_tile, offs_n, num_keys, HEAD_DIM, BLOCK_D, True)
    value = load_tile(v_tile, offs_n, num_keys, V_DIM, BLOCK_DV, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # The query row that a key is aligned with: the last query sits on the last key.
    offset = num_keys - num_queries
    first_row = first_key - offset
    last_row = tl.minimum(first_key + BLOCK_N, num_keys) - 1 - offset
    key_rows = offs_n - offset
    start, stop = key_bounds(first_row, last_row, num_queries, window_right, window_left, HAS_RIGHT, HAS_LEFT)
    start = start // 4 * 4  # Whole 16 bytes of lse and delta.
    full_start, full_stop = unmasked_bounds(
        first_row, last_row, start, stop, window_right, window_left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    if first_key + BLOCK_N > num_keys:
        full_stop = full_start

    first_slot = find_stats(q_start, sequence, VARLEN)
    first_token = tl.cast(q_start, tl.int64)
    for member in range(GROUP):
        head_index = kv_head_index * GROUP + member
        head = tl.cast(head_index, tl.int64)
        q_head = q + batch * q_strides[0] + head * q_strides[2] + first_token * q_strides[1]
        dout_head = dout + batch * dout_strides[0] + head * dout_strides[2] + first_token * dout_strides[1]
        stats_row = batch * stats_strides[0] + head * stats_strides[1] + first_slot
        desc_row = batch_index * (tl.num_programs(1) * GROUP) + head_index
        for run in tl.static_range(0 if HAS_RIGHT else 1, 3):
            run_start, run_stop = run_bounds(start, full_start, full_stop, stop, run)
            for row in range(run_start, run_stop, BLOCK_M):
                rows = row + offs_m
                row_offset = tl.cast(row, tl.int64)
                # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
                if DESCRIPTORS and (run == 1 or not VARLEN):
                    query = q_desc.load([batch_index, q_start + row, head_index, 0]).reshape(BLOCK_M, BLOCK_D)
                    grad = dout_desc.load([batch_index, q_start + row, head_index, 0]).reshape(BLOCK_M, BLOCK_DV)
                    row_lse = lse_desc.load([desc_row, first_slot + row]).reshape(BLOCK_M)
                    row_delta = delta_desc.load([desc_row, first_slot + row]).reshape(BLOCK_M)
                else:
                    q_tile = q_head + row_offset * q_strides[1] + row_offsets * q_strides[1]
                    dout_tile = dout_head + row_offset * dout_strides[1] + row_offsets * dout_strides[1]
                    query = load_tile(q_tile, rows, num_queries, HEAD_DIM, BLOCK_D, run != 1)
                    grad = load_tile(dout_tile, rows, num_queries, V_DIM, BLOCK_DV, run != 1)
                    held = rows < num_queries
                    row_lse = tl.load(lse_log2 + stats_row + rows, mask=held, other=float("inf"))
                    row_delta = tl.load(delta + stats_row + rows, mask=held, other=0.0)
                # [BLOCK_N, BLOCK_M]
                scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                scores = scale_scores(scores, scale_log2, softcap, HAS_SOFTCAP)
                weights = tl.exp2(scores - row_lse[None, :])
                if run != 1:
                    mask = visible_mask(key_rows, rows, num_queries, window_right, window_left, HAS_RIGHT, HAS_LEFT)
                    weights = tl.where(mask & held_keys[:, None], weights, 0.0)
                dv_acc = tl.dot(weights.to(grad.dtype), grad, dv_acc, input_precision=PRECISION)
                grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - row_delta[None, :]
                grad_scores = score_gradient(weights, grad_weights, scores, softcap, HAS_SOFTCAP).to(query.dtype)
                dk_acc = tl.dot(grad_scores, query, dk_acc, input_precision=PRECISION)

    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    dk_tile = dk + batch * dk_strides[0] + kv_head * dk_strides[2] + tokens * dk_strides[1] + offs_d
    dv_tile = dv + batch * dv_strides[0] + kv_head * dv_strides[2] + tokens * dv_strides[1] + offs_dv
    tl.store(dk_tile, (dk_acc * scale).to(dk.dtype.element_ty), mask=held_keys[:, None] & (offs_d < HEAD_DIM))
    tl.store(dv_tile, dv_acc.to(dv.dtype.element_ty), mask=held_keys[:, None] & (offs_dv < V_DIM))


@triton.jit(do_not_specialize=LENGTHS)
def _flash_backward_queries(
    q,
    k,
    v,
    dout,
    dq,
    lse_log2,
    delta,
    sums,
    k_desc,
    v_desc,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    seqlen_q,
    seqlen_k,
    first_batch,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    stats_strides,
    scale,
    scale_log2,
    softcap,
    window_left,
    window_right,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BLOCK_M queries of one head, keys in the forward's runs. Strides: batch, token, head.

    ``sums``, with sinks, get delta once more, as ``rowsum(P * dP)``: the forward pass has rounded ``out``, and a sink's
    gradient is a sum over all rows of nothing but deltas.
    """
    # Longest first: under a causal mask the last queries have the most keys.
    place, places = tl.program_id(0), tl.num_programs(0)
    sequence, batch_index, block, blocks = find_block(
        cu_seqlens_q, num_seqs, first_batch, place, places, BLOCK_M, VARLEN
    )
    q_start, num_queries = find_tokens(cu_seqlens_q, seqlen_q, sequence, VARLEN)
    k_start, num_keys = find_tokens(cu_seqlens_k, seqlen_k, sequence, VARLEN)
    first_row = (blocks - 1 - block) * BLOCK_M
    if first_row >= num_queries:
        return

    # int32 for descriptors, int64 for pointers.
    kv_head_index = tl.program_id(1) // GROUP
    head, kv_head = tl.cast(tl.program_id(1), tl.int64), tl.cast(kv_head_index, tl.int64)
    batch = tl.cast(batch_index, tl.int64)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    column_offsets = tl.cast(offs_n, tl.int64)[:, None]
    held = offs_m < num_queries
    tokens = (q_start + offs_m).to(tl.int64)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q_tile = q + batch * q_strides[0] + head * q_strides[2] + tokens[:, None] * q_strides[1]
    dout_tile = dout + batch * dout_strides[0] + head * dout_strides[2] + tokens[:, None] * dout_strides[1]
    query = load_tile(q_tile, offs_m, num_queries, HEAD_DIM, BLOCK_D, True)
    grad = load_tile(dout_tile, offs_m, num_queries, V_DIM, BLOCK_DV, True)
    slots = batch * stats_strides[0] + head * stats_strides[1] + offs_m
    slots += find_stats(q_start, sequence, VARLEN)
    row_lse = tl.load(lse_log2 + slots, mask=held, other=float("inf"))
    row_delta = tl.load(delta + slots, mask=held, other=0.0)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if sums is not None:
        exact_delta = tl.load(sums + slots, mask=held, other=0.0)

    offset = num_keys - num_queries
    first_position = first_row + offset
    last_position = tl.minimum(first_row + BLOCK_M, num_queries) - 1 + offset
    start, stop = key_bounds(first_position, last_position, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    full_start, full_stop = unmasked_bounds(
        first_position, last_position, start, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    k_head = k + batch * k_strides[0] + kv_head * k_strides[2] + tl.cast(k_start, tl.int64) * k_strides[1]
    v_head = v + batch * v_strides[0] + kv_head * v_strides[2] + tl.cast(k_start, tl.int64) * v_strides[1]
    for run in tl.static_range(0 if HAS_LEFT else 1, 3):
        run_start, run_stop = run_bounds(start, full_start, full_stop, stop, run)
        for column in range(run_start, run_stop, BLOCK_N):
            keys = column + offs_n
            column_offset = tl.cast(column, tl.int64)
            # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
            if DESCRIPTORS and (run == 1 or not VARLEN):
                key = k_desc.load([batch_index, k_start + column, kv_head_index, 0]).reshape(BLOCK_N, BLOCK_D)
                value = v_desc.load([batch_index, k_start + column, kv_head_index, 0]).reshape(BLOCK_N, BLOCK_DV)
            else:
                k_tile = k_head + column_offset * k_strides[1] + column_offsets * k_strides[1]
                v_tile = v_head + column_offset * v_strides[1] + column_offsets * v_strides[1]
                key = load_tile(k_tile, keys, stop, HEAD_DIM, BLOCK_D, run != 1)
                value = load_tile(v_tile, keys, stop, V_DIM, BLOCK_DV, run != 1)
            # [BLOCK_M, BLOCK_N]
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores = scale_scores(scores, scale_log2, softcap, HAS_SOFTCAP)
            weights = tl.exp2(scores - row_lse[:, None])
            if run != 1:
                mask = visible_mask(offs_m + offset, keys, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT)
                weights = tl.where(mask, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            if sums is not None:
                exact_delta += tl.sum(weights * grad_weights, 1)
            grad_weights = grad_weights - row_delta[:, None]
            grad_scores = score_gradient(weights, grad_weights, scores, softcap, HAS_SOFTCAP).to(key.dtype)
            dq_acc = tl.dot(grad_scores, key, dq_acc, input_precision=PRECISION)

    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dq_tile = dq + batch * dq_strides[0] + head * dq_strides[2] + tokens[:, None] * dq_strides[1] + offs_d
    tl.store(dq_tile, (dq_acc * scale).to(dq.dtype.element_ty), mask=held[:, None] & (offs_d < HEAD_DIM))
    if sums is not None:
        tl.store(sums + slots, exact_delta, mask=held)


def flash_attention_backward_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    settings: BackwardSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernels on checked arguments; shapes as in :func:`hf_paged_kernels.flash_attention`.

    Args:
        out: the forward result.
        lse: its log-sum-exp, float32 ``[B, Hq, Lq]`` or packed ``[Hq, T]``.
        dout: gradient of ``out``.
        dlse: gradient of ``lse``, or None where nothing used it.
        window_left: as in ``flash_attention_launch``.
        window_right: as in ``flash_attention_launch``.
        settings: tile sizes; the default comes from :func:`hf_paged_kernels.settings.flash_backward_settings`.

    Returns:
        ``(dq, dk, dv, dsinks)`` contiguous; dsinks float32 ``[Hq]``, None without sinks.
    """
    dq, dk, dv = new_like(q), new_like(k), new_like(v)
    tensors = (q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k)
    is_aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr() | dout.data_ptr()) % 16 == 0
    key = (
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors], is_aligned, sinks is None,
        window_left, window_right, softcap, scale, settings,
    )  # fmt: skip
    prepared = _backward.get(key)
    if prepared is None:
        if q.numel() == 0 or k.numel() == 0:
            # Without keys a sink's weight is 1 and meets no value: only dlse is left, and it does not depend on q.
            dsinks = None
            if sinks is not None:
                dsinks = torch.zeros_like(sinks, dtype=torch.float32) if dlse is None else _sum_of_tokens(dlse)
            return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
        read = (
            contiguous_rows(out), lse.contiguous(), contiguous_rows(dout), contiguous(dlse), contiguous(cu_seqlens_q),
            contiguous(cu_seqlens_k),
        )  # fmt: skip
        if any(a is not b for a, b in zip(read, tensors[3:])):
            return flash_attention_backward_launch(
                q, k, v, *read, window_left, window_right, softcap, sinks, scale, settings
            )
        prepared = _backward.keep(key, _prepare(
            *tensors, is_aligned, sinks is not None, window_left, window_right, softcap, scale,
            settings or flash_backward_settings(q.device, q.shape[-1], v.shape[-1], q.element_size()),
        ))  # fmt: skip
    # lse in base 2, delta, and with sinks their sums, one after the other.
    memory = (q.new_zeros if prepared.has_gaps else q.new_empty)(prepared.size, dtype=torch.float32)
    at, stats = memory.data_ptr(), prepared.stats
    given = [x for x in (*tensors, dq, dk, dv) if x is not None]
    pointers = [*[x.data_ptr() for x in given], at, at + 4 * stats, at + 8 * stats]
    with device_guard(q):
        for series in prepared.series:
            if not series.start(pointers):
                series.start_on([*given, *memory.split(stats)])
    if sinks is None:
        return dq, dk, dv, None
    lse_log2, _, sums = memory.view(3, *prepared.shape)
    return dq, dk, dv, -_sum_of_tokens(torch.exp2(sinks.float()[:, None] * LOG2_E - lse_log2) * sums)


_backward = Launches()


class _Prepared(NamedTuple):
    """Of a backward pass.

    Attributes:
        series: the launches of each part of the batch.
        shape: of lse in base 2, of delta, and with sinks of their sums: batch, heads, slots.
        stats: numbers in that shape.
        size: numbers in all of these.
        has_gaps: slots are left that no program writes and a kernel may read. They must be zeros.
    """

    series: list[Series]
    shape: tuple[int, int, int]
    stats: int
    size: int
    has_gaps: bool


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    is_aligned: bool,
    has_sinks: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    scale: float,
    settings: BackwardSettings,
) -> _Prepared:
    """Row sums, the kernel of keys, the kernel of queries. ``is_aligned``: the addresses suit descriptors."""
    s, varlen = settings, cu_seqlens_q is not None
    tensors = dict(
        q=q, k=k, v=v, out=out, lse=lse, dout=dout, dlse=dlse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    places = Places([name for name, x in tensors.items() if x is not None], "dq dk dv lse_log2 delta sums")
    dq, dk, dv = (x.new_empty(x.shape, device="meta") for x in (q, k, v))
    if varlen:
        # One batch whose tokens cu_seqlens divides: [1, T, H, D] and [1, H, T].
        q, k, v, out, dout, dq, dk, dv, lse = (x.unsqueeze(0) for x in (q, k, v, out, dout, dq, dk, dv, lse))
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    seqlen_k, num_kv_heads, v_dim = v.shape[1:]
    num_seqs = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else batch
    block_d, block_dv = (max(16, next_power_of_2(dim)) for dim in (head_dim, v_dim))
    num_fours = count_blocks(4, seqlen_q, num_seqs, varlen)
    slots = 16 * cdiv(num_fours, 4)
    stats = torch.empty(batch, num_q_heads, slots, dtype=torch.float32, device="meta")
    sums = stats if has_sinks else None
    query_tiles = key_tiles = None
    if s.descriptors and is_aligned:
        rows, columns = s.keys.block_m, s.queries.block_n
        lines = stats.flatten(0, 1), (1, rows)
        query_tiles = _describe((q, (1, rows, 1, block_d)), (dout, (1, rows, 1, block_dv)), lines, lines)
        key_tiles = _describe((k, (1, columns, 1, block_d)), (v, (1, columns, 1, block_dv)))

    lengths = (cu_seqlens_q, cu_seqlens_k, num_seqs, seqlen_q, seqlen_k)
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    scores = (scale, scale_log2, softcap or 0.0, window_left or 0, window_right or 0)
    common = dict(
        GROUP=num_q_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        V_DIM=v_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        VARLEN=varlen,
        HAS_LEFT=window_left is not None,
        HAS_RIGHT=window_right is not None,
        HAS_SOFTCAP=softcap is not None,
        PRECISION=dot_precision(q),
    )
    with_sums = " sums" if has_sinks else ""
    query_names = " q dout lse_log2 delta" if query_tiles else ""
    key_names = " k v" if key_tiles else ""
    series = []
    for first_batch in range(0, batch, MAX_GRID):
        batches = min(MAX_GRID, batch - first_batch)
        sum_rows = Launch(
            row_sums, (count_blocks(64, seqlen_q, num_seqs, varlen) * num_q_heads, 1, batches),
            out, dout, lse, dlse, stats, stats, sums, cu_seqlens_q, num_seqs, num_q_heads, seqlen_q, first_batch,
            out.stride()[:3], dout.stride()[:3], *lse.stride()[:2], stats.stride()[:2],
            V_DIM=v_dim, BLOCK_M=64, BLOCK_DV=block_dv, VARLEN=varlen, HAS_DLSE=dlse is not None, ALIGN=4,
        )  # fmt: skip
        keys = Launch(
            _flash_backward_keys, _grid(s.keys.block_n, seqlen_k, num_kv_heads, batches, num_seqs, varlen),
            q, k, v, dout, dk, dv, stats, stats, *(query_tiles or (None,) * 4), *lengths, first_batch,
            *(x.stride()[:3] for x in (q, k, v, dout, dk, dv)), stats.stride()[:2], *scores,
            DESCRIPTORS=query_tiles is not None, **common, **_tiles(s.keys),
        )  # fmt: skip
        queries = Launch(
            _flash_backward_queries, _grid(s.queries.block_m, seqlen_q, num_q_heads, batches, num_seqs, varlen),
            q, k, v, dout, dq, stats, stats, sums, *(key_tiles or (None,) * 2), *lengths, first_batch,
            *(x.stride()[:3] for x in (q, k, v, dout, dq)), stats.stride()[:2], *scores,
            DESCRIPTORS=key_tiles is not None, **common, **_tiles(s.queries),
        )  # fmt: skip
        series.append(Series(
            (sum_rows, places("out dout lse dlse lse_log2 delta" + with_sums + " cu_seqlens_q")),
            (keys, places("q k v dout dk dv lse_log2 delta" + query_names + " cu_seqlens_q cu_seqlens_k")),
            (queries, places("q k v dout dq lse_log2 delta" + with_sums + key_names + " cu_seqlens_q cu_seqlens_k")),
        ))  # fmt: skip
    size = (2 + has_sinks) * stats.numel()
    return _Prepared(series, (batch, num_q_heads, slots), stats.numel(), size, varlen or 4 * num_fours != slots)


def _grid(block: int, seqlen: int, num_heads: int, batch: int, num_seqs: int, varlen: bool) -> tuple[int, int, int]:
    return count_blocks(block, seqlen, num_seqs, varlen), num_heads, batch


def _tiles(settings: AttentionSettings) -> dict[str, int]:
    tiles = dict(
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return tiles if settings.max_registers is None else tiles | dict(maxnreg=settings.max_registers)


def _describe(*tensors: tuple[torch.Tensor, tuple[int, ...]]) -> list[Tile] | None:
    """A descriptor for each (tensor, block), or None if the strides of one are not multiples of 16 bytes."""
    for x, _ in tensors:
        steps = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.stride(-1) != 1 or any(step <= 0 or step % 16 for step in steps):
            return None
    return [Tile(x, x.shape, x.stride(), block) for x, block in tensors]


def _sum_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, L]`` or ``[H, T]`` to ``[H]``."""
    return x.sum(-1) if x.ndim == 2 else x.sum((0, 2))
