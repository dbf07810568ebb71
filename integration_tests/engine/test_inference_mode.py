"""``torch.inference_mode()`` around any part of an engine's life: its own tensors are of use outside too."""

import contextlib

import pytest
import torch
from random_requests import AddToToken, tiny_model
from small_engines import alone, config, prompt

import hf_paged

OPTIONS = {
    "greedy": {},
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3, suppress_tokens=[5, 6]),
    "beams": dict(num_beams=3),
    "lookup": dict(prompt_lookup_num_tokens=3),
}


def inference_if(is_inside: bool):
    return torch.inference_mode() if is_inside else contextlib.nullcontext()


@pytest.mark.parametrize(("made", "used"), [(True, False), (False, True)], ids=["made inside", "used inside"])
@pytest.mark.parametrize(
    ("family", "fuse", "background"),
    [("llama", True, True), ("llama", False, False), ("qwen3_next", False, True)],
)
def test_engine(made, used, background, family, fuse):
    model = tiny_model(family)
    usual = {name: more for name, more in OPTIONS.items() if name != "lookup" or family == "llama"}
    expected = {name: alone(model, prompt(20), config(6, **more)) for name, more in usual.items()}
    options = dict(page_size=8, num_pages=40, max_num_seqs=6, max_batch_tokens=32, fuse=fuse)

    def check():
        for name, more in usual.items():
            request = dict(generation_config=config(6, **more))
            handle = engine.submit(prompt(20), **request)
            own = engine.submit(prompt(9), generation_config=config(3), logits_processor=[AddToToken()])
            assert handle.result().token_ids == expected[name], (handle.result().error, name)
            assert own.result().error is None

    with inference_if(made):
        engine = hf_paged.Engine(model, hf_paged.EngineConfig(**options), background=background)
        check()
    with inference_if(used):
        check()
        engine.pause()
        engine.resume()
        check()
        engine.sleep()
    with inference_if(not used):
        engine.wake()
        check()
        # Begun here, ended elsewhere.
        handle = engine.submit(prompt(20), generation_config=config(6))
        if not background:
            engine.step()
    with inference_if(used):
        assert handle.result().token_ids == expected["greedy"]
        engine.check()
        engine.close()
    model(torch.tensor([prompt(5)])).logits.sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters() if p.grad is not None)


def test_patched_generate():
    model = tiny_model("llama")
    ids = torch.tensor([prompt(9), prompt(9, 3)])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(page_size=8, num_pages=40, max_num_seqs=6), keep_awake=True)
    for is_inside in (True, False, True, False):
        with inference_if(is_inside):
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_a_model_born_in_inference_mode():
    expected = alone(tiny_model("llama"), prompt(20), config(6))
    with torch.inference_mode():
        model = tiny_model("llama")
    assert model.lm_head.weight.is_inference()
    options = dict(page_size=8, num_pages=40, max_num_seqs=6, fuse=None)
    with hf_paged.Engine(model, hf_paged.EngineConfig(**options)) as engine:
        for _ in range(2):
            assert engine.generate([prompt(20)], generation_config=config(6))[0].token_ids == expected
        engine.pause()
        with torch.inference_mode():
            model.lm_head.weight.neg_()
            expected = alone(model, prompt(20), config(6))
        engine.resume()
        assert engine.generate([prompt(20)], generation_config=config(6))[0].token_ids == expected
