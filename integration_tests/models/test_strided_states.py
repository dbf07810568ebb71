"""Queries, keys and values whose last dimension is not contiguous, as Triton kernels take it to be."""

import pytest
import torch
from host import with_cache
from random_requests import tiny_model
from small_engines import alone, config, make_engine, prompt

import hf_paged

pytest.importorskip("triton")


class Columns(torch.nn.Module):
    """A linear layer whose result lies column by column."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        y = self.linear(x).mT.contiguous().mT
        assert x.shape[1] == 1 or y.stride(-1) != 1
        return y


@pytest.fixture
def model(monkeypatch):
    """Its kernels are Triton's, interpreted where there is no GPU."""
    monkeypatch.setattr("hf_paged_kernels.attention.ops.uses_triton", lambda _: True)
    model = tiny_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Columns(getattr(layer.self_attn, name)))
    return model


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_generate_on_a_paged_cache(model, kv_dtype):
    """A first step, whose keys are all there are, one of several tokens over pages, and decode steps."""
    expected = alone(model, prompt(11), config(3))
    model.set_attn_implementation("paged_flash")
    ids, cache = torch.tensor([prompt(11)]), hf_paged.PagedCache(model.config, page_size=8, kv_dtype=kv_dtype)
    model.generate(ids[:, :4], generation_config=config(1), **with_cache(cache))
    assert cache.get_seq_length() == 4
    assert model.generate(ids, generation_config=config(3), **with_cache(cache))[0, 11:].tolist() == expected


def test_an_engine(model):
    expected = [alone(model, prompt(n), config(3)) for n in (5, 11)]
    engine = make_engine(model)
    outputs = engine.generate([prompt(5), prompt(11)], generation_config=config(3))
    engine.close()
    assert [output.token_ids for output in outputs] == expected
