"""Steps over chunks of prompts in static buffers: on a CPU, with a replay that runs the step again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_paged.engine import chunk_graphs
from hf_paged.engine.chunk_graphs import ROWS, ChunkGraphs, chunk_sizes, unpack
from hf_paged.engine.scheduler import StepWork
from hf_paged.engine.slots import Slots

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "models")]
from random_requests import tiny_model
from test_decode_graphs import FAMILIES, alone, config, make_engine, prompt


@pytest.fixture(autouse=True)
def captured_at_once(monkeypatch):
    monkeypatch.setattr(chunk_graphs, "USES_BEFORE_CAPTURE", 0)


def test_sizes():
    assert chunk_sizes(8192)[:4] == [16, 32, 64, 128]
    assert chunk_sizes(8192)[-1] == 2048
    assert chunk_sizes(2048)[-1] == 2048
    assert chunk_sizes(100) == [16, 32, 64, 100]
    assert chunk_sizes(5) == [5]


def test_the_array_says_what_the_host_knows():
    generator = np.random.default_rng(0)
    slots = Slots(6, 64)
    slots.history[:] = generator.integers(0, 1000, slots.history.shape)
    slots.computed[:] = [0, 3, 0, 11, 40, 7]
    seen = []
    graphs = ChunkGraphs(lambda x: x, slots, 64, torch.device("cpu"), lambda step, static: lambda: seen.append(static))
    work = StepWork(np.array([4, 1, 3]), np.array([2, 9, 1]), 0, np.ones(3, bool))
    with pytest.raises(TypeError):
        graphs.run(work)  # what was replayed returns None
    num = 12
    taken, ends, lengths, ids, positions, rows = (x.numpy() for x in unpack(seen[0]))
    assert len(ids) == 16
    assert taken.tolist() == [4, 1, 3] + [6] * (ROWS - 3)
    assert ends.tolist() == [2, 11, 12] + [12] * (ROWS - 4) + [16]
    assert lengths.tolist() == [42, 12, 12] + [0] * (ROWS - 3)
    assert rows.tolist() == [0] * 2 + [1] * 9 + [2] + [ROWS - 1] * 4
    assert positions[:num].tolist() == [40, 41, *range(3, 12), 11]
    assert (ids[:num] == slots.history[taken[rows[:num]], positions[:num]]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40, 2)]
    expected = [alone(model, ids, config(6)) for ids in prompts]
    with make_engine(model, max_batch_tokens=24) as engine:
        graphs = engine._core.runner.chunk_graphs
        used = []
        run = graphs.run
        graphs.run = lambda work: used.append(len(work.slots)) or run(work)
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(6))] == expected
        short = [prompt(4, 50), prompt(7, 51)]
        expected = [alone(model, ids, config(6)) for ids in short]
        assert [output.token_ids for output in engine.generate(short, generation_config=config(6))] == expected
        engine.check()
        assert len(graphs) == 2
        assert graphs.failure is None
        assert max(used) > 1, "several prompts in a step"


def test_more_rows_than_a_graph_has_run_eagerly():
    model = tiny_model("llama")
    prompts = [prompt(1 + n % 2, n) for n in range(ROWS + 4)]
    expected = [alone(model, ids, config(3)) for ids in prompts]
    with make_engine(model, num_pages=64, max_num_seqs=64, max_batch_tokens=64) as engine:
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(3))] == expected
        assert not len(engine._core.runner.chunk_graphs)


def test_a_bucket_is_captured_when_it_was_asked_for_often_enough(monkeypatch):
    monkeypatch.setattr(chunk_graphs, "USES_BEFORE_CAPTURE", 2)
    model = tiny_model("llama")
    ids = prompt(20)
    expected = alone(model, ids, config(2))
    with make_engine(model, prefix_caching=False) as engine:
        counts = []
        for _ in range(4):
            assert engine.generate([ids], generation_config=config(2))[0].token_ids == expected
            counts.append(len(engine._core.runner.chunk_graphs))
        assert counts == [0, 0, 1, 1]
        engine.refresh_weights()
        assert not len(engine._core.runner.chunk_graphs)


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once():
    model = tiny_model("llama")
    ids = prompt(20)
    expected = alone(model, ids, config(2))
    with make_engine(model, prefix_caching=False) as engine:
        graphs = engine._core.runner.chunk_graphs

        def fails(step, static):
            raise RuntimeError("no capture today")

        graphs._capture = fails
        for _ in range(2):
            assert engine.generate([ids], generation_config=config(2))[0].token_ids == expected
        assert graphs.failure == "RuntimeError: no capture today"


def test_prompt_logprobs_need_every_logit_and_run_eagerly():
    model = tiny_model("llama")
    with make_engine(model) as engine:
        handle = engine.submit(prompt(12), generation_config=config(2), prompt_logprobs=0)
        assert len(handle.result().prompt_logprobs) == 12
        assert not len(engine._core.runner.chunk_graphs)
