"""Parts shared by the attention kernels: masks, softcap, the online softmax.

A query row at position ``p`` of its sequence sees the keys ``n`` with ``p - window_left <= n <= p + window_right`` and
``n < num_keys``. Causal attention is ``window_right = 0``; a bound that is absent is a constexpr flag, not a number.

Scores live in base 2: the launcher passes ``scale * log2(e)``, and every exponential is ``exp2``.
"""

import triton
import triton.language as tl


@triton.jit
def key_bounds(
    first_position,
    last_position,
    num_keys,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Return ``(start, stop)``: the keys that at least one of the query rows first..last sees."""
    start = first_position * 0
    if HAS_LEFT:
        start = tl.maximum(first_position - window_left, 0)
    stop = num_keys
    if HAS_RIGHT:
        stop = tl.minimum(last_position + window_right + 1, num_keys)
    return start, stop


@triton.jit
def unmasked_bounds(
    first_position,
    last_position,
    start,
    stop,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return ``(full_start, full_stop)``, whole tiles of keys inside start..stop that every row first..last sees.

    Both are ``start`` plus a multiple of BLOCK_N, with ``start <= full_start <= full_stop``; the caller masks what is
    outside of them.
    """
    full_start = start
    if HAS_LEFT:
        missing = tl.maximum(last_position - window_left, 0) - start
        full_start = start + tl.cdiv(tl.maximum(missing, 0), BLOCK_N) * BLOCK_N
    visible_stop = stop
    if HAS_RIGHT:
        visible_stop = tl.minimum(first_position + window_right + 1, stop)
    full_stop = start + tl.maximum(visible_stop - start, 0) // BLOCK_N * BLOCK_N
    return full_start, tl.maximum(full_stop, full_start)


@triton.jit
def visible_mask(
    positions,
    keys,
    stop,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Boolean ``[rows, keys]``: which key each query row sees. ``positions`` [rows], ``keys`` [keys]."""
    mask = (keys < stop)[None, :]
    if HAS_LEFT:
        mask = mask & (keys[None, :] >= positions[:, None] - window_left)
    if HAS_RIGHT:
        mask = mask & (keys[None, :] <= positions[:, None] + window_right)
    return mask


@triton.jit
def scale_scores(scores, scale_log2, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw dot products to base-2 logits. With a softcap: ``softcap * tanh(scale * s / softcap)`` (Gemma 2)."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), safe at both ends. scale_log2 is 2 * scale / softcap * log2(e) here.
        capped = softcap * (1.0 - 2.0 / (tl.exp2(scores * scale_log2) + 1.0))
        return capped * 1.4426950408889634
    return scores * scale_log2


@triton.jit
def online_softmax_update(scores, running_max, running_sum):
    """One step of the online softmax (Milakov and Gimelshein 2018), base 2.

    ``scores`` [rows, keys] with -inf where masked. Returns ``(weights, correction, running_max, running_sum)``; the
    caller must still scale its accumulator by ``correction`` and add ``weights @ values``.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; a finite pivot keeps exp2(-inf - -inf) out of the tile.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - pivot[:, None])
    correction = tl.exp2(running_max - pivot)
    return weights, correction, new_max, running_sum * correction + tl.sum(weights, 1)


@triton.jit
def finish_softmax(accumulator, running_max, running_sum):
    """Return ``(out [rows, v_dim], lse [rows], natural log)``; rows with neither key nor sink give zeros and -inf.

    A NaN among the sums stays one: it is not an empty row.
    """
    empty = running_sum == 0.0
    out = accumulator / tl.where(empty, 1.0, running_sum)[:, None]
    log_sum = (running_max + tl.log2(tl.where(empty, 1.0, running_sum))) * 0.6931471805599453
    lse = tl.where(empty, float("-inf"), log_sum)
    return out, lse


@triton.jit
def add_sink(accumulator, running_max, running_sum, sink_log2):
    """Let a learned logit per row (base 2) take part in the softmax without a value (gpt-oss attention sinks)."""
    new_max = tl.maximum(running_max, sink_log2)
    # Without keys, beside a sink of -inf, there is nothing to sum: a finite pivot keeps NaN out of the row.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    correction = tl.exp2(running_max - pivot)
    return accumulator * correction[:, None], new_max, running_sum * correction + tl.exp2(sink_log2 - pivot)


@triton.jit
def find_sequence(cu_seqlens_q, block, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence that query block ``block`` belongs to, for blocks that never cross sequences. BLOCK_Q 0: that of a
    token, the last one that starts at or before it; empty sequences share their start with the next.

    Sequence ``s`` owns the blocks from ``first(s) = cu_seqlens_q[s] // BLOCK_Q + s`` up to ``first(s + 1)``. That is
    at least ``ceil(length / BLOCK_Q)`` blocks, since floor(a + n) - floor(a) + 1 >= ceil(n); the last may be empty. So
    ``num_tokens // BLOCK_Q + num_seqs`` programs are enough whatever the lengths are: a static grid.
    """
    low = block * 0
    high = num_seqs + low
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(cu_seqlens_q + middle)
        if BLOCK_Q > 0:
            first = first // BLOCK_Q + middle
        if first <= block:
            low = middle
        else:
            high = middle
    return low
