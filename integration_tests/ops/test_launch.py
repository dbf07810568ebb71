"""Launches that skip Triton's binder are those that Triton would make. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "launch_on_stub.py"
ROOT = Path(__file__).parents[2]
KERNELS = {
    "public": "Series _hopper_backward _hopper_forward _merge_partials _plan_splits _write_pages "
    "finish_queries row_sums",
    "small": "_copy_pages _decode_inputs _decode_rows _gated_activation _rms_norm _rotary_write _write_pages",
}


@pytest.mark.parametrize("family", KERNELS)
def test_bound_launches_are_those_of_triton(family, tmp_path):
    """In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), family], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == KERNELS[family].split()


def test_equal_keys_of_ints_are_compiled_alike():
    """What Triton makes of an int, for all small ones and those around borders of width."""
    from hf_paged_kernels.launch_triton import int_key
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    borders = [sign * 2**bits + more for bits in range(4, 62) for more in range(-17, 18) for sign in (1, -1)]
    for is_plain in (False, True):
        kinds: dict[int, tuple] = {}
        for value in [*range(-40, 3000), *borders]:
            kind = native_specialize_impl(BaseBackend, value, False, not is_plain, True)
            assert kinds.setdefault(int_key(value, is_plain), kind) == kind, value
    assert int_key(24, False) == int_key(40, False) == int_key((1 << 30) + 8, False)
