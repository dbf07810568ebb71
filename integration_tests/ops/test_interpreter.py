"""Each repair of Triton's interpreter is still needed: a test that passes without it says that it may go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "interpreter_probes.py"
INSTALLED = Version(triton.__version__)


@pytest.fixture(scope="module")
def right() -> dict[str, object]:
    """What the probes say in a process without the repairs."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong(reason: str, is_wrong: bool = True):
    return pytest.mark.xfail(is_wrong, reason=reason, strict=True, raises=AssertionError)


SMALL_FLOATS = wrong("repair_small_floats")


@pytest.mark.parametrize(
    "probe",
    [
        pytest.param("dot_of_bfloat16", marks=SMALL_FLOATS),
        pytest.param("carry_into_bfloat16", marks=SMALL_FLOATS),
        pytest.param("carry_into_fp8", marks=SMALL_FLOATS),
        pytest.param("integers_into_bfloat16", marks=SMALL_FLOATS),
        pytest.param("length_from_memory", marks=wrong("repair_indices", Version("3.7") > INSTALLED)),
        pytest.param("mask_of_a_comparison", marks=wrong("repair_masks", Version("3.9") <= INSTALLED)),
    ],
)
def test_the_interpreter_without_repairs(probe, right):
    assert right[probe] is True
