"""Arithmetic of the Hopper backward kernel: the consumer warp groups.

See :mod:`.hopper_backward_gluon`.
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
from .hopper_consumer_gluon import clear_rows


@gluon.jit
def _issue_scores(k_tile, q_tiles, q_full, count, BLOCK_M: gl.constexpr, STAGES: gl.constexpr):
    """Ask for the scores of step ``count``, transposed: ``[keys, queries]``."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    stage = count % STAGES
    mbarrier.wait(q_full.index(stage), count // STAGES & 1)
    zeros = gl.zeros([64, BLOCK_M], gl.float32, LAYOUT)
    return warpgroup_mma(k_tile, q_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_queries(ds_pieces, k_pieces, ds_full, count, WHICH: gl.constexpr, HEAD_DIM: gl.constexpr):
    """dq of the scores' gradients of step ``count``: 64 rows, and 64 columns of it, for each consumer."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SPLIT_ROWS: gl.constexpr = HEAD_DIM == 64
    stage = count % 2
    mbarrier.wait(ds_full.index(stage), count // 2 & 1)
    dq = gl.zeros([64, 64], gl.float32, LAYOUT)
    for part in gl.static_range(2):
        if SPLIT_ROWS:
            grads = ds_pieces.index(stage * 4 + part * 2 + WHICH)
            keys = k_pieces.index(part)
        else:
            grads = ds_pieces.index(stage * 2 + part)
            keys = k_pieces.index(part * 2 + WHICH)
        dq = warpgroup_mma(grads.permute((1, 0)), keys, dq, use_acc=part > 0, is_async=True)
    return dq


@gluon.jit
def _hand_over(dq, dq_tiles, dq_full, dq_empty, count, WHICH: gl.constexpr):
    """Give dq of step ``count`` to the writer. That the one before is written says too that both consumers have done
    with its dS, whose place that of the next step takes."""
    mbarrier.wait(dq_empty.index(0), (count & 1) ^ 1)
    dq_tiles.index(WHICH).store(dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(0))


@gluon.jit
def _step(
    dk, dv, s, tiles, barriers, count, row, keys, numbers,
    MASKED: gl.constexpr, AHEAD: gl.constexpr, WHICH: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Step ``count``: the queries from ``row`` on. Their scores ``s`` have been asked for; with AHEAD, when it ends,
    those of the next step too."""
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    BLOCK_M: gl.constexpr = OPTIONS[1]
    STAGES: gl.constexpr = OPTIONS[2]
    HAS_LEFT: gl.constexpr = OPTIONS[4]
    HAS_RIGHT: gl.constexpr = OPTIONS[5]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, A_LAYOUT, 2)
    k_tile, v_tile, k_pieces, q_tiles, do_tiles, ds_tiles, ds_pieces, dq_tiles, lse_rows, delta_rows = tiles
    q_full, q_empty, do_full, do_empty, ds_full, dq_full, dq_empty = barriers
    scale_log2, num_keys, offset, window_left, window_right = numbers
    dtype: gl.constexpr = q_tiles.dtype
    stage = count % STAGES

    # What is in flight around a loop can only be waited for together with all else: ptxas does not count products from
    # one turn to the next, and has them wait for each other if asked to.
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.wait(do_full.index(stage), count // STAGES & 1)
    do_tile = do_tiles.index(stage)
    zeros = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_rows.index(stage).load(gl.SliceLayout(0, S_LAYOUT))
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if MASKED:
        rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT))
        visible = (keys < num_keys)[:, None]
        if HAS_LEFT:
            visible = visible & (keys[:, None] >= rows[None, :] + (offset - window_left))
        if HAS_RIGHT:
            visible = visible & (keys[:, None] <= rows[None, :] + (offset + window_right))
        p = gl.where(visible, p, 0.0)
    weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    dv = warpgroup_mma(weights, do_tile, dv, is_async=True)
    delta = delta_rows.index(stage).load(gl.SliceLayout(0, S_LAYOUT))
    ds = (p * (dp - delta[None, :])).to(dtype)
    ds_tiles.index(count % 2 * 2 + WHICH).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(count % 2))
    grads = gl.convert_layout(ds, P_LAYOUT)
    dk = warpgroup_mma(grads, q_tiles.index(stage), dk, is_async=True)
    dq = _issue_queries(ds_pieces, k_pieces, ds_full, count, WHICH, HEAD_DIM)
    dv = warpgroup_mma_wait(2, deps=[dv])
    mbarrier.arrive(do_empty.index(stage))
    dk = warpgroup_mma_wait(1, deps=[dk])
    mbarrier.arrive(q_empty.index(stage))
    if AHEAD:
        s = _issue_scores(k_tile, q_tiles, q_full, count + 1, BLOCK_M, STAGES)
    dq = warpgroup_mma_wait(1 if AHEAD else 0, deps=[dq])
    _hand_over(dq, dq_tiles, dq_full, dq_empty, count, WHICH)
    return dk, dv, s


@gluon.jit
def _run(
    dk, dv, tiles, barriers, first, last, high, group, keys, numbers,
    MASKED: gl.constexpr, WHICH: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last``."""
    BLOCK_M: gl.constexpr = OPTIONS[1]
    STAGES: gl.constexpr = OPTIONS[2]
    if first < last:
        s = _issue_scores(tiles[0], tiles[3], barriers[0], first, BLOCK_M, STAGES)
        for count in range(first, last - 1):
            row = (high - 1 - count // group) * BLOCK_M
            dk, dv, s = _step(dk, dv, s, tiles, barriers, count, row, keys, numbers, MASKED, True, WHICH, OPTIONS)
        row = (high - 1 - (last - 1) // group) * BLOCK_M
        dk, dv, s = _step(dk, dv, s, tiles, barriers, last - 1, row, keys, numbers, MASKED, False, WHICH, OPTIONS)
    return dk, dv


@gluon.jit
def consume_keys(tensors, work, WHICH: gl.constexpr, OPTIONS: gl.constexpr):
    """A consumer warp group: dk and dv of 64 keys of the block, and its part of dq."""
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    BLOCK_M: gl.constexpr = OPTIONS[1]
    STAGES: gl.constexpr = OPTIONS[2]
    VARLEN: gl.constexpr = OPTIONS[3]
    HAS_LEFT: gl.constexpr = OPTIONS[4]
    HAS_RIGHT: gl.constexpr = OPTIONS[5]
    HALVES: gl.constexpr = HEAD_DIM // 64
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    A_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dk_out, dv_out, smem, barriers, stride_dkb, stride_dkt, stride_dkh, scale, scale_log2, window_left, window_right = (
        tensors
    )
    batch, kv_head, group, first_key, _, num_queries, k_start, num_keys, low, high, _, _ = work
    k_smem, v_smem, q_smem, do_smem, ds_smem, dq_smem, lse_rows, delta_rows = smem
    kv_full, q_full, q_empty, do_full, do_empty, ds_full, dq_full, dq_empty, cleared = barriers
    dtype: gl.constexpr = q_smem.dtype
    k_tile, v_tile = k_smem.index(WHICH), v_smem.index(WHICH)
    piece: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_pieces = view(k_smem, dtype, [2 * HALVES, 64, 64], piece)
    v_pieces = view(v_smem, dtype, [2 * HALVES, 64, 64], piece)
    q_pieces = view(q_smem, dtype, [STAGES * HALVES, BLOCK_M, 64], piece)
    do_pieces = view(do_smem, dtype, [STAGES * HALVES, BLOCK_M, 64], piece)
    ds_pieces = view(ds_smem, dtype, [4 * BLOCK_M // 64, 64, 64], piece)
    tiles = (k_tile, v_tile, k_pieces, q_smem, do_smem, ds_smem, ds_pieces, dq_smem, lse_rows, delta_rows)
    rest = (q_full, q_empty, do_full, do_empty, ds_full, dq_full, dq_empty)
    offset = num_keys - num_queries
    keys = first_key + WHICH * 64 + gl.arange(0, 64, layout=ROW_LAYOUT)
    numbers = (scale_log2, num_keys, offset, window_left, window_right)

    dk = gl.zeros([64, HEAD_DIM], gl.float32, A_LAYOUT)
    dv = gl.zeros([64, HEAD_DIM], gl.float32, A_LAYOUT)
    if high > low:
        # Blocks of queries that see the whole block of keys.
        full_low = low
        full_high = high
        if HAS_RIGHT:
            full_low = gl.cdiv(gl.maximum(first_key + 127 - offset - window_right, 0), BLOCK_M)
        if HAS_LEFT:
            full_high = gl.maximum(first_key - offset + window_left + 1, 0) // BLOCK_M
        full_high = gl.minimum(gl.maximum(full_high, low), high)
        full_low = gl.minimum(gl.maximum(full_low, low), full_high)
        if first_key + 128 > num_keys:
            full_low = high
            full_high = high
        mbarrier.wait(kv_full.index(0), 0)
        if VARLEN:
            # What follows a sequence may be NaN, which a weight of 0 would not silence.
            left = num_keys - first_key - 64 * WHICH
            if left < 64:
                clear_rows(k_pieces, WHICH * HALVES, left, HALVES, 1, 64)
                clear_rows(v_pieces, WHICH * HALVES, left, HALVES, 1, 64)
        first = 0
        if VARLEN:  # noqa: SIM102 - one is for the compiler, the other for the device
            if high * BLOCK_M > num_queries:
                left = num_queries - (high - 1) * BLOCK_M
                first = group
                for count in range(0, group):
                    stage = count % STAGES
                    if WHICH == 0:
                        mbarrier.wait(q_full.index(stage), count // STAGES & 1)
                        clear_rows(q_pieces, stage * HALVES, left, HALVES, 1, BLOCK_M)
                    else:
                        mbarrier.wait(do_full.index(stage), count // STAGES & 1)
                        clear_rows(do_pieces, stage * HALVES, left, HALVES, 1, BLOCK_M)
                    mbarrier.arrive(cleared.index(0))
                    mbarrier.wait(cleared.index(0), count & 1)
                    s = _issue_scores(k_tile, q_smem, q_full, count, BLOCK_M, STAGES)
                    dk, dv, s = _step(
                        dk, dv, s, tiles, rest, count, (high - 1) * BLOCK_M, keys, numbers, True, False, WHICH, OPTIONS
                    )  # fmt: skip
        middle = gl.maximum((high - full_high) * group, first)
        end = gl.maximum((high - full_low) * group, first)
        if HAS_LEFT:
            dk, dv = _run(
                dk, dv, tiles, rest, first, middle, high, group, keys, numbers, True, WHICH, OPTIONS
            )  # fmt: skip
        dk, dv = _run(dk, dv, tiles, rest, middle, end, high, group, keys, numbers, False, WHICH, OPTIONS)
        total = (high - low) * group
        dk, dv = _run(dk, dv, tiles, rest, end, total, high, group, keys, numbers, True, WHICH, OPTIONS)

    # Rows of 16 bytes a thread, by way of this consumer's values: nobody reads them any more.
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, STORE_LAYOUT)) + (first_key + WHICH * 64)
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, STORE_LAYOUT))
    tokens = gl.cast(k_start + rows, gl.int64)
    offsets = gl.cast(batch, gl.int64) * stride_dkb + tokens * stride_dkt + gl.cast(kv_head, gl.int64) * stride_dkh
    held = (rows < num_keys)[:, None]
    v_tile.store(dv.to(dtype))
    barrier()
    gl.store(dv_out + offsets[:, None] + columns[None, :], v_tile.load(STORE_LAYOUT), mask=held)
    barrier()
    v_tile.store((dk * scale).to(dtype))
    barrier()
    gl.store(dk_out + offsets[:, None] + columns[None, :], v_tile.load(STORE_LAYOUT), mask=held)
