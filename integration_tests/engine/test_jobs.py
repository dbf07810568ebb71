"""Requests of one call that returns when all have ended: the longest go first, the others wait where they have time."""

import random
import threading

import pytest
from random_requests import tiny_model
from small_engines import alone, config, prompt

import hf_paged
from hf_paged.engine.scheduling.pacing import OFFLINE_STEP_TOKENS, offline_step_tokens

BUDGET, LEAST = 96, 24


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def make_engine(model, least: int = LEAST, **options) -> hf_paged.Engine:
    """An engine whose steps of jobs have ``least`` tokens, as if its model was large."""
    defaults = dict(
        num_pages=400, page_size=8, max_num_seqs=32, max_batch_tokens=BUDGET, prefix_caching=False, self_check=False
    )
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)
    engine._core.limits.offline_step_tokens = least
    return engine


def draw(seed: int, count: int = 24) -> tuple[list[list[int]], list[int]]:
    """Prompts, and new tokens of each."""
    source = random.Random(seed)
    lengths = [source.randint(4, 40) for _ in range(count)]
    return [prompt(n, n) for n in lengths], [source.randint(4, 40) for _ in range(count)]


def steps_of(engine: hf_paged.Engine) -> list[tuple[int, int]]:
    """Rows that decoded and prompt tokens of each step."""
    return [(step.num_decode, step.num_tokens - step.num_decode) for step in engine.loop.trace.steps]


@pytest.mark.parametrize("least", [1, LEAST, BUDGET])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_each_alone_and_all_end_with_the_longest(model, least, seed):
    prompts, new = draw(seed)
    expected = [alone(model, ids, config(n)) for ids, n in zip(prompts, new)]
    with make_engine(model, least) as engine:
        outputs = engine.generate(prompts, generation_config=[config(n) for n in new])
        engine.check()
        assert [output.token_ids for output in outputs] == expected
        # The first step has no decode rows; whoever is not yet handed over then starts a few steps later.
        assert len(steps_of(engine)) <= max(new) + 8


@pytest.mark.parametrize("seed", range(4))
def test_all_steps_have_about_as_many_tokens(model, seed):
    prompts, new = draw(seed)
    with make_engine(model, 1) as engine:
        engine.generate(prompts, generation_config=[config(n) for n in new])
        # Behind the first ones, while requests are still handed over.
        steps = list(engine.loop.trace.steps)[8:]
        mean = sum(map(len, [*prompts, *map(range, new)])) / len(engine.loop.trace.steps)
        assert max(abs(step.num_tokens - mean) for step in steps) < 0.3 * mean
        # For that, requests wait between two tokens of theirs.
        assert any(step.num_rows < step.running for step in steps)


@pytest.mark.parametrize(
    "new",
    [[1] * 24, [2] * 24, [20] * 24, [40, *[20] * 23], [40] * 23 + [1]],
    ids=["one token", "two", "many", "one is longer", "one is short"],
)
def test_lengths_that_leave_no_time(model, new):
    """Prompts that are all due at once: whole budgets, no more, and then everyone decodes."""
    prompts = draw(3)[0]
    with make_engine(model, 8) as engine:
        outputs = engine.generate(prompts, generation_config=[config(n) for n in new])
        engine.check()
        assert [output.token_ids for output in outputs] == [alone(model, p, config(n)) for p, n in zip(prompts, new)]
        assert max(step.num_tokens for step in engine.loop.trace.steps) <= BUDGET
        assert len(engine.loop.trace.steps) <= max(new) + 12


@pytest.mark.parametrize("options", [dict(max_num_seqs=8), dict(num_pages=100), dict(num_pages=30)], ids=str)
def test_nobody_waits_where_there_is_no_room_for_all(model, options):
    prompts, new = draw(1)
    with make_engine(model, 1, **options) as engine:
        outputs = engine.generate(prompts, generation_config=[config(n) for n in new])
        engine.check()
        assert [output.token_ids for output in outputs] == [alone(model, p, config(n)) for p, n in zip(prompts, new)]
        # Every request that has a slot takes part, from when all have been handed over till the rest has room.
        steps = list(engine.loop.trace.steps)[6:]
        steps = [step for step in steps if step.waiting > 8] or steps
        assert len(steps) > 20
        assert all(step.num_rows >= step.running for step in steps)


def test_who_comes_later_ends_the_wait(model):
    """Rows of a job take part in every step as soon as somebody else's request is there, with the same tokens."""
    prompts, new = draw(2)
    with make_engine(model, 1) as engine:
        submitted, own = [], engine.step

        def step() -> bool:
            if len(engine.loop.trace.steps) == 12:
                submitted.append(engine.submit(prompt(7), generation_config=config(30)))
            return own()

        engine.step = step
        outputs = engine.generate(prompts, generation_config=[config(n) for n in new])
        engine.check()
        steps = list(engine.loop.trace.steps)
        assert any(step.num_rows < step.running for step in steps[8:12])
        assert all(step.num_rows >= step.running for step in steps[16:])
        assert submitted[0].result().token_ids == alone(model, prompt(7), config(30))
        assert [output.token_ids for output in outputs] == [alone(model, p, config(n)) for p, n in zip(prompts, new)]


def test_prompts_fill_the_steps(model):
    prompts, new = [prompt(8, i) for i in range(20)], [60, *[20] * 19]
    with make_engine(model, 10) as engine:
        engine.generate(prompts, generation_config=[config(n) for n in new])
        steps = steps_of(engine)
        queued = sum(len(ids) for ids in prompts)
        for decoding, tokens in steps:
            if decoding and queued > 0:
                # Enough to fill the step, and to start everyone 20 tokens before the end; not the whole budget.
                assert min(queued, 10 - decoding) <= tokens
                assert tokens <= max(10 - decoding, 8)
            queued -= tokens
        assert queued == 0
        assert len(steps) <= 60 + 8


def test_who_has_no_known_end_is_served_as_ever(model):
    """Without eos tokens a job's prompts come in small shares; with them, or with a request of its own, they do not."""
    prompts, new = [prompt(30, i) for i in range(12)], [40, *[4] * 11]

    def largest_share(configs: list, other: bool = False) -> int:
        with make_engine(model, 8) as engine:
            if other:
                engine.submit(prompt(3), generation_config=config(80))
                engine.step()
            engine.generate(prompts, generation_config=configs)
            return max(tokens for decoding, tokens in steps_of(engine)[3:] if decoding)

    known = largest_share([config(n) for n in new])
    assert known <= 16
    assert largest_share([config(n, eos_token_id=98) for n in new]) > 2 * known
    assert largest_share([config(n) for n in new], other=True) > 2 * known
    assert largest_share([config(n, max_time=1e6) for n in new]) > 2 * known


def test_a_share_that_was_given_holds_for_jobs(model):
    prompts, new = [prompt(30, i) for i in range(8)], [40, *[4] * 7]
    with hf_paged.Engine(
        model,
        hf_paged.EngineConfig(num_pages=200, page_size=8, max_batch_tokens=BUDGET, max_num_seqs=8,
                              mixed_prompt_tokens=None, prefix_caching=False, self_check=False),
        background=False,
    ) as engine:  # fmt: skip
        engine.generate(prompts, generation_config=[config(n) for n in new])
        assert sum(tokens > 0 for _, tokens in steps_of(engine)) == -(-8 * 30 // (BUDGET - 3))


def test_a_small_model_computes_whole_budgets_of_prompts(model):
    """Also of the last few, which others would compute in shares."""
    prompts, new = [prompt(30, i) for i in range(20)], [40, *[4] * 19]
    with make_engine(model, BUDGET) as engine:
        engine._core.limits.mixed_prompt_tokens = 4
        engine.generate(prompts, generation_config=[config(n) for n in new])
        steps = [(rows, tokens) for rows, tokens in steps_of(engine) if tokens]
        assert all(rows + tokens == BUDGET for rows, tokens in steps[2:-1])


@pytest.mark.parametrize(
    ("option", "parameters", "tokens"),
    [
        ("auto", 8_000_000_000, OFFLINE_STEP_TOKENS),
        ("auto", 600_000_000, 4096),
        (7, 8_000_000_000, None),
        (None, 1, None),
    ],
)
def test_steps_of_small_models_have_whole_budgets(option, parameters, tokens):
    assert offline_step_tokens(option, parameters, 4096) == tokens


@pytest.mark.parametrize(
    "options",
    [dict(do_sample=True), dict(do_sample=True, num_return_sequences=3), dict(num_beams=2)],
    ids=["samples", "several of each", "beams"],
)
def test_tokens_do_not_depend_on_the_order_of_service(model, options):
    prompts, new = draw(5, 10)
    configs = [config(n, **options) for n in new]
    with make_engine(model, seed=7) as engine:
        together = [output.sequences for output in engine.generate(prompts, generation_config=configs)]
        engine.check()
    with make_engine(model, seed=7) as engine:
        handles = [engine.submit(ids, generation_config=how) for ids, how in zip(prompts, configs)]
        apart = [handle.result().sequences for handle in handles]
    assert [[one.token_ids for one in some] for some in together] == [[one.token_ids for one in some] for some in apart]


def test_a_prompt_that_is_refused_ends_the_others(model):
    prompts, new = draw(6, 12)
    with make_engine(model) as engine:
        with pytest.raises(ValueError, match="at least one token"):
            engine.generate([*prompts, []], generation_config=[config(n) for n in [*new, 4]])
        while engine.step():
            pass
        engine.check()
        stats = engine.stats()
        assert stats.running == stats.waiting == 0
        assert stats.finished.keys() <= {"cancelled", "length"}


def test_a_name_that_is_taken_is_refused_and_its_owner_lives(model):
    with make_engine(model) as engine:
        owner = engine.submit(prompt(5), generation_config=config(6), request_id="mine")
        with pytest.raises(hf_paged.RequestError, match="'mine' is that of a request that has not ended"):
            engine.generate([prompt(4), prompt(9)], generation_config=config(5), request_id="mine")
        with pytest.raises(hf_paged.RequestError, match="'ours' is that"):
            engine.generate([prompt(4), prompt(9)], generation_config=config(5), request_id="ours")
        assert owner.result().token_ids == alone(model, prompt(5), config(6))


def test_an_unknown_option_is_refused(model):
    with make_engine(model) as engine, pytest.raises(TypeError, match="logprobz"):
        engine.generate([prompt(4)], generation_config=config(5), logprobz=1)


def test_jobs_of_several_threads(model):
    jobs = [draw(seed, 8) for seed in range(3)]
    results = {}
    with make_engine(model) as engine:

        def work(number: int) -> None:
            prompts, new = jobs[number]
            outputs = engine.generate(prompts, generation_config=[config(n) for n in new])
            results[number] = [output.token_ids for output in outputs]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.check()
    for number, (prompts, new) in enumerate(jobs):
        assert results[number] == [alone(model, ids, config(n)) for ids, n in zip(prompts, new)]
