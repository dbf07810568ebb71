"""What the caller of submit holds: a stream of tokens, and the result."""

import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ..errors import RequestError
from .events import TokenEvents
from .scheduling.request import Request, RequestOutput, State
from .waiting import Steps, wait_async, wait_for


class RequestHandle:
    """A submitted request. Any thread may iterate over it, wait for its result, or cancel it.

    Iteration gives new tokens as they come, from the first on, each time it is started; it raises what ended the
    request with an error. It is for requests of one sequence; :meth:`events` gives the tokens of several. A request
    that was iterated over is cancelled once no reference to its handle or an iterator is left.
    """

    def __init__(self, engine: Steps, request: Request) -> None:
        self._engine, self._request = engine, request
        self._is_streamed = False

    @property
    def request_id(self) -> str:
        """As given to submit, or made there."""
        return self._request.request_id

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        return self._request.is_public

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache, once the request has run."""
        return self._request.cached_tokens

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Wait for the end of the request; an error is in ``output.error``, not raised.

        Raises:
            TimeoutError: ``timeout_s`` seconds passed; the request goes on.
        """
        wait_for(self._engine, lambda: self._request.is_public, timeout_s, self.request_id)
        assert self._request.output is not None
        return self._request.output

    def events(self, tokenizer: Any = None, *, skip_special_tokens: bool = True) -> TokenEvents:
        """New tokens as they come, of all sequences of the request, for ``for`` and ``async for``.

        Args:
            tokenizer: of the model: events have the text that their tokens add.
            skip_special_tokens: leave special tokens out of that text.

        Raises:
            RequestError: the request runs beams, whose tokens change until the end.
        """
        self._is_streamed = True
        if self._request.rules.mode == "beams":
            raise RequestError(f"request {self.request_id} runs beams, which cannot be streamed: use result().")
        return TokenEvents(self._engine, self._request, self, tokenizer, skip_special_tokens)

    def cancel(self) -> None:
        """End the request; its result comes with the tokens so far and ``finish_reason`` "cancelled"."""
        self._engine.cancel_request(self._request)

    def __iter__(self) -> Iterator[int]:
        self._check_streamable()
        given = 0
        while True:
            wait_for(self._engine, functools.partial(self._has_more, given), None, self.request_id)
            tokens, _ = self._engine.mail.new_tokens(self._request, given)
            yield from tokens
            given += len(tokens)
            if not tokens and self._request.is_public:
                break
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[int]:
        self._check_streamable()
        given = 0
        while True:
            await wait_async(self._engine, functools.partial(self._has_more, given))
            tokens, _ = self._engine.mail.new_tokens(self._request, given)
            for token in tokens:
                yield token
            given += len(tokens)
            if not tokens and self._request.is_public:
                break
        self._raise_error()

    async def result_async(self) -> RequestOutput:
        """As :meth:`result`, without blocking the event loop."""
        await wait_async(self._engine, lambda: self._request.is_public)
        assert self._request.output is not None
        return self._request.output

    def _has_more(self, given: int) -> bool:
        request = self._request
        return request.is_public or self._engine.mail.num_new_tokens(request) > given

    def _check_streamable(self) -> None:
        self._is_streamed = True
        rules = self._request.rules
        if rules.mode == "beams" or rules.num_sequences > 1:
            raise RequestError(
                f"request {self.request_id} has {rules.num_sequences} sequences: only requests of one sequence can be "
                f"iterated over, use events(), or result() for beams."
            )

    def _raise_error(self) -> None:
        output = self._request.output
        assert output is not None
        if output.finish_reason == "error" and output.error is not None:
            raise output.error

    def __del__(self) -> None:
        # An iterator holds its handle, so no caller can ask for another token. One that never asked may want no more
        # than that the request runs.
        if self._is_streamed and self._request.output is None:
            self._engine.mail.abandon(self._request)

    def __repr__(self) -> str:
        state = self._request.state if not self._request.is_public else State.FINISHED
        return f"RequestHandle({self.request_id!r}, {state.value})"
