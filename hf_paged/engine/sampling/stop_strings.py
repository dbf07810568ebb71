"""Stop strings, found in the text of the last tokens.

transformers' ``StopStringCriteria`` looks at every token of the vocabulary before it can be asked: seconds for each new
set of strings. This one looks at the tokens that come, at what transformers takes for their text.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria

from ...transformers_internals import token_texts

Text = str | bytes

_known: "weakref.WeakKeyDictionary[Any, _Texts]" = weakref.WeakKeyDictionary()


class _Texts:
    """The text of a tokenizer's tokens, each found out when it first comes."""

    def __init__(self, tokenizer: Any) -> None:
        # Must not hold the tokenizer, by which it is found.
        self.is_bytes, self._find = token_texts(weakref.proxy(tokenizer))
        self._texts: dict[int, Text] = {}

    def of(self, token: int) -> Text | None:
        """None: the tokenizer has no such token."""
        text = self._texts.get(token)
        if text is None:
            text = self._find(token)
            if text is not None:
                self._texts[token] = text
        return text


class StopStrings(StoppingCriteria):
    """Ends a sequence whose last token ends a stop string, as ``StopStringCriteria`` does; that token may have more
    text behind it.

    Args:
        tokenizer: of the model.
        stop_strings: one or several.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"stop_strings must be one text or several, none of them empty, got {stop_strings!r}.")
        if tokenizer not in _known:
            _known[tokenizer] = _Texts(tokenizer)
        self._tokenizer, self._texts = tokenizer, _known[tokenizer]
        self._stops: list[Any] = [stop.encode() if self._texts.is_bytes else stop for stop in self.stop_strings]
        self._longest = max(map(len, self._stops), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool ``[n]`` for sequences ``[n, L]``."""
        rows = input_ids[:, -self._longest :].tolist() if self._longest else [[]] * len(input_ids)
        return torch.tensor([self.is_stopped(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def is_stopped(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether the last of these tokens ends a stop string."""
        return self.found(tokens) is not None

    def found(self, tokens: Sequence[int] | np.ndarray) -> str | None:
        """The first of the stop strings that the last of these tokens ends, None: it ends none."""
        tokens = tokens[len(tokens) - self._longest :] if len(tokens) > self._longest else tokens
        of: Callable[[int], Any] = self._texts.of
        last = of(int(tokens[-1])) if len(tokens) else None
        if not last:
            return None
        text, needed = last, self._longest - 1 + len(last)
        for token in reversed(tokens[:-1]):
            more = of(int(token))
            if more is None or len(text) >= needed:
                break
            text = more + text
        for name, stop in zip(self.stop_strings, self._stops):
            if text.find(stop, max(0, len(text) - len(last) - len(stop) + 1)) >= 0:
                return name
        return None
