"""The parts of the engine's GPU benchmark that need no GPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval import bench_engine_gpu


def test_the_requests_are_those_of_the_run_that_others_were_measured_with():
    prompts, outputs = bench_engine_gpu.draw_requests()
    assert len(prompts) == len(outputs) == 256
    assert sum(outputs) == 133_966
    assert all(100 <= len(prompt) <= 1024 and max(prompt) <= 10_000 for prompt in prompts)


def test_the_roofline_counts_weights_keys_and_prompts(monkeypatch):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights, per_token, matmul = bench_engine_gpu.read_bytes(model)
    assert matmul == model.num_parameters() - 50 * 16
    assert (weights, per_token) == (2 * matmul, 2 * 2 * 4 * 2 * 2)
    monkeypatch.setattr(bench_engine_gpu, "FLOPS_PER_S", 1.0)
    monkeypatch.setattr(bench_engine_gpu, "BYTES_PER_S", float("inf"))
    assert bench_engine_gpu.roofline(model, [3, 4], [9, 9]) == 2 * (matmul - 50 * 16) * 7


def test_the_table_names_what_was_cut():
    versions = dict.fromkeys(("device", "python", "torch", "triton", "transformers", "hf_paged", "date"), "x")
    entry = {
        "roofline": {"ms_per_token": 0.3, "tokens_per_s": 38_000.0},
        "eager": {"start_s": 1.0, "latency": {"ms_per_token": 30.0, "cut": True}},
    }
    table = bench_engine_gpu.markdown(versions | {"models": {"a": entry}})
    assert "| a | eager | 1.0 | 0.0 | 30.00 (cut) | 0.30 |" in table
