"""Pages that sequences share: cached prefixes, and what others compute in the same step."""

from collections.abc import Hashable

import numpy as np

from .request import Sequence
from .slot_pages import SlotPages
from .slots import Slots

MAX_SOURCES = 8
"""Sequences with the same first page that a sequence looks through for most tokens in common, the last ones."""


class PrefixSharing:
    """Finds the beginning of a sequence in pages that are there, or will be by the end of the step.

    Args:
        slots, pages: of the sequences.
        is_on: False: nothing is found or kept.

    Attributes:
        sharers: sequences that share what others compute in the step that is being planned.
    """

    def __init__(self, slots: Slots, pages: SlotPages, is_on: bool) -> None:
        self.slots, self.pages, self.is_on = slots, pages, is_on
        self.sharers: dict[Sequence, None] = {}
        # Those whose prompts are being computed, by salt and the tokens of their first page; None: not looked at yet.
        self._beginnings: dict[tuple[Hashable, bytes], list[Sequence]] | None = None

    def begin_step(self) -> None:
        """Another step is planned."""
        self.sharers.clear()
        self._beginnings = None

    def find(self, sequence: Sequence, prefilling: list[Sequence], chunks: dict[Sequence, int]) -> int | None:
        """Give a sequence that just got its slot the pages of its beginning that are known.

        Args:
            sequence: without pages.
            prefilling: sequences whose prompts are being computed.
            chunks: tokens of them that this step computes.

        Returns:
            Tokens that need not be computed; None: nothing was looked for.
        """
        prefixes, request = self.pages.pool.prefixes, sequence.request
        if not self.is_on or not request.uses_prefixes or prefixes is None:
            return None
        tokens = self.slots.tokens(sequence.slot)
        limit = min(len(tokens) - 1, len(request.prompt) - 1 if not request.forked else len(tokens))
        match = prefixes.match(tokens.tolist(), request.salt, max_tokens=limit)
        self.pages.adopt(sequence.slot, match.pages)
        return self.share_inflight_prefix(sequence, tokens[:limit], match.num_tokens, prefilling, chunks)

    def share_inflight_prefix(
        self,
        sequence: Sequence,
        tokens: np.ndarray,
        found: int,
        prefilling: list[Sequence],
        chunks: dict[Sequence, int],
    ) -> int:
        """Share full pages with the sequence that has most of ``tokens`` by the end of this step: every layer writes
        the keys and values of all sequences before any of them attends.

        Args:
            sequence: that has pages of the first ``found`` tokens.
            tokens: int64 ``[n]``, what it may share.
            found: a multiple of the page size.
            prefilling: sequences whose prompts are being computed.
            chunks: tokens of them that this step computes.

        Returns:
            Tokens that need not be computed.
        """
        slots, page_size = self.slots, self.pages.page_size
        if self._beginnings is None:
            self._beginnings = {}
            for other in prefilling:
                self._beginnings.setdefault(self._beginning(other), []).append(other)
        alike = self._beginnings.setdefault(self._beginning(sequence), [])
        source, most = None, found
        # Samples of a prompt come one after the other.
        for other in alike[: -MAX_SOURCES - 1 : -1]:
            if other.slot < 0:
                continue
            end = min(len(tokens), int(slots.computed[other.slot]) + chunks.get(other, 0))
            differs = np.flatnonzero(slots.history[other.slot, :end] != tokens[:end])
            same = (int(differs[0]) if len(differs) else end) // page_size * page_size
            if same > most and self.pages.can_share_prefix_from(other.slot, sequence.slot, same):
                source, most = other, same
        alike.append(sequence)
        if source is not None:
            self.pages.share_prefix_from(source.slot, sequence.slot, most)
            self.sharers[sequence] = None
        return most

    def _beginning(self, sequence: Sequence) -> tuple[Hashable, bytes]:
        """What sequences have in common that may share pages."""
        return sequence.request.salt, self.slots.history[sequence.slot, : self.pages.page_size].tobytes()

    def store(self, sequence: Sequence) -> None:
        """Keep the full pages of a sequence for later ones."""
        if not self.is_on or sequence.slot < 0 or sequence in self.sharers:
            return
        computed = int(self.slots.computed[sequence.slot])
        self.pages.store_prefix(sequence.slot, self.slots.tokens(sequence.slot)[:computed], sequence.request.salt)
