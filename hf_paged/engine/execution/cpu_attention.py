"""Paged attention on a CPU by PyTorch's own attention: decode rows in groups of similar length, prompts one by one.

What it computes is ``paged_attention_op``'s result within rounding; on a CPU that op is the plain reference, which is
written to be read and several times slower. Softcaps, sinks and quantised pages go to the reference.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...paging import LayerPages

ROWS_TOGETHER, CALL_PAGES = 16, 16
"""Decode rows of one call at most, and pages whose gathering takes about as long as a call by itself."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows whose queries attend in one call.

    Attributes:
        queries: int64 ``[num_rows, query_len]``, their tokens in the packed step.
        pages: int64 ``[num_rows * width]``, page ids; rows that need fewer repeat their last one.
        width: pages of each row.
        visible: bool ``[num_rows, 1, query_len, width * page_size]``; None: causal from the first key on.
    """

    queries: torch.Tensor
    pages: torch.Tensor
    width: int
    visible: torch.Tensor | None


def plan_groups(
    page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, page_size: int, left: int | None
) -> list[RowGroup]:
    """The groups of a step, the same for all layers with one page table and window.

    Args:
        page_table: int32 ``[num_rows, width]``.
        seq_lens: int32 ``[num_rows]``, with the new tokens.
        cu_seqlens_q: int32 ``[num_rows + 1]``.
        left: keys that a query sees before its own, None: all.
    """
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    counts = [last - first for first, last in pairwise(bounds)]
    # A row without tokens only fills up a batch.
    decode = sorted((row for row, count in enumerate(counts) if count == 1 and lengths[row]), key=lengths.__getitem__)
    most = page_table.shape[1] if left is None else left // page_size + 2
    groups = _rows_together(decode, [min(most, -(-length // page_size)) for length in lengths])
    groups += [[row] for row, count in enumerate(counts) if count > 1 and lengths[row]]
    return [_group(page_table, lengths, bounds, rows, counts[rows[0]], page_size, left) for rows in groups]


def _rows_together(rows: list[int], num_pages: list[int]) -> list[list[int]]:
    """Groups of rows, shortest first: all rows of a group gather as many pages as its longest one, so that a long row
    among short ones would make all of them as slow.

    Args:
        rows: sorted by length.
        num_pages: of each row of the step.
    """
    groups: list[list[int]] = []
    used = 0
    for row in rows:
        pages = num_pages[row]
        gathered = (len(groups[-1]) + 1) * pages if groups else 0
        if not groups or len(groups[-1]) == ROWS_TOGETHER or gathered > 2 * (used + pages) + CALL_PAGES:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += pages
    return groups


def _group(
    page_table: torch.Tensor, lengths: list[int], bounds: list[int], rows: list[int], count: int, page_size: int,
    left: int | None,
) -> RowGroup:  # fmt: skip
    last = torch.tensor([lengths[row] for row in rows])  # behind the last query
    first = torch.tensor([bounds[row] for row in rows])
    queries = first[:, None] + torch.arange(count)
    start = torch.zeros_like(last) if left is None else (last - count - left).clamp(min=0) // page_size
    ends = (last + page_size - 1) // page_size
    width = int((ends - start).max())
    columns = torch.minimum(start[:, None] + torch.arange(width), ends[:, None] - 1)
    pages = page_table[torch.tensor(rows)[:, None], columns].long().flatten()
    if count > 1 and count == lengths[rows[0]] and (left is None or left >= count):
        return RowGroup(queries, pages, width, None)
    keys = (start * page_size)[:, None] + torch.arange(width * page_size)
    positions = (last - count)[:, None] + torch.arange(count)
    visible = keys[:, None, :] <= positions[:, :, None]
    if left is not None:
        visible &= keys[:, None, :] >= positions[:, :, None] - left
    return RowGroup(queries, pages, width, visible[:, None])


def attend_groups(query: torch.Tensor, pages: LayerPages, groups: list[RowGroup], scale: float) -> torch.Tensor:
    """Attention of packed queries ``[T, Hq, D]``: ``[T, Hq, Dv]``."""
    num_kv_heads, page_size = pages.k.shape[1:3]
    out = query.new_zeros(*query.shape[:2], pages.v.shape[3])
    for group in groups:
        num_rows, query_len = group.queries.shape
        keys, values = (
            # [num_rows, width, H, page_size, D] -> [num_rows, H, width * page_size, D]
            x.index_select(0, group.pages)
            .view(num_rows, group.width, num_kv_heads, page_size, -1)
            .transpose(1, 2)
            .flatten(2, 3)
            for x in (pages.k, pages.v)
        )
        q = query[group.queries].transpose(1, 2)  # [num_rows, Hq, query_len, D]
        if group.visible is None:
            # Causal from the first key on: nothing behind the last query is there to see.
            keys, values = keys[:, :, :query_len], values[:, :, :query_len]
        if query_len == 1:
            # One query: the heads that share a key head are as good as queries of it.
            q = q.reshape(num_rows, num_kv_heads, -1, q.shape[-1])
        how = dict(is_causal=group.visible is None, scale=scale, enable_gqa=q.shape[1] != num_kv_heads)
        attended = scaled_dot_product_attention(q, keys, values, attn_mask=group.visible, **how)
        if group.visible is not None and not attended.isfinite().all():
            # Behind its last token a page has what an earlier sequence left, which may be NaN, and NaN times 0 is NaN.
            hidden = ~group.visible.any(2)[..., None]
            keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
            attended = scaled_dot_product_attention(q, keys, values, attn_mask=group.visible, **how)
        out[group.queries] = attended.reshape(num_rows, query.shape[1], query_len, -1).transpose(1, 2)
    return out
