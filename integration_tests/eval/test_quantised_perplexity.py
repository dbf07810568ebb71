"""Quantised pages lose next to nothing: the small model's perplexity, token by token, against unquantised pages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from eval.perplexity import PathOptions, PerplexityResult, perplexity

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture(scope="module")
def decode():
    """Perplexity through pages of a dtype: a first token, then one at a time, so every key is read from its page."""
    folder = ASSETS / "small_model"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="paged_flash", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:9000], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 128 * 128]

    def run(kv_dtype: str) -> PerplexityResult:
        options = PathOptions(
            batch_size=32, cache_factory=lambda: hf_paged.PagedCache(model.config, kv_dtype=kv_dtype)
        )
        return perplexity(
            model, rows, window=128, stride=128, convention="gptq", path="decode", options=options
        )  # fmt: skip

    return run, run("auto")


@pytest.mark.parametrize(("kv_dtype", "limit"), [("fp8", 0.01), ("int8", 0.005)])
def test_perplexity_within_its_limit(decode, kv_dtype, limit):
    run, exact = decode
    quantised = run(kv_dtype)
    assert torch.isfinite(quantised.nll).all()
    assert abs(quantised.perplexity / exact.perplexity - 1) < limit
    assert (quantised.nll - exact.nll).abs().max() > 1e-4, "quantised pages were really read"
