"""Kernels compile for GPUs, which the interpreter says nothing about, and fit into them. No GPU is needed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from amount import EVERYTHING

from integration_tests.support.ptx_hashes import differences, normalised

pytest.importorskip("triton")
SUPPORT = Path(__file__).parents[1] / "support"
KERNELS = {
    "attention": "_flash_backward_keys _flash_backward_queries _flash_forward _hopper_backward _hopper_forward "
    "_merge_partials _merge_splits _merge_states _paged_forward _plan_splits finish_queries row_sums",
    "quantised": "_merge_partials _plan_splits _quantized_forward _quantized_splits",
    "linear": "_decode_linear _lora_expand _lora_shrink _rms_norm _skinny_linear _skinny_linear_mma",
    "small": "_copy_pages _decode_inputs _decode_rows _gated_activation _rms_norm _rotary_write _write_pages",
    "sampling": "_finish_rows _pick_rows _scan_tiles _weigh_tiles",
}


def compiled(script: str, *arguments: str, cache: Path) -> str:
    """What a script prints, in a process of its own: here, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SUPPORT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600 if EVERYTHING else 550)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", KERNELS)
def test_kernels_compile(family, tmp_path):
    out = compiled("compile_for_hopper.py", family, "all" if EVERYTHING else "few", cache=tmp_path)
    assert out.split() == KERNELS[family].split()


# Those of sm_90 are compiled above.
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_100", "gfx942"] + ["sm_90"] * EVERYTHING)
def test_kernels_fit_other_architectures(architecture, tmp_path):
    """What ops launch there compiles, and takes no more shared memory, threads and registers than there are."""
    out = compiled("compile_for_architectures.py", architecture, "all" if EVERYTHING else "few", cache=tmp_path)
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["objection"] for line in found if line["objection"]] == []
    names = {line["kernel"] for line in found}
    hopper = {"_hopper_forward", "_quantized_splits"}
    assert names >= ({"_hopper_forward"} if architecture == "sm_90" else {"_paged_forward", "_quantized_forward"})
    assert architecture == "sm_90" or not names & hopper


def test_what_does_not_fit_is_seen():
    from compile_for_architectures import ARCHITECTURES, Figures

    ampere, amd = ARCHITECTURES["sm_80"], ARCHITECTURES["gfx942"]
    figures = Figures("decode", "kernel", 163 * 1024, 256, 255, 0)
    assert figures.objection(ampere) is None
    assert "166912 bytes of shared memory, of 65536" in figures.objection(amd)
    assert "166913 bytes" in replace(figures, shared=163 * 1024 + 1).objection(ampere)
    assert "512 threads of 255 registers" in replace(figures, threads=512).objection(ampere)
    assert "2048 threads" in replace(figures, threads=2048, registers=16).objection(ampere)


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
