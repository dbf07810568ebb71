"""Prompts with the same beginning that run at the same time: it is computed once, by the first of them."""

import random

import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, prompt

import hf_paged

PAGE_SIZE = 8
BEGINNING = prompt(37, 5)
PROMPTS = [
    BEGINNING + prompt(3, 1), BEGINNING + prompt(9, 2), BEGINNING[:20] + prompt(6, 3), prompt(30, 4), BEGINNING,
    BEGINNING + prompt(9, 2), prompt(1, 6), BEGINNING[:17],
]  # fmt: skip


def make_engine(model, **options) -> hf_paged.Engine:
    defaults = dict(num_pages=96, page_size=PAGE_SIZE, max_num_seqs=8, max_batch_tokens=512, self_check=False)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


def not_shared(prompts: list[list[int]]) -> int:
    """Tokens that no prompt ahead has in the same full pages, but the last of each, whose logits are needed."""
    count = 0
    for i, ids in enumerate(prompts):
        common = [0]
        for other in prompts[:i]:
            pairs = zip(ids[:-1], other)
            common.append(next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids) - 1, len(other))))
        count += len(ids) - max(common) // PAGE_SIZE * PAGE_SIZE
    return count


def poison(engine: hf_paged.Engine) -> None:
    """Make all pages NaN; nothing may hold one."""
    for group in engine._core.pool.groups.values():
        for pages in group.layers.values():
            pages.k.fill_(torch.nan)
            pages.v.fill_(torch.nan)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("budget", [512, 24])
def test_a_beginning_is_computed_once(family, budget):
    model = tiny_model(family)
    expected = [alone(model, ids, config(10)) for ids in PROMPTS]
    with make_engine(model, max_batch_tokens=budget) as engine:
        engine.generate([prompt(5, 9)], generation_config=config(2))
        engine.drop_prefixes()
        poison(engine)
        before = engine.stats().prompt_tokens
        handles = [engine.submit(ids, generation_config=config(10)) for ids in PROMPTS]
        engine.step()
        engine.check()
        in_one_step = engine.stats().prompt_tokens - before
        assert [handle.result().token_ids for handle in handles] == expected
        computed, total = engine.stats().prompt_tokens - before, sum(map(len, PROMPTS))
        assert in_one_step == min(computed, budget)
        if budget == 512 or family in ("llama", "deepseek_v3"):
            assert computed == not_shared(PROMPTS)
        else:
            # A prompt that is some steps ahead has given back what its window has passed.
            assert not_shared(PROMPTS) <= computed < total - 64
        assert sum(handle.result().cached_tokens for handle in handles) == total - computed
        engine.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("page_size", [8, 16])
def test_random_beginnings_in_a_small_pool(family, page_size):
    """Cut and mixed at random, preempted, some more urgent than those before them."""
    model, draw = tiny_model(family), random.Random(page_size)
    prompts = [prompt(60, i // 6)[: draw.randint(20, 60)] + prompt(draw.randint(0, 12), 100 + i % 7) for i in range(90)]
    new = [draw.randint(1, 14) for _ in prompts]
    expected: dict[tuple[int, ...], list[int]] = {}
    for ids in prompts:
        if tuple(ids) not in expected:
            expected[tuple(ids)] = alone(model, ids, config(14))
    options = dict(page_size=page_size, num_pages=200 // page_size, max_num_seqs=7, max_batch_tokens=40)
    with make_engine(model, **options) as engine:
        scheduler, shared = engine._core.scheduler, []
        share_inflight_prefix = scheduler.prefixes.share_inflight_prefix

        def follow_and_count(row, tokens, found, *step):
            shared.append(share_inflight_prefix(row, tokens, found, *step) - found)
            return found + shared[-1]

        scheduler.prefixes.share_inflight_prefix = follow_and_count
        handles, is_running = [], True
        while is_running:
            for i in range(len(handles), min(len(handles) + draw.randint(0, 8), len(prompts))):
                handles.append(engine.submit(prompts[i], generation_config=config(new[i]), priority=i % 3 == 2))
            is_running = engine.step() or len(handles) < len(prompts)
            engine.check()
        stats = engine.stats()
        for handle, ids, count in zip(handles, prompts, new):
            assert handle.result().token_ids == expected[tuple(ids)][:count]
    assert sum(count > 0 for count in shared) > 5
    assert stats.preemptions > 0


def test_salts_keep_them_apart():
    model = tiny_model("llama")
    expected = [alone(model, ids, config(10)) for ids in PROMPTS]
    with make_engine(model) as engine:
        handles = [engine.submit(ids, generation_config=config(10), cache_salt=i) for i, ids in enumerate(PROMPTS)]
        assert [handle.result().token_ids for handle in handles] == expected
        assert engine.stats().prompt_tokens == sum(map(len, PROMPTS))


def test_samples_of_prompts_in_common_share_them_too():
    model = tiny_model("llama")
    with make_engine(model, max_num_seqs=16) as engine:
        how = config(10, do_sample=True, num_return_sequences=4)
        handles = [engine.submit(BEGINNING, generation_config=how, seed=seed) for seed in range(3)]
        shared = [[one.token_ids for one in handle.result().sequences] for handle in handles]
        engine.check()
        assert engine.stats().prompt_tokens == len(BEGINNING) + 2 * (len(BEGINNING) - 32)
    with make_engine(model, max_num_seqs=16, prefix_caching=False) as engine:
        handles = [engine.submit(BEGINNING, generation_config=how, seed=seed) for seed in range(3)]
        assert [[one.token_ids for one in handle.result().sequences] for handle in handles] == shared


def test_samples_copy_the_page_that_they_write_together():
    """Each sample but one gets a page of its own behind the prompt, all of them in one call."""
    model = tiny_model("llama")
    with make_engine(model, max_num_seqs=16) as engine:
        pages = engine._core.pages
        copy, copied = pages.copy, []
        pages.copy = lambda number, *ends: (copied.append(ends), copy(number, *ends))
        how = config(10, do_sample=True, num_return_sequences=5)
        assert len(engine.submit(BEGINNING, generation_config=how, seed=1).result().sequences) == 5
        assert [len(sources) for sources, _ in copied] == [4]
        ((sources, targets),) = copied
        assert len(set(sources)) == 1
        assert len(set(targets)) == 4
        assert not set(sources) & set(targets)
        engine.check()


def test_who_shares_what_a_failed_step_was_to_compute_starts_again(monkeypatch):
    model = tiny_model("llama")
    with make_engine(model) as engine:
        scheduler = engine._core.scheduler
        plan_chunk, run = scheduler._plan_chunk, engine._core.runner.run
        # The second one shares, and has no place in the step.
        monkeypatch.setattr(
            scheduler,
            "_plan_chunk",
            lambda row, budget: 0 if row in scheduler.prefixes.sharers else plan_chunk(row, budget),
        )

        def fail(*args):
            raise RuntimeError("no memory today")

        monkeypatch.setattr(engine._core.runner, "run", fail)
        first, second = (engine.submit(ids, generation_config=config(10)) for ids in PROMPTS[:2])
        engine.step()
        engine.check()
        monkeypatch.setattr(scheduler, "_plan_chunk", plan_chunk)
        monkeypatch.setattr(engine._core.runner, "run", run)
        assert second.result().token_ids == alone(model, PROMPTS[1], config(10))
        assert first.result().finish_reason == "error"
        assert second.result().cached_tokens == 0
        engine.check()
