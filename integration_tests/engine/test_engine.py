"""The engine's own features: prefixes, priorities, ageing, pausing, logprobs, statistics, the self-check."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from hf_paged_kernels.attention.ops import paged_attention_op
from random_requests import tiny_model
from tiny_models import build, randomise, tiny_config
from transformers import GenerationConfig, LogitsProcessor

import hf_paged
from hf_paged.engine.execution.cpu_attention import attend_groups, plan_groups
from hf_paged.engine.sampling.token_selector import RequestParams
from hf_paged.paging import LayerPages

FAMILIES = ("llama", "gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3", "jamba", "falcon_h1", "lfm2", "gpt2")


def config(new: int = 8, **options) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def make_engine(model, **options) -> hf_paged.Engine:
    defaults = dict(num_pages=32, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


def alone(model, ids: list[int], options: GenerationConfig) -> list[int]:
    return model.generate(torch.tensor([ids]), generation_config=options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_through_a_small_pool(family):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40)]
    expected = [alone(model, ids, config(12)) for ids in prompts]
    with make_engine(model, num_pages=9, self_check=True) as engine:
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(12))] == expected
        engine.check()
        assert engine.stats().preemptions > 0
    assert [alone(model, ids, config(12)) for ids in prompts] == expected


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_pages(model, kv_dtype):
    with make_engine(model, kv_dtype=kv_dtype, self_check=True) as engine:
        outputs = engine.generate([prompt(20)], generation_config=config(2))
        assert outputs[0].finish_reason == "length"
        assert all(pages.is_quantized for pages in engine._core.pool.groups[None].layers.values())


def test_as_many_samples_as_sequences_fit_a_pool_of_default_size(model):
    options = GenerationConfig(do_sample=True, num_return_sequences=8, max_new_tokens=3, pad_token_id=0)
    with make_engine(model, num_pages=None, max_num_seqs=8, max_model_len=10) as engine:
        output = engine.generate([prompt(7)], generation_config=options)[0]
        assert [len(row.token_ids) for row in output.sequences] == [3] * 8
    assert "num_sequences=8" in repr(RequestParams.make(model, options, prompt_ids=prompt(7)))


def test_a_stored_prompt_is_found_again(model):
    ids = prompt(40)
    with make_engine(model) as engine:
        first = engine.generate([ids], generation_config=config())[0]
        again, salted = (
            engine.submit(ids, generation_config=config(), cache_salt=salt).result() for salt in (None, "other")
        )
        assert [out.cached_tokens for out in (first, again, salted)] == [0, 32, 0]
        assert first.token_ids == again.token_ids == salted.token_ids
        assert engine.stats().pages_cached > 0
        engine.refresh_weights()
        assert engine.stats().pages_used == 0
        assert engine.submit(ids, generation_config=config()).result().cached_tokens == 0


def test_samples_share_the_pages_of_their_prompt(model):
    with make_engine(model, prefix_caching=False, max_num_seqs=6) as engine:
        handle = engine.submit(prompt(64), generation_config=config(9, do_sample=True, num_return_sequences=6), seed=3)
        most = 0
        while engine.step():
            engine.check()
            most = max(most, engine.stats().pages_used)
        output = handle.result()
        assert most <= 8 + 6 * 2
        assert len({tuple(sequence.token_ids) for sequence in output.sequences}) > 1
        alone_again = engine.submit(prompt(64), generation_config=config(9, do_sample=True), seed=3).result()
        assert alone_again.token_ids == output.token_ids


def test_the_same_seed_gives_the_same_tokens_in_any_company(model):
    options = config(12, do_sample=True, temperature=1.3)
    with make_engine(model) as engine:
        lonely = engine.submit(prompt(11), generation_config=options, seed=7).result().token_ids
        others = [engine.submit(prompt(n, n), generation_config=options) for n in (3, 20, 31)]
        crowded = engine.submit(prompt(11), generation_config=options, seed=7).result().token_ids
        assert lonely == crowded
        assert all(len(other.result().token_ids) == 12 for other in others)
    runs = []
    for _ in range(2):
        with make_engine(model, seed=5) as engine:
            outputs = engine.generate([prompt(9)] * 3, generation_config=options)
            runs.append([output.token_ids for output in outputs])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


def test_urgent_requests_go_first_and_nobody_starves(model):
    order: list[str] = []
    with make_engine(model, max_num_seqs=1, ageing_s=10.0) as engine:
        now = [0.0]
        engine._core.clock = engine._core.scheduler.clock = lambda: now[0]
        first = engine.submit(prompt(5), generation_config=config(2), request_id="first")
        for number in range(6):
            now[0] += 1
            engine.submit(prompt(5), generation_config=config(2), request_id=f"low-{number}")
        engine.submit(prompt(5), generation_config=config(2), request_id="urgent", priority=1)
        arrivals = 0
        while len(order) < 20:
            engine.step()
            for request_id in [i for i in ("first", "urgent", *(f"low-{n}" for n in range(6))) if i not in order]:
                if request_id not in engine.mail.unfinished:
                    order.append(request_id)
            # A stream of urgent requests that never ends: what has waited for 10 seconds is as urgent as they are.
            now[0] += 1
            arrivals += 1
            engine.submit(prompt(5), generation_config=config(1), priority=1, request_id=f"urgent-{arrivals}")
            if len(order) == 8:
                break
            assert arrivals < 200, "somebody starves"
        assert first.is_done
    assert order.index("urgent") < order.index("low-0")
    assert [name for name in order if name.startswith("low")] == [f"low-{n}" for n in range(6)]


def test_an_urgent_request_takes_the_pages_of_another(model):
    low, high = prompt(60, 1), prompt(60, 2)
    expected = [alone(model, low, config(40)), alone(model, high, config(8))]
    with make_engine(model, num_pages=14) as engine:
        slow = engine.submit(low, generation_config=config(40))
        for _ in range(10):
            engine.step()
        fast = engine.submit(high, generation_config=config(8), priority=5)
        output = fast.result()
        assert not slow.is_done
        assert [slow.result().token_ids, output.token_ids] == expected
        assert slow.result().timing.preemptions == 1


def test_swapped_pages_come_back(model):
    prompts = [prompt(30, n) for n in range(6)]
    expected = [alone(model, ids, config(20)) for ids in prompts]
    with make_engine(model, num_pages=16, swap_space_gib=0.001, prefix_caching=False) as engine:
        space = engine._core.swapping.space_left
        assert [out.token_ids for out in engine.generate(prompts, generation_config=config(20))] == expected
        stats = engine.stats()
        assert stats.swapped > 0
        assert engine._core.swapping.space_left == space, "host memory was not given back"


def test_pause_sleep_and_new_weights(model):
    model = tiny_model("llama")
    ids = prompt(20)
    expected = alone(model, ids, config(20))
    with make_engine(model) as engine:
        handle = engine.submit(ids, generation_config=config(20))
        for _ in range(5):
            engine.step()
        engine.pause()
        assert model.config._attn_implementation == "sdpa"
        assert not engine.step()
        engine.resume()
        engine.step()
        engine.sleep()
        assert sum(len(group.layers) for group in engine._core.pool.groups.values()) == 0
        assert engine.stats().pages_used == 0
        with pytest.raises(hf_paged.RequestError, match="wake"):
            engine.resume()
        engine.wake()
        assert handle.result().token_ids == expected
        engine.check()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
        engine.refresh_weights()
        got = engine.submit(ids, generation_config=config(20)).result().token_ids
    assert got == alone(model, ids, config(20)) != expected


def test_logprobs_of_prompt_and_new_tokens(model):
    ids = prompt(37)
    with make_engine(model, max_batch_tokens=16) as engine:
        output = engine.submit(ids, generation_config=config(5), logprobs=3, prompt_logprobs=2).result()
        plain = engine.submit(ids, generation_config=config(5)).result()
    assert output.token_ids == plain.token_ids
    assert plain.logprobs is None
    with torch.no_grad():
        logprobs = model(torch.tensor([[*ids, *output.token_ids]])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(ids)
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    for position, (entry, token) in enumerate(zip(entries, [*ids[1:], *output.token_ids])):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(logprobs[position, token]), abs=1e-4)
        assert entry.top_ids == tuple(logprobs[position].topk(len(entry.top_ids)).indices.tolist())
    assert [len(entry.top_ids) for entry in (output.prompt_logprobs[1], output.logprobs[0])] == [2, 3]


def test_trace_and_statistics(model, tmp_path):
    with make_engine(model) as engine:
        engine.generate([prompt(n, n) for n in (5, 20, 9)], generation_config=config(6), progress=True)
        stats = engine.stats()
        events = json.loads(engine.trace(tmp_path / "trace.json").read_text())["traceEvents"]
        rows = list(csv.DictReader(engine.trace(tmp_path / "steps.csv").open()))
        with pytest.raises(ValueError, match="must end in"):
            engine.trace(tmp_path / "trace.txt")
        pytest.importorskip("matplotlib")
        assert engine.trace(tmp_path / "trace.png").stat().st_size > 1000
    assert (stats.steps, stats.new_tokens, stats.finished) == (len(rows), 18, {"length": 3})
    assert stats.prompt_tokens == 34
    assert sum(int(row["num_tokens"]) for row in rows) == 34 + 3 * 5
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"decode", "prefill", "request-0 tokens"}


def test_results_come_in_order_with_a_config_each(model):
    configs = [config(n) for n in (9, 1, 5)]
    with hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=32)) as engine:
        outputs = engine.generate([prompt(7)] * 3, generation_config=configs)
        assert [len(output.token_ids) for output in outputs] == [9, 1, 5]
        with pytest.raises(ValueError, match="one for each of 2 prompts"):
            engine.generate([prompt(7)] * 2, generation_config=configs)
        with pytest.raises(ValueError, match="at least one token"):
            engine.generate([prompt(7), []], generation_config=config())
        with pytest.raises(hf_paged.RequestError, match="only requests of one sequence"):
            list(engine.submit(prompt(7), generation_config=config(num_beams=2)))


def test_the_default_number_of_pages_is_bounded(model):
    with hf_paged.Engine(model, hf_paged.EngineConfig(max_num_seqs=4, self_check=False), background=False) as engine:
        assert engine.stats().pages_total == 4 * 128 // 16 + 1  # one for a copy of a shared prompt's last page
        assert engine.generate([prompt(9)], generation_config=config())[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"page_size": 12}, ValueError, "page_size must be one of"),
        ({"num_pages": 0}, ValueError, "num_pages must be None or an int of at least 1, got 0"),
        ({"num_pages": 2.5}, TypeError, "num_pages"),
        ({"kv_dtype": "int4"}, ValueError, "kv_dtype must be one of"),
        ({"memory_fraction": 1.5}, ValueError, "memory_fraction"),
        ({"max_batch_tokens": 8, "max_num_seqs": 9}, ValueError, "at least max_num_seqs"),
        ({"max_num_seqs": True}, TypeError, "max_num_seqs"),
        ({"swap_space_gib": -1}, ValueError, "swap_space_gib"),
        ({"ageing_s": 0}, ValueError, "ageing_s"),
        ({"prefix_caching": 1}, TypeError, "prefix_caching"),
        ({"seed": -1}, ValueError, "seed"),
        ({"compile": 1}, TypeError, "compile must be True or False"),
        ({"batch_invariant": True}, ValueError, "not available yet"),
        ({"cuda_graphs": "yes"}, TypeError, "cuda_graphs must be None, True or False"),
    ],
)
@pytest.mark.quick
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        hf_paged.EngineConfig(**options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hf_paged.EngineConfig().page_size = 8


# Models that cannot be served


@pytest.mark.parametrize(("family", "reason"), [("bloom", "attention interface"), ("t5", "encoder-decoder")])
def test_models_that_ignore_the_attention_interface_are_refused(family, reason):
    if family == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    else:
        model = build(tiny_config(family), "eager")
    assert any(reason in text for text in hf_paged.is_supported(model))
    with pytest.raises(hf_paged.UnsupportedModelError, match=reason):
        hf_paged.Engine(model)
    assert hf_paged.is_supported(torch.nn.Linear(1, 1))


def test_the_self_check_refuses_a_model_that_differs(model):
    assert hf_paged.is_supported(model) == []
    model = build(tiny_config("llama"), "sdpa")
    randomise(model, 1)

    def leak(module, args, kwargs, output):
        # A layer that mixes neighbouring tokens by itself mixes the sequences of a packed batch.
        return output + 0.5 * output.roll(1, dims=1).cumsum(1) if isinstance(output, torch.Tensor) else output

    hook = model.model.layers[1].register_forward_hook(hf_paged.row_wise(leak), with_kwargs=True)
    with pytest.raises(hf_paged.UnsupportedModelError, match=r"logits of short prompts differ .* mix the sequences"):
        hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=8))
    hook.remove()
    assert model.config._attn_implementation == "sdpa"

    def scale(module, args, output):
        return (output[0] * 1.5, *output[1:]) if model.config._attn_implementation == "paged_flash" else output

    model.model.layers[2].self_attn.register_forward_hook(hf_paged.row_wise(scale))
    with pytest.raises(hf_paged.UnsupportedModelError, match=r"first layer that differs is model\.layers\.2"):
        hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=8))


def test_a_processor_sees_the_whole_history(model):
    seen: list[list[int]] = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores

    with make_engine(model) as engine:
        output = engine.submit(prompt(9), generation_config=config(4), logits_processor=[Keep()]).result()
    whole = prompt(9) + output.token_ids
    assert seen == [whole[:n] for n in range(9, 13)]


# Attention on a CPU


def test_cpu_attention_gathers_few_pages_for_short_rows_beside_long_ones():
    page_size = 8
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.permutation([*rng.integers(1, 40, 40), *rng.integers(400, 2000, rng.integers(0, 4))])
        table = torch.zeros(len(lengths), 250, dtype=torch.int32)
        bounds, seq_lens = torch.arange(len(lengths) + 1).int(), torch.from_numpy(lengths).int()
        groups = plan_groups(table, seq_lens, bounds, page_size, None)
        assert sorted(torch.cat([group.queries.flatten() for group in groups]).tolist()) == [*range(len(lengths))]
        used = -(-seq_lens // page_size)
        for group in groups:
            rows = group.queries.flatten()
            assert len(group.pages) == len(rows) * int(used[rows].max())
            assert len(group.pages) <= 2 * int(used[rows].sum()) + 16
    table, equal = torch.zeros(32, 250, dtype=torch.int32), torch.full((32,), 700, dtype=torch.int32)
    assert len(plan_groups(table, equal, torch.arange(33).int(), page_size, None)) == 2


@pytest.mark.parametrize("left", [None, 0, 6, 40], ids=lambda left: f"left{left}")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads4-4", "heads6-2"])
def test_cpu_attention_agrees_with_the_reference(left, heads):
    num_q_heads, num_kv_heads = heads
    page_size, dim = 8, 16
    pages = LayerPages(torch.empty(1, num_kv_heads, 1, dim), torch.empty(1, num_kv_heads, 1, 12), page_size, None)
    pages.grow(80)
    pages.k.normal_()
    pages.v.normal_()
    counts = [1, 1, 5, 1, 17, 3, *[1] * 20]
    lengths = [1, 30, 5, 64, 50, 63, *range(1, 60, 3)]
    width = 8
    table = torch.randint(0, 80, (len(counts), width), dtype=torch.int32)
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    query = torch.randn(sum(counts), num_q_heads, dim)
    groups = plan_groups(table, seq_lens, bounds, page_size, left)
    got = attend_groups(query, pages, groups, 0.25)
    expected, _ = paged_attention_op(
        query, pages.k, pages.v, table, seq_lens, bounds, max(counts), left, 0, None, None, 0.25, None, None
    )
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
