"""Inputs and an independent float64 answer for the kernel tests. Nothing here is shared with the package."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN anywhere makes it NaN, which no bound accepts."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Bounds of the relative error by input dtype: some times the rounding of one element (2^-24, 2^-11, 2^-8)."""


def softmax_attention(q, k, v, *, left, right, softcap, sinks, scale):
    """Float64 attention of one sequence, element by element from the definition: q [Lq, H, D], k, v [Lk, Hk, *]."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    lq, heads, _ = q.shape
    lk, kv_heads, _ = k.shape
    out = torch.zeros(lq, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, lq), float("-inf"), dtype=torch.float64)
    for i in range(lq):
        p = i + lk - lq
        first = 0 if left is None else max(0, p - left)
        last = lk - 1 if right is None else min(lk - 1, p + right)
        for h in range(heads):
            g = h * kv_heads // heads
            s = (k[first : last + 1, g] @ q[i, h]) * scale if last >= first else torch.empty(0, dtype=torch.float64)
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if sinks is not None:
                s = torch.cat([s, sinks[h].double().cpu().view(1)])
            if s.numel() == 0:
                continue
            w = torch.softmax(s, 0)
            n = last - first + 1 if last >= first else 0
            out[i, h] = w[:n] @ v[first : first + n, g]
            lse[h, i] = torch.logsumexp(s, 0)
    return out, lse


def make_pages(keys, values, page_size, layout="page-head", spare=3):
    """Scatter sequences into shuffled pages of a NaN-filled pool.

    Returns ``(k_pages, v_pages, page_table)``; unused pages, unused slots and unused table entries are poison.
    """
    device = keys[0].device
    counts = [-(-len(k) // page_size) for k in keys]
    total = sum(counts) + spare
    order = torch.randperm(total).tolist()
    heads = keys[0].shape[1]
    pools = []
    for x in (keys, values):
        dim = x[0].shape[-1]
        shape = (total, heads, page_size, dim) if layout == "page-head" else (total, page_size, heads, dim)
        pool = torch.full(shape, float("nan"), dtype=x[0].dtype, device=device)
        pools.append(pool if layout == "page-head" else pool.transpose(1, 2))
    table = torch.full((len(keys), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
    for row, (k, v, count) in enumerate(zip(keys, values, counts)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        for start, page in zip(range(0, len(k), page_size), pages):
            for pool, x in zip(pools, (k, v)):
                rows = x[start : start + page_size]
                pool[page, :, : len(rows)] = rows.transpose(0, 1)
    return pools[0], pools[1], table.to(device)


def rotation(page_dtype, dim):
    """Float64 ``[dim, dim]``, orthogonal: keys in pages are multiplied by it. The identity but for INT8 pages."""
    size = dim & -dim
    if page_dtype != torch.int8 or size < 16:
        return torch.eye(dim, dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return torch.block_diag(*[matrix / size**0.5] * (dim // size))


def held_keys(pages, scales):
    """Float64 keys that quantised pages ``[..., D]`` and their scales ``[...]`` stand for."""
    turned = pages.double() * scales.double()[..., None]
    return turned @ rotation(pages.dtype, pages.shape[-1]).T.to(pages.device)


def prefix_sums(lengths, device):
    """int32 prefix sums that start at 0."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
