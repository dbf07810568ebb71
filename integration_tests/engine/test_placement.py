"""Models in parts, over devices and over processes; and models whose positions count padding."""


import types

import pytest
import torch
import torch.distributed as dist
from random_requests import tiny_model
from small_engines import alone, config, prompt
from transformers import LlamaForCausalLM, WhisperConfig, WhisperForCausalLM

import hf_paged
from hf_paged import UnsupportedModelError
from hf_paged.engine.execution import model_runner
from hf_paged.engine.execution.decode_graphs import capture_blocker
from hf_paged.engine.startup import start
from hf_paged.generation import loop

OPTIONS = dict(num_pages=32, page_size=8, max_num_seqs=6, max_batch_tokens=32)


@pytest.fixture
def reasons(monkeypatch) -> list[str]:
    """Why calls went to transformers."""
    found: list[str] = []
    monkeypatch.setattr(hf_paged.generation.patch, "log_original", found.append)
    monkeypatch.setattr(loop, "log_original", found.append)
    return found


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [prompt(n, n) for n in lengths]
    ids = torch.tensor([[0] * (max(lengths) - len(row)) + row for row in rows])
    return dict(input_ids=ids, attention_mask=(ids > 0).long())


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_go_to_transformers(process_group, reasons):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("llama")
    expected = model.generate(**padded(9), max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(**OPTIONS))
    assert torch.equal(model.generate(**padded(9), max_new_tokens=4, do_sample=False), expected)
    assert not reasons
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert any("sharded over processes" in reason for reason in hf_paged.is_supported(model))
    with pytest.raises(UnsupportedModelError, match="sharded over processes"):
        hf_paged.Engine(model)
    assert torch.equal(model.generate(**padded(9), max_new_tokens=4, do_sample=False), expected)
    assert "sharded over processes" in reasons[0]


def test_a_tensor_parallel_plan_that_was_applied_counts():
    model = tiny_model("llama")
    assert hf_paged.is_supported(model) == []
    model._tp_size = 2
    assert hf_paged.is_supported(model) == []
    model._tp_size = 3
    assert hf_paged.is_supported(model) == [
        "its 4 heads (num_attention_heads) cannot be divided among 3 processes",
        "its 2 heads (num_key_value_heads) cannot be divided among 3 processes",
    ]
    model._tp_plan = {}  # Each rank has all heads then.
    assert hf_paged.is_supported(model) == []


@pytest.mark.parametrize("name", ["fsdp_size", "pp_size", "ep_size"])
def test_tensor_parallelism_is_served_alone(name):
    model = tiny_model("llama")
    model._tp_size = 2
    model.config.distributed_config = types.SimpleNamespace(tp_size=2, **{name: 2})
    assert hf_paged.is_supported(model) == [
        f"it is spread over processes by {name}=2 beside tensor parallelism, which is served alone"
    ]


def test_adapters_in_a_sharded_model_are_refused():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model._tp_size = 2
    [reason] = hf_paged.is_supported(wrapped.get_base_model())
    assert reason.endswith("of PEFT, is in a model that is sharded over processes")


def test_positions_that_count_padding_are_refused(reasons):
    options = dict(
        vocab_size=97, d_model=32, bos_token_id=1, eos_token_id=None, pad_token_id=0, begin_suppress_tokens=None
    )
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in dict(layers=2, attention_heads=4, ffn_dim=64).items()
    }
    model = WhisperForCausalLM(WhisperConfig(**options, **sizes, max_target_positions=128)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    inputs = padded(5, 17, 9)
    call = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(**inputs, **call)
    with pytest.raises(UnsupportedModelError, match="WhisperForCausalLM has no position_ids and counts padding"):
        hf_paged.Engine(model, hf_paged.EngineConfig(**OPTIONS))
    hf_paged.patch_generate(model, hf_paged.EngineConfig(**OPTIONS))
    assert torch.equal(model.generate(**inputs, **call), expected)
    assert "counts padding" in reasons[0]


class IndexedElsewhere(LlamaForCausalLM):
    """As a model whose last layers are on another device than the engine's tables."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        if isinstance(logits_to_keep, torch.Tensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


def test_a_model_that_cannot_run_a_step_is_refused_at_the_start(reasons):
    model = tiny_model("llama")
    expected = model.generate(**padded(9, 4), max_new_tokens=4, do_sample=False)
    model.__class__ = IndexedElsewhere
    with pytest.raises(UnsupportedModelError, match=r"cannot run a step of the engine \(RuntimeError: indices"):
        hf_paged.Engine(model, hf_paged.EngineConfig(**OPTIONS))
    hf_paged.patch_generate(model, hf_paged.EngineConfig(**OPTIONS))
    assert torch.equal(model.generate(**padded(9, 4), max_new_tokens=4, do_sample=False), expected)
    assert "indices should be" in reasons[0]


@pytest.mark.parametrize("kind", ["usual", "lookup", "beams", "prompt logprobs"])
def test_a_model_over_devices_gets_indices_that_are_good_everywhere(kind, monkeypatch):
    monkeypatch.setattr(model_runner, "num_devices", lambda model: 2)
    model = tiny_model("llama")
    options = {"lookup": dict(prompt_lookup_num_tokens=3), "beams": dict(num_beams=3)}.get(kind, {})
    prompts = [prompt(n, n) for n in (3, 20, 40, 9)]
    expected = [alone(model, ids, config(8, **options)) for ids in prompts]
    model.__class__ = IndexedElsewhere
    with hf_paged.Engine(model, hf_paged.EngineConfig(**OPTIONS), background=False) as engine:
        assert engine._core.runner.is_spread
        more = dict(prompt_logprobs=1) if kind == "prompt logprobs" else {}
        outputs = engine.generate(prompts, generation_config=config(8, **options), **more)
        assert [output.error for output in outputs] == [None] * 4
        assert [output.token_ids for output in outputs] == expected


def test_a_model_over_devices_is_told_what_to_do_instead():
    model, gpu = tiny_model("llama"), torch.device("cuda", 0)
    assert capture_blocker(model, gpu) is None
    model.lm_head.to("meta")
    reason = capture_blocker(model, gpu)
    assert reason.startswith("the model is on 2 devices, and they compute one at a time. Where it fits on one,")
    assert "hf_paged.generate_distributed" in reason


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text"])
def test_a_model_over_two_gpus(family, reasons, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(start.logger, "warning_once", said.append)
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(family)
    inputs, prompts = padded(5, 17, 9), [prompt(n, n) for n in (5, 17, 9, 40)]
    expected = [alone(model, ids, config(8)) for ids in prompts]
    places = dict.fromkeys(("model.norm", "lm_head"), 1) | {"model.embed_tokens": 0, "model.rotary_emb": 0}
    layers = {f"model.layers.{i}": min(i, 1) for i in range(len(model.model.layers))}
    model = accelerate.dispatch_model(model, places | layers)
    with hf_paged.Engine(model, hf_paged.EngineConfig(**OPTIONS)) as engine:
        outputs = engine.generate(prompts, generation_config=config(8))
        assert [output.error for output in outputs] == [None] * 4
        assert [output.token_ids for output in outputs] == expected
        assert engine._core.runner.graphs is None
    assert sum("is on 2 devices, and they compute one at a time" in line for line in said) == 1
    inputs = {name: x.cuda() for name, x in inputs.items()}
    want = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(**OPTIONS))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), want)
    assert not reasons
