"""How the scheduler divides a step between rows that decode and prompts."""


import pytest
from random_requests import tiny_model
from small_engines import GRAPH_FAMILIES as FAMILIES
from small_engines import alone, config, prompt
from transformers import GenerationConfig

import hf_paged
from hf_paged.engine.scheduling.pacing import mixed_prompt_tokens

pytestmark = pytest.mark.quick

BUDGET = 64


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def make_engine(model, **options) -> hf_paged.Engine:
    defaults = dict(
        num_pages=128, page_size=8, max_num_seqs=8, max_batch_tokens=BUDGET, mixed_prompt_tokens=4,
        prefix_caching=False, self_check=False,
    )  # fmt: skip
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


def steps_of(engine: hf_paged.Engine) -> list[tuple[int, int]]:
    """Rows that decoded and prompt tokens of each step."""
    return [(step.num_decode, step.num_tokens - step.num_decode) for step in engine.loop.trace.steps]


def begin_decoding(engine: hf_paged.Engine, new: int = 40) -> hf_paged.RequestHandle:
    handle = engine.submit(prompt(5), generation_config=config(new))
    engine.step()
    engine.step()
    assert steps_of(engine)[-1] == (1, 0)
    return handle


def test_a_prompt_beside_decode_rows_comes_in_small_chunks(model):
    with make_engine(model) as engine:
        running = begin_decoding(engine)
        ids = prompt(18, 1)
        handle = engine.submit(ids, generation_config=config(6))
        for _ in range(5):
            engine.step()
        assert steps_of(engine)[-5:] == [(1, 4)] * 4 + [(1, 2)]
        assert handle.result().token_ids == alone(model, ids, config(6))
        assert running.result().token_ids == alone(model, prompt(5), config(40))


def test_alone_prompts_have_the_whole_budget(model):
    with make_engine(model) as engine:
        engine.submit(prompt(90), generation_config=config(2))
        engine.step()
        engine.step()
        assert steps_of(engine) == [(0, 64), (0, 26)]


def test_none_gives_prompts_the_whole_budget_always(model):
    with make_engine(model, mixed_prompt_tokens=None) as engine:
        begin_decoding(engine)
        engine.submit(prompt(70, 1), generation_config=config(2))
        engine.step()
        assert steps_of(engine)[-1] == (1, 63)


def test_of_a_long_queue_a_larger_part_is_computed(model):
    with make_engine(model, max_num_seqs=16) as engine:
        begin_decoding(engine)
        for seed in range(4):
            engine.submit(prompt(32, seed), generation_config=config(2))
        engine.step()
        # 128 * 128 / (2 * 64) is more than the step has; 65 are left.
        assert steps_of(engine)[-1] == (1, 63)
        engine.step()
        decoding, tokens = steps_of(engine)[-1]
        assert (decoding, tokens) == (2, 65 * 65 // (2 * 64))


def test_only_those_that_find_a_slot_are_queued(model):
    with make_engine(model, max_num_seqs=3) as engine:
        begin_decoding(engine)
        for seed in range(20):
            engine.submit(prompt(32, seed), generation_config=config(2))
        engine.step()
        assert steps_of(engine)[-1] == (1, 64 * 64 // (2 * 64))
        scheduler = engine._core.scheduler
        assert scheduler.waiting.num_tokens == 19 * 32
        engine.cancel(list(scheduler.waiting)[3].request_id)
        engine.step()
        engine.check()
        # One was cancelled, one has a slot.
        assert scheduler.waiting.num_tokens == 17 * 32


def test_who_goes_first_does_not_wait_for_the_rest_of_a_long_prompt(model):
    with make_engine(model) as engine:
        begin_decoding(engine)
        long = engine.submit(prompt(60, 1), generation_config=config(2))
        engine.step()
        urgent = engine.submit(prompt(6, 2), generation_config=config(2), priority=1)
        for _ in range(3):
            engine.step()
        scheduler = engine._core.scheduler
        assert [len(row.request.prompt) for row in scheduler.prefilling] == [60]
        assert urgent.result().token_ids == alone(model, prompt(6, 2), config(2))
        assert not long.is_done
        assert long.result().token_ids == alone(model, prompt(60, 1), config(2))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next"])
def test_families_in_small_chunks_and_a_small_pool(family):
    """States compute a prompt in one step whatever the option says; windows, preemption and chunks go together."""
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40)]
    expected = [alone(model, ids, config(12)) for ids in prompts]
    with make_engine(model, num_pages=12, mixed_prompt_tokens=3, prefix_caching=True) as engine:
        for _ in range(2):
            assert [out.token_ids for out in engine.generate(prompts, generation_config=config(12))] == expected
            engine.check()


@pytest.mark.parametrize(
    "options", [dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)], ids=str
)
def test_beams_and_samples_in_small_chunks(model, options):
    def run(mixed_prompt_tokens: int | None) -> list:
        with make_engine(model, mixed_prompt_tokens=mixed_prompt_tokens, seed=3) as engine:
            begin_decoding(engine, new=60)
            settings = GenerationConfig(max_new_tokens=6, pad_token_id=0, **options)
            handles = [engine.submit(prompt(n, n), generation_config=settings) for n in (30, 7, 21)]
            outputs = [[sequence.token_ids for sequence in handle.result().sequences] for handle in handles]
            engine.check()
            return outputs

    assert run(2) == run(None)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("no", TypeError)]
)
def test_the_option_is_checked(value, error):
    with pytest.raises(error, match='mixed_prompt_tokens must be "auto", None or an int of at least 1'):
        hf_paged.EngineConfig(mixed_prompt_tokens=value)


@pytest.mark.parametrize(
    ("option", "parameters", "tokens"),
    [("auto", 8_000_000_000, 192), ("auto", 600_000_000, 500), ("auto", 1000, 1024), (7, 1000, 7), (None, 1000, None)],
)
def test_small_models_compute_larger_shares(option, parameters, tokens):
    assert mixed_prompt_tokens(option, parameters) == tokens
