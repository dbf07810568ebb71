"""Settings of the kernel for linear layers of some tens of tokens, from measurements on an H200."""

from dataclasses import dataclass, replace

MAX_TOKENS = 256
"""Tokens up to which there are settings for some shapes."""
FEATURES = 64
"""Output features of most programs: of the gate and of the up projection each, where there are two."""
PROGRAMS = 132
"""Multiprocessors of an H200: programs that run at the same time, one on each."""
BUSY = 64
"""Programs that a launch has at least, for the memory to be busy."""
SHORT_ROW = 1024
"""Columns of weights up to which launches cost more than what cuBLAS does better with more than 64 tokens."""
MAX_PARTS = 4
MIN_STEPS = 4
"""Tiles of 128 columns that a part adds up at least."""


@dataclass(frozen=True, slots=True)
class DecodeLinearSettings:
    """Settings of one launch.

    Attributes:
        tokens: columns of a program's tile; 32, 64 or 128.
        more_tokens: columns of a second tile beside it, 0: there is none.
        block_k: in_features of a step.
        stages: steps in flight.
        num_parts: programs that share the in_features of a tile, each with a part of the sum.
        features: rows of a program's weights, of each projection; 64 or 128.
    """

    tokens: int
    more_tokens: int
    block_k: int
    stages: int
    num_parts: int = 1
    features: int = FEATURES


def choose_decode_linear(
    num_tokens: int, out_features: int, in_features: int, gated: bool = False, in_parts: bool = False
) -> DecodeLinearSettings | None:
    """Settings for ``[num_tokens, in_features] x [out_features, in_features]`` in half precision; None: use cuBLAS.

    A pure function of its arguments, from measurements on an H200 (``eval/results/decode_step_h200.md``).
    ``out_features`` counts both halves of a gated layer. With ``in_parts`` the sums may come as several parts.

    Weights are read once from memory, but x once by every program from the L2 cache: more tokens than the 64 of a tile
    pay only where they let more programs share the reading of the weights.
    """
    if not 16 < num_tokens <= MAX_TOKENS or in_features < 512 or in_features % 8:
        return None
    few = 32 if num_tokens <= 32 else 64
    tiles = -(-out_features // (2 * FEATURES if gated else FEATURES))
    # Rows so short that the start is most of it, even for two tiles of tokens at a time.
    is_short = in_features <= SHORT_ROW and 2 * tiles <= PROGRAMS
    if gated:
        if tiles < 48 or (num_tokens > 64 and not is_short):
            return None
        if num_tokens > 128:
            return DecodeLinearSettings(64, 0, 64, 4) if num_tokens > 152 else None
        # Two programs on a multiprocessor where there are more than one for each.
        return DecodeLinearSettings(few, 0, 128, 2 if tiles > PROGRAMS else 4)
    if not in_parts:
        if num_tokens <= 64:
            return DecodeLinearSettings(few, 0, 128, 6) if BUSY <= tiles <= PROGRAMS else None
        if not is_short or 2 * tiles < BUSY:
            return None
        if num_tokens <= 128:
            return DecodeLinearSettings(64, 0, 128, 6)
        return DecodeLinearSettings(64, 32, 128, 5) if num_tokens <= 192 else DecodeLinearSettings(128, 0, 128, 4)
    max_parts = min(MAX_PARTS, in_features // (128 * MIN_STEPS))
    if num_tokens <= 64 or (tiles <= 32 and num_tokens <= 192):
        best = DecodeLinearSettings(few, 0, 128, 6)
    elif tiles <= 32 or 104 < num_tokens <= 128:
        best = DecodeLinearSettings(128, 0, 128, 4)
    elif num_tokens <= 104 or (num_tokens <= 192 and in_features > 8192):
        return None
    elif num_tokens <= 192:
        best = DecodeLinearSettings(128, 64, 64, 7)
    else:
        best = DecodeLinearSettings(128, 0, 64, 7, features=128)
    programs = -(-out_features // best.features) * -(-num_tokens // (best.tokens + best.more_tokens))
    num_parts = min(max_parts, PROGRAMS // programs)
    if num_parts * programs < BUSY or (num_tokens > 64 and num_parts < 2):
        return None
    return replace(best, num_parts=num_parts)
