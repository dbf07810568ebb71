"""The models, requests and rooflines of the engine's GPU benchmark."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OlmoeConfig, OlmoeForCausalLM

import hf_paged
from eval.engine_bench import models

SHAPE = dict(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def test_the_requests_are_those_of_the_run_that_others_were_measured_with():
    prompts, outputs = models.draw_requests()
    assert len(prompts) == len(outputs) == 256
    assert sum(outputs) == 133_966
    assert all(100 <= len(prompt) <= 1024 and max(prompt) <= 10_000 for prompt in prompts)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_engine_serves_the_family(name):
    model = models.build(name, models.TINY, torch.float32, "cpu")
    assert hf_paged.is_supported(model) == []
    window = getattr(model.config, "sliding_window", None)
    assert window == (32 if name == "mistral-7b" else None)


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-0.6b", 0.596), ("llama3-8b", 8.03), ("mistral-7b", 7.24), ("olmoe-1b-7b", 6.92),
                           ("qwen3-30b-a3b", 30.5)]
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name, billions):
    model = models.build(name, device="meta")
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=2e-3)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"unknown model 'gpt-5': one of qwen3-0\.6b"):
        models.build("gpt-5")


def test_costs_of_a_dense_model():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    costs = models.Costs.of(model)
    read = model.num_parameters() - 50 * 16
    assert costs.weight_bytes(1) == costs.weight_bytes(9) == 2 * read
    assert costs.kv_bytes == 2 * (2 * 4) * 2 * 2
    assert costs.matmul == read - 50 * 16
    assert costs.attention_flops == 4 * 16 * 2


def test_experts_are_read_as_far_as_tokens_choose_them():
    config = OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=1, pad_token_id=None, eos_token_id=None)
    costs = models.Costs.of(OlmoeForCausalLM(config).to(torch.bfloat16))
    experts = 2 * 4 * 3 * 16 * 32  # layers, experts, gate, up and down
    assert costs.expert_bytes == 2 * experts
    assert costs.weight_bytes(1) == costs.dense_bytes + 2 * experts / 4
    assert costs.weight_bytes(2) == costs.dense_bytes + 2 * experts * (1 - (3 / 4) ** 2)
    assert costs.weight_bytes(1000) == pytest.approx(costs.dense_bytes + 2 * experts)
    dense = (costs.dense_bytes // 2) - 50 * 16
    assert costs.matmul == dense + experts / 4


def test_a_run_is_its_prompts_and_its_steps(monkeypatch):
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)).to(torch.bfloat16)
    costs = models.Costs.of(model)
    monkeypatch.setattr(models, "BYTES_PER_S", float("inf"))
    monkeypatch.setattr(models, "FLOPS_PER_S", 1.0)
    # Queries see 1, 2, 3, 4, 5, 5, 5 and 1, 2, 3 keys.
    assert costs.run_s([7, 3], [2, 2]) == 2 * costs.matmul * 10 + costs.attention_flops * (25 + 6)
    assert costs.prompt_s([7], num_cached=6) == 2 * costs.matmul + costs.attention_flops * 5
    monkeypatch.setattr(models, "BYTES_PER_S", 1.0)
    monkeypatch.setattr(models, "FLOPS_PER_S", float("inf"))
    # Steps: both (contexts 8, of which 5 are seen, and 4), then the first alone (9, 5 seen).
    assert costs.run_s([7, 3], [3, 2]) == 2 * costs.weight_bytes(1) + costs.kv_bytes * (5 + 4 + 5)
