"""Decode and short queries over FP8 and INT8 pages on Hopper GPUs, in Gluon.

It computes what ``paged_quantized_triton`` computes, with the same arithmetic in float16, and is chosen where
it is faster. What bounds such a step is instructions, not bytes, so it spends fewer of them:

- Pages are brought by TMA: one thread asks for a whole page, and no thread computes addresses.
- Scores are held transposed, ``[keys, rows]``: 8 rows are the least that the tensor cores take on that side, 16 on the
  other, and a step of decode has as many rows as query heads share a key/value head.

A program is one warp that walks through splits on its own, many of them on a multiprocessor::

    tile    | K | V |  of 32 or 64 keys      STAGES tiles in shared memory, all but one on their way
    S = K Q^T  [keys, rows]   ->   weights   ->   O^T += V^T weights  [head_dim, rows]
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..backend import QUANTIZED_ROWS, contiguous, contiguous_rows, device_guard, scale_strides
from ..compat_gluon import barrier, load_async, view
from ..launch_triton import Tile, launch
from ..settings import (
    LOG2_E,
    QuantizedHopperSettings,
    choose_quantized_hopper_settings,
    hadamard_bits,
    multiprocessors,
)
from . import paged_quantized_triton, pages_triton, split_plan_triton
from .hopper_gluon import ANY
from .hopper_scheduler_gluon import split_bounds
from .split_plan_triton import SplitPlan, empty_partials, make_split_plan_launch, merge_partials_launch

load_item = gluon.jit(split_plan_triton.load_item.fn)
to_float16 = gluon.jit(paged_quantized_triton.to_float16.fn)
split_pairs = gluon.jit(paged_quantized_triton.split_pairs.fn)
normalize_rows = gluon.jit(paged_quantized_triton.normalize_rows.fn)
butterflies = gluon.jit(pages_triton.butterflies.fn)
HIGHEST = gl.constexpr(paged_quantized_triton.HIGHEST.value)
ROWS = gl.constexpr(QUANTIZED_ROWS)


@gluon.jit
def _fetch(tensors, stage, key, start, stop, OPTIONS: gl.constexpr):
    """Ask for the tile of keys at ``key``: zeros where a chunk lies outside of start..stop."""
    k_desc, v_desc, k_pieces, v_pieces, full, table_row, head = tensors
    PAGE_SIZE: gl.constexpr = OPTIONS[0]
    HEAD_DIM: gl.constexpr = OPTIONS[1]
    BLOCK_N: gl.constexpr = OPTIONS[2]
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    CHUNKS: gl.constexpr = BLOCK_N // CHUNK
    HALVES: gl.constexpr = max(1, HEAD_DIM // 128)
    mbarrier.expect(full.index(stage), BLOCK_N * 2 * HEAD_DIM)
    for chunk in gl.static_range(CHUNKS):
        first = key + chunk * CHUNK
        # Outside of start..stop the table may hold anything; a slot past the page's end reads as zeros.
        inside = (first + CHUNK > start) & (first < stop)
        page = gl.load(table_row + first // PAGE_SIZE, mask=inside, other=0)
        slot = gl.where(inside, first % PAGE_SIZE, PAGE_SIZE)
        for half in gl.static_range(HALVES):
            piece = stage * (HALVES * CHUNKS) + half * CHUNKS + chunk
            load_async(k_desc, [page, head, slot, half * 64], full.index(stage), k_pieces.index(piece))
            load_async(v_desc, [page, head, slot, half * 64], full.index(stage), v_pieces.index(piece))


@gluon.jit
def _find_pages(table_row, keys, start, stop, PAGE_SIZE: gl.constexpr):
    """The page of each of ``keys``; 0 outside of start..stop, where the table may hold anything."""
    return gl.load(table_row + keys // PAGE_SIZE, mask=(keys >= start) & (keys < stop), other=0)


@gluon.jit
def _load_scales(scales, pages, keys, start, stop, PAGE_SIZE: gl.constexpr):
    """Scales of keys and of values, 0 outside of start..stop."""
    k_scale, v_scale, stride_sp, stride_ss = scales
    offsets = gl.cast(pages, gl.int64) * stride_sp + gl.cast(keys % PAGE_SIZE, gl.int64) * stride_ss
    inside = (keys >= start) & (keys < stop)
    return gl.load(k_scale + offsets, mask=inside, other=0.0), gl.load(v_scale + offsets, mask=inside, other=0.0)


@gluon.jit
def _attend_tile(
    state, query, factor, tiles, stage, k_scales, v_scales, key, positions, low, stop, softcap, window_left,
    window_right, MASKED: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into ``state``: sums of even and odd columns, running maximum, sum and unit."""
    even, odd, running_max, running_sum, unit = state
    k_tiles, v_tiles = tiles
    BLOCK_N: gl.constexpr = OPTIONS[2]
    HAS_LEFT: gl.constexpr = OPTIONS[3]
    HAS_RIGHT: gl.constexpr = OPTIONS[4]
    HAS_SOFTCAP: gl.constexpr = OPTIONS[5]
    LAYOUT: gl.constexpr = even.type.layout
    KEYS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    keys_numbers = to_float16(k_tiles.index(stage).load(gl.DotOperandLayout(0, LAYOUT, 4)), True)
    scores = mma_v2(keys_numbers, query, gl.zeros([BLOCK_N, ROWS], gl.float32, LAYOUT))
    scores = scores * k_scales[:, None] * factor[None, :]
    if HAS_SOFTCAP:
        # softcap * tanh(x): see tiles_triton.scale_scores.
        scores = softcap * (1.0 - 2.0 / (gl.exp2(scores) + 1.0)) * 1.4426950408889634
    if MASKED:
        keys = key + gl.arange(0, BLOCK_N, layout=KEYS)
        visible = (keys < stop)[:, None] & (keys >= low)[:, None]
        if HAS_LEFT:
            visible = visible & (keys[:, None] >= positions[None, :] - window_left)
        if HAS_RIGHT:
            visible = visible & (keys[:, None] <= positions[None, :] + window_right)
        scores = gl.where(visible, scores, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(scores, 0))
    # A row that has seen no key yet keeps -inf; a finite pivot keeps NaN out of the tile.
    pivot = new_max
    if MASKED:
        pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores - pivot[None, :])
    correction = gl.exp2(running_max - pivot)
    running_sum = running_sum * correction + gl.sum(weights, 0)
    running_max = new_max
    weights = weights * v_scales[:, None]
    # Not below 2^-100, so that its inverse is finite.
    new_unit = gl.maximum(gl.maximum(unit * correction, gl.max(gl.abs(weights), 0)), 7.888609052210118e-31)
    inverse = 1.0 / new_unit
    correction = unit * correction * inverse
    unit = new_unit
    weights = gl.convert_layout(
        (weights * (inverse * HIGHEST)[None, :]).to(gl.float16), gl.DotOperandLayout(1, LAYOUT, 2)
    )
    # [HEAD_DIM / 2, BLOCK_N]
    V_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    pairs = v_tiles.index(stage).permute((1, 0)).load(V_LAYOUT)
    if MASKED:
        columns = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, V_LAYOUT))
        held = (columns < stop) & (columns >= low)
        pairs = gl.where(held[None, :], pairs, gl.zeros_like(pairs))
    even_values, odd_values = split_pairs(pairs, k_tiles.dtype == gl.int8, True)
    even = mma_v2(even_values, weights, even * correction[None, :])
    odd = mma_v2(odd_values, weights, odd * correction[None, :])
    return even, odd, running_max, running_sum, unit


LENGTHS = ["num_heads", "stride_table", "stride_lt", "stride_lh", "window_left", "window_right"]
"""Arguments whose value must not cause another compilation."""


@gluon.jit(do_not_specialize=LENGTHS)
def _quantized_splits(
    q, k_desc, v_desc, k_scale, v_scale, page_table, sinks, out, lse, partials, partial_lse, num_items, items,
    num_heads,
    stride_qt, stride_qh, stride_sp, stride_sh, stride_ss, stride_table, stride_ot, stride_oh, stride_lt, stride_lh,
    scale_log2, softcap, window_left, window_right,
    DTYPE: gl.constexpr, PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    HADAMARD: gl.constexpr,
):  # fmt: skip
    """One program of one warp: every num_programs-th split of the plan, for one head each.

    ``DTYPE``: of the pages, which the descriptors see as int16.
    """
    SWIZZLE: gl.constexpr = min(128, HEAD_DIM)
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PIECES: gl.constexpr = STAGES * max(1, HEAD_DIM // 128) * BLOCK_N // CHUNK
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    R_LAYOUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    H_LAYOUT: gl.constexpr = gl.BlockedLayout([1, HEAD_DIM // 8], [4, 8], [1, 1], [1, 0])
    pair_layout: gl.constexpr = gl.NVMMASharedLayout(SWIZZLE, 16, 2)
    piece_layout: gl.constexpr = gl.NVMMASharedLayout(SWIZZLE, 16, 4)
    k_pairs = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, HEAD_DIM // 2], pair_layout)
    v_pairs = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, HEAD_DIM // 2], pair_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()

    columns: gl.constexpr = min(64, HEAD_DIM // 2)
    k_pieces = view(k_pairs, gl.int16, [PIECES, 1, 1, CHUNK, columns], piece_layout)
    v_pieces = view(v_pairs, gl.int16, [PIECES, 1, 1, CHUNK, columns], piece_layout)
    tiles = (
        view(k_pairs, DTYPE, [STAGES, BLOCK_N, HEAD_DIM], gl.NVMMASharedLayout(SWIZZLE, 8, 2)),
        v_pairs,
    )
    options: gl.constexpr = (PAGE_SIZE, HEAD_DIM, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP)
    rows = gl.arange(0, ROWS, layout=R_LAYOUT)
    tile_keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    query_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
    query_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, Q_LAYOUT))

    count = 0
    num_tiles = gl.maximum(gl.load(num_items), 1) * num_heads
    for work in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head = work % num_heads
        seq, split, place, num_partials, q_start, query_len, num_keys = load_item(items, work // num_heads)
        context_len = num_keys - query_len
        start, stop = split_bounds(split, num_keys, query_len, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        table_row = page_table + gl.cast(seq, gl.int64) * stride_table
        tensors = (k_desc, v_desc, k_pieces, v_pieces, full, table_row, head)
        scale_head = gl.cast(head, gl.int64) * stride_sh
        scales = (k_scale + scale_head, v_scale + scale_head, stride_sp, stride_ss)
        # Tiles start at multiples of BLOCK_N in the sequence: a row sums in the same order in every batch.
        low = start // BLOCK_N
        high = gl.where(stop > start, gl.cdiv(stop, BLOCK_N), low)
        for ahead in gl.static_range(STAGES - 1):
            if low + ahead < high:
                _fetch(tensors, (count + ahead) % STAGES, (low + ahead) * BLOCK_N, start, stop, options)

        keys = low * BLOCK_N + tile_keys
        pages = _find_pages(table_row, keys, start, stop, PAGE_SIZE)
        k_scales, v_scales = _load_scales(scales, pages, keys, start, stop, PAGE_SIZE)
        pages = _find_pages(table_row, keys + BLOCK_N, start, stop, PAGE_SIZE)

        query_tokens = query_rows // GROUP
        held = (query_tokens < query_len)[:, None]
        query_heads = gl.cast(head, gl.int64) * GROUP + query_rows % GROUP
        query_offsets = gl.cast(q_start + query_tokens, gl.int64) * stride_qt + query_heads * stride_qh
        query = gl.load(q + query_offsets[:, None] + query_columns[None, :], mask=held, other=0.0).to(gl.float32)
        if HADAMARD > 0:
            # The bits of a column are taken where a thread holds both numbers: the lowest three, then the others.
            query = gl.convert_layout(butterflies(query, 3), H_LAYOUT)
            query = butterflies(query, HADAMARD - 3) * (2.0 ** (-0.5 * HADAMARD))
        query, factor = normalize_rows(query)
        query = gl.convert_layout(query.permute((1, 0)), gl.DotOperandLayout(1, LAYOUT, 4))
        factor = gl.convert_layout(factor * scale_log2, R_LAYOUT)
        tokens = rows // GROUP
        # Rows past the end repeat the last token's position.
        positions = context_len + gl.minimum(tokens, query_len - 1)
        zeros = gl.zeros([HEAD_DIM // 2, ROWS], gl.float32, LAYOUT)
        nothing = gl.zeros([ROWS], gl.float32, R_LAYOUT)
        even = zeros
        odd = zeros
        running_max = gl.full([ROWS], float("-inf"), gl.float32, R_LAYOUT)
        running_sum = nothing
        unit = nothing
        # What every row sees.
        full_start = start
        if HAS_LEFT:
            full_start = gl.maximum(start, num_keys - 1 - window_left)
        full_stop = stop
        if HAS_RIGHT:
            full_stop = gl.minimum(stop, context_len + window_right + 1)
        for index in range(low, high):
            key = index * BLOCK_N
            # The tile before has been read: its place is free.
            barrier()
            if index + STAGES - 1 < high:
                _fetch(tensors, (count + STAGES - 1) % STAGES, key + (STAGES - 1) * BLOCK_N, start, stop, options)
            # Scales come through registers: their pages are looked up two tiles ahead, they are read one ahead.
            keys = key + BLOCK_N + tile_keys
            next_k_scales, next_v_scales = _load_scales(scales, pages, keys, start, stop, PAGE_SIZE)
            pages = _find_pages(table_row, keys + BLOCK_N, start, stop, PAGE_SIZE)
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            if (key >= full_start) & (key + BLOCK_N <= full_stop):
                even, odd, running_max, running_sum, unit = _attend_tile(
                    (even, odd, running_max, running_sum, unit), query, factor, tiles, stage, k_scales, v_scales,
                    key, positions, start, stop, softcap, window_left, window_right, False, options,
                )  # fmt: skip
            else:
                even, odd, running_max, running_sum, unit = _attend_tile(
                    (even, odd, running_max, running_sum, unit), query, factor, tiles, stage, k_scales, v_scales,
                    key, positions, start, stop, softcap, window_left, window_right, True, options,
                )  # fmt: skip
            k_scales = next_k_scales
            v_scales = next_v_scales
            count += 1
        barrier()

        unit = unit / HIGHEST
        valid = tokens < query_len
        dims = 2 * gl.arange(0, HEAD_DIM // 2, layout=gl.SliceLayout(1, LAYOUT))
        if num_partials > 1:
            # Unnormalised partials of the rows, for merge_partials_launch to add up.
            slot = (gl.cast(place, gl.int64) * num_heads + head * query_len) * GROUP
            partial = partials + (slot + rows)[None, :] * HEAD_DIM + dims[:, None]
            gl.store(partial, even * unit[None, :], mask=valid[None, :])
            gl.store(partial + 1, odd * unit[None, :], mask=valid[None, :])
            gl.store(partial_lse + 2 * (slot + rows), running_max, mask=valid)
            gl.store(partial_lse + 2 * (slot + rows) + 1, running_sum, mask=valid)
        else:
            heads = head * GROUP + rows % GROUP
            if HAS_SINKS:
                sink = gl.load(sinks + heads, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634
                new_max = gl.maximum(running_max, sink)
                pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
                correction = gl.exp2(running_max - pivot)
                running_sum = running_sum * correction + gl.exp2(sink - pivot)
                unit = unit * correction
                running_max = new_max
            empty = running_sum == 0.0
            unit = unit / gl.where(empty, 1.0, running_sum)
            row_lse = (running_max + gl.log2(gl.where(empty, 1.0, running_sum))) * 0.6931471805599453
            row_lse = gl.where(empty, float("-inf"), row_lse)
            packed = gl.cast(q_start + tokens, gl.int64)
            target = out + (packed * stride_ot + heads * stride_oh)[None, :] + dims[:, None]
            gl.store(target, (even * unit[None, :]).to(out.dtype.element_ty), mask=valid[None, :])
            gl.store(target + 1, (odd * unit[None, :]).to(out.dtype.element_ty), mask=valid[None, :])
            gl.store(lse + packed * stride_lt + heads * stride_lh, row_lse, mask=valid)


LAYOUTS = {width: gl.NVMMASharedLayout(width, 16, 4) for width in (64, 128)}
"""Of a tile that TMA copies, by the bytes of its rows."""


def quantized_splits_launch(
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
    settings: QuantizedHopperSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Short queries over FP8 or INT8 pages; arguments and result as of ``quantized_paged_attention_launch``."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_seqs, max_pages = page_table.shape
    group = num_q_heads // num_kv_heads
    out = q.new_empty(num_tokens, num_q_heads, head_dim)
    lse = q.new_empty(num_q_heads, num_tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    page_table, seq_lens, cu_seqlens_q = contiguous_rows(page_table), seq_lens.contiguous(), cu_seqlens_q.contiguous()
    sinks = contiguous(sinks)
    s = settings or choose_quantized_hopper_settings(head_dim)
    if plan is None:
        plan = make_split_plan_launch(seq_lens, cu_seqlens_q, max_pages * page_size, window_left)
    split_plan = SplitPlan.of(plan, num_seqs, max_pages * page_size)
    num_tiles = split_plan.max_items * num_kv_heads
    partials, partial_lse = empty_partials(out, split_plan.max_partials, num_kv_heads, group, head_dim)
    chunk = min(page_size, s.block_n)
    layout = LAYOUTS[min(128, head_dim)]
    k_desc, v_desc = (
        Tile(x, (ANY, *x.shape[1:]), x.stride(), (1, 1, chunk, min(64, head_dim // 2)), layout)
        for x in (k_pages.view(torch.int16), v_pages.view(torch.int16))
    )
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    with device_guard(q):
        launch(
            _quantized_splits, (min(num_tiles, multiprocessors(q.device) * s.programs_per_sm),),
            q, k_desc, v_desc, k_scale, v_scale, page_table, sinks, out, lse, partials, partial_lse,
            split_plan.num_items, split_plan.items, num_kv_heads,
            *q.stride()[:2], *scale_strides(k_scale, v_scale), page_table.stride(0), *out.stride()[:2],
            lse.stride(1), lse.stride(0),
            scale_log2, softcap or 0.0, window_left or 0, window_right or 0,
            DTYPE=gl.int8 if k_pages.dtype == torch.int8 else gl.float8e4nv, PAGE_SIZE=page_size, GROUP=group,
            HEAD_DIM=head_dim, BLOCK_N=s.block_n, STAGES=s.stages,
            HAS_LEFT=window_left is not None, HAS_RIGHT=window_right is not None, HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None, HADAMARD=hadamard_bits(k_pages.dtype, head_dim),
            num_warps=1, maxnreg=s.max_registers,
        )  # fmt: skip
    if split_plan.max_partials > 1:
        merge_partials_launch(partials, partial_lse, split_plan, cu_seqlens_q, sinks, out, lse, group, group)
    return out, lse
