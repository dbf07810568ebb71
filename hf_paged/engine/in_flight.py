"""A step between its launch and the arrival of its tokens."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .async_copy import HostCopy
from .sampling.token_selector import Selection
from .scheduling.request import Request, Sequence
from .scheduling.step import ScheduledStep


@dataclass(slots=True)
class InFlightStep:
    """A step whose results are on their way.

    Attributes:
        work: its sequences.
        slots: int64 ``[n]`` on the host: sequences whose tokens ``selection`` has.
        generation: int64 ``[n]``, of these slots: tokens of sequences that have left meanwhile are dropped.
        selection: their tokens, None where there are none.
        tokens: the same on their way to the host.
        firsts: requests whose first token this is.
        drafted: sequences whose candidates are verified, with their logits ``[candidates + 1, vocab]``.
        beams: sequences of beam searches, with their logits ``[1, vocab]``.
        prompts: sequences whose prompt's log-probabilities were asked for: sequence, first token computed, logits.
    """

    work: ScheduledStep
    slots: np.ndarray
    selection: Selection | None
    generation: np.ndarray | None = None
    tokens: HostCopy | None = None
    firsts: list[Request] = field(default_factory=list)
    drafted: list[tuple[Sequence, torch.Tensor]] = field(default_factory=list)
    beams: dict[Request, list[tuple[Sequence, torch.Tensor]]] = field(default_factory=dict)
    prompts: list[tuple[Sequence, int, torch.Tensor]] = field(default_factory=list)

    @property
    def has_arrived(self) -> bool:
        """Whether its tokens are on the host."""
        return self.tokens is None or self.tokens.is_here

    def tokens_by_slot(self, generation: np.ndarray) -> dict[int, int]:
        """Its tokens on the host, of the rows that still have their slots; waits for them.

        Args:
            generation: int64 ``[num_slots]``, see :class:`Slots`.
        """
        if self.tokens is None:
            return {}
        is_there = generation[self.slots] == self.generation
        return dict(zip(self.slots[is_there].tolist(), self.tokens.wait()[is_there].tolist()))

    @property
    def num_tokens(self) -> int:
        """Tokens that the step chooses, those of verified candidates counted as one."""
        return len(self.slots) + len(self.drafted) + sum(len(sequences) for sequences in self.beams.values())
