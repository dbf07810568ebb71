"""The work list of split-KV decode, made on the device once per step and shared by all layers of a window.

Each sequence's keys are cut into splits whose length depends on the sequence alone (``split_lengths``)::

    seq 0 (600 keys)     | 0 | 1 | 2.|                items = (2, 0) (2, 1) ... (0, 0) (0, 1)
    seq 1 (90 keys)      |0.|                                 then the tails: (0, 2) (1, 0) (2, 8)
    seq 2 (9,000 keys)   |   0   |   1   |   2  | ...

Long splits come first and tails last, so that programs that walk through the list end together. The splits of long
queries, runs of one prompt that see the same keys, are spread among the first whole splits of the others: while some
programs read the L2 cache, the rest keeps the memory busy. Splits behind a sliding window are left out. An item has
all numbers of a split, so that kernels look nothing up::

    sequence, split, place, partials of the sequence, its first query, its queries, its keys, 0

A split leaves a partial result (sums of weights and of weighted values, not normalised) for each of its queries, and
``place`` counts those of single queries. So what they take depends on the queries of a step together, be they one of
each sequence or 16 of some.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..backend import device_guard, layout
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import Launch, Launches, Part
from ..settings import (
    ITEM_NUMBERS,
    LONG_SHORT_QUERY,
    LONG_SPREAD,
    MAX_SPLITS,
    cdiv,
    max_split_items,
    max_splits,
    next_power_of_2,
    split_plan_size,
)

ITEM = tl.constexpr(ITEM_NUMBERS)
LONG_QUERY = tl.constexpr(LONG_SHORT_QUERY)
SPREAD = tl.constexpr(LONG_SPREAD)
FEW_PARTIALS = 8
"""Sequences that can have no more partials are merged by a smaller kernel."""
COUNTED = tl.constexpr(256)
"""Sequences that are looked at together for the one of a token."""
_plans, _merges = Launches(), Launches()
MERGED_ROWS = 2
"""Rows that a program merges: a warp for 128 columns of each."""


@triton.jit
def split_lengths(num_keys, query_len):
    """Keys of one split of each sequence: a function of its lengths, so that a row's sum never depends on the batch.

    256 keys, doubled up to 1,024 while there would be more than 16 splits, then while there would be more than 32. Of
    long queries 1,024 from the start: they come many at a time, as runs of one prompt, and have many rows to merge.
    """
    length = tl.where(query_len < LONG_QUERY, num_keys * 0 + 256, 1024)
    for _ in tl.static_range(2):
        length = tl.where((length < 1024) & (length * 16 < num_keys), length * 2, length)
    for _ in tl.static_range(16):
        length = tl.where(length * 32 < num_keys, length * 2, length)
    return length


@triton.jit
def _long_place(index, run):
    """Where the ``index``-th split of long queries is in the list: before the ``index``-th run of others."""
    return index * (run + 1)


@triton.jit
def _short_place(index, run, num_long):
    """Where the ``index``-th whole split of other queries is."""
    return index + tl.where(run > 0, tl.minimum(index // tl.maximum(run, 1) + 1, num_long), num_long)


@triton.jit
def _store_item(items, index, numbers, mask):
    for i in tl.static_range(ITEM):
        tl.store(items + ITEM * index + i, numbers[i], mask=mask)


@triton.jit
def load_item(items, index):
    """``(sequence, split, place, partials, first query, queries, keys)`` of an item."""
    numbers = ()
    for i in tl.static_range(ITEM - 1):
        numbers += (tl.load(items + ITEM * index + i),)
    return numbers


@triton.jit(do_not_specialize=["num_seqs", "max_items", "window_left"])
def _plan_splits(
    seq_lens,
    cu_seqlens_q,
    plan,
    num_seqs,
    max_items,
    window_left,
    HAS_LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. ``plan``: number of items, three zeros; items, see above; ``(place, partials)`` of each sequence."""
    seq = tl.arange(0, BLOCK)
    held = seq < num_seqs
    num_keys = tl.load(seq_lens + seq, mask=held, other=0)
    q_start = tl.load(cu_seqlens_q + seq, mask=held, other=0)
    query_len = tl.load(cu_seqlens_q + seq + 1, mask=held, other=0) - q_start
    length = split_lengths(num_keys, query_len)
    first = num_keys * 0
    if HAS_LEFT:
        first = tl.maximum(num_keys - query_len - window_left, 0) // length
    count = tl.where(query_len > 0, tl.cdiv(num_keys, length) - first, 0)
    # A sequence without keys still has rows to write.
    count = tl.where(query_len > 0, tl.maximum(count, 1), count)
    has_tail = (count > 0) & (num_keys % length != 0)
    num_full = count - has_tail.to(tl.int32)
    is_long = query_len >= LONG_QUERY
    tail = has_tail.to(tl.int32)
    # Of long queries: whole splits, then tails.
    long_full = tl.where(is_long, num_full, 0)
    long_tail = tl.where(is_long, tail, 0)
    num_long_full = tl.sum(long_full, 0)
    long_offset = tl.cumsum(long_full, 0) - long_full
    long_tail_offset = num_long_full + tl.cumsum(long_tail, 0) - long_tail
    num_long = num_long_full + tl.sum(long_tail, 0)
    # Of others: whole splits, the longest first; the tails come behind everything.
    offset = num_keys * 0
    num_short = tl.sum(offset, 0)
    for kind in tl.static_range(4):
        if kind == 0:
            mine = length >= 2048
        else:
            mine = length == 2048 // (2**kind)
        full = tl.where(mine & (query_len < LONG_QUERY), num_full, 0)
        offset = tl.where(mine, num_short + tl.cumsum(full, 0) - full, offset)
        num_short += tl.sum(full, 0)
    tail = tl.where(is_long, 0, tail)
    tail_offset = num_long + num_short + tl.cumsum(tail, 0) - tail
    num_items = num_long + num_short + tl.sum(tail, 0)
    # One of the long ones, then so many of the others: none where these are few.
    run = num_short // tl.maximum(num_long * SPREAD, 1)
    # Where a sequence's partials lie: one after the other, whatever the order of the work.
    place = tl.cumsum(count * query_len, 0) - count * query_len
    items = plan + 4
    tl.store(plan + seq, tl.where(seq == 0, num_items, 0), mask=seq < 4)
    none = num_keys * 0
    for split in range(0, tl.max(num_full, 0)):
        item = (seq, first + split, place + split * query_len, count, q_start, query_len, num_keys, none)
        index = tl.where(is_long, _long_place(long_offset + split, run), _short_place(offset + split, run, num_long))
        _store_item(items, index, item, split < num_full)
    item = (seq, first + num_full, place + num_full * query_len, count, q_start, query_len, num_keys, none)
    _store_item(items, tl.where(is_long, _long_place(long_tail_offset, run), tail_offset), item, has_tail)
    # Without any item, program 0 looks at an empty one.
    tl.store(items + seq, 0, mask=seq < tl.where(num_items == 0, ITEM, 0))
    sequences = items + ITEM * max_items
    tl.store(sequences + 2 * seq, place, mask=held)
    tl.store(sequences + 2 * seq + 1, count, mask=held)


@triton.jit
def _load_partials(
    partials, partial_lse, first, start, stride, num_partials, row, valid, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Maxima, sums and sums of values of CHUNK partials from ``first`` on, which are all asked for at once."""
    columns = tl.arange(0, BLOCK_D)
    maxima, sums, values = (), (), ()
    for i in tl.static_range(CHUNK):
        held = valid & (first + i < num_partials)
        place = start + tl.cast(first + i, tl.int64) * stride + row
        maxima += (tl.load(partial_lse + 2 * place, mask=held, other=float("-inf")),)  # type: ignore[assignment]
        sums += (tl.load(partial_lse + 2 * place + 1, mask=held, other=0.0),)  # type: ignore[assignment]
        values += (  # type: ignore[assignment]
            tl.load(
                partials + place[:, None] * HEAD_DIM + columns[None, :],
                mask=held[:, None] & (columns < HEAD_DIM)[None, :],
                other=0.0,
            ),
        )
    return maxima, sums, values


@triton.jit
def _sequence_of(cu_seqlens_q, token, num_seqs):
    """The sequence of a packed token. As long as each sequence has one, it is the token's number.

    Otherwise the sequences that begin up to there are counted: few loads, all at once, where a search waits for each.
    """
    is_within = token < num_seqs
    start = tl.load(cu_seqlens_q + token, mask=is_within, other=0)
    end = tl.load(cu_seqlens_q + token + 1, mask=is_within, other=0)
    seq = token
    if (start != token) | (end != token + 1):
        seq = token * 0 - 1
        for first in range(0, num_seqs, COUNTED):
            index = first + tl.arange(0, COUNTED)
            starts = tl.load(cu_seqlens_q + index, mask=index < num_seqs, other=2147483647)
            seq += tl.sum((starts <= token).to(tl.int32), 0)
    return seq


@triton.jit(do_not_specialize=["num_seqs", "stride_lh"])
def _merge_partials(
    partials,
    partial_lse,
    sequences,
    cu_seqlens_q,
    sinks,
    out,
    lse,
    num_seqs,
    stride_ot,
    stride_oh,
    stride_lh,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_PARTIALS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: some rows of a token and key/value head. Partials are added one after the other: the bits of a row
    depend on nothing but the row."""
    start_next(DEPENDENT)
    packed = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Loads that wait for one another are most of what this kernel costs: all of the plan at once, before the wait.
    seq = _sequence_of(cu_seqlens_q, packed, num_seqs)
    place = tl.load(sequences + 2 * seq)
    num_partials = tl.load(sequences + 2 * seq + 1)
    q_start = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - q_start
    wait_for_previous(DEPENDENT)
    if (num_partials <= 1) | (packed - q_start >= query_len):
        return  # its only split has written the result, or the token is behind the last one
    start = (tl.cast(place, tl.int64) * tl.num_programs(1) + kv_head * query_len + packed - q_start) * PACK
    stride = tl.num_programs(1) * query_len * PACK
    head = kv_head * GROUP + row
    valid = row < GROUP
    maxima, sums, values = _load_partials(
        partials, partial_lse, 0, start, stride, num_partials, row, valid, HEAD_DIM, BLOCK_D, CHUNK
    )
    # The largest maximum is the same in any order.
    partial = tl.arange(0, MOST_PARTIALS)
    places = start + tl.cast(partial, tl.int64)[None, :] * stride + row[:, None]
    all_maxima = tl.load(
        partial_lse + 2 * places, mask=valid[:, None] & (partial < num_partials)[None, :], other=float("-inf")
    )
    top = tl.max(all_maxima, 1)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = pivot * 0.0
    if HAS_SINKS:
        total = tl.exp2(sink - pivot)
    result = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, num_partials, CHUNK):
        if first > 0:
            maxima, sums, values = _load_partials(
                partials, partial_lse, first, start, stride, num_partials, row, valid, HEAD_DIM, BLOCK_D, CHUNK
            )
        for i in tl.static_range(CHUNK):
            weight = tl.exp2(maxima[i] - pivot)
            total += weight * sums[i]
            result += weight[:, None] * values[i]
    columns = tl.arange(0, BLOCK_D)
    safe = tl.where(total == 0.0, 1.0, total)
    token = tl.cast(packed, tl.int64)
    tl.store(
        out + (token * stride_ot + head * stride_oh)[:, None] + columns[None, :],
        (result / safe[:, None]).to(out.dtype.element_ty),
        mask=valid[:, None] & (columns < HEAD_DIM)[None, :],
    )
    row_lse = tl.where(total == 0.0, float("-inf"), (pivot + tl.log2(safe)) * 0.6931471805599453)
    tl.store(lse + head * stride_lh + token, row_lse, mask=valid)


def empty_partials(
    out: torch.Tensor, max_partials: int, num_kv_heads: int, pack: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the partials of the queries of ``out [T, Hq, D]``: ``partials`` and ``partial_lse`` of
    :func:`merge_partials_launch`."""
    rows = max_partials * out.shape[0] * num_kv_heads * pack
    return (
        out.new_empty(rows, head_dim, dtype=torch.float32),
        out.new_empty(rows, 2, dtype=torch.float32),
    )


def merge_partials_launch(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    plan: "SplitPlan",
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    group: int,
    pack: int,
) -> None:
    """Add up the partials of every sequence with more than one split.

    The plan is read ahead of the wait for the previous kernel: where that one lets the next start early
    (``dependent_launch_triton``), it must have waited itself before.

    A split at ``place`` of a sequence with ``n`` queries has its rows for a key/value head in a run of ``n * pack``,
    that head's among those of all heads, from ``(place * num_kv_heads + head * n) * pack`` on.

    Args:
        partials: float32 ``[rows, head_dim]``, unnormalised sums of weighted values.
        partial_lse: float32 ``[rows, 2]``, the maximum of the scores in base 2, and the sum of weights.
        out: ``[T, Hq, head_dim]``, written.
        lse: float32 ``[Hq, T]``, written.
        cu_seqlens_q: int32 ``[num_seqs + 1]``, contiguous, as ``sinks`` are: a copy made here would be read too early.
        group: query heads per key/value head; ``pack`` rows stand for them.
    """
    tensors = (partials, partial_lse, plan.sequences, cu_seqlens_q, sinks, out, lse)
    key = (*map(layout, tensors), plan.max_partials, group, pack)
    merge = _merges.get(key)
    if merge is None:
        merge = _merges.keep(key, prepare_merge(
            partials, partial_lse, plan.sequences, plan.max_partials, cu_seqlens_q, sinks, out, lse, group, pack
        ))  # fmt: skip
    with device_guard(out):
        merge(*tensors)


def prepare_merge(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    sequences: "torch.Tensor | Part",
    max_partials: int,
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    group: int,
    pack: int,
) -> Launch:
    """The launch of :func:`merge_partials_launch`, to be called with ``partials, partial_lse, sequences, cu_seqlens_q,
    sinks, out, lse``; ``sequences`` and ``max_partials`` are those of the plan."""
    head_dim = partials.shape[1]
    num_kv_heads = out.shape[1] // group
    block_d = next_power_of_2(head_dim)
    block_r = min(next_power_of_2(pack), MERGED_ROWS)
    is_few = max_partials <= FEW_PARTIALS
    return Launch(
        _merge_partials, (out.shape[0], num_kv_heads, cdiv(pack, block_r)),
        partials, partial_lse, sequences, cu_seqlens_q, sinks, out, lse, cu_seqlens_q.shape[0] - 1,
        *out.stride()[:2], lse.stride(0),
        GROUP=group, PACK=pack, BLOCK_R=block_r, HEAD_DIM=head_dim, BLOCK_D=block_d,
        MOST_PARTIALS=FEW_PARTIALS if is_few else MAX_SPLITS, CHUNK=FEW_PARTIALS if is_few else 2 * FEW_PARTIALS,
        HAS_SINKS=sinks is not None, num_warps=block_r * max(1, block_d // 128), **dependent_launch(out.device),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Views of the parts of a plan.

    Attributes:
        num_items: int32 ``[1]``.
        tile_counter: int32 ``[3]``, zeros: counters for the kernel that walks through the items, which leaves zeros
            again. So one launch at a time can use a plan.
        items: int32 ``[ITEM_NUMBERS * max_items]``, see above.
        sequences: int32 ``[2 * num_seqs]``: where a sequence's first partial lies, and their number.
        max_partials: upper bound of the partials of a sequence.
    """

    num_items: torch.Tensor
    tile_counter: torch.Tensor
    items: torch.Tensor
    sequences: torch.Tensor
    max_items: int
    max_partials: int

    @classmethod
    def of(cls, plan: torch.Tensor, num_seqs: int, max_tokens: int) -> "SplitPlan":
        """The parts of ``plan`` as made for these bounds."""
        plan = plan.contiguous()
        max_items = max_split_items(num_seqs, max_tokens)
        items, sequences = plan[4 : 4 + ITEM_NUMBERS * max_items], plan[4 + ITEM_NUMBERS * max_items :]
        return cls(plan[:1], plan[1:4], items, sequences, max_items, max_splits(max_tokens))


def make_split_plan_launch(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, max_tokens: int, window_left: int | None
) -> torch.Tensor:
    """The plan of a step: int32, see :class:`SplitPlan`.

    Args:
        seq_lens: int32 ``[num_seqs]``.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        max_tokens: upper bound of ``seq_lens``: the page table's width in tokens.
        window_left: the sliding window of the layers, None: they see everything.
    """
    seq_lens, cu_seqlens_q = seq_lens.contiguous(), cu_seqlens_q.contiguous()
    key = (layout(seq_lens), layout(cu_seqlens_q), max_tokens, window_left)
    known = _plans.get(key)
    if known is None:
        num_seqs = seq_lens.shape[0]
        size = split_plan_size(num_seqs, max_tokens)
        if num_seqs == 0:
            return seq_lens.new_zeros(size)
        block = max(32, next_power_of_2(num_seqs))
        known = _plans.keep(key, (size, Launch(
            _plan_splits, (1,),
            seq_lens, cu_seqlens_q, seq_lens, num_seqs, max_split_items(num_seqs, max_tokens), window_left or 0,
            HAS_LEFT=window_left is not None, BLOCK=block, num_warps=4 if block <= 1024 else 8,
        )))  # fmt: skip
    size, make = known
    plan = seq_lens.new_empty(size)
    with device_guard(seq_lens):
        make(seq_lens, cu_seqlens_q, plan)
    return plan
