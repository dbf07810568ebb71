"""Decode steps over static buffers, and steps launched ahead: on a CPU, with a replay that runs the step again."""

import ctypes
import logging
import threading
import warnings

import numpy as np
import pytest
import torch
from random_requests import tiny_model
from small_engines import GRAPH_FAMILIES as FAMILIES
from small_engines import alone, config, make_engine, prompt, run_again
from transformers import LogitsProcessor

import hf_paged
from hf_paged.engine.execution import decode_graphs
from hf_paged.engine.execution.decode_graphs import (
    CaptureError,
    DecodeGraphs,
    RefuseHostReads,
    loads_in_captures,
    refuse_synchronisation,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_through_a_small_pool(family, monkeypatch):
    monkeypatch.setattr(decode_graphs, "PADDED_STEPS", 1)
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40)]
    expected = [alone(model, ids, config(12)) for ids in prompts]
    with make_engine(model, num_pages=9) as engine:
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(12))] == expected
        engine.check()
        assert engine.stats().preemptions > 0 or family in ("mistral", "mixtral"), "windows need few pages"
        assert len(engine._core.runner.graphs) > 1
        assert engine._core.runner.graphs.failure is None


def test_ends_are_noticed_one_step_late_and_the_extra_token_is_dropped(model):
    prompts = [prompt(n, n) for n in (5, 11, 19, 8)]
    long = [alone(model, ids, config(20)) for ids in prompts]
    options = [config(20, eos_token_id=[tokens[k]]) for tokens, k in zip(long, (3, 0, 7, 19))]
    expected = [alone(model, ids, option) for ids, option in zip(prompts, options)]
    with make_engine(model, max_num_seqs=2) as engine:
        outputs = engine.generate(prompts, generation_config=options)
        assert [output.token_ids for output in outputs] == expected
        assert engine.stats().new_tokens == sum(map(len, expected))
        engine.check()


def test_a_step_is_on_its_way_while_the_next_is_launched(model):
    with make_engine(model) as engine:
        handle = engine.submit(prompt(9), generation_config=config(10))
        core, order = engine._core, []
        run, collect = core.run, core.collect
        core.run = lambda work: (order.append("run"), run(work))[1]
        core.collect = lambda launched: (order.append("collect"), collect(launched))[1]
        while engine.step():
            engine.check()
        assert order == ["run"] + ["run", "collect"] * 9 + ["collect"]
        assert len(handle.result().token_ids) == 10


class AddThree(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % scores.shape[1]] += 3.0
        return scores


@pytest.mark.parametrize("what", ["processor", "beams", "lookup", "stop", "logprobs", "sampled"])
def test_rows_that_need_the_host_beside_rows_that_do_not(model, what):
    extra = {
        "processor": (config(12), dict(logits_processor=[AddThree()])),
        "beams": (config(12, num_beams=3), {}),
        "lookup": (config(12, prompt_lookup_num_tokens=3), {}),
        "stop": (config(12), dict(stopping_criteria=[lambda ids, scores, **kw: ids[:, -1] % 5 == 0])),
        "logprobs": (config(12), dict(logprobs=2)),
        "sampled": (config(12, do_sample=True, top_p=0.9, temperature=1.2), dict(seed=4)),
    }[what]
    plain = [prompt(n, n) for n in (4, 13, 22)]
    special = prompt(10) * 2
    with hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=99, page_size=8), background=False) as engine:
        wanted = engine.submit(special, generation_config=extra[0], **extra[1]).result()
    expected = [alone(model, ids, config(16)) for ids in plain]
    with make_engine(model, num_pages=60) as engine:
        handles = [engine.submit(plain[0], generation_config=config(16))]
        for _ in range(3):
            engine.step()
        handle = engine.submit(special, generation_config=extra[0], **extra[1])
        handles += [engine.submit(ids, generation_config=config(16)) for ids in plain[1:]]
        assert handle.result().token_ids == wanted.token_ids
        assert handle.result().logprobs == wanted.logprobs or what == "logprobs"
        assert [h.result().token_ids for h in handles] == expected
        engine.check()


def test_cancelled_and_swapped_rows_lose_the_token_on_its_way(model):
    ids = prompt(20)
    expected = alone(model, ids, config(24))
    with make_engine(model, swap_space_gib=0.01, prefix_caching=False) as engine:
        handle, other = (engine.submit(p, generation_config=config(24)) for p in (ids, prompt(6)))
        for _ in range(5):
            engine.step()
        slot = handle._request.sequences[0].slot
        engine._core.scheduler.preempt(handle._request)
        assert engine.stats().swapped == 1
        for _ in range(4):
            engine.step()
        assert handle._request.sequences[0].slot >= 0 or slot >= 0
        other.cancel()
        assert handle.result().token_ids == expected
        assert len(other.result().token_ids) < 24
        engine.check()


def test_pausing_forgets_graphs_and_loses_nothing(model):
    ids = prompt(12)
    expected = alone(model, ids, config(20))
    with make_engine(model) as engine:
        handle = engine.submit(ids, generation_config=config(20))
        for change in (lambda: (engine.pause(), engine.resume()), lambda: (engine.sleep(), engine.wake())):
            for _ in range(4):
                engine.step()
            assert len(engine._core.runner.graphs) == 1
            change()
            assert len(engine._core.runner.graphs) == 0
        engine.refresh_weights()
        assert handle.result().token_ids == expected


@pytest.mark.parametrize("num_pages", [None, 40])
def test_sleep_may_keep_graphs_and_the_addresses_of_pages(model, num_pages):
    """Memory goes back, captured steps stay; a weight that changes meanwhile is seen."""
    ids = prompt(12)
    expected = alone(model, ids, config(20))
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with make_engine(model, num_pages=num_pages) as engine:
        assert engine.submit(ids, generation_config=config(20)).result().token_ids == expected
        pages = [page for group in engine._core.pool.groups.values() for page in group.layers.values()]
        addresses, graphs = [page.k.data_ptr() for page in pages], engine._core.runner.graphs
        assert len(graphs) > 0
        for factor in (1, -2, 1):
            running = engine.submit(ids, generation_config=config(20))
            for _ in range(6):
                engine.step()
            if factor != 1:
                running.cancel()
            engine.sleep(keep_graphs=True)
            assert [page.arena.committed for page in pages] == [0] * len(pages)
            assert len(graphs) > 0
            engine.check()
            try:
                with torch.no_grad():
                    weight.mul_(factor)
                engine.wake()
                assert [page.k.data_ptr() for page in pages] == addresses
                if factor == 1:
                    assert running.result().token_ids == expected
                else:
                    changed = engine.submit(ids, generation_config=config(20)).result().token_ids
                    assert changed == alone(model, ids, config(20)) != expected
                engine.check()
            finally:
                with torch.no_grad():
                    weight.copy_(before)


def test_hooks_take_their_steps_without_graphs():
    model = tiny_model("llama")
    calls = []
    with make_engine(model) as engine:
        hook = model.model.layers[0].register_forward_hook(hf_paged.row_wise(lambda *args: calls.append(1)))
        engine.generate([prompt(5)], generation_config=config(6))
        assert len(calls) == 6
        assert len(engine._core.runner.graphs) == 0
        hook.remove()
        engine.generate([prompt(5)], generation_config=config(6))
        assert len(engine._core.runner.graphs) == 1


def test_autocast_takes_its_steps_without_graphs(model):
    with make_engine(model) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.generate([prompt(5)], generation_config=config(6))
        assert len(engine._core.runner.graphs) == 0


def test_a_weight_that_was_moved_is_noticed():
    model = tiny_model("llama")
    with make_engine(model) as engine:
        engine.generate([prompt(5)], generation_config=config(6))
        assert len(engine._core.runner.graphs) == 1
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.data = torch.randn_like(weight)
        expected = alone(model, prompt(6), config(6))
        made = []
        graphs = engine._core.runner.graphs
        graphs._capture = lambda step, slots: (made.append(len(slots)), run_again(step, slots))[1]
        assert engine.generate([prompt(6)], generation_config=config(6))[0].token_ids == expected
        assert made == [1]


def test_a_capture_that_fails_leaves_everything_to_eager_steps(model):
    def fail(step, slots):
        step(slots)
        raise RuntimeError("not on this device")

    ids = prompt(12)
    with make_engine(model) as engine:
        engine._core.use_graphs(fail)
        assert engine.submit(ids, generation_config=config(9)).result().token_ids == alone(model, ids, config(9))
        assert "not on this device" in engine._core.runner.graphs.failure


def test_a_size_that_cannot_be_captured_takes_a_larger_one(model):
    def fail_small(step, slots):
        if len(slots) < 4:
            raise RuntimeError("no memory left")
        return run_again(step, slots)

    with make_engine(model) as engine:
        engine._core.use_graphs(fail_small)
        prompts = [prompt(n, n) for n in (5, 9, 14)]
        options = [config(n) for n in (40, 20, 3)]
        expected = [alone(model, ids, option) for ids, option in zip(prompts, options)]
        assert [o.token_ids for o in engine.generate(prompts, generation_config=options)] == expected
        graphs = engine._core.runner.graphs
        assert graphs.failure is None
        assert set(graphs._replays) == {4}
        assert graphs._failed == {1, 2}


def test_padding_worth_a_few_steps_comes_before_a_capture():
    made = []

    def capture(step, slots):
        made.append(len(slots))
        return lambda: step(slots)

    seen = []

    def step(slots):
        seen.append(slots.tolist())
        return torch.zeros(len(slots), 3), torch.zeros(len(slots), dtype=torch.int64)

    graphs = DecodeGraphs(step, 32, torch.device("cpu"), capture)
    graphs.warm_up([32, 20])
    assert made == [32, 24]
    for count in (19, 17):
        logits, tokens = graphs.run(np.arange(count))
        assert len(logits) == len(tokens) == count
        assert seen[-1] == [*range(count), *[32] * (24 - count)]
    # 20 rows of 24 are padding: 9 steps are worth less than 8 whole ones.
    for _ in range(9):
        graphs.run(np.arange(3))
        assert len(seen[-1]) == 24
    graphs.run(np.arange(3))
    assert seen[-1] == [0, 1, 2, 32]
    assert made == [32, 24, 4]
    # The padding of a shrinking batch counts as a whole: 8 of 24 rows, then 16.
    graphs.drop()
    made.clear()
    for count in (24, *[16] * 16, *[8] * 3):
        graphs.run(np.arange(count))
        assert made == [24]
    graphs.run(np.arange(8))
    assert made == [24, 8]


def test_a_slot_without_tokens_stays_as_it_is(model):
    with make_engine(model) as engine:
        engine.generate([prompt(n) for n in (3, 9, 20)], generation_config=config(6))
        tables = engine._core.tables
        assert int(tables.computed[-1]) == -1
        tables.computed[:3] = torch.tensor([4, 8, 0])
        inputs = tables.static_inputs(torch.tensor([1, 8, 2, 8]))
        assert inputs.seq_lens.tolist() == [9, 0, 1, 0]
        assert inputs.position_ids.tolist() == [[8, 0, 0, 0]]
        assert [mapping >= 0 for mapping in inputs.groups[0].slot_mapping.tolist()] == [True, False, True, False]
        assert tables.computed[[0, 1, 2, 8]].tolist() == [4, 9, 1, -1]


def test_graphs_that_cannot_be_are_refused_where_they_are_asked_for(model):
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be: the model is on cpu"):
        hf_paged.Engine(model, hf_paged.EngineConfig(cuda_graphs=True, num_pages=8, self_check=False))
    with pytest.raises(TypeError, match="cuda_graphs must be None, True or False"):
        hf_paged.EngineConfig(cuda_graphs=1)
    with make_engine(model) as engine:
        with pytest.raises(ValueError, match="batch_sizes must be 1 to 8"):
            engine.warm_up([9])
        assert engine.warm_up([1, 8]) == 2
        assert engine.warm_up() == 4 + 3, "batches of 1, 2, 4, 8, chunks of 16 and 32, and of 32 beside 8 decode rows"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gpt2"])
def test_a_step_of_no_request_changes_nothing(family):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (3, 17, 30)]
    expected = [alone(model, ids, config(12)) for ids in prompts]
    with make_engine(model) as engine:
        core = engine._core
        handles = [engine.submit(ids, generation_config=config(12)) for ids in prompts]
        for _ in range(4):
            engine.step()
        pages = [
            x for group in core.pool.groups.values() for layer in group.layers.values() for x in (layer.k, layer.v)
        ]
        before = [x.clone() for x in (*pages, core.tables.computed, core.tables.last_token)]
        core.runner.warm_up_prompts(32)
        after = (*pages, core.tables.computed, core.tables.last_token)
        assert pages
        assert all(torch.equal(a, b) for a, b in zip(before, after))
        assert [handle.result().token_ids for handle in handles] == expected


def test_a_step_too_large_for_the_memory_is_told_at_the_warm_up(model, monkeypatch, caplog):
    with make_engine(model) as engine:
        runner = engine._core.runner

        def is_full(inputs, keep):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(runner, "forward", is_full)
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with caplog.at_level("WARNING"):
            runner.warm_up_prompts(32)
        assert "a step of 32 tokens (max_batch_tokens) finds no room" in caplog.text
        monkeypatch.setattr(runner, "forward", lambda inputs, keep: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.warm_up_prompts(32)


@pytest.mark.parametrize(("version", "loads"), [(12020, False), (12030, True), (13000, True), (None, False)])
def test_kernels_are_loaded_in_captures_from_cuda_12_3_on(monkeypatch, version, loads):
    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, place):
            place._obj.value = version or 0
            return 0 if version else 100

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    loads_in_captures.cache_clear()
    try:
        assert loads_in_captures() is loads
    finally:
        loads_in_captures.cache_clear()


def test_reading_from_the_host_is_only_refused_on_a_device():
    with RefuseHostReads():
        assert int(torch.tensor(3)) == 3
        with pytest.raises(RuntimeError, match="indexes with a mask"):
            torch.arange(3)[torch.tensor([True, False, True])]


def test_waiting_for_the_device_is_found_by_its_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with pytest.raises(CaptureError, match="waits for the device"), refuse_synchronisation():
        wait()
    assert modes == ["warn", 0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with refuse_synchronisation():
            warnings.warn("something else", stacklevel=1)
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
    assert [str(w.message) for w in seen] == ["something else", "called a synchronizing CUDA operation"]


def test_a_pause_may_keep_what_was_captured(model):
    ids = prompt(9)
    expected = alone(model, ids, config(8))
    with make_engine(model) as engine:

        def tokens():
            return engine.generate([ids], generation_config=config(8))[0].token_ids

        assert tokens() == expected
        graphs = engine._core.runner.graphs
        captured = len(graphs)
        assert captured
        engine.pause(keep_graphs=True)
        assert len(graphs) == captured
        engine.resume()
        assert len(graphs) == captured
        assert tokens() == expected
        engine.pause()
        assert not len(graphs)


@pytest.mark.parametrize("change", ["weights", "module", "forward", "training"])
def test_what_was_captured_is_dropped_if_the_model_changed_in_a_pause(change):
    model = tiny_model("llama")
    layer = model.model.layers[0]
    with make_engine(model) as engine:
        engine.generate([prompt(9)], generation_config=config(4))
        graphs = engine._core.runner.graphs
        assert len(graphs)
        engine.pause(keep_graphs=True)
        if change == "weights":
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()
        elif change == "module":
            new = torch.nn.Linear(layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features, bias=False)
            new.weight = layer.mlp.up_proj.weight
            layer.mlp.up_proj = new
        elif change == "forward":
            forward = layer.mlp.forward
            layer.mlp.forward = lambda x: forward(x) * 2
        else:
            model.train()
        engine.resume()
        assert not len(graphs)


def test_other_adapters_are_noticed_after_a_pause():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with make_engine(model) as engine:
        graphs = engine._core.runner.graphs

        def captured_after(change):
            engine.generate([prompt(9)], generation_config=config(4))
            assert len(graphs)
            engine.pause(keep_graphs=True)
            change()
            engine.resume()
            return len(graphs)

        assert captured_after(lambda: None)
        assert not captured_after(lambda: adapted.set_adapter("other"))
        assert not captured_after(adapted.base_model.disable_adapter_layers)
        assert not captured_after(adapted.merge_adapter)


@pytest.mark.parametrize("graphs", [False, True])
def test_other_adapters_are_noticed_by_an_idle_engine(graphs):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    ids = prompt(30)
    expected = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        expected[name] = alone(model, ids, config(12))
    assert expected["default"] != expected["other"]
    options = hf_paged.EngineConfig(num_pages=32, page_size=8, self_check=False)
    with make_engine(model) if graphs else hf_paged.Engine(model, options, background=False) as engine:
        for name in ("other", "default", "default", "other"):
            adapted.set_adapter(name)
            assert engine.generate([ids], generation_config=config(12))[0].token_ids == expected[name]
