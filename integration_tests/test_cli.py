"""``hf-paged``: what it prints, its exit status, and that no bad argument ends in a traceback."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import BloomConfig, LlamaConfig

from hf_paged import cli, doctor

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "integration_tests" / "assets" / "small_model")
HAS_GPU = torch.cuda.is_available()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_env_says_what_an_issue_report_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernel").write_bytes(b"0" * 2**20)
    status, out, _ = run(capsys, "env")
    assert status == 0
    for name in ("hf_paged", "python", "torch", "triton", "transformers", "GPU"):
        assert re.search(rf"^{name} ", out, re.M), name
    assert f"{tmp_path}: 1 files, 1.0 MiB" in out


def test_tested_versions_are_those_of_the_runs():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "integration_tests" / "support" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    sys.modules["versions"] = versions  # dataclasses look there
    spec.loader.exec_module(versions)
    for name, (oldest, newest) in cli.TESTED_VERSIONS.items():
        run_with = [Version(entry[name]) for entry in versions.VERSIONS.values()]
        assert Version(newest).release == max(run_with).release[:2], name
        # torch's oldest has no build for CPUs: tests on a GPU run on it.
        assert name == "torch" or Version(oldest).release == min(run_with).release[:2], name


@pytest.mark.parametrize("command", ["", "doctor"])
def test_help_shows_the_defaults(command, capsys):
    status, out, _ = run(capsys, *command.split(), "--help")
    assert status == 0
    if command:
        entries = re.split(r"\n  (?=-)", out.split("options:\n")[1])
        for entry in entries:
            assert "-h, --help" in entry or "(default: " in " ".join(entry.split()), entry


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["doktor"], "invalid choice"),
        (["env", "--model"], "unrecognized arguments"),
        (["doctor", "--device", "nowhere"], "--device 'nowhere' cannot be used here"),
        (["doctor", "--weights"], "--weights needs --model"),
        pytest.param(
            ["warm-up", "--model", "."], "warm-up needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["doctor", "--model", "/nowhere/at/all"], "--model '/nowhere/at/all'"),
        (["doctor", "--model", "."], "--model '.'"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert said in error.splitlines()[-1]


def test_every_kernel_agrees_with_its_reference(capsys):
    """Through the interpreter here, compiled on a GPU."""
    status, out, _ = run(capsys, "doctor")
    lines = out.splitlines()
    assert status == 0, out
    assert lines[-1].startswith("PASS")
    assert sum(line.startswith("ok ") for line in lines) >= 17
    assert all(line.startswith(("ok ", "--", "PASS", "kernels on")) for line in lines)


@pytest.mark.parametrize("wrong", [1.01, float("nan"), None])
def test_a_wrong_kernel_is_seen(wrong, capsys, monkeypatch):
    from hf_paged_kernels.layers import rms_norm_triton

    launch = rms_norm_triton.rms_norm_launch

    def broken(*arguments):
        if wrong is None:
            raise RuntimeError("out of registers\nand a long trace")
        normed, total = launch(*arguments)
        return normed * wrong, total

    monkeypatch.setattr(rms_norm_triton, "rms_norm_launch", broken)
    checks = [check for check in doctor.make_checks(torch.float32, False) if check.name == "rms_norm"]
    monkeypatch.setattr(doctor, "make_checks", lambda dtype, with_fp8: checks)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "FAIL  rms_norm" in out
    assert out.splitlines()[-1].startswith("FAIL")
    assert "long trace" not in out


def test_errors_are_relative_and_nan_is_one():
    x = torch.tensor([1.0, 2.0, 2.0])
    assert doctor.relative_error(x, x) == 0
    assert doctor.relative_error(x * 1.5, x) == pytest.approx(0.5)
    assert not doctor.relative_error(torch.tensor([1.0, float("nan"), 2.0]), x) <= 1
    same = torch.tensor([float("-inf"), float("nan"), 1.0])
    assert doctor.relative_error(same, same) == 0
    assert not doctor.relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) <= 1


def test_a_model_from_its_config(capsys):
    status, out, _ = run(capsys, "doctor", "--model", MODEL)
    assert status == 0
    assert "cache       pages: 4 layers of full attention" in out
    assert "engine      nothing in its class and config speaks against it" in out


def test_a_model_with_its_weights(capsys):
    status, out, _ = run(capsys, "doctor", "--model", MODEL, "--weights")
    assert status == 0
    assert "engine      serves it" in out
    assert "4 layer" in out
    assert ("captured    yes" if HAS_GPU else "captured    no: the model is on cpu") in out


def test_a_family_that_is_refused(capsys, tmp_path):
    BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    status, out, _ = run(capsys, "doctor", "--model", str(tmp_path))
    assert status == 1
    assert "attention   refused: BloomForCausalLM computes attention in its own code" in out


def test_a_model_that_the_engine_refuses(capsys, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=rope,
    ).save_pretrained(tmp_path)  # fmt: skip
    status, out, _ = run(capsys, "doctor", "--model", str(tmp_path))
    assert status == 1
    assert "engine      refused: its rotary embedding (dynamic) depends on the longest sequence" in out


def test_lm_eval_gets_the_other_arguments(monkeypatch, capsys):
    seen = []
    stub = types.SimpleNamespace(main=lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["hf-paged"])
    monkeypatch.setitem(sys.modules, "hf_paged.lm_eval_model", stub)
    monkeypatch.delattr("hf_paged.lm_eval_model", raising=False)
    assert run(capsys, "lm-eval", "run", "--tasks", "arc_easy")[0] == 0
    assert seen == [["hf-paged lm-eval", "run", "--tasks", "arc_easy"]]


def test_lm_eval_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "hf_paged.lm_eval_model", raising=False)
    monkeypatch.delattr("hf_paged.lm_eval_model", raising=False)
    status, _, error = run(capsys, "lm-eval", "--help")
    assert status == 2
    assert 'pip install "hf-paged[lm-eval]"' in error
