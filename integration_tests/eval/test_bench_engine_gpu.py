"""The engine's GPU benchmark on tiny models: every part runs, the report says what was measured, cut and left out."""

import json
import shutil
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_paged
from eval import bench_engine, bench_engine_peers
from eval.engine_bench import arrivals as sweep
from eval.engine_bench import busy as bench_engine_busy
from eval.engine_bench import gpu as bench_engine_gpu
from eval.engine_bench import plots as bench_engine_plots
from eval.engine_bench.gpu import PARTS, SWITCHES, Plan, unavailable_reason
from eval.engine_bench.models import TINY as TINY_SHAPE
from eval.engine_bench.models import build
from eval.engine_bench.parts import TINY, config, make_engine
from eval.engine_bench.report import markdown

HAS_GPU = torch.cuda.is_available()
VARIANTS = [name for name in SWITCHES if name != "compiled"]
"""Compiling takes its time, and has tests of its own."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All parts and peers on one family, as written to the file."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    argv = ["--gpu", "--tiny", "--models", "mistral-7b", "--output", str(path), "--variants", *VARIANTS]
    bench_engine.main(argv)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(found)
    return found


def test_every_part_has_figures(report):
    entry = report["models"]["mistral-7b"]
    for part in PARTS:
        found = entry[part] if part == "equality" else entry["graphs"][part]
        if part == "busy" and not HAS_GPU:
            assert "needs a CUDA GPU" in found["error"]
        else:
            assert "error" not in found, (part, found)
            assert not found["cut"], part
    tokens = sum(bench_engine_gpu.draw_requests(TINY.num_requests, TINY.lengths, TINY.tokens)[1])
    assert entry["graphs"]["throughput"]["new_tokens"] == tokens


def test_the_switches_that_the_engine_has_are_measured(report):
    entry = report["models"]["mistral-7b"]
    assert [name for name in SWITCHES if name in entry] == VARIANTS
    for name in VARIANTS:
        reason = unavailable_reason(SWITCHES[name])
        if reason is None:
            assert entry[name]["throughput"]["tokens_per_s"] > 0
        else:
            assert entry[name] == {"failure": reason}
    assert entry[VARIANTS[0]]["again"]["ready_s"] > 0, "a second engine is started"
    assert all("again" not in entry[name] for name in VARIANTS[1:])
    assert "no option nonsense" in str(unavailable_reason({"nonsense": 1}))


def test_peers_serve_the_same_requests(report):
    peers = report["models"]["mistral-7b"]["peers"]
    assert {"generate_batch, paged_flash", "generate_batch, sdpa", "generate(), padded"} <= peers.keys()
    new = report["models"]["mistral-7b"]["graphs"]["throughput"]["new_tokens"]
    for name, result in peers.items():
        assert result.get("new_tokens") == new, (name, result)


def test_float32_tokens_are_the_same_with_everything_on_and_off(report):
    part = report["models"]["mistral-7b"]["equality"]
    found = part["variants"]["graphs"]
    assert found["float32_same"] == part["requests"]
    half = found["bfloat16"]
    # Both differ by roundings of bfloat16, far from a wrong token's several units.
    assert half["engine_to_eager_bfloat16"]["max"] < 4 * half["eager_bfloat16_to_eager_float32"]["max"] < 2


def test_shared_prompts_are_computed_once_for_samples_of_one_request(report):
    one, _, apart = report["models"]["mistral-7b"]["graphs"]["shared_prefix"]["ways"]
    assert apart["prompt_tokens"] == TINY.samples * one["prompt_tokens"]
    assert one["new_tokens"] == apart["new_tokens"] == TINY.shared_prompts * TINY.samples * TINY.shared_new


def test_the_report_shows_failures_and_cuts(report):
    changed = json.loads(json.dumps(report))
    entry = changed["models"]["mistral-7b"]
    entry["graphs"]["latency"] = {"error": "RuntimeError: a | b\nc"}
    entry["graphs"]["throughput"]["cut"] = True
    entry["peers"]["generate(), padded"] |= {"cut": True, "limit_s": 100.0}
    text = markdown(changed)
    assert "failed: RuntimeError: a / b c" in text
    speed = f"{entry['graphs']['throughput']['tokens_per_s']:,.0f} (cut)"
    assert f"| mistral-7b | hf_paged, all on | {speed} |" in text
    assert "| mistral-7b | generate(), padded | over 100 s (" in text
    columns = [line.count("|") for line in text.split("## Decode and start")[1].splitlines() if line.startswith("|")]
    assert len(set(columns[: 2 + len(VARIANTS)])) == 1


def test_plots_are_drawn_from_the_json(report, tmp_path):
    pytest.importorskip("matplotlib")
    source, target = tmp_path / "report.json", tmp_path / "plot.png"
    source.write_text(json.dumps(report), encoding="utf-8")
    bench_engine.main(["--plots", str(source), "--output", str(target)])
    assert target.read_bytes().startswith(b"\x89PNG")
    assert bench_engine_plots.bars_of(report["models"]["mistral-7b"])[0][0] == "hf_paged, all on"


def test_a_part_that_raises_leaves_the_others(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no")

    monkeypatch.setitem(bench_engine_gpu.ON_ENGINE, "latency", broken)
    plan = Plan(("qwen3-0.6b",), ("latency", "steady"), variants=("graphs",), is_tiny=True, sizes=TINY)
    found = bench_engine_gpu.run(tmp_path / "r.json", plan)["models"]["qwen3-0.6b"]["graphs"]
    assert found["latency"]["error"] == "ValueError: no"
    assert found["steady"]["step_ms"] > 0


def test_a_run_is_added_to_a_report(tmp_path):
    path = tmp_path / "r.json"
    first = Plan(("qwen3-0.6b",), ("latency",), variants=("graphs",), is_tiny=True, sizes=TINY)
    second = Plan(("qwen3-0.6b", "llama3-8b"), ("steady",), variants=("graphs",), is_tiny=True, sizes=TINY)
    before = bench_engine_gpu.run(path, first, "one")["models"]["qwen3-0.6b"]["graphs"]["latency"]
    report = bench_engine_gpu.run(path, second, "two", is_added=True)
    both = report["models"]["qwen3-0.6b"]["graphs"]
    assert both["latency"] == before
    assert both["steady"]["step_ms"] > 0
    assert report["models"]["llama3-8b"]["graphs"].keys() & {"latency", "steady"} == {"steady"}
    assert "Command: `one`, `two`." in markdown(report)
    assert list(bench_engine_gpu.run(path, first)["models"]) == ["qwen3-0.6b"]


def test_a_limit_cuts_a_part(tmp_path):
    plan = Plan(
        ("qwen3-0.6b",), ("throughput", "arrivals"), variants=("graphs",), is_tiny=True, sizes=TINY,
        limits_s={"throughput": 0.0, "arrivals": 0.0},
    )  # fmt: skip
    found = bench_engine_gpu.run(tmp_path / "r.json", plan)["models"]["qwen3-0.6b"]["graphs"]
    assert found["throughput"]["cut"]
    assert found["arrivals"]["cut"]
    assert found["arrivals"]["rates"] == []


def test_limits_are_of_parts():
    parsed = ["--gpu", "--tiny", "--limits", "nonsense=3"]
    with pytest.raises(SystemExit):
        bench_engine.main(parsed)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_only_tiny_models_run():
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        bench_engine.main(["--gpu"])


# Times between tokens


def engine_of(**arrays: list[int]) -> SimpleNamespace:
    slots = SimpleNamespace(num_slots=3, **{name: np.array(values) for name, values in arrays.items()})
    return SimpleNamespace(core=SimpleNamespace(slots=slots))


def test_gaps_belong_to_one_row_at_a_time():
    engine = engine_of(length=[0, 0, 0], generation=[0, 0, 0], prompt_length=[0, 0, 0])
    slots = engine.core.slots
    times = sweep.TokenTimes(engine)

    def at(now, length, prompt, generation):
        slots.length[:], slots.prompt_length[:], slots.generation[:] = length, prompt, generation
        times.read(now)

    at(1.0, [4, 0, 0], [4, 0, 0], [0, 0, 0])  # slot 0: a prompt of 4
    at(2.0, [5, 7, 0], [4, 7, 0], [0, 0, 0])  # its first token; slot 1: a prompt of 7
    at(3.5, [6, 7, 0], [4, 7, 0], [0, 0, 0])  # 1.5 after its first
    at(4.0, [6, 8, 0], [4, 7, 0], [0, 0, 0])  # the first token of slot 1
    at(6.0, [3, 9, 0], [3, 7, 0], [1, 0, 0])  # slot 0 has another row; slot 1: 2.0
    at(7.0, [4, 9, 0], [3, 7, 0], [1, 0, 0])  # the first token of the new row
    at(7.25, [5, 10, 0], [3, 7, 0], [1, 0, 0])  # 0.25 and 1.25
    assert np.concatenate(times.gaps).tolist() == [1.5, 2.0, 0.25, 1.25]
    assert times.since(5.0).tolist() == [2.0, 0.25, 1.25]
    assert sweep.percentiles(times.since(100.0)) is None
    assert sweep.percentiles(np.array([0.001, 0.002, 0.003]))["p50"] == pytest.approx(2.0)


def test_every_token_but_the_first_has_a_gap():
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, "cuda" if HAS_GPU else "cpu")
    with make_engine(model, sizes=TINY) as engine:
        times = sweep.TokenTimes(engine)
        new = [3, 9, 5, 7, 4, 8, 6, 3, 2, 9]  # more requests than slots
        handles = [engine.submit([1, 2, 3 + i], generation_config=config(n)) for i, n in enumerate(new)]
        now = 0.0
        while engine.step():
            now += 1.0
            times.read(now)
        assert [len(handle.result().token_ids) for handle in handles] == new
    gaps = np.concatenate(times.gaps)
    # A row's last token leaves with its slot: the gap before it is not seen.
    assert len(gaps) == sum(n - 2 for n in new)
    assert (gaps == 1.0).all()


# Busy shares


def test_shares_count_overlapping_kernels_once():
    events = [("a", 0.0, 10.0), ("b", 5.0, 8.0), ("a", 12.0, 20.0), ("c", 120.0, 140.0)]
    found = bench_engine_busy.summarize(events)
    assert found["wall_ms"] == pytest.approx(0.14)
    assert found["kernels"] == pytest.approx(38 / 140)
    # The gap of 2 us is dispatch, the one of 100 us is not.
    assert found["queued"] == pytest.approx(40 / 140)
    assert found["kernel_ms"] == pytest.approx(0.038)
    assert [gap["us"] for gap in found["largest_gaps"]] == [100.0, 2.0]
    assert found["largest_gaps"][0]["before"] == "c"
    assert [(k["name"], k["count"], k["mean_us"]) for k in found["top_kernels"]] == [
        ("c", 1, 20.0), ("a", 2, 9.0), ("b", 1, 0.0),
    ]  # fmt: skip


def test_the_start_of_a_profile_is_left_out():
    found = bench_engine_busy.summarize([("a", 0.0, 1.0), ("b", 50.0, 60.0), ("c", 60.0, 65.0)], skip_us=10.0)
    assert found["kernels"] == 1.0
    assert found["wall_ms"] == pytest.approx(0.015)
    with pytest.raises(RuntimeError, match="saw nothing"):
        bench_engine_busy.summarize([])


def test_busy_compares_profiled_kernels_with_steps_that_were_not_profiled(monkeypatch):
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, "cuda" if HAS_GPU else "cpu")
    count = TINY.profile_steps
    # Far apart: the first steps' are left out, however slow the machine.
    events = [("k", 1e8 * i, 1e8 * i + 500.0) for i in range(count)]

    class Profiled:
        def __enter__(self):
            self.events = events
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench_engine_busy, "profiled", Profiled)
    with make_engine(model, sizes=TINY) as engine:
        found = bench_engine_busy.busy(engine, TINY, 30.0)
        assert engine.stats().running == 0
    assert found["kernel_ms"] == pytest.approx(0.5)
    assert found["busy"] == pytest.approx(0.5 / found["step_ms"])
    assert not found["cut"]


def test_events_of_the_device_are_told_from_the_hosts():
    def event(category, start, name="k"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": 2}

    trace = {"traceEvents": [event("gpu_memcpy", 9.0), event("cpu_op", 1.0), event("kernel", 4.0), {"ph": "M"}]}
    assert bench_engine_busy.read_events(trace) == [("k", 4.0, 6.0), ("k", 9.0, 11.0)]


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_seen():
    with bench_engine_busy.profiled() as found:
        for _ in range(3):
            torch.ones(1000, device="cuda").sum()
    assert bench_engine_busy.summarize(found.events)["num_events"] >= 6


# Peers


def test_what_a_peer_raises_is_its_result(monkeypatch):
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, "cpu")

    def broken(*_):
        model.set_attn_implementation("eager")
        raise RuntimeError("gone")

    monkeypatch.setattr(bench_engine_peers, "available", lambda: {"peer": broken})
    assert bench_engine_peers.run_peer("peer", model, TINY, 1.0) == {"error": "RuntimeError: gone"}
    assert model.config._attn_implementation == "sdpa", "the model gets its attention back"


def test_a_peer_over_its_limit_is_cut():
    device = "cuda" if HAS_GPU else "cpu"
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, device)
    padded = bench_engine_peers.run_peer("generate(), padded", model, TINY, 1e-9)
    assert padded["cut"]
    assert padded["steps"] == 1
    assert padded["new_tokens"] == TINY.num_requests
    batching = bench_engine_peers.run_peer("generate_batch, sdpa", model, TINY, 0.0)
    assert batching["cut"]
    assert batching["finished"] == 0


def test_the_process_of_vllm_gets_every_request(tmp_path, monkeypatch):
    """With a stand-in for vLLM that has the names and arguments that are used of it."""
    (tmp_path / "vllm.py").write_text(
        textwrap.dedent(
            """
            import json, pathlib
            from types import SimpleNamespace as Space

            class SamplingParams:
                def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
                    assert temperature == 0 and ignore_eos and not detokenize
                    self.max_tokens = max_tokens

            class LLM:
                def __init__(self, *, model, load_format, skip_tokenizer_init, dtype, max_model_len,
                             gpu_memory_utilization, enable_prefix_caching):
                    assert load_format == "dummy" and skip_tokenizer_init and not enable_prefix_caching
                    assert 0 < gpu_memory_utilization < 1 and dtype == "float32"
                    assert json.loads((pathlib.Path(model) / "config.json").read_text())["model_type"] == "qwen3"
                    self.room = max_model_len

                def generate(self, inputs, how, use_tqdm):
                    assert all(len(i["prompt_token_ids"]) + h.max_tokens <= self.room for i, h in zip(inputs, how))
                    return [Space(outputs=[Space(token_ids=[0] * h.max_tokens)]) for h in how]
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, "cpu")
    requests = ([[1, 2, 3], [4, 5]], [7, 9])
    result = bench_engine_peers.run_vllm(model, requests, 60.0)
    assert result["new_tokens"] == 16
    assert not result["cut"]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="vLLM ended with 1"):
        bench_engine_peers.run_vllm(model, requests, 60.0)


def test_the_engine_gives_the_attention_back():
    model = build("qwen3-0.6b", TINY_SHAPE, torch.float32, "cpu")
    with make_engine(model, sizes=TINY) as engine:
        assert isinstance(engine, hf_paged.Engine)
    assert model.config._attn_implementation == "sdpa"
