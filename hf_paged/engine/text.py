"""The text of tokens that come one by one."""

from typing import Any

INCOMPLETE = "\ufffd"
"""What tokenizers decode the beginning of a character to."""


class IncrementalText:
    """Gives the text that each new token adds; all of it together is ``tokenizer.decode`` of all tokens.

    A tokenizer may write the same token differently at the beginning of a text, so the tokens that gave the last piece
    are decoded once more with the new ones. Characters of several tokens come with the last of these.

    Args:
        tokenizer: of the model.
        skip_special_tokens: as for ``tokenizer.decode``.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens: list[int] = []
        self._num_given, self._given = 0, ""

    def add(self, token: int, is_last: bool = False) -> str:
        """The text that a token adds.

        Args:
            token: the next one.
            is_last: no token follows: what is incomplete is given as well.
        """
        self._tokens.append(token)
        text = self._decoded(self._tokens)
        if text.endswith(INCOMPLETE) and not is_last:
            return ""
        piece = text[len(self._given) :]
        if piece:
            self._tokens = self._tokens[self._num_given :]
            self._num_given, self._given = len(self._tokens), self._decoded(self._tokens)
        return piece

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
