"""Compile the kernels that a model will need, before its first request waits for them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .attention.ops import (
    copy_pages_op,
    flash_attention_op,
    merge_attention_states_op,
    paged_attention_op,
    write_pages_op,
)
from .settings import SHORT_CONTEXT


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What decides which kernels a layer needs; the lengths of a step do not.

    Attributes:
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: of queries and keys.
        v_dim: of values.
        page_size: tokens of a page.
        dtype: of queries, keys and values.
        page_dtype: of the pages: ``dtype``, torch.float8_e4m3fn or torch.int8.
        has_window, has_softcap, has_sinks: features of the layer.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    page_size: int
    dtype: torch.dtype
    page_dtype: torch.dtype
    has_window: bool = False
    has_softcap: bool = False
    has_sinks: bool = False


def warm_up(kind: AttentionKind, device: torch.device | str) -> Iterator[str]:
    """Run every kernel of ``kind`` once on a few tokens; yields its name after each, for a progress bar.

    Prefill and mixed steps, decode, page writes and copies, the merge. On CPU, where nothing is compiled, this only
    runs the references.
    """
    page_size, tokens = kind.page_size, 2 * kind.page_size
    new = lambda *size: torch.zeros(*size, dtype=kind.dtype, device=device)  # noqa: E731
    q = new(tokens, kind.num_q_heads, kind.head_dim)
    k, v = new(tokens, kind.num_kv_heads, kind.head_dim), new(tokens, kind.num_kv_heads, kind.v_dim)
    window = page_size if kind.has_window else None
    softcap = 30.0 if kind.has_softcap else None
    sinks = new(kind.num_q_heads) if kind.has_sinks else None
    scale = kind.head_dim**-0.5
    lengths = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    flash_attention_op(q, k, v, lengths, lengths, tokens, window, 0, softcap, sinks, scale)
    yield "flash_attention"

    pages = [
        torch.zeros(4, kind.num_kv_heads, page_size, dim, device=device).to(kind.page_dtype)
        for dim in (kind.head_dim, kind.v_dim)
    ]
    scales: tuple[torch.Tensor | None, ...] = (None, None)
    if kind.page_dtype != kind.dtype:
        scales = tuple(torch.ones(4, kind.num_kv_heads, page_size, device=device) for _ in pages)
    write_pages_op(k, v, *pages, torch.arange(tokens, device=device), *scales)
    yield "write_pages"
    copy_pages_op(*pages, *(torch.tensor([page], dtype=torch.int32, device=device) for page in (0, 3)))
    yield "copy_pages"

    # As wide as tables are that split: a narrow one takes another path, and a wide one other tiles and another merge.
    narrow, wide = (max(4, num_tokens // page_size) for num_tokens in (SHORT_CONTEXT, 2 * SHORT_CONTEXT))
    table = torch.zeros(1, wide, dtype=torch.int32, device=device)
    table[0, 1] = 1
    seq_lens = torch.full((1,), tokens, dtype=torch.int32, device=device)
    for name, length, longest in (("paged_attention, prefill", tokens, 2048), ("paged_attention, decode", 1, 1)):
        cu_seqlens_q = torch.tensor([0, length], dtype=torch.int32, device=device)
        for width in (narrow, wide):
            out, lse = paged_attention_op(
                q[:length], *pages, table[:, :width].contiguous(), seq_lens, cu_seqlens_q, longest, window, 0, softcap,
                sinks, scale, *scales,
            )  # fmt: skip
        yield name
    merge_attention_states_op(out, lse, out, lse)
    yield "merge_attention_states"
