"""What one step computes."""

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class ScheduledStep:
    """The rows of one step; decode rows come first.

    Attributes:
        slots: int64 ``[num_rows]``.
        counts: int64 ``[num_rows]``, tokens that each computes.
        num_decode: rows at the front that compute one token and have computed all before it.
        samples: bool ``[num_rows]``, whether the row's last logits choose a token.
    """

    slots: np.ndarray
    counts: np.ndarray
    num_decode: int
    samples: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.counts.sum())
