"""The backward pass for Hopper GPUs in Gluon: TMA, wgmma by two consumer warp groups, dq summed in a fixed order.

Computes what ``flash_backward_triton`` computes (its formulas stand there), for head dims 64 and 128 in bfloat16,
without softcap and sinks. A program owns 128 keys of one key/value head and walks through the blocks of queries that
see them, the last block first, all heads of the group for each. Consumer ``c`` has the 64 keys from ``64 * c`` on, in
transposed tiles ``[keys, queries]``, so that P and dS are left operands out of registers::

    producer     | K V | Q dO | Q dO | ...
    consumer 0      S=KQ  dP=V.dO  P  dV+=P.dO  dS  dK+=dS.Q  dq=dS'K | ...
    consumer 1      the same on its keys
    writer                                                        dq -> memory

dS goes to shared memory, where each consumer takes its part of dq over all 128 keys: half of the columns, or of the
rows at head dim 64.

dq of a block of queries is a float32 sum over key blocks: five matmuls in all, where a kernel of dq alone needs seven.
The writer adds by TMA in the order of the key blocks: block ``j`` waits until ``turns`` of the block of queries says
that block ``j - 1`` is done. So no two programs add to the same numbers at a time, and the gradients have the same bits
every time (as in the deterministic mode of FlashAttention-3, Shah et al. 2024). A program waits for programs of earlier
tickets only, which have started, so that one can always go on. Programs that start together walk through the same
queries, a step behind one another.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..backend import contiguous, contiguous_rows, device_guard, is_in_sixteens, new_like
from ..compat_gluon import add_async, bulk_writes_done, load_async, store_async, view
from ..launch_triton import Launch, Launches, Places, Series, Tile
from ..settings import HOPPER_BACKWARD_ROWS, LOG2_E
from . import primitives_triton
from .flash_backward_parts_triton import count_blocks, finish_queries, row_sums
from .hopper_backward_consumer_gluon import consume_keys

key_bounds = gluon.jit(primitives_triton.key_bounds.fn)
find_sequence = gluon.jit(primitives_triton.find_sequence.fn)

LENGTHS = [
    "num_seqs", "seqlen_q", "seqlen_k", "num_blocks", "num_columns", "num_kv_heads", "group", "section", "stats_row",
    "window_left", "window_right",
]  # fmt: skip
"""Arguments whose value must not cause another compilation."""


@gluon.jit
def _query_blocks(
    first_key, num_queries, num_keys, window_left, window_right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """``(low, high)``: the blocks of queries that see some of the keys from ``first_key`` on."""
    offset = num_keys - num_queries
    last_key = gl.minimum(first_key + BLOCK_N, num_keys) - 1
    start, stop = key_bounds(
        first_key - offset, last_key - offset, num_queries, window_right, window_left, HAS_RIGHT, HAS_LEFT
    )
    low = gl.minimum(gl.maximum(start, 0), num_queries) // BLOCK_M
    high = gl.cdiv(gl.maximum(stop, 0), BLOCK_M)
    high = gl.where(stop > start, high, low)
    return low, high


@gluon.jit
def _produce(tensors, work, OPTIONS: gl.constexpr):
    """A warp that brings keys and values once, then queries with lse, and output gradients with delta."""
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    BLOCK_M: gl.constexpr = OPTIONS[1]
    STAGES: gl.constexpr = OPTIONS[2]
    HALVES: gl.constexpr = HEAD_DIM // 64
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, smem, barriers, num_kv_heads = tensors
    batch, kv_head, group, first_key, q_start, _, k_start, _, low, high, _, first_slot = work
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = smem
    kv_full, q_full, q_empty, do_full, do_empty, _, _, _, _ = barriers
    dtype: gl.constexpr = q_desc.dtype
    piece: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    k_pieces = view(k_smem, dtype, [2 * HALVES, 1, 64, 1, 64], piece)
    v_pieces = view(v_smem, dtype, [2 * HALVES, 1, 64, 1, 64], piece)
    q_pieces = view(q_smem, dtype, [STAGES * HALVES, 1, BLOCK_M, 1, 64], piece)
    do_pieces = view(do_smem, dtype, [STAGES * HALVES, 1, BLOCK_M, 1, 64], piece)
    if high > low:
        mbarrier.expect(kv_full.index(0), 2 * 128 * HEAD_DIM * 2)
        for part in gl.static_range(2):
            for half in gl.static_range(HALVES):
                load_async(
                    k_desc, [batch, k_start + first_key + part * 64, kv_head, half * 64], kv_full.index(0),
                    k_pieces.index(part * HALVES + half),
                )  # fmt: skip
                load_async(
                    v_desc, [batch, k_start + first_key + part * 64, kv_head, half * 64], kv_full.index(0),
                    v_pieces.index(part * HALVES + half),
                )  # fmt: skip
        total = (high - low) * group
        for count in range(0, total):
            head = kv_head * group + count % group
            stats = batch * (num_kv_heads * group) + head
            row = (high - 1 - count // group) * BLOCK_M
            stage = count % STAGES
            parity = count // STAGES & 1
            mbarrier.wait(q_empty.index(stage), parity ^ 1)
            mbarrier.expect(q_full.index(stage), BLOCK_M * HEAD_DIM * 2 + BLOCK_M * 4)
            for half in gl.static_range(HALVES):
                load_async(
                    q_desc, [batch, q_start + row, head, half * 64], q_full.index(stage),
                    q_pieces.index(stage * HALVES + half),
                )  # fmt: skip
            load_async(lse_desc, [stats, first_slot + row], q_full.index(stage), lse_smem.index(stage))
            mbarrier.wait(do_empty.index(stage), parity ^ 1)
            mbarrier.expect(do_full.index(stage), BLOCK_M * HEAD_DIM * 2 + BLOCK_M * 4)
            for half in gl.static_range(HALVES):
                load_async(
                    do_desc, [batch, q_start + row, head, half * 64], do_full.index(stage),
                    do_pieces.index(stage * HALVES + half),
                )  # fmt: skip
            load_async(delta_desc, [stats, first_slot + row], do_full.index(stage), delta_smem.index(stage))


@gluon.jit
def _place_of(row, part: gl.constexpr, SPLIT_ROWS: gl.constexpr):
    if SPLIT_ROWS:
        place = row + part // 2 * 64, part % 2 * 32
    else:
        place = row, part * 32
    return place


@gluon.jit
def _write(tensors, work, OPTIONS: gl.constexpr):
    """A warp that adds dq of each block of queries to that of the key blocks before, once they are done."""
    HEAD_DIM: gl.constexpr = OPTIONS[0]
    BLOCK_M: gl.constexpr = OPTIONS[1]
    SPLIT_ROWS: gl.constexpr = HEAD_DIM == 64
    dq_desc, turns, dq_smem, dq_full, dq_empty, num_kv_heads, stats_row = tensors
    batch, kv_head, group, first_key, _, _, _, _, low, high, high_before, first_slot = work
    pieces = view(dq_smem, gl.float32, [4, 64, 32], gl.NVMMASharedLayout(128, 32, 2))
    block = first_key // 128
    for count in range(0, (high - low) * group):
        index = high - 1 - count // group
        stats = batch * (num_kv_heads * group) + kv_head * group + count % group
        at = stats * stats_row + first_slot + index * BLOCK_M
        turn = turns + 4 + at // BLOCK_M
        is_first = index >= high_before
        if not is_first:
            while gl.atomic_add(turn, 0, sem="acquire") != block:
                pass
        mbarrier.wait(dq_full.index(0), count & 1)
        if is_first:
            for part in gl.static_range(4):
                store_async(dq_desc, _place_of(at, part, SPLIT_ROWS), pieces.index(part))
        else:
            for part in gl.static_range(4):
                add_async(dq_desc, _place_of(at, part, SPLIT_ROWS), pieces.index(part))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(0))
        gl.atomic_xchg(turn, bulk_writes_done(block + 1), sem="release")


@gluon.jit(do_not_specialize=LENGTHS)
def _hopper_backward(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk, dv, turns, cu_seqlens_q, cu_seqlens_k,
    num_seqs, seqlen_q, seqlen_k, num_blocks, num_columns, num_kv_heads, group, section, stats_row,
    stride_dkb, stride_dkt, stride_dkh, scale, scale_log2, window_left, window_right,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """``num_warps`` must be 4: the warps that a program starts with are the first consumer."""
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_smem = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], tile_layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], tile_layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], tile_layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], tile_layout)
    ds_smem = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_M], tile_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 64, 64], gl.NVMMASharedLayout(128, 32, 2))
    line: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], line)
    lse_rows = view(lse_smem, gl.float32, [STAGES, BLOCK_M], flat)
    delta_rows = view(delta_smem, gl.float32, [STAGES, BLOCK_M], flat)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(cleared.index(0), count=2)
    mbarrier.init(dq_full.index(0), count=2)
    mbarrier.init(dq_empty.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
    fence_async_shared()

    # Tickets, not program ids: a program waits for those of earlier tickets, which have started.
    ticket = gl.atomic_add(turns, 1, sem="relaxed")
    first_column = ticket // (num_blocks * section) * section
    columns = gl.minimum(section, num_columns - first_column)
    rest = ticket % (num_blocks * section)
    column = first_column + rest % columns
    place = rest // columns
    kv_head = column % num_kv_heads
    batch = column // num_kv_heads
    if VARLEN:
        seq = find_sequence(cu_seqlens_k, place, num_seqs, 128)
        k_start = gl.load(cu_seqlens_k + seq)
        num_keys = gl.load(cu_seqlens_k + seq + 1) - k_start
        q_start = gl.load(cu_seqlens_q + seq)
        num_queries = gl.load(cu_seqlens_q + seq + 1) - q_start
        first_key = (place - (k_start // 128 + seq)) * 128
        first_slot = (q_start // BLOCK_M + seq) * BLOCK_M
    else:
        k_start = place * 0
        q_start = place * 0
        num_keys = seqlen_k + k_start
        num_queries = seqlen_q + k_start
        first_key = place * 128
        first_slot = place * 0
    low, high = _query_blocks(
        first_key, num_queries, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, 128
    )
    _low_before, high_before = _query_blocks(
        first_key - 128, num_queries, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, 128
    )
    high_before = gl.where(first_key == 0, 0, high_before)
    high = gl.where(first_key < num_keys, high, low)
    work = (
        batch, kv_head, group, first_key, q_start, num_queries, k_start, num_keys, low, high, high_before, first_slot
    )  # fmt: skip
    barriers = (kv_full, q_full, q_empty, do_full, do_empty, ds_full, dq_full, dq_empty, cleared)
    smem = (k_smem, v_smem, q_smem, do_smem, ds_smem, dq_smem, lse_rows, delta_rows)
    tensors = (
        dk, dv, smem, barriers, stride_dkb, stride_dkt, stride_dkh, scale, scale_log2, window_left, window_right
    )  # fmt: skip
    loads = (
        q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc,
        (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem), barriers, num_kv_heads,
    )  # fmt: skip
    stores = (dq_desc, turns, dq_smem, dq_full, dq_empty, num_kv_heads, stats_row)
    options: gl.constexpr = (
        HEAD_DIM, BLOCK_M, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume_keys, (tensors, work, 0, options)), (consume_keys, (tensors, work, 1, options)),
            (_produce, (loads, work, options)), (_write, (stores, work, options)),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


LAYOUT = gl.NVMMASharedLayout(128, 16, 4)
LINE = gl.NVMMASharedLayout(0, 32, 2)
SUMS = gl.NVMMASharedLayout(128, 32, 2)
"""Of tiles that TMA copies: rows, lse and delta, dq."""
L2_BUDGET = 32 * 2**20
"""Bytes of queries, output gradients and dq that programs work on at a time."""
_backward = Launches()


class _Prepared(NamedTuple):
    """Of a backward pass: its launches, the numbers of their float32 memory where delta and dq's sums begin and where
    it ends, and the numbers of turns."""

    series: Series
    delta: int
    sums: int
    size: int
    turns: int


def hopper_backward_launch(
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
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments and results of ``flash_attention_backward_launch``, without softcap and sinks; not empty."""
    tensors = (q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k)
    options = window_left, window_right, scale
    key = (*[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors], *options)
    prepared = _backward.get(key)
    if prepared is None or dout.data_ptr() % 16:
        read = _readable(out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k)
        if any(a is not b for a, b in zip(read, tensors[3:])):
            return hopper_backward_launch(q, k, v, *read, *options)
        prepared = _backward.keep(key, _prepare(*tensors, *options))
    dq, dk, dv = new_like(q), new_like(k), new_like(v)
    # lse in base 2, delta, and dq's sums, one after the other.
    memory = q.new_empty(prepared.size, dtype=torch.float32)
    # A ticket, and for each block of queries the block of keys whose turn it is.
    turns = q.new_zeros(prepared.turns, dtype=torch.int32)
    at = memory.data_ptr()
    given = [x for x in (*tensors, dq, dk, dv, turns) if x is not None]
    pointers = [x.data_ptr() for x in given]
    with device_guard(q):
        if not prepared.series.start([*pointers, at, at + 4 * prepared.delta, at + 4 * prepared.sums]):
            prepared.series.start_on([*given, memory, memory[prepared.delta :], memory[prepared.sums :]])
    return dq, dk, dv, None


def _readable(
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The tensors as kernels read them: dout by TMA, others element by element; themselves where they lie so."""
    out, dout = contiguous_rows(out), contiguous_rows(dout)
    if dout.data_ptr() % 16 or not is_in_sixteens(dout.stride(), dout.element_size()):
        dout = dout.clone(memory_format=torch.contiguous_format)
    return out, lse.contiguous(), dout, contiguous(dlse), contiguous(cu_seqlens_q), contiguous(cu_seqlens_k)


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
    window_left: int | None,
    window_right: int | None,
    scale: float,
) -> _Prepared:
    """Row sums, the kernel of keys, dq out of its sums."""
    varlen = cu_seqlens_q is not None
    tensors = dict(
        q=q, k=k, v=v, out=out, lse=lse, dout=dout, dlse=dlse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    places = Places([name for name, x in tensors.items() if x is not None], "dq dk dv turns lse_log2 delta sums")
    dq, dk, dv = (x.new_empty(x.shape, device="meta") for x in (q, k, v))
    if varlen:
        # One batch whose tokens cu_seqlens divides: [1, T, H, D] and [1, H, T].
        q, k, v, out, dout, dq, dk, dv, lse = (x.unsqueeze(0) for x in (q, k, v, out, dout, dq, dk, dv, lse))
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_kv_heads = k.shape[1:3]
    num_seqs = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else batch
    rows = HOPPER_BACKWARD_ROWS[head_dim]
    num_blocks = count_blocks(rows, seqlen_q, num_seqs, varlen)
    slots = num_blocks * rows
    lines, sums = (torch.empty(batch * num_heads, slots, *x, device="meta") for x in ((), (head_dim,)))
    q_tile, dout_tile = (Tile(x, x.shape, x.stride(), (1, rows, 1, 64), LAYOUT) for x in (q, dout))
    k_tile, v_tile = (Tile(x, x.shape, x.stride(), (1, 64, 1, 64), LAYOUT) for x in (k, v))
    line_tile = Tile(lines, lines.shape, lines.stride(), (1, rows), LINE)
    sums_rows = sums.flatten(0, 1)
    sums_tile = Tile(sums_rows, sums_rows.shape, sums_rows.stride(), (64, 32), SUMS)
    columns = num_kv_heads * batch
    section = max(1, min(columns, L2_BUDGET // (8 * head_dim * seqlen_q)))
    key_blocks = count_blocks(128, seqlen_k, num_seqs, varlen)
    windows = window_left or 0, window_right or 0
    flags = dict(HAS_LEFT=window_left is not None, HAS_RIGHT=window_right is not None)
    sum_rows = Launch(
        row_sums, (num_blocks * num_heads, 1, batch),
        out, dout, lse, dlse, lines, lines, None, cu_seqlens_q, num_seqs, num_heads, seqlen_q, 0,
        out.stride()[:3], dout.stride()[:3], *lse.stride()[:2], (num_heads * slots, slots),
        V_DIM=head_dim, BLOCK_M=rows, BLOCK_DV=head_dim, VARLEN=varlen, HAS_DLSE=dlse is not None, ALIGN=rows,
    )  # fmt: skip
    keys = Launch(
        _hopper_backward, (key_blocks * columns,),
        q_tile, k_tile, v_tile, dout_tile, line_tile, line_tile, sums_tile, dk, dv, lines, cu_seqlens_q, cu_seqlens_k,
        num_seqs, seqlen_q, seqlen_k, key_blocks, columns, num_kv_heads, num_heads // num_kv_heads, section, slots,
        *dk.stride()[:3], scale, scale * LOG2_E, *windows,
        HEAD_DIM=head_dim, BLOCK_M=rows, STAGES=2, VARLEN=varlen, **flags, num_warps=4,
    )  # fmt: skip
    finish = Launch(
        finish_queries, (num_blocks * num_heads, 1, batch),
        sums, dq, cu_seqlens_q, cu_seqlens_k, num_seqs, num_heads, seqlen_q, seqlen_k, 0,
        (num_heads * slots * head_dim, slots * head_dim), dq.stride()[:3], scale, *windows,
        HEAD_DIM=head_dim, BLOCK_M=rows, VARLEN=varlen, **flags,
    )  # fmt: skip
    series = Series(
        (sum_rows, places("out dout lse dlse lse_log2 delta cu_seqlens_q")),
        (keys, places("q k v dout lse_log2 delta sums dk dv turns cu_seqlens_q cu_seqlens_k")),
        (finish, places("sums dq cu_seqlens_q cu_seqlens_k")),
    )
    stats = lines.numel()
    return _Prepared(series, stats, 2 * stats, (2 + head_dim) * stats, 4 + batch * num_heads * num_blocks)
