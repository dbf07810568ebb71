"""What is no Exception in a request's own code ends that request, never the loop; Ctrl-C reaches who waits."""

import asyncio
import os
import signal
import threading
from typing import Any

import pytest
import torch
from random_requests import tiny_model
from small_engines import run_again
from transformers import GenerationConfig

import hf_paged

PROMPT = [5, 6, 7, 8, 9]
ERRORS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, pytest.fail.Exception, KeyError]
AT = 3
"""New tokens that a request gets before its own code raises."""


def config(new: int = 8, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model):
    return model.generate(torch.tensor([PROMPT]), generation_config=config())[0, len(PROMPT) :].tolist()


def make_engine(model, background: bool, captured: bool = False) -> hf_paged.Engine:
    options = hf_paged.EngineConfig(num_pages=24, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    engine = hf_paged.Engine(model, options, background=background)
    if captured:
        assert engine._core.use_graphs(run_again) is None
        engine._core.runs_ahead = True
    return engine


def raising(place: str, error: BaseException) -> dict[str, Any]:
    """Arguments of submit with code that raises after ``AT`` tokens."""

    def code(*args: Any, **kwargs: Any) -> Any:
        ids = args[1] if place == "prefix_allowed_tokens_fn" else args[0]
        if ids.shape[-1] >= len(PROMPT) + AT + (place == "stopping_criteria"):
            raise error
        if place == "stopping_criteria":
            return torch.zeros(len(ids), dtype=torch.bool)
        return list(range(99)) if place == "prefix_allowed_tokens_fn" else args[1]

    return {place: code if place == "prefix_allowed_tokens_fn" else [code]}


@pytest.mark.parametrize("mode", ["greedy", "captured", "beams", "lookup"])
@pytest.mark.parametrize("background", [True, False], ids=["thread", "caller"])
def test_a_request_ends_alone(model, expected, background, mode):
    options = {"beams": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 2}}.get(mode, {})
    with make_engine(model, background, mode == "captured") as engine:
        others = [engine.submit(PROMPT, generation_config=config(40)) for _ in range(2)]
        bad = []
        for place in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"):
            for kind in ERRORS if place == "logits_processor" else ERRORS[:3]:
                error = kind("of the user's own code")
                handle = engine.submit(PROMPT, generation_config=config(**options), **raising(place, error))
                bad.append((handle, error))
        for handle, error in bad:
            output = handle.result(timeout_s=60)
            assert (output.finish_reason, output.error) == ("error", error)
            if not options:
                with pytest.raises(type(error)):
                    list(handle)
        later = engine.submit(PROMPT, generation_config=config())
        assert later.result(timeout_s=60).token_ids == expected
        assert [other.result(timeout_s=60).token_ids[:8] for other in others] == [expected] * 2
        assert [other.result().finish_reason for other in others] == ["length"] * 2
        engine.check()
        engine.drop_prefixes()
        assert engine.stats().pages_used == 0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("background", [True, False], ids=["thread", "caller"])
def test_in_a_forward_it_fails_the_step(model, expected, background, error):
    """Of a module's hook, say: the thread of the engine goes on, a caller that runs the step gets it."""
    with make_engine(model, background) as engine:
        left = [error]

        def fail(*args: Any) -> None:
            if left:
                raise left.pop()

        hook = model.model.layers[1].register_forward_hook(hf_paged.row_wise(fail))
        before = engine.submit(PROMPT, generation_config=config())
        if background:
            assert before.result(timeout_s=60).error is error
        else:
            with pytest.raises(type(error)):
                before.result(timeout_s=60)
            assert before.result(timeout_s=0).error is error
        hook.remove()
        assert engine.submit(PROMPT, generation_config=config()).result(timeout_s=60).token_ids == expected
        engine.check()


@pytest.mark.parametrize("place", ["a processor", "the plan", "the forward"])
def test_an_interrupt_reaches_the_caller_after_the_step(model, expected, place):
    """The main thread runs the step: nothing is lost, and what was asked for goes on."""
    came = []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if not came:
            came.append(place)
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # Here Python would raise.
        return args[1] if place == "a processor" else None

    with make_engine(model, background=False) as engine:
        core, plan = engine._core, engine._core.plan
        inside = interrupt if place == "the forward" else lambda *args: None
        hook = model.model.layers[0].register_forward_hook(hf_paged.row_wise(inside))
        if place == "the plan":
            core.plan = lambda **options: (interrupt(), plan(**options))[1]
        processors = {"logits_processor": [interrupt]} if place == "a processor" else {}
        handle = engine.submit(PROMPT, generation_config=config(), **processors)
        try:
            with pytest.raises(KeyboardInterrupt):
                handle.result(timeout_s=60)
        finally:
            hook.remove()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        engine.check()
        assert not handle.is_done
        assert handle.result(timeout_s=60).token_ids == expected


def test_a_second_interrupt_does_not_wait(model, expected):
    class Hangs:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            while True:
                sum(range(1000))

    with make_engine(model, background=False) as engine:
        handle = engine.submit(PROMPT, generation_config=config(), logits_processor=[Hangs()])
        other = engine.submit(PROMPT, generation_config=config())
        with pytest.raises(KeyboardInterrupt):
            handle.result(timeout_s=60)
        assert isinstance(handle.result(timeout_s=60).error, KeyboardInterrupt)
        assert other.result(timeout_s=60).token_ids == expected
        engine.check()


def test_an_interrupt_while_the_engines_thread_runs(model, expected):
    with make_engine(model, background=True) as engine:
        reached, goes_on = threading.Event(), threading.Event()

        def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            reached.set()
            assert goes_on.wait(30)
            return scores

        handle = engine.submit(PROMPT, generation_config=config(), logits_processor=[wait])
        interrupts = threading.Thread(target=lambda: (reached.wait(30), os.kill(os.getpid(), signal.SIGINT)))

        def wait_for_it() -> None:
            interrupts.start()  # It may come at once.
            handle.result(timeout_s=60)

        with pytest.raises(KeyboardInterrupt):
            wait_for_it()
        goes_on.set()
        interrupts.join()
        assert handle.result(timeout_s=60).token_ids == expected


def test_patched_generate_raises_it_in_the_call_that_brought_it(model):
    hf_paged.patch_generate(model)
    try:
        ids = torch.tensor([PROMPT])
        expected = model.generate(ids, generation_config=config(30)).tolist()
        others: list[Any] = []
        thread = threading.Thread(
            target=lambda: [others.append(model.generate(ids, generation_config=config(30)).tolist()) for _ in range(4)]
        )
        thread.start()
        for kind in (asyncio.CancelledError, SystemExit, KeyboardInterrupt):
            processors = raising("logits_processor", kind("gone"))["logits_processor"]
            with pytest.raises(kind, match="gone"):
                model.generate(ids, generation_config=config(30), logits_processor=processors)
        thread.join(60)
        assert others == [expected] * 4
    finally:
        hf_paged.unpatch_generate(model)
