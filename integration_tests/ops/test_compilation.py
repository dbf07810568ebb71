"""Kernels compile for a Hopper GPU, which the interpreter says nothing about. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "compile_for_hopper.py"
KERNELS = {
    "attention": "_flash_backward_keys _flash_backward_queries _flash_forward _hopper_forward _merge_parts "
    "_merge_splits _merge_states _paged_forward _plan_splits row_sums",
    "quantised": "_merge_parts _plan_splits _quantized_forward _quantized_splits",
    "linear": "_batch_linear _rms_norm _small_linear _small_linear_mma",
    "small": "_copy_pages _decode_inputs _decode_rows _gated_activation _rms_norm _rotary_write _write_pages",
    "sampling": "_finish_rows _pick_rows _scan_tiles _weigh_tiles",
}


@pytest.mark.parametrize("family", KERNELS)
def test_kernels_compile(family, tmp_path):
    """In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), family], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == KERNELS[family].split()
