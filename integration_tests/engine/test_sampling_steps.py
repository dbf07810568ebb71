"""Sampled rows in captured decode steps: next to greedy ones, one step ahead, the same tokens as without capture."""


import numpy as np
import pytest
import torch
from explicit_models import tiny_model as tiny_model_without_eos
from hf_paged_kernels.sampling.reference import sample_tokens_reference
from random_requests import tiny_model
from small_engines import config, prompt, run_again
from small_engines import make_engine as captured_engine

import hf_paged
from hf_paged.engine.execution import chunk_graphs
from hf_paged.engine.execution.decode_graphs import CudaCapture
from hf_paged.engine.sampling import slot_sampling
from hf_paged.engine.sampling.request_params import RequestParams
from hf_paged.engine.sampling.slot_sampling import SlotSampling
from hf_paged.engine.scheduling.step import ScheduledStep

MIX = [
    dict(),
    dict(do_sample=True, top_k=0),
    dict(do_sample=True, top_p=0.8, temperature=1.3),
    dict(do_sample=True, top_k=7),
    dict(do_sample=True, top_k=0, top_p=0.95, temperature=0.8),
    dict(do_sample=True, top_k=0, min_p=0.1, temperature=2.0),
    dict(),
]
CHANGED = [
    dict(repetition_penalty=1.5, suppress_tokens=[7, 8, 9], sequence_bias=[[[11], 1.5]]),
    dict(do_sample=True, top_p=0.9, repetition_penalty=1.2, min_new_tokens=5, eos_token_id=[3, 4, 5, 6]),
]


def submit_mix(engine: hf_paged.Engine, new: int, logprobs: int | None = None) -> list:
    return [
        engine.submit(prompt(4 + 5 * i, i), generation_config=config(new + i, **options), seed=i, logprobs=logprobs)
        for i, options in enumerate([*MIX, *CHANGED])
    ]


def make_engine(model, *, captured: bool) -> hf_paged.Engine:
    options = dict(num_pages=64, page_size=8, max_num_seqs=4, max_batch_tokens=32, self_check=False)
    if captured:
        return captured_engine(model, **options)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**options), background=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("logprobs", [None, 2])
def test_mixed_rows_give_the_tokens_of_steps_without_capture(model, logprobs):
    """More requests than slots, so that slots change between greedy and sampled rows."""
    with make_engine(model, captured=False) as engine:
        expected = [handle.result() for handle in submit_mix(engine, 9, logprobs)]
    with make_engine(model, captured=True) as engine:
        outputs = [handle.result() for handle in submit_mix(engine, 9, logprobs)]
        engine.check()
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    if logprobs is not None:
        for output, other in zip(outputs, expected):
            assert [entry.token_id for entry in output.logprobs] == output.token_ids
            assert [entry.top_ids for entry in output.logprobs] == [entry.top_ids for entry in other.logprobs]
            got, want = ([e.logprob for e in x.logprobs] for x in (output, other))
            assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(logprobs=3)], ids=str)
@pytest.mark.parametrize("changes", [dict(), dict(repetition_penalty=1.2, suppress_tokens=[5])], ids=str)
def test_sampled_steps_are_launched_ahead(model, options, changes):
    with make_engine(model, captured=True) as engine:
        generation = config(10, do_sample=True, top_p=0.9, **changes)
        handle = engine.submit(prompt(9), generation_config=generation, seed=3, **options)
        core, order = engine._core, []
        run, collect = core.run, core.collect
        core.run = lambda work: (order.append("run"), run(work))[1]
        core.collect = lambda launched: (order.append("collect"), collect(launched))[1]
        while engine.step():
            engine.check()
        assert order == ["run"] + ["run", "collect"] * 9 + ["collect"]
        assert len(handle.result().token_ids) == 10


def test_the_tokens_of_captured_steps_are_taken_as_they_are(model, monkeypatch):
    """Rows whose parameters the device has are not chosen again."""
    with make_engine(model, captured=True) as engine:
        handles = submit_mix(engine, 12)[:3]
        for _ in range(6):
            engine.step()
        monkeypatch.setattr(engine._core.selector, "select", None)
        engine.step()
        monkeypatch.undo()
        assert all(handle.result().finish_reason == "length" for handle in handles)


def arrivals(model, *, captured: bool, watch=None) -> list:
    """Requests of every kind that come while others decode: outputs in order."""
    kinds = [
        *MIX,
        *CHANGED,
        dict(repetition_penalty=1.4, no_repeat_ngram_size=2),
        dict(do_sample=True, top_p=0.9, repetition_penalty=1.3, num_return_sequences=2),
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=3),
    ]
    options = dict(num_pages=128, page_size=8, max_num_seqs=6, max_batch_tokens=24, self_check=False)
    with hf_paged.Engine(model, hf_paged.EngineConfig(**options), background=False) as engine:
        if captured:
            assert engine._core.use_graphs(run_again) is None
            engine._core.runs_ahead = True
        if watch is not None:
            watch(engine._core)
        handles = []
        for i, kind in enumerate(kinds * 2):
            logprobs = 2 if i % 3 == 0 and "num_beams" not in kind and "prompt_lookup_num_tokens" not in kind else None
            generation = config(8 + i % 5, **kind)
            handles.append(
                engine.submit(prompt(3 + 7 * i % 40, i), generation_config=generation, seed=i, logprobs=logprobs)
            )
            engine.step()
            engine.step()
        outputs = [handle.result() for handle in handles]
        engine.check()
    return outputs


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks captured", "chunks eager"])
def test_prompts_beside_decode_rows(model, monkeypatch, chunks):
    """Tokens and log-probabilities are those of steps without capture, and most rows are not chosen a second time."""
    monkeypatch.setattr(chunk_graphs, "USES_BEFORE_CAPTURE", 0 if chunks else 10**9)
    expected = arrivals(model, captured=False)
    counts = {"rows": 0, "chosen again": 0, "mixed": 0}

    def watch(core):
        launch, select = core.launch, core.selector.select

        def launch_counted(work, result, pending):
            launched = launch(work, result, pending)
            counts["rows"] += len(launched.slots)
            counts["mixed"] += 0 < work.num_decode < len(work.slots)
            return launched

        def select_counted(logits, slots, *rest):
            assert len(logits) == len(slots)
            counts["chosen again"] += len(slots)
            return select(logits, slots, *rest)

        core.launch, core.selector.select = launch_counted, select_counted

    outputs = arrivals(model, captured=True, watch=watch)
    for output, other in zip(outputs, expected):
        assert [row.token_ids for row in output.sequences] == [row.token_ids for row in other.sequences]
        for entry, wanted in zip(output.logprobs or [], other.logprobs or []):
            assert (entry.token_id, entry.top_ids) == (wanted.token_id, wanted.top_ids)
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert (output.logprobs is None) == (other.logprobs is None)
    assert counts["mixed"] > 10
    assert counts["chosen again"] < counts["rows"] / (2.5 if chunks else 1.5)


def test_what_was_seen_survives_a_preemption(model):
    """Few pages: requests with penalties are computed again, with the tokens they had chosen, in slots of others."""
    generation = [
        config(24 + 3 * i, **CHANGED[1] | dict(repetition_penalty=1.5 + i, do_sample=i % 2 > 0, min_new_tokens=24))
        for i in range(5)
    ]
    preempted = []

    def run(captured: bool, num_pages: int) -> list[list[int]]:
        options = dict(num_pages=num_pages, page_size=8, max_num_seqs=4, max_batch_tokens=32, self_check=False)
        with hf_paged.Engine(model, hf_paged.EngineConfig(**options), background=False) as engine:
            if captured:
                assert engine._core.use_graphs(run_again) is None
                engine._core.runs_ahead = True
            handles = [
                engine.submit(prompt(5 + i, i), generation_config=one, seed=i) for i, one in enumerate(generation)
            ]
            outputs = [handle.result() for handle in handles]
            engine.check()
        preempted.append(sum(output.timing.preemptions for output in outputs))
        return [output.token_ids for output in outputs]

    expected = run(False, 200)
    assert run(True, 12) == expected
    assert preempted[0] == 0
    assert preempted[1] > 0


def test_a_chunk_notes_the_tokens_of_its_choosers_alone(model):
    """A slot whose prompt goes on, or whose row needs the host, keeps its last token and length."""
    with make_engine(model, captured=True) as engine:
        core = engine._core
        tables, graphs = core.tables, core.runner.chunk_graphs
        for slot in range(3):
            core.slots.history[slot, :9] = prompt(9, slot)
            core.slots.length[slot] = 9
            core.pages.extend(slot, 9)
        tables.last_token.fill_(77)
        tables.computed[:-1] = 55
        work = ScheduledStep(np.arange(3), np.array([9, 4, 9]), 0, np.array([True, False, True]))
        chosen = None
        for _ in range(chunk_graphs.USES_BEFORE_CAPTURE + 1):
            chosen = graphs.run(work, np.array([True, False, False]))
        logits, tokens, _ = chosen
        assert tables.last_token[:4].tolist() == [int(logits[0].argmax()), 77, 77, 77]
        assert int(tokens[0]) == int(logits[0].argmax())
        assert tables.computed.tolist() == [9, 55, 55, 55, -1]


def sampling_of_mix(model, device: torch.device, num_slots: int, kinds: list[dict], vocab: int) -> SlotSampling:
    slots = SlotSampling(num_slots, device, vocab)
    for slot in range(num_slots):
        options = kinds[slot % len(kinds)]
        slots.set(slot, RequestParams.make(model, config(5, **options), prompt_ids=[5], seed=slot), 0, np.array([5]))
    return slots


def test_parameters_of_slots():
    """Every slot has its own; the slot behind the last one is greedy; a slot can be set again."""
    model = tiny_model_without_eos("llama", "eager", num_hidden_layers=1)
    slots = sampling_of_mix(model, torch.device("cpu"), 7, MIX, 50)
    logits = torch.randn(1, 50).expand(8, -1)
    index, positions = np.arange(8), np.full(8, 3)
    first = slots.choose(logits, index, positions)
    assert first[[0, 6, 7]].tolist() == [int(logits[0].argmax())] * 3
    alone = [slots.choose(logits[:1], index[i : i + 1], positions[:1]).item() for i in range(8)]
    assert first.tolist() == alone
    slots.set(2, RequestParams.make(model, config(5), prompt_ids=[5]), 0, np.array([5]))
    assert slots.choose(logits[:1], np.array([2]), positions[:1]).item() == int(logits[0].argmax())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 151_936), (37, 128_256), (256, 32_000)])
def test_a_captured_choice_follows_slots_and_tables(dtype, num_rows, vocab):
    model = tiny_model_without_eos("llama", "eager", num_hidden_layers=1).cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    kinds = [*MIX, *CHANGED]
    table = sampling_of_mix(model, device, 256, kinds, vocab)
    logits, positions = torch.empty(num_rows, vocab, dtype=dtype, device=device), torch.arange(num_rows, device=device)
    index = torch.zeros(num_rows, dtype=torch.int64, device=device)
    table.sync()
    replay = CudaCapture()(lambda slots: table.choose_static(logits, slots, positions), index)
    for round_ in range(4):
        logits.normal_(std=(0.6, 3.0)[round_ % 2])
        index.copy_(torch.randperm(256)[:num_rows])
        positions += 1
        if round_ == 2:
            for slot in range(256):
                rules = RequestParams.make(model, config(5, **kinds[-1 - slot % len(kinds)]), prompt_ids=[5], seed=slot)
                table.set(slot, rules, 0, np.array([5]))
        table.sync()
        before = table.rules.clone()
        tokens, _ = replay()
        words = [words if i in (1, 4, 5) else words.view(torch.float64) for i, words in enumerate(table._device_words)]
        expected, _ = sample_tokens_reference(logits, index, positions, *words, before)
        # A token within rounding of a border may differ: hardly ever does one.
        same = tokens == expected
        assert (~same).sum() <= num_rows // 100
        assert torch.equal(table.rules[index[same]], before[index[same]]), "tokens that were chosen are marked"
        assert (table.rules != 0).any()


@pytest.mark.gpu
def test_an_engine_with_graphs_gives_the_tokens_of_the_reference(monkeypatch):
    model = tiny_model("llama").cuda()
    options = dict(num_pages=256, page_size=16, max_num_seqs=8, self_check=False)
    calls = []

    def reference(*arguments):
        calls.append(len(arguments[1]))
        return sample_tokens_reference(*arguments)

    with hf_paged.Engine(model, hf_paged.EngineConfig(**options), background=False) as engine:
        outputs = [handle.result() for handle in submit_mix(engine, 30)]
        assert engine._core.runner.graphs.failure is None
    monkeypatch.setattr(slot_sampling, "sample_tokens_op", reference)
    eager = hf_paged.EngineConfig(**options, cuda_graphs=False)
    with hf_paged.Engine(model, eager, background=False) as engine:
        expected = [handle.result() for handle in submit_mix(engine, 30)]
    assert calls
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
