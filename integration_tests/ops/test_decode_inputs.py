"""decode_inputs and decode_rows: kernels and references against a loop in plain Python."""

import pytest
import torch
from hf_paged_kernels.layers import decode_inputs_triton
from hf_paged_kernels.layers.decode_inputs_triton import decode_inputs_launch, decode_rows_launch
from hf_paged_kernels.layers.ops import decode_inputs_op, decode_rows_op
from hf_paged_kernels.layers.reference import decode_inputs_reference, decode_rows_reference

pytestmark = pytest.mark.quick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
NUM_SLOTS = 300


def tables():
    """``computed``, ``last_token`` of 300 slots and one without tokens."""
    computed = torch.randint(0, 500, (NUM_SLOTS + 1,))
    computed[7], computed[-1] = 0, -1
    return computed, torch.randint(0, 50_000, (NUM_SLOTS + 1,))


@both
@pytest.mark.parametrize("num_rows", [0, 1, 3, 128, 290])
def test_decode_inputs(triton, num_rows):
    computed, last_token = tables()
    slots = torch.randperm(NUM_SLOTS)[:num_rows]
    slots[2::5] = NUM_SLOTS
    device_computed = computed.to(DEVICE, copy=True)
    run = decode_inputs_launch if triton else decode_inputs_reference
    ids, positions, seq_lens = run(slots.to(DEVICE), device_computed, last_token.to(DEVICE))
    before, tokens = computed.tolist(), last_token.tolist()
    assert ids.tolist() == [tokens[s] for s in slots.tolist()]
    assert positions.tolist() == [max(0, before[s]) for s in slots.tolist()]
    assert seq_lens.tolist() == [before[s] + 1 for s in slots.tolist()]
    assert (ids.dtype, positions.dtype, seq_lens.dtype) == (torch.int64, torch.int64, torch.int32)
    ran = set(slots.tolist()) - {NUM_SLOTS}
    assert device_computed.tolist() == [n + (s in ran) for s, n in enumerate(before)]


@both
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("block", [1, 8, 1024])
def test_decode_rows(triton, page_size, block, monkeypatch):
    """Lengths at and around the ends of pages and of the blocks in which entries are copied."""
    monkeypatch.setattr(decode_inputs_triton, "PAGES", block)
    lengths = [1, 15, 16, 17, 0, 8 * page_size, 8 * page_size + 1, 0]
    slots = torch.tensor([4, 0, 9, 2, 11, 3, 5, 11])
    width = -(-max(lengths) // page_size) + 2
    # Page ids that int32 arithmetic would overflow on the way to a slot.
    table = torch.randint(2**28, 2**29, (12, width), dtype=torch.int32)
    run = decode_rows_launch if triton else decode_rows_reference
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    rows, mapping = run(slots.to(DEVICE), seq_lens.to(DEVICE), table.to(DEVICE), page_size)
    assert rows.shape == (8, width)
    assert (rows.dtype, mapping.dtype) == (torch.int32, torch.int64)
    for i, (slot, length) in enumerate(zip(slots.tolist(), lengths)):
        num_pages = -(-length // page_size)
        assert rows[i, :num_pages].tolist() == table[slot, :num_pages].tolist()
        last = length - 1
        expected = -1 if length == 0 else int(table[slot, last // page_size]) * page_size + last % page_size
        assert int(mapping[i]) == expected


def test_the_ops():
    computed, last_token = (x.to(DEVICE) for x in tables())
    slots = torch.tensor([3, 7, 1], device=DEVICE)
    torch.library.opcheck(decode_inputs_op.op, (slots, computed, last_token))
    table = torch.randint(0, 99, (NUM_SLOTS + 1, 40), dtype=torch.int32, device=DEVICE)
    if DEVICE == "cpu":
        # On a device entries beyond a row's pages are undefined, which the check would compare.
        seq_lens = torch.tensor([5, 0, 70], dtype=torch.int32)
        torch.library.opcheck(decode_rows_op.op, (slots, seq_lens, table, 16))


@pytest.mark.gpu
def test_steps_in_a_graph_on_a_gpu():
    """Each replay is the next step: lengths grow, and rows reach into their next pages."""
    computed, last_token = (x.to(DEVICE) for x in tables())
    table = torch.randint(0, 2**20, (NUM_SLOTS + 1, 40), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(NUM_SLOTS, device=DEVICE)[:200]
    slots[::9] = NUM_SLOTS
    decode_rows_op(slots, decode_inputs_op(slots, computed.clone(), last_token)[2], table, 16)
    expected = computed.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, positions, seq_lens = decode_inputs_op(slots, computed, last_token)
        rows, mapping = decode_rows_op(slots, seq_lens, table, 16)
    for _ in range(40):
        graph.replay()
        same = decode_inputs_reference(slots, expected, last_token)
        assert all(torch.equal(a, b) for a, b in zip((ids, positions, seq_lens, computed), (*same, expected)))
        all_rows, same_mapping = decode_rows_reference(slots, seq_lens, table, 16)
        assert torch.equal(mapping, same_mapping)
        held = torch.arange(40, device=DEVICE) * 16 < seq_lens[:, None]
        assert torch.equal(rows[held], all_rows[held])
