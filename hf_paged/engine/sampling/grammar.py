"""Grammars: which tokens may come next in a sequence."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LogitsProcessor


class GrammarMatcher(Protocol):
    """Follows one sequence. It is called from the engine's thread only, with the tokens that are generated."""

    def fill_bitmask(self, bitmask: np.ndarray) -> None:
        """Say which tokens may come next.

        Args:
            bitmask: int32 ``[ceil(vocab / 32)]`` of zeros: token i may come if bit ``i % 32`` of word ``i // 32`` is
                set. At the end of a sequence that is the eos token; behind it, every token.
        """

    def accept(self, token_id: int) -> bool:
        """Take over the token that came; returns whether it was allowed."""


Grammar = Callable[[], GrammarMatcher]
"""Makes a matcher for each sequence of a request."""


class GuidedSequence:
    """A matcher, and how far it has followed its sequence.

    Args:
        matcher: new.
    """

    def __init__(self, matcher: GrammarMatcher) -> None:
        self._matcher, self._num_accepted = matcher, 0

    def fill(self, generated: Sequence[int] | np.ndarray, bitmask: np.ndarray) -> None:
        """Write which tokens may follow ``generated``, all that came so far, into ``bitmask``, see
        :meth:`GrammarMatcher.fill_bitmask`.

        Raises:
            ValueError: the grammar does not have these tokens, or no token may follow.
        """
        for token in generated[self._num_accepted :]:
            if not self._matcher.accept(int(token)):
                raise ValueError(f"the grammar does not accept token {int(token)} as number {self._num_accepted}.")
            self._num_accepted += 1
        self._matcher.fill_bitmask(bitmask)
        if not bitmask.any():
            raise ValueError(f"the grammar accepts no token behind {self._num_accepted} tokens.")


class GrammarProcessor(LogitsProcessor):
    """Gives -inf to the tokens that a grammar does not accept, for rows with processors of their own.

    Args:
        grammar: makes matchers.
        prompt_length: tokens of the prompt.
    """

    def __init__(self, grammar: Grammar, prompt_length: int) -> None:
        self.grammar, self.prompt_length = grammar, prompt_length
        self._sequence: GuidedSequence | None = None

    def of_row(self) -> "GrammarProcessor":
        """One for another sequence."""
        return GrammarProcessor(self.grammar, self.prompt_length)

    @property
    def sequence(self) -> GuidedSequence:
        """What it follows."""
        if self._sequence is None:
            self._sequence = GuidedSequence(self.grammar())
        return self._sequence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``[1, vocab]`` of a history ``[1, L]``."""
        vocab = scores.shape[-1]
        bitmask = np.zeros(-(-vocab // 32), dtype=np.int32)
        self.sequence.fill(input_ids[0, self.prompt_length :].tolist(), bitmask)
        allowed = np.unpackbits(bitmask.view(np.uint8), bitorder="little")[:vocab]
        return scores.masked_fill(~torch.from_numpy(allowed).bool().to(scores.device), -torch.inf)


def checked_grammar(grammar: Any) -> Grammar:
    """Raises TypeError: it is not a callable that makes matchers."""
    is_matcher = hasattr(grammar, "fill_bitmask") and not isinstance(grammar, type)
    if not callable(grammar) or is_matcher:
        raise TypeError(
            f"grammar is {grammar!r}: a callable that makes a matcher for each sequence is accepted, not a matcher, "
            f"which follows one."
        )
    return grammar
