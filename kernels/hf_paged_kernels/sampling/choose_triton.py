"""Choosing tokens from logits without sorting them: what ``reference`` defines, in six launches.

Noise, scores and ranks of single tokens are in ``scores_triton``.

::

    scan    every tile of every row     largest logit; for drawn rows the sum of weights. Rows with rules by themselves
    pick    every row                   greedy: the token; drawn: a tile by its sum, and a token in it by its score
    weigh   tiles of some rows          with top-p: weights of what ranks above that token; with min-p: of what is kept
    again   tiles of fewer rows         another token where top-p removes the first, and what ranks above it
    finish  some rows                   the token, if it is known by then; if not, all that is left to do; top-k

Logits are read once, and with top-p or min-p once more, as far as tiles can hold what is asked for. Tokens are ranked
by score, then by id: the order of a stable sort. Whether top-p keeps a token follows from one sum over the row, of the
weights above its rank. A token drawn from all is kept with a probability of at least top_p; one that is not leaves
the ranks above it to draw from: that is rejection sampling, and what comes out has the distribution of what is kept.

* Noise is float32(-log(-log u)) with float64 logarithms. Nearly all tokens of a tile are ruled out by a float32 value
  that is off by less than ``noise_bound`` allows for; the few others are computed as the reference does.
* The k largest logits of a row lie in the groups of 64 tokens with the k largest maxima; rows with top-k look at no
  others, and draw from them without tiles.
* Sums are taken in an order that depends on the row alone.
* Rows with penalties, biases, masks or suppressed tokens have them applied wherever logits are read.

Rows without sampling, and rows with other parameters, may stand next to each other: parameters are read by slot.
"""

import torch
import triton
import triton.language as tl

from ..backend import MAX_GRID, contiguous_rows, device_guard, on_nvidia
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import launch
from ..settings import cdiv, next_power_of_2
from . import reference
from .reference import tile_size
from .scores_triton import (
    HIGHEST,
    LOG2E,
    LOWEST,
    NO_RULES,
    NO_TOKEN,
    apply_rules,
    approximate_noise,
    can_have,
    exact_noise,
    inverse_temperature,
    is_kept_by_top_p,
    key_of,
    logit_of,
    max_or_nan,
    noise_bits,
    noise_bound,
    noise_key,
    note_choice,
    rank_of,
    ranks_above,
    ranks_up_to,
    threshold_of,
    top_k_of,
    value_of_key,
    weights_of,
)

GROUP = 64
"""Tokens of a group whose largest logit is kept."""
LARGE = 16384
"""Tokens that are summed at once in a row that one program reads from end to end."""
WARPS, ROW_WARPS = 8, 16
"""Of programs that work on a row, and of those that read one from end to end."""
SCAN_WARPS, WEIGH_WARPS = 2, 4
"""Of programs that work on tiles: few, so that a thread has many loads on their way and sums need few barriers."""
SCAN_TILES, WEIGH_TILES = 8, 10
"""The most tiles of a program: a program starts with loads that wait for one another, and also if it has no work."""
PROGRAMS = 1024
"""Enough of these to fill a device: with more tiles than that, a program takes several."""

INVALID = tl.constexpr(-1)
KEY_OF_LOWEST = tl.constexpr(-0x7F800001)
TILE_NOISE, TILES_OF_TURN = tl.constexpr(reference.TILE_NOISE), tl.constexpr(reference.TILES_OF_TURN)
DONE, TOP_K, TOP_P, MIN_P = (tl.constexpr(i) for i in range(4))
"""What is left to do for a row."""


# Launch 1


@triton.jit(do_not_specialize=["by_slot", "num_tiles", "tiles_per_program"])
def _scan_tiles(
    logits, row_stride, vocab, slots, positions, by_slot, rules, rules_stride, temperatures, top_ks, wants_lse,
    tile_max, tile_sum, tile_raw_max, tile_raw_sum, group_max, num_tiles, tiles_per_program, RULED: tl.constexpr, FAST:
    tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: a few tiles of one row. What it writes beside maxima depends on the row's parameters.

    RULED: rows with rules, otherwise those without. Rules take many registers, which would slow all rows.
    """
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * tiles_per_program
    end = tl.minimum(start + tiles_per_program, num_tiles)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    lane = tl.arange(0, TILE)
    ids = start * TILE + lane
    if not RULED:
        # On its way while the parameters are.
        ahead = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=LOWEST)
    slot = tl.load(slots + row)
    row_rules = rules + slot * rules_stride
    ruled = tl.load(row_rules)
    if (ruled != 0) == RULED:
        if RULED:
            ahead = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=LOWEST)
        position = tl.load(positions + tl.where(by_slot > 0, slot, row))
        temperature = tl.load(temperatures + slot).to(tl.float32)
        with_lse = tl.load(wants_lse + slot) > 0
        with_groups = (temperature > 0) & (top_k_of(top_ks, slot, vocab) > 0)
        with_sums = (temperature > 0) & ~with_groups
        scale = inverse_temperature(temperature)
        for tile in range(start, end):
            x = ahead.to(tl.float32)
            # The next tile is on its way while this one is worked on.
            ids = (tile + 1) * TILE + lane
            ahead = tl.load(logits + row * row_stride + ids, mask=(ids < vocab) & (tile + 1 < end), other=LOWEST)
            place = row * num_tiles + tile
            if with_lse:
                largest = max_or_nan(x, FAST)
                pivot = tl.where(largest > LOWEST, largest, 0.0)
                tl.store(tile_raw_max + place, largest)
                tl.store(tile_raw_sum + place, tl.sum(weights_of(x, pivot, 1.0, FAST), 0))
            if RULED:
                x = apply_rules(x, tile * TILE + lane, position, row_rules, ruled)
            largest = max_or_nan(x, FAST)
            tl.store(tile_max + place, largest)
            pivot = tl.where(largest > LOWEST, largest, 0.0)
            if with_groups:
                num_groups = num_tiles * (TILE // GROUP)
                group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
                tl.store(group_max + row * num_groups + group, tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), 1))
            if with_sums:
                tl.store(tile_sum + place, tl.sum(weights_of(x, pivot, scale, FAST), 0))


# Rows


@triton.jit
def _load_chunk(
    row_logits, position, row_rules, ruled, row_groups, chunk, count, vocab, TILE: tl.constexpr, GROUP: tl.constexpr
):
    """Logits and ids ``[TILE // GROUP, GROUP]`` of a part of a row's listed groups; and which exist."""
    place = chunk * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    held = place < count
    group = tl.load(row_groups + place, mask=held, other=0)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    held = held[:, None] & (ids < vocab)
    x = tl.load(row_logits + ids, mask=held, other=LOWEST).to(tl.float32)
    return apply_rules(x, ids, position, row_rules, ruled), ids, held


@triton.jit
def _best_of_chunk(
    x, ids, row_logits, position, row_rules, ruled, temperature, largest, min_p, floor, low_rank, low_id, key_low,
    key_high, NARROW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The best token of a chunk by score plus noise, exactly, of those that may be chosen: value and id."""
    scores = tl.div_rn(x, temperature)
    rank = tl.where(ruled != 0, scores, x) if NARROW else scores  # As rank_of has it.
    may = (rank >= floor) & ~ranks_up_to(rank, ids, low_rank, low_id) & (scores > LOWEST)
    may &= weights_of(x, largest, inverse_temperature(temperature), FAST) >= min_p
    value = scores + approximate_noise(noise_bits(ids, key_low, key_high), FAST)
    bounds = tl.where(may, noise_bound(value), LOWEST)
    best, best_id = LOWEST, NO_TOKEN
    peak = tl.max(bounds)
    while (peak > LOWEST) & (peak >= best):
        token = tl.min(tl.where(bounds == peak, ids, NO_TOKEN))
        score = tl.div_rn(logit_of(row_logits, position, row_rules, ruled, token), temperature)
        value_of_token = score + exact_noise(noise_bits(token, key_low, key_high))
        is_better = (value_of_token > best) | ((value_of_token == best) & (token < best_id))
        best = tl.where(is_better, value_of_token, best)
        best_id = tl.where(is_better, token, best_id)
        bounds = tl.where(ids == token, LOWEST, bounds)
        peak = tl.max(bounds)
    return best, best_id


@triton.jit
def _draw_tile(masses, turn, key_low, key_high, TILES: tl.constexpr):
    """A tile by its mass ``[TILES]``: that with the largest log(mass) + noise."""
    tile = tl.arange(0, TILES)
    noise = exact_noise(noise_bits(tile + turn * TILES_OF_TURN + TILE_NOISE, key_low, key_high))
    value = tl.where(masses > 0, tl.log(tl.where(masses > 0, masses, 1.0)) + noise, LOWEST)
    return tl.min(tl.where(value == tl.max(value, 0), tile, NO_TOKEN), 0)


@triton.jit
def _draw_after(
    before, masses, turn, row_logits, position, row_rules, ruled, vocab, temperature, largest, min_p, key_low, key_high,
    NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A token of those that rank above the token ``before`` (negative: of all), of which the tiles have ``masses``."""
    low_rank, low_id = LOWEST, -1
    if before >= 0:
        low_id = before
        low_rank = rank_of(logit_of(row_logits, position, row_rules, ruled, before), temperature, ruled, NARROW)
    ids = _draw_tile(masses, turn, key_low, key_high, TILES) * TILE + tl.arange(0, TILE)
    x = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST).to(tl.float32)
    x = apply_rules(x, ids, position, row_rules, ruled)
    _, token = _best_of_chunk(
        x, ids, row_logits, position, row_rules, ruled, temperature, largest, min_p, LOWEST, low_rank, low_id, key_low,
        key_high, NARROW, FAST,
    )  # fmt: skip
    return token


# Launch 2


@triton.jit(do_not_specialize=["by_slot", "num_tiles"])
def _pick_rows(
    logits, row_stride, vocab, slots, positions, by_slot, rules, rules_stride, temperatures, top_ks, top_ps, min_ps,
    seeds, wants_lse, tile_max, tile_sum, tile_raw_max, tile_raw_sum, group_max, row_task, row_max, row_sum, row_count,
    row_key, groups, chosen, lse, num_tiles, SHIFT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE:
    tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: one row. ``row_task`` says what is left to do.

    For top-k, ``groups`` gets the groups, ``row_count`` of them, that hold the k largest logits; ``row_key`` a key that
    the k-th largest one is not below. For other drawn rows ``row_sum`` gets the sum of weights.
    """
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    position = tl.load(positions + tl.where(by_slot > 0, slot, row))
    row_rules = rules + slot * rules_stride
    ruled = tl.load(row_rules)
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
    log_of_sum = tl.full((), float("nan"), tl.float64)
    if (tl.load(wants_lse + slot) > 0) & ~has_nan:
        raw_maxima = tl.load(tile_raw_max + place, mask=held, other=LOWEST)
        sums = tl.load(tile_raw_sum + place, mask=held, other=0.0)
        raw_largest = tl.max(raw_maxima, 0)
        total = tl.sum(sums * tl.exp2((raw_maxima - raw_largest) * LOG2E), 0)
        log_of_sum = raw_largest.to(tl.float64) + tl.log(total).to(tl.float64)
    tl.store(lse + row, log_of_sum)
    token = INVALID
    task = DONE
    if temperature > 0:
        if (top - top == 0) & ~has_nan:
            top_k = top_k_of(top_ks, slot, vocab)
            top_p, min_p = tl.load(top_ps + slot), tl.load(min_ps + slot).to(tl.float32)
            tl.store(row_max + row, largest)
            if top_k > 0:
                task = TOP_K
                shift = tl.where(ruled != 0, 0, SHIFT)
                num_groups = tl.cdiv(vocab, GROUP)
                group = tl.arange(0, GROUPS)
                start = row * num_tiles * (TILE // GROUP)
                exists = group < num_groups
                keys = key_of(tl.load(group_max + start + group, mask=exists, other=LOWEST), shift)
                low = tl.min(tl.where(exists, keys, NO_TOKEN), 0).to(tl.int64)
                high = tl.where(top_k < num_groups, key_of(largest, shift).to(tl.int64), low)
                while low < high:
                    middle = low + (high - low + 1) // 2
                    is_enough = tl.sum((exists & (keys >= middle)).to(tl.int32), 0) >= top_k
                    low = tl.where(is_enough, middle, low)
                    high = tl.where(is_enough, high, middle - 1)
                is_in = exists & (keys >= low)
                tl.store(groups + start + tl.cumsum(is_in.to(tl.int32), 0) - 1, group, mask=is_in)
                tl.store(row_count + row, tl.sum(is_in.to(tl.int32), 0))
                # With fewer groups than k, a maximum says nothing of the k-th largest logit.
                tl.store(row_key + row, tl.where(top_k < num_groups, low, KEY_OF_LOWEST >> shift).to(tl.int32))
            else:
                sums = tl.load(tile_sum + place, mask=held, other=0.0)
                masses = sums * weights_of(maxima, largest, inverse_temperature(temperature), FAST)
                tl.store(row_sum + row, tl.sum(masses, 0))
                if min_p > 0:
                    task = MIN_P
                else:
                    low, high = noise_key(tl.load(seeds + slot), position)
                    token = _draw_after(
                        INVALID, masses, 0, row_logits, position, row_rules, ruled, vocab, temperature, largest, 0.0,
                        low, high, NARROW, FAST, TILE, TILES,
                    )  # fmt: skip
                    task = tl.where(top_p < 1, TOP_P, DONE)
    elif not has_nan:
        ids = tl.min(tl.where(held & (maxima == largest), tile, NO_TOKEN), 0) * TILE + lane
        x = tl.load(row_logits + ids, mask=ids < vocab, other=LOWEST).to(tl.float32)
        x = apply_rules(x, ids, position, row_rules, ruled)
        token = tl.min(tl.where(x == largest, ids, NO_TOKEN), 0)
    tl.store(chosen + row, token.to(tl.int64))
    tl.store(row_task + row, task)


# Launches 3 and 4


@triton.jit(do_not_specialize=["by_slot", "num_tiles", "tiles_per_program"])
def _weigh_tiles(
    logits, row_stride, vocab, slots, positions, by_slot, rules, rules_stride, temperatures, top_ps, min_ps, seeds,
    row_task, row_max, row_sum, tile_max, chosen, tile_mass, chosen_again, tile_mass_again, num_tiles,
    tiles_per_program, AGAIN: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, TILES:
    tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: a few tiles of one row: ``tile_mass`` gets, with top-p, the weights of what ranks above the token
    ``chosen``, with min-p those of what is kept. Tiles that can have none are not read.

    AGAIN: rows whose token is not known by then get another one, ``chosen_again``, and ``tile_mass_again`` for it.
    Every program of a row draws the same. Rows with rules are left to the last launch.
    """
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    task = tl.load(row_task + row)
    slot = tl.load(slots + row)
    row_rules = rules + slot * rules_stride
    if ((task == TOP_P) | (task == MIN_P)) & (tl.load(row_rules) == NO_RULES):
        ruled = NO_RULES
        position = tl.load(positions + tl.where(by_slot > 0, slot, row))
        temperature = tl.load(temperatures + slot).to(tl.float32)
        min_p = tl.load(min_ps + slot).to(tl.float32)
        top_p = tl.load(top_ps + slot)
        scale = inverse_temperature(temperature)
        largest = tl.load(row_max + row)
        row_logits = logits + row * row_stride
        token = tl.load(chosen + row).to(tl.int32)
        is_needed = True
        if AGAIN:
            total = tl.load(row_sum + row)
            tile = tl.arange(0, TILES)
            masses = tl.load(tile_mass + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
            is_needed = (task == MIN_P) | ~is_kept_by_top_p(tl.sum(masses, 0), total, threshold_of(top_p))
            if is_needed:
                low, high = noise_key(tl.load(seeds + slot), position)
                turn = tl.where(task == MIN_P, 0, 1)
                token = _draw_after(
                    token, masses, turn, row_logits, position, row_rules, ruled, vocab, temperature, largest, min_p,
                    low, high, NARROW, FAST, TILE, TILES,
                )  # fmt: skip
                tl.store(chosen_again + row, token.to(tl.int64))
                is_needed = (top_p < 1) & (token != NO_TOKEN)
            tile_mass = tile_mass_again
        if is_needed:
            floor = LOWEST
            if AGAIN | (task == TOP_P):
                floor = rank_of(logit_of(row_logits, position, row_rules, ruled, token), temperature, ruled, NARROW)
                min_p = 0.0
            lane = tl.arange(0, TILE)
            start = tl.program_id(0) * tiles_per_program
            end = tl.minimum(start + tiles_per_program, num_tiles)
            place = row * num_tiles + start
            can = can_have(tl.load(tile_max + place), floor, min_p, largest, temperature, ruled, NARROW, FAST)
            ids = start * TILE + lane
            ahead = tl.load(row_logits + ids, mask=ids < tl.where(can, vocab, 0), other=LOWEST)
            for tile_id in range(start, end):
                x = ahead.to(tl.float32)
                has = can
                # The next tile is on its way while this one is worked on.
                place = row * num_tiles + tile_id
                highest = tl.load(tile_max + place + 1, mask=tile_id + 1 < end, other=LOWEST)
                can = can_have(highest, floor, min_p, largest, temperature, ruled, NARROW, FAST) & (tile_id + 1 < end)
                ids = (tile_id + 1) * TILE + lane
                ahead = tl.load(row_logits + ids, mask=ids < tl.where(can, vocab, 0), other=LOWEST)
                mass = 0.0
                if has:
                    weights = weights_of(x, largest, scale, FAST)
                    if AGAIN | (task == TOP_P):
                        is_in = ranks_above(x, tile_id * TILE, lane, floor, token, temperature, ruled, NARROW, TILE)
                    else:
                        is_in = weights >= min_p
                    mass = tl.sum(tl.where(is_in, weights, 0.0), 0)
                tl.store(tile_mass + place, mass)


# Launch 5


@triton.jit
def _kth_key(
    row_logits, position, row_rules, ruled, row_groups, num_chunks, count, vocab, k, low, high, shift, TILE:
    tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The key of the k-th largest logit of the listed groups, which is between ``low`` and ``high``, int64."""
    # The first chunk, with most rows the only one, is kept.
    x, _, held = _load_chunk(row_logits, position, row_rules, ruled, row_groups, 0, count, vocab, TILE, GROUP)
    first_keys = tl.where(held, key_of(x, shift), -(2**31))
    while low < high:
        middle = low + (high - low + 1) // 2
        found = (first_keys >= middle).to(tl.int32)
        for chunk in range(1, num_chunks):
            x, _, held = _load_chunk(
                row_logits, position, row_rules, ruled, row_groups, chunk, count, vocab, TILE, GROUP
            )
            found += (held & (key_of(x, shift) >= middle)).to(tl.int32)
        is_enough = tl.sum(found) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _sum_of_listed(
    row_logits, position, row_rules, ruled, row_groups, count, vocab, temperature, largest, floor, last_rank, last_id,
    NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The weights of tokens in the listed groups that rank above a given one, and not below ``floor``."""
    scale = inverse_temperature(temperature)
    total = tl.zeros((TILE // GROUP, GROUP), tl.float32)
    for chunk in range(tl.cdiv(count, TILE // GROUP)):
        x, ids, held = _load_chunk(row_logits, position, row_rules, ruled, row_groups, chunk, count, vocab, TILE, GROUP)
        rank = rank_of(x, temperature, ruled, NARROW)
        is_in = held & (rank >= floor) & ~ranks_up_to(rank, ids, last_rank, last_id)
        total += tl.where(is_in, weights_of(x, largest, scale, FAST), 0.0)
    return tl.sum(total)


@triton.jit
def _best_of_listed(
    bounds, row_logits, position, row_rules, ruled, row_groups, count, vocab, temperature, largest, min_p, floor,
    low_rank, low_id, key_low, key_high, NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, GROUP:
    tl.constexpr, TILES: tl.constexpr,
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
        x, ids, _ = _load_chunk(row_logits, position, row_rules, ruled, row_groups, chunk, count, vocab, TILE, GROUP)
        value, token = _best_of_chunk(
            x, ids, row_logits, position, row_rules, ruled, temperature, largest, min_p, floor, low_rank, low_id,
            key_low, key_high, NARROW, FAST,
        )  # fmt: skip
        is_better = (value > best) | ((value == best) & (token < best_id))
        best = tl.where(is_better, value, best)
        best_id = tl.where(is_better, token, best_id)
        scanned = tl.where(chunks == chunk, value, scanned)
        bounds = tl.where(chunks == chunk, LOWEST, bounds)
        peak = tl.max(bounds, 0)
    return best_id, tl.maximum(bounds, scanned)


@triton.jit
def _masses_above(
    row_logits, position, row_rules, ruled, row_max_of_tiles, num_tiles, vocab, temperature, largest, min_p, last_rank,
    last_id, NARROW: tl.constexpr, FAST: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The weights ``[TILES]`` of each tile's tokens that rank above a given one and that min-p keeps: SPAN tiles at
    once."""
    scale = inverse_temperature(temperature)
    all_tiles = tl.arange(0, TILES)
    masses = tl.zeros((TILES,), tl.float32)
    for start in range(0, num_tiles, SPAN):
        tiles = start + tl.arange(0, SPAN)
        highest = tl.load(row_max_of_tiles + tiles, mask=tiles < num_tiles, other=LOWEST)
        is_needed = rank_of(highest, temperature, ruled, NARROW) >= last_rank
        ids = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = tl.load(row_logits + ids, mask=(ids < vocab) & is_needed[:, None], other=LOWEST).to(tl.float32)
        x = apply_rules(x, ids, position, row_rules, ruled)
        is_in = ~ranks_up_to(rank_of(x, temperature, ruled, NARROW), ids, last_rank, last_id)
        weights = weights_of(x, largest, scale, FAST)
        sums = tl.sum(tl.where(is_in & (weights >= min_p), weights, 0.0), 1)
        masses += tl.sum(tl.where(all_tiles[None, :] == tiles[:, None], sums[:, None], 0.0), 0)
    return masses


@triton.jit
def _finish_listed(
    row_logits, position, row_rules, ruled, row_groups, row_count, row_key, vocab, temperature, largest, min_p,
    threshold, top_k, key_low, key_high, SHIFT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE:
    tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row with top-k, from the groups that are listed.

    Its noise is fixed, so the best of the kept tokens is found by looking at one after the other.
    """
    shift = tl.where(ruled != 0, 0, SHIFT)
    chunks = tl.arange(0, TILES)
    count = tl.load(row_count)
    num_chunks = tl.cdiv(count, TILE // GROUP)
    bounds = tl.where(chunks < num_chunks, HIGHEST, LOWEST)
    lowest, highest = tl.load(row_key).to(tl.int64), key_of(largest, shift).to(tl.int64)
    kth = _kth_key(
        row_logits, position, row_rules, ruled, row_groups, num_chunks, count, vocab, top_k, lowest, highest, shift,
        TILE, GROUP,
    )  # fmt: skip
    # What is known: nothing of a rank below ``floor`` is kept, nor are tokens up to ``low``.
    floor = rank_of(value_of_key(kth, shift), temperature, ruled, NARROW)
    low_rank, low_id = LOWEST, -1
    total = 0.0
    if threshold >= 0:
        total = _sum_of_listed(
            row_logits, position, row_rules, ruled, row_groups, count, vocab, temperature, largest, floor, LOWEST, -1,
            NARROW, FAST, TILE, GROUP,
        )  # fmt: skip
    token = NO_TOKEN
    is_searching = True
    while is_searching:
        token, bounds = _best_of_listed(
            bounds, row_logits, position, row_rules, ruled, row_groups, count, vocab, temperature, largest, min_p,
            floor, low_rank, low_id, key_low, key_high, NARROW, FAST, TILE, GROUP, TILES,
        )  # fmt: skip
        is_searching = False
        if (threshold >= 0) & (token != NO_TOKEN):
            low_id = token
            low_rank = rank_of(logit_of(row_logits, position, row_rules, ruled, token), temperature, ruled, NARROW)
            above = _sum_of_listed(
                row_logits, position, row_rules, ruled, row_groups, count, vocab, temperature, largest, floor, low_rank,
                low_id, NARROW, FAST, TILE, GROUP,
            )  # fmt: skip
            is_searching = ~is_kept_by_top_p(above, total, threshold)
    return token


@triton.jit
def _search(
    is_searching, token, masses, turn, row_logits, position, row_rules, ruled, tile_max, total, num_tiles, vocab,
    temperature, largest, min_p, threshold, key_low, key_high, NARROW: tl.constexpr, FAST: tl.constexpr, TILE:
    tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Draw from what ranks above ``token``, of which the tiles have ``masses``, and so on until a token is kept."""
    while is_searching:
        token = _draw_after(
            token, masses, turn, row_logits, position, row_rules, ruled, vocab, temperature, largest, min_p, key_low,
            key_high, NARROW, FAST, TILE, TILES,
        )  # fmt: skip
        turn += 1
        place = tl.minimum(token, vocab - 1)
        rank = rank_of(logit_of(row_logits, position, row_rules, ruled, place), temperature, ruled, NARROW)
        # Without top-p every token is kept, and no tile is read.
        rank = tl.where(threshold >= 0, rank, HIGHEST)
        masses = _masses_above(
            row_logits, position, row_rules, ruled, tile_max, num_tiles, vocab, temperature, largest, min_p, rank,
            token, NARROW, FAST, TILE, TILES, SPAN,
        )  # fmt: skip
        is_searching = ~is_kept_by_top_p(tl.sum(masses, 0), total, threshold) & (token != NO_TOKEN)
    return token


@triton.jit
def _finish_drawn(
    row_logits, position, row_rules, ruled, tile_max, tile_mass, tile_mass_again, first, again, total, num_tiles, vocab,
    temperature, largest, min_p, threshold, key_low, key_high, NARROW: tl.constexpr, FAST: tl.constexpr, TILE:
    tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The token of a row without top-k: ``first`` if there is one and it is kept, ``again`` if that is, or another."""
    token = first
    if ruled != 0:
        # Not weighed so far.
        rank = LOWEST
        if first >= 0:
            rank = rank_of(logit_of(row_logits, position, row_rules, ruled, first), temperature, ruled, NARROW)
        masses = _masses_above(
            row_logits, position, row_rules, ruled, tile_max, num_tiles, vocab, temperature, largest, min_p, rank,
            first, NARROW, FAST, TILE, TILES, SPAN,
        )  # fmt: skip
        is_searching = (first < 0) | ~is_kept_by_top_p(tl.sum(masses, 0), total, threshold)
        turn = tl.where(first < 0, 0, 1)
        token = _search(
            is_searching, first, masses, turn, row_logits, position, row_rules, ruled, tile_max, total, num_tiles,
            vocab, temperature, largest, min_p, threshold, key_low, key_high, NARROW, FAST, TILE, TILES, SPAN,
        )  # fmt: skip
    else:
        place = tl.arange(0, TILES)
        masses = tl.load(tile_mass + place, mask=place < num_tiles, other=0.0)
        if (first < 0) | ~is_kept_by_top_p(tl.sum(masses, 0), total, threshold):
            token = again
            if (threshold >= 0) & (token != NO_TOKEN):
                masses = tl.load(tile_mass_again + place, mask=place < num_tiles, other=0.0)
                is_searching = ~is_kept_by_top_p(tl.sum(masses, 0), total, threshold)
                turn = tl.where(first < 0, 1, 2)
                token = _search(
                    is_searching, again, masses, turn, row_logits, position, row_rules, NO_RULES, tile_max, total,
                    num_tiles, vocab, temperature, largest, min_p, threshold, key_low, key_high, NARROW, FAST, TILE,
                    TILES, SPAN,
                )  # fmt: skip
    return token


@triton.jit(do_not_specialize=["by_slot", "num_tiles"])
def _finish_rows(
    logits, row_stride, vocab, slots, positions, by_slot, rules, rules_stride, temperatures, top_ks, top_ps, min_ps,
    seeds, row_task, row_max, row_sum, row_count, row_key, groups, tile_max, chosen, last_token, tile_mass,
    chosen_again, tile_mass_again, num_tiles, SHIFT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, TILE:
    tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: one row. SPAN tiles at a time are read of rows that are read from end to end."""
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    task = tl.load(row_task + row)
    slot = tl.load(slots + row)
    row_rules = rules + slot * rules_stride
    ruled = tl.load(row_rules)
    token = tl.load(chosen + row).to(tl.int32)
    if task != DONE:
        position = tl.load(positions + tl.where(by_slot > 0, slot, row))
        temperature = tl.load(temperatures + slot).to(tl.float32)
        largest = tl.load(row_max + row)
        min_p = tl.load(min_ps + slot).to(tl.float32)
        threshold = threshold_of(tl.load(top_ps + slot))
        key_low, key_high = noise_key(tl.load(seeds + slot), position)
        row_logits = logits + row * row_stride
        row_groups = groups + row * num_tiles * (TILE // GROUP)
        if task == TOP_K:
            token = _finish_listed(
                row_logits, position, row_rules, ruled, row_groups, row_count + row, row_key + row, vocab, temperature,
                largest, min_p, threshold, tl.load(top_ks + slot), key_low, key_high, SHIFT, NARROW, FAST, TILE, GROUP,
                TILES,
            )  # fmt: skip
        else:
            again = tl.load(chosen_again + row).to(tl.int32)
            start = row * num_tiles
            token = _finish_drawn(
                row_logits, position, row_rules, ruled, tile_max + start, tile_mass + start, tile_mass_again + start,
                token, again, tl.load(row_sum + row), num_tiles, vocab, temperature, largest, min_p, threshold, key_low,
                key_high, NARROW, FAST, TILE, TILES, SPAN,
            )  # fmt: skip
        token = tl.where(token == NO_TOKEN, INVALID, token)
        tl.store(chosen + row, token.to(tl.int64))
    if by_slot > 0:
        tl.store(last_token + slot, tl.maximum(token, 0).to(tl.int64))
    if ruled != 0:
        note_choice(row_rules, ruled, token)


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
    rules: torch.Tensor,
    last_token: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``sampling_ops.sample_tokens_op`` for the arguments; at most :data:`~.backend.MAX_GRID` rows."""
    num_rows, vocab = logits.shape
    if num_rows > MAX_GRID:
        raise ValueError(f"logits must have at most {MAX_GRID} rows in one call, got {num_rows}: pass fewer at a time.")
    logits = contiguous_rows(logits)
    slots, positions, temperature, top_k, top_p, min_p, seeds, wants_lse = (
        x.contiguous() for x in (slots, positions, temperature, top_k, top_p, min_p, seeds, wants_lse)
    )
    # Both are written: where a kernel cannot do that in place, their copies are.
    row_rules, noted = contiguous_rows(rules), None if last_token is None else last_token.contiguous()
    tile = tile_size(vocab)
    num_tiles = cdiv(vocab, tile)
    num_groups = num_tiles * (tile // GROUP)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chosen, chosen_again = (new(num_rows, dtype=torch.int64) for _ in range(2))
    lse = new(num_rows, dtype=torch.float64)
    if not num_rows:
        return chosen, lse
    tile_max, tile_sum, tile_raw_max, tile_raw_sum = (new(num_rows, num_tiles) for _ in range(4))
    tile_mass, tile_mass_again = (new(num_rows, num_tiles) for _ in range(2))
    row_max, row_sum = (new(num_rows) for _ in range(2))
    row_task, row_count, row_key = (new(num_rows, dtype=torch.int32) for _ in range(3))
    group_max, groups = new(num_rows, num_groups), new(num_rows, num_groups, dtype=torch.int32)
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    narrow, fast = shift > 0, on_nvidia(logits)
    tiles = next_power_of_2(num_tiles)
    scanned, weighed = (max(1, min(most, num_rows * num_tiles // PROGRAMS)) for most in (SCAN_TILES, WEIGH_TILES))
    more = 1 if logits.element_size() < 4 else 2
    by_slot = int(noted is not None)
    rows = (logits, logits.stride(0), vocab, slots, positions, by_slot, row_rules, row_rules.stride(0))
    parameters = (*rows, temperature, top_k, top_p, min_p, seeds)
    dependent = dependent_launch(logits.device)
    with device_guard(logits):
        for ruled in (False, True):
            launch(
                _scan_tiles, (cdiv(num_tiles, scanned), num_rows),
                *rows, temperature, top_k, wants_lse, tile_max, tile_sum, tile_raw_max, tile_raw_sum, group_max,
                num_tiles, scanned,
                RULED=ruled, FAST=fast, TILE=tile, GROUP=GROUP, num_warps=SCAN_WARPS * more, **dependent,
            )  # fmt: skip
        launch(
            _pick_rows, (num_rows,),
            *parameters, wants_lse, tile_max, tile_sum, tile_raw_max, tile_raw_sum, group_max,
            row_task, row_max, row_sum, row_count, row_key, groups, chosen, lse, num_tiles,
            SHIFT=shift, NARROW=narrow, FAST=fast, TILE=tile, GROUP=GROUP,
            TILES=tiles, GROUPS=tiles * (tile // GROUP), num_warps=WARPS, **dependent,
        )  # fmt: skip
        for again in (False, True):
            launch(
                _weigh_tiles, (cdiv(num_tiles, weighed), num_rows),
                *rows, temperature, top_p, min_p, seeds, row_task, row_max, row_sum, tile_max,
                chosen, tile_mass, chosen_again, tile_mass_again, num_tiles, weighed,
                AGAIN=again, NARROW=narrow, FAST=fast, TILE=tile, TILES=tiles,
                num_warps=WEIGH_WARPS * more, **dependent,
            )  # fmt: skip
        launch(
            _finish_rows, (num_rows,),
            *parameters, row_task, row_max, row_sum, row_count, row_key, groups, tile_max,
            chosen, chosen if noted is None else noted, tile_mass, chosen_again, tile_mass_again, num_tiles,
            SHIFT=shift, NARROW=narrow, FAST=fast, TILE=tile, GROUP=GROUP,
            TILES=tiles, SPAN=max(1, LARGE // tile), num_warps=ROW_WARPS, **dependent,
        )  # fmt: skip
    if row_rules is not rules:
        rules.copy_(row_rules)
    if last_token is not None and noted is not None and noted is not last_token:
        last_token.copy_(noted)
    return chosen, lse
