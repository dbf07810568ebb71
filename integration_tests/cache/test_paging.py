"""Allocator, sequence table and pool against a dictionary model."""

import copy
import gc
import random
import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged import OutOfPagesError
from hf_paged.paging import GONE, PageAllocator, PagePool, SequenceTable

pytestmark = pytest.mark.quick


class SequenceMachine(RuleBasedStateMachine):
    """Random appends, forks, reorders and cuts. The model holds each sequence's tokens; memory is a dict of slots."""

    @initialize(page_size=st.sampled_from([8, 16]), num_seqs=st.integers(1, 4), num_pages=st.integers(8, 24))
    def start(self, page_size, num_seqs, num_pages):
        self.allocator = PageAllocator(num_pages)
        self.table = SequenceTable(self.allocator, page_size, num_seqs)
        self.tokens = [[] for _ in range(num_seqs)]
        self.memory = {}
        self.next_token = 0

    @rule(data=st.data(), together=st.booleans())
    def append(self, data, together):
        """New tokens of their own, or the same ones for sequences that have the same pages."""
        leaders = None
        if together:
            kinds = list(zip(self.table.pages, self.table.lengths))
            leaders = [kinds.index(kind) if data.draw(st.booleans()) else i for i, kind in enumerate(kinds)]
            leaders = [leader if leaders[leader] == leader else i for i, leader in enumerate(leaders)]
        counts = [data.draw(st.sampled_from([0, 1, 1, 3, 20])) for _ in self.tokens]
        if leaders is not None:
            counts = [counts[leader] for leader in leaders]
        before = [list(p) for p in self.table.pages], list(self.table.lengths), self.allocator.num_free
        needed = self.table.pages_needed(counts, leaders=leaders)
        if needed > self.allocator.num_free:
            with pytest.raises(OutOfPagesError) as caught:
                self.table.append(counts, leaders=leaders)
            assert (caught.value.needed, caught.value.free) == (needed, self.allocator.num_free)
            assert before == ([list(p) for p in self.table.pages], self.table.lengths, self.allocator.num_free)
            return
        starts = list(self.table.lengths)
        size = self.table.page_size
        for source, target in self.table.append(counts, leaders=leaders):
            for slot in range(size):
                if (source, slot) in self.memory:
                    self.memory[target, slot] = self.memory[source, slot]
        for i, count in enumerate(counts):
            leader = i if leaders is None else leaders[i]
            if leader != i:
                assert self.table.pages[i] == self.table.pages[leader]
                self.tokens[i] = list(self.tokens[leader])
                continue
            for position in range(starts[i], starts[i] + count):
                self.memory[self.table.pages[i][position // size], position % size] = self.next_token
                self.tokens[i].append(self.next_token)
                self.next_token += 1

    @rule(data=st.data())
    def select(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.tokens) - 1), min_size=1, max_size=5))
        self.table.select(rows)
        self.tokens = [list(self.tokens[i]) for i in rows]

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(t))) for t in self.tokens]
        self.table.truncate(lengths)
        self.tokens = [t[:n] for t, n in zip(self.tokens, lengths)]

    @rule(data=st.data())
    def release(self, data):
        self.table.release_before([data.draw(st.integers(0, len(t))) for t in self.tokens])

    @precondition(lambda self: hasattr(self, "tokens"))
    @invariant()
    def every_token_is_where_the_table_says(self):
        size = self.table.page_size
        for i, (tokens, first) in enumerate(zip(self.tokens, self.table.first_tokens())):
            found = [self.memory[self.table.pages[i][p // size], p % size] for p in range(first, len(tokens))]
            assert found == tokens[first:]
        self.allocator.check(self.table.held())

    @rule()
    def shrink(self):
        """Ids behind the last page in use are forgotten; there are as many again later."""
        before, free = self.allocator.num_pages, self.allocator.num_free
        self.allocator.shrink(self.allocator.num_left(keep_free=2))
        assert self.allocator.num_free >= min(2, free)
        self.allocator.shrink(self.allocator.num_left())
        assert self.allocator.num_pages == self.allocator.end == max([-1, *self.table.held()]) + 1
        self.allocator.grow(before)

    @precondition(lambda self: hasattr(self, "tokens"))
    @rule()
    def the_tensor_has_the_same_pages(self):
        width = max(map(len, self.table.pages))
        assert self.table.as_tensor().tolist() == [pages + [GONE] * (width - len(pages)) for pages in self.table.pages]

    @precondition(lambda self: hasattr(self, "tokens"))
    @rule(data=st.data())
    def vacate_and_refill(self, data):
        """Out of the pages and into others, as swapping does."""
        i = data.draw(st.integers(0, len(self.tokens) - 1))
        pages, length, first = list(self.table.pages[i]), self.table.lengths[i], self.table.first_tokens()[i]
        self.table.vacate(i)
        taken = self.allocator.allocate(min(sum(page != GONE for page in pages), self.allocator.num_free))
        if len(taken) < sum(page != GONE for page in pages):
            self.allocator.free(taken)
            self.tokens[i] = []
            return
        moved = iter(taken)
        moved = [GONE if page == GONE else next(moved) for page in pages]
        self.table.refill(i, moved, length)
        size = self.table.page_size
        for position in range(first, length):
            self.memory[moved[position // size], position % size] = self.tokens[i][position]


SequenceMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSequences = SequenceMachine.TestCase


def test_ten_thousand_operations_leak_nothing():
    allocator = PageAllocator(64)
    table = SequenceTable(allocator, 8, 4)
    rng = random.Random(0)
    for _ in range(10_000):
        action = rng.random()
        if action < 0.6:
            counts = [rng.choice([0, 1, 9]) for _ in range(len(table))]
            if table.pages_needed(counts) <= allocator.num_free:
                table.append(counts)
            else:
                table.truncate([n // 2 for n in table.lengths])
        elif action < 0.8:
            table.select([rng.randrange(len(table)) for _ in range(4)])
        else:
            table.truncate([rng.randint(0, n) for n in table.lengths])
        allocator.check(table.held())
    table.clear()
    assert allocator.num_free == 64


def test_sharers_that_write_together_keep_one_page():
    allocator = PageAllocator(8)
    table = SequenceTable(allocator, 8, 1)
    table.append([5])
    table.select([0, 0, 0])
    assert allocator.num_used == 1
    copies = table.append([1, 1, 1])
    assert len(copies) == 2
    assert allocator.num_used == 3
    assert len({pages[0] for pages in table.pages}) == 3


def test_sequences_that_write_the_same_share_what_they_write():
    """The page that nobody else has is written in place; one that others have is copied once for all of them."""
    allocator = PageAllocator(16)
    table = SequenceTable(allocator, 8, 1)
    table.append([5])
    table.select([0, 0, 0])
    assert table.pages_needed([9, 9, 9], leaders=[0, 0, 0]) == 1
    assert table.append([9, 9, 9], leaders=[0, 0, 0]) == []
    assert (allocator.num_used, table.lengths) == (2, [14] * 3)
    table.select([0, 1, 2, 0])
    source = table.pages[0][1]
    ((copied, target),) = table.append([1, 1, 1, 0], leaders=[0, 0, 0, 3])
    assert (copied, allocator.num_owners(source), allocator.num_owners(target)) == (source, 1, 3)
    assert [pages[1] for pages in table.pages] == [target, target, target, source]
    table.append([1, 1, 1, 1])
    assert allocator.num_used == 1 + 4
    table.clear()
    assert allocator.num_used == 0


def test_a_reorder_touches_only_what_beams_have_of_their_own():
    """Counts of owners are right without visiting the pages of the prompt."""
    allocator = PageAllocator(1100)
    table = SequenceTable(allocator, 8, 2)
    table.append([4000, 4000])
    table.select([0, 0, 0, 1, 1, 1])
    table.append([9] * 6)
    touched = []
    for name in ("share", "free"):
        original = getattr(allocator, name)

        def counted(pages, original=original):
            pages = list(pages)
            touched.extend(pages)
            original(pages)

        setattr(allocator, name, counted)
    table.select([2, 0, 0, 3, 5, 5])
    allocator.check(table.held())
    assert len(touched) == 2 * (2 + 2)
    table.select([5, 5, 5, 5, 5, 5])
    allocator.check(table.held())
    table.clear()
    assert allocator.num_used == 0


def test_full_pages_stay_shared():
    allocator = PageAllocator(8)
    table = SequenceTable(allocator, 8, 1)
    table.append([16])
    table.select([0, 0])
    assert table.append([1, 1]) == []
    assert allocator.num_used == 4
    assert table.pages[0][:2] == table.pages[1][:2]


def test_the_allocator_refuses_nonsense():
    allocator = PageAllocator(2)
    page = allocator.allocate(1)
    allocator.free(page)
    with pytest.raises(ValueError, match="is free already"):
        allocator.free(page)
    with pytest.raises(ValueError, match="is free and cannot be shared"):
        allocator.share(page)
    with pytest.raises(ValueError, match="can only grow"):
        allocator.grow(1)
    with pytest.raises(ValueError, match="num_pages must be 0 to 2, got 3"):
        allocator.shrink(3)
    with pytest.raises(OutOfPagesError, match=r"needs 3 more pages, 2 of 2 are free: .* num_pages="):
        allocator.allocate(3)
    allocator.allocate(1)
    table = SequenceTable(allocator, 8, 1)
    table.append([3])
    with pytest.raises(ValueError, match=r"sequence 0 holds 3 tokens: vacate\(\) it first"):
        table.refill(0, [1], 3)
    table.clear()
    with pytest.raises(AssertionError, match="counts 1 owners, 0 hold it"):
        allocator.check([])


def test_a_growing_pool_keeps_what_it_holds():
    pool = PagePool(8)
    pool.set_layers({None: 1})
    group = pool.groups[None]
    group.ensure_free(1)
    states = torch.randn(1, 2, 3, 4)
    layer = group.layer(0, states, states)
    layer.k[3] = 7.0
    before, address = group.allocator.num_pages, layer.k.data_ptr()
    group.ensure_free(before + 1)
    assert layer.k.data_ptr() == address, "growing moves nothing"
    twin = copy.deepcopy(pool).groups[None].layers[0]
    layer.k[3, 0, 0, 0] += 1
    assert float(twin.k[3, 0, 0, 0]) == 7.0
    layer.k[3, 0, 0, 0] -= 1
    assert group.allocator.num_pages >= before + 1
    assert torch.equal(group.layer(0, states, states).k[3], torch.full((2, 8, 4), 7.0))
    pool.check()


def test_groups_draw_on_one_budget():
    """4 pages of a model with 3 layers: 12 layer pages, for whichever group asks first."""
    pool = PagePool(8, 4)
    pool.set_layers({None: 1, 16: 2})
    pool.groups[16].ensure_free(3)
    pool.groups[None].ensure_free(6)
    with pytest.raises(OutOfPagesError):
        pool.groups[None].ensure_free(7)
    with pytest.raises(OutOfPagesError):
        pool.groups[16].ensure_free(4)
    pool.check()
    with pytest.raises(ValueError, match="a pool of its own"):
        pool.set_layers({None: 3})


def test_released_pages_come_back_and_stay_gone():
    allocator = PageAllocator(8)
    table = SequenceTable(allocator, 8, 2)
    table.append([40, 9])
    table.release_before([25, 3])
    assert table.pages[0][:3] == [GONE] * 3
    assert table.first_tokens() == [24, 0]
    assert allocator.num_used == 2 + 2
    table.select([0, 0, 1])
    allocator.check(table.held())
    table.truncate([26, 40, 1])
    table.clear()
    assert allocator.num_used == 0


def test_tokens_that_no_query_will_see_take_no_page():
    allocator = PageAllocator(4)
    table = SequenceTable(allocator, 8, 2)
    assert table.pages_needed([100, 5], [85, 0]) == 3 + 1
    table.append([100, 5], [85, 0])
    assert table.pages[0][:10] == [GONE] * 10
    assert table.first_tokens() == [80, 0]
    allocator.check(table.held())


@pytest.mark.parametrize(
    "arguments",
    [dict(page_size=0), dict(num_pages=-1), dict(kv_dtype="fp16"), dict(kv_dtype=torch.int8)],
    ids=str,
)
def test_a_pool_refuses_what_it_cannot_hold(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PagePool(**arguments)


def test_a_dropped_pool_gives_its_pages_back_at_once():
    """Not at the next garbage collection, which may be many calls of generate() later."""
    gc.collect()
    gc.disable()
    try:
        pool = PagePool(page_size=4)
        pool.set_layers({None: 1, 8: 1})
        states = torch.zeros(1, 2, 3, 16)
        pages = [weakref.ref(group.layer(i, states, states)) for i, group in enumerate(pool.groups.values())]
        twin = copy.deepcopy(pool)
        assert all(group.pool is twin for group in twin.groups.values())
        assert all(group.pool is pool for group in pool.groups.values())
        del pool
        assert all(ref() is None for ref in pages)
        twin.check()
    finally:
        gc.enable()
