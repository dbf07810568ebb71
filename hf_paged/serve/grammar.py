"""Grammars of requests: JSON schemas, regular expressions, Lark grammars and choices, by llguidance."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark

KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")
MOST_KEPT = 256
"""Prepared grammars that are remembered."""


class Matcher:
    """Follows one sequence; see ``GrammarMatcher``.

    Args:
        matcher: of llguidance, of its own.
        eos: tokens that end a sequence.
    """

    def __init__(self, matcher: llguidance.LLMatcher, eos: frozenset[int]) -> None:
        self._matcher, self._eos, self._has_ended = matcher, eos, False

    def fill_bitmask(self, bitmask: np.ndarray) -> None:
        """The tokens that may come next; every token behind the end."""
        if self._has_ended:
            bitmask[:] = -1
        else:
            llguidance.numpy.fill_next_token_bitmask(self._matcher, bitmask[None])

    def accept(self, token_id: int) -> bool:
        """Take over a token; returns whether it was allowed."""
        if self._has_ended:
            return True
        if token_id in self._eos and self._matcher.is_accepting():
            self._has_ended = True
            return True
        return self._matcher.consume_token(token_id)


class Grammars:
    """Prepares grammars, and remembers the last ones; any thread may ask.

    Args:
        tokenizer: of the model, with a fast implementation.
        num_logits: of the model.
        eos_token_ids: tokens that end a sequence.
        most_bytes: of a grammar's text.
    """

    def __init__(self, tokenizer: Any, num_logits: int, eos_token_ids: Sequence[int], most_bytes: int) -> None:
        self._eos, self._most_bytes = frozenset(eos_token_ids), most_bytes
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=num_logits, eos_token=sorted(self._eos))
        self._kept: OrderedDict[tuple[str, str], Callable[[], Matcher]] = OrderedDict()
        self._lock = threading.Lock()

    def prepared(self, kind: str, text: str) -> Callable[[], Matcher]:
        """A grammar for ``Engine.submit``.

        Args:
            kind: one of :data:`KINDS`.
            text: the schema (JSON), the expression, the grammar (Lark, or GBNF with "::="), or the choices (a JSON
                list of texts); "" for "json_object".

        Raises:
            ValueError: it is not one, or too large.
        """
        if len(text.encode()) > self._most_bytes:
            raise ValueError(f"{kind} must have at most {self._most_bytes} bytes, got {len(text.encode())}.")
        with self._lock:
            if (kind, text) in self._kept:
                self._kept.move_to_end((kind, text))
                return self._kept[kind, text]
        made = self._made(kind, text)
        with self._lock:
            self._kept[kind, text] = made
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return made

    def _made(self, kind: str, text: str) -> Callable[[], Matcher]:
        try:
            grammar = _source(kind, text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{kind} cannot be read: {error}") from error
        first = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if first.is_error():
            raise ValueError(f"{kind} is not accepted: {first.get_error().split('<state>')[0].strip()[:500]}")
        return lambda: Matcher(first.deep_copy(), self._eos)


def _source(kind: str, text: str) -> str:
    """The grammar as llguidance takes it."""
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema({"type": "object"})
    if kind == "json_schema":
        schema = json.loads(text)
        if not isinstance(schema, (dict, bool)):
            raise ValueError(f"a schema is a JSON object, got {text[:80]!r}.")
        return llguidance.LLMatcher.grammar_from_json_schema(text)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text))))
    if kind == "grammar":
        if "::=" in text:
            try:
                text = gbnf_to_lark(text)
            except Exception as error:  # It raises errors of its own and bare ones.
                raise ValueError(str(error)) from error
        return llguidance.LLMatcher.grammar_from_lark(text)
    raise ValueError(f"one of {', '.join(KINDS)} is accepted.")
