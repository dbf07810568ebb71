"""Steps over chunks of prompts in static buffers: on a CPU, with a replay that runs the step again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hf_paged.engine import chunk_graphs
from hf_paged.engine.chunk_graphs import MIN_ROWS, ChunkGraphs, chunk_sizes, decode_sizes, mixed_sizes, num_rows, unpack
from hf_paged.engine.scheduler import StepWork
from hf_paged.engine.slots import Slots

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "models")]
from random_requests import tiny_model
from test_decode_graphs import FAMILIES, alone, config, make_engine, prompt


@pytest.fixture(autouse=True)
def captured_at_once(monkeypatch):
    monkeypatch.setattr(chunk_graphs, "USES_BEFORE_CAPTURE", 0)


def test_sizes():
    assert chunk_sizes(8192, 600_000_000)[:4] == [16, 32, 64, 128]
    assert chunk_sizes(8192, 600_000_000)[-5:] == [4096, 5120, 6144, 7168, 8192]
    assert chunk_sizes(2048, 600_000_000)[-1] == 2048
    assert chunk_sizes(2100, 600_000_000)[-2:] == [2048, 2100]
    assert chunk_sizes(100, 600_000_000) == [16, 32, 64, 100]
    assert chunk_sizes(5, 600_000_000) == [5]


@pytest.mark.parametrize(("billions", "largest"), [(0.6, 8192), (3.2, 7168), (8.03, 3072), (70.0, 2048)])
def test_what_keeps_the_device_busy_is_not_captured(billions, largest):
    assert chunk_sizes(8192, int(billions * 1e9))[-1] == largest


def test_filling_up_costs_little():
    sizes = chunk_sizes(16384, 1)
    waste = [next(size for size in sizes if size >= count) / count - 1 for count in range(512, 16384)]
    assert sum(waste) / len(waste) < 0.12
    assert max(waste) < 0.25


@pytest.mark.parametrize("bucket", [1, 16, 100, 2047, 2048, 2049, 2112, 2113, 2560, 8192, 12345])
def test_the_array_tells_its_rows(bucket):
    parts = unpack(torch.arange(4 * num_rows(bucket) + 3 * bucket))
    assert [len(part) for part in parts] == [num_rows(bucket)] * 4 + [bucket] * 3
    assert torch.equal(torch.cat(parts), torch.arange(4 * num_rows(bucket) + 3 * bucket))


@pytest.mark.parametrize("num_decode", [0, 2])
def test_the_array_says_what_the_host_knows(num_decode):
    generator = np.random.default_rng(0)
    slots = Slots(6, 64)
    slots.history[:] = generator.integers(0, 1000, slots.history.shape)
    slots.computed[:] = [0, 3, 0, 11, 40, 7]
    seen = []
    capture = lambda step, static: lambda: seen.append(static)  # noqa: E731
    graphs = ChunkGraphs(lambda x, num_decode: (), slots, [16, 32, 64], torch.device("cpu"), capture)
    taken, counts = np.array([5, 0, 4, 1, 3]), np.array([1, 1, 2, 9, 1])
    work = StepWork(taken[2 - num_decode :], counts[2 - num_decode :], num_decode, np.ones(3 + num_decode, bool))
    choosers = np.array([True] * num_decode + [True, False, True])
    room = 8 if num_decode else 0
    assert graphs.run(work, choosers)[1].tolist() == [*range(num_decode), room, room + 1, room + 2]
    num = 12
    assert seen[0][:room].tolist() == ([5, 0] + [6] * 6)[:room]
    taken, ends, lengths, choosers, ids, positions, rows = (x.numpy() for x in unpack(seen[0][room:]))
    assert len(ids) == (64 if num_decode else 16)
    ends[-1], rows, positions = 16 if ends[-1] == len(ids) else -1, rows[:16], positions[:16]
    assert taken.tolist() == [4, 1, 3] + [6] * (MIN_ROWS - 3)
    assert choosers.tolist() == [4, 6, 3] + [6] * (MIN_ROWS - 3)
    assert ends.tolist() == [2, 11, 12] + [12] * (MIN_ROWS - 4) + [16]
    assert lengths.tolist() == [42, 12, 12] + [0] * (MIN_ROWS - 3)
    assert rows.tolist() == [0] * 2 + [1] * 9 + [2] + [MIN_ROWS - 1] * 4
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
        graphs.run = lambda work, choosers: used.append(len(work.slots)) or run(work, choosers)
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(6))] == expected
        short = [prompt(4, 50), prompt(7, 51)]
        expected = [alone(model, ids, config(6)) for ids in short]
        assert [output.token_ids for output in engine.generate(short, generation_config=config(6))] == expected
        engine.check()
        assert {num > 0 for num, _ in graphs._replays} == {False, True}
        assert graphs.failure is None
        assert max(used) > 1, "several prompts in a step"


@pytest.mark.parametrize(
    ("largest", "usual", "sizes"),
    [
        (8192, 192, [128, 192, 384, 768]), (8192, 500, [256, 512, 1024]), (3072, 1024, [512, 1024]),
        (8192, 256, [128, 256, 512, 1024]), (300, 192, [128, 192, 300]), (24, 1024, [24]), (8192, 4, [64]),
    ],
)  # fmt: skip
def test_sizes_with_decode_rows(largest, usual, sizes):
    assert mixed_sizes(largest, usual) == sizes


def test_sizes_of_decode_rows():
    assert decode_sizes(1) == decode_sizes(8) == [8]
    assert decode_sizes(256) == [8, 16, 32, 64, 96, 128, 192, 256]
    assert decode_sizes(300)[-2:] == [256, 384]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_rows_go_along_with_chunks(family):
    """Greedy, sampled, penalised and host-processed rows, with log-probabilities, all in one step."""
    model = tiny_model(family)
    ours = lambda ids, scores: scores + 0.3 * torch.arange(scores.shape[-1]).sin()  # noqa: E731
    kinds = [
        (config(14), {}),
        (GenerationConfig(max_new_tokens=14, do_sample=True, top_p=0.9, pad_token_id=0), {"seed": 5}),
        (config(14, repetition_penalty=1.5), {}),
        (config(14), {"logits_processor": [ours]}),
        (config(14), {"logprobs": 2}),
    ]
    outputs = {}
    for together in (False, True):
        with make_engine(model, num_pages=96, max_num_seqs=16, max_batch_tokens=40, prefix_caching=False) as engine:
            runner, handles, mixed = engine._core.runner, [], []
            if not together:
                runner.graphs = runner.chunk_graphs = None
            else:
                run, decode = runner.chunk_graphs.run, runner.graphs.run
                runner.chunk_graphs.run = lambda work, *a: mixed.append(work.num_decode) or run(work, *a)  # noqa: B023
                runner.graphs.run = lambda slots: mixed.append(-len(slots)) or decode(slots)  # noqa: B023
            for i in range(12):
                options, how = kinds[i % len(kinds)]
                handles.append(engine.submit(prompt(3 + 5 * i % 37, i), generation_config=options, **how))
                for _ in range(2 if together else 40):
                    engine.step()
            while engine.step():
                pass
            engine.check()
            results = [handle.result() for handle in handles]
            outputs[together] = [result.token_ids for result in results]
            if together:
                assert max(mixed) > 1
                index = [i for i, num in enumerate(mixed) if num > 0]
                assert not any(mixed[i + 1] == -mixed[i] for i in index if i + 1 < len(mixed)), "rows decoded twice"
            for result in results[4::5]:
                assert all(entry.token_id == token for entry, token in zip(result.logprobs, result.token_ids))
    assert outputs[True] == outputs[False]


def test_more_rows_than_a_graph_has_run_eagerly():
    model = tiny_model("llama")
    prompts = [prompt(1 + n % 2, n) for n in range(MIN_ROWS + 4)]
    expected = [alone(model, ids, config(3)) for ids in prompts]
    with make_engine(model, num_pages=64, max_num_seqs=64, max_batch_tokens=64) as engine:
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(3))] == expected
        assert not len(engine._core.runner.chunk_graphs)


def test_large_steps_are_captured_and_more_rows_take_a_larger_graph(monkeypatch):
    monkeypatch.setattr(chunk_graphs, "MIN_ROWS", 4)
    monkeypatch.setattr(chunk_graphs, "TOKENS_PER_ROW", 16)
    model = tiny_model("llama")
    with make_engine(model, num_pages=64, max_num_seqs=16, max_batch_tokens=128) as engine:
        graphs = engine._core.runner.chunk_graphs
        for lengths, captured in (((50, 60), {128}), ((9,) * 5, {128}), ((30, 20), {64, 128}), ((4, 3), {16, 64, 128})):
            prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
            expected = [alone(model, ids, config(2)) for ids in prompts]
            outputs = engine.generate(prompts, generation_config=config(2))
            assert [output.token_ids for output in outputs] == expected
            assert graphs._replays.keys() == {(0, size) for size in captured}
            engine.drop_prefixes()


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


def test_a_size_too_large_for_the_memory_runs_eagerly_and_the_others_do_not():
    model = tiny_model("llama")
    ids, short = prompt(60), prompt(20)
    expected = [alone(model, prompt_ids, config(2)) for prompt_ids in (ids, short)]
    with make_engine(model, num_pages=64, max_batch_tokens=64) as engine:
        graphs = engine._core.runner.chunk_graphs
        capture = graphs._capture

        def fails_for_large_ones(step, static):
            if len(static) > 4 * MIN_ROWS + 3 * 32:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return capture(step, static)

        graphs._capture = fails_for_large_ones
        assert engine.warm_up() > 0
        assert graphs._replays.keys() == {(0, 16), (0, 32)}
        for _ in range(2):
            assert [engine.generate([p], generation_config=config(2))[0].token_ids for p in (ids, short)] == expected
            engine.drop_prefixes()
        assert graphs.failure is None
        assert graphs._replays.keys() == {(0, 16), (0, 32)}


def test_prompt_logprobs_need_every_logit_and_run_eagerly():
    model = tiny_model("llama")
    with make_engine(model) as engine:
        handle = engine.submit(prompt(12), generation_config=config(2), prompt_logprobs=0)
        assert len(handle.result().prompt_logprobs) == 12
        assert not len(engine._core.runner.chunk_graphs)
