"""Choosing tokens from logits without sorting them: what ``sampling_reference`` defines, in four launches.

::

    scan    every tile of every row     largest logit; sum of weights; how good its best token can be
    reduce  every row                   the best token by score plus noise; greedy rows and most others are done
    weigh   every tile of every row     with top-p: the probability up to that token
    finish  every row                   is it kept? if not, the best of those that rank higher, and so on

Tokens are ranked by score, then by id: the order of a stable sort. Whether top-p keeps a token then follows from one
sum over the row, of the weights up to its rank. The best of all tokens by score plus noise is kept with a probability
of at least top_p; one that is not sends the search to higher ranks, as in rejection sampling, and what comes out is
the best of the kept ones exactly.

* Noise is float32(-log(-log u)) with float64 logarithms. Nearly all tokens are ruled out by a float32 value that is off
  by less than :func:`_bound` allows for; the few others are computed as the reference does.
* The k largest logits of a row lie in the groups of 64 tokens with the k largest maxima; rows with top-k look at no
  others.
* Rows with min-p are not drawn from before their largest logit is known.
* Sums are taken in an order that depends on the row alone.

Rows without sampling, and rows with other parameters, may stand next to each other: parameters are read by slot.
"""

import torch
import triton
import triton.language as tl

from .backend import device_guard

TILE = 2048
GROUP = 64
LARGE = 16384
"""Tokens of a tile; of a group whose largest logit is kept; that are summed at once in a row read end to end."""
MAX_TILES = 256
"""Of a row: with larger vocabularies, tiles are larger. Triton 3.6 fails on as many as a program has threads."""
WARPS, ROW_WARPS = 8, 16
"""Of programs that work on tiles, and of those of the last launch."""
PROGRAMS = 1024
"""Enough to fill a device: with more tiles than that, a program takes several."""

INVALID = tl.constexpr(-1)
NO_TOKEN = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))
HIGHEST = tl.constexpr(float("inf"))
KEY_OF_LOWEST = tl.constexpr(-0x7F800001)
DONE, TOP_K, TOP_P, MIN_P = (tl.constexpr(i) for i in range(4))
"""What is left to do for a row."""


# Noise


@triton.jit
def _splitmix64(x):
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _row_key(seed, position):
    """Low and high half of a row's key, uint32, from int64 scalars."""
    key = _splitmix64(_splitmix64(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise_bits(ids, low, high):
    """The 32 random bits of tokens."""
    return _mix32(_mix32(ids.to(tl.uint32) ^ low) + high)


@triton.jit
def _exact_noise(bits):
    u = (bits.to(tl.float64) + 0.5) * 2.0**-32
    return (-tl.log(-tl.log(u))).to(tl.float32)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """The base-2 logarithm of positive float32, in one instruction of an NVIDIA GPU if FAST: off by 2**-22 or less,
    relative to the result outside of (1/2, 2). The one of Triton takes thirteen."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _approximate_noise(bits, FAST: tl.constexpr):
    """Within 4e-5 of :func:`_exact_noise`.

    Near u = 1, where the largest noise is, a logarithm of u as float32 has no digits: -log(u) is a series in 1 - u
    there. Both are made to be no larger than it, so the larger one is right.
    """
    d = (bits ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + 2.0**-33
    u = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    series = d * (1 + d * (1 / 2 + d * (1 / 3)))
    return _log2(tl.maximum(series, _log2(u, FAST) * -LN2 - 2.0**-22), FAST) * -LN2


@triton.jit
def _bound(value):
    """Above the exact score plus noise whose approximation is ``value``, and monotonous in it.

    A score of size s is off by less than 2**-21 s, and s is no more than 23 above the value's own size.
    """
    return tl.where(value > LOWEST, value + (2.0**-13 + 2.0**-20 * tl.abs(value)), LOWEST)


# Scores


@triton.jit
def _rank(x, temperature, NARROW: tl.constexpr):
    """What orders tokens as their scores do: the logits themselves where a division cannot make two of them equal."""
    if NARROW:
        return x
    else:
        return tl.div_rn(x, temperature)


@triton.jit
def _up_to(rank, ids, last_rank, last_id):
    """Whether tokens rank no higher than a given one."""
    return (rank < last_rank) | ((rank == last_rank) & (ids <= last_id))


@triton.jit
def _inverse(temperature):
    return tl.minimum(1.0 / temperature, 3e38)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Integers in the order of float32 values whose SHIFT low bits are zero."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float32 value of a key."""
    key = key.to(tl.int32)
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _top_k_of(top_ks, slot, vocab):
    """The k of a slot, 0 where every token is one of the k largest."""
    top_k = tl.load(top_ks + slot)
    return tl.where(top_k < vocab, top_k, 0)


# Launch 1


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_program"])
def _scan_tiles(
    logits, row_stride, vocab, slots, positions, temperatures, top_ks, top_ps, min_ps, seeds, wants_lse,
    tile_max, tile_sum, tile_raw_sum, tile_bound, group_max, num_tiles, tiles_per_program,
    NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: a few tiles of one row. What it writes for sampled rows depends on their parameters."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    temperature = tl.load(temperatures + slot).to(tl.float32)
    with_lse = tl.load(wants_lse + slot) > 0
    is_drawn = temperature > 0
    with_groups = is_drawn & (_top_k_of(top_ks, slot, vocab) > 0)
    with_sums = is_drawn & ~with_groups & (tl.load(top_ps + slot) < 1)
    with_noise = is_drawn & ~with_groups & (tl.load(min_ps + slot).to(tl.float32) == 0)
    low, high = _row_key(tl.load(seeds + slot), tl.load(positions + row))
    scale = _inverse(temperature)
    lane = tl.arange(0, TILE)
    start = tl.program_id(0) * tiles_per_program
    end = tl.minimum(start + tiles_per_program, num_tiles)
    ids = start * TILE + lane
    ahead = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=LOWEST)
    for tile in range(start, end):
        x = ahead.to(tl.float32)
        # The next tile is on its way while this one is worked on.
        ids = (tile + 1) * TILE + lane
        ahead = tl.load(logits + row * row_stride + ids, mask=(ids < vocab) & (tile + 1 < end), other=LOWEST)
        ids = tile * TILE + lane
        place = row * num_tiles + tile
        key = tl.max(tl.where(x == x, _key(x, 0), NO_TOKEN), 0)
        largest = tl.where(key == NO_TOKEN, float("nan"), _value(key, 0))
        tl.store(tile_max + place, largest)
        pivot = tl.where(largest > LOWEST, largest, 0.0)
        if with_lse:
            tl.store(tile_raw_sum + place, tl.sum(tl.exp2((x - pivot) * LOG2E), 0))
        if with_groups:
            num_groups = num_tiles * (TILE // GROUP)
            group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
            tl.store(group_max + row * num_groups + group, tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), 1))
        if with_sums:
            tl.store(tile_sum + place, tl.sum(tl.exp2((x - pivot) * (scale * LOG2E)), 0))
        if with_noise:
            value = x * scale + _approximate_noise(_noise_bits(ids, low, high), FAST)
            tl.store(tile_bound + place, _bound(tl.max(value, 0)))


# Rows


@triton.jit
def _load_chunk(row_logits, row_groups, chunk, count, is_listed, vocab, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Logits and ids ``[TILE // GROUP, GROUP]`` of a part of a row, or of its listed groups; and which exist."""
    place = chunk * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    held = place < count
    group = tl.where(is_listed, tl.load(row_groups + place, mask=held & is_listed, other=0), place)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    held = held[:, None] & (ids < vocab)
    return tl.load(row_logits + ids, mask=held, other=LOWEST).to(tl.float32), ids, held


@triton.jit
def _best_of_chunk(
    x, ids, row_logits, temperature, top, min_p, floor, low_rank, low_id, key_low, key_high,
    NARROW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The best token of a chunk by score plus noise, exactly, of those that may be chosen: value and id."""
    scores = tl.div_rn(x, temperature)
    rank = x if NARROW else scores
    may = (rank >= floor) & ~_up_to(rank, ids, low_rank, low_id) & (scores > LOWEST)
    may &= tl.exp2((scores - top) * LOG2E) >= min_p
    value = scores + _approximate_noise(_noise_bits(ids, key_low, key_high), FAST)
    bounds = tl.where(may, _bound(value), LOWEST)
    best, best_id = LOWEST, NO_TOKEN
    peak = tl.max(bounds)
    while (peak > LOWEST) & (peak >= best):
        token = tl.min(tl.where(bounds == peak, ids, NO_TOKEN))
        score = tl.div_rn(tl.load(row_logits + token).to(tl.float32), temperature)
        value_of_token = score + _exact_noise(_noise_bits(token, key_low, key_high))
        is_better = (value_of_token > best) | ((value_of_token == best) & (token < best_id))
        best = tl.where(is_better, value_of_token, best)
        best_id = tl.where(is_better, token, best_id)
        bounds = tl.where(ids == token, LOWEST, bounds)
        peak = tl.max(bounds)
    return best, best_id


@triton.jit
def _best_of_row(
    bounds, row_logits, row_groups, count, is_listed, vocab, temperature, top, min_p, floor, low_rank, low_id,
    key_low, key_high,
    NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The best token by score plus noise of those that may be chosen, and what a chunk can have at most from then on.

    ``bounds`` is the same before: chunks are looked at in that order.
    """
    chunks = tl.arange(0, TILES)
    scanned = tl.full((TILES,), LOWEST, tl.float32)
    best, best_id = LOWEST, NO_TOKEN
    peak = tl.max(bounds, 0)
    while (peak > LOWEST) & (peak >= best):
        chunk = tl.min(tl.where(bounds == peak, chunks, NO_TOKEN), 0)
        x, ids, _ = _load_chunk(row_logits, row_groups, chunk, count, is_listed, vocab, TILE, GROUP)
        value, token = _best_of_chunk(
            x, ids, row_logits, temperature, top, min_p, floor, low_rank, low_id, key_low, key_high, NARROW, FAST
        )
        is_better = (value > best) | ((value == best) & (token < best_id))
        best = tl.where(is_better, value, best)
        best_id = tl.where(is_better, token, best_id)
        scanned = tl.where(chunks == chunk, value, scanned)
        bounds = tl.where(chunks == chunk, LOWEST, bounds)
        peak = tl.max(bounds, 0)
    return best_id, tl.maximum(bounds, scanned)


# Launch 2


@triton.jit(do_not_specialize=["num_tiles"])
def _reduce_rows(
    logits, row_stride, vocab, slots, positions, temperatures, top_ks, top_ps, min_ps, seeds, wants_lse,
    tile_max, tile_sum, tile_raw_sum, tile_bound, group_max,
    row_task, row_max, row_sum, row_last, row_count, row_key, groups, chosen, lse, num_tiles,
    SHIFT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: one row. ``row_task`` says what is left to do.

    For top-k, ``groups`` gets the groups, ``row_count`` of them, that hold the k largest logits; ``row_key`` a key that
    the k-th largest one is not below. For top-p, ``row_last`` gets the token that ranks highest.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    temperature = tl.load(temperatures + slot).to(tl.float32)
    row_logits = logits + row * row_stride
    tile = tl.arange(0, TILES)
    lane = tl.arange(0, TILE)
    place = row * num_tiles + tile
    held = tile < num_tiles
    maxima = tl.load(tile_max + place, mask=held, other=LOWEST)
    has_nan = tl.max((maxima != maxima).to(tl.int32), 0) > 0
    largest = tl.max(tl.where(has_nan, LOWEST, maxima), 0)
    top = tl.div_rn(largest, tl.where(temperature > 0, temperature, 1.0))
    log_of_sum = float("nan")
    if (tl.load(wants_lse + slot) > 0) & ~has_nan:
        sums = tl.load(tile_raw_sum + place, mask=held, other=0.0)
        log_of_sum = largest + tl.log(tl.sum(sums * tl.exp2((maxima - largest) * LOG2E), 0))
    tl.store(lse + row, log_of_sum)
    token = INVALID
    task = DONE
    if temperature > 0:
        if (top - top == 0) & ~has_nan:
            top_k = _top_k_of(top_ks, slot, vocab)
            top_p, min_p = tl.load(top_ps + slot), tl.load(min_ps + slot).to(tl.float32)
            tl.store(row_max + row, largest)
            if top_k > 0:
                task = TOP_K
                num_groups = tl.cdiv(vocab, GROUP)
                group = tl.arange(0, GROUPS)
                start = row * num_tiles * (TILE // GROUP)
                exists = group < num_groups
                keys = _key(tl.load(group_max + start + group, mask=exists, other=LOWEST), SHIFT)
                low = tl.min(tl.where(exists, keys, NO_TOKEN), 0).to(tl.int64)
                high = tl.where(top_k < num_groups, _key(largest, SHIFT).to(tl.int64), low)
                while low < high:
                    middle = low + (high - low + 1) // 2
                    is_enough = tl.sum((exists & (keys >= middle)).to(tl.int32), 0) >= top_k
                    low = tl.where(is_enough, middle, low)
                    high = tl.where(is_enough, high, middle - 1)
                is_in = exists & (keys >= low)
                tl.store(groups + start + tl.cumsum(is_in.to(tl.int32), 0) - 1, group, mask=is_in)
                tl.store(row_count + row, tl.sum(is_in.to(tl.int32), 0))
                # With fewer groups than k, a maximum says nothing of the k-th largest logit.
                tl.store(row_key + row, tl.where(top_k < num_groups, low, KEY_OF_LOWEST >> SHIFT).to(tl.int32))
            else:
                if top_p < 1:
                    sums = tl.load(tile_sum + place, mask=held, other=0.0)
                    scale = _inverse(temperature) * LOG2E
                    tl.store(row_sum + row, tl.sum(sums * tl.exp2((maxima - largest) * scale), 0))
                    top_rank = _rank(largest, temperature, NARROW)
                    is_top = held & (_rank(maxima, temperature, NARROW) == top_rank)
                    ids = tl.max(tl.where(is_top, tile, 0), 0) * TILE + lane
                    x = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST).to(tl.float32)
                    last = tl.max(tl.where(_rank(x, temperature, NARROW) == top_rank, ids, -1), 0)
                    tl.store(row_last + row, last)
                if min_p > 0:
                    task = MIN_P
                else:
                    if top_p < 1:
                        task = TOP_P
                    low, high = _row_key(tl.load(seeds + slot), tl.load(positions + row))
                    bounds = tl.load(tile_bound + place, mask=held, other=LOWEST)
                    token, bounds = _best_of_row(
                        bounds, row_logits, groups, tl.cdiv(vocab, GROUP), False, vocab, temperature, top, 0.0, LOWEST,
                        LOWEST, -1, low, high, NARROW, FAST, TILE, GROUP, TILES,
                    )  # fmt: skip
                    tl.store(tile_bound + place, bounds, mask=held)
    elif not has_nan:
        ids = tl.min(tl.where(held & (maxima == largest), tile, NO_TOKEN), 0) * TILE + lane
        x = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST).to(tl.float32)
        token = tl.min(tl.where(x == largest, ids, NO_TOKEN), 0)
    tl.store(chosen + row, token.to(tl.int64))
    tl.store(row_task + row, task)


# Launch 3


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_program"])
def _weigh_tiles(
    logits, row_stride, vocab, slots, positions, temperatures, top_ks, top_ps, min_ps, seeds,
    row_task, row_max, chosen, tile_bound, tile_below, num_tiles, tiles_per_program,
    NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: a few tiles of one row: with top-p the sums of weights up to the token ``chosen`` so far, with min-p
    how good the best token can be."""
    row = tl.program_id(1).to(tl.int64)
    task = tl.load(row_task + row)
    if (task == TOP_P) | (task == MIN_P):
        slot = tl.load(slots + row)
        temperature = tl.load(temperatures + slot).to(tl.float32)
        # A little more than what is kept: this is a bound.
        min_p = tl.load(min_ps + slot).to(tl.float32) * (1 - 2.0**-12)
        scale = _inverse(temperature)
        largest = tl.load(row_max + row)
        row_logits = logits + row * row_stride
        token = tl.maximum(tl.load(chosen + row), 0).to(tl.int32)
        rank_of_token = _rank(tl.load(row_logits + token).to(tl.float32), temperature, NARROW)
        low, high = _row_key(tl.load(seeds + slot), tl.load(positions + row))
        lane = tl.arange(0, TILE)
        start = tl.program_id(0) * tiles_per_program
        end = tl.minimum(start + tiles_per_program, num_tiles)
        ids = start * TILE + lane
        ahead = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST)
        for tile in range(start, end):
            x = ahead.to(tl.float32)
            ids = (tile + 1) * TILE + lane
            ahead = tl.load(row_logits + ids, mask=(ids < vocab) & (tile + 1 < end), other=LOWEST)
            ids = tile * TILE + lane
            weights = tl.exp2((x - largest) * (scale * LOG2E))
            if task == TOP_P:
                is_in = _up_to(_rank(x, temperature, NARROW), ids, rank_of_token, token)
                tl.store(tile_below + row * num_tiles + tile, tl.sum(tl.where(is_in, weights, 0.0), 0))
            else:
                value = x * scale + _approximate_noise(_noise_bits(ids, low, high), FAST)
                best = tl.max(tl.where(weights >= min_p, value, LOWEST), 0)
                tl.store(tile_bound + row * num_tiles + tile, _bound(best))


# Launch 4


@triton.jit
def _kth_key(
    row_logits, row_groups, num_chunks, count, vocab, k, low, high,
    SHIFT: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The key of the k-th largest logit of the listed groups, which is between ``low`` and ``high``, int64."""
    # The first chunk, with most rows the only one, is kept.
    x, _, held = _load_chunk(row_logits, row_groups, 0, count, True, vocab, TILE, GROUP)
    first_keys = tl.where(held, _key(x, SHIFT), -(2**31))
    while low < high:
        middle = low + (high - low + 1) // 2
        found = (first_keys >= middle).to(tl.int32)
        for chunk in range(1, num_chunks):
            x, _, held = _load_chunk(row_logits, row_groups, chunk, count, True, vocab, TILE, GROUP)
            found += (held & (_key(x, SHIFT) >= middle)).to(tl.int32)
        is_enough = tl.sum(found) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _sum_of_listed(
    row_logits, row_groups, count, vocab, temperature, largest, floor, last_rank, last_id,
    NARROW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The weights of tokens in the listed groups that rank no higher than a given one, and not below ``floor``."""
    scale = _inverse(temperature) * LOG2E
    total = tl.zeros((TILE // GROUP, GROUP), tl.float32)
    for chunk in range(tl.cdiv(count, TILE // GROUP)):
        x, ids, held = _load_chunk(row_logits, row_groups, chunk, count, True, vocab, TILE, GROUP)
        rank = _rank(x, temperature, NARROW)
        is_in = held & (rank >= floor) & _up_to(rank, ids, last_rank, last_id)
        total += tl.where(is_in, tl.exp2((x - largest) * scale), 0.0)
    return tl.sum(total)


@triton.jit
def _sum_of_row(row_logits, vocab, temperature, largest, last_rank, last_id, NARROW: tl.constexpr, LARGE: tl.constexpr):
    """The weights of a row's tokens that rank no higher than a given one."""
    scale = _inverse(temperature) * LOG2E
    total = tl.zeros((LARGE,), tl.float32)
    for start in range(0, vocab, LARGE):
        ids = start + tl.arange(0, LARGE)
        x = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST).to(tl.float32)
        is_in = _up_to(_rank(x, temperature, NARROW), ids, last_rank, last_id)
        total += tl.where(is_in, tl.exp2((x - largest) * scale), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _last_of(
    row_logits, row_groups, num_chunks, count, vocab, temperature, rank,
    NARROW: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The last token of a rank in the listed groups."""
    last = tl.full((TILE // GROUP, GROUP), -1, tl.int32)
    for chunk in range(num_chunks):
        x, ids, held = _load_chunk(row_logits, row_groups, chunk, count, True, vocab, TILE, GROUP)
        last = tl.where(held & (_rank(x, temperature, NARROW) == rank), tl.maximum(last, ids), last)
    return tl.max(last)


@triton.jit(do_not_specialize=["num_tiles"])
def _finish_rows(
    logits, row_stride, vocab, slots, positions, temperatures, top_ks, top_ps, min_ps, seeds,
    row_task, row_max, row_sum, row_last, row_count, row_key, groups, tile_bound, tile_below, chosen, num_tiles,
    SHIFT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    LARGE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: one row. LARGE tokens at a time are summed of rows that are read from end to end."""
    row = tl.program_id(0).to(tl.int64)
    task = tl.load(row_task + row)
    if task != DONE:
        slot = tl.load(slots + row)
        temperature = tl.load(temperatures + slot).to(tl.float32)
        largest = tl.load(row_max + row)
        top = tl.div_rn(largest, temperature)
        min_p = tl.load(min_ps + slot).to(tl.float32)
        top_p = tl.load(top_ps + slot)
        # Rounded once, as in the reference; below zero, nothing is removed.
        threshold = tl.where(top_p < 1, 1 - top_p, -1.0).to(tl.float32)
        key_low, key_high = _row_key(tl.load(seeds + slot), tl.load(positions + row))
        row_logits = logits + row * row_stride
        row_groups = groups + row * num_tiles * (TILE // GROUP)
        chunks = tl.arange(0, TILES)
        place = row * num_tiles + chunks
        is_listed = task == TOP_K
        count = tl.cdiv(vocab, GROUP)

        # What is known: nothing of a rank below ``floor`` is kept, the token ``high`` is, the token ``low`` is not.
        floor = LOWEST
        low_rank, low_id = LOWEST, -1
        high_rank, high_id = _rank(largest, temperature, NARROW), NO_TOKEN
        total = 0.0
        is_searching = True
        token = NO_TOKEN
        if is_listed:
            count = tl.load(row_count + row)
            num_chunks = tl.cdiv(count, TILE // GROUP)
            bounds = tl.where(chunks < num_chunks, HIGHEST, LOWEST)
            lowest, highest = tl.load(row_key + row).to(tl.int64), _key(largest, SHIFT).to(tl.int64)
            top_k = tl.load(top_ks + slot)
            kth = _kth_key(row_logits, row_groups, num_chunks, count, vocab, top_k, lowest, highest, SHIFT, TILE, GROUP)
            floor = _rank(_value(kth, SHIFT), temperature, NARROW)
            if threshold >= 0:
                total = _sum_of_listed(
                    row_logits, row_groups, count, vocab, temperature, largest, floor, HIGHEST, NO_TOKEN,
                    NARROW, TILE, GROUP,
                )  # fmt: skip
                high_id = _last_of(
                    row_logits, row_groups, num_chunks, count, vocab, temperature, high_rank, NARROW, TILE, GROUP
                )
        else:
            bounds = tl.load(tile_bound + place, mask=chunks < num_tiles, other=LOWEST)
            if threshold >= 0:
                total = tl.load(row_sum + row)
                high_id = tl.load(row_last + row)
            if task == TOP_P:
                token = tl.load(chosen + row).to(tl.int32)
                rank = _rank(tl.load(row_logits + token).to(tl.float32), temperature, NARROW)
                below = tl.sum(tl.load(tile_below + place, mask=chunks < num_tiles, other=0.0), 0)
                is_searching = (below <= threshold * total) & ~_up_to(high_rank, high_id, rank, token)
                low_rank, low_id = rank, token
        while is_searching:
            token, bounds = _best_of_row(
                bounds, row_logits, row_groups, count, is_listed, vocab, temperature, top, min_p, floor,
                low_rank, low_id, key_low, key_high, NARROW, FAST, TILE, GROUP, TILES,
            )  # fmt: skip
            is_searching = False
            if (threshold >= 0) & (token != NO_TOKEN):
                rank = _rank(tl.load(row_logits + token).to(tl.float32), temperature, NARROW)
                if not _up_to(high_rank, high_id, rank, token):
                    if is_listed:
                        below = _sum_of_listed(
                            row_logits, row_groups, count, vocab, temperature, largest, floor, rank, token,
                            NARROW, TILE, GROUP,
                        )  # fmt: skip
                    else:
                        below = _sum_of_row(row_logits, vocab, temperature, largest, rank, token, NARROW, LARGE)
                    is_searching = below <= threshold * total
                    low_rank, low_id = rank, token
        tl.store(chosen + row, tl.where(token == NO_TOKEN, INVALID, token).to(tl.int64))


def sample_tokens_launch(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    wants_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``sampling_ops.sample_tokens_op`` for the arguments."""
    num_rows, vocab = logits.shape
    tile = max(TILE, triton.next_power_of_2(triton.cdiv(vocab, MAX_TILES)))
    num_tiles = triton.cdiv(vocab, tile)
    num_groups = num_tiles * (tile // GROUP)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chosen = new(num_rows, dtype=torch.int64)
    lse = new(num_rows)
    if not num_rows:
        return chosen, lse
    tile_max, tile_sum, tile_raw_sum, tile_bound, tile_below = (new(num_rows, num_tiles) for _ in range(5))
    row_max, row_sum = (new(num_rows) for _ in range(2))
    row_task, row_last, row_count, row_key = (new(num_rows, dtype=torch.int32) for _ in range(4))
    group_max, groups = new(num_rows, num_groups), new(num_rows, num_groups, dtype=torch.int32)
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    narrow, fast = shift > 0, logits.is_cuda and torch.version.cuda is not None
    tiles = triton.next_power_of_2(num_tiles)
    # No more than it takes: each starts with loads that wait for one another.
    per_program = max(1, min(8, num_rows * num_tiles // PROGRAMS))
    grid = (triton.cdiv(num_tiles, per_program), num_rows)
    rows = (logits, logits.stride(0), vocab, slots, positions, temperature, top_k, top_p, min_p, seeds)
    with device_guard(logits):
        _scan_tiles[grid](
            *rows, wants_lse, tile_max, tile_sum, tile_raw_sum, tile_bound, group_max, num_tiles, per_program,
            NARROW=narrow, FAST=fast, TILE=tile, GROUP=GROUP, num_warps=WARPS,
        )  # fmt: skip
        _reduce_rows[(num_rows,)](
            *rows, wants_lse, tile_max, tile_sum, tile_raw_sum, tile_bound, group_max,
            row_task, row_max, row_sum, row_last, row_count, row_key, groups, chosen, lse, num_tiles,
            SHIFT=shift, NARROW=narrow, FAST=fast, TILE=tile, GROUP=GROUP,
            TILES=tiles, GROUPS=tiles * (tile // GROUP), num_warps=WARPS,
        )  # fmt: skip
        _weigh_tiles[grid](
            *rows, row_task, row_max, chosen, tile_bound, tile_below, num_tiles, per_program,
            NARROW=narrow, FAST=fast, TILE=tile, num_warps=WARPS,
        )  # fmt: skip
        _finish_rows[(num_rows,)](
            *rows, row_task, row_max, row_sum, row_last, row_count, row_key, groups, tile_bound, tile_below, chosen,
            num_tiles, SHIFT=shift, NARROW=narrow, FAST=fast, TILE=tile, GROUP=GROUP, LARGE=LARGE,
            TILES=tiles, num_warps=ROW_WARPS,
        )  # fmt: skip
    return chosen, lse
