"""Low-rank products of tokens that have different adapters, in Triton: shrink, then expand.

    shrink   partials[s, t, r] = sum_k x[t, k] A[r, k]        k in the s-th run of SPLIT_K columns
    expand   out[t, n] = base[t, n] + scaling sum_r (sum_s partials[s, t, r]) B[n, r]

A program has a tile of tokens, and goes through the pairs of matrices; it computes with those that tokens of the tile
have, for all of the tile, and keeps the rows that are theirs::

    token      0  1  2  3  4  5          tokens of a prompt are neighbours, so most tiles of large steps
    pair       2  2  0  -  2  0          have one pair; tiles of decode steps have few tokens
    computed   0: rows 2 5    2: rows 0 1 4

The matrices lie where they are, in tensors of their own: a table has their addresses and ranks. How a token's sums are
ordered follows from K and the ranks alone.
"""

import torch
import triton
import triton.language as tl

from ..backend import contiguous_rows, device_guard
from ..launch_triton import launch
from ..settings import cdiv, next_power_of_2

SPLIT_K = 512
"""Columns of x that one program of the shrink kernel adds up: rows of decode steps occupy more of the device."""
BLOCK_K, BLOCK_N, MAX_BLOCK_R = 64, 64, 64
FEW_TOKENS = 128
"""Up to so many, tiles have the fewest rows that tensor cores take."""


@triton.jit
def _pairs_of(adapters, pairs, tokens, num_tokens):
    """The adapter of each token and its pair, -1: none."""
    adapter = tl.load(adapters + tokens, mask=tokens < num_tokens, other=-1)
    return adapter, tl.load(pairs + adapter, mask=adapter >= 0, other=-1)


@triton.jit
def _matrix(table, pair, COLUMN: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the matrix A (column 0) or B (column 1) of a pair, and the pair's rank."""
    pointer = tl.load(table + pair * 3 + COLUMN).to(tl.pointer_type(ELEMENT))
    rank = tl.load(table + pair * 3 + 2)
    if ALIGNED:
        pointer, rank = tl.multiple_of(pointer, 16), tl.multiple_of(rank, 8)
    return pointer, rank


@triton.jit(do_not_specialize=["num_tokens", "num_pairs"])
def _lora_shrink(
    x,
    adapters,
    pairs,
    table,
    first,
    partials,
    num_tokens,
    num_pairs,
    stride_x,
    K,
    MAX_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program: a tile of tokens, a run of columns, a block of ranks. ``first`` has the dtype of the matrices."""
    element: tl.constexpr = first.dtype.element_ty
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * SPLIT_K
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    _, own = _pairs_of(adapters, pairs, tokens, num_tokens)
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for pair in range(num_pairs):
        mine = own == pair
        if tl.max(mine.to(tl.int32), 0) > 0:
            matrix, rank = _matrix(table, pair, 0, element, ALIGNED)
            product = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for offset in range(0, SPLIT_K, BLOCK_K):
                columns = start + offset + tl.arange(0, BLOCK_K)
                held = columns < K
                values = tl.load(x_rows + columns[None, :], mask=mine[:, None] & held[None, :], other=0.0)
                weights = tl.load(
                    matrix + ranks.to(tl.int64)[:, None] * K + columns[None, :],
                    mask=(ranks < rank)[:, None] & held[None, :],
                    other=0.0,
                )
                product = tl.dot(values.to(element), tl.trans(weights), product, input_precision="ieee")
            total = tl.where(mine[:, None], product, total)
    # int64: runs times tokens times ranks.
    row = tl.program_id(1).to(tl.int64) * num_tokens + tokens
    tl.store(
        partials + row[:, None] * MAX_R + ranks[None, :], total, mask=(own >= 0)[:, None] & (ranks < MAX_R)[None, :]
    )


@triton.jit(do_not_specialize=["num_tokens", "num_pairs"])
def _lora_expand(
    base,
    adapters,
    pairs,
    scaling,
    table,
    first,
    partials,
    out,
    num_tokens,
    num_pairs,
    stride_base,
    N,
    NUM_SPLITS: tl.constexpr,
    MAX_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program: a tile of tokens, a block of columns."""
    element: tl.constexpr = first.dtype.element_ty
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter, own = _pairs_of(adapters, pairs, tokens, num_tokens)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for pair in range(num_pairs):
        mine = own == pair
        if tl.max(mine.to(tl.int32), 0) > 0:
            matrix, rank = _matrix(table, pair, 1, element, ALIGNED)
            product = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for offset in range(0, MAX_R, BLOCK_R):
                ranks = offset + tl.arange(0, BLOCK_R)
                held = ranks < rank
                low = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
                for split in range(NUM_SPLITS):
                    row = tl.cast(split, tl.int64) * num_tokens + tokens
                    low += tl.load(
                        partials + row[:, None] * MAX_R + ranks[None, :], mask=mine[:, None] & held[None, :], other=0.0
                    )
                weights = tl.load(
                    matrix + columns.to(tl.int64)[:, None] * rank + ranks[None, :],
                    mask=(columns < N)[:, None] & held[None, :],
                    other=0.0,
                )
                product = tl.dot(low.to(element), tl.trans(weights), product, input_precision="ieee")
            total = tl.where(mine[:, None], product, total)
    factor = tl.load(scaling + adapter, mask=own >= 0, other=0.0).to(tl.float32)
    mask = (tokens < num_tokens)[:, None] & (columns < N)[None, :]
    before = tl.load(
        base + tokens.to(tl.int64)[:, None] * stride_base + columns[None, :], mask=mask, other=0.0
    )
    # What has no adapter stays as it is.
    added = (before.to(tl.float32) + total * factor[:, None]).to(out.dtype.element_ty)
    result = tl.where((own >= 0)[:, None], added, before)
    tl.store(out + tokens.to(tl.int64)[:, None] * N + columns[None, :], result, mask=mask)


def lora_linear_launch(
    x: torch.Tensor,
    base: torch.Tensor,
    adapters: torch.Tensor,
    pairs: torch.Tensor,
    scaling: torch.Tensor,
    table: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
) -> torch.Tensor:
    """Launch on checked arguments; see :func:`hf_paged_kernels.linear.lora.lora_linear_op`."""
    (num_tokens, k), n = x.shape, base.shape[1]
    out = torch.empty(num_tokens, n, dtype=base.dtype, device=base.device)
    if not out.numel():
        return out
    x, base = contiguous_rows(x), contiguous_rows(base)
    max_r = max(len(matrix) for matrix in a)
    block_r = min(MAX_BLOCK_R, max(16, next_power_of_2(max_r)))
    block_t = 16 if num_tokens <= FEW_TOKENS else 64
    num_splits, tiles = cdiv(k, SPLIT_K), cdiv(num_tokens, block_t)
    partials = torch.empty(num_splits, num_tokens, max_r, dtype=torch.float32, device=x.device)
    # Reads of 16 bytes need rows that begin at multiples of so many. What K is the compiler sees.
    is_aligned = all(matrix.data_ptr() % 16 == 0 for matrix in (*a, *b)) and all(len(matrix) % 8 == 0 for matrix in a)
    shared = dict(MAX_R=max_r, BLOCK_T=block_t, BLOCK_R=block_r, ALIGNED=is_aligned, num_warps=4)
    with device_guard(x):
        launch(
            _lora_shrink, (tiles, num_splits, cdiv(max_r, block_r)),
            x, adapters, pairs, table, a[0], partials, num_tokens, len(a), x.stride(0), k,
            BLOCK_K=BLOCK_K, SPLIT_K=SPLIT_K, **shared,
        )  # fmt: skip
        launch(
            _lora_expand, (tiles, cdiv(n, BLOCK_N)),
            base, adapters, pairs, scaling, table, a[0], partials, out, num_tokens, len(a), base.stride(0), n,
            NUM_SPLITS=num_splits, BLOCK_N=BLOCK_N, **shared,
        )  # fmt: skip
    return out
