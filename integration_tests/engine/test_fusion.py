"""``EngineConfig(fuse=True)``: the same tokens as without, a model that stays its owner's, and look-alikes refused."""

import copy
import itertools
import threading
import types

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from host import CACHE
from random_requests import tiny_model
from small_engines import alone, config, engine_of, make_engine, prompt
from tiny_models import build, randomise, tiny_config
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hf_paged
from hf_paged.fusion import forwards

LENGTHS = (1, 3, 9, 17, 30)
WHOLE = {"layer": 3, "attention": 3, "mlp": 3, "norm": 7, "rotary": 1}
"""What is fused of three layers of Llama's kind."""
COUNTS = {
    "llama": WHOLE,
    "mistral": WHOLE,
    "qwen2": WHOLE,
    "phi3": WHOLE,
    "qwen3": WHOLE | {"norm": 13},
    "gemma3_text": {"layer": 3, "attention": 3, "mlp": 3, "norm": 19},
    "olmo2": WHOLE | {"norm": 13},
    "mixtral": {"layer": 3, "attention": 3, "norm": 7, "rotary": 1},
    "gpt_oss": {"layer": 3, "attention": 3, "norm": 7, "rotary": 1},
}


def tokens_of(engine: hf_paged.Engine, new: int = 6) -> list[list[int]]:
    prompts = [prompt(n, n) for n in LENGTHS]
    return [output.token_ids for output in engine.generate(prompts, generation_config=config(new))]


def tokens_alone(model, new: int = 6) -> list[list[int]]:
    return [alone(model, prompt(n, n), config(new)) for n in LENGTHS]


@pytest.fixture
def few_tokens(monkeypatch):
    """The path of few tokens, which a GPU takes up to 16: its operations run one after the other on a CPU."""
    monkeypatch.setattr(forwards, "is_small", lambda num_tokens, weight, is_gated=False: num_tokens <= 16)


@pytest.fixture
def in_parts(monkeypatch):
    """The path of up to 256 tokens on a GPU: matmuls that leave parts; gate, up and activation in one."""
    monkeypatch.setattr(forwards, "num_linear_parts", lambda num_tokens, weight: 3 if num_tokens > 2 else 0)
    monkeypatch.setattr(forwards, "decode_linear_settings", lambda x, weight, gated=False: len(x) > 1 or None)


# The same results


@pytest.mark.parametrize("family", COUNTS)
def test_tokens_are_those_of_generate(family):
    model = tiny_model(family)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == COUNTS[family]
        assert tokens_of(engine) == expected
        engine.check()


@pytest.mark.parametrize("family", COUNTS)
def test_tokens_are_the_same_on_the_path_of_few_tokens(family, few_tokens):
    model = tiny_model(family)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == COUNTS[family]
        assert tokens_of(engine) == expected


@pytest.mark.parametrize("family", COUNTS)
def test_tokens_are_the_same_where_matmuls_leave_parts(family, in_parts, monkeypatch):
    added = []
    add_parts = forwards.FusedNorm.add_parts

    def count_and_add(norm, parts, residual):
        added.append(parts.shape)
        return add_parts(norm, parts, residual)

    monkeypatch.setattr(forwards.FusedNorm, "add_parts", count_and_add)
    model = tiny_model(family)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == COUNTS[family]
        assert tokens_of(engine) == expected
    # Norms behind attention and the MLP must see whole sums.
    assert bool(added) == (family not in ("gemma3_text", "olmo2"))


@pytest.mark.quick
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_logprobs_are_close_to_the_models_own(family):
    model = tiny_model(family)
    ids = prompt(30)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(29), ids[1:]]
    with engine_of(model) as engine:
        output = engine.generate([ids], generation_config=config(2), prompt_logprobs=0)[0]
    got = torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"page_size": 16}], ids=["int8", "page16"])
def test_pages_of_other_kinds(options):
    model = tiny_model("llama")
    with engine_of(model, **options, fuse=False) as engine:
        expected = tokens_of(engine)
    with engine_of(model, **options) as engine:
        assert tokens_of(engine) == expected


@pytest.mark.parametrize(("family", "num_attention"), [("qwen3_next", 0), ("lfm2", 1), ("jamba", 1)])
def test_models_with_recurrent_states(family, num_attention):
    model = tiny_model(family)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts.get("attention", 0) == num_attention
        assert tokens_of(engine) == expected


def test_half_precision_differs_by_roundings():
    model = tiny_model("qwen3")
    ids = prompt(30)
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(29), ids[1:]]
    model.to(torch.bfloat16)
    errors = []
    for fuse in (False, True):
        with engine_of(model, fuse=fuse) as engine:
            output = engine.generate([ids], generation_config=config(2), prompt_logprobs=0)[0]
        got = torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:]])
        errors.append(float((got - exact).abs().mean()))
    assert errors[1] <= 1.5 * errors[0]


# The option


def test_none_leaves_a_model_on_a_cpu_alone():
    with engine_of(tiny_model("llama"), fuse=None) as engine:
        assert engine.fused is None


def test_nothing_to_fuse_is_an_error_if_it_was_asked_for():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="fuse=True cannot be"):
        engine_of(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.quick
@pytest.mark.parametrize("value", [1, "yes"])
def test_the_option_is_checked(value):
    with pytest.raises(TypeError, match="fuse must be None, True or False"):
        hf_paged.EngineConfig(fuse=value)


@pytest.mark.quick
def test_the_summary_says_what_and_why():
    with engine_of(tiny_model("mixtral")) as engine:
        assert "3 attention" in repr(engine.fused)


# The model stays its owner's


def test_modules_and_parameters_are_as_they_were():
    model = tiny_model("qwen2")
    modules = [dict(module.__dict__) for module in model.modules()]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    values = {name: x.clone() for name, x in model.state_dict().items()}
    with engine_of(model) as engine:
        tokens_of(engine)
        assert [dict(module.__dict__) for module in model.modules()] == modules
        assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
        assert model.state_dict().keys() == values.keys()
        assert all(torch.equal(x, values[name]) for name, x in model.state_dict().items())


def test_weights_lie_in_one_memory_until_the_engine_is_closed():
    """And each has a storage of its own, of its own size, all the time."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    parts = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def are_neighbours() -> bool:
        for p in model.parameters():
            assert p.untyped_storage().nbytes() == p.numel() * p.itemsize
            assert p.untyped_storage().data_ptr() == p.data_ptr()
        return all(a.data_ptr() + a.numel() * a.itemsize == b.data_ptr() for a, b in itertools.pairwise(parts))

    assert not are_neighbours()
    with engine_of(model) as first:
        with engine_of(model) as second:
            assert are_neighbours()
            packs = [
                [pack.weight.data_ptr() for unit in engine.fused._units.values() for pack in unit.packs]
                for engine in (first, second)
            ]
            assert packs[0] == packs[1]
        assert are_neighbours()
    assert not are_neighbours()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_parameter_knows_nothing_of_its_neighbours(dtype):
    model = tiny_model("llama").to(dtype)
    weight = model.model.layers[0].self_attn.k_proj.weight
    before = weight.detach().clone()
    with engine_of(model) as engine:
        assert engine.fused.counts == WHOLE
        copied = copy.deepcopy(model).model.layers[0].self_attn.k_proj.weight
        assert torch.equal(weight, before)
        assert torch.equal(copied, before)
        assert (weight.is_contiguous(), weight.storage_offset()) == (True, 0)
    assert torch.equal(weight, before)


def test_unpatching_restores_everything():
    model = tiny_model("llama")
    expected = alone(model, prompt(9), config())
    hf_paged.patch_generate(model, hf_paged.EngineConfig(num_pages=32, page_size=8, max_num_seqs=8, fuse=True))
    assert alone(model, prompt(9), config()) == expected
    assert model.generate.engine.fused.counts == WHOLE
    hf_paged.unpatch_generate(model)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.itemsize for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert alone(model, prompt(9), config()) == expected


def test_state_dicts_are_saved_and_loaded_as_always(tmp_path):
    model, other = tiny_model("qwen2"), tiny_model("qwen2")
    randomise(other, 5)
    values = {name: x.clone() for name, x in other.state_dict().items()}
    with engine_of(model) as engine:
        model.load_state_dict(values)
        engine.refresh_weights()
        assert tokens_of(engine) == tokens_alone(other)
        model.save_pretrained(tmp_path / "pretrained")
        torch.save(model.state_dict(), tmp_path / "state.pt")
    saved = type(model).from_pretrained(tmp_path / "pretrained").state_dict()
    loaded = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(saved[name], x) for name, x in values.items())
    assert all(torch.equal(loaded[name], x) for name, x in values.items())


def save_with_safetensors_model(model, folder):
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def save_with_safetensors_file(model, folder):
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")


def save_with_the_hub(model, folder):
    huggingface_hub.save_torch_model(model, folder)


def save_with_accelerate(model, folder):
    pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, folder)


def save_the_state_with_accelerate(model, folder):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)


def save_with_torch(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")


def save_the_module_with_torch(model, folder):
    torch.save(model, folder / "module.pt")


def save_distributed(model, folder):
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)


def save_pretrained(model, folder):
    model.save_pretrained(folder)


def load(folder, like) -> dict[str, torch.Tensor]:
    """Whatever a folder has."""
    loaded: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(file)
    if (folder / "model.pt").exists():
        loaded = torch.load(folder / "model.pt")
    if (folder / "module.pt").exists():
        loaded = torch.load(folder / "module.pt", weights_only=False).state_dict()
    if (folder / "dcp").exists():
        loaded = {name: torch.empty_like(x) for name, x in like.items()}
        dcp.load({"model": loaded}, checkpoint_id=folder / "dcp", no_dist=True)
    return loaded


@pytest.mark.parametrize(
    "save",
    [
        save_pretrained, save_with_safetensors_model, save_with_safetensors_file, save_with_the_hub,
        save_with_accelerate, save_the_state_with_accelerate, save_with_torch, save_the_module_with_torch,
        save_distributed,
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_checkpoints_have_every_weight_at_any_time(save, family, tmp_path):
    """And each once: files are no larger than they are without an engine."""
    model = tiny_model(family)
    values = {name: x.clone() for name, x in model.state_dict().items()}

    def check(name: str) -> int:
        folder = tmp_path / name
        folder.mkdir()
        save(model, folder)
        loaded = load(folder, values)
        assert loaded.keys() == values.keys()
        assert all(torch.equal(loaded[name], x) for name, x in values.items())
        files = [*folder.glob("**/*.safetensors"), *folder.glob("**/*.pt"), *folder.glob("**/*.distcp")]
        return sum(file.stat().st_size for file in files)

    size = check("before")
    with engine_of(model) as engine:
        assert engine.fused.counts["attention"] == 3
        assert check("new") <= size * 1.05
        tokens_of(engine)
        assert check("idle") <= size * 1.05
        engine.pause()
        assert check("paused") <= size * 1.05
    assert check("closed") <= size * 1.05


def test_training_beside_the_engine():
    """Gradients arrive at the original parameters, and what an optimiser does to them counts."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    batch = torch.tensor([prompt(12)])
    twin(batch, labels=batch).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with engine_of(model) as engine:
        before = tokens_of(engine)
        engine.pause()
        model(batch, labels=batch).loss.backward()
        for parameter, other in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(parameter.grad, other.grad)
        optimizer.step()
        expected = tokens_alone(model)
        engine.resume()
        engine.refresh_weights()
        assert tokens_of(engine) == expected
        assert expected != before
        assert engine.fused.counts == WHOLE


@pytest.mark.parametrize("change", ["data", "module", "dtype"])
def test_weights_that_move_are_packed_again(change):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    with engine_of(model) as engine:
        tokens_of(engine)
        if change == "data":
            attention.k_proj.weight.data = torch.randn_like(attention.k_proj.weight)
        elif change == "module":
            attention.k_proj = nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
        else:
            model.to(torch.float64).to(torch.float32)
        expected = tokens_alone(model)
        engine.refresh_weights()
        assert tokens_of(engine) == expected
        if change != "module":
            q, k = attention.q_proj.weight, attention.k_proj.weight
            assert q.data_ptr() + q.numel() * q.itemsize == k.data_ptr()


def test_hooks_added_later_are_called():
    model = tiny_model("llama")
    ids = prompt(9)
    with engine_of(model) as engine:
        engine.generate([ids], generation_config=config(4))
        called = []
        hook = hf_paged.row_wise(lambda module, args, out: called.append(1))
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(hook)
        engine.generate([ids], generation_config=config(4))
        handle.remove()
    assert called


def test_hooks_that_transformers_leaves_behind_do_not_count(monkeypatch):
    model = tiny_model("llama")
    expected = tokens_alone(model)
    model(torch.tensor([prompt(4)]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    with engine_of(model) as engine:
        calls = []
        original = forwards.gated_activation_op
        monkeypatch.setattr(forwards, "gated_activation_op", lambda *args: calls.append(1) or original(*args))
        assert tokens_of(engine) == expected
        assert calls
        assert engine._core.runner._fingerprint.replay_blocker() is None


def test_a_hook_that_changes_values_counts():
    model = tiny_model("llama")
    with engine_of(model) as engine:
        before = tokens_of(engine)
        hook = hf_paged.row_wise(lambda module, args, out: -2 * out)
        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(hook)
        engine.drop_prefixes()
        expected = tokens_alone(model)
        assert tokens_of(engine) == expected
        handle.remove()
        engine.drop_prefixes()
        assert tokens_of(engine) == before
    assert expected != before


def test_a_module_with_a_forward_of_its_own_runs_it():
    model = tiny_model("llama")
    with engine_of(model) as engine:
        before = tokens_of(engine)
        mlp = model.model.layers[1].mlp
        forward = mlp.forward
        mlp.forward = lambda x: -3 * forward(x)
        expected = tokens_alone(model)
        assert tokens_of(engine) == expected
        del mlp.forward
        assert tokens_of(engine) == before
    assert expected != before


def test_an_attribute_that_changes_counts():
    model = tiny_model("llama")
    with engine_of(model) as engine:
        before = tokens_of(engine)
        for layer in model.model.layers:
            layer.self_attn.scaling *= 4
        engine.drop_prefixes()
        expected = tokens_alone(model)
        assert tokens_of(engine) == expected
    assert expected != before


def test_adapters_are_seen():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    with engine_of(model) as engine:
        before = tokens_of(engine)
        options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
        wrapped = peft.get_peft_model(model, options).eval()
        expected = tokens_alone(wrapped)
        assert tokens_of(engine) == expected
        wrapped.unload()
        assert tokens_of(engine) == before
    assert expected != before


def test_a_model_with_adapters_is_fused_around_them():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    options = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    wrapped = peft.get_peft_model(model, options).eval()
    expected = tokens_alone(wrapped)
    with engine_of(model) as engine:
        assert engine.fused.counts == {"layer": 3, "mlp": 3, "norm": 7, "rotary": 1}
        assert tokens_of(engine) == expected


def test_another_thread_gets_the_modules_own_forward():
    model = tiny_model("llama")
    batch = torch.tensor([prompt(8)])
    with torch.no_grad():
        expected = model(batch).logits
    outputs = []

    def look(*args):
        # In the middle of the engine's forward: somebody else runs the model.
        thread = threading.Thread(target=lambda: outputs.append(model(batch, use_cache=False).logits))
        thread.start()
        thread.join()
        return original(*args)

    with engine_of(model) as engine:
        original = forwards.gated_activation_op
        forwards.gated_activation_op = look
        try:
            engine.generate([prompt(5)], generation_config=config(1))
        finally:
            forwards.gated_activation_op = original
    assert outputs
    assert all(torch.allclose(output, expected, atol=1e-5) and output.requires_grad for output in outputs)


@pytest.mark.parametrize("order", [1, -1], ids=["neighbours", "apart"])
def test_one_flat_buffer_of_all_weights_stays_one(order):
    """Whoever trains through such a buffer must go on doing so; neighbours in it are one matrix already."""
    model = tiny_model("llama")
    expected = tokens_alone(model)
    parameters = list(model.parameters())[::order]
    flat = torch.cat([p.data.flatten() for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.data = part.view_as(parameter)
    with engine_of(model) as engine:
        assert ("larger storage" in repr(engine.fused)) == (order == -1)
        assert engine.fused.counts == (WHOLE if order == 1 else {"layer": 3, "norm": 7, "rotary": 1})
        assert tokens_of(engine) == expected
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)


@pytest.mark.parametrize("holder", ["state dict", "model"])
def test_memory_that_somebody_else_holds_is_left_alone(holder):
    model, other = tiny_model("llama"), tiny_model("llama")
    if holder == "model":
        other.load_state_dict(model.state_dict(), assign=True)
    held = model.state_dict() if holder == "state dict" else other.state_dict()
    with engine_of(model) as engine:
        assert engine.fused.counts == {"layer": 3, "norm": 7, "rotary": 1}
        assert "somebody else holds" in repr(engine.fused)
    assert all(held[name].data_ptr() == x.data_ptr() for name, x in model.state_dict().items())


def test_memory_that_is_held_when_the_engine_is_closed_stays_shared():
    model = tiny_model("llama")
    with engine_of(model) as engine:
        assert engine.fused.counts == WHOLE
        held = {"model.layers.0.self_attn.k_proj.weight": model.model.layers[0].self_attn.k_proj.weight.detach()}
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.fill_(3.0)
    assert all(bool((x == 3).all()) for x in held.values())


def test_compiled_modules_beside_fused_ones(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: real(forward, backend="eager", **options))
    model = tiny_model("mixtral")
    expected = tokens_alone(model)
    with engine_of(model, compile=True) as engine:
        for _ in range(2):
            assert tokens_of(engine) == expected
    torch._dynamo.reset()


# Look-alikes: the children of a usual module, another formula


def swapped_gate(module, x):
    return module.down_proj(module.act_fn(module.up_proj(x)) * module.gate_proj(x))


def limited_mlp(module, x):
    return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x).clamp(-9, 9))


def scaled_mlp(module, x):
    return module.down_proj(module.act_fn(module.gate_proj(x) * 1.01) * module.up_proj(x))


def scaled_output(module, x):
    return 1.01 * module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))


def squared_gate(module, x):
    return module.down_proj(torch.relu(module.gate_proj(x)) ** 2 * module.up_proj(x))


def replace_class(module: nn.Module, forward) -> None:
    """Give a module another class, as a model with code of its own would have."""
    module.__class__ = type("Other" + type(module).__name__, (type(module),), {"forward": forward})


@pytest.mark.parametrize("formula", [limited_mlp, scaled_mlp, scaled_output, squared_gate])
def test_other_mlps_are_refused(formula):
    model = tiny_model("llama")
    for layer in model.model.layers:
        replace_class(layer.mlp, formula)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert "mlp" not in engine.fused.counts
        assert tokens_of(engine) == expected


def test_a_gate_of_another_name_is_found():
    model = tiny_model("llama")
    for layer in model.model.layers:
        replace_class(layer.mlp, swapped_gate)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == WHOLE
        assert tokens_of(engine) == expected


def attention_with(change):
    """Llama's attention, with ``change(q, k, v, position_ids)`` before the rotation."""
    from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = change(q, k, v, kwargs.get("position_ids"))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if kwargs.get(CACHE) is not None:
            k, v = kwargs[CACHE].update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), None

    return forward


def warmer_with_position(q, k, v, position_ids):
    return q * (1 + torch.floor(position_ids / 40) * 0.3)[:, None, :, None].to(q.dtype), k, v


CHANGES = {
    "limits": lambda q, k, v, positions: (q.clamp(-20, 20), k, v),
    "limited_values": lambda q, k, v, positions: (q, k, v.clamp(-20, 20)),
    "far_positions": warmer_with_position,
    "norm": lambda q, k, v, positions: (nn.functional.rms_norm(q, q.shape[-1:]), k, v),
    "shift": lambda q, k, v, positions: (q, k + 0.01, v),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_attention_is_refused(change):
    model = tiny_model("llama")
    for layer in model.model.layers:
        replace_class(layer.self_attn, attention_with(CHANGES[change]))
    with engine_of(model) as engine:
        assert "attention" not in engine.fused.counts
        assert tokens_of(engine) == tokens_alone(model)


def test_the_same_attention_of_another_class_is_fused():
    model = tiny_model("llama")
    for layer in model.model.layers:
        replace_class(layer.self_attn, attention_with(lambda q, k, v, positions: (q, k, v)))
    with engine_of(model) as engine:
        assert engine.fused.counts == WHOLE


def other_layer(residual_scale: float = 1.0, is_norm_after: bool = False):
    def forward(self, hidden_states, **kwargs):
        x = self.input_layernorm(hidden_states)
        attended = self.self_attn(hidden_states=x, **kwargs)[0]
        hidden_states = hidden_states + residual_scale * attended
        if is_norm_after:
            hidden_states = self.post_attention_layernorm(hidden_states)
            return hidden_states + self.mlp(hidden_states)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    return forward


@pytest.mark.parametrize("options", [{"residual_scale": 0.97}, {"is_norm_after": True}], ids=["scaled", "norm_after"])
def test_other_layers_are_refused(options):
    model = tiny_model("llama")
    for layer in model.model.layers:
        replace_class(layer, other_layer(**options))
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == {"attention": 3, "mlp": 3, "norm": 7, "rotary": 1}
        assert tokens_of(engine) == expected


def centred_norm(self, x):
    x = x - x.mean(-1, keepdim=True)
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def smaller_eps_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon / 2)


def twice_offset_norm(self, x):
    return (2 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("formula", [centred_norm, smaller_eps_norm, twice_offset_norm])
def test_other_norms_are_refused(formula):
    model = tiny_model("llama")
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            replace_class(module, formula)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts == {"attention": 3, "mlp": 3, "rotary": 1}
        assert tokens_of(engine) == expected


def test_weights_that_say_nothing_are_refused():
    """With a gate of zeros every activation gives the same: which one it is would show after training only."""
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
    with engine_of(model) as engine:
        assert engine.fused.counts["mlp"] == 2
        assert "cannot be told apart" in repr(engine.fused)


def test_other_weights_inside_are_not_overlooked():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.extra = nn.Parameter(torch.ones(1))
    with engine_of(model) as engine:
        assert engine.fused.counts == {"layer": 3, "mlp": 3, "norm": 7, "rotary": 1}


def test_patched_instances_are_refused():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(limited_mlp, mlp)
    with engine_of(model) as engine:
        assert engine.fused.counts["mlp"] == 2


def limited_by_a_list(module, x):
    up = module.up_proj(x)
    return module.down_proj(module.act_fn(module.gate_proj(x)) * (up.clamp(*module.limits) if module.limits else up))


def test_a_layer_that_looks_like_those_before_it_is_proven_too():
    model = tiny_model("llama")
    mlps = [layer.mlp for layer in model.model.layers]
    replace_class(mlps[0], limited_by_a_list)
    for mlp, limits in zip(mlps, ([], [], [-9, 9])):
        mlp.__class__ = type(mlps[0])
        mlp.limits = limits
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts["mlp"] == 2
        assert tokens_of(engine) == expected


@pytest.mark.parametrize("rotary", [0.5, 1.0])
def test_partial_and_interleaved_rotation(rotary):
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}}
    # None would be replaced by the ids of the released model, which the tiny one has no logits for.
    model = build(tiny_config("glm", eos_token_id=-1, **options), "sdpa")
    randomise(model, 1)
    expected = tokens_alone(model)
    with engine_of(model) as engine:
        assert engine.fused.counts["attention"] == 3
        assert tokens_of(engine) == expected


# Beside captured steps


def rotary_of(model) -> nn.Module:
    return model.model.rotary_emb


def test_positions_are_looked_up_bit_for_bit():
    model = tiny_model("llama")
    x = torch.randn(1, 40, 8)
    with engine_of(model) as engine:
        unit = engine.fused._units[rotary_of(model)]
        positions = torch.randint(0, len(unit.cos), (1, 40))
        expected = type(unit.module).forward(unit.module, x, positions)
        got = unit.forward(x, position_ids=positions)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        # Rows that fill up a batch have a position before the first one.
        before, first = (unit.forward(x, torch.full((1, 3), position)) for position in (-1, 0))
        assert torch.equal(before[0], first[0])
        for others in (x.double(), positions), (x, positions.int()), (x, positions[None]), (x, positions, 0):
            assert unit.forward(*others) is NotImplemented


def stretched_by_the_longest(module, x, position_ids):
    """As "longrope" does, which engines refuse by its name."""
    module.longest = max(getattr(module, "longest", 0), int(position_ids.max()))
    cos, sin = LlamaRotaryEmbedding.forward(module, x, position_ids)
    return cos * (1 + module.longest / 100), sin


def test_tables_that_change_with_the_longest_position_are_not_kept():
    model = tiny_model("llama")
    replace_class(rotary_of(model), stretched_by_the_longest)
    with pytest.raises(ValueError, match="1 not: what it gives depends on more than the position"):
        engine_of(model, self_check=False)


@pytest.mark.parametrize("change", ["another", "in place"])
def test_frequencies_that_change_are_seen(change):
    model = tiny_model("qwen2")
    with engine_of(model) as engine:
        assert tokens_of(engine) == tokens_alone(model)
        before = rotary_of(model).inv_freq
        with torch.no_grad():
            if change == "in place":
                before.mul_(0.3)
            else:
                rotary_of(model).inv_freq = before * 0.3
        assert engine.fused.has_stale_tables()
        engine.refresh_weights()
        assert tokens_of(engine) == tokens_alone(model)


def test_captured_steps_are_dropped_when_fused_weights_move():
    model, other = tiny_model("llama"), tiny_model("llama")
    randomise(other, 5)
    ids = prompt(9)
    with make_engine(model, fuse=True) as engine:
        engine.generate([ids], generation_config=config())
        assert len(engine._core.runner.graphs) > 0
        for parameter, value in zip(model.parameters(), other.parameters()):
            parameter.data = value.data.clone()
        engine.drop_prefixes()
        assert engine.generate([ids], generation_config=config())[0].token_ids == alone(other, ids, config())
        assert engine.fused.counts == WHOLE
        # Packed again before the steps were captured again, which therefore stay.
        before = dict(engine._core.runner.graphs._replays)
        engine.generate([ids], generation_config=config())
        assert before
        assert before == engine._core.runner.graphs._replays


def test_two_engines_on_one_model():
    model = tiny_model("llama")
    expected = tokens_alone(model)
    with engine_of(model) as first:
        with engine_of(model) as second:
            assert tokens_of(first) == expected
            assert tokens_of(second) == expected
            assert first.fused.counts == second.fused.counts == WHOLE
        first.resume()
        assert tokens_of(first) == expected
    assert all(p.untyped_storage().nbytes() == p.numel() * p.itemsize for p in model.parameters())
