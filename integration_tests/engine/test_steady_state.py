"""After a warm-up nothing is captured and nothing compiled in the foreground, whatever requests come."""

import random

import pytest
import torch
from random_requests import tiny_model
from small_engines import config, make_engine, prompt

import hf_paged

SIZES = dict(num_pages=32, page_size=8, max_num_seqs=8, max_batch_tokens=64)
"""Few pages: requests lose theirs and go on later."""


def serve_random_calls(engine: hf_paged.Engine, count: int) -> int:
    """Calls of one to eight prompts that come while others run; greedy, sampled, several samples, shared beginnings.

    Returns the number of preemptions."""
    draw = random.Random(0)
    beginnings = [prompt(40, seed) for seed in range(3)]
    for _ in range(count):
        handles = []
        for _ in range(draw.randint(1, 8)):
            ids = draw.choice([[], *beginnings]) + prompt(draw.randint(1, 60), draw.randrange(10**6))
            how = draw.choice([{}, dict(do_sample=True, temperature=0.8, top_p=0.9), dict(repetition_penalty=1.2)])
            if draw.random() < 0.2:
                how = dict(do_sample=True, num_return_sequences=2)
            handles.append(engine.submit(ids, generation_config=config(draw.randint(1, 12), **how)))
            for _ in range(draw.randint(0, 3)):
                engine.step()
        for handle in handles:
            assert handle.result().error is None
        if draw.random() < 0.1:
            engine.drop_prefixes()
    return engine.stats().preemptions


@pytest.fixture
def captured(monkeypatch) -> list:
    """What is captured from now on."""
    from hf_paged.engine.execution import chunk_graphs, decode_graphs

    found: list = []
    for kind in (decode_graphs.DecodeGraphs, chunk_graphs.ChunkGraphs):

        def make(self, bucket, own=kind._make):
            found.append(bucket)
            return own(self, bucket)

        monkeypatch.setattr(kind, "_make", make)
    return found


def test_nothing_is_captured_after_a_warm_up(captured):
    with make_engine(tiny_model("llama"), **SIZES) as engine:
        graphs, chunk_graphs = engine._core.runner.graphs, engine._core.runner.chunk_graphs
        graphs.warm_up()
        chunk_graphs.warm_up()
        assert captured
        captured.clear()
        assert serve_random_calls(engine, 60) > 0
        assert captured == []


def test_without_a_warm_up_steps_are_captured_as_they_come(captured):
    with make_engine(tiny_model("llama"), **SIZES) as engine:
        serve_random_calls(engine, 10)
    assert captured


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_nothing_is_captured_or_compiled_after_a_warm_up_on_a_gpu(captured, monkeypatch, kv_dtype):
    from triton import knobs

    model = tiny_model("llama").to("cuda", torch.bfloat16)
    compiled: list[str] = []
    options = hf_paged.EngineConfig(**SIZES, kv_dtype=kv_dtype)
    with hf_paged.Engine(model, options, background=False) as engine:
        engine.warm_up()
        assert captured
        captured.clear()
        listener = lambda *, metadata, cache_hit, **rest: compiled.append(metadata["name"])  # noqa: E731
        monkeypatch.setattr(knobs.compilation, "listener", listener)
        assert serve_random_calls(engine, 200) > 0
        assert captured == []
        assert compiled == [], "neither compiled nor loaded"
