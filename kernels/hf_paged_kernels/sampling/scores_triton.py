"""What the kernels of ``choose_triton`` compute of single tokens: their noise, scores, ranks and weights."""

import triton
import triton.language as tl

from . import reference

NO_TOKEN = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))
HIGHEST = tl.constexpr(float("inf"))
COUNT, PENALTY, PRESENCE, FREQUENCY, MASK_AT, COUNTS_AT, ENTRIES, MARKS, SEEN, BANNED, MOST_COUNTED = (
    tl.constexpr(getattr(reference, name))
    for name in (
        "COUNT", "PENALTY", "PRESENCE", "FREQUENCY", "MASK_AT", "COUNTS_AT", "ENTRIES", "MARKS", "SEEN", "BANNED",
        "MOST_COUNTED",
    )
)  # fmt: skip
NO_RULES, WITH_MARKS, WITH_COUNTS, WITH_MASK, MASK_IS_SPENT = (
    tl.constexpr(getattr(reference, name))
    for name in ("NO_RULES", "WITH_MARKS", "WITH_COUNTS", "WITH_MASK", "MASK_IS_SPENT")
)
TOKENS_OF_WORD = tl.constexpr(reference.TOKENS_OF_WORD)
"""The layout of a slot's rules."""


# Noise


@triton.jit
def _splitmix64(x):
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def noise_key(seed, position):
    """Low and high half of a row's key, uint32, from int64 scalars."""
    key = _splitmix64(_splitmix64(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_bits(ids, low, high):
    """The 32 random bits of tokens."""
    return _mix32(_mix32(ids.to(tl.uint32) ^ low) + high)


@triton.jit
def exact_noise(bits):
    u = (bits.to(tl.float64) + 0.5) * 2.0**-32
    return (-tl.log(-tl.log(u))).to(tl.float32)


@triton.jit
def fast_log2(x, FAST: tl.constexpr):
    """The base-2 logarithm of positive float32, in one instruction of an NVIDIA GPU if FAST: off by 2**-22 or less,
    relative to the result outside of (1/2, 2). The one of Triton takes thirteen."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def fast_exp2(x, FAST: tl.constexpr):
    """Two to the power of float32, in one instruction of an NVIDIA GPU if FAST: what is below 2**-126 is zero."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def approximate_noise(bits, FAST: tl.constexpr):
    """Within 4e-5 of :func:`exact_noise`.

    Near u = 1, where the largest noise is, a logarithm of u as float32 has no digits: -log(u) is a series in 1 - u
    there. Both are made to be no larger than it, so the larger one is right.
    """
    d = (bits ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + 2.0**-33
    u = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    series = d * (1 + d * (1 / 2 + d * (1 / 3)))
    return fast_log2(tl.maximum(series, fast_log2(u, FAST) * -LN2 - 2.0**-22), FAST) * -LN2


@triton.jit
def noise_bound(value):
    """Above the exact score plus noise whose approximation is ``value``, and monotonous in it.

    A score of size s is off by less than 2**-21 s, and s is no more than 23 above the value's own size.
    """
    return tl.where(value > LOWEST, value + (2.0**-13 + 2.0**-20 * tl.abs(value)), LOWEST)


# Scores


@triton.jit
def _number(place):
    """A float64 among the words of a slot's rules, as float32."""
    return tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def apply_rules(x, ids, position, row_rules, ruled):
    """Float32 logits ``x`` of tokens ``ids`` as the rules of the row's slot change them: see ``slot_rules``.

    What is -inf stays so: such tokens may be beyond the vocabulary.
    """
    y = x
    if ruled != 0:
        for i in range(tl.load(row_rules + COUNT).to(tl.int32)):
            entry = row_rules + ENTRIES + 3 * i
            packed = tl.load(entry)
            bias = packed.to(tl.int32).to(tl.float32, bitcast=True)
            if (position >= tl.load(entry + 1)) & (position < tl.load(entry + 2)):
                is_it = ids == (packed >> 32).to(tl.int32)
                y = tl.where(is_it, tl.where(bias > LOWEST, y + bias, LOWEST), y)
        if (ruled & WITH_MARKS) != 0:
            penalty = _number(row_rules + PENALTY)
            # As int32: sixteen tokens each, in the same order.
            row_marks = (row_rules + MARKS).to(tl.pointer_type(tl.int32))
            marks = tl.load(row_marks + (ids >> 4), mask=y > LOWEST, other=0) >> ((ids & 15) * 2)
            y = tl.where((marks & SEEN) != 0, tl.where(y < 0, y * penalty, tl.div_rn(y, penalty)), y)
            y = tl.where((marks & BANNED) != 0, LOWEST, y)
        if (ruled & WITH_COUNTS) != 0:
            row_counts = (row_rules + tl.load(row_rules + COUNTS_AT)).to(tl.pointer_type(tl.int16))
            counts = tl.load(row_counts + ids, mask=y > LOWEST, other=0)
            lowered = y - _number(row_rules + FREQUENCY) * counts.to(tl.float32) - _number(row_rules + PRESENCE)
            y = tl.where(counts > 0, lowered, y)
        if (ruled & WITH_MASK) != 0:
            row_mask = (row_rules + tl.load(row_rules + MASK_AT)).to(tl.pointer_type(tl.int32))
            # A NaN that may be chosen stays one.
            bits = tl.load(row_mask + (ids >> 5), mask=(y > LOWEST) | (y != y), other=0) >> (ids & 31)
            y = tl.where((bits & 1) != 0, y, LOWEST)
    return y


@triton.jit
def note_choice(row_rules, ruled, token):
    """What the rules of a row keep of the token that was chosen, -1 for none: see ``slot_rules``."""
    if ((ruled & MASK_IS_SPENT) == 0) & (token >= 0):
        if (ruled & WITH_MARKS) != 0:
            word = row_rules + MARKS + token // TOKENS_OF_WORD
            tl.store(word, tl.load(word) | (SEEN << (token % TOKENS_OF_WORD * 2).to(tl.int64)))
        if (ruled & WITH_COUNTS) != 0:
            count = (row_rules + tl.load(row_rules + COUNTS_AT)).to(tl.pointer_type(tl.int16)) + token
            tl.store(count, tl.minimum(tl.load(count).to(tl.int32) + 1, MOST_COUNTED).to(tl.int16))
    if (ruled & WITH_MASK) != 0:
        tl.store(row_rules, ruled ^ (WITH_MASK | MASK_IS_SPENT))


@triton.jit
def logit_of(row_logits, position, row_rules, ruled, token):
    """The logit of one token, as its rules change it."""
    return apply_rules(tl.load(row_logits + token).to(tl.float32), token, position, row_rules, ruled)


@triton.jit
def rank_of(x, temperature, ruled, NARROW: tl.constexpr):
    """What orders tokens as their scores do: the logits themselves where a division cannot make two of them equal."""
    rank = x
    if NARROW:
        if ruled != 0:
            rank = tl.div_rn(x, temperature)
    else:
        rank = tl.div_rn(x, temperature)
    return rank


@triton.jit
def ranks_up_to(rank, ids, last_rank, last_id):
    """Whether tokens rank no higher than a given one."""
    return (rank < last_rank) | ((rank == last_rank) & (ids <= last_id))


@triton.jit
def is_kept_by_top_p(above, total, threshold):
    """Whether top-p keeps a token: ``above`` and ``total`` are the weights of what ranks above it, and of all."""
    return (total - above > threshold * total) | (above == 0)


@triton.jit
def inverse_temperature(temperature):
    return tl.minimum(1.0 / temperature, 3e38)


@triton.jit
def key_of(x, shift):
    """Integers in the order of float32 values whose ``shift`` low bits are zero."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> shift


@triton.jit
def value_of_key(key, shift):
    """The float32 value of a key."""
    key = key.to(tl.int32)
    bits = (key << shift) | tl.where(key < 0, (1 << shift) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def top_k_of(top_ks, slot, vocab):
    """The k of a slot, 0 where every token is one of the k largest."""
    top_k = tl.load(top_ks + slot)
    return tl.where(top_k < vocab, top_k, 0)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, FAST: tl.constexpr):
    """The largest value, NaN if there is one: in one instruction a value on an NVIDIA GPU, by integers elsewhere."""
    if FAST:
        return tl.reduce(x, 0, _larger_or_nan)
    else:
        key = tl.max(tl.where(x == x, key_of(x, 0), NO_TOKEN), 0)
        return tl.where(key == NO_TOKEN, float("nan"), value_of_key(key, 0))


@triton.jit
def weights_of(x, largest, scale, FAST: tl.constexpr):
    """exp((x - largest) * scale): 1 at the largest logit, whatever the rounding."""
    return fast_exp2((x - largest) * (scale * LOG2E), FAST)


@triton.jit
def threshold_of(top_p):
    """1 - top_p, rounded once as in the reference; below zero, nothing is removed."""
    return tl.where(top_p < 1, 1 - top_p, -1.0).to(tl.float32)


@triton.jit
def can_have(highest, floor, min_p, largest, temperature, ruled, NARROW: tl.constexpr, FAST: tl.constexpr):
    """Whether tiles with these largest logits can have tokens of a rank from ``floor``, and weights from ``min_p``."""
    is_heavy = weights_of(highest, largest, inverse_temperature(temperature), FAST) >= min_p
    return (rank_of(highest, temperature, ruled, NARROW) >= floor) & is_heavy


@triton.jit
def ranks_above(x, start, lane, rank, token, temperature, ruled, NARROW: tl.constexpr, TILE: tl.constexpr):
    """Whether the tokens ``start + lane`` rank above one: among equals, those behind it."""
    if start > token:
        is_above = rank_of(x, temperature, ruled, NARROW) >= rank
    elif start + TILE <= token:
        is_above = rank_of(x, temperature, ruled, NARROW) > rank
    else:
        is_above = ~ranks_up_to(rank_of(x, temperature, ruled, NARROW), start + lane, rank, token)
    return is_above
