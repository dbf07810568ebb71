"""The kernel benchmark without a GPU: what rows count for, tables, errors, and a run whose stop watch is a fake."""

import builtins
import json
import sys
from dataclasses import replace

import pytest
import torch

from eval import bench_kernels
from eval.kernel_bench import calls as bench_kernels_calls
from eval.kernel_bench import rows as bench_kernels_rows
from eval.kernel_bench import timing as bench_kernels_timing
from eval.kernel_bench.rows import (
    CUDNN,
    DENSE,
    FA3,
    FLASHINFER,
    FLEX,
    NOT_SHARED,
    OURS,
    PLAN_INSIDE,
    PORTABLE,
    SDPA_FLASH,
    TITLES,
    Row,
    all_rows,
    count_pairs,
)


def labels(table: str, quick: bool = False) -> list[str]:
    return [row.label for row in all_rows([table], quick)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_len", "seq_len"), [(1, 1), (1, 63), (7, 7), (3, 111), (16, 17)])
def test_pairs_are_those_of_the_mask(query_len, seq_len, causal):
    mask = torch.ones(query_len, seq_len, dtype=torch.bool)
    if causal:
        # The last query sees the last key.
        mask = mask.tril(seq_len - query_len)
    assert count_pairs(query_len, seq_len, causal) == int(mask.sum())


def test_flops_count_every_sequence_and_head():
    row = Row("prefill", "", (3, 5), (3, 9), q_heads=4, kv_heads=2, head_dim=64)
    pairs = sum(1 for q, k in ((3, 3), (5, 9)) for i in range(q) for j in range(k) if j <= i + k - q)
    # A multiplication and an addition per element, in q @ k and in p @ v.
    assert row.flops == pairs * 4 * 64 * 2 * 2
    assert replace(row, table="backward").flops == 2.5 * row.flops


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int8"])
def test_bytes_are_those_of_the_tensors(monkeypatch, kv_dtype):
    monkeypatch.setattr(bench_kernels_calls, "DEVICE", "cpu")
    row = Row("decode", "", (1, 1), (16, 48), 4, 2, 64, page_size=16, kv_dtype=kv_dtype)
    x = bench_kernels_calls.PagedInputs(row, 3)
    tensors = [t for t in (x.k_pages, x.v_pages, x.k_scale, x.v_scale) if t is not None]
    assert 3 * row.bytes == sum(t.numel() * t.element_size() for t in tensors)
    written = replace(row, table="write_pages", query_lens=(5,), seq_lens=(5,))
    new = 2 * 5 * 2 * 64 * 2
    assert written.bytes == new + row.bytes * 5 // 64


def test_shared_tokens_count_once():
    row = Row("shared_prefix", "", (1,) * 3, (40,) * 3, page_size=8, prefix=32)
    assert row.bytes == (32 + 3 * 8) * 2 * 8 * 128 * 2


def test_figures_of_the_anchors_come_out():
    """8 x 8k in 73.1 us is 3.67 TB/s."""
    rows = {(row.table, row.label): bench_kernels.record(row) for row in all_rows()}
    assert bench_kernels_rows.rate("decode", rows["decode", "8 x 8k"], 73.1) == pytest.approx(3.67, abs=0.005)
    assert bench_kernels_rows.rate("decode", rows["decode", "1 x 32k"], 43.2) == pytest.approx(3.10, abs=0.01)
    flops = 4 * 16 * 128 * 4 * (4096 * 4097 // 2)
    assert rows["prefill", "D 128, causal, 4k"]["flops"] == flops
    assert bench_kernels_rows.rate("prefill", {"flops": flops}, 1000) == pytest.approx(flops / 1e9)


def test_rows_are_those_of_the_published_tables():
    assert labels("decode") == [
        "1 x 1k", "1 x 8k", "1 x 32k", "8 x 1k", "8 x 8k", "32 x 1k", "32 x 8k", "128 x 1k", "128 x 8k",
        "63 x 512 and 1 x 65,536", "64 sequences of 200 to 2,531", "7 x 64 and 1 x 32,768",
        "8 x 8k, FP8 pages", "32 x 8k, FP8 pages", "8 x 8k, INT8 pages", "32 x 8k, INT8 pages",
    ]  # fmt: skip
    assert labels("prefill") == [
        *(f"D {d}, {mask}, {length}" for d in (64, 128, 256) for mask in ("not causal", "causal")
          for length in ("1k", "4k", "16k")),
        "GQA 32/8, D 128, causal, 8k", "GQA 32/8, D 128, causal, 32k",
    ]  # fmt: skip
    assert labels("paged") == [
        f"{case}, page {size}" for size in (16, 64, 256) for case in ("8k new", "32k new", "2k new on 30k cached")
    ]
    assert labels("backward") == [f"D {d}, {length}" for d in (64, 128) for length in ("1k", "4k", "16k")]
    assert {max(row.query_lens) for row in all_rows(["verify"])} == {4, 16}
    (shared,) = all_rows(["shared_prefix"])
    assert (len(shared.seq_lens), shared.prefix, shared.seq_lens[0]) == (64, 8192, 8448)


def test_rows_have_the_lengths_that_they_name():
    decode = {row.label: row for row in all_rows(["decode"])}
    ragged = decode["64 sequences of 200 to 2,531"].seq_lens
    assert (len(ragged), min(ragged), max(ragged)) == (64, 200, 2531)
    skewed = decode["63 x 512 and 1 x 65,536"].seq_lens
    assert sorted(skewed) == [512] * 63 + [65536]
    assert sorted(decode["7 x 64 and 1 x 32,768"].seq_lens) == [64] * 7 + [32768]
    for row in all_rows(["prefill", "backward"]):
        if row.group == 1:
            assert sum(row.seq_lens) == 16384
            assert row.q_heads * row.head_dim == 2048
    cached = [row for row in all_rows(["paged"]) if "cached" in row.label]
    assert {(row.query_lens, row.seq_lens) for row in cached} == {((2048,), (32768,))}
    assert all((row.q_heads, row.kv_heads, row.head_dim) == (32, 8, 128) for row in all_rows(["paged", "decode"]))


def test_a_quick_run_has_rows_of_every_table():
    quick = all_rows(quick=True)
    assert {row.table for row in quick} == set(TITLES)
    assert len(quick) < len(all_rows()) / 3


def test_every_kernel_is_compiled_once():
    jobs = bench_kernels_timing.compile_jobs(all_rows(), {FLEX, FLASHINFER}, (OURS, PORTABLE))
    keys = [bench_kernels_timing.compile_key(row, column) for row, column in jobs]
    assert len(keys) == len(set(keys)) < 80
    decode = [(row, column) for row, column in jobs if row.table == "decode" and column == OURS]
    assert {row.kv_dtype for row, _ in decode} == {"bfloat16", "fp8", "int8"}
    assert max(sum(row.seq_lens) for row, _ in decode) <= 8 * 8192
    # The peers that take long go first, and FlexAttention for every shape.
    assert [column for _, column in jobs if column == FLEX] == [FLEX] * 3
    assert jobs[0][1] in (FLEX, FLASHINFER)


REPORT = {
    "device": "NVIDIA H200", "versions": {"torch": "2.11"}, "date": "2026-01-01", "seconds": 12.3, "finished": True,
    "command": "python -m eval.bench_kernels", "skipped": {FA3: "not installed"},
    "ceilings": {"copy": 4.26, "read": 4.22, "matmul": 758.0}, "tables": {},
}  # fmt: skip


def entry(label: str, table: str, **cells: float | str) -> dict:
    row = bench_kernels.record(next(row for row in all_rows([table]) if row.label == label))
    shown = {name: {"failed": us} if isinstance(us, str) else {"us": us} for name, us in cells.items()}
    return {**row, "cells": shown}


def test_a_table_has_figures_fractions_and_reasons():
    rows = [
        entry("32 x 8k", "decode", **{OURS: 240.0, CUDNN: 252.0, SDPA_FLASH: "RuntimeError: a | b"}),
        entry("32 x 8k, FP8 pages", "decode", **{OURS: 120.0}),
    ]
    lines = bench_kernels_rows.table({**REPORT, "tables": {"decode": rows}}, "decode").splitlines()
    assert lines[2] == (
        f"| | {OURS} | {CUDNN} | {SDPA_FLASH} | over the best peer | of the copy rate | times faster than BF16 pages |"
    )
    assert lines[4] == (
        "| 32 x 8k | 240 us, 4.47 | 252 us, 4.26 | failed: RuntimeError: a / b | 1.05 | 105% |  |"
    )  # fmt: skip
    assert lines[5] == "| 32 x 8k, FP8 pages | 120 us, 4.61 |  |  |  | 108% | 2.00 |"


def test_a_failure_of_ours_or_of_a_ceiling_leaves_the_table():
    rows = [entry("D 128, causal, 4k", "prefill", **{OURS: "OutOfMemoryError: no", CUDNN: 500.0})]
    report = {**REPORT, "ceilings": {"matmul": {"failed": "RuntimeError: x"}}, "tables": {"prefill": rows}}
    text = bench_kernels_rows.markdown(report)
    assert "| D 128, causal, 4k | failed: OutOfMemoryError: no | 550 |  |  |" in text
    assert "8192³ BF16 matmul failed: RuntimeError: x" in text
    assert f"{FA3}: not installed" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tables", "decode,prefil"], ["unknown table 'prefil'", *TITLES]),
        (["--tables", ","], ["no table named"]),
        (["--variant", "gluon"], ["auto", "triton"]),
        (["--draw", "nowhere.json"], ["no file nowhere.json"]),
    ],
)
def test_errors_say_what_is_accepted(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main([])
    assert stopped.value.code == 2
    assert "needs one" in capsys.readouterr().err


def test_tables_keep_their_order():
    assert bench_kernels.parse_tables("decode, prefill") == ["prefill", "decode"]
    options = bench_kernels.make_parser().parse_args(["--tables", "decode", "--quick", "--output", "/secret"])
    assert bench_kernels.describe(options) == "python -m eval.bench_kernels --tables decode --quick"
    assert bench_kernels.file_stem("NVIDIA H200", False) == "bench_kernels_h200"
    assert bench_kernels.file_stem("NVIDIA A100-SXM4-80GB", True) == "bench_kernels_a100_sxm4_80gb_quick"


TINY = [
    Row("prefill", "tiny", (33, 33), (33, 33), 4, 2, 64),
    Row("paged", "tiny", (7,), (37,), 4, 2, 64, page_size=16),
    Row("decode", "tiny", (1, 1), (33, 33), 4, 2, 64, page_size=16),
    Row("decode", "tiny, skewed", (1, 1, 1), (1, 63, 17), 4, 2, 64, page_size=16),
    Row("decode", "tiny, FP8 pages", (1, 1), (33, 33), 4, 2, 64, page_size=16, kv_dtype="fp8"),
    Row("decode", "tiny, INT8 pages", (1, 1), (33, 33), 4, 2, 64, page_size=16, kv_dtype="int8"),
    Row("verify", "tiny", (4, 4), (33, 33), 4, 2, 64, page_size=16),
    Row("write_pages", "tiny", (5,), (5,), 4, 2, 64, page_size=16),
    Row("write_pages", "tiny, FP8 pages", (5,), (5,), 4, 2, 64, page_size=16, kv_dtype="fp8"),
    Row("backward", "tiny", (33, 33), (33, 33), 4, 4, 64),
    Row("shared_prefix", "tiny", (1,) * 5, (55,) * 5, 4, 2, 64, page_size=16, prefix=48),
]


@pytest.fixture
def on_cpu(monkeypatch):
    """Two sets of buffers on the CPU, where the kernels' reference runs."""
    monkeypatch.setattr(bench_kernels_calls, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernels_calls, "MAX_SETS", 2)


@pytest.mark.parametrize("row", TINY, ids=lambda row: f"{row.table}, {row.label}")
def test_columns_of_a_row_compute_the_same(on_cpu, row):
    """Columns over the same inputs agree; the others are only called. Triton's interpreter runs portable Triton."""
    columns = bench_kernels_calls.columns_of(row, set(), (OURS,) if torch.cuda.is_available() else (OURS, PORTABLE))
    with torch.no_grad():
        results = {name: [call() for call in columns[name]()] for name in columns if name != CUDNN}
    sets = 2 if row.table in ("decode", "verify") else 4 if row.table == "write_pages" else 1
    assert {len(calls) for calls in results.values()} == {sets}
    for first, second in ((PLAN_INSIDE, OURS), (NOT_SHARED, OURS), (PORTABLE, OURS)):
        if first in results:
            for a, b in zip(results[first], results[second]):
                # The launchers also give the log-sum-exp.
                a = a[0] if isinstance(a, tuple) else a
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    if row.table == "prefill":
        torch.testing.assert_close(results[SDPA_FLASH][0].transpose(1, 2), results[OURS][0], rtol=2e-2, atol=2e-2)
    if row.table == "backward":
        for a, b in zip(results[SDPA_FLASH][0], results[OURS][0]):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    if row.table == "paged":
        assert results[DENSE][0].shape == (1, *results[OURS][0].shape)


def test_page_tables_are_disjoint_but_for_the_prefix(on_cpu):
    x = bench_kernels_calls.PagedInputs(TINY[-1], 2)
    shared = [set(table[:, :3].flatten().tolist()) for table in x.tables]
    private = [table[:, 3].tolist() for table in x.tables]
    assert [len(pages) for pages in shared] == [3, 3]
    assert sorted([*shared[0], *shared[1], *private[0], *private[1]]) == list(range(x.k_pages.shape[0]))


@pytest.fixture
def fake_run(on_cpu, monkeypatch):
    """A run on the CPU: calls are made once, and all take 10 microseconds."""

    def measure(row, make, quick):
        with torch.no_grad():
            make()[0]()
        return 10.0

    monkeypatch.setattr(bench_kernels_timing, "measure", measure)
    monkeypatch.setattr(bench_kernels_timing, "compile_all", lambda *arguments: {})
    monkeypatch.setattr(
        bench_kernels_timing, "CEILINGS", {"copy": lambda: 4.0, "read": lambda: 1 / 0, "matmul": lambda: 700.0}
    )
    monkeypatch.setattr(
        bench_kernels, "all_rows", lambda tables, quick: [row for row in TINY if row.table in tables]
    )  # fmt: skip
    monkeypatch.setattr(bench_kernels, "find_peers", lambda quick: ({FLASHINFER}, {FA3: "not installed"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")


def test_a_run_writes_json_markdown_and_plots(fake_run, tmp_path, capsys):
    bench_kernels.main(["--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench_kernels_h200.json", "bench_kernels_h200.md", "bench_kernels_h200_prefill.png",
        "bench_kernels_h200_decode.png",
    }  # fmt: skip
    report = json.loads((tmp_path / "bench_kernels_h200.json").read_text())
    assert report["finished"]
    assert set(report["tables"]) == set(TITLES)
    assert {"torch", "triton", "python"} <= set(report["versions"])
    decode = report["tables"]["decode"][0]["cells"]
    assert decode[OURS]["us"] == 10.0
    # cuDNN is not on a CPU, and FlashInfer not installed: both say so, and end nothing.
    assert "failed" in decode[CUDNN]
    assert decode[FLASHINFER]["failed"]
    assert report["ceilings"]["read"] == {"failed": "ZeroDivisionError: division by zero"}
    out = capsys.readouterr().out
    assert f"{FA3}: not installed, left out" in out
    assert all(f"## {title}" in out for title in TITLES.values())


def test_a_cut_run_leaves_its_rows(fake_run, tmp_path, monkeypatch):
    watch = bench_kernels_timing.measure

    def cut(row, make, quick):
        if row.table == "verify":
            raise KeyboardInterrupt
        return watch(row, make, quick)

    monkeypatch.setattr(bench_kernels_timing, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.main(["--output", str(tmp_path)])
    path = tmp_path / "bench_kernels_h200.json"
    report = json.loads(path.read_text())
    assert not report["finished"]
    assert len(report["tables"]["decode"]) == 4
    bench_kernels.main(["--draw", str(path)])
    assert "cut short" in path.with_suffix(".md").read_text()
    assert (tmp_path / "bench_kernels_h200_decode.png").exists()


def test_without_matplotlib_it_names_the_extra(fake_run, tmp_path, monkeypatch, capsys):
    import_module = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return import_module(name, *arguments, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    bench_kernels.main(["--tables", "prefill", "--output", str(tmp_path)])
    assert 'pip install "hf-paged[eval]"' in capsys.readouterr().out
    assert (tmp_path / "bench_kernels_h200.md").exists()


def test_portable_triton_alone(fake_run, tmp_path):
    bench_kernels.main(["--tables", "prefill", "--variant", "triton", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "bench_kernels_h200.json").read_text())
    cells = report["tables"]["prefill"][0]["cells"]
    assert PORTABLE in cells
    assert OURS not in cells


def test_plots_name_every_line_and_cut_none():
    """A column that only some panels have is in the legend; the highest point of any panel fits the common axis."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def row(head_dim, causal, **us):
        return {"label": "", "head_dim": head_dim, "causal": causal, "group": 1, "seq_lens": [1024], "flops": 1e12,
                "cells": {name: {"us": value} for name, value in us.items()}}  # fmt: skip

    rows = [row(64, True, ours=2000.0), row(128, False, ours=1250.0, FlexAttention=4000.0)]
    figure = Figure(layout="constrained")
    bench_kernels_rows._draw_prefill(figure, rows, {"matmul": 500.0})
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "ours", "FlexAttention", "measured beside: an 8192³ BF16 matmul",
    }  # fmt: skip
    low, high = figure.axes[0].get_ylim()
    for axes in figure.axes:
        assert axes.get_ylim() == (low, high)
        assert all(low <= y <= high for line in axes.lines for y in line.get_ydata())
