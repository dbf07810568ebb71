"""The five functions that transformers expects of a flash attention implementation, with its argument names.

transformers inspects their signatures to see what is supported: a parameter that is here is honoured.
"""

from typing import Any

import torch
from hf_paged_kernels import flash_attention, paged_attention, write_pages

Window = tuple[int, int]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Dense attention: q ``[B, Lq, Hq, D]``, k and v ``[B, Lk, Hk, *]`` -> ``[B, Lq, Hq, Dv]``.

    Args:
        dropout_p: must be 0.
        window_size: neighbours seen to the left and right, -1 for all.
        softcap: None or 0: no softcap.
        s_aux: ``[Hq]`` attention sinks.
        deterministic: without effect: gradients have the same bits every time.
    """
    _refuse_dropout(dropout_p)
    return flash_attention(
        q, k, v, causal=causal, window=_window(window_size), softcap=softcap or None, sinks=s_aux, scale=softmax_scale,
    )  # type: ignore[return-value]  # fmt: skip


def flash_attn_varlen_func(  # noqa: PLR0913
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Packed attention: q ``[Tq, Hq, D]``, k and v ``[Tk, Hk, *]``, prefix sums int32 ``[num_seqs + 1]``."""
    _refuse_dropout(dropout_p)
    return flash_attention(
        q, k, v, cu_seqlens_q=cu_seqlens_q.to(torch.int32), cu_seqlens_k=cu_seqlens_k.to(torch.int32),
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal, window=_window(window_size),
        softcap=softcap or None, sinks=s_aux, scale=softmax_scale,
    )  # type: ignore[return-value]  # fmt: skip


def flash_attn_with_kvcache(  # noqa: PLR0913
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write new keys and values into a paged cache, then attend to all of it, in place.

    Args:
        q: ``[B, Lq, Hq, D]``.
        k_cache: ``[num_pages, page_size, Hk, D]``.
        v_cache: ``[num_pages, page_size, Hk, Dv]``.
        k: new keys ``[B, Lq, Hk, D]``, or None: the cache holds them already.
        v: new values ``[B, Lq, Hk, Dv]``.
        cache_seqlens: int32 ``[B]``, tokens in the cache before k and v.
        block_table: int32 ``[B, max_pages]``.

    Returns:
        ``[B, Lq, Hq, Dv]``.
    """
    if block_table is None or cache_seqlens is None:
        raise ValueError("flash_attn_with_kvcache needs block_table and cache_seqlens: the cache must be paged.")
    if (k is None) != (v is None):
        raise ValueError("flash_attn_with_kvcache needs both k and v, or neither where the cache holds them already.")
    batch, num_queries = q.shape[:2]
    k_pages, v_pages = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    seq_lens = cache_seqlens.to(torch.int32)
    table = block_table.to(torch.int32)
    if k is not None and v is not None:
        page_size = k_pages.shape[2]
        tokens = seq_lens[:, None] + torch.arange(k.shape[1], device=q.device)
        page = table.gather(1, (tokens // page_size).long()).long()
        slots = (page * page_size + tokens % page_size).flatten()
        write_pages(k.flatten(0, 1), v.flatten(0, 1), k_pages, v_pages, slots)
        seq_lens = seq_lens + k.shape[1]
    out = paged_attention(
        q.flatten(0, 1), k_pages, v_pages, table, seq_lens,
        torch.arange(0, batch * num_queries + 1, num_queries, dtype=torch.int32, device=q.device),
        max_query_len=num_queries, causal=causal, window=_window(window_size), softcap=softcap or None, sinks=s_aux,
        scale=softmax_scale,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.view(batch, num_queries, *out.shape[1:])


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """``[B, L, ...]`` and a 2D mask to packed tokens.

    Returns:
        ``(tokens [T, ...], indices int64 [T], cu_seqlens int32 [B + 1], longest, lengths int32 [B])``; tokens named by
        ``unused_mask`` are kept but not counted in ``lengths``.
    """
    kept = attention_mask.bool() if unused_mask is None else (attention_mask + unused_mask).bool()
    lengths = kept.sum(1, dtype=torch.int32)
    indices = kept.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    used = attention_mask.bool().sum(1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Packed tokens ``[T, ...]`` back to ``[batch, seqlen, ...]``, zeros where there is none."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices] = hidden_states
    return out.view(batch, seqlen, *hidden_states.shape[1:])


def all_functions() -> tuple[Any, Any, Any, Any, Any]:
    """``(dense, varlen, with_kvcache, pad, unpad)`` in the order that transformers unpacks them."""
    return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, pad_input, unpad_input


def _window(window_size: Window) -> Window | None:
    return None if tuple(window_size) == (-1, -1) else window_size


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: paged_flash has no attention dropout.")
