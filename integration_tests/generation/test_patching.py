"""Patching and unpatching generate(): what stays with a model, threads, errors, offloaded weights."""

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from explicit_models import tiny_model
from patched import CONFIG, EOS, Recorder, assert_same, batch, both
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import EngineConfig, UnsupportedModelError
from hf_paged.generation.patch import PatchedGenerate


def test_the_signature_is_kept(model):
    before = inspect.signature(model.generate)
    doc = model.generate.__doc__
    hf_paged.patch_generate(model)
    assert inspect.signature(model.generate) == before
    assert model.generate.__doc__ == doc


def test_the_model_is_as_it_was_between_calls(model):
    hf_paged.patch_generate(model, CONFIG)
    ids = batch(5)["input_ids"]
    first = model.generate(ids, max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"
    logits = model(ids).logits
    logits.sum().backward()
    model.zero_grad()
    with torch.no_grad():
        model.lm_head.weight.data.neg_()  # through .data, which leaves no trace
    try:
        got, expected = both(model, ids, max_new_tokens=4)
        assert_same(got, expected)
        assert not torch.equal(got, first)
    finally:
        model.lm_head.weight.data.neg_()


@pytest.mark.parametrize("keep_awake", [False, True])
def test_an_engine_keeps_the_addresses_of_its_pages_and_no_prefix(model, reasons, keep_awake):
    inputs = batch(20, 17)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    hf_paged.patch_generate(model, CONFIG, keep_awake=keep_awake)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    engine = model.generate.engine
    pages = [page for group in engine._core.pool.groups.values() for page in group.layers.values()]
    assert pages
    assert all((page.arena.committed > 0) == keep_awake for page in pages)
    assert model.config._attn_implementation == "sdpa"
    assert engine.stats().pages_used == 0
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-2)
        hf_paged.unpatch_generate(model)
        changed = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        hf_paged.patch_generate(model, CONFIG, keep_awake=True)
        for expected_now in (changed, changed):
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected_now)
        with torch.no_grad():
            weight.copy_(before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not torch.equal(changed, expected), "weights that change nothing prove nothing"
    assert not reasons


def test_keep_awake_is_a_bool(model):
    with pytest.raises(TypeError, match="keep_awake is 1"):
        hf_paged.patch_generate(model, keep_awake=1)


@pytest.mark.parametrize("keep_awake", [False, True])
def test_a_model_in_another_dtype_gets_other_pages(model, reasons, keep_awake):
    changed = copy.deepcopy(model)
    options = batch(4, 9) | dict(max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(changed, CONFIG, keep_awake=keep_awake)
    expected = changed.generate(**options)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        got = changed.to(dtype).generate(**options)
        pages = changed.generate.engine._core.pool.groups.values()
        assert {page.k.dtype for group in pages for page in group.layers.values()} <= {dtype}
        if dtype != torch.bfloat16:
            # float32 that was bfloat16 once is not what it was.
            hf_paged.unpatch_generate(changed)
            assert_same(got, changed.generate(**options))
            hf_paged.patch_generate(changed, CONFIG, keep_awake=keep_awake)
    assert got.shape == expected.shape
    assert reasons == []


@pytest.mark.parametrize("run_before", [False, True])
def test_generate_outlives_the_name_of_its_model(run_before, reasons):
    ids = batch(5)["input_ids"]
    model = tiny_model("llama", "sdpa", num_hidden_layers=1)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(model, CONFIG)
    if run_before:
        model.generate(ids, max_new_tokens=2)
    generate, gone = model.generate, weakref.ref(model)
    del model
    assert torch.equal(generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert reasons == []
    del generate
    gc.collect()
    assert gone() is None, "a patched model that nobody has is freed"


def test_unpatching_waits_for_calls_of_other_threads(model, reasons):
    options = batch(4, 9) | dict(max_new_tokens=30, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    has_begun, may_go_on, results = threading.Event(), threading.Event(), []

    class Waits(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 2:  # the prompts come first, before the engine
                has_begun.set()
                assert may_go_on.wait(30)

    def run():
        results.append(model.generate(**options, streamer=Waits()))

    caller = threading.Thread(target=run)
    caller.start()
    assert has_begun.wait(30)
    generate = model.generate
    unpatcher = threading.Thread(target=hf_paged.unpatch_generate, args=(model,))
    unpatcher.start()
    unpatcher.join(0.2)
    assert unpatcher.is_alive()
    assert "generate" not in model.__dict__
    # A call that comes meanwhile is transformers'.
    assert torch.equal(generate(**options), expected)
    assert "not patched any more" in reasons.pop()
    may_go_on.set()
    caller.join(30)
    unpatcher.join(30)
    assert torch.equal(results[0], expected)
    assert generate.engine is None
    assert reasons == []


@pytest.mark.parametrize("again", [False, True])
def test_unpatching_from_inside_a_call(model, reasons, again):
    options = batch(4, 9) | dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    patched = model.generate

    class Unpatches(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 2:
                hf_paged.unpatch_generate(model)
            if len(self.got) == 2 and again:
                hf_paged.patch_generate(model, CONFIG)

    assert torch.equal(model.generate(**options, streamer=Unpatches()), expected)
    assert patched.engine is None
    assert torch.equal(model.generate(**options), expected)
    assert reasons == []


def test_patching_again_takes_the_new_options(model):
    hf_paged.patch_generate(model, CONFIG)
    model.generate(batch(5)["input_ids"], max_new_tokens=4)
    first = model.generate
    hf_paged.patch_generate(model, EngineConfig(page_size=16))
    assert model.generate is not first
    assert first.engine is None
    assert model.generate.config.page_size == 16
    model.generate(batch(5)["input_ids"], max_new_tokens=4)
    assert model.generate.engine.config.page_size == 16
    hf_paged.unpatch_generate(model)
    hf_paged.unpatch_generate(model)


def test_copies_and_files_are_not_patched(tmp_path):
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)  # others may hold hooks of transformers, without a pickle
    hf_paged.patch_generate(model, CONFIG)
    ids = batch(5)["input_ids"]
    expected = model.generate(ids, max_new_tokens=4)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy([model, model.generate])[0]]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    model.save_pretrained(tmp_path)
    copies.append(AutoModelForCausalLM.from_pretrained(tmp_path))
    for other in copies:
        assert not isinstance(other.__dict__.get("generate"), PatchedGenerate)
        assert other.generate.__self__ is other
        assert torch.equal(other.generate(ids, max_new_tokens=4), expected)
        hf_paged.patch_generate(other, CONFIG)
        assert torch.equal(other.generate(ids, max_new_tokens=4), expected)
    assert set(model.state_dict()) == set(copies[0].state_dict())


def test_a_call_of_its_own_without_a_patch(model, reasons):
    options = dict(max_new_tokens=9, eos_token_id=EOS, do_sample=False)
    for more in (dict(), dict(num_beams=3, num_return_sequences=2), dict(repetition_penalty=1.4)):
        expected = model.generate(**batch(4, 9, 2), **options, **more)
        got = model.generate(**batch(4, 9, 2), **options, **more, custom_generate=hf_paged.generate)
        assert_same(got, expected)
    assert reasons == []
    sampled = [
        model.generate(**batch(4, 9), do_sample=True, max_new_tokens=5, seed=seed, custom_generate=hf_paged.generate)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    hf_paged.patch_generate(model, CONFIG)
    options = dict(do_sample=True, max_new_tokens=5, seed=2)
    assert torch.equal(model.generate(**batch(4, 9), **options, custom_generate=hf_paged.generate), sampled[2])
    assert model.generate.engine is not None
    hf_paged.unpatch_generate(model)
    assert reasons == []
    got = model.generate(
        **batch(4, 9), max_new_tokens=5, return_dict_in_generate=True, output_scores=True,
        custom_generate=hf_paged.generate,
    )  # fmt: skip
    assert len(got.scores) == 5
    assert "output_scores" in reasons[0]


def test_threads_share_the_engine(model, reasons):
    expected = [model.generate(**batch(length), max_new_tokens=12) for length in (3, 5, 7, 9)]
    hf_paged.patch_generate(model, CONFIG)
    got = [None] * 4

    def run(index, length):
        for _ in range(3):
            got[index] = model.generate(**batch(length), max_new_tokens=12)

    threads = [threading.Thread(target=run, args=(i, n)) for i, n in enumerate((3, 5, 7, 9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(got, expected):
        assert_same(mine, theirs)
    assert reasons == []
    model.generate.engine.check()


def test_an_error_of_one_thread_is_that_threads_alone(model, reasons):
    options = batch(4, 9) | dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    together, outcomes = threading.Barrier(3), []

    def fail(input_ids, scores):
        if input_ids.shape[1] > 12:
            raise ZeroDivisionError("of this call")
        return scores

    fail.row_wise = True

    def run(processors):
        together.wait(30)
        try:
            outcomes.append(model.generate(**options, logits_processor=processors).tolist())
        except ZeroDivisionError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(processors,)) for processors in ([], [fail], [])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, outcomes)) == sorted(map(str, [expected.tolist()] * 2 + ["of this call"]))
    assert torch.equal(model.generate(**options), expected)
    assert reasons == []
    model.generate.engine.check()


def test_offloaded_weights_go_to_transformers(reasons):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    options = batch(4, 9) | dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**options), expected)
    assert "is on the meta device" in reasons.pop()
    with pytest.raises(UnsupportedModelError, match="is on the meta device"):
        hf_paged.Engine(model, CONFIG)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "mistral"])
def test_other_families(family, reasons):
    model = tiny_model(family, "eager")
    for options in (dict(eos_token_id=EOS), dict(num_beams=2, num_return_sequences=2)):
        got, expected = both(model, **batch(4, 19, 2), max_new_tokens=12, do_sample=False, **options)
        assert_same(got, expected)
    assert reasons == []


@pytest.mark.parametrize("bad", ["text", torch.nn.Linear(2, 2), None])
def test_what_cannot_be_patched(bad):
    with pytest.raises(TypeError, match="transformers model with generate"):
        hf_paged.patch_generate(bad)


def test_a_generate_of_somebody_else_is_not_replaced(model):
    model.generate = print
    with pytest.raises(ValueError, match="has been replaced by <built-in function print>"):
        hf_paged.patch_generate(model)
    hf_paged.unpatch_generate(model)
    assert model.generate is print
    del model.generate


def test_a_config_of_another_kind(model):
    with pytest.raises(TypeError, match=r"config is \{\}: an EngineConfig"):
        hf_paged.patch_generate(model, {})
