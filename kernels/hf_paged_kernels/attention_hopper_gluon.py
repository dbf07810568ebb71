"""Attention for Hopper GPUs in Gluon: TMA loads by two producer warps, wgmma by one to three consumer warp groups.

One kernel serves dense, packed and paged prefill, and split-KV decode; it computes what ``_flash_forward`` and
``_paged_forward`` compute, and is chosen where it is faster (see ``settings.hopper_settings``).

A program walks through tiles of work. Per tile, consumer ``c`` owns the 64 query rows ``64 * c ...``; row ``m`` is
query token ``m // PACK`` and query head ``m % PACK`` of the group that shares a key/value head::

    scheduler   finds the next tile of work while the others are busy with this one
    producers   | Q | K0 | K1 | ...   | V0 | V1 | ...      wait for `empty` barriers, TMA signals `full` barriers
    consumer 0      S0=QK0  softmax  | S1=QK1, O+=P0V0 | softmax | S2=QK2, O+=P1V1 | ...
    consumer 1         the same on its rows

While a consumer's softmax runs, the tensor cores work on the other consumers' products (Shah et al. 2024,
"FlashAttention-3"), and on its own of the tile before as far as ptxas leaves the wait for that where it is. Keys are
walked from left to right: programs that start together on blocks of one head read the same keys at the same time, from
the L2 cache.

Tiles in shared memory are stored as runs of 64 columns, ``[HEAD_DIM / 64][BLOCK_N][64]`` with 128-byte swizzling, which
is both what wgmma reads as ``[BLOCK_N, HEAD_DIM]`` and what TMA writes page by page::

    column half 0: | page a | page b | ... |    column half 1: | page a | page b | ... |
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import split_plan_triton, tiles_triton
from .backend import device_guard
from .dependent_launch_triton import has_dependent_launch
from .names_gluon import barrier, load_async, view
from .settings import LOG2_E, SHORT_QUERY, HopperSettings, hopper_settings, multiprocessors
from .split_plan_triton import SplitPlan, empty_parts, make_split_plan_launch, merge_parts_launch

key_bounds = gluon.jit(tiles_triton.key_bounds.fn)
unmasked_bounds = gluon.jit(tiles_triton.unmasked_bounds.fn)
find_sequence = gluon.jit(tiles_triton.find_sequence.fn)
split_lengths = gluon.jit(split_plan_triton.split_lengths.fn)
load_item = gluon.jit(split_plan_triton.load_item.fn)


# What a program does next


@gluon.jit
def _schedule(lengths, work, queue, handed_out, OPTIONS: gl.constexpr):
    """The scheduler warp: finds out what this program does next and hands it out, a tile ahead of the others.

    Tiles go to who asks first: ``handed_out`` counts them. ``queue``: two notes of 16 numbers in shared memory with
    their full and empty barriers.

    Decode is launched before the previous kernel has ended (``dependent_launch_triton``). No warp touches global memory
    before the first note, so it is enough that this one waits. Of a settled plan (``paged_attention_op``) the first
    note goes out before: producers then copy keys and values of earlier steps, and wait before they copy anything else.
    Consumers write nothing before either, since they wait for the queries; of a split without keys, this warp waits.

    The counter of splits is the plan's, and all layers take it in turn: it is touched after the wait only, and whoever
    is last leaves zeros to the next launch.
    """
    MODE: gl.constexpr = OPTIONS[0]
    PACK: gl.constexpr = OPTIONS[2]
    CONSUMERS: gl.constexpr = OPTIONS[8]
    HAS_LEFT: gl.constexpr = OPTIONS[9]
    HAS_RIGHT: gl.constexpr = OPTIONS[10]
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS // PACK
    turn = 0
    tile = gl.program_id(0)
    num_tiles = work[0]
    if MODE == "split":
        if work[9] == 0:
            gdc_wait()
        # Asked for with the number of tiles: whether there is such a tile is seen when both have come.
        item = load_item(lengths[3], tile // work[5])
        num_tiles = gl.maximum(gl.load(lengths[4]), 1) * work[5]
    while tile < num_tiles:
        if MODE == "split":
            found = _find_split(tile, item, work, HAS_LEFT, HAS_RIGHT)
            if found[8] <= found[7]:
                gdc_wait()
        else:
            found = _find_block(tile, lengths, work, MODE, BLOCK_Q, HAS_LEFT, HAS_RIGHT)
        _hand_out(found, turn, queue)
        if MODE == "split":
            gdc_wait()
        tile = gl.num_programs(0) + _count_up(handed_out, "relaxed")
        if MODE == "split":
            item = load_item(lengths[3], gl.minimum(tile, num_tiles - 1) // work[5])
        turn += 1
    if MODE == "split":
        gdc_wait()
        if _count_up(handed_out + 1, "acq_rel") == gl.num_programs(0) - 1:
            gl.atomic_xchg(handed_out + 1, 0)
            gl.atomic_xchg(handed_out, 0)
        gdc_launch_dependents()  # The merge gets ready meanwhile.
    nothing = tile * 0
    _hand_out(
        (nothing - 1, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing),
        turn, queue,
    )  # fmt: skip


@gluon.jit
def _count_up(counter, SEM: gl.constexpr):
    """Add one to a counter; returns what it was.

    A tensor, not a number, whose value the threads would read from shared memory: at a place that Triton had also given
    to a barrier nobody waited for (H200: with two programs on a multiprocessor some read the barrier's bits).
    """
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    before = gl.atomic_add(counter + lane * 0, lane * 0 + 1, mask=lane == 0, sem=SEM)
    return gl.max(gl.where(lane == 0, before, 0), 0)


@gluon.jit
def _hand_out(found, turn, queue):
    notes, full, empty = queue
    layout: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 16, layout=layout)
    numbers = gl.zeros([16], gl.int32, layout)
    for i in gl.static_range(11):
        numbers = gl.where(index == i, found[i], numbers)
    mbarrier.wait(empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    notes.index(turn % 2).store(numbers)
    mbarrier.arrive(full.index(turn % 2))


@gluon.jit
def _receive(turn, queue):
    """What ``_find_split`` or ``_find_block`` found for this turn; a negative sequence: nothing is left."""
    notes, full, empty = queue
    layout: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 16, layout=layout)
    mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
    numbers = notes.index(turn % 2).load(layout)
    mbarrier.arrive(empty.index(turn % 2))
    found = ()
    for i in gl.static_range(11):
        # Every thread holds all numbers: this picks a register.
        found += (gl.sum(gl.where(index == i, numbers, 0), 0),)
    return found


@gluon.jit
def _find_split(tile, item, work, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """What tile ``tile`` is, a split for one head; see :func:`_find_block`."""
    _num_tiles, _num_seqs, _seqlen_q, _seqlen_k, _num_blocks, num_heads, _section, window_left, window_right, _ = work
    seq, split, place, num_parts, q_start, query_len, num_keys = item
    none = tile * 0
    start, stop = key_bounds(
        num_keys - query_len, num_keys - 1, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )  # fmt: skip
    length = split_lengths(num_keys, query_len)
    start = gl.maximum(start, split * length)
    stop = gl.minimum(stop, (split + 1) * length)
    if query_len == 0:
        stop = start
    return seq, tile % num_heads, none, query_len, q_start, num_keys, none, start, stop, place, num_parts


@gluon.jit
def _find_block(
    tile,
    lengths,
    work,
    MODE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """What tile ``tile`` is: ``(seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, place,
    num_parts)``.

    ``start..stop`` are the keys that the tile's rows see; one of ``num_parts`` splits leaves its sums at ``place``.
    Heads are taken in sections whose keys and values fit in the L2 cache; within a section the last blocks, which see
    most keys, come first.
    """
    cu_seqlens_q, cu_seqlens_k, seq_lens, _items, _num_items = lengths
    _num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, section, window_left, window_right, _ = work
    none = tile * 0
    num_columns = num_heads * num_seqs if MODE == "dense" else num_heads
    start_column = tile // (section * num_blocks) * section
    rest = tile % (section * num_blocks)
    width = gl.minimum(section, num_columns - start_column)
    block = num_blocks - 1 - rest // width
    column = start_column + rest % width
    head = column % num_heads
    if MODE == "dense":
        seq = column // num_heads
        first_token = block * BLOCK_Q
        q_start = none
        k_start = none
        query_len = seqlen_q
        num_keys = seqlen_k
    else:
        seq = find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q)
        q_start = gl.load(cu_seqlens_q + seq)
        first_token = (block - q_start // BLOCK_Q - seq) * BLOCK_Q
        query_len = gl.load(cu_seqlens_q + seq + 1) - q_start
        if MODE == "varlen":
            k_start = gl.load(cu_seqlens_k + seq)
            num_keys = gl.load(cu_seqlens_k + seq + 1) - k_start
        else:
            k_start = none
            num_keys = gl.load(seq_lens + seq)
    context_len = num_keys - query_len
    last_token = gl.minimum(first_token + BLOCK_Q, query_len) - 1
    start, stop = key_bounds(
        context_len + first_token, context_len + last_token, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if first_token >= query_len:
        stop = start
    return seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, none, none + 1


# Copies: the producer warps


@gluon.jit
def _find_pages(table_row, key, start, stop, PAGE_SIZE: gl.constexpr, CHUNKS: gl.constexpr, CHUNK: gl.constexpr):
    """The pages of a tile's chunks. Outside of start..stop the table may hold anything: -1 is given."""
    pages = ()
    for chunk in gl.static_range(CHUNKS):
        first = key + chunk * CHUNK
        inside = (first + CHUNK > start) & (first < stop)
        pages += (gl.load(table_row + first // PAGE_SIZE, mask=inside, other=-1),)
    return pages


@gluon.jit
def _copy_tile(
    desc, smem, key, pages, kv_head, count, full, empty,
    PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for a tile of keys or values from ``pages`` once its place in shared memory is free."""
    HALVES: gl.constexpr = HEAD_DIM // 64
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    CHUNKS: gl.constexpr = BLOCK_N // CHUNK
    pieces = view(
        smem, desc.dtype, [STAGES * HALVES * CHUNKS, 1, 1, CHUNK, 64], gl.NVMMASharedLayout(128, 16, 4)
    )  # fmt: skip
    # A tile is several pages, or a part of one. Slots past the page's end read as zeros.
    first_slot = 0 if CHUNK == PAGE_SIZE else key % PAGE_SIZE
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
    for chunk in gl.static_range(CHUNKS):
        slot = gl.where(pages[chunk] < 0, PAGE_SIZE, first_slot)
        for half in gl.static_range(HALVES):
            load_async(
                desc, [pages[chunk], kv_head, slot, half * 64], full.index(stage),
                pieces.index(stage * (HALVES * CHUNKS) + half * CHUNKS + chunk),
            )  # fmt: skip


@gluon.jit
def _produce(tensors, OPERAND: gl.constexpr, OPTIONS: gl.constexpr):
    """A producer warp: copies keys (OPERAND 0, with the queries) or values (1), ahead of the consumers."""
    q_desc, desc, page_table, stride_table, is_settled, q_smem, smem, barriers, queue = tensors
    MODE: gl.constexpr = OPTIONS[0]
    GROUP: gl.constexpr = OPTIONS[1]
    PACK: gl.constexpr = OPTIONS[2]
    PAGE_SIZE: gl.constexpr = OPTIONS[3]
    HEAD_DIM: gl.constexpr = OPTIONS[4]
    BLOCK_N: gl.constexpr = OPTIONS[5]
    STAGES: gl.constexpr = OPTIONS[6]
    Q_STAGES: gl.constexpr = OPTIONS[7]
    CONSUMERS: gl.constexpr = OPTIONS[8]
    PAGED: gl.constexpr = MODE == "paged" or MODE == "split"
    HALVES: gl.constexpr = HEAD_DIM // 64
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    CHUNKS: gl.constexpr = BLOCK_N // CHUNK
    dtype: gl.constexpr = q_desc.dtype
    piece: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    if OPERAND == 0:
        q_full, q_empty, full, empty, _v_full, _v_empty, _turns = barriers
    else:
        q_full, q_empty, _k_full, _k_empty, full, empty, _turns = barriers
    q_pieces = view(q_smem, dtype, [Q_STAGES * CONSUMERS * HALVES, 1, 64 // PACK, PACK, 64], piece)
    pieces = view(smem, dtype, [STAGES * HALVES, 1, BLOCK_N, 1, 64], piece)

    q_count = 0
    count = 0
    turn = 0
    seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, _, _ = _receive(turn, queue)
    while seq >= 0:
        if stop > start:
            kv_head = head // GROUP if PACK == 1 else head
            batch = seq if MODE == "dense" else 0
            if PAGED:
                table_row = page_table + gl.cast(seq, gl.int64) * stride_table
                key = start // BLOCK_N * BLOCK_N
                pages = _find_pages(table_row, key, start, stop, PAGE_SIZE, CHUNKS, CHUNK)
            if MODE == "split":  # noqa: SIM102 - one is for the compiler, the other for the device
                if turn == 0:
                    # Of one query, all keys but the last are of earlier steps.
                    known = gl.where((is_settled != 0) & (query_len == 1), gl.minimum(stop, num_keys - 1), 0)
                    while (key + BLOCK_N <= known) & (count < STAGES):
                        next_pages = _find_pages(table_row, key + BLOCK_N, start, stop, PAGE_SIZE, CHUNKS, CHUNK)
                        _copy_tile(
                            desc, smem, key, pages, kv_head, count, full, empty, PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES
                        )
                        pages = next_pages
                        key += BLOCK_N
                        count += 1
                    gdc_wait()
            if OPERAND == 0:
                first_head = head if PACK == 1 else head * GROUP
                q_stage = q_count % Q_STAGES
                mbarrier.wait(q_empty.index(q_stage), (q_count // Q_STAGES & 1) ^ 1)
                mbarrier.expect(q_full.index(q_stage), 64 * CONSUMERS * HEAD_DIM * 2)
                for consumer in gl.static_range(CONSUMERS):
                    for half in gl.static_range(HALVES):
                        load_async(
                            q_desc, [batch, q_start + first_token + consumer * (64 // PACK), first_head, half * 64],
                            q_full.index(q_stage), q_pieces.index((q_stage * CONSUMERS + consumer) * HALVES + half),
                        )  # fmt: skip
                q_count += 1
            if PAGED:
                while key < stop:
                    # The next tile's pages are looked up before this one's are waited for.
                    next_pages = _find_pages(table_row, key + BLOCK_N, start, stop, PAGE_SIZE, CHUNKS, CHUNK)
                    _copy_tile(
                        desc, smem, key, pages, kv_head, count, full, empty, PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES
                    )
                    pages = next_pages
                    key += BLOCK_N
                    count += 1
            else:
                for index in range(start // BLOCK_N, gl.cdiv(stop, BLOCK_N)):
                    stage = count % STAGES
                    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
                    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
                    for half in gl.static_range(HALVES):
                        load_async(
                            desc, [batch, k_start + index * BLOCK_N, kv_head, half * 64], full.index(stage),
                            pieces.index(stage * HALVES + half),
                        )  # fmt: skip
                    count += 1
        turn += 1
        seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, _, _ = _receive(turn, queue)


# Arithmetic: the consumer warp groups


@gluon.jit
def _softmax(
    scores, running_max, running_sum, positions, key, stop, scale_log2, softcap, window_left, window_right,
    MASKED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, PARTIAL_SUMS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax on raw scores: ``(weights, correction, running_max, running_sum)``.

    The running maximum is of raw scores (of capped ones with a softcap); ``scale_log2`` must be positive. With
    PARTIAL_SUMS the running sum is ``[64, 8]``, of every eighth column: each thread adds up its own.
    """
    if HAS_SOFTCAP:
        # softcap * tanh(x): see tiles_triton.scale_scores.
        scores = softcap * (1.0 - 2.0 / (gl.exp2(scores * scale_log2) + 1.0))
        factor: gl.constexpr = 1.4426950408889634
    else:
        factor = scale_log2
    if MASKED:
        keys = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        visible = (keys < stop)[None, :]
        if HAS_LEFT:
            visible = visible & (keys[None, :] >= positions[:, None] - window_left)
        if HAS_RIGHT:
            visible = visible & (keys[None, :] <= positions[:, None] + window_right)
        scores = gl.where(visible, scores, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(scores, 1))
    if MASKED:
        # A row that has seen no key yet keeps -inf; a finite pivot keeps NaN out of it.
        pivot = gl.where(new_max == float("-inf"), 0.0, new_max * factor)
    else:
        pivot = new_max * factor
    weights = gl.exp2(scores * factor - pivot[:, None])
    correction = gl.exp2(running_max * factor - pivot)
    if PARTIAL_SUMS:
        sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
        sums = gl.convert_layout(gl.sum(gl.reshape(weights, [64, BLOCK_N // 8, 8]), 1), sum_layout)
        running_sum = running_sum * gl.convert_layout(correction, gl.SliceLayout(1, sum_layout))[:, None] + sums
    else:
        running_sum = running_sum * correction + gl.sum(weights, 1)
    return weights, correction, new_max, running_sum


@gluon.jit
def _step(
    o, p, running_max, running_sum, q_tile, k_tiles, v_tiles, barriers, count, steps, key, positions, stop,
    scale_log2, softcap, window_left, window_right,
    MASKED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, TAKE_TURNS: gl.constexpr,
    FULL_WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores of tile ``count``, while the weights ``p`` of tile ``count - 1`` are multiplied with its values."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    stage = count % STAGES
    last = (count - 1) % STAGES
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    weights = gl.convert_layout(p.to(k_tiles.dtype), P_LAYOUT)
    if TAKE_TURNS:
        mbarrier.wait(turns.index(WHICH), (steps & 1) ^ (1 if WHICH == 0 else 0))
    s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
    o = warpgroup_mma(weights, v_tiles.index(last), o, is_async=True)
    if TAKE_TURNS:
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage))
    p, correction, running_max, running_sum = _softmax(
        s, running_max, running_sum, positions, key, stop, scale_log2, softcap, window_left, window_right,
        MASKED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BLOCK_N, S_LAYOUT, FULL_WEIGHTS,
    )  # fmt: skip
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(v_empty.index(last))
    o = o * gl.convert_layout(correction, gl.SliceLayout(1, O_LAYOUT))[:, None]
    if not FULL_WEIGHTS:
        p = gl.convert_layout(p.to(k_tiles.dtype), P_LAYOUT)
    return o, p, running_max, running_sum


@gluon.jit
def _clear_rows(pieces, first_piece, first_row, HALVES: gl.constexpr, CHUNKS: gl.constexpr, CHUNK: gl.constexpr):
    """Zero the rows from ``first_row`` on in one chunk of a tile of values.

    They belong to nobody or to another sequence; a weight of 0 would not silence a NaN there.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    for half in gl.static_range(HALVES):
        tile = pieces.index(first_piece + half * CHUNKS)
        values = tile.load(layout)
        tile.store(gl.where((rows < first_row)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _consume(tensors, WHICH: gl.constexpr, OPTIONS: gl.constexpr):
    """A consumer warp group: 64 rows of every tile."""
    (
        out, lse, sinks, parts, part_lse, q_smem, k_smem, v_smem, barriers, queue, num_heads, strides,
        scale_log2, softcap, window_left, window_right,
    ) = tensors  # fmt: skip
    MODE: gl.constexpr = OPTIONS[0]
    GROUP: gl.constexpr = OPTIONS[1]
    PACK: gl.constexpr = OPTIONS[2]
    PAGE_SIZE: gl.constexpr = OPTIONS[3]
    HEAD_DIM: gl.constexpr = OPTIONS[4]
    BLOCK_N: gl.constexpr = OPTIONS[5]
    STAGES: gl.constexpr = OPTIONS[6]
    Q_STAGES: gl.constexpr = OPTIONS[7]
    CONSUMERS: gl.constexpr = OPTIONS[8]
    HAS_LEFT: gl.constexpr = OPTIONS[9]
    HAS_RIGHT: gl.constexpr = OPTIONS[10]
    HAS_SOFTCAP: gl.constexpr = OPTIONS[11]
    HAS_SINKS: gl.constexpr = OPTIONS[12]
    TAKE_TURNS: gl.constexpr = OPTIONS[13]
    FULL_WEIGHTS: gl.constexpr = OPTIONS[14]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turns = barriers
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh = strides
    dtype: gl.constexpr = q_smem.dtype
    HALVES: gl.constexpr = HEAD_DIM // 64
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    CHUNKS: gl.constexpr = BLOCK_N // CHUNK
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS // PACK
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Splits rarely store a result, and have no shared memory to spare for another layout.
    if MODE == "split":
        STORE_LAYOUT: gl.constexpr = O_LAYOUT
    else:
        STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # type: ignore[no-redef]
    v_pieces = view(v_smem, dtype, [STAGES * HALVES * CHUNKS, CHUNK, 64], gl.NVMMASharedLayout(128, 16, 2))
    rows = WHICH * 64 + gl.arange(0, 64, layout=ROW_LAYOUT)

    q_count = 0
    count = 0
    steps = 0
    turn = 0
    seq, head, first_token, query_len, q_start, num_keys, _k_start, start, stop, place, num_parts = _receive(
        turn, queue
    )
    while seq >= 0:
        context_len = num_keys - query_len
        last_token = gl.minimum(first_token + BLOCK_Q, query_len) - 1
        tokens = first_token + rows // PACK
        # Rows past the end repeat the last token's position, so that they never widen the mask.
        positions = context_len + gl.minimum(tokens, last_token)
        o = gl.zeros([64, HEAD_DIM], gl.float32, O_LAYOUT)
        running_max = gl.full([64], float("-inf"), gl.float32, ROW_LAYOUT)
        if FULL_WEIGHTS:
            running_sum = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
        else:
            running_sum = gl.zeros([64], gl.float32, ROW_LAYOUT)
        if stop > start:
            q_stage = q_count % Q_STAGES
            mbarrier.wait(q_full.index(q_stage), q_count // Q_STAGES & 1)
            q_tile = q_smem.index(q_stage * CONSUMERS + WHICH)
            if MODE == "split":
                # Short work: with the queries in registers, those of the next tile can come in meanwhile.
                q_tile = q_tile.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            low = start // BLOCK_N
            high = gl.cdiv(stop, BLOCK_N)
            full_start, full_stop = unmasked_bounds(
                context_len + first_token, context_len + last_token, low * BLOCK_N, stop, window_left, window_right,
                HAS_LEFT, HAS_RIGHT, BLOCK_N,
            )  # fmt: skip

            # The first tile: its product with the values waits for the next tile.
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), count // STAGES & 1)
            zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
            s = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            if MODE == "split":
                # Not before: nothing but their use says that registers have been loaded, and a copy by TMA does not
                # wait for loads (H200: in short splits the next queries were read by some rows).
                mbarrier.arrive(q_empty.index(q_stage))
            p, _correction, running_max, running_sum = _softmax(
                s, running_max, running_sum, positions, low * BLOCK_N, stop, scale_log2, softcap, window_left,
                window_right, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BLOCK_N, S_LAYOUT, FULL_WEIGHTS,
            )  # fmt: skip
            if not FULL_WEIGHTS:
                p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            count += 1

            full_low = gl.minimum(gl.maximum(full_start // BLOCK_N, low + 1), high)
            full_high = gl.maximum(full_stop // BLOCK_N, full_low)
            # Tiles that the window cuts, tiles that every row sees, tiles at the end.
            bounds = (low + 1, full_low, full_high, high)
            for run in gl.static_range(0 if HAS_LEFT else 1, 3):
                for index in range(bounds[run], bounds[run + 1]):
                    o, p, running_max, running_sum = _step(
                        o, p, running_max, running_sum, q_tile, k_smem, v_smem, barriers, count, steps,
                        index * BLOCK_N, positions, stop, scale_log2, softcap, window_left, window_right, run != 1,
                        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BLOCK_N, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT, WHICH,
                        CONSUMERS, TAKE_TURNS, FULL_WEIGHTS,
                    )  # fmt: skip
                    count += 1
                    steps += 1
            if MODE != "split":
                mbarrier.arrive(q_empty.index(q_stage))
            q_count += 1
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
            if MODE != "dense":  # noqa: SIM102 - one is for the compiler, the other for the device
                if num_keys < high * BLOCK_N:
                    first_row = num_keys - (high - 1) * BLOCK_N
                    chunk = (stop - 1 - (high - 1) * BLOCK_N) // CHUNK
                    _clear_rows(
                        v_pieces, last * (HALVES * CHUNKS) + chunk, first_row - chunk * CHUNK, HALVES, CHUNKS, CHUNK
                    )
            weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
            o = warpgroup_mma(weights, v_smem.index(last), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(v_empty.index(last))

        if HAS_SOFTCAP:
            factor: gl.constexpr = 1.4426950408889634
        else:
            factor = scale_log2
        if FULL_WEIGHTS:
            running_sum = gl.convert_layout(gl.sum(running_sum, 1), ROW_LAYOUT)
        # From here on the running maximum is in base 2.
        running_max = running_max * factor
        heads = (head if PACK == 1 else head * GROUP) + rows % PACK
        valid = (tokens < query_len) & (rows % PACK < GROUP)
        if MODE != "split" or num_parts == 1:
            if HAS_SINKS:
                sink = gl.load(sinks + heads, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634
                new_max = gl.maximum(running_max, sink)
                correction = gl.exp2(running_max - new_max)
                running_sum = running_sum * correction + gl.exp2(sink - new_max)
                o = o * gl.convert_layout(correction, gl.SliceLayout(1, O_LAYOUT))[:, None]
                running_max = new_max
            empty = running_sum == 0.0
            inverse = 1.0 / gl.where(empty, 1.0, running_sum)
            row_lse = (running_max + gl.log2(gl.where(empty, 1.0, running_sum))) * 0.6931471805599453
            row_lse = gl.where(empty, float("-inf"), row_lse)
            o = o * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
            packed = gl.cast(q_start + tokens, gl.int64)
            batch = gl.cast(seq, gl.int64) if MODE == "dense" else gl.cast(seq * 0, gl.int64)
            # Rows of 16 bytes a thread: what wgmma leaves would be stored 4 bytes at a time.
            out_offsets = gl.convert_layout(
                batch * stride_ob + packed * stride_ot + heads * stride_oh, gl.SliceLayout(1, STORE_LAYOUT)
            )
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, STORE_LAYOUT))
            gl.store(
                out + out_offsets[:, None] + columns[None, :], gl.convert_layout(o.to(dtype), STORE_LAYOUT),
                mask=gl.convert_layout(valid, gl.SliceLayout(1, STORE_LAYOUT))[:, None],
            )  # fmt: skip
            gl.store(lse + batch * stride_lb + packed * stride_lt + heads * stride_lh, row_lse, mask=valid)
        else:
            # An unnormalised part of the rows, for merge_parts_launch to add up. It stays in the L2 cache till then:
            # pushed out to memory by the keys and values, it cost several times what its bytes take.
            slot = (gl.cast(place, gl.int64) * num_heads + head * query_len) * PACK
            num_rows = query_len * PACK
            part_rows = gl.convert_layout(rows, gl.SliceLayout(1, O_LAYOUT))
            part_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
            gl.store(
                parts + slot * HEAD_DIM + part_rows[:, None] * HEAD_DIM + part_columns[None, :], o,
                mask=(part_rows < num_rows)[:, None], eviction_policy="evict_last",
            )  # fmt: skip
            gl.store(part_lse + 2 * (slot + rows), running_max, mask=rows < num_rows)
            gl.store(part_lse + 2 * (slot + rows) + 1, running_sum, mask=rows < num_rows)

        turn += 1
        seq, head, first_token, query_len, q_start, num_keys, _k_start, start, stop, place, num_parts = _receive(
            turn, queue
        )


# The kernel, and its launch


LENGTHS = [
    "num_tiles", "num_seqs", "seqlen_q", "seqlen_k", "num_blocks", "num_heads", "section", "stride_table",
    "stride_lb", "stride_lt", "stride_lh", "window_left", "window_right", "is_settled",
]  # fmt: skip
"""Arguments whose value must not cause another compilation."""


@gluon.jit(do_not_specialize=LENGTHS)
def _hopper_forward(
    q_desc, k_desc, v_desc, out, lse, sinks, parts, part_lse, cu_seqlens_q, cu_seqlens_k, seq_lens,
    page_table, items, num_items, handed_out,
    num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, section, stride_table,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh,
    scale_log2, softcap, window_left, window_right, is_settled,
    MODE: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    TAKE_TURNS: gl.constexpr, FULL_WEIGHTS: gl.constexpr,
):  # fmt: skip
    """``num_warps`` must be 4: the warps that a program starts with are the first consumer."""
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS, 64, HEAD_DIM], tile_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    notes = gl.allocate_shared_memory(gl.int32, [2, 16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    note_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    note_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(note_full.index(i), count=1)
        mbarrier.init(note_empty.index(i), count=CONSUMERS + 2)
    if TAKE_TURNS:
        turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turns.index(i), count=1)
    else:
        turns = q_full  # Nobody waits for it.
    fence_async_shared()

    queue = (notes, note_full, note_empty)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    lengths = (cu_seqlens_q, cu_seqlens_k, seq_lens, items, num_items)
    work = (
        num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, section, window_left, window_right, is_settled
    )  # fmt: skip
    strides = (stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh)
    tensors = (
        out, lse, sinks, parts, part_lse, q_smem, k_smem, v_smem, barriers, queue, num_heads, strides,
        scale_log2, softcap, window_left, window_right,
    )  # fmt: skip
    keys = (q_desc, k_desc, page_table, stride_table, is_settled, q_smem, k_smem, barriers, queue)
    values = (q_desc, v_desc, page_table, stride_table, is_settled, q_smem, v_smem, barriers, queue)
    options: gl.constexpr = (
        MODE, GROUP, PACK, PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES, Q_STAGES, CONSUMERS,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SINKS, TAKE_TURNS, FULL_WEIGHTS,
    )  # fmt: skip
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (tensors, 0, options)), (_produce, (keys, 0, options)), (_produce, (values, 1, options)),
                (_schedule, (lengths, work, queue, handed_out, options)),
            ],
            [1, 1, 1], [40, 40, 40],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, 0, options)), (_consume, (tensors, 1, options)),
                (_produce, (keys, 0, options)), (_produce, (values, 1, options)),
                (_schedule, (lengths, work, queue, handed_out, options)),
            ],
            [4, 1, 1, 1], [240, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (tensors, 0, options)), (_consume, (tensors, 1, options)), (_consume, (tensors, 2, options)),
                (_produce, (keys, 0, options)), (_produce, (values, 1, options)),
                (_schedule, (lengths, work, queue, handed_out, options)),
            ],
            [4, 4, 1, 1, 1], [160, 160, 24, 24, 24],
        )  # fmt: skip


TILE_ROWS = 64
"""Query rows of one consumer warp group: the M of wgmma."""
L2_BUDGET = 32 * 2**20
"""Bytes of keys and values that programs work on at a time."""
ANY = 2**31 - 1
"""Size of the page axis in a descriptor. A pool may grow under a captured graph, so its size is not part of it."""


def _descriptor(tensor: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, shape, strides, block, gl.NVMMASharedLayout(128, 16, 4))


def _launch(
    q: torch.Tensor,
    k: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    mode: str,
    lengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    settings: HopperSettings,
    group: int,
    pack: int,
    num_blocks: int,
    kv_tokens: int,
    plan: "SplitPlan | None" = None,
    is_settled: bool = False,
) -> None:
    """Launch on ``q [B, L, Hq, D]`` (packed: B is 1).

    Args:
        k: keys and values, ``[B, Lk, Hk, D]`` or pages ``[num_pages, Hk, page_size, D]``.
        out: like q, written; ``lse`` float32 ``[B, Hq, L]`` or ``[Hq, T]``, written.
        mode: "dense", "varlen", "paged", or "split" with ``plan``.
        lengths: cu_seqlens_q, cu_seqlens_k, seq_lens, page_table; int32, None where the mode has none.
        group: query heads per key/value head; ``pack`` rows of a tile stand for them, 1: a head has tiles of its own.
        is_settled: of ``plan``, see ``paged_attention_op``.
        num_blocks: upper bound of the blocks of query rows of a head (of a sequence, if dense).
        kv_tokens: upper bound of the tokens of a head's keys, for the share of the L2 cache.
    """
    s = settings
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    paged = mode in ("paged", "split")
    num_heads = num_q_heads if pack == 1 else num_q_heads // group
    cu_seqlens_q, cu_seqlens_k, seq_lens, page_table = lengths
    num_seqs = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    q_desc = _descriptor(q, list(q.shape), list(q.stride()), [1, TILE_ROWS // pack, pack, 64])
    page_size = k[0].shape[2] if paged else s.block_n
    chunk = min(page_size, s.block_n)
    kv_block = [1, 1, chunk, 64] if paged else [1, chunk, 1, 64]
    k_desc, v_desc = (
        _descriptor(x, [ANY if paged else x.shape[0], *x.shape[1:]], list(x.stride()), kv_block) for x in k
    )
    columns = num_heads * (batch if mode == "dense" else 1)
    section = max(1, min(columns, L2_BUDGET // max(1, 4 * head_dim * kv_tokens // (group if pack == 1 else 1))))
    num_tiles = num_blocks * columns
    parts = part_lse = None
    items = num_items = handed_out = None
    programs = multiprocessors(q.device) * s.programs_per_sm
    if plan is not None:
        items, num_items, handed_out = plan.items, plan.num_items, plan.handed_out
        num_tiles = plan.max_items * num_heads
        parts, part_lse = empty_parts(out[0], plan.max_parts, num_heads, pack, head_dim)
    else:
        handed_out = torch.zeros(1, dtype=torch.int32, device=q.device)
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    with device_guard(q):
        _hopper_forward[(min(programs, num_tiles),)](
            q_desc, k_desc, v_desc, out, lse, sinks, parts, part_lse, cu_seqlens_q, cu_seqlens_k, seq_lens,
            page_table, items, num_items, handed_out,
            num_tiles, num_seqs, seqlen_q, k[0].shape[1], num_blocks, num_heads, section,
            0 if page_table is None else page_table.stride(0), *out.stride()[:3],
            lse.stride(0) if mode == "dense" else 0, lse.stride(-1), lse.stride(-2),
            scale_log2, softcap or 0.0, window_left or 0, window_right or 0, int(is_settled),
            MODE=mode, GROUP=group, PACK=pack, PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_N=s.block_n,
            STAGES=s.stages, Q_STAGES=s.q_stages, CONSUMERS=s.consumers, HAS_LEFT=window_left is not None,
            HAS_RIGHT=window_right is not None, HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
            TAKE_TURNS=s.take_turns, FULL_WEIGHTS=s.full_weights,
            num_warps=4, maxnreg=s.max_registers, launch_pdl=plan is not None and has_dependent_launch(q.device),
        )  # fmt: skip
    if plan is not None and plan.max_parts > 1:
        assert parts is not None
        assert part_lse is not None
        assert cu_seqlens_q is not None
        merge_parts_launch(parts, part_lse, plan, cu_seqlens_q, sinks, out[0], lse, group, pack)


def hopper_flash_launch(
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
    settings: HopperSettings | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense ``[B, L, H, D]`` or packed ``[T, H, D]``; arguments and result as of ``flash_attention_launch``."""
    head_dim = q.shape[-1]
    s = settings or hopper_settings(head_dim, max_seqlen_q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group = q.shape[-2] // k.shape[-2]
    block_m = TILE_ROWS * s.consumers
    if cu_seqlens_q is None:
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        mode, num_blocks, kv_tokens = "dense", triton.cdiv(q.shape[1], block_m), k.shape[1]
        tensors = (q, k, v, out)
    else:
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        num_blocks = q.shape[0] // block_m + cu_seqlens_q.shape[0] - 1
        mode, kv_tokens = "varlen", k.shape[0]
        tensors = (q[None], k[None], v[None], out[None])
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    _launch(
        tensors[0], tensors[1:3], tensors[3], lse, mode, (cu_seqlens_q, cu_seqlens_k, None, None),
        window_left, window_right, softcap, sinks, scale, s, group, 1, num_blocks, kv_tokens,
    )  # fmt: skip
    return out, lse


def hopper_paged_launch(
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
    plan: torch.Tensor | None = None,
    settings: HopperSettings | None = None,
    is_settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over pages; arguments and result as of ``paged_attention_launch``, ``is_settled`` of ``paged_attention_op``."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group = num_q_heads // num_kv_heads
    pack = triton.next_power_of_2(group)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(num_q_heads, num_tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    split = max_query_len * pack <= TILE_ROWS and max_query_len <= SHORT_QUERY
    s = settings or hopper_settings(head_dim, max_query_len, split, page_table.shape[1] * page_size)
    split_plan = None
    if split:
        if plan is None:
            plan = make_split_plan_launch(seq_lens, cu_seqlens_q, page_table.shape[1] * page_size, window_left)
        split_plan = SplitPlan.of(plan, seq_lens.shape[0], page_table.shape[1] * page_size)
    num_blocks = num_tokens // (TILE_ROWS * s.consumers // pack) + seq_lens.shape[0]
    _launch(
        q[None], (k_pages, v_pages), out[None], lse, "split" if split else "paged",
        (cu_seqlens_q, None, seq_lens, page_table), window_left, window_right, softcap, sinks, scale, s, group, pack,
        num_blocks, page_table.shape[1] * page_size, split_plan, is_settled and plan is not None,
    )  # fmt: skip
    return out, lse
