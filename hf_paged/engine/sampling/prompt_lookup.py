"""Prompt lookup decoding (Saxena 2023): candidates are what followed an earlier occurrence of the last tokens.

The engine runs the model once over the last token and the candidates, chooses a token at each of these positions with
the row's own rules, and keeps the choices up to the first that is not its candidate. A drawn token's noise is a
function of its position, so both greedy and sampled requests get the tokens that they would get without candidates.
"""

from collections.abc import Callable

import numpy as np

NO_CANDIDATES = np.empty(0, dtype=np.int64)


def propose(tokens: np.ndarray, num_candidates: int, max_ngram_size: int) -> np.ndarray:
    """Candidates for the next tokens.

    Args:
        tokens: ``[L]`` int64, the row's history.
        num_candidates: the most candidates.
        max_ngram_size: the longest run of last tokens that is looked for; shorter ones are tried after it.

    Returns:
        ``[k]`` int64, 0 <= k <= ``num_candidates``: what followed the first earlier occurrence of the longest such run.
    """
    length = len(tokens)
    for size in range(min(max_ngram_size, length - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        matches = np.flatnonzero((windows == tokens[length - size :]).all(axis=1))
        if matches.size:
            start = int(matches[0]) + size
            return tokens[start : start + num_candidates].copy()
    return NO_CANDIDATES


def accept(candidates: np.ndarray, choose: Callable[[int], int], is_last: Callable[[int, int], bool]) -> list[int]:
    """The tokens that a verification step yields: 1 to k + 1.

    Args:
        candidates: ``[k]`` int64.
        choose: gives the row's token at the i-th position, after i accepted candidates.
        is_last: whether the sequence ends with the i-th token, given with its index.
    """
    tokens: list[int] = []
    for index in range(len(candidates) + 1):
        token = choose(index)
        tokens.append(token)
        if is_last(index, token) or index == len(candidates) or token != candidates[index]:
            break
    return tokens
