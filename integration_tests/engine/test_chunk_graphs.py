"""Steps over chunks of prompts in static buffers: on a CPU, with a replay that runs the step again."""


import numpy as np
import pytest
import torch
from random_requests import tiny_model
from small_engines import GRAPH_FAMILIES as FAMILIES
from small_engines import alone, config, make_engine, prompt
from transformers import GenerationConfig

from hf_paged.engine.execution import chunk_graphs
from hf_paged.engine.execution.chunk_graphs import (
    MIN_ROWS,
    ON_DEVICE,
    ChunkGraphs,
    Layout,
    chunk_sizes,
    mixed_totals,
    output_sizes,
)
from hf_paged.engine.execution.engine_cache import EngineLayer
from hf_paged.engine.execution.step_inputs import StepInputs
from hf_paged.engine.scheduling.slots import Slots
from hf_paged.engine.scheduling.step import ScheduledStep


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


def test_the_array_is_what_its_parts_are():
    layout = Layout(num_tokens=12, num_rows=4, num_outputs=3, row_tokens=8)
    array = torch.arange(layout.size)
    parts = layout.split(array)
    assert [list(part.shape) for part in parts] == [[3, 4], [3, 3], [3, 12]]
    found = torch.cat([part.flatten() for part in parts])
    assert len(found) == len(found.unique()) == 57
    assert torch.equal(found, found.sort().values)
    assert all((ours == part.numpy()).all() for ours, part in zip(layout.split(array.numpy()), parts))


@pytest.mark.parametrize("sizes", [(16, 35, 33), (33, 7, 5), (41, 1, 3), (8, 8, 8)])
def test_parts_begin_where_kernels_need_no_variant_of_their_own(sizes):
    layout = Layout(*sizes, row_tokens=8)
    array = torch.arange(layout.size)
    for row in [row for part in layout.split(array) for row in part]:
        assert row.is_contiguous()
        assert int(row[0]) % 2 == 0


def replayed(slots: Slots, sizes: list[int], **options) -> tuple[ChunkGraphs, list[torch.Tensor]]:
    seen = []
    capture = lambda step, static: lambda: seen.append(static) or ()  # noqa: E731
    return ChunkGraphs(lambda x, layout: (), slots, sizes, torch.device("cpu"), capture, **options), seen


@pytest.mark.parametrize("num_decode", [0, 2])
@pytest.mark.parametrize("row_tokens", [1, 4, 16])
def test_the_array_says_what_the_host_knows(num_decode, row_tokens):
    generator = np.random.default_rng(0)
    slots = Slots(6, 64)
    slots.history[:] = generator.integers(0, 1000, slots.history.shape)
    slots.computed[:] = [0, 3, 0, 11, 40, 7]
    graphs, seen = replayed(slots, [16, 32, 64], row_tokens=row_tokens)
    n = num_decode
    taken, counts = np.array([5, 0, 4, 1, 3])[2 - n :], np.array([1, 1, 2, 9, 1])[2 - n :]
    sampled_on_device = np.array([False] * (n > 0) + [True] * (n - 1) + [True, False, True])
    assert graphs.run(ScheduledStep(taken, counts, n, np.ones(3 + n, bool)), sampled_on_device) is not None
    layout = graphs.layout(*((64, 32) if n else (16, 0)))
    assert layout.row_tokens == row_tokens
    (row_slots, ends, lengths), outputs, (ids, positions, row_of) = (x.tolist() for x in layout.split(seen[0].numpy()))
    tail = layout.num_outputs - 3 - n
    assert outputs[0] == [6, 0][:n] + [4, 6, 3] + [6] * tail
    assert outputs[1] == [0, 1][:n] + [n + 1, n + 10, n + 11] + [0] * tail
    assert outputs[2] == [ON_DEVICE] * n + [42, 12, 12] + [0] * tail
    # Each token is in a row of its slot, at its place before the row's end.
    known = [(5, ON_DEVICE), (0, ON_DEVICE)][:n]
    tokens = [*known, (4, 40), (4, 41), *((1, i) for i in range(3, 12)), (3, 11)]
    assert [row_slots[row] for row in row_of] == [slot for slot, _ in tokens] + [6] * (layout.num_tokens - 12 - n)
    assert positions[: 12 + n] == [position for _, position in tokens]
    assert ids[:n] == lengths[:n] == [ON_DEVICE] * n
    assert ids[n : 12 + n] == [slots.history[slot, position] for slot, position in tokens[n:]]
    for token, row in enumerate(row_of[n : 12 + n], n):
        assert lengths[row] - ends[row] == positions[token] - token
    starts = [0, *ends[:-1]]
    assert all(starts[row] <= token < ends[row] for token, row in enumerate(row_of))
    assert all(0 <= end - start <= layout.row_tokens for start, end in zip(starts, ends))
    assert ends[-1] == layout.num_tokens
    assert all(length == 0 for slot, length in zip(row_slots, lengths) if slot == 6)


@pytest.mark.parametrize("row_tokens", [1, 3, 16])
def test_there_are_rows_for_any_chunks(row_tokens):
    slots = Slots(64, 2048)
    slots.history[:] = 7
    graphs, seen = replayed(slots, [1024], row_tokens=row_tokens)
    draw = np.random.default_rng(1)
    for _ in range(30):
        n, num = int(draw.integers(1, 17)), int(draw.integers(1, 17))
        counts = np.concatenate([np.ones(n, int), draw.integers(1, 60, num)])
        work = ScheduledStep(np.arange(n + num), counts, n, np.ones(n + num, bool))
        assert graphs.run(work, work.samples) is not None
        total = next(total for total in graphs.mixed_totals if total >= counts.sum())
        row_slots, ends, _ = graphs.layout(total, 32).split(seen[-1].numpy())[0]
        assert (np.diff(ends, prepend=0) <= row_tokens).all()
        for slot, count in enumerate(counts.tolist()):
            assert (row_slots == slot).sum() == -(-count // row_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40, 2)]
    expected = [alone(model, ids, config(6)) for ids in prompts]
    with make_engine(model, max_batch_tokens=24) as engine:
        graphs = engine._core.runner.chunk_graphs
        used = []
        run = graphs.run
        graphs.run = lambda work, sampled_on_device: used.append(len(work.slots)) or run(work, sampled_on_device)
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(6))] == expected
        short = [prompt(4, 50), prompt(7, 51)]
        expected = [alone(model, ids, config(6)) for ids in short]
        assert [output.token_ids for output in engine.generate(short, generation_config=config(6))] == expected
        engine.check()
        assert {outputs > 0 for _, outputs in graphs._replays} == {False, True}
        assert graphs.failure is None
        assert max(used) > 1, "several prompts in a step"


@pytest.mark.parametrize(
    ("largest", "totals"),
    [
        (8192, [128, 256, 384, 512, 768, 1024]),
        (1024, [128, 256, 384, 512, 768, 1024]),
        (300, [128, 256, 300]),
        (24, [24]),
    ],
)
def test_sizes_with_decode_rows(largest, totals):
    assert mixed_totals(largest) == totals


def test_numbers_of_outputs():
    assert output_sizes(1) == output_sizes(16) == [32]
    assert output_sizes(32) == [32]
    assert output_sizes(33) == [32, 96]
    assert output_sizes(256) == [32, 96, 176, 256]
    assert output_sizes(300) == [32, 96, 176, 256, 384]


def test_prompt_tokens_that_fill_a_step():
    graphs, _ = replayed(Slots(100, 64), [16, 300])
    assert graphs.mixed_totals == [128, 256, 300]
    assert graphs.tokens_to_fill_graph(3, 1) == 125
    assert graphs.tokens_to_fill_graph(3, 125) == 125
    assert graphs.tokens_to_fill_graph(3, 126) == 253
    assert graphs.tokens_to_fill_graph(40, 10, 200) == 216
    assert graphs.tokens_to_fill_graph(100, 200) == 200
    assert graphs.tokens_to_fill_graph(100, 201) is None
    graphs.failure = "none today"
    assert graphs.tokens_to_fill_graph(3, 1) is None


@pytest.mark.parametrize("num_slots", [16, 256, 300])
def test_no_step_asks_for_more_than_was_captured_at_warm_up(num_slots):
    graphs, _ = replayed(Slots(num_slots, 64), [512, 3072])
    graphs.warm_up()
    captured = set(graphs._replays)
    assert {(512, 0), (3072, 0), (128, 32)} <= captured == set(graphs.buckets())
    for outputs in range(1, num_slots + 1):
        for num_decode in {0, outputs // 2, outputs - 1}:
            for count in (outputs, outputs + 1, 127, 128, 129, 300, 513, 1024):
                if count >= outputs:
                    for _ in range(4):
                        graphs._bucket(num_decode, count, outputs)
    assert set(graphs._replays) == captured


def test_quantised_pages_and_decode_rows_have_launches_of_their_own():
    model = tiny_model("llama")
    prompts = [prompt(n, n) for n in (9, 17, 30)]
    with make_engine(model, kv_dtype="int8", max_batch_tokens=24, prefix_caching=False) as engine:
        handles = []
        for ids in prompts:
            handles.append(engine.submit(ids, generation_config=config(12)))
            for _ in range(3):
                engine.step()
        assert all(len(handle.result().token_ids) == 12 for handle in handles)
        graphs = engine._core.runner.chunk_graphs
        assert graphs.mixed_totals == []
        assert {outputs for _, outputs in graphs._replays} == {0}


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
            assert graphs._replays.keys() == {(size, 0) for size in captured}
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
            if len(static) > graphs.layout(32, 0).size:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return capture(step, static)

        graphs._capture = fails_for_large_ones
        assert engine.warm_up() > 0
        assert graphs._replays.keys() == {(16, 0), (32, 0)}
        for _ in range(2):
            assert [engine.generate([p], generation_config=config(2))[0].token_ids for p in (ids, short)] == expected
            engine.drop_prefixes()
        assert graphs.failure is None
        assert graphs._replays.keys() == {(16, 0), (32, 0)}


def test_prompt_logprobs_need_every_logit_and_run_eagerly():
    model = tiny_model("llama")
    with make_engine(model) as engine:
        handle = engine.submit(prompt(12), generation_config=config(2), prompt_logprobs=0)
        assert len(handle.result().prompt_logprobs) == 12
        assert not len(engine._core.runner.chunk_graphs)


def test_a_plan_is_settled_once_attention_was_asked_for_with_it(monkeypatch):
    """What the kernel reads early must have been waited for in the same step, by a call with the same plan. The last
    run of a chunk may have one query as a decode row has, but sees keys of this step."""
    asked: list[tuple[StepInputs, tuple, bool]] = []
    own = StepInputs.split_plan

    def split_plan(self, *plan):
        result = own(self, *plan)
        asked.append((self, plan, result[1]))
        return result

    monkeypatch.setattr(StepInputs, "split_plan", split_plan)
    # Layers with and without a window; attention over quantised pages takes a plan on a CPU too.
    with make_engine(tiny_model("gemma3_text"), prefix_caching=False, kv_dtype="int8") as engine:
        engine.generate([prompt(9), prompt(20)], generation_config=config(4))
    with make_engine(tiny_model("gemma3_text"), prefix_caching=False, max_batch_tokens=40) as engine:
        handles = [engine.submit(prompt(5), generation_config=config(9))]
        engine.step()
        engine.step()
        # Quantised pages have no runs. Of plain ones: runs of 16 and of 1 beside a decode row.
        handles.append(engine.submit(prompt(17), generation_config=config(4)))
        attends = EngineLayer.attend

        def attend(self, query, left, *arguments):
            self.cache.step.split_plan(self.number, 8, left)
            return attends(self, query, left, *arguments)

        monkeypatch.setattr(EngineLayer, "attend", attend)
        assert all(handle.result().error is None for handle in handles)
    assert {step.shares_new_keys for step, *_ in asked} == {False, True}
    seen: dict[int, set[tuple]] = {}
    for step, plan, can_prefetch_kv in asked:
        before = seen.setdefault(id(step), set())
        assert can_prefetch_kv == (plan in before and not step.shares_new_keys)
        before.add(plan)
    assert len(seen) > 2
    assert all(len(plans) == 2 for plans in seen.values())
    assert any(can_prefetch_kv for *_, can_prefetch_kv in asked)
