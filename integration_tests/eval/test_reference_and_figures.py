"""Published figures and the command that checks them; the README's figure from committed results."""

import json
from pathlib import Path

import pytest

from eval import figures, reference
from eval.quality.windows import plan_windows

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "integration_tests" / "assets"


def test_the_committed_table_is_that_of_the_code():
    assert (ROOT / "eval" / "reference.md").read_text(encoding="utf-8") == reference.markdown()


@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_every_figure_has_a_convention_and_a_source(name):
    item = reference.PUBLISHED[name]
    plan_windows(10 * item.window, item.window, item.stride, item.convention)
    assert item.source.startswith("https://")
    assert 0 < item.tolerance < 0.05


@pytest.mark.parametrize(("published", "status"), [(1.0, 1), (None, 0)])
def test_a_check_passes_within_its_tolerance(monkeypatch, capsys, published, status, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": (ASSETS / "heldout.txt").read_text(encoding="utf-8")[:900]}), encoding="utf-8")
    measured = reference.perplexity_main(
        ["--model", str(ASSETS / "small_model"), "--data", str(data), "--convention", "gptq", "--window", "64",
         "--attn", "eager", "--dtype", "float32"]
    )["results"][0]["ppl"]  # fmt: skip
    item = reference.Published(
        "nobody/model", "wikitext-2", "gptq", 64, 64, "float32", published or measured, 0.01, "s"
    )
    monkeypatch.setitem(reference.PUBLISHED, "small", item)
    arguments = ["--check", "small", "--model", str(ASSETS / "small_model"), "--data", f"wikitext-2@{data}"]
    assert reference.main(arguments) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS: small" if status == 0 else "FAIL: small")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"check \(--check\) 'gpt5' is unknown; pass one of"):
        reference.check("gpt5")


def test_the_figure_is_drawn_from_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(["--output", str(tmp_path / "new" / "figures.png")])
    assert (tmp_path / "new" / "figures.png").read_bytes()[:4] == b"\x89PNG"


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no prefill_memory_h200\.json; make it with .*prefill_memory$"):
        figures.load(tmp_path)
