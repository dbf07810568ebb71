"""The report: a sound model passes, every deliberate fault is caught by the verdict, the files are written."""

import dataclasses
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from eval import report, report_figure
from eval.quality import forecast
from eval.quality.distances import QualityRow, Reference, Settings, measure
from eval.quality.induction_model import induction_model
from eval.quality.kv_quantisation import kv_table
from eval.quality.retrieval import INDUCTION_PATHS, Grid, induction_grid, passkey_grid, passkey_prompt
from eval.quality.scoring import QUANTISED_PATHS
from eval.quality.verdict import judge, limits_of
from hf_paged.attention import interface

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PAGE = 16


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(*more: str) -> list[str]:
    return [
        "--model", str(ASSETS / "small_model"), "--data", str(ASSETS / "heldout.txt"), "--max-tokens", "200",
        "--window", "100", "--stride", "50", "--dtype", "float32", "--device", "cpu", "--batch-size", "4", "--chunk",
        "30", "--attn", "paged_flash", "--kv-dtype", "auto", "--depths", "0", "1", "--cache-tokens", "0", *more,
    ]  # fmt: skip


def fails(capsys, *more: str) -> str:
    """Run the report, which must fail; returns its verdict line."""
    assert report.main(arguments(*more)) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "VERDICT" in line)
    assert line.startswith("**VERDICT: FAIL")
    return line


# ---- a sound model


def test_the_report_of_a_sound_model_passes_and_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = report.main(arguments("--attn", "eager", "paged_flash", "--kv-dtype", "auto", "int8", "--cache-tokens",
                                   "200", "--induction-lengths", "130", "257", "--output", str(tmp_path)))  # fmt: skip
    assert status == 0
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in written["runs"]}
    assert {"eager decode", "paged_flash engine", "paged_flash decode int8", "paged_flash padded_prefill"} <= set(runs)
    assert "eager engine" not in runs
    for run in runs.values():
        assert run["ppl_low"] < run["ppl"] < run["ppl_high"]
        assert run["top1_agreement"] > 0.98
        if run["kv_dtype"] == "auto":
            assert abs(run["delta_ppl"]) < 1e-4
            assert run["max_abs_diff"] < 1e-4
            assert run["kl_mean"] is None if run["path"] == "engine" else run["kl_mean"] < 1e-6
    assert runs["eager prefill"]["max_abs_diff"] == 0
    grids = {grid["name"]: grid for grid in written["induction"]}
    assert set(grids) == {
        *(f"induction model, {path}, auto pages" for path in INDUCTION_PATHS),
        *(f"induction model, {path}, int8 pages" for path in QUANTISED_PATHS),
    }
    assert all(grid["scores"] == [[1.0, 1.0], [1.0, 1.0]] for grid in grids.values())
    held = {name: grid["cache_bytes"] for name, grid in grids.items()}
    assert held["induction model, prefill, auto pages"] is None
    assert 0 < held["induction model, decode, int8 pages"][1] < held["induction model, decode, auto pages"][1] / 3
    caches = {row["cache"]: row for row in written["caches"]}
    assert caches["PagedCache auto"]["bits"] >= 32 > 16 > caches["PagedCache int8"]["bits"]
    assert caches["PagedCache int8"]["max_abs_diff"] > 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.splitlines()[2].startswith("**VERDICT: PASS, ")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "report.png").unlink()
    report_figure.main([str(tmp_path)])
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    heat_maps = [axes.images[0].get_array().tolist() for axes in report_figure.figure_of(written).axes if axes.images]
    assert heat_maps == [grid["scores"] for grid in written["induction"]]
    assert capsys.readouterr().out.rstrip() == text.rstrip()


def interrupted_at(monkeypatch, error: BaseException, *more: str) -> int:
    """Run the report; the second of its runs ends with `error`."""
    measure = report.measure
    names = []

    def measure_or_stop(model, reference, ids, settings, run):
        names.append(run)
        if len(names) == 2:
            raise error
        return measure(model, reference, ids, settings, run)

    monkeypatch.setattr(report, "measure", measure_or_stop)
    return report.main(arguments("--path", "prefill", "decode", "--induction-lengths", *more))


def test_an_interrupted_report_keeps_and_prints_what_is_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "report.json").write_text("an earlier report")
    assert interrupted_at(monkeypatch, KeyboardInterrupt(), "--output", str(tmp_path)) == 130
    out, err = capsys.readouterr()
    assert "**PARTIAL: 1 of 3 parts are measured; of 2 checks so far 0 fail**" in out
    assert "VERDICT" not in out
    assert "| paged_flash | prefill |" in out
    assert "| paged_flash | decode |" not in out
    assert "report.png" not in out
    assert "this will take about" in err
    assert "report.partial.md" in err
    assert (tmp_path / "report.partial.md").read_text(encoding="utf-8").rstrip() == out.rstrip()
    written = json.loads((tmp_path / "report.partial.json").read_text(encoding="utf-8"))
    assert not written["complete"]
    assert not written["verdict"]["passed"]
    assert [run["path"] for run in written["runs"]] == ["prefill"]
    assert (tmp_path / "report.json").read_text() == "an earlier report"
    monkeypatch.undo()
    assert report.main(arguments("--path", "prefill", "--induction-lengths", "--output", str(tmp_path))) == 0
    assert not list(tmp_path.glob("report.partial*"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["complete"]


def test_a_report_that_breaks_off_keeps_what_is_measured(tmp_path, capsys, monkeypatch):
    with pytest.raises(RuntimeError, match="out of memory"):
        interrupted_at(monkeypatch, RuntimeError("out of memory"), "--output", str(tmp_path))
    assert "report.partial.md and .json" in capsys.readouterr().err
    assert "| paged_flash | prefill |" in (tmp_path / "report.partial.md").read_text(encoding="utf-8")


def test_the_forecast_counts_the_parts_that_run(monkeypatch):
    """With a clock that ticks once a forward the forecast is the number of forwards that the runs need."""
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.float32)
    ids, settings = list(range(5, 205)), Settings(100, 50, chunk=30, batch_size=4)
    forward = model.forward
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    model.forward = counted
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: float(calls))
    counted.__signature__ = inspect.signature(forward)
    reference = Reference(model, ids, settings)
    for attn, path in (("eager", "prefill"), ("sdpa", "decode"), ("paged_flash", "padded_prefill")):
        seconds = forecast.run_seconds(model, ids, settings, (attn, path, "auto"))
        before = calls
        measure(model, reference, ids, settings, (attn, path, "auto"))
        assert seconds == calls - before, path


def test_without_matplotlib_all_but_the_picture_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main(arguments("--path", "prefill", "--induction-lengths", "--output", str(tmp_path))) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    said = capsys.readouterr().err
    assert 'pip install "hf-paged[eval]"' in said
    assert f"then python -m eval.report_figure {tmp_path}" in said


def test_a_folder_without_a_report_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no report\.json; make it with python -m eval\.report"):
        report_figure.main([str(tmp_path)])


def test_bfloat16_is_held_to_the_noise_of_eager_attention(capsys):
    assert report.main(arguments("--attn", "eager", "paged_flash", "--path", "prefill", "decode", "engine", "--dtype",
                                 "bfloat16", "--induction-lengths")) == 0  # fmt: skip


def test_max_delta_ppl_is_the_limit_of_every_run(capsys):
    line = fails(capsys, "--path", "decode", "--kv-dtype", "fp8", "--induction-lengths", "--max-delta-ppl", "1e-7")
    assert "paged_flash decode fp8: perplexity differs by" in line
    assert "limit 1e-07" in line


# ---- deliberate faults


def drop_one_page(paged_attention):
    """The second page of every sequence is missing from its table."""

    def faulty(query, k, v, page_table, seq_lens, *rest):
        has_three = seq_lens >= 3 * PAGE
        table = page_table.clone()
        table[has_three, 1:-1] = page_table[has_three, 2:]
        return paged_attention(query, k, v, table, torch.where(has_three, seq_lens - PAGE, seq_lens), *rest)

    return faulty


def skip_the_last_tile(paged_attention):
    """Keys behind the last full tile of 16 are left out, where a query can do without."""

    def faulty(query, k, v, page_table, seq_lens, cu_seqlens_q, max_query_len, *rest):
        if max_query_len == 1:
            seq_lens = torch.where(seq_lens > PAGE, seq_lens // PAGE * PAGE, seq_lens)
        return paged_attention(query, k, v, page_table, seq_lens, cu_seqlens_q, max_query_len, *rest)

    return faulty


@pytest.mark.parametrize("fault", [drop_one_page, skip_the_last_tile], ids=lambda fault: fault.__name__)
def test_faults_of_the_kernel_are_caught(monkeypatch, capsys, fault):
    monkeypatch.setattr(interface, "paged_attention_op", fault(interface.paged_attention_op))
    line = fails(capsys, "--path", "prefill", "decode", "--induction-lengths")
    assert "paged_flash decode: perplexity differs" in line
    assert "paged_flash prefill" not in line, "that path reads no pages"


def test_a_dropped_page_is_caught_by_retrieval_alone(monkeypatch, capsys):
    monkeypatch.setattr(interface, "paged_attention_op", drop_one_page(interface.paged_attention_op))
    line = fails(capsys, "--path", "prefill", "--induction-lengths", "600")
    assert "induction model, chunked_prefill, auto pages" in line
    assert "induction model, decode, auto pages" in line
    assert "prefill: perplexity" not in line


def test_a_shifted_position_is_caught(monkeypatch, capsys):
    """Keys and queries of single-token steps are turned as if they stood one position further on."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    forward = LlamaRotaryEmbedding.forward

    def shifted(self, x, position_ids, *args, **kwargs):
        return forward(self, x, position_ids + (position_ids.shape[1] == 1), *args, **kwargs)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", shifted)
    line = fails(capsys, "--path", "decode", "--induction-lengths")
    assert "paged_flash decode: perplexity differs" in line


def test_an_ignored_pad_mask_is_caught(request, capsys):
    attention = AttentionInterface()["paged_flash"]

    def blind(module, query, key, value, attention_mask, *args, **kwargs):
        padded = attention_mask is not None
        return attention(
            module, query, key, value, torch.ones_like(attention_mask) if padded else None, *args, **kwargs
        )

    AttentionInterface.register("paged_flash", blind)
    request.addfinalizer(lambda: AttentionInterface.register("paged_flash", attention))
    line = fails(capsys, "--path", "prefill", "padded_prefill", "--induction-lengths")
    assert "paged_flash padded_prefill: perplexity differs" in line
    assert "paged_flash prefill:" not in line


# ---- the verdict


ROW = QualityRow(
    attn="sdpa", path="decode", kv_dtype="auto", dtype="float32", ppl=10.0, ppl_low=9.0, ppl_high=11.0, delta_ppl=0.0,
    mean_diff=0.0, standard_error=None, mean_abs_diff=0.0, max_abs_diff=0.0, top1_agreement=1.0, kl_mean=None,
    kl_max=None, num_scored=10, kl_tokens=0, seconds=1.0,
)  # fmt: skip


def grid(*scores: float, name: str = "grid") -> Grid:
    return Grid(name, tuple(range(len(scores))), (0.0,), (scores,))


@pytest.mark.parametrize(
    ("rows", "grids", "passkey", "message"),
    [
        ([{"delta_ppl": -2e-4}], [], [], "perplexity differs by -2.00e-04, limit 0.0001"),
        ([{"delta_ppl": float("nan")}], [], [], "perplexity differs by"),
        ([{"max_abs_diff": 0.1}], [], [], "log-probability differs by 1.00e-01 nats, limit 0.002"),
        ([{}], [grid(1.0, 0.999)], [], "grid: 0.999 at worst, must be 1.000"),
        ([{}], [], [grid(1.0, 0.5), grid(0.5, 1.0, name="paged")], "paged: 1 cells below those of grid"),
    ],
)
def test_failures_are_said(rows, grids, passkey, message):
    verdict = judge([dataclasses.replace(ROW, **changes) for changes in rows], grids, passkey)
    assert not verdict.passed
    assert message in verdict.line


def test_limits_follow_weights_and_pages():
    half = dataclasses.replace(ROW, dtype="bfloat16")
    quantised = dataclasses.replace(ROW, kv_dtype="fp8")
    assert limits_of(ROW, []).delta_ppl < limits_of(half, []).delta_ppl < limits_of(quantised, []).delta_ppl
    assert judge([dataclasses.replace(half, delta_ppl=5e-3)], [grid(1.0)]).passed
    assert limits_of(half, [], 1e-3).delta_ppl == 1e-3


@pytest.mark.parametrize(
    ("difference", "kv_dtype", "passed"), [(0.014, "auto", True), (0.016, "auto", False), (0.1, "int8", True)]
)
def test_noise_is_what_eager_attention_of_the_dtype_has(difference, kv_dtype, passed):
    eager = dataclasses.replace(ROW, attn="eager", path="prefill", dtype="bfloat16", mean_abs_diff=0.01)
    row = dataclasses.replace(ROW, dtype="bfloat16", mean_abs_diff=difference, kv_dtype=kv_dtype)
    verdict = judge([eager, row], [])
    assert verdict.passed == passed
    if not passed:
        assert "differ by 1.60e-02 nats in the mean, limit 1.50e-02, 1.5 times what eager attention in" in verdict.line


# ---- quality


def test_the_divergence_by_hand():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.float32)
    ids = list(range(5, 45))
    settings = Settings(window=20, stride=10, batch_size=2)
    reference = Reference(model, ids, settings)
    with torch.no_grad():
        first = model(torch.tensor([ids[:20]])).logits[0, :-1].double().log_softmax(-1)
        model.lm_head.weight.mul_(1.1)
        second = model(torch.tensor([ids[:20]])).logits[0, :-1].double().log_softmax(-1)
    row = measure(model, reference, ids, settings, ("eager", "prefill", "auto"))
    divergence = (first.exp() * (first - second)).sum(-1)
    assert row.kl_tokens == row.num_scored == 39
    assert row.kl_max >= divergence.max().item() - 1e-5
    observed = []
    observe = reference.divergence(observed)
    observe(0, second.float())
    torch.testing.assert_close(torch.tensor(observed, dtype=torch.float64), divergence, rtol=1e-3, atol=1e-5)


def test_the_reference_is_in_float32():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype torch\.bfloat16; the reference is eager attention in float32"):
        Reference(model, [5, 6, 7], Settings(2, 1))


# ---- retrieval


@pytest.mark.parametrize(
    ("path", "kv_dtype"),
    [*((path, "auto") for path in INDUCTION_PATHS), *((path, "fp8") for path in QUANTISED_PATHS), ("decode", "int8")],
)
def test_the_induction_grid_is_all_ones(path, kv_dtype):
    found = induction_grid(induction_model(), [97, 700], [0.0, 0.5, 1.0], path=path, kv_dtype=kv_dtype)
    assert (found.worst, found.mean) == (1.0, 1.0)
    assert (len(found.scores), len(found.scores[0]), len(found.seconds)) == (3, 2, 2)


def test_passkey_prompts_have_their_length_and_depth():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small_model")
    for depth in (0.0, 0.5, 1.0):
        prompt = passkey_prompt(tokenizer, 400, depth, 12345)
        assert len(prompt) == 400
        place = tokenizer.decode(prompt).index("12345") / len(tokenizer.decode(prompt))
        assert abs(place - depth) < 0.25
    with pytest.raises(ValueError, match=r"length=10 \(--passkey-lengths\) must be at least"):
        passkey_prompt(tokenizer, 10, 0.5, 12345)


def test_the_passkey_grid_counts_answers():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small_model")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.float32)

    def generate(ids, **options):
        # A model that knows the answer to the first two questions.
        generate.calls += 1
        answer = tokenizer.decode(ids[0]).split("The pass key is ")[1].split(".")[0] if generate.calls < 3 else "?"
        return torch.cat([ids, tokenizer(answer, return_tensors="pt").input_ids], dim=1)

    generate.calls = 0
    model.generate = generate
    assert passkey_grid(model, tokenizer, [300], [0.5]).scores == ((2 / 3,),)


# ---- caches


def test_caches_that_are_not_installed_have_a_note():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.float32)
    names = ["DynamicCache", "QuantizedCache hqq 4 bits"]
    rows = list(kv_table(model, list(range(5, 90)), Settings(40, 20, chunk=16), names))
    assert rows[0].delta_ppl == 0
    assert rows[1].note or rows[1].ppl
    assert (rows[1].ppl is None) == (importlib.util.find_spec("hqq") is None)
    with pytest.raises(ValueError, match="names has 'hqq'; pass some of"):
        next(kv_table(model, [1, 2], Settings(2, 1), ["hqq"]))


def test_a_cache_that_gives_nan_has_a_note_and_pages_that_do_raise(monkeypatch):
    def nan(*args, **kwargs):
        raise FloatingPointError("the nll of token 31 is nan")

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.float32)
    monkeypatch.setattr("eval.quality.kv_quantisation.perplexity", nan)
    monkeypatch.setattr("eval.quality.kv_quantisation._bits", lambda *args: 8.0)
    (row,) = kv_table(model, list(range(5, 90)), Settings(40, 20, chunk=16), ["DynamicCache"])
    assert (row.ppl, row.note) == (None, "FloatingPointError: the nll of token 31 is nan")
    with pytest.raises(FloatingPointError):
        list(kv_table(model, list(range(5, 90)), Settings(40, 20, chunk=16), ["PagedCache int8"]))
