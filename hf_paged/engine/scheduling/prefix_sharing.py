"""Pages that sequences share: cached prefixes, and what others compute in the same step."""

from collections.abc import Hashable

import numpy as np

from .request import Row
from .slot_pages import SlotPages
from .slots import Slots

MAX_SOURCES = 8
"""Rows with the same first page that a row looks through for most tokens in common, the last ones."""


class PrefixSharing:
    """Finds the beginning of a sequence in pages that are there, or will be by the end of the step.

    Args:
        slots, pages: of the sequences.
        is_on: False: nothing is found or kept.

    Attributes:
        sharers: rows that share what others compute in the step that is being planned.
    """

    def __init__(self, slots: Slots, pages: SlotPages, is_on: bool) -> None:
        self.slots, self.pages, self.is_on = slots, pages, is_on
        self.sharers: dict[Row, None] = {}
        # Rows whose prompts are being computed, by salt and the tokens of their first page; None: not looked at yet.
        self._beginnings: dict[tuple[Hashable, bytes], list[Row]] | None = None

    def begin_step(self) -> None:
        """Another step is planned."""
        self.sharers.clear()
        self._beginnings = None

    def find(self, row: Row, prefilling: list[Row], chunks: dict[Row, int]) -> int | None:
        """Give a row that just got its slot the pages of its beginning that are known.

        Args:
            row: without pages.
            prefilling: rows whose prompts are being computed.
            chunks: tokens of them that this step computes.

        Returns:
            Tokens that need not be computed; None: nothing was looked for.
        """
        prefixes, request = self.pages.pool.prefixes, row.request
        if not self.is_on or not request.uses_prefixes or prefixes is None:
            return None
        tokens = self.slots.tokens(row.slot)
        limit = min(len(tokens) - 1, len(request.prompt) - 1 if not request.forked else len(tokens))
        match = prefixes.match(tokens.tolist(), request.salt, max_tokens=limit)
        self.pages.adopt(row.slot, match.pages)
        return self.share_inflight_prefix(row, tokens[:limit], match.num_tokens, prefilling, chunks)

    def share_inflight_prefix(
        self, row: Row, tokens: np.ndarray, found: int, prefilling: list[Row], chunks: dict[Row, int]
    ) -> int:
        """Share full pages with the row that has most of ``tokens`` by the end of this step: every layer writes the
        keys and values of all rows before any row attends.

        Args:
            row: that has pages of the first ``found`` tokens.
            tokens: int64 ``[n]``, what it may share.
            found: a multiple of the page size.
            prefilling: rows whose prompts are being computed.
            chunks: tokens of them that this step computes.

        Returns:
            Tokens that need not be computed.
        """
        slots, page_size = self.slots, self.pages.page_size
        if self._beginnings is None:
            self._beginnings = {}
            for other in prefilling:
                self._beginnings.setdefault(self._beginning(other), []).append(other)
        alike = self._beginnings.setdefault(self._beginning(row), [])
        source, most = None, found
        # Samples of a prompt come one after the other.
        for other in alike[: -MAX_SOURCES - 1 : -1]:
            if other.slot < 0:
                continue
            end = min(len(tokens), int(slots.computed[other.slot]) + chunks.get(other, 0))
            differs = np.flatnonzero(slots.history[other.slot, :end] != tokens[:end])
            same = (int(differs[0]) if len(differs) else end) // page_size * page_size
            if same > most and self.pages.can_share_prefix_from(other.slot, row.slot, same):
                source, most = other, same
        alike.append(row)
        if source is not None:
            self.pages.share_prefix_from(source.slot, row.slot, most)
            self.sharers[row] = None
        return most

    def _beginning(self, row: Row) -> tuple[Hashable, bytes]:
        """What rows have in common that may share pages."""
        return row.request.salt, self.slots.history[row.slot, : self.pages.page_size].tobytes()

    def store(self, row: Row) -> None:
        """Keep the full pages of a row for later ones."""
        if not self.is_on or row.slot < 0 or row in self.sharers:
            return
        computed = int(self.slots.computed[row.slot])
        self.pages.store_prefix(row.slot, self.slots.tokens(row.slot)[:computed], row.request.salt)
