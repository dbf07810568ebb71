"""Attention of float16 and bfloat16 queries over FP8 (e4m3) and INT8 pages, in portable Triton.

It computes what ``paged_triton`` computes, with the same rows of a program. Both page formats are exact in
float16, one instruction away from it on NVIDIA GPUs; bfloat16 takes three. So both matrix products are of float16
numbers, summed in float32, and what would not fit into float16 is taken out first:

    scores[m, n]  = (up[m] * q[m]) @ k[n]  *  scale / up[m]  *  k_scale[n]     up[m]: a power of two, so this is exact
    weights[m, n] = exp(scores[m, n] - max[m]) * v_scale[n]                    float32
    out[m]        = unit[m] * (weights[m] / unit[m]) @ v  /  sum[m]

``unit[m]``, the row's largest weight so far, is carried along like its maximum: a weight keeps all bits of float16 down
to 2^-29 of the largest one, whatever the scales are.

The tensor cores want pairs of numbers of neighbouring keys in a register, but a page holds one key's numbers side by
side. Values are therefore read as 16-bit pairs of columns, which the hardware transposes on the way to the registers,
and the two columns are taken apart there:

    memory     key n: | a b |  key n + 1: | c d |       registers     | a b | c d |  ->  | a c |  and  | b d |

Queries of INT8 pages are rotated as their keys are (see ``pages_triton``).

Decode and short queries walk through the splits of a plan (``split_plan_triton``), longer queries through blocks.
"""

import torch
import triton
import triton.language as tl

from ..backend import contiguous, contiguous_rows, device_guard, on_nvidia, scale_strides
from ..launch_triton import launch
from ..settings import (
    LOG2_E,
    QuantizedSettings,
    hadamard_bits,
    is_short_query,
    multiprocessors,
    next_power_of_2,
    quantized_settings,
)
from .paged_triton import attend_by_heads
from .pages_triton import hadamard
from .primitives_triton import (
    add_sink,
    find_sequence,
    finish_softmax,
    key_bounds,
    scale_scores,
    unmasked_bounds,
    visible_mask,
)
from .split_plan_triton import (
    SplitPlan,
    empty_partials,
    load_item,
    make_split_plan_launch,
    merge_partials_launch,
    split_lengths,
)

HIGHEST = tl.constexpr(32768.0)
"""Size that queries and weights are brought to: half of float16's largest number."""


@triton.jit
def to_float16(x, NATIVE: tl.constexpr):
    """FP8 or INT8 numbers in float16, exactly."""
    if NATIVE and x.dtype == tl.int8:
        # With its sign bit flipped a byte counts from 0; as the low byte of 1024.0 it counts in ones from there.
        result = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, low, high, offset;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 low, bytes, 0x64646464, 0x4140;
            prmt.b32 high, bytes, 0x64646464, 0x4342;
            mov.b32 offset, 0x64806480;
            sub.rn.f16x2 $0, low, offset;
            sub.rn.f16x2 $1, high, offset;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        result = x.to(tl.float16)
    return result


@triton.jit
def split_pairs(pairs, IS_INT8: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs of 8-bit numbers, held in int16, as two float16 tensors: low bytes and high bytes."""
    if NATIVE and IS_INT8:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, low, high, offset;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 low, bytes, 0x64646464, 0x4240;
            prmt.b32 high, bytes, 0x64646464, 0x4341;
            mov.b32 offset, 0x64806480;
            sub.rn.f16x2 $0, low, offset;
            sub.rn.f16x2 $1, high, offset;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif NATIVE:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif IS_INT8:
        low = pairs.to(tl.int8).to(tl.float16)
        high = (pairs >> 8).to(tl.float16)
    else:
        low = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return low, high


@triton.jit
def normalize_rows(query):
    """``(float16 query, factor)`` with ``query = float16 query * factor``, exact but for numbers 2^-29 of their row's
    largest."""
    query = query.to(tl.float32)
    exponent = (tl.max(tl.abs(query), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
    # The largest number of a row is below 2^(exponent - 126); it is brought below 2^15.
    exponent = tl.maximum(exponent, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (query * up[:, None]).to(tl.float16), down


@triton.jit
def _load_scales(pointers, mask, IS_SPLIT: tl.constexpr):
    """One float32 per key; 0 where ``mask`` is False.

    A block of queries has more threads than keys. Triton takes such a load for cheap and lets every thread load what
    it needs, 16 or 32 numbers; two columns of the same numbers are as many as threads, and are loaded once.
    """
    if IS_SPLIT:
        scales = tl.load(pointers, mask=mask, other=0.0)
    else:
        columns = tl.zeros([1, 2], tl.int32)
        scales, _ = tl.split(tl.load(pointers[:, None] + columns, mask=mask[:, None] & (columns == 0), other=0.0))
    return scales


@triton.jit
def _attend_tiles(
    state,
    query,
    factor,
    pages,
    positions,
    first_run,
    second_run,
    low,
    stop,
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
    MASKED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Fold two runs of tiles of keys, ``(start, number of tiles)`` each, into the running softmax.

    ``state``: accumulators (of even and odd columns with PAIRS, else one twice), running maximum, sum and unit.
    ``pages``: pointers to a head's keys, values and scales, to the sequence's row of the page table, and strides.
    Masked tiles read the keys low..stop only.
    """
    even, odd, running_max, running_sum, unit = state
    k_head, v_head, k_scale_head, v_scale_head, table_row, strides = pages
    stride_kp, stride_ks, stride_vp, stride_vs, stride_sp, stride_ss = strides
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    first_start, first_count = first_run
    second_start, second_count = second_run
    # Few tiles are masked in a split: a pipeline would take longer to start than it saves.
    for index in tl.range(0, first_count + second_count, num_stages=1 if MASKED and IS_SPLIT else None):
        start = first_start + index * BLOCK_N
        if MASKED:
            start = tl.where(index < first_count, start, second_start + (index - first_count) * BLOCK_N)
        # A tile holds whole pages or lies in one.
        entry = table_row + start // PAGE_SIZE + offs_n // PAGE_SIZE
        slot = tl.cast(start % PAGE_SIZE + offs_n % PAGE_SIZE, tl.int64)
        keys = start + offs_n
        if MASKED:
            # Below `low` the page may have been given back: its table entry is not read.
            in_range = (keys >= low) & (keys < stop)
            page = tl.load(entry, mask=in_range, other=0).to(tl.int64)
        else:
            in_range = keys >= 0
            page = tl.load(entry).to(tl.int64)
        k_tile = k_head + (page * stride_kp + slot * stride_ks)[:, None] + offs_d[None, :]
        v_tile = v_head + (page * stride_vp + slot * stride_vs)[:, None] + offs_dv[None, :]
        scales = page * stride_sp + slot * stride_ss
        # [BLOCK_N, BLOCK_D]
        if MASKED:
            key = tl.load(k_tile, mask=in_range[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            if HEAD_DIM == BLOCK_D:
                key = tl.load(k_tile)
            else:
                key = tl.load(k_tile, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        k_scales = _load_scales(k_scale_head + scales, in_range, IS_SPLIT)
        v_scales = _load_scales(v_scale_head + scales, in_range, IS_SPLIT)
        scores = tl.dot(query, tl.trans(to_float16(key, NATIVE)))
        scores = scale_scores(scores * factor[:, None] * k_scales[None, :], 1.0, softcap, HAS_SOFTCAP)
        if MASKED:
            mask = visible_mask(positions, keys, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(mask, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # A row that has seen no key yet keeps -inf; a finite pivot keeps NaN out of the tile.
        pivot = new_max
        if MASKED:
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        correction = tl.exp2(running_max - pivot)
        running_sum = running_sum * correction + tl.sum(weights, 1)
        running_max = new_max
        weights = weights * v_scales[None, :]
        # Not below 2^-100, so that its inverse is finite.
        new_unit = tl.maximum(tl.maximum(unit * correction, tl.max(tl.abs(weights), 1)), 7.888609052210118e-31)
        inverse = 1.0 / new_unit
        correction = unit * correction * inverse
        unit = new_unit
        weights = (weights * (inverse * HIGHEST)[:, None]).to(tl.float16)
        # [BLOCK_N, BLOCK_DV]
        if MASKED:
            value = tl.load(v_tile, mask=in_range[:, None] & (offs_dv < V_DIM)[None, :], other=0.0)
        elif V_DIM == BLOCK_DV:
            value = tl.load(v_tile)
        else:
            value = tl.load(v_tile, mask=(offs_dv < V_DIM)[None, :], other=0.0)
        if PAIRS:
            even_value, odd_value = split_pairs(value, key.dtype == tl.int8, NATIVE)
            even = tl.dot(weights, even_value, even * correction[:, None])
            odd = tl.dot(weights, odd_value, odd * correction[:, None])
        else:
            even = tl.dot(weights, to_float16(value, NATIVE), even * correction[:, None])
            odd = even
    return even, odd, running_max, running_sum, unit


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_seqs", "num_blocks", "num_heads", "stride_table", "stride_lt", "stride_lh",
        "window_left", "window_right",
    ]
)  # fmt: skip
def _quantized_forward(
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
    partials,
    partial_lse,
    num_items,
    items,
    num_tiles,
    num_seqs,
    num_blocks,
    num_heads,
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
    stride_lt,
    stride_lh,
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
    IS_SPLIT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    """One program: every num_programs-th tile of work, a split of a sequence or a block of queries, for one head."""
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # With PAIRS, BLOCK_DV columns of pairs.
    NUM_COLUMNS: tl.constexpr = V_DIM // 2 if PAIRS else V_DIM
    if IS_SPLIT:
        num_tiles = tl.maximum(tl.load(num_items), 1) * num_heads
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        if IS_SPLIT:
            kv_head = tile % num_heads
            seq, split, place, num_partials, q_start, query_len, seq_len = load_item(items, tile // num_heads)
            first_token = tile * 0
        else:
            kv_head = tile // num_blocks
            # Later blocks of a sequence see more keys: start them first.
            block = num_blocks - 1 - tile % num_blocks
            seq = find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q)
            q_start = tl.load(cu_seqlens_q + seq)
            first_token = (block - q_start // BLOCK_Q - seq) * BLOCK_Q
            query_len = tl.load(cu_seqlens_q + seq + 1) - q_start
            seq_len = tl.load(seq_lens + seq)
            num_partials = tile * 0
        context_len = seq_len - query_len
        last_token = tl.minimum(first_token + BLOCK_Q, query_len) - 1
        tokens = first_token + rows // GROUP
        heads = tl.cast(kv_head, tl.int64) * GROUP + rows % GROUP
        row_valid = (rows < BLOCK_Q * GROUP) & (tokens < query_len)
        # Rows past the end repeat the last token's position, so that they never widen the mask.
        positions = context_len + tl.minimum(tokens, last_token)
        packed = tl.cast(q_start + tokens, tl.int64)
        first_position = context_len + first_token
        last_position = context_len + last_token
        start, stop = key_bounds(
            first_position, last_position, seq_len, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )  # fmt: skip
        if IS_SPLIT:
            length = split_lengths(seq_len, query_len)
            start = tl.maximum(start, split * length)
            stop = tl.minimum(stop, (split + 1) * length)
        if first_token >= query_len:
            stop = start
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
            query, factor = normalize_rows(hadamard(query, HADAMARD))
        else:
            query, factor = normalize_rows(query)
        factor = factor * scale_log2
        head = tl.cast(kv_head, tl.int64)
        pages = (
            k_pages + head * stride_kh, v_pages + head * stride_vh, k_scale + head * stride_sh,
            v_scale + head * stride_sh, page_table + tl.cast(seq, tl.int64) * stride_table,
            (stride_kp, stride_ks, stride_vp, stride_vs, stride_sp, stride_ss),
        )  # fmt: skip
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        no_sum = tl.zeros([BLOCK_M], tl.float32)
        state = (zeros, zeros, tl.full([BLOCK_M], float("-inf"), tl.float32), no_sum, no_sum)
        full_start, full_stop = unmasked_bounds(
            first_position, last_position, start, stop, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
        )
        full_start = tl.minimum(full_start, tl.maximum(stop, start))
        full_stop = tl.maximum(full_stop, full_start)
        none = start * 0
        state = _attend_tiles(
            state, query, factor, pages, positions, (full_start, (full_stop - full_start) // BLOCK_N), (none, none),
            low, stop, softcap, window_left, window_right, PAGE_SIZE, HEAD_DIM, NUM_COLUMNS, BLOCK_N, BLOCK_D,
            BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, False, IS_SPLIT, PAIRS, NATIVE,
        )  # fmt: skip
        even, odd, running_max, running_sum, unit = state
        left_count = tl.cdiv(full_start - start, BLOCK_N)
        right_count = tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK_N)
        if left_count + right_count > 0:
            # Tiles that a window cuts, and tiles at the end.
            even, odd, running_max, running_sum, unit = _attend_tiles(
                (even, odd, running_max, running_sum, unit), query, factor, pages, positions, (start, left_count),
                (full_stop, right_count), low, stop, softcap, window_left, window_right, PAGE_SIZE, HEAD_DIM,
                NUM_COLUMNS, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
                IS_SPLIT, PAIRS, NATIVE,
            )  # fmt: skip

        unit = (unit / HIGHEST)[:, None]
        if PAIRS:
            # [BLOCK_M, 2 * BLOCK_DV]: columns back in their order.
            result = tl.interleave(even * unit, odd * unit)
            columns = tl.arange(0, 2 * BLOCK_DV)
        else:
            result = even * unit
            columns = offs_dv
        store_mask = row_valid[:, None] & (columns < V_DIM)[None, :]
        if IS_SPLIT and partials is not None:  # noqa: SIM102 - known when the kernel is compiled
            if num_partials > 1:
                # Unnormalised partials of the rows, for merge_partials_launch to add up.
                slot = (tl.cast(place, tl.int64) * num_heads + kv_head * query_len) * GROUP
                tl.store(partials + (slot + rows)[:, None] * V_DIM + columns[None, :], result, mask=store_mask)
                tl.store(partial_lse + 2 * (slot + rows), running_max, mask=row_valid)
                tl.store(partial_lse + 2 * (slot + rows) + 1, running_sum, mask=row_valid)
        if num_partials <= 1:
            if HAS_SINKS:
                sink = tl.load(sinks + heads, mask=row_valid, other=0.0).to(tl.float32) * 1.4426950408889634
                result, running_max, running_sum = add_sink(result, running_max, running_sum, sink)
            result, row_lse = finish_softmax(result, running_max, running_sum)
            out_rows = out + packed[:, None] * stride_ot + heads[:, None] * stride_oh
            tl.store(out_rows + columns[None, :], result.to(out.dtype.element_ty), mask=store_mask)
            tl.store(lse + packed * stride_lt + heads * stride_lh, row_lse, mask=row_valid)


def quantized_paged_attention_launch(
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
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    plan: torch.Tensor | None = None,
    settings: QuantizedSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch over FP8 or INT8 pages; arguments and result as of ``paged_attention_launch``, q float16 or bfloat16.

    Args:
        plan: from ``make_split_plan_launch`` for this step; None: made here where needed.
        settings: tile sizes by hand.
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

    is_split = is_short_query(group, max_query_len)
    chosen = settings or quantized_settings(q.device, max(head_dim, v_dim), group, max_query_len)
    rows = max_query_len * group if is_split else group
    if chosen.block_m < rows:
        return attend_by_heads(
            lambda q, sinks: quantized_paged_attention_launch(
                q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, max_query_len, window_left, window_right,
                softcap, sinks, scale, k_scale, v_scale, plan,
            ),
            q, sinks, num_kv_heads, chosen.block_m * group // rows,
        )  # fmt: skip
    block_q = max(1, chosen.block_m // group)
    pairs = chosen.pairs and v_dim % 2 == 0 and v_dim >= 32 and all(s % 2 == 0 for s in v_pages.stride()[:3])
    values = v_pages.view(torch.int16) if pairs else v_pages
    split_plan = partials = partial_lse = None
    if is_split:
        if plan is None:
            plan = make_split_plan_launch(seq_lens, cu_seqlens_q, max_pages * page_size, window_left)
        split_plan = SplitPlan.of(plan, num_seqs, max_pages * page_size)
        num_blocks = split_plan.max_items
        if split_plan.max_partials > 1:
            partials, partial_lse = empty_partials(out, split_plan.max_partials, num_kv_heads, group, v_dim)
    else:
        num_blocks = num_tokens // block_q + num_seqs
    num_programs = num_blocks * num_kv_heads
    if is_split and on_nvidia(q):
        num_programs = min(num_programs, multiprocessors(q.device) * chosen.programs_per_sm)
    block_dv = max(16, next_power_of_2(v_dim))
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    with device_guard(q):
        launch(
            _quantized_forward, (num_programs,),
            q, k_pages, values, k_scale, v_scale, page_table, seq_lens, cu_seqlens_q, sinks, out, lse, partials,
            partial_lse, None if split_plan is None else split_plan.num_items,
            None if split_plan is None else split_plan.items,
            num_blocks * num_kv_heads, num_seqs, num_blocks, num_kv_heads,
            *q.stride()[:2], *k_pages.stride()[:3], *values.stride()[:3],
            *scale_strides(k_scale, v_scale), page_table.stride(0),
            *out.stride()[:2], lse.stride(1), lse.stride(0),
            scale_log2, softcap or 0.0, window_left or 0, window_right or 0,
            PAGE_SIZE=page_size,
            GROUP=group,
            HEAD_DIM=head_dim,
            V_DIM=v_dim,
            BLOCK_Q=block_q,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_D=max(16, next_power_of_2(head_dim)),
            BLOCK_DV=block_dv // 2 if pairs else block_dv,
            IS_SPLIT=is_split,
            HAS_LEFT=window_left is not None,
            HAS_RIGHT=window_right is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            PAIRS=pairs,
            NATIVE=on_nvidia(q),
            HADAMARD=hadamard_bits(k_pages.dtype, head_dim),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )  # fmt: skip
    if split_plan is not None and partials is not None and partial_lse is not None:
        merge_partials_launch(partials, partial_lse, split_plan, cu_seqlens_q, sinks, out, lse, group, group)
    return out, lse
