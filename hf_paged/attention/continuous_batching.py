"""Decode steps of transformers' own continuous batching: what all layers of a step share is computed in the first one.

From its lengths and block table come the slots that new tokens are written to, the lengths that attention reads and the
split plan: a dozen small kernels, which would run again in every layer.

A step is told by its ``cu_seq_lens_q``, which transformers makes anew for each and hands to every layer, and by layers
that follow one another: one that does not come behind the last one seen starts again. A captured graph runs its step
once before the capture, with the same tensors, so this is what puts the computation into the graph too.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from hf_paged_kernels.attention.ops import paged_attention_op, write_pages_op
from hf_paged_kernels.backend import contiguous_rows
from hf_paged_kernels.checks import check_pages
from torch.utils.weak import WeakTensorKeyDictionary

from ..cache.step_plan import StepSplitPlans
from ..transformers_internals import batching_update, is_batching_cache
from .dense import packed
from .options import AttentionOptions


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The rows of a decode step in one group of layers.

    Attributes:
        slots: int64 ``[num_seqs]``, where each new token's keys and values go; -1 for a row that only pads the batch.
        seq_lens: int32 ``[num_seqs]``, tokens with the new one; 0 for padding.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        plan: the split plan, None where no kernel reads one.
    """

    slots: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    plan: torch.Tensor | None


@dataclass(slots=True)
class _Step:
    """The step whose layers are running: the last layer, and its rows by group and window."""

    layer: int
    rows: dict[tuple[int, int | None], DecodePlan] = field(default_factory=dict)


_steps: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""``_Step`` by the step's ``cu_seq_lens_q``: gone with the step."""


def decode_rows(
    cu_seqlens_q: torch.Tensor,
    layer: int,
    table: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_size: int,
    window_left: int | None,
) -> DecodePlan:
    """The rows of a decode step, computed once for the layers that share them.

    Args:
        cu_seqlens_q: the step's, as it is handed to every layer.
        layer: number of this layer.
        table: int32 ``[num_seqs, max_pages]``, this layer's block table; -1 where there is no block.
        cu_seqlens_k: int32 ``[num_seqs + 1 or more]``.
        page_size: tokens of a page.
        window_left: keys that a query sees before its own, None: all.
    """
    if torch.compiler.is_compiling():
        return _make_rows(table, cu_seqlens_k, page_size, window_left)
    step = _steps.get(cu_seqlens_q)
    if step is None or layer <= step.layer:
        step = _steps[cu_seqlens_q] = _Step(layer)
    step.layer = layer
    key = table.storage_offset(), window_left
    if key not in step.rows:
        step.rows[key] = _make_rows(table, cu_seqlens_k, page_size, window_left)
    return step.rows[key]


def _make_rows(table: torch.Tensor, cu_seqlens_k: torch.Tensor, page_size: int, window_left: int | None) -> DecodePlan:
    num_seqs = table.shape[0]
    seq_lens = cu_seqlens_k.diff()[:num_seqs].to(torch.int32)
    last = (seq_lens - 1).clamp(min=0).long()
    page = table.gather(1, (last // page_size)[:, None]).squeeze(1).long()
    # A sequence that only pads the batch has no tokens or no block.
    slots = torch.where((seq_lens > 0) & (page >= 0), page * page_size + last % page_size, -1)
    seq_lens = torch.where(slots >= 0, seq_lens, 0)
    cu_seqlens_q = torch.arange(num_seqs + 1, dtype=torch.int32, device=table.device)
    plan = StepSplitPlans().get(table, seq_lens, cu_seqlens_q, 1, page_size, window_left)
    return DecodePlan(slots, seq_lens, cu_seqlens_q, plan)


def attend_batched(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Any,
    options: AttentionOptions,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """A step of transformers' continuous batching: one row ``[1, H, T, D]`` of packed sequences."""
    dtype, new_key, new_value = query.dtype, key, value
    if is_batching_cache(cache) and kwargs.get("block_table") is None:
        # It has the dtype of the weights, whatever autocast says.
        query, key, value = (x.to(cache.dtype) for x in (query, key, value))
    key, value = batching_update(cache if is_batching_cache(cache) else None, module, key, value, kwargs)
    if kwargs.get("block_table") is None:
        # Prefill and mixed steps: transformers has gathered the keys through its read_index. It is not read in place:
        # it names single tokens, not pages, the tensors it indexes are private in every version, and the slots of a
        # window layer may be overwritten by this step's own tokens.
        lengths = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        return packed(query, key, value, *lengths, options, kwargs.get("max_length_q")).to(dtype)
    # Decode: one new token a sequence, written and read in place through the block table.
    k_pages, v_pages = (kwargs[name].transpose(1, 2) for name in ("k_cache", "v_cache"))
    check_pages(k_pages, v_pages)
    q, k, v = (contiguous_rows(x.squeeze(0).transpose(0, 1).to(k_pages.dtype)) for x in (query, new_key, new_value))
    table, page_size = kwargs["block_table"], k_pages.shape[2]
    rows = decode_rows(
        kwargs["cu_seq_lens_q"], module.layer_idx, table, kwargs["cu_seq_lens_k"], page_size, options.left
    )
    write_pages_op(k, v, k_pages, v_pages, rows.slots, None, None)
    out, _ = paged_attention_op(
        q, k_pages, v_pages, table, rows.seq_lens, rows.cu_seqlens_q, 1, options.left, options.right,
        options.softcap, options.sinks, options.scale, None, None, rows.plan,
    )  # fmt: skip
    return out.unsqueeze(0).to(dtype)
