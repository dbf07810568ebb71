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

What a program does next is in ``hopper_scheduler_gluon``, the copies are in ``hopper_producer_gluon``, the consumers in
``hopper_consumer_gluon``; the kernel that puts them together and its launches are here.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..backend import contiguous, contiguous_rows, device_guard, layout, new_like
from ..dependent_launch_triton import has_dependent_launch
from ..launch_triton import Launch, Launches, Part, Tile, new_counter
from ..settings import (
    ITEM_NUMBERS,
    LOG2_E,
    SHORT_QUERY,
    HopperSettings,
    cdiv,
    hopper_settings,
    max_split_items,
    max_splits,
    multiprocessors,
    next_power_of_2,
)
from .hopper_consumer_gluon import consume
from .hopper_producer_gluon import produce
from .hopper_scheduler_gluon import schedule
from .split_plan_triton import empty_partials, make_split_plan_launch, prepare_merge

LENGTHS = [
    "num_tiles", "num_seqs", "seqlen_q", "seqlen_k", "num_blocks", "num_heads", "l2_section", "stride_table",
    "stride_lb", "stride_lt", "stride_lh", "window_left", "window_right", "can_prefetch_kv",
]  # fmt: skip
"""Arguments whose value must not cause another compilation."""


@gluon.jit(do_not_specialize=LENGTHS)
def _hopper_forward(
    q_desc, k_desc, v_desc, out, lse, sinks, partials, partial_lse, cu_seqlens_q, cu_seqlens_k, seq_lens,
    page_table, items, num_items, tile_counter,
    num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, l2_section, stride_table,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh,
    scale_log2, softcap, window_left, window_right, can_prefetch_kv,
    MODE: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    PINGPONG: gl.constexpr, FULL_WEIGHTS: gl.constexpr,
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
    if PINGPONG:
        pingpong_barriers = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(pingpong_barriers.index(i), count=1)
    else:
        pingpong_barriers = q_full  # No warp waits for it.
    fence_async_shared()

    queue = (notes, note_full, note_empty)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, pingpong_barriers)
    lengths = (cu_seqlens_q, cu_seqlens_k, seq_lens, items, num_items)
    work = (
        num_tiles, num_seqs, seqlen_q, seqlen_k, num_blocks, num_heads, l2_section, window_left, window_right,
        can_prefetch_kv,
    )  # fmt: skip
    strides = (stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh)
    tensors = (
        out, lse, sinks, partials, partial_lse, q_smem, k_smem, v_smem, barriers, queue, num_heads, strides,
        scale_log2, softcap, window_left, window_right,
    )  # fmt: skip
    keys = (q_desc, k_desc, page_table, stride_table, can_prefetch_kv, q_smem, k_smem, barriers, queue)
    values = (q_desc, v_desc, page_table, stride_table, can_prefetch_kv, q_smem, v_smem, barriers, queue)
    options: gl.constexpr = (
        MODE, GROUP, PACK, PAGE_SIZE, HEAD_DIM, BLOCK_N, STAGES, Q_STAGES, CONSUMERS,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SINKS, PINGPONG, FULL_WEIGHTS,
    )  # fmt: skip
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (tensors, 0, options)), (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, tile_counter, options)),
            ],
            [1, 1, 1], [40, 40, 40],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, 0, options)), (consume, (tensors, 1, options)),
                (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, tile_counter, options)),
            ],
            [4, 1, 1, 1], [240, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, 0, options)), (consume, (tensors, 1, options)), (consume, (tensors, 2, options)),
                (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, tile_counter, options)),
            ],
            [4, 4, 1, 1, 1], [160, 160, 24, 24, 24],
        )  # fmt: skip


TILE_ROWS = 64
"""Query rows of one consumer warp group: the M of wgmma."""
L2_BUDGET = 32 * 2**20
"""Bytes of keys and values that programs work on at a time."""
ANY = 2**31 - 1
"""Size of the page axis in a descriptor. A pool may grow under a captured graph, so its size is not part of it."""
LAYOUT = gl.NVMMASharedLayout(128, 16, 4)
"""Of a tile that TMA copies."""
_flash, _paged = Launches(), Launches()


def _prepare(
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
    counter: torch.Tensor,
    max_items: int = 0,
    partials: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    can_prefetch_kv: bool = False,
) -> Launch:
    """The launch on ``q [B, L, Hq, D]`` (packed: B is 1).

    It is called with ``q, *k, out, lse, sinks, *partials, *lengths``, and a counter or three times the plan.

    Args:
        k: keys and values, ``[B, Lk, Hk, D]`` or pages ``[num_pages, Hk, page_size, D]``.
        out: like q, written; ``lse`` float32 ``[B, Hq, L]`` or ``[Hq, T]``, written.
        mode: "dense", "varlen", "paged", or "split" with a plan.
        lengths: cu_seqlens_q, cu_seqlens_k, seq_lens, page_table; int32, None where the mode has none.
        group: query heads per key/value head; ``pack`` rows of a tile stand for them, 1: a head has tiles of its own.
        num_blocks: upper bound of the blocks of query rows of a head (of a sequence, if dense).
        kv_tokens: upper bound of the tokens of a head's keys, for the share of the L2 cache.
        counter: zeros, or the plan ("split").
        max_items: of the plan.
        partials: ``empty_partials`` of the plan.
        can_prefetch_kv: of the plan, see ``paged_attention_op``.
    """
    s = settings
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    paged, split = mode in ("paged", "split"), mode == "split"
    num_heads = num_q_heads if pack == 1 else num_q_heads // group
    cu_seqlens_q, cu_seqlens_k, seq_lens, page_table = lengths
    num_seqs = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    q_desc = Tile(q, q.shape, q.stride(), (1, TILE_ROWS // pack, pack, 64), LAYOUT)
    page_size = k[0].shape[2] if paged else s.block_n
    chunk = min(page_size, s.block_n)
    kv_block = (1, 1, chunk, 64) if paged else (1, chunk, 1, 64)
    k_desc, v_desc = (
        Tile(x, (ANY, *x.shape[1:]) if paged else x.shape, x.stride(), kv_block, LAYOUT) for x in k
    )
    columns = num_heads * (batch if mode == "dense" else 1)
    l2_section = max(1, min(columns, L2_BUDGET // max(1, 4 * head_dim * kv_tokens // (group if pack == 1 else 1))))
    num_tiles = max_items * num_heads if split else num_blocks * columns
    programs = multiprocessors(q.device) * s.programs_per_sm
    plan = (Part(counter, 4), counter, Part(counter, 1)) if split else (None, None, counter)
    scale_log2 = scale * LOG2_E if softcap is None else 2.0 * scale / softcap * LOG2_E
    return Launch(
        _hopper_forward, (min(programs, num_tiles),),
        q_desc, k_desc, v_desc, out, lse, sinks, *partials, cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, *plan,
        num_tiles, num_seqs, seqlen_q, k[0].shape[1], num_blocks, num_heads, l2_section,
        0 if page_table is None else page_table.stride(0), *out.stride()[:3],
        lse.stride(0) if mode == "dense" else 0, lse.stride(-1), lse.stride(-2),
        scale_log2, softcap or 0.0, window_left or 0, window_right or 0, int(can_prefetch_kv),
        MODE=mode, GROUP=group, PACK=pack, PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_N=s.block_n,
        STAGES=s.stages, Q_STAGES=s.q_stages, CONSUMERS=s.consumers, HAS_LEFT=window_left is not None,
        HAS_RIGHT=window_right is not None, HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        PINGPONG=s.pingpong, FULL_WEIGHTS=s.full_weights,
        num_warps=4, maxnreg=s.max_registers, launch_pdl=split and has_dependent_launch(q.device),
    )  # fmt: skip


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
    cu_seqlens_q, cu_seqlens_k, sinks = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), contiguous(sinks)
    packed = cu_seqlens_q is not None
    out = new_like(q)
    lse = q.new_empty(
        (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32
    )
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)
    key = (
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors],
        max_seqlen_q, window_left, window_right, softcap, scale, settings,
    )  # fmt: skip
    forward = _flash.get(key)
    if forward is None:
        if out.numel() == 0:
            return out, lse
        if k.numel() == 0:
            lse.fill_(float("-inf"))
            if sinks is not None:
                lse.copy_(sinks[:, None])
            return out.zero_(), lse
        s = settings or hopper_settings(q.shape[-1], max_seqlen_q)
        block_m = TILE_ROWS * s.consumers
        q4, k4, v4, out4 = (x[None] if packed else x for x in (q, k, v, out))
        if cu_seqlens_q is None:
            num_blocks = cdiv(q.shape[1], block_m)
        else:
            num_blocks = q.shape[0] // block_m + cu_seqlens_q.shape[0] - 1
        forward = _flash.keep(key, _prepare(
            q4, (k4, v4), out4, lse, "varlen" if packed else "dense", (cu_seqlens_q, cu_seqlens_k, None, None),
            window_left, window_right, softcap, sinks, scale, s, q.shape[-2] // k.shape[-2], 1, num_blocks, k4.shape[1],
            lse,
        ))  # fmt: skip
    with device_guard(q):
        forward(q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k, new_counter(q.device))
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
    can_prefetch_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over pages; see ``paged_attention_launch``, and ``paged_attention_op`` for ``can_prefetch_kv``."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    seq_lens, cu_seqlens_q, sinks = seq_lens.contiguous(), cu_seqlens_q.contiguous(), contiguous(sinks)
    # A copy is made now: it cannot be read before.
    can_prefetch_kv = can_prefetch_kv and plan is not None and plan.is_contiguous() and page_table.stride(-1) == 1
    page_table = contiguous_rows(page_table)
    step = prepare_paged(
        q, k_pages, v_pages, out, lse, page_table, seq_lens, cu_seqlens_q, max_query_len, window_left, window_right,
        softcap, sinks, scale, settings, can_prefetch_kv,
    )  # fmt: skip
    max_tokens = page_table.shape[1] * k_pages.shape[2]
    with device_guard(q):
        if step.max_partials == 0:
            counter = new_counter(q.device)
            step.forward(q, k_pages, v_pages, out, lse, sinks, cu_seqlens_q, seq_lens, page_table, counter)
            return out, lse
        if plan is None:
            plan = make_split_plan_launch(seq_lens, cu_seqlens_q, max_tokens, window_left)
        plan = plan.contiguous()
        partials, partial_lse = empty_partials(out, step.max_partials, k_pages.shape[1], step.pack, q.shape[2])
        step.forward(
            q, k_pages, v_pages, out, lse, sinks, partials, partial_lse, cu_seqlens_q, seq_lens, page_table, *[plan] * 3
        )
        if step.merge is not None:
            step.merge(partials, partial_lse, plan, cu_seqlens_q, sinks, out, lse)
    return out, lse


def prepare_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    settings: HopperSettings | None = None,
    can_prefetch_kv: bool = False,
) -> "PagedLaunches":
    """The launches of :func:`hopper_paged_launch` for tensors like these."""
    key = (
        layout(q), layout(k_pages), layout(v_pages), layout(page_table), layout(seq_lens), layout(cu_seqlens_q),
        layout(sinks), max_query_len, window_left, window_right, softcap, scale, settings, can_prefetch_kv,
    )  # fmt: skip
    step = _paged.get(key)
    if step is None:
        step = _paged.keep(key, _prepare_pages(
            q, (k_pages, v_pages), out, lse, page_table, seq_lens, cu_seqlens_q, max_query_len, window_left,
            window_right, softcap, sinks, scale, settings, can_prefetch_kv,
        ))  # fmt: skip
    return step


@dataclass(frozen=True, slots=True)
class PagedLaunches:
    """Of a step over pages: its launches, the rows that stand for a key/value head's queries, and the most partials of
    a sequence; 0 without a plan."""

    forward: Launch
    merge: Launch | None
    pack: int
    max_partials: int


def _prepare_pages(
    q: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    settings: HopperSettings | None,
    can_prefetch_kv: bool,
) -> PagedLaunches:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = pages[0].shape[1:3]
    group = num_q_heads // num_kv_heads
    pack = next_power_of_2(group)
    num_seqs, max_tokens = seq_lens.shape[0], page_table.shape[1] * page_size
    split = max_query_len * pack <= TILE_ROWS and max_query_len <= SHORT_QUERY
    s = settings or hopper_settings(head_dim, max_query_len, split, max_tokens)
    max_partials = max_splits(max_tokens) if split else 0
    # seq_lens stands for the plan, or the counter: a launch keeps no memory.
    partials = empty_partials(out, max_partials, num_kv_heads, pack, head_dim) if split else (None, None)
    forward = _prepare(
        q[None], pages, out[None], lse, "split" if split else "paged", (cu_seqlens_q, None, seq_lens, page_table),
        window_left, window_right, softcap, sinks, scale, s, group, pack,
        num_tokens // (TILE_ROWS * s.consumers // pack) + num_seqs, max_tokens, seq_lens,
        max_split_items(num_seqs, max_tokens), partials, can_prefetch_kv,
    )  # fmt: skip
    merge = None
    if split and max_partials > 1:
        assert partials[0] is not None
        first = 4 + ITEM_NUMBERS * max_split_items(num_seqs, max_tokens)
        merge = prepare_merge(
            partials[0], partials[1], Part(seq_lens, first), max_partials, cu_seqlens_q, sinks, out, lse, group, pack
        )
    return PagedLaunches(forward, merge, pack, max_partials)
