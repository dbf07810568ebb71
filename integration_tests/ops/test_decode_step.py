"""What a layer of a decode step costs the host, counted on a stub of a GPU: launches, and torch ops beside them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run_on_stub(what, tmp_path):
    """In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    script = ROOT / "integration_tests" / "support" / "decode_on_stub.py"
    done = subprocess.run(
        [sys.executable, str(script), what], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_launches_of_a_layer_are_those_of_the_ops(tmp_path):
    assert run_on_stub("launches", tmp_path)[-1:] == ["8 cases"]


def test_a_layer_takes_two_launches_and_no_torch_op_but_its_result(tmp_path):
    launches, ops = run_on_stub("layers", tmp_path)[-2:]
    assert launches == "launches 2.0"
    assert ops == "ops [('aten::empty', 1.0), ('aten::new_empty', 1.0)]"
