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

What a program does next is in ``hopper_tiles_gluon``, the copies are in ``hopper_copies_gluon``, the consumers in
``hopper_arithmetic_gluon``; the kernel that puts them together and its launches are here.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..backend import contiguous, contiguous_rows, device_guard
from ..dependent_launch_triton import has_dependent_launch
from ..settings import LOG2_E, SHORT_QUERY, HopperSettings, hopper_settings, multiprocessors
from .hopper_consumer_gluon import consume
from .hopper_producer_gluon import produce
from .hopper_scheduler_gluon import schedule
from .split_plan_triton import SplitPlan, empty_parts, make_split_plan_launch, merge_parts_launch

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
                (consume, (tensors, 0, options)), (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, handed_out, options)),
            ],
            [1, 1, 1], [40, 40, 40],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (tensors, 0, options)), (consume, (tensors, 1, options)),
                (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, handed_out, options)),
            ],
            [4, 1, 1, 1], [240, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (tensors, 0, options)), (consume, (tensors, 1, options)), (consume, (tensors, 2, options)),
                (produce, (keys, 0, options)), (produce, (values, 1, options)),
                (schedule, (lengths, work, queue, handed_out, options)),
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
    cu_seqlens_q, cu_seqlens_k, sinks = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k), contiguous(sinks)
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
        lse.fill_(float("-inf"))
        if sinks is not None:
            lse.copy_(sinks[:, None])
        return out.zero_(), lse
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
    seq_lens, cu_seqlens_q, sinks = seq_lens.contiguous(), cu_seqlens_q.contiguous(), contiguous(sinks)
    # A copy is made now: what it holds is not settled.
    is_settled = is_settled and plan is not None and plan.is_contiguous() and page_table.stride(-1) == 1
    page_table = contiguous_rows(page_table)
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
        num_blocks, page_table.shape[1] * page_size, split_plan, is_settled,
    )  # fmt: skip
    return out, lse
