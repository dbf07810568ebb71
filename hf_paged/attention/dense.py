"""Attention over keys and values that are tensors: packed, padded, or under a mask of their own."""

import torch
from hf_paged_kernels.attention.reference import attend_rows
from transformers.utils import logging

from ..cache.lazy_states import LazyStates
from ..cache.step_plan import padding_behind, prefix_sums
from .options import AttentionOptions

logger = logging.get_logger(__name__)


def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: AttentionOptions,
    max_seqlen_q: int | None = None,
) -> torch.Tensor:
    """Sequences packed by the caller into one row (or rows whose lengths the prefix sums cover in order)."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    lengths = {"cu_seqlens_q": cu_seqlens_q.to(torch.int32), "cu_seqlens_k": cu_seqlens_k.to(torch.int32)}
    out = options.flash(q, k, v, max_seqlen_q=max_seqlen_q, **lengths)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def with_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Dense inputs and a 2D mask: the tokens are packed, padding takes no part."""
    num_seqs, _, num_queries, _ = query.shape
    if mask.shape[1] > key.shape[2]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, the keys {key.shape[2]}: it must not have more.")
    if mask.shape[1] < key.shape[2] and not options.causal:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {key.shape[2]} keys that are all seen (cross-attention): "
            f"it must cover them; prefill_chunk_size cuts the encoder's mask."
        )
    # A static cache hands over keys that are not filled yet: the mask says how many count.
    key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    if mask.dtype == torch.int32:
        ends = torch.ones_like(mask, dtype=torch.bool)
        ends[:, :-1] = mask[:, 1:] != mask[:, :-1]
        bounds = torch.cat([mask.new_zeros(1), ends.flatten().nonzero().squeeze(1).int() + 1])
        return packed(query, key, value, bounds, bounds, options)
    keys_held = mask.bool()
    if options.left is None and options.right is None:
        # Every query sees every token: cross-attention's queries are of another sequence than this mask.
        queries_held = torch.ones_like(keys_held[:, :1]).expand(-1, num_queries)
    else:
        queries_held = keys_held[:, -num_queries:]
    q_index, k_index = (held.flatten().nonzero().squeeze(1) for held in (queries_held, keys_held))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = options.flash(
        flat[0][q_index], flat[1][k_index], flat[2][k_index],
        cu_seqlens_q=prefix_sums(queries_held), cu_seqlens_k=prefix_sums(keys_held), max_seqlen_q=num_queries,
    )  # fmt: skip
    padded = out.new_zeros(num_seqs * num_queries, *out.shape[1:])
    padded[q_index] = out
    if options.causal and not torch.is_grad_enabled():
        behind = padding_behind(keys_held, keys_held.any(1))[:, -num_queries:]
        index = behind.flatten().nonzero().squeeze(1)
        if torch.compiler.is_compiling() or len(index):  # A graph does not ask how many there are.
            padded[index] = options.looking_back().flash(
                flat[0][index], flat[1][k_index], flat[2][k_index],
                cu_seqlens_q=prefix_sums(behind), cu_seqlens_k=prefix_sums(keys_held), max_seqlen_q=num_queries,
            )  # fmt: skip
    return padded.view(num_seqs, num_queries, *out.shape[1:])


def with_dense_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """A 4D mask or bias: the reference computation, with an attention matrix."""
    _log_dense_mask()
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask.shape[-1] < num_keys or mask.shape[-2] not in (1, num_queries):
        raise ValueError(
            f"a 4D attention_mask must be [batch, heads, {num_queries}, {num_keys}], got {list(mask.shape)}."
        )
    mask = mask[..., :num_keys].expand(query.shape[0], -1, num_queries, num_keys)
    if isinstance(key, LazyStates):
        update = key.source
        is_hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        update.write(update.planner.tokens_of_dense_mask(update, ~is_hidden.flatten(1, 2).all(1)))
        key = key.dense()
        value = value.dense() if isinstance(value, LazyStates) else value
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, float("-inf"))
    # A query without keys (padding) gives zeros; the gradient of its softmax would be NaN.
    is_empty = mask.isneginf().all(-1, keepdim=True)
    mask = mask.masked_fill(is_empty, 0.0)
    rows = [
        attend_rows(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None, options.softcap, options.sinks,
                    options.scale, bias=b)[0]
        for q, k, v, b in zip(query, key, value, mask)
    ]  # fmt: skip
    return torch.stack(rows).masked_fill(is_empty.transpose(1, 2), 0.0)


@torch.compiler.assume_constant_result
def _log_dense_mask() -> None:
    """One line. A model that is compiled logs it while it is traced: a graph cannot."""
    logger.warning_once(
        "paged_flash got a 4D attention mask, which its kernels cannot express: attention takes the reference path, "
        "with a full attention matrix in memory."
    )
