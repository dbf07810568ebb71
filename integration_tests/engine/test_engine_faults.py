"""What goes wrong ends the request that it belongs to, with its cause: never another one, never the loop."""

import asyncio
import copy
import dataclasses
import gc
import pickle
import re
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from random_requests import tiny_model
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import hf_paged
from hf_paged.engine.sampling.request_params import RequestParams, WarperParams

PROMPT = [5, 6, 7, 8, 9]


def config(new: int = 8, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(params=[True, False], ids=["thread", "caller"])
def engine(model, request):
    options = hf_paged.EngineConfig(num_pages=24, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    with hf_paged.Engine(model, options, background=request.param) as engine:
        yield engine
        engine.check()
        assert engine.stats().rows == 0 or not engine.mail.is_closed
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def expected(model):
    return model.generate(torch.tensor([PROMPT]), generation_config=config())[0, len(PROMPT) :].tolist()


class Raises(LogitsProcessor):
    """Raises at the given call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("of the user's own code")
        return scores


class Stops(StoppingCriteria):
    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("of the user's own code")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Slow(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return scores


def assert_serves(engine, expected):
    assert engine.submit(PROMPT, generation_config=config()).result(timeout_s=30).token_ids == expected


def test_stream_and_result_agree(engine, expected):
    handle = engine.submit(PROMPT, generation_config=config())
    assert list(handle) == expected
    assert list(handle) == expected, "a second stream starts from the first token"
    output = handle.result()
    assert (output.token_ids, output.finish_reason, output.prompt_ids) == (expected, "length", PROMPT)
    assert output.timing.first_token_s <= output.timing.total_s


def test_async_stream(engine, expected):
    async def collect() -> tuple[list[list[int]], Any]:
        async def one() -> list[int]:
            return [token async for token in engine.submit(PROMPT, generation_config=config())]

        tokens = await asyncio.wait_for(asyncio.gather(*(one() for _ in range(5))), 30)
        return tokens, await engine.submit(PROMPT, generation_config=config()).result_async()

    streams, output = asyncio.run(collect())
    assert streams == [expected] * 5
    assert output.token_ids == expected


def test_many_threads(engine, expected):
    results: list[Any] = []

    def client() -> None:
        for _ in range(4):
            results.append(engine.submit(PROMPT, generation_config=config()).result(timeout_s=60).token_ids)

    threads = [threading.Thread(target=client) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert results == [expected] * 24


@pytest.mark.parametrize("at", [0, 3])
def test_a_processor_that_raises_ends_its_request_alone(engine, expected, at):
    others = [engine.submit(PROMPT, generation_config=config()) for _ in range(3)]
    bad = engine.submit(PROMPT, generation_config=config(), logits_processor=[Raises(at)])
    output = bad.result(timeout_s=30)
    assert (output.finish_reason, len(output.token_ids)) == ("error", at)
    assert output.token_ids == expected[:at]
    assert "of the user's own code" in str(output.error)
    with pytest.raises(RuntimeError, match="user's own code"):
        list(bad)
    assert [other.result(timeout_s=30).token_ids for other in others] == [expected] * 3


def test_a_criterion_that_raises_ends_its_request_alone(engine, expected):
    other = engine.submit(PROMPT, generation_config=config())
    output = engine.submit(PROMPT, generation_config=config(), stopping_criteria=[Stops(2)]).result(timeout_s=30)
    assert output.finish_reason == "error"
    assert "of the user's own code" in str(output.error)
    assert other.result(timeout_s=30).token_ids == expected


def test_one_failing_sample_ends_its_whole_request(engine, expected):
    options = GenerationConfig(max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    bad = engine.submit(PROMPT, generation_config=options, logits_processor=[Raises(7)])
    assert bad.result(timeout_s=30).finish_reason == "error"
    assert_serves(engine, expected)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt_ids must have at least one token"),
        ([5, 99], {}, r"prompt_ids\[1\] must be 0 to 98"),
        ([5, -1], {}, r"prompt_ids\[1\] must be 0 to 98"),
        ([[1, 2], [3, 4]], {}, r"\[L\] or \[1, L\]"),
        ([1.5], {}, "token ids"),
        ([5] * 127, {}, "135 tokens, the engine serves 128"),
        ([5] * 100, {"num_return_sequences": 8, "do_sample": True}, "pages"),
        (PROMPT, {"num_beams": 9}, "9 sequences"),
        (PROMPT, {"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
    ],
    ids=["empty", "beyond", "negative", "two", "floats", "model", "pool", "rows", "mode"],
)
def test_what_can_never_be_served_is_refused_at_submit(engine, expected, prompt, options, message):
    generation_config = config()
    generation_config.update(**options)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, generation_config=generation_config)
    assert_serves(engine, expected)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"priority": "high"}, TypeError),
        ({"priority": float("nan")}, ValueError),
        ({"deadline_s": -1}, ValueError),
        ({"deadline_s": float("nan")}, ValueError),
        ({"deadline_s": "soon"}, ValueError),
        ({"generation_config": 3}, TypeError),
    ],
)
def test_bad_arguments_of_submit(engine, argument, error):
    with pytest.raises(error, match=next(iter(argument))):
        engine.submit(PROMPT, **argument)


@pytest.mark.parametrize("prompt", ["a text", ["two", "words"], {"input_ids": PROMPT}], ids=["str", "list", "mapping"])
def test_text_is_not_a_prompt(engine, prompt):
    with pytest.raises(TypeError, match=r"tokenise it first|give its \"input_ids\""):
        engine.submit(prompt)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_below_one_are_refused_at_submit(engine, expected, name, value):
    running = engine.submit(PROMPT, generation_config=config())
    options = config()
    setattr(options, name, value)
    if (name, value) != ("num_beams", True):  # To transformers that is 1.
        with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
            engine.submit(PROMPT, generation_config=options)
    assert running.result(timeout_s=30).token_ids == expected


@pytest.mark.parametrize("name", ["temperature", "eos_token_ids", "num_sequences"])
def test_what_no_check_foresaw_ends_its_request_alone(model, engine, expected, name):
    """Rules with a value that nobody can use, found out where a request gets its slot."""
    rules = RequestParams.make(model, config(do_sample=True), prompt_ids=PROMPT)
    hot = WarperParams(True, temperature="hot")
    broken = {"temperature": {"plain": hot}, "eos_token_ids": {"eos_token_ids": ("x",)}}
    rules = dataclasses.replace(rules, **broken.get(name, {"num_sequences": 0}))
    running = engine.submit(PROMPT, generation_config=config())
    if name == "num_sequences":
        with pytest.raises(ValueError, match="num_sequences=0"):
            engine.submit(PROMPT, rules=rules)
    else:
        output = engine.submit(PROMPT, rules=rules).result(timeout_s=30)
        assert output.finish_reason == "error"
        assert isinstance(output.error, (TypeError, ValueError))
    assert running.result(timeout_s=30).token_ids == expected
    assert_serves(engine, expected)


def test_a_request_id_may_be_used_again_once_its_request_has_ended(engine, expected):
    first = engine.submit(PROMPT, generation_config=config(100), request_id="a")
    with pytest.raises(hf_paged.RequestError, match=r"'a'"):
        engine.submit(PROMPT, generation_config=config(), request_id="a")
    first.cancel()
    assert first.result(timeout_s=30).finish_reason == "cancelled"
    second = engine.submit(PROMPT, generation_config=config(), request_id="a")
    first.cancel()  # Another request has its id by now.
    assert second.result(timeout_s=30).token_ids == expected


def test_made_ids_keep_away_from_given_ones(engine, expected):
    given = [engine.submit(PROMPT, generation_config=config(60), request_id=f"request-{n}") for n in range(2, 6)]
    made = [engine.submit(PROMPT, generation_config=config()) for _ in range(6)]
    assert [handle.result(timeout_s=30).token_ids for handle in made] == [expected] * 6
    assert len({handle.request_id for handle in [*given, *made]}) == 10
    for handle in given:
        handle.cancel()


def test_nan_logits_end_the_request(model, engine, expected):
    class Nan(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * float("nan")

    output = engine.submit(PROMPT, generation_config=config(), logits_processor=[Nan()]).result(timeout_s=30)
    assert output.finish_reason == "error"
    assert "NaN" in str(output.error)

    def poison(module: Any, args: Any, output: Any) -> Any:
        return output * float("nan")

    hook = model.lm_head.register_forward_hook(hf_paged.row_wise(poison))
    try:
        output = engine.submit(PROMPT, generation_config=config()).result(timeout_s=30)
    finally:
        hook.remove()
    assert output.finish_reason == "error"
    assert "NaN" in str(output.error)
    assert_serves(engine, expected)


@pytest.fixture
def fault(model):
    """A fault that comes and goes: while it has an entry, keys and values of the later layers are NaN."""
    entries: list[Any] = []
    hook = model.model.layers[0].mlp.register_forward_hook(
        hf_paged.row_wise(lambda module, args, output: output * float("nan") if entries else None)
    )
    yield entries
    hook.remove()


def test_nan_of_a_step_is_not_found_again(model, fault, engine):
    system = [*range(10, 34)]
    want = model.generate(torch.tensor([[*system, 5]]), generation_config=config())[0, 25:].tolist()
    good = engine.submit([7, *system], generation_config=config()).result(timeout_s=30)
    fault.append("now")
    outputs = [
        engine.submit([*system, 4], generation_config=options).result(timeout_s=30)
        for options in (config(), config(num_beams=2))
    ]
    fault.clear()
    assert [output.finish_reason for output in outputs] == ["error", "error"]
    assert all("NaN" in str(output.error) for output in outputs)
    output = engine.submit([*system, 5], generation_config=config()).result(timeout_s=30)
    assert (output.token_ids, output.cached_tokens) == (want, 0)
    again = engine.submit([*system, 5], generation_config=config()).result(timeout_s=30)
    assert (again.token_ids, again.cached_tokens) == (want, 24)
    other = engine.submit([7, *system], generation_config=config()).result(timeout_s=30)
    assert (other.token_ids, other.cached_tokens) == (good.token_ids, 24), "other prefixes stay"


def test_nan_of_another_request_is_computed_again(model, engine):
    """What was spoilt in the cache by somebody who did not find out: whoever finds it computes it for himself."""
    system = [*range(10, 34)]
    want = model.generate(torch.tensor([[*system, 5]]), generation_config=config())[0, 25:].tolist()
    engine.submit([*system, 4], generation_config=config()).result(timeout_s=30)
    for group in engine._core.pool.groups.values():
        for pages in group.layers.values():
            pages.v.fill_(float("nan"))
    output = engine.submit([*system, 5], generation_config=config()).result(timeout_s=30)
    assert (output.token_ids, output.finish_reason, output.cached_tokens) == (want, "length", 0)
    assert output.timing.preemptions == 1
    again = engine.submit([*system, 5], generation_config=config()).result(timeout_s=30)
    assert (again.token_ids, again.cached_tokens) == (want, 24)


class Reshapes(LogitsProcessor):
    """A grammar's padded vocabulary, the best score behind the model's own; or one cut short; or no scores at all."""

    def __init__(self, change: int | None) -> None:
        self.change = change

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        if self.change is None:
            return None
        more = scores.new_full((len(scores), max(self.change, 0)), float(scores.max()) + 1)
        return torch.cat([scores[:, : scores.shape[1] + min(self.change, 0)], more], dim=1)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("change", [64, -5, None])
def test_scores_of_another_width_end_their_request_alone(engine, expected, options, change):
    others = [engine.submit(PROMPT, generation_config=config()) for _ in range(3)]
    settings = GenerationConfig(max_new_tokens=8, pad_token_id=0, **options)
    output = engine.submit(PROMPT, generation_config=settings, logits_processor=[Reshapes(change)]).result(timeout_s=30)
    assert output.finish_reason == "error"
    if change is not None:
        assert re.search(r"scores of shape \[.*\], those of the model's 99 logits", str(output.error))
    assert [other.result(timeout_s=30).token_ids for other in others] == [expected] * 3


def test_allowed_tokens_beyond_the_vocabulary_are_refused_before_they_index(engine, expected):
    other = engine.submit(PROMPT, generation_config=config())
    output = engine.submit(PROMPT, generation_config=config(), prefix_allowed_tokens_fn=lambda row, ids: [5, 99])
    assert "prefix_allowed_tokens_fn gave token 99: 0 to 98" in str(output.result(timeout_s=30).error)
    assert other.result(timeout_s=30).token_ids == expected


@pytest.mark.parametrize(
    ("options", "token"),
    [
        (dict(forced_bos_token_id=99), 99),
        (dict(forced_eos_token_id=[5, 1000]), 1000),
        (dict(forced_bos_token_id=-1), -1),
        (dict(eos_token_id=[5, 99]), 99),
        (dict(pad_token_id=99), 99),
        (dict(suppress_tokens=[3, 99]), 99),
        (dict(begin_suppress_tokens=[100]), 100),
        (dict(sequence_bias=[[[4, 101], 2.0], [[5], 1.0]]), 101),
        (dict(bad_words_ids=[[5], [6, 102]]), 102),
    ],
    ids=str,
)
def test_token_ids_beyond_the_vocabulary_are_refused(model, engine, options, token):
    """Device asserts on a GPU, which end the process's context."""
    (name,) = options
    wanted = f"{name} has token {token}, and the model has 99 logits: ids from 0 to 98 are accepted"
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, **({"pad_token_id": 0} | options))
    with pytest.raises(ValueError, match=wanted):
        engine.submit(PROMPT, generation_config=settings)
    none = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=-1, eos_token_id=98)
    assert engine.submit(PROMPT, generation_config=none).result(timeout_s=30).error is None
    if name.startswith("forced"):
        hf_paged.patch_generate(model)
        try:
            with pytest.raises(ValueError, match=wanted):
                model.generate(torch.tensor([PROMPT]), generation_config=settings)
        finally:
            hf_paged.unpatch_generate(model)


@pytest.mark.parametrize("name", ["refresh_weights", "sleep", "pause", "drop_prefixes", "warm_up"])
def test_what_changes_the_engine_is_refused_inside_a_step(engine, expected, name):
    class Calls(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == len(PROMPT) + 2:
                getattr(engine, name)()
            return scores

    other = engine.submit(PROMPT, generation_config=config())
    output = engine.submit(PROMPT, generation_config=config(), logits_processor=[Calls()]).result(timeout_s=30)
    assert isinstance(output.error, hf_paged.RequestError)
    assert f"{name}() was called inside a step" in str(output.error)
    assert other.result(timeout_s=30).token_ids == expected
    engine.drop_prefixes()
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_forward_that_raises_fails_its_step(model, engine, expected, k):
    calls = 0

    def fail(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == k + 1:
            raise torch.OutOfMemoryError("no memory in this forward")

    hook = model.model.layers[1].register_forward_hook(hf_paged.row_wise(fail))
    try:
        outputs = [
            h.result(timeout_s=30) for h in [engine.submit(PROMPT, generation_config=config()) for _ in range(3)]
        ]
    finally:
        hook.remove()
    failed = [output for output in outputs if output.finish_reason == "error"]
    assert failed
    assert all(isinstance(output.error, torch.OutOfMemoryError) for output in failed)
    assert all(output.token_ids == expected for output in outputs if output.finish_reason != "error")
    assert_serves(engine, expected)


def test_cancel_delivers_what_there_is(engine, expected):
    other = engine.submit(PROMPT, generation_config=config())
    handle = engine.submit(PROMPT, generation_config=config(100), logits_processor=[Slow()])
    for count, _ in enumerate(handle):
        if count == 2:
            handle.cancel()
    output = handle.result(timeout_s=30)
    assert output.finish_reason == "cancelled"
    assert output.error is None
    assert 3 <= len(output.token_ids) < 100
    assert other.result(timeout_s=30).token_ids == expected
    handle.cancel()  # It has ended: nothing to do.
    assert not engine.cancel("nobody")


def test_a_deadline_delivers_what_there_is(engine, expected):
    handle = engine.submit(PROMPT, generation_config=config(100), logits_processor=[Slow()], deadline_s=0.1)
    output = handle.result(timeout_s=30)
    assert output.finish_reason == output.sequences[0].finish_reason == "deadline"
    assert "deadline" in str(output.error)
    assert 0 < len(output.token_ids) < 100
    assert engine.submit(PROMPT, generation_config=config(), deadline_s=0).result(timeout_s=30).token_ids == []
    assert engine.stats().finished["deadline"] == 2
    assert_serves(engine, expected)


def test_requests_that_have_ended_are_not_kept_for_their_deadlines(engine):
    first = engine.submit(PROMPT, generation_config=config(100), deadline_s=80)
    for _ in range(25):
        engine.submit(PROMPT, generation_config=config(1), deadline_s=86400).result(timeout_s=30)
    assert len(engine.loop.deadlines) < 20
    first.cancel()
    late = engine.submit(PROMPT, generation_config=config(100), logits_processor=[Slow()], deadline_s=0.1)
    assert late.result(timeout_s=30).finish_reason == "deadline"


def test_a_stream_that_nobody_can_read_on_is_cancelled(engine, expected):
    for count, _ in enumerate(engine.submit(PROMPT, generation_config=config(100), request_id="stream")):
        if count == 2:
            break
    kept = engine.submit(PROMPT, generation_config=config())
    for _ in kept:
        break
    engine.submit(PROMPT, generation_config=config(3), request_id="unasked")
    gc.collect()
    assert kept.result(timeout_s=30).token_ids == expected
    assert_serves(engine, expected)
    assert engine.stats().finished == {"cancelled": 1, "length": 3}


def test_an_async_stream_that_nobody_can_read_on_is_cancelled(engine):
    async def read() -> None:
        async for _ in engine.submit(PROMPT, generation_config=config(100)):
            return

    asyncio.run(read())
    gc.collect()
    assert engine.submit(PROMPT, generation_config=config()).result(timeout_s=30).finish_reason == "length"
    assert engine.stats().finished == {"cancelled": 1, "length": 1}


def test_a_consumer_that_dies_holds_nobody_up(engine, expected):
    def consumer() -> None:
        for _ in engine.submit(PROMPT, generation_config=config(50)):
            return  # It never asks again.

    thread = threading.Thread(target=consumer)
    thread.start()
    thread.join(30)
    assert_serves(engine, expected)


def test_close_in_mid_flight_ends_every_request(model):
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=24, max_num_seqs=4, self_check=False))
    handles = [engine.submit(PROMPT, generation_config=config(100), logits_processor=[Slow()]) for _ in range(8)]
    outputs: list[Any] = []
    waiters = [threading.Thread(target=lambda h=h: outputs.append(h.result(timeout_s=30))) for h in handles]
    [waiter.start() for waiter in waiters]
    time.sleep(0.1)
    engine.close()
    [waiter.join(30) for waiter in waiters]
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 8
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(hf_paged.RequestError, match="closed"):
        engine.submit(PROMPT)
    with pytest.raises(hf_paged.RequestError, match="closed"), engine:
        pass
    engine.close()


@pytest.mark.parametrize("copies", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_cannot_be_pickled_or_copied(engine, copies):
    with pytest.raises(TypeError, match=r"make one there, hf_paged\.Engine\(model, config\)"):
        copies(engine)


def test_close_can_wait_for_requests(engine, expected):
    handle = engine.submit(PROMPT, generation_config=config())
    engine.close(drain=True)
    assert handle.result(timeout_s=0).token_ids == expected


def test_close_from_a_processor(model):
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=24, self_check=False))

    class Closes(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            engine.close()
            return scores

    handle = engine.submit(PROMPT, generation_config=config(20), logits_processor=[Closes()])
    assert handle.result(timeout_s=30).finish_reason == "cancelled"


def test_waiting_in_a_processor_is_refused(engine):
    class Waits(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            engine.step()
            return scores

    output = engine.submit(PROMPT, generation_config=config(), logits_processor=[Waits()]).result(timeout_s=30)
    assert isinstance(output.error, hf_paged.RequestError)


def test_an_error_of_the_engine_itself_leaves_nobody_waiting(model):
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=24, self_check=False))

    def broken(**kwargs: Any) -> None:
        raise AssertionError("the books are wrong")

    engine._core.plan = broken
    output = engine.submit(PROMPT, generation_config=config()).result(timeout_s=30)
    assert output.finish_reason == "error"
    assert "the books are wrong" in str(output.error)
    with pytest.raises(hf_paged.RequestError, match="the books are wrong"):
        engine.submit(PROMPT)
    engine.close()
    assert model.config._attn_implementation == "sdpa"


def test_a_result_can_be_waited_for_with_a_limit(engine):
    handle = engine.submit(PROMPT, generation_config=config(50), logits_processor=[Slow()])
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        handle.result(timeout_s=0.01)
    handle.cancel()
    assert handle.result(timeout_s=30).finish_reason == "cancelled"


def test_an_engine_that_nobody_holds_is_collected(model):
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=8, self_check=False))
    engine.submit(PROMPT, generation_config=config()).result(timeout_s=30)
    reference = weakref.ref(engine)
    thread = engine._thread
    del engine
    if thread is not None:
        thread.join(5)
    gc.collect()
    assert reference() is None
    assert model.config._attn_implementation == "sdpa"
