"""Fused forwards on a GPU: the kernels of few tokens and of many, inside captured steps."""


import pytest
import tiny_models
import torch
from small_engines import config, prompt
from tiny_models import build, randomise, tiny_config

import hf_paged
from hf_paged.fusion import forwards

pytestmark = pytest.mark.gpu

SHAPE = dict(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=1000
)
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3")


def model_of(family: str, dtype: torch.dtype, **shape):
    model = build(tiny_config(family, **(SHAPE | shape)), "sdpa")
    randomise(model, 1)
    return model.to("cuda", dtype)


def engine_of(model, **options) -> hf_paged.Engine:
    defaults = dict(num_pages=256, max_num_seqs=32, max_batch_tokens=512, prefix_caching=False)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


def tokens_of(engine: hf_paged.Engine, num_prompts: int = 5, new: int = 8) -> list[list[int]]:
    prompts = [prompt(5 + 3 * n, n) for n in range(num_prompts)]
    return [output.token_ids for output in engine.generate(prompts, generation_config=config(new))]


def error_of(engine: hf_paged.Engine, exact, num_prompts: int) -> float:
    """Mean error of the log-probabilities of the tokens that were chosen, against a float32 model."""
    prompts = [prompt(5 + 2 * n, n) for n in range(num_prompts)]
    errors = []
    for output in engine.generate(prompts, generation_config=config(12), logprobs=0):
        ids = torch.tensor([output.prompt_ids + output.token_ids], device="cuda")
        with torch.no_grad():
            logprobs = exact(ids).logits[0].log_softmax(-1)
        start = len(output.prompt_ids) - 1
        wanted = logprobs[torch.arange(start, start + 12), ids[0, start + 1 :]]
        got = torch.tensor([entry.logprob for entry in output.logprobs], device="cuda")
        errors.append((got - wanted).abs().mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_tokens_are_the_same_in_float32(family):
    model = model_of(family, torch.float32)
    with engine_of(model, fuse=False) as engine:
        expected = tokens_of(engine)
    with engine_of(model) as engine:
        assert engine.fused.counts["attention"] == 3
        assert tokens_of(engine) == expected
        assert engine._core.runner.graphs.failure is None


def errors_of(family: str, **options) -> list[list[float]]:
    """Unfused and fused, for batches of sizes that different kernels compute."""
    exact, model = model_of(family, torch.float32), model_of(family, torch.bfloat16)
    errors = []
    for fuse in (False, True):
        with engine_of(model, fuse=fuse, **options) as engine:
            errors.append([error_of(engine, exact, num_prompts) for num_prompts in (1, 2, 7, 13, 24)])
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_errs_no_more_than_unfused(family):
    unfused, fused = errors_of(family)
    assert all(b <= 1.5 * a + 1e-3 for a, b in zip(unfused, fused)), (unfused, fused)


def test_matmuls_that_leave_parts(monkeypatch):
    """Qwen3-0.6B's shapes, in which a Hopper GPU has kernels for 17 to 256 tokens."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for Hopper GPUs")
    tokens = set()
    linear_parts = forwards.linear_parts

    def count(x, packed):
        tokens.add(len(x))
        return linear_parts(x, packed)

    monkeypatch.setattr(forwards, "linear_parts", count)
    monkeypatch.setattr(tiny_models, "MAX_PARAMETERS", 10**8)
    shape = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    exact, model = model_of("qwen3", torch.float32, **shape), model_of("qwen3", torch.bfloat16, **shape)
    errors = []
    for fuse in (False, True):
        with engine_of(model, fuse=fuse, max_num_seqs=64, num_pages=1024) as engine:
            errors.append([error_of(engine, exact, num_prompts) for num_prompts in (20, 40, 50)])
    assert max(tokens) >= 50
    assert all(b <= 1.5 * a + 1e-3 for a, b in zip(*errors)), errors


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_quantised_pages(kv_dtype):
    unfused, fused = errors_of("qwen3", kv_dtype=kv_dtype)
    assert all(b <= 1.5 * a + 1e-3 for a, b in zip(unfused, fused)), (unfused, fused)


def test_weights_in_place_and_elsewhere_are_seen():
    """An update in place is in the captured steps at once; other memory drops them, and is packed again."""
    model, other = model_of("llama", torch.float32), model_of("llama", torch.float32)
    randomise(other.cpu(), 3)
    other.cuda()
    with engine_of(other, fuse=False) as engine:
        expected = tokens_of(engine)
    with engine_of(model) as engine:
        tokens_of(engine)
        model.load_state_dict(other.state_dict())
        assert tokens_of(engine) == expected
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        assert tokens_of(engine) == expected
        gate, up = (x.weight for x in list(model.model.layers[0].mlp.children())[:2])
        assert up.data_ptr() == gate.data_ptr() + gate.numel() * gate.itemsize, "packed again"
