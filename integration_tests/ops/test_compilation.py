"""Kernels compile for a Hopper GPU, which the interpreter says nothing about. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from amount import EVERYTHING

from integration_tests.support.ptx_hashes import differences, normalised

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "compile_for_hopper.py"
KERNELS = {
    "attention": "_flash_backward_keys _flash_backward_queries _flash_forward _hopper_backward _hopper_forward "
    "_merge_partials _merge_splits _merge_states _paged_forward _plan_splits finish_queries row_sums",
    "quantised": "_merge_partials _plan_splits _quantized_forward _quantized_splits",
    "linear": "_decode_linear _lora_expand _lora_shrink _rms_norm _skinny_linear _skinny_linear_mma",
    "small": "_copy_pages _decode_inputs _decode_rows _gated_activation _rms_norm _rotary_write _write_pages",
    "sampling": "_finish_rows _pick_rows _scan_tiles _weigh_tiles",
}


@pytest.mark.parametrize("family", KERNELS)
def test_kernels_compile(family, tmp_path):
    """In a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), family, "all" if EVERYTHING else "few"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == KERNELS[family].split()


def test_hashes_of_ptx_see_code_and_not_where_it_came_from():
    code = "\t.file\t1 \"a.py\"\n// made by\n\t.loc\t1 2 3 // a.py:2:3\n\tadd.s32 %r1, %r2, 1; // sum\n"
    moved = code.replace("a.py", "b.py").replace("1 2 3", "1 9 9")
    assert normalised(code) == normalised(moved) == "\tadd.s32 %r1, %r2, 1;"
    assert normalised(code) != normalised(code.replace("%r2, 1", "%r2, 2"))


def test_differences_name_the_kernels():
    old = {"small/a": ["1", "2"], "small/b": ["3"], "small/c": ["4"]}
    assert differences(old, dict(old)) == []
    assert differences(old, {"small/a": ["1", "5"], "small/b": ["3"]}) == [
        "small/a: 1 of 2 variants are gone, 1 of 2 are new",
        "small/c: 1 of 1 variants are gone, 0 of 0 are new",
    ]
