"""Pages get memory as they are first used; where a device has too little, the pool is smaller, and tokens are right."""

import gc
import weakref
from typing import Any

import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, make_engine, prompt
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged.engine.scheduling import page_budget
from hf_paged.engine.scheduling.page_budget import PageRoom, choose_num_pages, working_bytes
from hf_paged.paging import PagePool
from hf_paged.paging import pool as pool_module
from hf_paged.paging.arena import CopyingArena, CpuArena
from hf_paged.paging.pool import FIRST_PAGES

PAGE = 8


class Card:
    """A device with ``free`` bytes for pages, whose arenas say so only when they are asked for more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.refusals = 1 << 40, 0
        self.arenas: weakref.WeakSet[CpuArena] = weakref.WeakSet()
        card = self

        class Arena(CpuArena):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                card.arenas.add(self)

            def _grow(self, num_bytes: int, exactly: bool = False) -> int:
                if card.taken + num_bytes - self.committed > card.free:
                    card.refusals += 1
                    raise self._out_of_memory(num_bytes, "the card is full")
                return super()._grow(num_bytes, exactly)

        monkeypatch.setattr("hf_paged.paging.arena.CpuArena", Arena)

    @property
    def taken(self) -> int:
        return sum(arena.committed for arena in self.arenas)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def page_bytes(engine: hf_paged.Engine) -> int:
    return engine._core.pool.page_bytes


def run(engine: hf_paged.Engine, prompts: list[list[int]], new: int = 12) -> list[Any]:
    handles = [engine.submit(ids, generation_config=config(new)) for ids in prompts]
    while engine.step():
        engine.check()
    return [handle.result(timeout_s=60) for handle in handles]


def expected_tokens(model: Any, prompts: list[list[int]], new: int = 12) -> list[list[int]]:
    return [alone(model, ids, config(new)) for ids in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_short_requests_commit_what_they_use(card, family):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (5, 9, 17, 30)]
    expected = expected_tokens(model, prompts)
    with make_engine(model, num_pages=4000) as engine:
        assert [output.token_ids for output in run(engine, prompts)] == expected
        for group in engine._core.pool.groups.values():
            used = group.allocator.num_pages - len(group.allocator._free)
            assert FIRST_PAGES <= group.allocator.num_backed <= max(2 * FIRST_PAGES, 2 * used)
            for pages in group.layers.values():
                assert pages.arena.committed < 100 * pages.page_bytes + pages.arena.granularity
        # A longer one: they grow, and what is there stays.
        long = [prompt(100, 1)]
        assert [output.token_ids for output in run(engine, long)] == expected_tokens(model, long)


@pytest.mark.parametrize("says_so", [True, False], ids=["known", "found out"])
def test_a_card_with_too_little_memory_makes_the_pool_smaller(model, card, says_so):
    """Requests give way to each other, as in a small pool."""
    prompts = [prompt(n, n) for n in (30, 28, 40, 33, 35, 31)]
    expected = expected_tokens(model, prompts, 20)
    with make_engine(model, num_pages=400, prefix_caching=False) as engine:
        pool = engine._core.pool
        run(engine, [prompt(3)], 1)  # Now the layers have their first pages.
        granularity = next(iter(pool.groups[None].layers.values())).arena.granularity
        # Some pages more; a layer's steps are rounded up.
        card.free = card.taken + len(card.arenas) * granularity
        if says_so:
            pool.room = lambda device: card.free - card.taken
        outputs = run(engine, prompts, 20)
        assert [output.token_ids for output in outputs] == expected
        stats, backed = engine.stats(), pool.groups[None].allocator.num_backed
        assert stats.preemptions > 0
        assert backed < 60
        assert (card.refusals > 0) != says_so
        # There is memory again: the pool is as large as it was to be.
        card.free, before = 1 << 40, stats.preemptions
        pool.room = None
        assert [output.token_ids for output in run(engine, prompts, 20)] == expected
        assert engine.stats().preemptions == before
        assert pool.groups[None].allocator.num_backed > backed


def test_what_can_never_fit_ends_alone(model, card, monkeypatch):
    monkeypatch.setattr(pool_module, "FIRST_PAGES", 6)
    short, long = prompt(10, 1), prompt(100, 2)
    with make_engine(model, num_pages=400) as engine:
        pool = engine._core.pool
        (first,) = run(engine, [short])
        card.free = card.taken
        pool.room = lambda device: card.free - card.taken
        allocator = pool.groups[None].allocator
        outputs = run(engine, [short, long + long[:20], short], 8)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
        message = f"memory for {allocator.num_backed} of the pool's {allocator.num_pages} pages at the moment"
        assert message in str(outputs[1].error)
        assert outputs[0].token_ids == outputs[2].token_ids == first.token_ids[:8]


@pytest.mark.parametrize("keep_graphs", [False, True])
def test_waking_up_on_a_full_card(model, card, keep_graphs):
    """A trainer has taken the memory meanwhile: no layer is without its pages, requests wait for each other."""
    prompts = [prompt(n, n) for n in (30, 28, 40, 33)]
    expected = expected_tokens(model, prompts, 20)
    with make_engine(model, num_pages=400) as engine:
        assert [output.token_ids for output in run(engine, prompts, 20)] == expected
        pool = engine._core.pool
        group = pool.groups[None]
        bytes_of_layer = next(iter(group.layers.values())).page_bytes
        engine.sleep(keep_graphs=keep_graphs)
        gc.collect()  # Caches of expected_tokens() may have waited for it.
        assert card.taken == 0
        # Room for the first pages of half of the layers, then of all, then for enough.
        for factor, is_enough in ((0.5, False), (1, None), (100, True)):
            card.free = int(factor * group.num_layers * (FIRST_PAGES * bytes_of_layer + 4096))
            if factor == 0.5:
                engine.wake()
            outputs = run(engine, prompts, 20)
            for pages in group.layers.values():
                assert pages.arena.committed >= group.allocator.num_backed * pages.page_bytes
            for output, tokens in zip(outputs, expected):
                assert output.token_ids == tokens[: len(output.token_ids)]
            if is_enough is not None:
                assert all((output.finish_reason == "length") == is_enough for output in outputs)
        engine.check()


def test_a_layer_without_memory_is_not_found(monkeypatch, card):
    """Of the pool itself: a step that fails for want of memory leaves no layer behind that looks as if it had pages."""
    pool = PagePool(PAGE)
    pool.set_layers({None: 2})
    group = pool.groups[None]
    group.ensure_free(4)
    key = torch.randn(1, 2, 1, 16)
    first = group.layer(0, key, key)
    card.free = card.taken
    with pytest.raises(torch.OutOfMemoryError, match="the card is full"):
        group.layer(1, key, key)
    assert list(group.layers) == [0]
    card.free = 1 << 40
    assert group.layer(1, key, key).k.shape == first.k.shape


def test_layers_that_cannot_grow_in_place_have_all_their_pages_at_once(model, monkeypatch):
    monkeypatch.setattr(pool_module, "make_arena", lambda device, num_bytes: CopyingArena(device, num_bytes))
    prompts = [prompt(n, n) for n in (30, 28, 40)]
    with make_engine(model, num_pages=60) as engine:
        assert [output.token_ids for output in run(engine, prompts)] == expected_tokens(model, prompts)
        group = engine._core.pool.groups[None]
        assert all(pages.k.shape[0] == 60 for pages in group.layers.values())
        assert all(pages.arena.committed >= 60 * pages.page_bytes for pages in group.layers.values())


def test_captured_steps_see_pages_that_got_memory_later(model, card):
    """Addresses and shapes stay: a graph that was captured over few pages is right over many."""
    prompts = [prompt(n, n) for n in (5, 6, 7, 8)]
    expected = expected_tokens(model, prompts, 90)
    with make_engine(model, num_pages=400, max_num_seqs=4) as engine:
        engine.warm_up()
        views = {index: pages.k.data_ptr() for index, pages in engine._core.pool.groups[None].layers.items()}
        shapes = {pages.k.shape for pages in engine._core.pool.groups[None].layers.values()}
        assert [output.token_ids for output in run(engine, prompts, 90)] == expected
        layers = engine._core.pool.groups[None].layers
        assert engine._core.pool.groups[None].allocator.num_backed > FIRST_PAGES
        assert {index: pages.k.data_ptr() for index, pages in layers.items()} == views
        assert {pages.k.shape for pages in layers.values()} == shapes


# Sizes


def test_pages_leave_room_for_steps(monkeypatch):
    monkeypatch.setattr(page_budget, "free_bytes", lambda device: 1000)
    sizes = {torch.device("cpu"): 10}
    assert choose_num_pages(sizes, 0.9, 1 << 20) == 90
    assert choose_num_pages(sizes, 0.9, 1 << 20, reserve=50) == 90
    assert choose_num_pages(sizes, 0.9, 1 << 20, reserve=400) == 60
    assert choose_num_pages(sizes, 0.9, 7, reserve=400) == 7
    assert choose_num_pages(sizes, 0.9, 7, reserve=4000) == 1


def test_working_bytes_follow_the_step(model):
    def of(**options: Any) -> int:
        return working_bytes(model, hf_paged.EngineConfig(**options))

    text = model.config
    hidden, vocab = text.hidden_size, text.vocab_size
    more_tokens = of(max_batch_tokens=8192) - of(max_batch_tokens=4096)
    # At least what the widest module of a layer gives and takes.
    assert more_tokens >= 4096 * 4 * (2 * hidden + text.intermediate_size)
    assert of(max_num_seqs=512) - of(max_num_seqs=256) >= 256 * vocab * 4
    assert of() - of(cuda_graphs=False) >= 4000 * vocab * 4
    # What was measured takes the place of the estimate, and of that alone.
    measured = [working_bytes(model, hf_paged.EngineConfig(max_batch_tokens=n), 12345) for n in (4096, 8192)]
    assert measured[0] == measured[1] == of(max_batch_tokens=8192) - 2 * more_tokens + 12345


@pytest.fixture
def numbers(monkeypatch):
    """Of a GPU that is none."""
    numbers = {"reserved": 100, "allocated": 100, "free": 1000}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: numbers["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: numbers["allocated"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (numbers["free"], 5000))

    def empty() -> None:
        numbers["free"] += numbers["reserved"] - numbers["allocated"]
        numbers["reserved"] = numbers["allocated"]

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    return numbers


def test_the_room_on_a_gpu(numbers):
    """What is free, less what steps have still to take; what others left with PyTorch is asked back."""
    gpu = torch.device("cuda", 0)
    room = PageRoom(300, [gpu])
    assert room(gpu) == 700
    numbers.update(reserved=350, allocated=150, free=750)  # Steps have taken most of theirs, and keep it.
    assert room(gpu) == 700
    numbers.update(reserved=1100, allocated=150, free=0)  # A trainer has been there.
    assert room(gpu) == 950 - 250
    assert room(torch.device("cpu")) > 1 << 60


@pytest.mark.parametrize("taken", [40, 700], ids=["less than estimated", "more"])
def test_the_largest_step_is_measured(model, numbers, monkeypatch, taken):
    """What was in PyTorch's cache does not hide what the step takes; what it took is held back, once."""
    gpu = torch.device("cuda", 0)
    numbers.update(reserved=160, free=940)  # 60 bytes are cached.
    room = PageRoom(300, [gpu])
    with make_engine(model) as engine:
        runner = engine._core.runner
        forward, widths = runner.forward, []

        def step(inputs, keep):
            widths.append(inputs.input_ids.shape[1])
            if numbers["reserved"] < 100 + taken:
                numbers.update(reserved=100 + taken, free=1000 - taken)
            return forward(inputs, keep)

        monkeypatch.setattr(runner, "forward", step)
        room.reserve = 50 + room.measure(lambda: runner.warm_up_prompts(32))
        assert set(widths) == {32}
        assert room.reserve == 50 + taken
        assert room(gpu) == 1000 - taken - 50

        def is_full(inputs, keep):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(runner, "forward", is_full)
        assert room.measure(lambda: runner.warm_up_prompts(32)) is None


# On a card


@pytest.mark.gpu
@pytest.mark.whole_card
@pytest.mark.parametrize("gib", [2.0, 0.7])
def test_an_engine_on_a_nearly_full_card(gib):
    """So much is free when the engine is made, then nearly nothing when it wakes up, then all."""
    model = tiny_model("llama").to("cuda", torch.float32)
    prompts = [prompt(n, n) for n in range(5, 60, 3)]
    options = hf_paged.EngineConfig(max_num_seqs=8)
    with hf_paged.Engine(model, options) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, generation_config=config(30))]
    torch.cuda.empty_cache()

    def fill(left_gib: float) -> torch.Tensor:
        return torch.empty(int(torch.cuda.mem_get_info()[0] - left_gib * 2**30), dtype=torch.uint8, device="cuda")

    hog = fill(gib)
    with hf_paged.Engine(model, options) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts, generation_config=config(30))
            assert [output.token_ids for output in outputs] == expected
        engine.check()
        engine.sleep(keep_graphs=True)
        more = fill(0.15)
        engine.wake()
        for output, tokens in zip(engine.generate(prompts, generation_config=config(30)), expected):
            assert output.finish_reason in ("length", "error")
            assert output.token_ids == tokens[: len(output.token_ids)]
        torch.cuda.synchronize()
        del more, hog
        torch.cuda.empty_cache()
        outputs = engine.generate(prompts, generation_config=config(30))
        assert [output.token_ids for output in outputs] == expected


@pytest.mark.gpu
@pytest.mark.whole_card
def test_pages_leave_what_a_largest_step_takes():
    """Every page that may be committed is; then a step of ``max_batch_tokens`` finds its memory at once."""
    sizes = dict(hidden_size=512, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8)
    shape = LlamaConfig(vocab_size=1000, num_key_value_heads=4, max_position_embeddings=32_768, **sizes)
    model = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa", dtype=torch.float32).cuda().eval()
    torch.cuda.empty_cache()
    hog = torch.empty(int(torch.cuda.mem_get_info()[0] - 3 * 2**30), dtype=torch.uint8, device="cuda")
    options = hf_paged.EngineConfig(max_num_seqs=64, max_batch_tokens=4096, memory_fraction=1.0, cuda_graphs=False)
    with hf_paged.Engine(model, options) as engine:
        core, gpu = engine._core, torch.device("cuda", torch.cuda.current_device())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        core.pool.room.measure(lambda: core.runner.warm_up_prompts(4096))
        # At least a layer's gate and up of every token.
        assert torch.cuda.max_memory_allocated() - before > 2 * 4096 * 8192 * 4
        for group in core.pool.groups.values():
            group.back(group.allocator.num_pages)
        stats = torch.cuda.memory_stats()
        assert core.pool.room(gpu) >= 0
        assert core.runner.warm_up_prompts(4096)
        for name in ("num_ooms", "num_alloc_retries"):
            assert torch.cuda.memory_stats()[name] == stats[name]
        engine.check()
    del hog
