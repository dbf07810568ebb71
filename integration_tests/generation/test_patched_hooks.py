"""Methods and hooks of a model's own under a patched generate(): none is skipped, none sees packed rows unasked."""

import contextlib
import functools
import inspect
import types

import pytest
import torch
from explicit_models import prompts
from patched import CONFIG, assert_same, batch, both
from transformers import GenerationConfig, LlamaForCausalLM

import hf_paged
from hf_paged import UnsupportedModelError
from hf_paged.hooks import is_marked


def doubled_positions(self, input_ids, **kwargs):
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **kwargs)
    return inputs | {"position_ids": inputs["position_ids"] * 2}


def raised_logits(self, outputs, model_kwargs, **kwargs):
    outputs.logits[..., 7] += 30
    return LlamaForCausalLM._update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs)


def cut_loop(name):
    def loop(self, *args, **kwargs):
        return getattr(LlamaForCausalLM, name)(self, *args, **kwargs)[:, :-2]

    return loop


STEP_METHODS = {
    "prepare_inputs_for_generation": (doubled_positions, {}),
    "_update_model_kwargs_for_generation": (raised_logits, {}),
    "_sample": (cut_loop("_sample"), {}),
    "_beam_search": (cut_loop("_beam_search"), dict(num_beams=2)),
    "_assisted_decoding": (cut_loop("_assisted_decoding"), dict(prompt_lookup_num_tokens=2)),
}


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", STEP_METHODS)
def test_a_step_of_the_models_own_is_not_skipped(model, reasons, name, where):
    method, options = STEP_METHODS[name]
    options = dict(input_ids=batch(6)["input_ids"], max_new_tokens=8, do_sample=False) | options
    usual = model.generate(**options)
    own = type("OwnStep", (LlamaForCausalLM,), {name: method} if where == "class" else {})
    changed = own(model.config).eval()
    changed.load_state_dict(model.state_dict())
    changed.generation_config = model.generation_config
    if where == "instance":
        setattr(changed, name, types.MethodType(method, changed))
    expected = changed.generate(**options)
    # transformers takes its loops from the class.
    is_loop = name in ("_sample", "_beam_search", "_assisted_decoding")
    assert torch.equal(expected, usual) == (where == "instance" and is_loop)
    hf_paged.patch_generate(changed, CONFIG)
    assert_same(changed.generate(**options), expected)
    assert f"{name}() is" in reasons.pop()
    assert_same(changed.generate(**options, custom_generate=hf_paged.generate), expected)
    assert f"{name}() is" in reasons.pop()
    hf_paged.unpatch_generate(changed)
    assert_same(changed.generate(**options, custom_generate=hf_paged.generate), expected)
    assert f"{name}() is" in reasons.pop()
    with pytest.raises(UnsupportedModelError, match=name):
        hf_paged.Engine(changed, CONFIG)
    if where == "instance":
        delattr(changed, name)
        got, expected = both(changed, **options)
        assert_same(got, expected)
        assert reasons == []


# Hooks

STEERING = 3 * torch.randn(64, generator=torch.Generator().manual_seed(3))


def on_last(module, args, output):
    return torch.cat([output[:, :-1], output[:, -1:] + STEERING[: output.shape[-1]]], 1)


def on_prompt(module, args, output):
    return on_last(module, args, output) if output.shape[1] > 1 else output


def on_answer(module, args, output):
    return output + STEERING[: output.shape[-1]] if output.shape[1] == 1 else output


def on_second_row(module, args, output):
    return torch.cat([output[:1], output[1:] + STEERING[: output.shape[-1]]])


def on_all(module, args, output):
    return output + STEERING[: output.shape[-1]]


def before_all(module, args, kwargs):
    states = args[0] if args else kwargs["hidden_states"]
    changed = states + STEERING[: states.shape[-1]]
    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})


def everywhere(module, args, output):
    return on_last(module, args, output) if type(module).__name__ == "LlamaMLP" else None


@contextlib.contextmanager
def hooked(model, hook):
    layer = model.model.layers[0]
    if hook is everywhere:
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    elif "kwargs" in inspect.signature(hook).parameters:
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("when", ["before the first call", "after it"])
@pytest.mark.parametrize("hook", [on_last, on_prompt, on_answer, on_second_row, on_all, before_all, everywhere])
def test_hooks_never_see_packed_rows_unasked(model, reasons, hook, when):
    options = batch(4, 9, 5) | dict(max_new_tokens=8, do_sample=False)
    usual = model.generate(**options)
    with hooked(model, hook):
        expected = model.generate(**options)
    assert not torch.equal(usual, expected)
    hf_paged.patch_generate(model, CONFIG)
    if when == "after it":
        assert_same(model.generate(**options), usual)
    with hooked(model, hook):
        assert_same(model.generate(**options), expected)
        assert f"{hook.__name__} may depend on the rows and columns" in reasons.pop()
        assert "hf_paged.row_wise(hook)" in hf_paged.is_supported(model)[0]
    assert_same(model.generate(**options), usual)
    assert reasons == []
    assert model.generate.engine is not None


@pytest.mark.parametrize("hook", [on_all, before_all])
@pytest.mark.parametrize("keep_awake", [False, True])
def test_row_wise_hooks_run_in_the_engine(model, reasons, hook, keep_awake):
    options = batch(4, 20, 5) | dict(max_new_tokens=8, do_sample=False)
    usual = model.generate(**options)
    # The same code as another function: marks stay.
    marked = hf_paged.row_wise(types.FunctionType(hook.__code__, globals(), hook.__name__))
    with hooked(model, marked):
        expected = model.generate(**options)
        hf_paged.patch_generate(model, CONFIG, keep_awake=keep_awake)
        assert_same(model.generate(**options), expected)
    assert_same(model.generate(**options), usual)
    with hooked(model, marked):
        assert_same(model.generate(**options), expected)
    assert not torch.equal(expected, usual)
    assert reasons == []


def test_an_engine_refuses_hooks_and_goes_on_without_them(model):
    (prompt,) = prompts(20)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    usual = model.generate(torch.tensor([prompt]), generation_config=config)[0, 20:].tolist()
    with hooked(model, on_all):
        steered = model.generate(torch.tensor([prompt]), generation_config=config)[0, 20:].tolist()
        with pytest.raises(UnsupportedModelError, match=r"on_all may .*hf_paged.row_wise"):
            hf_paged.Engine(model, CONFIG)
    assert steered != usual
    with hf_paged.Engine(model, CONFIG, background=False) as engine:
        assert engine.submit(prompt, generation_config=config).result().token_ids == usual
        with hooked(model, on_last):
            failed = engine.submit(prompt, generation_config=config).result()
            assert failed.finish_reason == "error"
            assert "hf_paged.row_wise" in str(failed.error)
        # A hook that comes between two steps.
        handle = engine.submit(prompt, generation_config=config)
        engine.step()
        with hooked(model, everywhere):
            assert "hf_paged.row_wise" in str(handle.result().error)
        # Its prompt is in the prefix cache, without the hook's part.
        for hook, expected in ((on_all, steered), (None, usual)):
            marked = hook and hf_paged.row_wise(types.FunctionType(hook.__code__, globals(), hook.__name__))
            with hooked(model, marked) if marked else contextlib.nullcontext():
                assert engine.submit(prompt, generation_config=config).result().token_ids == expected
        engine.check()


def test_a_forward_that_is_exchanged_later_is_compared_first(model, reasons):
    """A replaced forward is no hook, and may do the same to packed rows or not: the engine's check tells."""
    options = batch(4, 9, 5) | dict(max_new_tokens=8, do_sample=False)
    mlp = model.model.layers[0].mlp
    own = type(mlp).forward

    def doubled(states):
        return 2 * own(mlp, states)

    def last_doubled(states):
        found = own(mlp, states)
        return torch.cat([found[:, :-1], 9 * found[:, -1:]], 1)

    usual = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    assert_same(model.generate(**options), usual)
    for forward, is_served in ((last_doubled, False), (doubled, True), (last_doubled, False)):
        mlp.forward = forward
        try:
            expected = type(model).generate(model, **options)
            assert_same(model.generate(**options), expected)
            assert_same(model.generate(**options), expected)
        finally:
            del mlp.forward
        assert not torch.equal(expected, usual)
        assert [("something else in the engine" in reason) for reason in reasons] == [True, True][: 2 * (not is_served)]
        reasons.clear()
    assert_same(model.generate(**options), usual)
    assert reasons == []


@pytest.mark.parametrize("bad", [None, "hook", print])
def test_what_cannot_be_row_wise(bad):
    with pytest.raises(TypeError, match="hook is"):
        hf_paged.row_wise(bad)


def test_row_wise_marks_every_kind_of_callable():
    class Steer:
        def __call__(self, module, args, output):
            return output

        def add(self, module, args, output):
            return output

    for hook in (Steer(), Steer().add, functools.partial(on_all), lambda module, args, output: output):
        assert not is_marked(hook)
        assert hf_paged.row_wise(hook) is hook
        assert is_marked(hook)
    assert is_marked(Steer().add)
    assert is_marked(functools.partial(Steer().add))
    assert not is_marked(Steer())
