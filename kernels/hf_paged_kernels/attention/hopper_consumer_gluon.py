"""Arithmetic of the Hopper kernel: the consumer warp groups, with products by wgmma and the online softmax.

See :mod:`.hopper_gluon`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..compat_gluon import barrier, view
from . import primitives_triton
from .hopper_scheduler_gluon import receive

unmasked_bounds = gluon.jit(primitives_triton.unmasked_bounds.fn)


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
        # softcap * tanh(x): see primitives_triton.scale_scores.
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
    P_LAYOUT: gl.constexpr, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, PINGPONG: gl.constexpr,
    FULL_WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores of tile ``count``, while the weights ``p`` of tile ``count - 1`` are multiplied with its values."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, pingpong_barriers = barriers
    stage = count % STAGES
    last = (count - 1) % STAGES
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    weights = gl.convert_layout(p.to(k_tiles.dtype), P_LAYOUT)
    if PINGPONG:
        mbarrier.wait(pingpong_barriers.index(WHICH), (steps & 1) ^ (1 if WHICH == 0 else 0))
    s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
    o = warpgroup_mma(weights, v_tiles.index(last), o, is_async=True)
    if PINGPONG:
        mbarrier.arrive(pingpong_barriers.index((WHICH + 1) % CONSUMERS))
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
def clear_rows(pieces, first_piece, first_row, HALVES: gl.constexpr, CHUNKS: gl.constexpr, CHUNK: gl.constexpr):
    """Zero the rows from ``first_row`` on in one chunk of a tile of values.

    They belong to no sequence or to another; a weight of 0 would not silence a NaN there.
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
def consume(tensors, WHICH: gl.constexpr, OPTIONS: gl.constexpr):
    """A consumer warp group: 64 rows of every tile."""
    (
        out, lse, sinks, partials, partial_lse, q_smem, k_smem, v_smem, barriers, queue, num_heads, strides,
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
    PINGPONG: gl.constexpr = OPTIONS[13]
    FULL_WEIGHTS: gl.constexpr = OPTIONS[14]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _pingpong = barriers
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
    seq, head, first_token, query_len, q_start, num_keys, _k_start, start, stop, place, num_partials = receive(
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
                        CONSUMERS, PINGPONG, FULL_WEIGHTS,
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
                    clear_rows(
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
        if MODE != "split" or num_partials == 1:
            if HAS_SINKS:
                sink = gl.load(sinks + heads, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634
                new_max = gl.maximum(running_max, sink)
                pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
                correction = gl.exp2(running_max - pivot)
                running_sum = running_sum * correction + gl.exp2(sink - pivot)
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
            # Unnormalised partials, for merge_partials_launch to add up. They stay in the L2 cache till then:
            # pushed out to memory by the keys and values, it cost several times what its bytes take.
            slot = (gl.cast(place, gl.int64) * num_heads + head * query_len) * PACK
            num_rows = query_len * PACK
            partial_rows = gl.convert_layout(rows, gl.SliceLayout(1, O_LAYOUT))
            partial_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_LAYOUT))
            gl.store(
                partials + slot * HEAD_DIM + partial_rows[:, None] * HEAD_DIM + partial_columns[None, :], o,
                mask=(partial_rows < num_rows)[:, None], eviction_policy="evict_last",
            )  # fmt: skip
            gl.store(partial_lse + 2 * (slot + rows), running_max, mask=rows < num_rows)
            gl.store(partial_lse + 2 * (slot + rows) + 1, running_sum, mask=rows < num_rows)

        turn += 1
        seq, head, first_token, query_len, q_start, num_keys, _k_start, start, stop, place, num_partials = receive(
            turn, queue
        )
