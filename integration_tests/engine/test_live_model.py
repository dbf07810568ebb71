"""A model that changes: nothing that was computed with another one is used, whatever changes it, and whenever."""

import logging

import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, engine_of, make_engine, prompt
from torch import nn

import hf_paged
from hf_paged.engine.execution.model_fingerprint import NUM_SUMS, ModelFingerprint, sums, weighted_sums

PROMPT = prompt(20)


def values_parts(model) -> list[nn.Module]:
    return [layer.self_attn.v_proj for layer in model.model.layers]


# Each changes what every token gives, and twice is another change.


def in_place(model):
    with torch.no_grad():
        for part in values_parts(model):
            part.weight.mul_(-1.5)


def through_data(model):
    for part in values_parts(model):
        part.weight.data.mul_(-1.5)


def another_data(model):
    for part in values_parts(model):
        part.weight.data = part.weight.data * -1.5


def another_parameter(model):
    for part in values_parts(model):
        part.weight = nn.Parameter(part.weight.detach() * -1.5)


def another_module(model):
    for layer in model.model.layers:
        old, layer.self_attn.v_proj = layer.self_attn.v_proj, nn.Linear(64, 32, bias=False)
        layer.self_attn.v_proj.weight.data.copy_(old.weight.data * -1.5)


def another_layer_order(model):
    layers = model.model.layers
    layers[0], layers[1], layers[2] = layers[1], layers[2], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def loaded(model):
    model.load_state_dict({k: x * -1.5 if "v_proj" in k else x.clone() for k, x in model.state_dict().items()})


def loaded_by_assignment(model):
    state = {k: x * -1.5 if "v_proj" in k else x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def optimised(model, **options):
    optimizer = torch.optim.AdamW([part.weight for part in values_parts(model)], lr=1.0, **options)
    for part in values_parts(model):
        part.weight.grad = torch.randn_like(part.weight)
    optimizer.step()
    optimizer.zero_grad()


def optimised_fused(model):
    optimised(model, fused=True)


def other_frequencies(model):
    model.model.rotary_emb.inv_freq.data.mul_(1.7)


TRACED = [
    in_place, another_data, another_parameter, another_module, another_layer_order, loaded, loaded_by_assignment,
    optimised, optimised_fused,
]  # fmt: skip
UNTRACED = [through_data, other_frequencies]
KINDS = {
    "plain": lambda model: engine_of(model, fuse=False),
    "fused and captured": lambda model: make_engine(model, fuse=True),
}


def tokens_of(engine, new: int = 6) -> list[int]:
    (output,) = engine.generate([PROMPT], generation_config=config(new))
    assert output.error is None
    return output.token_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", TRACED + UNTRACED)
def test_between_requests(change, kind):
    model = tiny_model("llama")
    with KINDS[kind](model) as engine:
        seen = [tokens_of(engine)]
        for when in ("idle", "paused", "paused, graphs kept", "asleep"):
            if when.startswith("paused"):
                engine.pause(keep_graphs=when.endswith("kept"))
            elif when == "asleep":
                engine.sleep()
            change(model)
            expected = alone(model, PROMPT, config(6))
            if when == "asleep":
                engine.wake()
            elif when != "idle":
                engine.resume()
            assert tokens_of(engine) == expected, when
            assert tokens_of(engine) == expected, when
            seen.append(expected)
        assert len(set(map(tuple, seen))) > 2
        engine.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", TRACED)
def test_beside_a_running_request(change, kind):
    """Its tokens from then on are those of the new weights, for all that came before."""
    model = tiny_model("llama")
    with KINDS[kind](model) as engine:
        handle = engine.submit(PROMPT, generation_config=config(12))
        for _ in range(5):
            engine.step()
        core = engine._core
        engine.loop.collect_pending()
        before = core.slots.tokens(handle._request.sequences[0].slot).tolist()
        assert 1 < len(before) - len(PROMPT) < 10
        change(model)
        other = engine.submit(PROMPT, generation_config=config(6))
        rest = len(PROMPT) + 12 - len(before)
        assert handle.result().token_ids == before[len(PROMPT) :] + alone(model, before, config(rest))
        assert other.result().token_ids == alone(model, PROMPT, config(6))
        engine.check()


@pytest.mark.parametrize("how", ["pause", "pause, no request since", "swapped"])
@pytest.mark.parametrize("change", [through_data, optimised_fused])
def test_a_running_request_over_a_pause(change, how):
    model = tiny_model("llama")
    with make_engine(model, swap_space_gib=0.1 if how == "swapped" else 0) as engine:
        handle = engine.submit(PROMPT, generation_config=config(12))
        for _ in range(4):
            engine.step()
        engine.pause(keep_graphs=True)
        if how == "swapped":
            engine._core.preempt_all(allow_swap=True)
        row = handle._request.sequences[0]
        before = (engine._core.slots.tokens(row.slot) if row.slot >= 0 else row.tokens).tolist()
        change(model)
        engine.resume()
        assert handle.result().token_ids == before[len(PROMPT) :] + alone(
            model, before, config(len(PROMPT) + 12 - len(before))
        )


@pytest.mark.parametrize("captured", [False, True])
def test_adapters_switched_beside_a_running_request(captured):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    options = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with_adapters = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name="a")
    with_adapters.add_adapter("b", peft.LoraConfig(**options))
    for name, parameter in with_adapters.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.5)
    with_adapters.eval()
    base = with_adapters.get_base_model()
    expected = {}
    for name in "ab":
        with_adapters.set_adapter(name)
        expected[name] = alone(base, PROMPT, config(6))
    with_adapters.set_adapter("a")
    assert expected["a"] != expected["b"]
    with (make_engine if captured else KINDS["plain"])(base) as engine:
        handle = engine.submit(PROMPT, generation_config=config(24))
        for _ in range(4):
            engine.step()
        with_adapters.set_adapter("b")
        for _ in range(3):
            engine.step()
        assert tokens_of(engine) == expected["b"]
        handle.result()
        assert tokens_of(engine) == expected["b"]
        with_adapters.set_adapter("a")
        assert tokens_of(engine) == expected["a"]
        with with_adapters.disable_adapter():
            plain = alone(base, PROMPT, config(6))
            assert tokens_of(engine) == plain
        with_adapters.base_model.model.model.layers[0].self_attn.v_proj.scaling["a"] = 9.0
        assert tokens_of(engine) == alone(base, PROMPT, config(6)) != expected["a"]


def test_what_did_not_change_is_kept(caplog):
    model = tiny_model("llama")
    with make_engine(model, fuse=True) as engine:
        first = tokens_of(engine)
        graphs = dict(engine._core.runner.graphs._replays)
        for what in ("idle", "pause", "forward", "training elsewhere"):
            if what == "pause":
                engine.pause(keep_graphs=True)
                engine.resume()
            elif what == "forward":
                model(torch.tensor([PROMPT])).logits.sum().backward()
            elif what == "training elsewhere":
                optimised(tiny_model("llama"))
            (output,) = engine.generate([PROMPT], generation_config=config(6))
            assert (output.token_ids, output.cached_tokens) == (first, 16)
        assert graphs.items() <= engine._core.runner.graphs._replays.items()


def test_no_look_at_the_bytes_where_nothing_changes_or_nothing_is_kept(monkeypatch):
    model = tiny_model("llama")
    passes = []
    real = ModelFingerprint.has_other_values
    monkeypatch.setattr(ModelFingerprint, "has_other_values", lambda self: (passes.append(1), real(self))[1])
    with make_engine(model) as engine:
        engine.pause()
        engine.resume()
        tokens_of(engine)
        engine.generate([prompt(20, 5)], generation_config=config(3))
        engine.pause(weights_change=False)
        engine.resume()
        engine.sleep()
        engine.wake()
        assert not passes
        tokens_of(engine)
        tokens_of(engine)  # Finds its prefix.
        engine.pause()
        engine.resume()
        assert len(passes) == 2


def test_it_is_said_once(monkeypatch):
    model = tiny_model("llama")
    said = []
    monkeypatch.setattr(logging.getLogger("hf_paged.engine.loop"), "warning_once", said.append, raising=False)
    with make_engine(model) as engine:
        tokens_of(engine)
        in_place(model)
        tokens_of(engine)
    assert len(said) == 1
    assert "LlamaForCausalLM has changed (weights were changed in place)" in said[0]


def test_buffers_that_the_model_writes_itself_are_no_change():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
    mlp.register_buffer("last", torch.zeros(()))

    def count(module, args):
        module.num_calls += 1
        module.last = args[0].detach().mean()

    forward = type(mlp).forward
    mlp.forward = lambda x: (count(mlp, (x,)), forward(mlp, x))[1]
    expected = alone(model, PROMPT, config(6))
    with KINDS["plain"](model) as engine:
        assert tokens_of(engine) == expected
        assert engine.generate([PROMPT], generation_config=config(6))[0].cached_tokens == 16
        in_place(model)
        assert tokens_of(engine) == alone(model, PROMPT, config(6)) != expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (40, 401), (7, 4096), (3, 2 * NUM_SUMS + 1)])
@pytest.mark.parametrize(
    "of", [lambda raw: weighted_sums([raw, raw]), lambda raw: sums([raw])[0]], ids=["words", "here"]
)
def test_sums_see_every_change(dtype, shape, of):
    values = torch.randn(shape).mul(3).to(dtype)
    raw = values.reshape(-1).view(torch.uint8)
    before = of(raw)
    assert torch.equal(of(raw.clone()), before)
    for place in {0, len(raw) // 2, len(raw) - 1}:
        raw[place] ^= 1
        assert not torch.equal(of(raw), before), place
        raw[place] ^= 1
    assert torch.equal(of(raw), before)
    if dtype.is_floating_point and values.ndim == 2:
        assert not torch.equal(of((-values).reshape(-1).view(torch.uint8)), before)
        assert not torch.equal(of(values.flip(0).reshape(-1).view(torch.uint8)), before)
        assert not torch.equal(of((values + 0.5).reshape(-1).view(torch.uint8)), before)


def test_sums_of_parts_of_a_storage_and_of_strided_tensors():
    whole = torch.randn(64).to(torch.bfloat16)
    for of in (sums, lambda tensors: [weighted_sums([x.view(torch.uint8) for x in tensors])]):
        assert torch.equal(of([whole[3:30]])[0], of([whole[3:30].clone()])[0])
    matrix = torch.randn(5, 7)
    assert torch.equal(sums([matrix.t()])[0], sums([matrix.t().contiguous()])[0])


@pytest.mark.gpu
def test_training_between_requests_on_a_gpu():
    model = tiny_model("llama").cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    batch = torch.tensor([PROMPT], device="cuda")

    def expected() -> list[int]:
        return model.generate(batch, max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()

    with hf_paged.Engine(model) as engine:
        for paused in (True, False, True, False):
            assert tokens_of(engine, 12) == expected()
            if paused:
                engine.pause()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if paused:
                engine.resume()
            assert tokens_of(engine, 12) == expected()
