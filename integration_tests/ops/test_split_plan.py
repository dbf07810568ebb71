"""The split plan and the merge of partials: kernels (in the interpreter on CPU) against plain Python and float64."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, error, prefix_sums
from hf_paged_kernels import make_split_plan
from hf_paged_kernels.attention.ops import split_plan_op
from hf_paged_kernels.attention.split_plan_triton import (
    SplitPlan,
    empty_partials,
    make_split_plan_launch,
    merge_partials_launch,
)
from hf_paged_kernels.settings import ITEM_NUMBERS, SHORTEST_SPLIT, max_split_items, split_plan_size

MIXES = [
    ([1], [1]),
    ([256], [1]),
    ([257, 0, 3000, 1, 255, 512], [1, 0, 1, 1, 4, 1]),
    ([70_000, 17, 9000, 8192, 8193, 600], [1, 1, 3, 1, 1, 0]),
    ([0, 0], [0, 0]),
    ([600, 1024, 1025, 40_000, 5, 300], [8, 16, 9, 16, 12, 7]),
    ([3000, 500, 2000, 1040, 4000, 900], [1, 16, 1, 16, 1, 1]),
]


def parts_of(plan: torch.Tensor, num_seqs: int, max_tokens: int):
    """``(items, sequences)`` as lists; what follows the items that count is not looked at."""
    view = SplitPlan.of(plan, num_seqs, max_tokens)
    count = int(view.num_items)
    items = view.items.view(-1, ITEM_NUMBERS)[:count].tolist()
    return items, view.sequences.view(-1, 2).tolist()


@pytest.mark.parametrize(("seq_lens", "q_lens"), MIXES, ids=str)
@pytest.mark.parametrize("window_left", [None, 0, 300, 5000])
def test_the_plan_cuts_every_sequence_once(poison, seq_lens, q_lens, window_left):
    num_seqs, max_tokens = len(seq_lens), 80_000
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    cu = prefix_sums(q_lens, DEVICE)
    plan = make_split_plan_launch(lens, cu, max_tokens, window_left)
    assert plan.shape == (split_plan_size(num_seqs, max_tokens),)
    items, sequences = parts_of(plan, num_seqs, max_tokens)
    assert len(items) <= max_split_items(num_seqs, max_tokens)
    # Places are the numbers 0, 1, 2 ..., one run per sequence, in the order of its splits, one for each query.
    places = [item[2] + i for item in items for i in range(item[5])]
    assert sorted(places) == list(range(len(places)))
    weights = []
    for seq, split, place, *of_seq in items:
        first, count = sequences[seq]
        assert of_seq == [count, sum(q_lens[:seq]), q_lens[seq], seq_lens[seq], 0]
        length = next(
            (n for n in (256, 512, 1024) if seq_lens[seq] <= 16 * n and (q_lens[seq] < 8 or n == 1024)),
            max(1024, 2 ** (-(-seq_lens[seq] // 32) - 1).bit_length()),
        )
        weights.append(min(seq_lens[seq], (split + 1) * length) - split * length)
        behind = 0 if window_left is None else max(0, seq_lens[seq] - q_lens[seq] - window_left) // length
        assert place - first == (split - behind) * q_lens[seq]
    for seq, (count, query_len) in enumerate(zip((c for _, c in sequences), q_lens)):
        assert sum(item[0] == seq for item in items) == count
        assert (count > 0) == (query_len > 0)
    # Full splits by falling length (up to 2,048 keys counted apart), long queries among the first of them, then tails.
    reference_items, reference_sequences = parts_of(
        split_plan_op(lens.cpu(), cu.cpu(), max_tokens, window_left), num_seqs, max_tokens
    )
    assert items == reference_items
    assert sequences == reference_sequences


def test_many_sequences():
    lens = torch.randint(1, 5000, (700,), dtype=torch.int32)
    cu = torch.arange(701, dtype=torch.int32)
    got = parts_of(make_split_plan_launch(lens.to(DEVICE), cu.to(DEVICE), 5000, None), 700, 5000)
    assert got == parts_of(split_plan_op(lens, cu, 5000, None), 700, 5000)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("group", "pack"), [(1, 1), (4, 4), (7, 8)], ids=str)
def test_partials_add_up(poison, group, pack, sinks):
    """Partials of a softmax, cut anywhere, give the whole; rows of sequences with one split are not touched."""
    seq_lens, q_lens, kv_heads, dim = [600, 40, 900, 300, 700], [1, 1, 1, 5, 2], 2, 16
    lens, cu = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE), prefix_sums(q_lens, DEVICE)
    num_seqs, tokens = len(seq_lens), sum(q_lens)
    plan = SplitPlan.of(make_split_plan_launch(lens, cu, 1000, None), num_seqs, 1000)
    # A token behind the last query is nobody's.
    out = torch.full((tokens + 1, kv_heads * group, dim), float("nan"), device=DEVICE)
    lse = torch.full((kv_heads * group, tokens + 1), float("nan"), device=DEVICE)
    partials, partial_lse = (x.fill_(float("nan")) for x in empty_partials(out, plan.max_partials, kv_heads, pack, dim))
    scores = [torch.randn(kv_heads, n * pack, keys, dtype=torch.float64) * 3 for n, keys in zip(q_lens, seq_lens)]
    values = [torch.randn(kv_heads, n, dim, dtype=torch.float64) for n in seq_lens]
    for seq, split, place in plan.items.view(-1, ITEM_NUMBERS)[: int(plan.num_items), :3].tolist():
        rows = q_lens[seq] * pack
        for head in range(kv_heads):
            s = scores[seq][head, :, split * SHORTEST_SPLIT : (split + 1) * SHORTEST_SPLIT]
            top = s.max(1).values
            weights = (s - top[:, None]).exp()
            slot = place * kv_heads * pack + head * rows
            partials[slot : slot + rows] = (
                weights @ values[seq][head, split * SHORTEST_SPLIT : (split + 1) * SHORTEST_SPLIT]
            ).to(partials)
            partial_lse[slot : slot + rows] = torch.stack([top * 1.4426950408889634, weights.sum(1)], 1).to(partial_lse)
    heads = kv_heads * group
    sink = torch.randn(heads, device=DEVICE) if sinks else None
    merge_partials_launch(partials, partial_lse, plan, cu, sink, out, lse, group, pack)
    assert bool(out[[1, tokens]].isnan().all())
    # With room for more partials another kernel does it, to the same bits.
    roomy, same_out, same_lse = replace(plan, max_partials=32), out * float("nan"), lse * float("nan")
    merge_partials_launch(partials, partial_lse, roomy, cu, sink, same_out, same_lse, group, pack)
    written = [0, *range(2, tokens)]
    assert torch.equal(same_out[written], out[written])
    assert torch.equal(same_lse[:, written], lse[:, written])
    for seq, first in ((0, 0), (2, 2), (3, 3), (4, 8)):
        for token in range(q_lens[seq]):
            for head in range(heads):
                s = scores[seq][head // group, token * pack + head % group]
                if sink is not None:
                    s = torch.cat([s, sink[head].double().cpu().view(1)])
                expected = s.softmax(0)[: seq_lens[seq]] @ values[seq][head // group]
                assert error(out[first + token, head], expected) < 1e-5
                assert abs(float(lse[head, first + token]) - float(s.logsumexp(0))) < 1e-5


def test_partials_of_many_sequences_find_their_own(poison):
    """One query, none, or several of each of 100 sequences, two partials each: every token gets its own."""
    source = torch.Generator().manual_seed(0)
    q_lens = [1] * 40 + torch.randint(0, 6, (560 if DEVICE == "cuda" else 60,), generator=source).tolist()
    cu, num_seqs, tokens = prefix_sums(q_lens, DEVICE), len(q_lens), sum(q_lens)
    lens = torch.full((num_seqs,), 300, dtype=torch.int32, device=DEVICE)
    plan = SplitPlan.of(make_split_plan_launch(lens, cu, 512, None), num_seqs, 512)
    out = torch.full((tokens, 1, 16), float("nan"), device=DEVICE)
    lse = torch.full((1, tokens), float("nan"), device=DEVICE)
    partials, partial_lse = (x.fill_(float("nan")) for x in empty_partials(out, plan.max_partials, 1, 1, 16))
    values = torch.randn(tokens, 2, 16, generator=source).to(DEVICE)
    for seq, split, place, _, q_start, query_len in plan.items.view(-1, ITEM_NUMBERS)[
        : int(plan.num_items), :6
    ].tolist():
        partials[place : place + query_len] = values[q_start : q_start + query_len, split]
        partial_lse[place : place + query_len] = torch.tensor([0.0, 1.0], device=DEVICE)
        assert q_lens[seq] == query_len
    merge_partials_launch(partials, partial_lse, plan, cu, None, out, lse, 1, 1)
    assert torch.allclose(out[:, 0], values.mean(1), atol=1e-6)
    assert torch.allclose(lse, torch.full_like(lse, 2.0).log(), atol=1e-6)


@pytest.mark.parametrize("make", [make_split_plan_launch, split_plan_op])
def test_no_sequences(make):
    """No items, and no room for any."""
    plan = make(torch.zeros(0, dtype=torch.int32, device=DEVICE), prefix_sums([], DEVICE), 1000, None)
    assert plan.tolist() == [0] * split_plan_size(0, 1000)


def test_bad_arguments():
    lens, cu, table = torch.ones(2, dtype=torch.int32), prefix_sums([1, 1], "cpu"), torch.zeros(2, 4, dtype=torch.int32)
    assert make_split_plan(lens, cu, table, 16).dtype == torch.int32
    with pytest.raises(ValueError, match="page_size must be one of"):
        make_split_plan(lens, cu, table, 12)
    with pytest.raises(ValueError, match="same sequences"):
        make_split_plan(lens, cu, table[:1], 16)
    with pytest.raises(TypeError, match="seq_lens"):
        make_split_plan(lens.long(), cu, table, 16)
