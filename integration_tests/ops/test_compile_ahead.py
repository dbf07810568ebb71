"""Launches are recorded and compiled, for a Hopper GPU, in the place of being run."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

SUPPORT = Path(__file__).parents[1] / "support"
SCRIPT = """
    import json
    import compile_for_hopper as hopper
    from triton import knobs
    hopper.pretend_hopper()
    from triton.compiler import CompiledKernel
    CompiledKernel._init_handles = lambda kernel: None  # There is no GPU to load it.
    from hf_paged_kernels import backend
    from hf_paged_kernels.launch_triton import compile_only
    from hf_paged_kernels.layers.rms_norm_triton import rms_norm_launch
    from hf_paged_kernels.linear.decode_gluon import decode_linear_launch
    from hf_paged_kernels.linear.decode_settings import choose_decode_linear
    from hf_paged_kernels.linear.skinny_gluon import skinny_linear_launch
    from hf_paged_kernels.linear.skinny_settings import choose_skinny_linear

    def launch_some():
        x, weight = hopper.new(64, 1024), hopper.new(4096, 1024)
        rms_norm_launch(x, hopper.new(1024), 1e-5, 0.0, True, None)
        decode_linear_launch(x, weight, None, choose_decode_linear(64, 4096, 1024, False, False), gated=False)
        settings = choose_skinny_linear(4, 4096, 1024, False, 2)
        skinny_linear_launch(x[:4], weight, None, None, None, 1e-5, settings, gated=False)

    launches = []
    with backend.recording(lambda *launch: launches.append(launch)):
        launch_some()
        launch_some()
    assert not hopper.KERNELS
    keys = {key for key, *_ in launches}
    misses = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: misses.append(not cache_hit)
    for _, *launch in launches[:3]:
        compile_only(*launch)
    compiled = sum(misses)
    launch_some()
    print(json.dumps([len(launches), len(keys), compiled, sum(misses)]))
"""


def test_what_was_recorded_is_what_launches_need(tmp_path):
    env = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]),
    }  # fmt: skip
    env.pop("TRITON_INTERPRET", None)
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    run = subprocess.run(script, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [6, 3, 3, 3]


KEYS = """
    import importlib, json, pkgutil, random, sys
    import hf_paged_kernels
    from hf_paged_kernels.launch_triton import hash_callees_first
    from triton.runtime.jit import JITFunction

    found = {}
    for module in pkgutil.walk_packages(hf_paged_kernels.__path__, "hf_paged_kernels."):
        if module.name.endswith(("_triton", "_gluon")):
            names = vars(importlib.import_module(module.name))
            found |= {f"{module.name}.{n}": f for n, f in names.items() if isinstance(f, JITFunction)}
    order = sorted(found)
    random.Random(int(sys.argv[1])).shuffle(order)
    for name in order:
        hash_callees_first(found[name])
        found[name] = found[name].cache_key
    print(json.dumps(found))
"""


def test_keys_of_kernels_are_the_same_in_every_process():
    """Whichever kernel comes first: what one process has compiled, another finds."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    script = textwrap.dedent(KEYS)
    runs = [
        subprocess.Popen([sys.executable, "-c", script, seed], env=env, stdout=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    first, second = (json.loads(run.communicate(timeout=200)[0].splitlines()[-1]) for run in runs)
    assert len(first) > 100
    assert {name for name in first if first[name] != second[name]} == set()


def test_recorded_ops_compute_by_reference(monkeypatch):
    from hf_paged_kernels import backend
    from hf_paged_kernels.layers import ops

    x, weight = torch.randn(3, 64), torch.randn(64)
    expected = ops.rms_norm_op(x, weight, 1e-5, 0.0, True, None)
    calls = []

    def function(*arguments):
        calls.append(backend.uses_triton(x.to("meta")))
        return reference(*arguments)

    reference = ops.rms_norm_op.function
    monkeypatch.setattr(ops.rms_norm_op, "function", function)
    with backend.recording(lambda *launch: None):
        got = ops.rms_norm_op(x, weight, 1e-5, 0.0, True, None)
    assert calls == [True, False]
    assert torch.equal(got[0], expected[0])
    assert backend.recorder() is None
