"""What the first rank of a sharded model tells the others before each step."""

import copy
import dataclasses
from collections.abc import Hashable
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..errors import RequestError
from .group import dumps, words_of
from .sampling.grammar import GrammarProcessor
from .sampling.request_params import RequestParams
from .scheduling.request import Request, Sequence

FIELDS = (
    "number", "prompt", "priority", "salt", "key", "is_watched", "is_offline", "uses_prefixes",
    "most_pages",
)  # fmt: skip
"""Of a request, as they are on the first rank."""


@dataclasses.dataclass(slots=True)
class StepNews:
    """What happens before a step.

    Attributes:
        requests: names of new ones, and what :func:`packed` made of them.
        cancels: numbers of requests that end.
        late: numbers of requests whose deadline has passed.
        command: a method of the step loop and its arguments, which is called instead of a step.
    """

    requests: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)
    cancels: list[int] = dataclasses.field(default_factory=list)
    late: list[int] = dataclasses.field(default_factory=list)
    command: tuple[str, tuple[Any, ...]] | None = None


class DecidedElsewhere:
    """Stands for a request's own criteria and grammars on the ranks that do not call them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Never."""
        raise AssertionError("a request's own code is called on the first rank only")


def packed(request: Request) -> bytes:
    """A request as the other ranks run it: without its own code.

    Raises:
        RequestError: it cannot be sent; the message says what of it.
    """
    if not _is_plain(request.salt):
        raise RequestError(
            f"cache_salt={request.salt!r} cannot be sent to the other ranks of the model: a str, bytes, number, None "
            f"or a tuple of these is accepted there."
        )
    seconds = None if request.deadline is None else request.deadline - request.submitted
    fields = {name: getattr(request, name) for name in FIELDS}
    try:
        return dumps((fields, seconds, _rules_without_code(request.rules)))
    except Exception as error:
        raise RequestError(
            f"the request's options cannot be sent to the other ranks of the model: {words_of(error)}"
        ) from error


def take_over(request_id: str, contents: Any, claimed: Request | None, now: float) -> Request:
    """The request that a message is about, as this rank runs it.

    Args:
        request_id: its name.
        contents: what :func:`packed` made, unpickled.
        claimed: what a caller of this rank has a handle of; it becomes that request.
        now: on this rank's clock.
    """
    fields, seconds, rules = contents
    times: dict[str, Any] = {"submitted": now, "deadline": None if seconds is None else now + seconds}
    if claimed is None:
        request = Request(request_id=request_id, rules=rules, **fields, **times)
        request.sequences = [Sequence(request, index) for index in range(rules.num_sequences)]
        return request
    claimed.request_id, claimed.rules = request_id, rules
    for name, value in (fields | times).items():
        setattr(claimed, name, value)
    return claimed


def likeness(request: Request) -> Any:
    """What must be the same of a request on all ranks that make a call together."""
    rules = request.rules
    return (
        request.prompt.tobytes(), rules.mode, rules.num_sequences, rules.max_length, rules.eos_token_ids, rules.plain,
        rules.padding_ids, rules.num_logprobs, rules.num_prompt_logprobs, request.priority, request.is_watched,
        [type(processor).__name__ for processor in rules.processors],
    )  # fmt: skip


def _rules_without_code(rules: RequestParams) -> RequestParams:
    changes = rules.changes
    if changes is not None and changes.grammar is not None:
        stub = GrammarProcessor(DecidedElsewhere(), changes.grammar.prompt_length)
        changes = dataclasses.replace(changes, grammar=stub)
    return dataclasses.replace(
        rules,
        config=_plain_config(rules.config),
        changes=changes,
        processors=LogitsProcessorList(),
        criteria=StoppingCriteriaList([DecidedElsewhere()] if rules.has_criteria else []),
        all_criteria=StoppingCriteriaList(),
        _row_processors={},
    )


def _plain_config(config: GenerationConfig) -> GenerationConfig:
    """Without the tensors that generate() puts into it."""
    plain = copy.copy(config)
    plain.__dict__ = {name: value for name, value in vars(config).items() if not name.endswith("_tensor")}
    return plain


def _is_plain(salt: Hashable) -> bool:
    if isinstance(salt, tuple):
        return all(map(_is_plain, salt))
    return salt is None or isinstance(salt, (str, bytes, bool, int, float))
