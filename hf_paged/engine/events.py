"""New tokens of a request as they come, with what is known of each."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from .scheduling.request import Request
from .text import IncrementalText
from .waiting import Steps, wait_async, wait_for


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A new token of a request.

    Attributes:
        index: which of the request's sequences it belongs to.
        token_id: the token.
        logprob: its log-probability, where the request asked for it.
        top_ids, top_logprobs: the most likely tokens there, best first, as many as the request asked for.
        text: what it adds to the sequence's text, where a tokenizer was given: "" for one in the middle of a character.
        finish_reason: with the last token of a sequence, see :class:`SequenceOutput`; None for the others.
    """

    index: int
    token_id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    text: str | None = None
    finish_reason: str | None = None


class TokenEvents:
    """Iterates, plainly or asynchronously, over the new tokens of all sequences of a request, in the order in which
    they come. Raises what ended the request with an error.

    A sequence that ends without a new token (it was cancelled) has no last event; its result says why.

    Args:
        engine: that runs it.
        request: of greedy or sampled sequences.
        holder: kept while this is.
        tokenizer: gives the events' text; None: they have none.
        skip_special_tokens: as for ``tokenizer.decode``.
    """

    def __init__(
        self, engine: Steps, request: Request, holder: object, tokenizer: Any, skip_special_tokens: bool
    ) -> None:
        self._engine, self._request, self._holder = engine, request, holder
        num_sequences = len(request.sequences)
        self._given = [0] * num_sequences
        self._texts = None
        if tokenizer is not None:
            self._texts = [IncrementalText(tokenizer, skip_special_tokens) for _ in range(num_sequences)]

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            wait_for(self._engine, self.has_news, None, self._request.request_id)
            events = self.take()
            yield from events
            if not events and self._request.is_public:
                break
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            await wait_async(self._engine, self.has_news)
            events = self.take()
            for event in events:
                yield event
            if not events and self._request.is_public:
                break
        self._raise_error()

    def has_news(self) -> bool:
        """Whether :meth:`take` has something, or the request has ended; the engine's ``mail.changed`` is held."""
        return self._request.is_public or self._engine.mail.num_new_tokens(self._request) > sum(self._given)

    def take(self) -> list[TokenEvent]:
        """Tokens that have come and no event was made of yet, without waiting; those of one step together."""
        coming = []
        for index, sequence in enumerate(self._request.sequences):
            given = self._given[index]
            tokens, finish_reason = self._engine.mail.new_tokens(self._request, given, index)
            self._given[index] += len(tokens)
            for number, token in enumerate(tokens, given):
                is_last = finish_reason is not None and number + 1 == self._given[index]
                entry = sequence.logprobs[number] if number < len(sequence.logprobs) else None
                event = TokenEvent(
                    index,
                    token,
                    None if entry is None else entry.logprob,
                    () if entry is None else entry.top_ids,
                    () if entry is None else entry.top_logprobs,
                    None if self._texts is None else self._texts[index].add(token, is_last),
                    finish_reason if is_last else None,
                )
                coming.append((number, event))
        coming.sort(key=lambda entry: entry[0])
        return [event for _, event in coming]

    def _raise_error(self) -> None:
        output = self._request.output
        assert output is not None
        if output.finish_reason == "error" and output.error is not None:
            raise output.error
