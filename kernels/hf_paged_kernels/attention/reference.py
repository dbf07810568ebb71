"""Plain PyTorch references: what every kernel must compute, written to be obviously right.

They are also what CPU tensors take. Everything runs in at least float32; float64 inputs stay float64.
"""

import math
from itertools import pairwise
from typing import Any

import torch

from ..settings import (
    ITEM_NUMBERS,
    LARGEST,
    LONG_SHORT_QUERY,
    LONG_SPREAD,
    MAX_SPLITS,
    SHORTEST_SPLIT,
    hadamard_bits,
    split_plan_size,
)

ROWS_AT_A_TIME = 1024


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence: q ``[Lq, Hq, D]``, k ``[Lk, Hk, D]``, v ``[Lk, Hk, Dv]``.

    The last query sits on the last key. Query position p sees keys ``p - window_left .. p + window_right``; None is no
    bound. A caller may leave out leading keys that no query sees: only distances count.

    Returns:
        ``(out [Lq, Hq, Dv] in q's dtype, lse [Hq, Lq] float32)``; a row without keys gives zeros and -inf.
    """
    num_queries, num_q_heads, _ = q.shape
    num_keys, _, v_dim = v.shape
    out = q.new_empty(num_queries, num_q_heads, v_dim)
    lse = q.new_empty(num_q_heads, num_queries, dtype=torch.float32)
    # Rows are independent: taking them in chunks keeps memory linear in the number of keys.
    for first in range(0, num_queries, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        hidden = hidden_keys(rows, num_queries, num_keys, window_left, window_right, q.device)
        out[rows], lse[:, rows] = attend_rows(q[rows], k, v, hidden, softcap, sinks, scale)
    return out, lse


def hidden_keys(
    rows: slice,
    num_queries: int,
    num_keys: int,
    window_left: int | None,
    window_right: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Bool ``[rows, num_keys]``: keys that the query rows do not see; the last query sits on the last key."""
    positions = torch.arange(num_queries, device=device)[rows] + (num_keys - num_queries)
    distance = positions[:, None] - torch.arange(num_keys, device=device)  # > 0: the key is to the left
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window_left is not None:
        hidden |= distance > window_left
    if window_right is not None:
        hidden |= distance < -window_right
    return hidden


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with any mask: q ``[Lq, Hq, D]``, k ``[Lk, Hk, D]``, v ``[Lk, Hk, Dv]``, hidden bool ``[Lq, Lk]``.

    ``bias`` ``[1 or Hq, Lq, Lk]`` is added to the scores after the softcap; -inf hides a key.

    Returns:
        As :func:`attend`.
    """
    num_queries, num_q_heads, _ = q.shape
    num_keys, num_kv_heads, v_dim = v.shape
    group = num_q_heads // num_kv_heads
    compute = torch.promote_types(q.dtype, torch.float32)
    # [Hk, group, Lq, Lk]: query head h reads key/value head h // group.
    queries = q.to(compute).view(num_queries, num_kv_heads, group, -1).permute(1, 2, 0, 3)
    scores = queries @ k.to(compute).permute(1, 2, 0)[:, None] * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        bias = bias.to(compute).expand(num_q_heads, num_queries, num_keys)
        scores = scores + bias.view(num_kv_heads, group, num_queries, num_keys)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        sink = sinks.to(compute).view(num_kv_heads, group, 1, 1).expand(-1, -1, num_queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights, lse = softmax_rows(scores)
    out = weights[..., :num_keys] @ v.to(compute).permute(1, 0, 2)[:, None]
    out = out.permute(2, 0, 1, 3).reshape(num_queries, num_q_heads, v_dim)
    return out.to(q.dtype), lse.reshape(num_q_heads, num_queries).float()


def softmax_rows(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of the last dimension, and its log-sum-exp; zeros and -inf where nothing is above -inf.

    Not ``exp(scores - lse)``: where scores are large, their log-sum-exp has no digits left for the number of them, and
    such weights do not sum to 1.
    """
    lse = torch.logsumexp(scores, dim=-1)
    return torch.softmax(scores, dim=-1).masked_fill((lse == -math.inf)[..., None], 0.0), lse


def flash_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence; arguments and results as ``flash_attention_launch``."""
    rest = (window_left, window_right, softcap, sinks, scale)
    if cu_seqlens_q is None:
        results = [attend(q[b], k[b], v[b], *rest) for b in range(q.shape[0])]
        if not results:
            return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(0, q.shape[2], q.shape[1], dtype=torch.float32)
        return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])
    assert cu_seqlens_k is not None
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_bounds) - 1):
        rows, keys = slice(*q_bounds[i : i + 2]), slice(*k_bounds[i : i + 2])
        out[rows], lse[:, rows] = attend(q[rows], k[keys], v[keys], *rest)
    return out, lse


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attend`: dout ``[Lq, Hq, Dv]``, dlse ``[Hq, Lq]`` or None.

    Returns:
        ``(dq, dk, dv, dsinks [Hq])`` in the dtype of computation; dsinks is of use only with sinks.
    """
    num_queries, num_q_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    compute = torch.promote_types(q.dtype, torch.float32)
    # [Hk, Lk, D], [Hk, Lk, Dv]
    keys, values = (x.to(compute).transpose(0, 1) for x in (k, v))
    dq, dk, dv = (torch.zeros(x.shape, dtype=compute, device=q.device) for x in (q, keys, values))
    dsinks = torch.zeros(num_q_heads, dtype=compute, device=q.device)
    for first in range(0, num_queries, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        # [Hk, group, rows, *]: query head h reads key/value head h // group.
        queries, grads = (
            x[rows].to(compute).unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3) for x in (q, dout)
        )
        logits = queries @ keys[:, None].mT * scale
        slope = 1.0
        if softcap is not None:
            slope = 1.0 - torch.tanh(logits / softcap) ** 2
            logits = softcap * torch.tanh(logits / softcap)
        hidden = hidden_keys(rows, num_queries, num_keys, window_left, window_right, q.device)
        scores = logits.masked_fill(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.to(compute).view(num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        every_weight, _ = softmax_rows(scores)
        weights = every_weight[..., :num_keys]
        grad_weights = grads @ values[:, None].mT
        delta = (weights * grad_weights).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, rows].to(compute).unflatten(0, (num_kv_heads, group))
        dv += (weights.mT @ grads).sum(1)
        dscores = weights * (grad_weights - delta[..., None]) * slope
        dk += (dscores.mT @ queries).sum(1) * scale
        dq[rows] = (dscores @ keys[:, None] * scale).permute(2, 0, 1, 3).flatten(1, 2)
        if sinks is not None:
            dsinks -= (every_weight[..., num_keys] * delta).flatten(0, 1).sum(1)
    return dq, dk.transpose(0, 1), dv.transpose(0, 1), dsinks


def flash_attention_backward_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sequence by sequence; arguments and results as ``flash_attention_backward_launch``.

    What the forward pass left, ``out`` and ``lse``, is computed again, without their rounding.
    """
    rest = (window_left, window_right, softcap, sinks, scale)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dsinks = None if sinks is None else q.new_zeros(q.shape[-2], dtype=torch.float32)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        # Indices of one sequence after another: of q, dout, dq; of k, v, dk, dv; of dlse.
        sequences: list[Any] = [(b, b, b) for b in range(q.shape[0])]
    else:
        ends = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()))
        sequences = [(slice(*rows), slice(*keys), (slice(None), slice(*rows))) for rows, keys in ends]
    for i, j, row in sequences:
        row_dlse = None if dlse is None else dlse[row]
        grads = attend_backward(q[i], k[j], v[j], dout[i], row_dlse, *rest)
        dq[i], dk[j], dv[j] = grads[:3]
        if dsinks is not None:
            dsinks += grads[3]
    return dq, dk, dv, dsinks


def paged_attention_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence over gathered pages; arguments and results as ``paged_attention_launch``."""
    page_size = k_pages.shape[2]
    rotated_q = hadamard(q, hadamard_bits(k_pages.dtype, q.shape[-1]))
    out = q.new_empty(*q.shape[:2], v_pages.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    bounds = cu_seqlens_q.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(*bounds[i : i + 2])
        query_len = rows.stop - rows.start
        if query_len == 0:
            continue
        # Pages wholly to the left of the first query's window may have been given back: never read them.
        first_key = 0 if window_left is None else max(0, seq_len - query_len - window_left)
        first_page = first_key // page_size
        pages = page_table[i, first_page : -(-seq_len // page_size)].long()
        held = slice(first_key - first_page * page_size, seq_len - first_page * page_size)
        keys, values = (
            dequantize(x[pages], None if s is None else s[pages], rotated_q.dtype).transpose(1, 2).flatten(0, 1)[held]
            for x, s in ((k_pages, k_scale), (v_pages, v_scale))
        )
        out[rows], lse[:, rows] = attend(
            rotated_q[rows], keys, values, window_left, window_right, softcap, sinks, scale
        )
    return out, lse


def write_pages_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Token by token in effect: ``k_pages[slot // page_size, :, slot % page_size] = k[token]`` where slot >= 0."""
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    page, offset = slots // k_pages.shape[2], slots % k_pages.shape[2]
    key = hadamard(k[written], hadamard_bits(k_pages.dtype, k.shape[-1]))
    for new, pages, scales in ((key, k_pages, k_scale), (v[written], v_pages, v_scale)):
        if scales is not None:
            new, new_scales = quantize(new, pages.dtype)
            scales[page, :, offset] = new_scales
        _store(pages, page, offset, new.to(pages.dtype))


def _store(pages: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, new: torch.Tensor) -> None:
    if pages.dtype == torch.float8_e4m3fn:
        # PyTorch has no indexed assignment of FP8 on CPU; the bytes are the same.
        pages, new = pages.view(torch.uint8), new.view(torch.uint8)
    pages[page, :, offset] = new


def hadamard(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each run of R = 2^bits numbers of ``[..., D]`` times the Hadamard matrix of that size over sqrt(R).

    The matrix is symmetric and its own inverse: twice is once back. The result is at least float32; with 0 bits it is
    ``x`` itself. The fast Walsh-Hadamard transform adds in the order of the kernels.
    """
    if bits == 0:
        return x
    size = 2**bits
    y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, size))
    for _ in range(bits):
        a, b = y[..., 0::2], y[..., 1::2]
        y = torch.cat([a + b, a - b], dim=-1)
    return (y * size**-0.5).flatten(-2)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., D]`` to ``(numbers of dtype, scales [...] float32)``, one scale per row; see ``pages_triton``."""
    x = x.float()
    highest = x.abs().amax(-1)
    scales = highest / LARGEST[dtype]
    # Also of a row so small that its scale is none: its numbers become zeros.
    scales = torch.where(scales == 0, 1.0, scales)
    # Pages have no infinity, and INT8 no NaN: the scale keeps either visible.
    scales = scales.masked_fill(~highest.isfinite(), math.nan)
    scaled = (x / scales[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def dequantize(pages: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Pages ``[..., D]`` and their scales ``[...]`` back to ``dtype``; without scales the pages as they are."""
    return pages if scales is None else (pages.float() * scales[..., None]).to(dtype)


def copy_pages_reference(
    k_pages: torch.Tensor, v_pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """``pages[target[i]] = pages[source[i]]`` for every i."""
    k_pages[target.long()] = k_pages[source.long()]
    v_pages[target.long()] = v_pages[source.long()]


def merge_attention_states_reference(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, with a side that saw no key left out even where it holds NaN."""
    compute = torch.promote_types(out_a.dtype, torch.float32)
    weights, lse = softmax_rows(torch.stack([lse_a, lse_b], dim=-1))
    out = torch.zeros(out_a.shape, dtype=compute, device=out_a.device)
    for i, (part, part_lse) in enumerate(((out_a, lse_a), (out_b, lse_b))):
        held = part.to(compute).masked_fill((part_lse == -math.inf).T[..., None], 0.0)
        out += held * weights[..., i].T[..., None].to(compute)
    return out.to(out_a.dtype), lse


def split_plan_reference(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, max_tokens: int, window_left: int | None
) -> torch.Tensor:
    """The split plan: see ``split_plan_triton``. Numbers that mean nothing are 0."""
    num_seqs = seq_lens.shape[0]
    items: list[list[int]] = []
    tails: list[list[int]] = []
    long_full: list[list[int]] = []
    long_tails: list[list[int]] = []
    sequences: list[int] = []
    place = 0
    full: dict[int, list[list[int]]] = {}
    for seq, (num_keys, query_len) in enumerate(zip(seq_lens.tolist(), cu_seqlens_q.diff().tolist())):
        length = SHORTEST_SPLIT if query_len < LONG_SHORT_QUERY else 1024
        while length < 1024 and length * 16 < num_keys:
            length *= 2
        while length * MAX_SPLITS < num_keys:
            length *= 2
        first = 0 if window_left is None else max(num_keys - query_len - window_left, 0) // length
        count = max(-(-num_keys // length) - first, 1) if query_len else 0
        for split in range(first, first + count):
            q_start = int(cu_seqlens_q[seq])
            item = [seq, split, place + (split - first) * query_len, count, q_start, query_len, num_keys, 0]
            is_full = (split + 1) * length <= num_keys
            if query_len >= LONG_SHORT_QUERY:
                (long_full if is_full else long_tails).append(item)
            else:
                (full.setdefault(min(length, 2048), []) if is_full else tails).append(item)
        sequences += [place, count]
        place += count * query_len
    for length in sorted(full, reverse=True):
        items += sorted(full[length])
    # The first of the long ones, a run of the others, the second long one, and so on.
    long = [*long_full, *long_tails]
    run = len(items) // max(1, LONG_SPREAD * len(long))
    spread = [item for i, one in enumerate(long) for item in (one, *items[i * run : (i + 1) * run])]
    items = [*spread, *items[run * len(long) :], *tails]
    plan = torch.zeros(split_plan_size(num_seqs, max_tokens), dtype=torch.int32)
    plan[0] = len(items)
    plan[4 : 4 + ITEM_NUMBERS * len(items)] = torch.tensor(items, dtype=torch.int32).flatten()
    plan[len(plan) - 2 * num_seqs :] = torch.tensor(sequences, dtype=torch.int32)
    return plan.to(seq_lens.device)
