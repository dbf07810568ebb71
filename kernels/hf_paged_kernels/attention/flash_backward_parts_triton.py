"""Parts of the backward pass that its kernels share, and the passes over rows before and after them.

A row's statistics, lse in base 2 and delta, live in buffers of their own. Sequence s starts at slot
``(cu_seqlens_q[s] // ALIGN + s) * ALIGN`` of them. ALIGN is 4, since a tensor descriptor reads from whole 16 bytes::

    rows    0 1 2 3 4|0 1 2|0 1 ...
    slots   0 1 2 3 4 . . .|0 1 2 . . . . .|0 1 ...

or a whole block of queries.
"""

import triton
import triton.language as tl

from ..settings import cdiv
from .primitives_triton import find_sequence, key_bounds


def count_blocks(block: int, seqlen: int, num_seqs: int, varlen: bool) -> int:
    """Blocks of ``block`` tokens of a head; packed, an upper bound that needs no length: ``find_sequence``."""
    return seqlen // block + num_seqs if varlen else cdiv(seqlen, block)


@triton.jit
def find_block(cu_seqlens, num_seqs, first_batch, place, places, BLOCK: tl.constexpr, VARLEN: tl.constexpr):
    """Return ``(sequence, batch, block, blocks)``: what this program works on, and how many blocks there may be.

    ``batch`` is the index of the tensors' first dimension, which packed tensors have only one of; ``first_batch`` that
    of the launch's first one. ``place`` is the program's among the ``places`` of all sequences' blocks.
    """
    batch = first_batch + tl.program_id(2)
    if VARLEN:
        sequence = find_sequence(cu_seqlens, place, num_seqs, BLOCK)
        first = tl.load(cu_seqlens + sequence) // BLOCK + sequence
        stop = tl.load(cu_seqlens + sequence + 1) // BLOCK + sequence + 1
    else:
        sequence = batch
        first = batch * 0
        stop = places + first
    return sequence, batch, place - first, stop - first


@triton.jit
def find_tokens(cu_seqlens, seqlen, sequence, VARLEN: tl.constexpr):
    """Return ``(first token in the packed axis, tokens)`` of a sequence; dense: ``(0, seqlen)``."""
    if VARLEN:
        first = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - first
    else:
        first = sequence * 0
        length = seqlen + first
    return first, length


@triton.jit
def find_stats(q_start, sequence, VARLEN: tl.constexpr, ALIGN: tl.constexpr = 4):
    """First slot of a sequence in lse_log2 and delta. Slots of sequences are a multiple of ALIGN apart."""
    if VARLEN:
        slot = (q_start // ALIGN + sequence) * ALIGN
    else:
        slot = q_start
    return slot


@triton.jit(do_not_specialize=["num_seqs", "num_heads", "seqlen_q", "first_batch", "lse_stride_b", "lse_stride_h"])
def row_sums(
    out,
    dout,
    lse,
    dlse,
    lse_log2,
    delta,
    sums,
    cu_seqlens_q,
    num_seqs,
    num_heads,
    seqlen_q,
    first_batch,
    out_strides,
    dout_strides,
    lse_stride_b,
    lse_stride_h,
    stats_strides,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """delta, and lse in base 2. A row that saw no key, or is none, has lse +inf: its weights are exp2(-inf) = 0.

    With ``sums``, what delta has beside products goes there: the kernel of dq adds them, see there.
    """
    # Heads side by side: so lie the rows of a token.
    place, places = tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    sequence, batch_index, block, _ = find_block(cu_seqlens_q, num_seqs, first_batch, place, places, BLOCK_M, VARLEN)
    q_start, num_queries = find_tokens(cu_seqlens_q, seqlen_q, sequence, VARLEN)
    if block * BLOCK_M >= num_queries:
        return
    head = tl.cast(tl.program_id(0) % num_heads, tl.int64)
    batch = tl.cast(batch_index, tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    tokens = (q_start + offs_m).to(tl.int64)
    held = offs_m < num_queries
    # [BLOCK_M, BLOCK_DV]
    out_tile = out + batch * out_strides[0] + head * out_strides[2] + tokens[:, None] * out_strides[1]
    dout_tile = dout + batch * dout_strides[0] + head * dout_strides[2] + tokens[:, None] * dout_strides[1]
    mask = held[:, None] & (offs_dv < V_DIM)[None, :]
    result = tl.load(out_tile + offs_dv[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dout_tile + offs_dv[None, :], mask=mask, other=0.0).to(tl.float32)
    row_delta = tl.sum(result * grad, 1)
    rest = tl.zeros([BLOCK_M], tl.float32)
    at = batch * lse_stride_b + head * lse_stride_h + tokens
    row_lse = tl.load(lse + at, mask=held, other=float("-inf"))
    if HAS_DLSE:
        rest = -tl.load(dlse + at, mask=held, other=0.0)
        row_delta += rest
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * 1.4426950408889634)
    # A descriptor may read on to the last slot of the last 16 bytes, or of the last block.
    slots = batch * stats_strides[0] + head * stats_strides[1] + find_stats(q_start, sequence, VARLEN, ALIGN) + offs_m
    written = offs_m < tl.cdiv(num_queries, ALIGN) * ALIGN
    tl.store(lse_log2 + slots, row_lse, mask=written)
    tl.store(delta + slots, row_delta, mask=written)
    if sums is not None:
        tl.store(sums + slots, rest, mask=written)


@triton.jit(do_not_specialize=["num_seqs", "num_heads", "seqlen_q", "seqlen_k", "window_left", "window_right"])
def finish_queries(
    sums,
    dq,
    cu_seqlens_q,
    cu_seqlens_k,
    num_seqs,
    num_heads,
    seqlen_q,
    seqlen_k,
    first_batch,
    sums_strides,
    dq_strides,
    scale,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """dq from its float32 ``sums``, rows in slots of whole blocks. Blocks that see no key have none: zeros."""
    place, places = tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    sequence, batch_index, block, _ = find_block(cu_seqlens_q, num_seqs, first_batch, place, places, BLOCK_M, VARLEN)
    q_start, num_queries = find_tokens(cu_seqlens_q, seqlen_q, sequence, VARLEN)
    _k_start, num_keys = find_tokens(cu_seqlens_k, seqlen_k, sequence, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= num_queries:
        return
    head = tl.cast(tl.program_id(0) % num_heads, tl.int64)
    batch = tl.cast(batch_index, tl.int64)
    offset = num_keys - num_queries
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    start, stop = key_bounds(
        first_row + offset, last_row + offset, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    rows = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)[None, :]
    held = (rows < num_queries)[:, None]
    slots = (find_stats(q_start, sequence, VARLEN, BLOCK_M) + rows).to(tl.int64)[:, None]
    sums_tile = sums + batch * sums_strides[0] + head * sums_strides[1] + slots * HEAD_DIM + offs_d
    grad = tl.load(sums_tile, mask=held & (start < stop), other=0.0)
    tokens = (q_start + rows).to(tl.int64)[:, None]
    dq_tile = dq + batch * dq_strides[0] + head * dq_strides[2] + tokens * dq_strides[1] + offs_d
    tl.store(dq_tile, (grad * scale).to(dq.dtype.element_ty), mask=held)


@triton.jit
def run_bounds(start, full_start, full_stop, stop, run: tl.constexpr):
    """The first and last of the three runs are masked, the middle one is not."""
    if run == 0:
        bounds = start, tl.minimum(full_start, stop)
    elif run == 1:
        bounds = full_start, full_stop
    else:
        bounds = full_stop, stop
    return bounds


@triton.jit
def load_tile(tile, rows, stop, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Load ``[rows, BLOCK_DIM]``; zeros past ``stop`` where MASKED, and past DIM. ``tile`` points at column 0."""
    offs = tl.arange(0, BLOCK_DIM)
    if MASKED:
        loaded = tl.load(tile + offs[None, :], mask=(rows < stop)[:, None] & (offs < DIM)[None, :], other=0.0)
    elif DIM == BLOCK_DIM:
        loaded = tl.load(tile + offs[None, :])
    else:
        loaded = tl.load(tile + offs[None, :], mask=(offs < DIM)[None, :], other=0.0)
    return loaded


@triton.jit
def score_gradient(weights, grad_weights, logits_log2, softcap, HAS_SOFTCAP: tl.constexpr):
    """Gradient of ``scale * q @ k.T``; ``grad_weights`` has delta taken off."""
    gradient = weights * grad_weights
    if HAS_SOFTCAP:
        # d/dx softcap * tanh(x / softcap) = 1 - tanh^2; a hidden entry has weight 0.
        fraction = logits_log2 * (1.0 / (softcap * 1.4426950408889634))
        gradient = gradient * (1.0 - fraction * fraction)
    return gradient
