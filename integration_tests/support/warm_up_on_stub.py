"""What is compiled before, in and after a warm-up, counted on a stub of a GPU, for ``test_warm_up.py``."""

import json

import torch
import triton
from hf_paged_kernels import flash_attention, paged_attention, write_pages
from hf_paged_kernels.warm_up import AttentionKind, warm_up

from eval.kernel_bench.stub_gpu import pretend_hopper


def calls(tokens: int, dim: int = 128) -> None:
    """Prefill and decode of one sequence over other lengths than a warm-up has."""
    make = lambda n, h: torch.randn(n, h, dim, dtype=torch.bfloat16)  # noqa: E731
    pages = [torch.randn(300, 2, 16, dim, dtype=torch.bfloat16) for _ in "kv"]
    cu, one = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    q, k = make(tokens, 8), make(tokens, 2)
    longest = dict(max_seqlen_q=tokens, max_seqlen_k=tokens)
    flash_attention(q, k, k, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, **longest)
    write_pages(k, k, *pages, torch.arange(tokens))
    table, lens = torch.arange(200, dtype=torch.int32)[None], torch.tensor([tokens], dtype=torch.int32)
    paged_attention(q, *pages, table, lens, cu, max_query_len=tokens)
    paged_attention(q[:1], *pages, table, lens, one, max_query_len=1)


if __name__ == "__main__":
    pretend_hopper()
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["fn"].name)
    found = []
    list(warm_up(AttentionKind(8, 2, 128, 128, 16, torch.bfloat16, torch.bfloat16), "cpu"))
    found.append(len(compiled))
    compiled.clear()
    for tokens in (777, 32, 1500):
        calls(tokens)
    found.append(list(compiled))
    new = torch.randn(3, 2, 64, dtype=torch.bfloat16)
    write_pages(new, new, *(torch.randn(9, 2, 16, 64, dtype=torch.bfloat16) for _ in "kv"), torch.arange(3))
    print(json.dumps([*found, len(compiled)]))
