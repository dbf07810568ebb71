"""Warming up: every kernel runs, and on a GPU nothing is compiled afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_paged_kernels import flash_attention, paged_attention, write_pages
from hf_paged_kernels.warm_up import AttentionKind, warm_up

ROOT = Path(__file__).parents[2]
NAMES = [
    "flash_attention", "write_pages", "copy_pages", "paged_attention, prefill", "paged_attention, decode",
    "merge_attention_states",
]  # fmt: skip


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("features", [{}, dict(has_window=True, has_softcap=True, has_sinks=True)], ids=str)
def test_every_kernel_runs(page_dtype, features):
    kind = AttentionKind(4, 2, 16, 24, 8, torch.float32, page_dtype, **features)
    assert list(warm_up(kind, "cpu")) == NAMES


def test_nothing_is_compiled_afterwards_on_a_stub(tmp_path):
    """In a process of its own: here, kernels are interpreted. A kind that was not warmed up is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    script = ROOT / "integration_tests" / "support" / "warm_up_on_stub.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    at_warm_up, afterwards, of_another_kind = json.loads(done.stdout.splitlines()[-1])
    assert at_warm_up >= len(NAMES)
    assert afterwards == []
    assert of_another_kind > 0


@pytest.mark.gpu
def test_nothing_is_compiled_afterwards(monkeypatch):
    import triton

    kind = AttentionKind(8, 2, 128, 128, 16, torch.bfloat16, torch.bfloat16)
    assert list(warm_up(kind, "cuda")) == NAMES
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs["fn"].name)
    )
    make = lambda n, h: torch.randn(n, h, 128, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    pages = [torch.randn(300, 2, 16, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for tokens in (777, 32, 1500):
        cu = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        q, k = make(tokens, 8), make(tokens, 2)
        flash_attention(
            q, k, k, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=tokens, max_seqlen_k=tokens
        )
        write_pages(k, k, *pages, torch.arange(tokens, device="cuda"))
        table = torch.arange(200, dtype=torch.int32, device="cuda")[None]
        lens = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        paged_attention(q, *pages, table, lens, cu, max_query_len=tokens)
        one = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        paged_attention(q[:1], *pages, table, lens, one, max_query_len=1)
    assert compiled == []
