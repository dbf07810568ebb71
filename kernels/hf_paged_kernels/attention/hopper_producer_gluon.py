"""Copies of the Hopper kernel: the producer warps, which bring queries, keys and values into shared memory by TMA.

See :mod:`.hopper_gluon`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from ..compat_gluon import load_async, view
from .hopper_scheduler_gluon import receive


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
    desc, smem, table_row, key, start, stop, pages, kv_head, count, full, empty,
    PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for the tile of keys or values at ``key`` from ``pages`` once its place in shared memory is free; returns
    pages, key and count of the next one."""
    HALVES: gl.constexpr = HEAD_DIM // 64
    CHUNK: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    CHUNKS: gl.constexpr = BLOCK_N // CHUNK
    pieces = view(
        smem, desc.dtype, [STAGES * HALVES * CHUNKS, 1, 1, CHUNK, 64], gl.NVMMASharedLayout(128, 16, 4)
    )  # fmt: skip
    # A tile is several pages, or a part of one. Slots past the page's end read as zeros.
    first_slot = 0 if CHUNK == PAGE_SIZE else key % PAGE_SIZE
    # Looked up before this tile's place is waited for.
    next_pages = _find_pages(table_row, key + BLOCK_N, start, stop, PAGE_SIZE, CHUNKS, CHUNK)
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
    return next_pages, key + BLOCK_N, count + 1


@gluon.jit
def produce(tensors, OPERAND: gl.constexpr, OPTIONS: gl.constexpr):
    """A producer warp: copies keys (OPERAND 0, with the queries) or values (1), ahead of the consumers."""
    q_desc, desc, page_table, stride_table, can_prefetch_kv, q_smem, smem, barriers, queue = tensors
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
        q_full, q_empty, full, empty, _v_full, _v_empty, _pingpong = barriers
    else:
        q_full, q_empty, _k_full, _k_empty, full, empty, _pingpong = barriers
    q_pieces = view(q_smem, dtype, [Q_STAGES * CONSUMERS * HALVES, 1, 64 // PACK, PACK, 64], piece)
    pieces = view(smem, dtype, [STAGES * HALVES, 1, BLOCK_N, 1, 64], piece)

    q_count = 0
    count = 0
    turn = 0
    seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, _, _ = receive(turn, queue)
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
                    known = gl.where((can_prefetch_kv != 0) & (query_len == 1), gl.minimum(stop, num_keys - 1), 0)
                    while (key + BLOCK_N <= known) & (count < STAGES):
                        pages, key, count = _copy_tile(
                            desc, smem, table_row, key, start, stop, pages, kv_head, count, full, empty,
                            PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES,
                        )  # fmt: skip
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
                    pages, key, count = _copy_tile(
                        desc, smem, table_row, key, start, stop, pages, kv_head, count, full, empty,
                        PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES,
                    )  # fmt: skip
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
        seq, head, first_token, query_len, q_start, num_keys, k_start, start, stop, _, _ = receive(turn, queue)
