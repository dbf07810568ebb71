"""How much of the longest tests runs: all of it before a release, by ``make test-all`` (``HF_PAGED_TESTS=all``)."""

import itertools
import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

WORD = os.environ.get("HF_PAGED_TESTS", "")
if WORD not in ("", "all"):
    raise ValueError(f"HF_PAGED_TESTS={WORD!r}: only 'all' is accepted; without it the longest tests do less")
EVERYTHING = WORD == "all"


def pairwise(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """``parametrize`` with combinations in which any two values of any two arguments meet, and a tenth of the others,
    drawn with a fixed seed. All combinations with ``HF_PAGED_TESTS=all``, and on a GPU, where each takes little."""
    names, columns = tuple(values), tuple(map(tuple, values.values()))
    draw = random.Random(0)
    left = list(itertools.product(*(range(len(column)) for column in columns)))
    chosen = left
    if not EVERYTHING and not torch.cuda.is_available():
        draw.shuffle(left)
        num_extra, chosen, met = len(left) // 10, [], set[Any]()

        def pairs(combination: tuple[int, ...]) -> set[Any]:
            return set(itertools.combinations(enumerate(combination), 2))

        wanted = set().union(*map(pairs, left))
        while met != wanted:
            best = max(left, key=lambda combination: len(pairs(combination) - met))
            left.remove(best)
            chosen.append(best)
            met |= pairs(best)
        chosen = sorted(chosen + left[:num_extra])
    rows = [[column[i] for column, i in zip(columns, combination)] for combination in chosen]
    return pytest.mark.parametrize(names, [pytest.param(*row, id="-".join(map(str, row))) for row in rows])
