"""What goes wrong ends the request that it belongs to, with its cause: never another one, never the loop."""

import asyncio
import gc
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import hf_paged

sys.path.insert(0, str(Path(__file__).parent))
from random_requests import tiny_model

PROMPT = [5, 6, 7, 8, 9]


def config(new: int = 8, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(params=[True, False], ids=["thread", "caller"])
def engine(model, request):
    options = hf_paged.EngineConfig(num_pages=24, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    with hf_paged.Engine(model, options, background=request.param) as engine:
        yield engine
        engine.check()
        assert engine.stats().rows == 0 or not engine._closed
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
    [({"priority": "high"}, TypeError), ({"deadline_s": -1}, ValueError), ({"generation_config": 3}, TypeError)],
)
def test_bad_arguments_of_submit(engine, argument, error):
    with pytest.raises(error):
        engine.submit(PROMPT, **argument)


def test_a_request_id_may_be_used_again_once_its_request_has_ended(engine, expected):
    first = engine.submit(PROMPT, generation_config=config(100), request_id="a")
    with pytest.raises(hf_paged.RequestError, match=r"'a'"):
        engine.submit(PROMPT, generation_config=config(), request_id="a")
    first.cancel()
    assert first.result(timeout_s=30).finish_reason == "cancelled"
    assert engine.submit(PROMPT, generation_config=config(), request_id="a").result(timeout_s=30).token_ids == expected


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
    assert output.finish_reason == "cancelled"
    assert "deadline" in str(output.error)
    assert 0 < len(output.token_ids) < 100
    assert engine.submit(PROMPT, generation_config=config(), deadline_s=0).result(timeout_s=30).token_ids == []
    assert_serves(engine, expected)


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
    engine.close()


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
