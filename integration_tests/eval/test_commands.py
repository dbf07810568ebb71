"""Every ``python -m eval.X``: no traceback for a bad option or path, and a help that shows all defaults."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from eval import command_line

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.stem for path in (ROOT / "eval").glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
MODEL = str(ROOT / "integration_tests" / "assets" / "small_model")
TEXT = str(ROOT / "integration_tests" / "assets" / "heldout.txt")
BAD_PATHS = [
    ("bench_decode_parts", ["--output", "{file}/x.json"], "is not a folder"),
    ("bench_engine", ["--plots", "nowhere.json"], "there is no file nowhere.json"),
    ("bench_engine", ["--plots", "{file}"], "is not JSON"),
    ("bench_engine", ["--plots", "{json}"], "has no 'models'"),
    ("bench_engine", ["--output", "{folder}"], "is a folder"),
    ("bench_host_time", ["--times", "0"], "at least 1"),
    ("bench_kernels", ["--draw", "nowhere.json"], "there is no file nowhere.json"),
    ("bench_kernels", ["--draw", "{json}"], "has no 'tables'"),
    ("bench_kernels", ["--output", "{file}"], "is not a folder"),
    ("cache_memory", ["--output", "{folder}"], "is a folder"),
    ("demo", ["--model", "{folder}"], "--model"),
    ("demo", ["--tokens", "0"], "at least 1"),
    ("figures", ["--output", "{file}/x.png"], "is not a folder"),
    ("figures", ["--results", "{folder}", "--output", "{folder}/x.png"], "has no prefill_memory_h200.json"),
    ("generation", ["--model", MODEL, "--data", "nowhere.txt"], "--data"),
    ("generation", ["--model", "{folder}", "--data", TEXT], "--model"),
    ("kv_schemes", ["--model", MODEL, "--data", "nowhere.txt"], "--data"),
    ("kv_schemes", ["--model", "{folder}", "--data", TEXT], "--model"),
    ("page_picture", ["--output", "{folder}"], "is a folder"),
    ("perplexity", ["--model", MODEL, "--data", "nowhere.txt"], "--data"),
    ("perplexity", ["--model", "{folder}", "--data", TEXT], "--model"),
    ("perplexity", ["--model", MODEL, "--data", TEXT, "--attn", "pagedflash"], "did you mean"),
    ("prefill_memory", ["--attn", "pagedflash"], "did you mean"),
    ("prefill_memory", ["--output", "{folder}"], "is a folder"),
    ("reference", ["--check", "gpt5"], "--check"),
    ("reference", ["--output", "{folder}"], "is a folder"),
    ("report", ["--model", MODEL, "--data", "nowhere.txt"], "--data"),
    ("report", ["--model", MODEL, "--data", TEXT, "--output", "{file}"], "is not a folder"),
    ("report", ["--model", MODEL, "--data", TEXT, "--batch-size", "0"], "at least 1"),
    ("report", ["--model", MODEL, "--data", TEXT, "--depths", "0.5", "2"], "--depths"),
    ("report_figure", ["{folder}"], "has no report.json"),
    ("report_figure", ["nowhere"], "has no report.json"),
    ("small_model", ["--output", "{file}"], "is not a folder"),
    ("small_model", ["--output", "{folder}", "--corpus", "{folder}"], "0 training and 0 held-out files"),
    ("tune_kernels", ["--output", "{file}"], "is not a folder"),
]


def run(monkeypatch, module: str, *arguments: str) -> int:
    """The exit status of a command; an exception that leaves it is a traceback, and fails the test."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.run(importlib.import_module(f"eval.{module}").main)
    return ended.value.code


def options_of(text: str) -> dict[str, str]:
    """Long options and what the help says of each, without the line breaks."""
    found = re.split(r"\n  (?=-)", re.split(r"\n(?:options|with --gpu):\n", text, maxsplit=1)[-1])
    return {name: " ".join(entry.split()) for entry in found if (name := entry.split()[0].rstrip(",")) != "-h"}


@pytest.mark.parametrize("module", MODULES)
def test_the_help_shows_every_default(module, monkeypatch, capsys):
    assert run(monkeypatch, module, "--help") in (0, None)
    for option, said in options_of("\n" + capsys.readouterr().out).items():
        assert "default" in said or "(required)" in said, option


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_option_is_one_line(module, monkeypatch, capsys):
    assert run(monkeypatch, module, "--no-such-option") == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("module", "arguments", "said"), BAD_PATHS)
def test_a_bad_path_or_value_is_one_line(module, arguments, said, monkeypatch, capsys, tmp_path):
    places = {"file": tmp_path / "file", "json": tmp_path / "some.json", "folder": tmp_path / "folder"}
    places["file"].write_text("text", encoding="utf-8")
    places["json"].write_text("{}", encoding="utf-8")
    places["folder"].mkdir()
    assert run(monkeypatch, module, *(word.format(**places) for word in arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1], error
    assert error[-1].startswith("error: ") or ": error: " in error[-1]


def test_every_command_runs_that_way():
    assert {"demo", "perplexity", "report"} <= set(MODULES)
    for module in set(MODULES) - {"bench_engine_peers"}:  # started by eval.bench_engine, with a task on its input
        assert "    command_line.run(main)\n" in (ROOT / "eval" / f"{module}.py").read_text(encoding="utf-8"), module
