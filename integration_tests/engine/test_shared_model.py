"""One model for several at once: engines, a patched generate(), plain forwards, whoever sets an implementation."""

import contextlib
import copy
import io
import random
import sys
import threading

import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, engine_of, make_engine, prompt

import hf_paged
from hf_paged import UnsupportedModelError

LENGTHS = (3, 9, 17)


@pytest.fixture
def often(monkeypatch):
    """Threads take turns a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def expected_of(model) -> list[list[int]]:
    model.set_attn_implementation("eager")
    tokens = [alone(model, prompt(n, n), config(6)) for n in LENGTHS]
    model.set_attn_implementation("sdpa")
    return tokens


def tokens_of(engine) -> list[list[int]]:
    outputs = engine.generate([prompt(n, n) for n in LENGTHS], generation_config=config(6))
    assert [output.error for output in outputs] == [None] * len(LENGTHS)
    return [output.token_ids for output in outputs]


@contextlib.contextmanager
def scoring(model, ids, callers=None, atol=1e-4):
    """A thread's plain forwards, each as the first was; ``callers`` is held for each."""
    with torch.no_grad():
        logits = model(ids).logits
    wrong, num_forwards, stop = [], [], threading.Event()

    def score():
        while not stop.is_set():
            try:
                with torch.no_grad(), callers or contextlib.nullcontext():
                    got = model(ids).logits
                if not torch.allclose(got, logits, atol=atol):
                    wrong.append(float((got - logits).abs().max()))
            except Exception as error:
                wrong.append(error)
            num_forwards.append(1)

    thread = threading.Thread(target=score)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert num_forwards


@pytest.mark.parametrize("seed", range(3))
def test_engines_come_and_go_in_any_order(seed):
    draw = random.Random(seed)
    model = tiny_model("llama")
    expected = expected_of(model)
    engines: list[hf_paged.Engine] = []
    for _ in range(10):
        what = draw.choice(["open", "close", "drop", "set", "pause", "generate", "generate"])
        if what == "open" and len(engines) < 3:
            make = draw.choice([make_engine, lambda model: engine_of(model, fuse=draw.choice([True, False]))])
            engines.append(make(model))
        elif what == "close" and engines:
            engines.pop(draw.randrange(len(engines))).close()
        elif what == "drop" and engines:
            del engines[draw.randrange(len(engines))]
        elif what == "set":
            name = draw.choice(["sdpa", "eager", "paged_flash"])
            model.set_attn_implementation(name)
        elif what == "pause" and engines:
            engine = draw.choice(engines)
            engine.pause(keep_graphs=draw.choice([True, False]))
            engine.resume()
        elif engines:
            before = model.config._attn_implementation
            assert tokens_of(draw.choice(engines)) == expected
            assert model.config._attn_implementation == before
        assert not any("forward" in module.__dict__ for module in model.modules())
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("fuse", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_forwards_beside_a_patched_generate(attention, fuse, often):
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    ids = torch.tensor([prompt(9), prompt(9, 1)])
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    options = dict(page_size=8, max_num_seqs=4, max_batch_tokens=32, num_pages=32, fuse=fuse)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(**options))
    with scoring(model, ids):
        for _ in range(4):
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_plain_forwards_while_an_engine_starts_meet_its_hooks_and_are_their_own(family, monkeypatch):
    """An engine records modules and proves fused ones; an MLP that is not fused returns what it gave before."""
    model = tiny_model(family)
    ids = torch.tensor([prompt(9), prompt(9, 1)])
    with torch.no_grad():
        logits = model(ids).logits
    alone_engine = engine_of(model)
    counts = alone_engine.fused.counts
    alone_engine.close()
    got = []

    def forward():
        try:
            with torch.no_grad():
                got.append(float((model(ids).logits - logits).abs().max()))
        except Exception as error:
            got.append(error)

    def followed_by_a_forward(register):
        def registered(*args, **kwargs):
            handle = register(*args, **kwargs)
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
            return handle

        return registered

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(torch.nn.Module, name, followed_by_a_forward(getattr(torch.nn.Module, name)))
    engine = engine_of(model)
    monkeypatch.undo()
    assert engine.fused.counts == counts, engine.fused.refusals
    assert len(got) > 20
    assert not [x for x in got if isinstance(x, Exception) or x > 1e-5]
    assert tokens_of(engine) == expected_of(model)
    engine.close()


def test_the_caller_switches_between_its_own_forwards_beside_engines(often):
    """A forward reads the implementation for its mask and again in every layer, with or without engines: one whose mask
    is sdpa's (None) and whose next layer is eager's is not causal. So a caller's switches wait for its forwards."""
    model, callers = tiny_model("llama"), threading.Lock()
    expected = expected_of(model)
    engines = [engine_of(model), engine_of(model, fuse=False)]
    with scoring(model, torch.tensor([prompt(9)]), callers):
        for name in ("eager", "sdpa", "eager", "sdpa"):
            with callers:
                model.set_attn_implementation(name)
            assert [tokens_of(engine) for engine in engines] == [expected] * 2
    for engine in engines:
        engine.close()


def test_engines_step_at_the_same_time(often):
    """And modules run fused for both, in their threads."""
    model = tiny_model("llama")
    expected = expected_of(model)
    engines = [engine_of(model), engine_of(model), engine_of(model, fuse=False)]
    got: list[list[list[list[int]]]] = [[], [], []]

    def run(number):
        for _ in range(2):
            got[number].append(tokens_of(engines[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model.set_attn_implementation(random.choice(["eager", "sdpa"]))
    for thread in threads:
        thread.join()
    assert got == [[expected] * 2] * 3
    assert all(len(engine.fused._in_use) == len(engine.fused) for engine in engines[:2])
    for engine in engines:
        engine.close()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_both_engines_fused_forwards_run_in_the_middle_of_each_others_steps():
    model = tiny_model("llama")
    expected = expected_of(model)
    first, second = engine_of(model), engine_of(model)
    unit = next(unit for unit in first.fused._units.values() if unit.kind == "mlp")
    forward, inner = unit.forward, []

    def look(*args):
        if not inner:
            inner.append(None)
            thread = threading.Thread(target=lambda: inner.append((tokens_of(second), len(second.fused._in_use))))
            thread.start()
            thread.join()
        return forward(*args)

    unit.forward = look
    layer = next(unit for unit in first.fused._units.values() if unit.kind == "layer")
    layer.parts.fused_mlp = None  # It calls the module, whose stand-in calls the unit.
    assert tokens_of(first) == expected
    assert inner[1] == (expected, len(second.fused))
    assert len(first.fused._in_use) == len(first.fused)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_made_in_the_middle_of_a_step_are_plain_models(how):
    model = tiny_model("llama")
    ids = torch.tensor([prompt(9)])
    with torch.no_grad():
        expected = model(ids).logits
    copies = []
    with engine_of(model) as engine:
        unit = next(unit for unit in engine.fused._units.values() if unit.kind == "rotary")
        forward = unit.forward

        def look(*args, **kwargs):
            if not copies and how == "deepcopy":
                copies.append(copy.deepcopy(model))
            elif not copies:
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                copies.append(torch.load(file, weights_only=False))
            return forward(*args, **kwargs)

        unit.forward = look
        engine.generate([prompt(5)], generation_config=config(1))
        assert "forward" not in model.model.rotary_emb.__dict__
        (copied,) = copies
        assert copied.config._attn_implementation == "sdpa"
        with torch.no_grad():
            copied.lm_head.weight.neg_()
            assert torch.allclose(copied(ids).logits, -expected, atol=1e-5)
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert tokens_of(engine_of(copied)) == expected_of(copied)


def test_keys_are_gathered_only_by_models_that_did_so_at_the_start():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    with make_engine(model) as engine:
        attention.config = copy.copy(attention.config)  # Not the model's any more: its attention stays "sdpa".
        (output,) = engine.generate([prompt(9)], generation_config=config(3))
        assert output.finish_reason == "error"
        with pytest.raises(UnsupportedModelError, match="layer 1 asks for all keys and values"):
            raise output.error


@pytest.mark.gpu
def test_captured_steps_of_two_engines_on_a_gpu(tmp_path):
    """Both are fused over the same matrices; the other's end, forwards beside them and checkpoints move nothing."""
    model = tiny_model("llama").cuda()
    prompts = [prompt(n, n) for n in LENGTHS]

    def by_itself(ids: list[int]) -> list[int]:
        out = model.generate(torch.tensor([ids], device="cuda"), max_new_tokens=6, do_sample=False)
        return out[0, len(ids) :].tolist()

    expected = [by_itself(ids) for ids in prompts]
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=8, max_batch_tokens=64)
    first, second = hf_paged.Engine(model, options), hf_paged.Engine(model, options)
    assert first.fused is not None
    assert second.fused is not None
    callers = threading.Lock()
    with scoring(model, torch.tensor([prompts[0]], device="cuda"), callers, atol=1e-3):
        for _ in range(5):
            for engine in (first, second):
                assert tokens_of(engine) == expected
            with callers:
                model.set_attn_implementation("eager")
            model.save_pretrained(tmp_path)
            with callers:
                model.set_attn_implementation("sdpa")
        assert len(first._core.runner.graphs) > 0
        assert len(second._core.runner.graphs) > 0
        first.close()
        assert tokens_of(second) == expected
        second.close()
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], x.cpu()) for name, x in model.state_dict().items())
