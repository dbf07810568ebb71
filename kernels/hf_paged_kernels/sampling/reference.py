"""Choosing tokens from logits, in plain torch: what any sampling kernel must reproduce.

A token is drawn by the Gumbel-max trick (Gumbel 1954; Yellott 1977): with independent standard Gumbel noise g,
argmax(logits + g) is distributed as softmax(logits). The noise is a pure function of (seed, position in the sequence,
token id), so a draw does not depend on what else is in the batch or on the order of rows::

    key  = splitmix64(splitmix64(seed) ^ position)              64 bits a row      (Steele, Lea, Flood 2014)
    bits = mix32(mix32(token ^ low32(key)) + high32(key))       32 bits a token    ("lowbias32" of Wellons 2018)
    u    = (bits + 0.5) / 2**32                                 exact in float64
    g    = float32(-log(-log(u)))                               float64 logarithms

Everything up to u is integer arithmetic and the same on every device. The logarithms are taken in float64 and rounded
once, so that two libraries which differ in the last bits of a float64 still give the same float32.

Noise for every token of a large vocabulary costs more than reading its logits. So a vocabulary of more than
:data:`TILE` tokens is drawn from in two steps, a tile of it and then a token of the tile (the largest of several
Gumbel variables is one, Maddison, Tarlow, Minka 2014)::

    tile  = argmax over tiles of log(sum of exp(scores in the tile)) + g(tile)
    token = argmax over the tile of scores + g(token)

Top-p is rejection sampling: a token is drawn from all, and one that top-p removes leaves those that rank above it to
draw from, with other noise for tiles. (That of tokens may stay: which of the others comes first does not depend on one
having come before them.) With top-k there are few tokens to draw from, and no tiles.

Warpers keep exactly the tokens that transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and
MinPLogitsWarper keep when applied in that order: the same operations in the same order, with a parameter per row.
"""

from collections.abc import Sequence

import numpy as np
import torch

COUNT, PENALTY, PRESENCE, FREQUENCY, MASK_AT, COUNTS_AT, ENTRIES = range(1, 8)
MAX_BIASES = 512
MARKS = ENTRIES + 3 * MAX_BIASES
TOKENS_OF_WORD = 32
NO_RULES, WITH_BIASES, WITH_MARKS, WITH_COUNTS, WITH_MASK, MASK_IS_SPENT = 0, 1, 2, 4, 8, 16
SEEN, BANNED = 1, 2
MOST_COUNTED = 32767
"""The layout of a slot's rules: see :func:`slot_rules`."""

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
SPLITMIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
SPLITMIX_B = -7723592293110705685  # 0x94D049BB133111EB
MIX_A = 0x7FEB352D
MIX_B = -2073254261  # 0x846CA68B
"""Unsigned constants as the signed integers that torch has; products wrap as unsigned ones do."""

TILE = 2048
"""Tokens of a tile."""
MAX_TILES = 256
"""Of a vocabulary: with larger ones, tiles are larger. Triton 3.6 fails on as many as a program has threads."""
TILE_NOISE = -(2**31)
TILES_OF_TURN = MAX_TILES
"""Tile i has the noise of the token ``TILE_NOISE + turn * TILES_OF_TURN + i``, which no vocabulary has."""


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of a signed integer tensor."""
    width = 64 if x.dtype == torch.int64 else 32
    return (x >> bits) & ((1 << (width - bits)) - 1)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """One step of the SplitMix64 generator on int64 ``[...]``, read as unsigned."""
    z = x + GOLDEN
    z = (z ^ _shift_right(z, 30)) * SPLITMIX_A
    z = (z ^ _shift_right(z, 27)) * SPLITMIX_B
    return z ^ _shift_right(z, 31)


def mix32_(x: torch.Tensor) -> torch.Tensor:
    """The integer hash "lowbias32" on int32 ``[...]``, read as unsigned, in place."""
    x ^= _shift_right(x, 16)
    x *= MIX_A
    x ^= _shift_right(x, 15)
    x *= MIX_B
    x ^= _shift_right(x, 16)
    return x


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise key of each row.

    Args:
        seeds: ``[num_rows]`` int64.
        positions: ``[num_rows]`` int64, index in its sequence of the token that is drawn.

    Returns:
        Low and high half of the key, int32 ``[num_rows]`` each.
    """
    key = splitmix64(splitmix64(seeds) ^ positions)
    return key.to(torch.int32), (key >> 32).to(torch.int32)


def uniform_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """An odd multiple of 2**-33 between 0 and 1 for every row and token, equally likely to be any of them.

    Args:
        seeds, positions: ``[num_rows]`` int64.
        token_ids: ``[num_tokens]`` int32, in any order.

    Returns:
        ``[num_rows, num_tokens]`` float64, exact.
    """
    low, high = row_keys(seeds, positions)
    bits = mix32_(token_ids[None, :] ^ low[:, None])
    bits += high[:, None]
    mix32_(bits)
    # A signed 32-bit word is its unsigned value, or 2**32 below it.
    u = (bits < 0).double()
    u *= 2.0**32
    u += bits
    u += 0.5
    u *= 2.0**-32
    return u


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of every row and token: arguments as for :func:`uniform_noise`.

    Returns:
        ``[num_rows, num_tokens]`` float32, all finite.
    """
    return uniform_noise(seeds, positions, token_ids).log_().neg_().log_().neg_().float()


def warp_logits(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    max_top_k: int = 0,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p, each with its own parameter per row; None where no row uses it.

    Args:
        logits: ``[num_rows, vocab]`` float32, not written.
        temperature: ``[num_rows]`` float32, 1 leaves a row as it is.
        top_k: ``[num_rows]`` int64, 0 leaves a row as it is. Ties with the k-th logit are kept.
        max_top_k: the largest of ``top_k``, known to the host.
        top_p: ``[num_rows]`` float64, 1 leaves a row as it is (Holtzman et al. 2019).
        min_p: ``[num_rows]`` float32, 0 leaves a row as it is (Nguyen et al. 2024).

    Returns:
        ``[num_rows, vocab]`` float32, -inf where a token was removed. At least one token of a row is left.
    """
    vocab_size = logits.shape[-1]
    if temperature is not None:
        logits = logits / temperature[:, None]
    if top_k is not None and max_top_k > 0:
        largest = logits.topk(min(max_top_k, vocab_size), dim=-1).values
        index = (top_k - 1).clamp(0, largest.shape[-1] - 1)
        kth = largest.gather(1, index[:, None])
        kth = torch.where(top_k[:, None] > 0, kth, -torch.inf)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        # Not a stable sort: among ties at the border, the one that transformers' own call keeps is kept.
        ascending, order = torch.sort(logits, dim=-1)
        below = ascending.softmax(dim=-1).cumsum(dim=-1)
        # 1 - top_p is rounded once, as in transformers. A row with top_p = 1 loses nothing, not even probability 0.
        threshold = torch.where(top_p < 1, 1 - top_p, -1.0).float()
        removed = below <= threshold[:, None]
        removed[:, -1] = False
        logits = logits.masked_fill(torch.empty_like(removed).scatter_(1, order, removed), -torch.inf)
    if min_p is not None:
        probabilities = logits.softmax(dim=-1)
        top, best = probabilities.max(dim=-1, keepdim=True)
        removed = (probabilities < min_p[:, None] * top).scatter_(1, best, False)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def rules_places(vocab_size: int) -> tuple[int, int, int]:
    """Where the mask of a row of rules begins, and its counts; and the words of the whole row."""
    mask_at = MARKS + -(-vocab_size // TOKENS_OF_WORD)
    counts_at = mask_at + -(-vocab_size // 64)
    return mask_at, counts_at, counts_at + -(-vocab_size // 4)


def slot_rules(
    vocab_size: int,
    *,
    biases: Sequence[tuple[int, float, int, int]] = (),
    penalty: float | None = None,
    seen: Sequence[int] | np.ndarray = (),
    banned: Sequence[int] = (),
    presence: float = 0.0,
    frequency: float = 0.0,
    has_mask: bool = False,
) -> np.ndarray:
    """A row of the table of rules, int64, without its mask and counts: what happens to logits, in float32, before
    temperature and warpers.

    ::

        kind, a sum of flags; number of biases                              NO_RULES: the rest is not read
        penalty, presence and frequency penalty as float64; place of the mask, of the counts
        [token << 32 | bias as float32, first position, last position + 1]  MAX_BIASES of them
        marks, two bits a token: SEEN, BANNED                               read WITH_MARKS
        mask, one bit a token, as int32                                     read WITH_MASK
        counts of generated tokens, int16 each                              read WITH_COUNTS

    In this order: biases are added, -inf whatever the logit is; of tokens that were seen, positive logits are divided
    by the penalty and negative ones multiplied (Keskar et al. 2019); of tokens that were generated, the frequency
    penalty times their count and the presence penalty are subtracted (OpenAI's and vLLM's definition); banned tokens,
    and those whose bit in the mask is 0, get -inf. A token that is chosen is marked as seen, and counted up to
    :data:`MOST_COUNTED`.

    A mask is for one choice, after which the kind has MASK_IS_SPENT in the place of WITH_MASK. What is chosen then,
    without a mask, counts for nothing: a step chooses for all of its rows, and rows with masks choose once more.

    Args:
        vocab_size: of the logits, at most.
        biases: token, bias, and between which positions of the new token, at most :data:`MAX_BIASES`.
        penalty: for tokens that were seen, None for none.
        seen, banned: tokens.
        presence, frequency: penalties of tokens that were generated.
        has_mask: a mask is written before each choice.
    """
    mask_at, counts_at, _ = rules_places(vocab_size)
    words = np.zeros(mask_at, dtype=np.int64)
    with_marks = penalty is not None or len(banned) > 0
    words[0] = WITH_MARKS * with_marks + WITH_BIASES * bool(biases) + MASK_IS_SPENT * has_mask
    words[0] += WITH_COUNTS * (presence != 0 or frequency != 0)
    words[COUNT], words[MASK_AT], words[COUNTS_AT] = len(biases), mask_at, counts_at
    words[PENALTY : FREQUENCY + 1].view(np.float64)[:] = 1.0 if penalty is None else penalty, presence, frequency
    for i, (token, bias, first, end) in enumerate(biases):
        bits = int(np.array(bias, dtype=np.float32).view(np.uint32))
        words[ENTRIES + 3 * i : ENTRIES + 3 * i + 3] = token << 32 | bits, first, end
    marks = words[MARKS:].view(np.uint64)
    for tokens, mark in ((seen if penalty is not None else (), SEEN), (banned, BANNED)):
        ids = np.asarray(tokens, dtype=np.uint64)
        ids = ids[ids < vocab_size]
        one = np.uint64(mark) << (ids % np.uint64(TOKENS_OF_WORD) * np.uint64(2))
        np.bitwise_or.at(marks, (ids // np.uint64(TOKENS_OF_WORD)).astype(np.int64), one)
    return words


def ruled_logits(logits: torch.Tensor, position: int, rules: torch.Tensor) -> torch.Tensor:
    """Logits ``[vocab]`` of one row, float32, as its rules, int64 of :func:`slot_rules`, change them."""
    x, ids = logits.float().clone(), torch.arange(len(logits), device=logits.device)
    for entry in rules[ENTRIES : ENTRIES + 3 * int(rules[COUNT])].view(-1, 3):
        packed, first, end = entry.tolist()
        bias, token = entry[:1].view(torch.float32)[0], packed >> 32
        if first <= position < end and token < len(x):
            x[token] = x[token] + bias if bias > -torch.inf else bias
    kind = int(rules[0])
    penalty, presence, frequency = rules[PENALTY : FREQUENCY + 1].view(torch.float64).float()
    if kind & WITH_MARKS:
        marks = rules[MARKS:][ids // TOKENS_OF_WORD] >> (ids % TOKENS_OF_WORD * 2)
        x = torch.where(marks & SEEN > 0, torch.where(x < 0, x * penalty, x / penalty), x)
        x = x.masked_fill(marks & BANNED > 0, -torch.inf)
    if kind & WITH_COUNTS:
        counts = rules[int(rules[COUNTS_AT]) :].view(torch.int16)[: len(x)]
        x = torch.where(counts > 0, x - frequency * counts.float() - presence, x)
    if kind & WITH_MASK:
        mask = rules[int(rules[MASK_AT]) :].view(torch.int32)[ids // 32] >> (ids % 32).int()
        x = x.masked_fill(mask & 1 == 0, -torch.inf)
    return x


def _note_choice(rules: torch.Tensor, token: int) -> None:
    """What a row's rules, int64 of :func:`slot_rules`, keep of the token that was chosen; a spent mask: nothing."""
    kind = int(rules[0])
    if token != INVALID_TOKEN and not kind & MASK_IS_SPENT:
        if kind & WITH_MARKS:
            rules[MARKS + token // TOKENS_OF_WORD] |= SEEN << token % TOKENS_OF_WORD * 2
        if kind & WITH_COUNTS:
            counts = rules[int(rules[COUNTS_AT]) :].view(torch.int16)
            counts[token] = min(int(counts[token]) + 1, MOST_COUNTED)
    if kind & WITH_MASK:
        rules[0] = kind ^ (WITH_MASK | MASK_IS_SPENT)


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of ``[..., vocab]``, any float dtype, as float64 ``[...]``.

    Rounded to float32 it would be off by what log-probabilities are made of where logits are large.
    """
    x = logits.float()
    largest = x.amax(-1)
    pivot = torch.where(largest.isfinite(), largest, 0.0)
    return pivot.double() + (x - pivot[..., None]).logsumexp(-1).double()


INVALID_TOKEN = -1
"""Stands for a token where none can be chosen."""


def choose_tokens(scores: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The token of each row: argmax of the scores, or of scores plus Gumbel noise.

    Args:
        scores: ``[num_rows, vocab]`` float32.
        noise: ``[num_rows, vocab]`` float32, or None to take the largest score.

    Returns:
        ``[num_rows]`` int64; :data:`INVALID_TOKEN` for a row with a NaN score, and for a drawn row without any finite
        score or with an infinite one, which no distribution has.
    """
    if noise is None:
        best, token_ids = scores.max(dim=-1)
        return token_ids.masked_fill_(best.isnan(), INVALID_TOKEN)
    best, token_ids = (scores + noise).max(dim=-1)
    return token_ids.masked_fill_(~best.isfinite(), INVALID_TOKEN)


def tile_size(vocab_size: int) -> int:
    """Tokens of a tile of a vocabulary, a power of two."""
    tile = TILE
    while tile * MAX_TILES < vocab_size:
        tile *= 2
    return tile


def draw_tokens(
    scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, *, tiled: bool = True, turn: int = 0
) -> torch.Tensor:
    """A token of each row, distributed as the softmax of its scores.

    Args:
        scores: ``[num_rows, vocab]`` float32, -inf where a token cannot be drawn.
        seeds, positions: ``[num_rows]`` int64.
        tiled: a tile first, if the vocabulary has several.
        turn: draws of one row and position before this one.

    Returns:
        ``[num_rows]`` int64, :data:`INVALID_TOKEN` as in :func:`choose_tokens`.
    """
    num_rows, vocab_size = scores.shape
    size = tile_size(vocab_size)
    token_ids = torch.arange(vocab_size, dtype=torch.int32, device=scores.device)
    if not tiled or vocab_size <= size:
        return choose_tokens(scores, gumbel_noise(seeds, positions, token_ids))
    tiles = torch.nn.functional.pad(scores, (0, -vocab_size % size), value=-torch.inf).view(num_rows, -1, size)
    masses = tiles.double().logsumexp(-1)
    first = TILE_NOISE + turn * TILES_OF_TURN
    ids = torch.arange(first, first + tiles.shape[1], dtype=torch.int32, device=scores.device)
    chosen = (masses + gumbel_noise(seeds, positions, ids)).argmax(-1)
    ids = chosen[:, None] * size + torch.arange(size, device=scores.device)
    noise = torch.cat([gumbel_noise(seeds[i : i + 1], positions[i : i + 1], ids[i].int()) for i in range(num_rows)])
    index = choose_tokens(tiles[torch.arange(num_rows, device=scores.device), chosen], noise)
    return torch.where(index == INVALID_TOKEN, index, index + chosen * size)


def draw_kept_tokens(
    scores: torch.Tensor, kept: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Tokens drawn from all scores until one is kept, each time from those that rank above the one before.

    Args:
        scores: ``[num_rows, vocab]`` float32.
        kept: bool ``[num_rows, vocab]``.
        seeds, positions: ``[num_rows]`` int64.

    Returns:
        ``[num_rows]`` int64, as in :func:`draw_tokens`.
    """
    drawn = draw_tokens(scores, seeds, positions)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    left, turn = torch.arange(len(drawn), device=scores.device), 1
    while True:
        token = drawn[left]
        left = left[(token != INVALID_TOKEN) & ~kept[left, token.clamp(min=0)]]
        if not len(left):
            return drawn
        token = drawn[left, None]
        score = scores[left].gather(1, token)
        is_above = (scores[left] > score) | ((scores[left] == score) & (ids > token))
        others = scores[left].masked_fill(~(is_above | kept[left]), -torch.inf)
        drawn[left] = draw_tokens(others, seeds[left], positions[left], turn=turn)
        turn += 1


def sample_tokens_reference(
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
    """See ``sampling_ops.sample_tokens_op`` for the arguments. Reads parameters back to the host."""
    if last_token is not None:
        positions = positions[slots]
    lse = torch.full((len(slots),), torch.nan, dtype=torch.float64, device=logits.device)
    asked = (wants_lse[slots] != 0).nonzero().squeeze(1)
    if len(asked):
        lse[asked] = log_sum_exp(logits[asked])
    ruled = rules[slots, 0].nonzero().flatten().tolist()
    if ruled:
        logits = logits.to(torch.float32, copy=True)
        for row in ruled:
            logits[row] = ruled_logits(logits[row], int(positions[row]), rules[slots[row]])
    tokens = _choose(logits, slots, positions, temperature, top_k, top_p, min_p, seeds)
    for row in ruled:
        _note_choice(rules[slots[row]], int(tokens[row]))
    if last_token is not None:
        last_token[slots] = tokens.clamp(min=0)
    return tokens, lse


def _choose(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
) -> torch.Tensor:
    """The tokens of rows without rules."""
    # Widening to float32 changes neither the order nor the ties.
    is_drawn = temperature[slots].float() > 0
    if not is_drawn.any():
        return choose_tokens(logits)
    drawn, greedy = (rows.nonzero().squeeze(1) for rows in (is_drawn, ~is_drawn))
    token_ids = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
    if len(greedy):
        token_ids[greedy] = choose_tokens(logits[greedy])
        logits, slots, positions = logits[drawn], slots[drawn], positions[drawn]

    def used(parameters: torch.Tensor, neutral: float) -> torch.Tensor | None:
        # Left out where no row uses it; left out or neutral, a row's scores are the same.
        values = parameters[slots]
        return values if bool((values != neutral).any()) else None

    t, p, k = used(temperature, 1), used(min_p, 0), used(top_k, 0)
    t, p = None if t is None else t.float(), None if p is None else p.float()
    x, seeds, most = logits.float(), seeds[slots], int(top_k[slots].max())
    is_tiled = (top_k[slots] <= 0) | (top_k[slots] >= logits.shape[-1])
    scores = warp_logits(x, temperature=t, top_k=k, max_top_k=most, top_p=used(top_p, 1), min_p=p)
    if not is_tiled.any() or logits.shape[-1] <= tile_size(logits.shape[-1]):
        token_ids[drawn] = draw_tokens(scores, seeds, positions, tiled=False)
        return token_ids
    every = torch.where(is_tiled[:, None], warp_logits(x, temperature=t, min_p=p), scores)
    # What is kept must be there to be drawn, however both are rounded.
    every = torch.where(scores > -torch.inf, scores, every)
    tokens = draw_kept_tokens(every, scores > -torch.inf, seeds, positions)
    if not is_tiled.all():
        tokens = torch.where(is_tiled, tokens, draw_tokens(scores, seeds, positions, tiled=False))
    token_ids[drawn] = tokens
    return token_ids
