"""What the host knows of every running sequence, in arrays: a decode step costs no Python per sequence."""

import numpy as np

from .request import Sequence

NO_EOS = -1


class Slots:
    """``num_slots`` places for running sequences. A sequence keeps its slot until it ends or is preempted.

    Attributes (arrays ``[num_slots]``, int64 unless said):
        length: tokens in the history.
        computed: tokens whose keys and values are in pages, or will be once the steps launched so far have run.
        prompt_length: tokens of the prompt.
        max_length: prompt and new tokens at most.
        draft: candidate tokens behind the history that the next step verifies.
        eos: ``[num_slots, most ids of one sequence]``, padded with -1.
        decoding: bool, the next step computes the last token only.
        watched: bool, has stopping criteria beyond eos and length.
        shares: bool, may share its last, partly filled page with another sequence.
        is_row: bool, tokens are chosen one by one (False: beams, verified drafts).
        generation: how many sequences have left the slot: a step's tokens are for the one it was launched with.
        history: int64 ``[num_slots, capacity]``, grown by doubling.
        sequences: the sequence in each slot, or None.
    """

    def __init__(self, num_slots: int, capacity: int = 256) -> None:
        self.num_slots = num_slots
        self.length, self.computed, self.prompt_length, self.max_length, self.draft, self.generation = (
            np.zeros(num_slots, dtype=np.int64) for _ in range(6)
        )
        self.decoding, self.watched, self.shares, self.is_row = (np.zeros(num_slots, dtype=bool) for _ in range(4))
        self.eos = np.full((num_slots, 1), NO_EOS, dtype=np.int64)
        self.history = np.zeros((num_slots, capacity), dtype=np.int64)
        self.sequences: list[Sequence | None] = [None] * num_slots
        # Low slots first: a small batch stays in the front of every table.
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots without a sequence."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots with a sequence."""
        return self.num_slots - len(self._free)

    def admit(self, sequence: Sequence) -> int:
        """Give a sequence a slot and put its tokens there; returns the slot."""
        slot = self._free.pop()
        self.length[slot] = 0
        # First: whatever fails from here on, release() gives it back.
        self.sequences[slot], sequence.slot = sequence, slot
        request = sequence.request
        tokens = sequence.tokens
        self.reserve(len(tokens) + 1)
        self.history[slot, : len(tokens)] = tokens
        self.length[slot] = len(tokens)
        self.computed[slot] = self.draft[slot] = 0
        self.prompt_length[slot] = len(request.prompt)
        self.max_length[slot] = request.rules.max_length
        self.decoding[slot] = self.shares[slot] = False
        self.watched[slot] = request.is_watched
        self.is_row[slot] = request.rules.mode == "rows"
        eos = request.rules.eos_token_ids
        if len(eos) > self.eos.shape[1]:
            wider = np.full((self.num_slots, len(eos)), NO_EOS, dtype=np.int64)
            wider[:, : self.eos.shape[1]] = self.eos
            self.eos = wider
        self.eos[slot] = NO_EOS
        self.eos[slot, : len(eos)] = eos
        sequence.saved = None
        return slot

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's slot back; its tokens stay with the sequence."""
        slot = sequence.slot
        sequence.saved = self.history[slot, : self.length[slot]].copy()
        self.sequences[slot] = None
        self.decoding[slot] = self.shares[slot] = False
        self.length[slot] = self.computed[slot] = self.draft[slot] = 0
        self.generation[slot] += 1
        sequence.slot = -1
        self._free.append(slot)

    def reserve(self, capacity: int) -> None:
        """Have room for ``capacity`` tokens of history in every slot."""
        old = self.history.shape[1]
        if capacity > old:
            history = np.zeros((self.num_slots, max(capacity, 2 * old)), dtype=np.int64)
            history[:, :old] = self.history
            self.history = history

    def sequence(self, slot: int) -> Sequence:
        """The sequence in a slot that has one."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def tokens(self, slot: int) -> np.ndarray:
        """int64 ``[length]``, a view."""
        return self.history[slot, : self.length[slot]]

    def target(self, sequence: Sequence) -> int:
        """Tokens that a sequence computes before it decodes."""
        length, prompt = int(self.length[sequence.slot]), len(sequence.request.prompt)
        if not sequence.request.forked:
            return prompt  # The other sequences go on from the prompt that the first computes.
        if sequence.request.rules.mode == "beams" and length > prompt:
            return length - 1  # Beams choose their tokens together, so they wait for one another.
        return length

    def check(self) -> None:
        """Prove the books (AssertionError if wrong)."""
        used = [slot for slot, sequence in enumerate(self.sequences) if sequence is not None]
        assert sorted(self._free + used) == list(range(self.num_slots)), "a slot is lost"
        for slot in used:
            assert self.sequence(slot).slot == slot, f"slot {slot} holds a sequence whose slot is another"
            assert 0 <= self.computed[slot] <= self.length[slot], f"slot {slot} computed more tokens than it has"
