"""What :meth:`Engine.submit` is given becomes a request, or is refused."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..errors import RequestError
from .core import EngineCore
from .execution.adapters import ModelAdapters
from .sampling.request_params import RequestParams, check_token_ids
from .scheduling.request import ACTIVE, Adapter, Request, Sequence

SEEDS = 1 << 62


@dataclass(slots=True)
class OfflineBatch:
    """Requests of one call that returns when all have ended.

    Attributes:
        started: on the engine's clock.
        numbers: of its requests, and seed of an engine without one, where other processes have the rest of the call.
        coming: those that were made and not handed over yet; ``num_tokens``: of their prompts.
    """

    started: float
    numbers: Iterator[int] | None = None
    seed: int | None = None
    coming: list[Request] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, request: Request) -> None:
        """One more is coming."""
        self.coming.append(request)
        self.num_tokens += len(request.prompt)

    def take(self) -> list[Request]:
        """Those that were coming."""
        coming, self.coming, self.num_tokens = self.coming, [], 0
        return coming


class Admission:
    """Makes the requests of an engine, and names and seeds where the caller gives none.

    Args:
        core: says what can be served.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core, self.numbers = core, itertools.count()

    def request(
        self,
        prompt_ids: Any,
        *,
        request_id: str | None,
        priority: float,
        deadline_s: float | None,
        cache_salt: Any,
        batch: OfflineBatch | None,
        rules: RequestParams | None,
        seed: int | None,
        adapter: Adapter = ACTIVE,
        **rules_options: Any,
    ) -> Request:
        """A request that can be served; the arguments are those of :meth:`Engine.submit`.

        Args:
            rules_options: of :meth:`RequestParams.make`, where ``rules`` is None.

        Raises:
            RequestError, ValueError, TypeError: it cannot, or an argument is not valid.
        """
        prompt = self.checked_prompt(prompt_ids)
        if not isinstance(priority, Real):
            raise TypeError(f"priority must be a number, got {priority!r}.")
        if not math.isfinite(priority):
            raise ValueError(f"priority must be a finite number, got {priority!r}.")
        # NaN is not at least 0 either.
        if deadline_s is not None and not (isinstance(deadline_s, Real) and deadline_s >= 0):
            raise ValueError(f"deadline_s must be None or a number of seconds of at least 0, got {deadline_s!r}.")
        hash(cache_salt)
        self.check_adapter(adapter)
        number = next(self.numbers if batch is None or batch.numbers is None else batch.numbers)
        if rules is None:
            own_seed = self.core.config.seed
            if own_seed is None and batch is not None:
                own_seed = batch.seed
            if seed is None and own_seed is not None:
                seed = (own_seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % SEEDS
            rules = RequestParams.make(self.core.model, prompt_ids=prompt, seed=seed, **rules_options)
        check_token_ids(rules.config, self.core.num_logits)
        most_pages = self._checked_pages(prompt, rules)
        now = self.core.clock()
        # Longest first: the caller of an offline batch waits for its longest request.
        came, length = (now, 0) if batch is None else (batch.started, len(prompt) - rules.max_length)
        request = Request(
            number=number,
            request_id=f"request-{number}" if request_id is None else str(request_id),
            has_made_id=request_id is None,
            prompt=prompt,
            rules=rules,
            priority=float(priority),
            # Another version of an adapter is a change of the model, after which no page is found any more.
            salt=cache_salt if adapter is ACTIVE else ("adapter", adapter, cache_salt),
            submitted=now,
            key=(came - float(priority) * self.core.config.ageing_s, length, number),
            deadline=None if deadline_s is None else now + float(deadline_s),
            is_watched=rules.has_criteria,
            is_offline=batch is not None and rules.mode == "rows" and rules.ends_by_length,
            uses_prefixes=rules.num_prompt_logprobs is None,
            most_pages=most_pages,
            adapter=adapter,
        )
        request.sequences = [Sequence(request, index) for index in range(rules.num_sequences)]
        return request

    def check_adapter(self, adapter: Adapter) -> None:
        """
        Raises:
            ValueError, TypeError: it is no adapter that is loaded.
            RequestError: rows of it cannot be computed beside others.
        """
        if adapter is ACTIVE:
            return
        if not (adapter is None or isinstance(adapter, str)):
            raise TypeError(f"adapter must be the name of one, or None for the base model, got {adapter!r}.")
        core = self.core
        if core.ranks.is_joint:
            raise RequestError(f"adapter={adapter!r} cannot be served: the model is sharded over processes.")
        if core.config.compile:
            raise RequestError(
                f"adapter={adapter!r} cannot be served: compiled modules run what is active on the model. Leave "
                f"EngineConfig(compile=) out."
            )
        current = core.runner.adapters
        if current is None or not current.is_current(adapter):
            current = ModelAdapters(core.model, core.runner.misfit)
        reason = current.reason_against(adapter)
        if reason is not None:
            is_known = adapter is None or adapter in current.refusals
            raise RequestError(reason) if is_known else ValueError(reason)

    def rename(self, request: Request) -> str:
        """Another name for a request whose own was made here."""
        request.request_id = f"request-{next(self.numbers)}"
        return request.request_id

    def next_number(self) -> int:
        """Of a request to come."""
        number = next(self.numbers)
        self.skip_to(number)
        return number

    def skip_to(self, number: int) -> None:
        """Give the next request this number."""
        self.numbers = itertools.count(number)

    def checked_prompt(self, prompt_ids: Any) -> np.ndarray:
        """int64 ``[L]``.

        Raises:
            ValueError, TypeError: it is no prompt for this model.
        """
        if isinstance(prompt_ids, (str, bytes)) or (
            isinstance(prompt_ids, (list, tuple)) and any(isinstance(item, str) for item in prompt_ids)
        ):
            raise TypeError(
                f"prompt_ids must be token ids, got the text {prompt_ids!r:.60}: tokenise it first, with "
                f"tokenizer(text).input_ids."
            )
        if isinstance(prompt_ids, Mapping):
            raise TypeError(
                f"prompt_ids must be token ids, got a {type(prompt_ids).__name__} with {list(prompt_ids)}: give its "
                f'"input_ids".'
            )
        if isinstance(prompt_ids, torch.Tensor):
            prompt_ids = prompt_ids.detach().cpu().numpy()
        prompt = np.asarray(prompt_ids)
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
            raise ValueError(
                f"prompt_ids must be token ids [L] or [1, L], got the shape {list(prompt.shape)} of {prompt.dtype}."
            )
        if not prompt.size:
            raise ValueError("prompt_ids must have at least one token, got none.")
        size = self.core.vocab_size
        bad = np.flatnonzero((prompt < 0) | (prompt >= size))
        if bad.size:
            raise ValueError(
                f"prompt_ids[{bad[0]}] must be 0 to {size - 1}, the model's vocabulary, got {prompt[bad[0]]}."
            )
        return prompt.astype(np.int64)

    def _checked_pages(self, prompt: np.ndarray, rules: RequestParams) -> list[int]:
        """Pages of each group of layers that a request holds at most; what can never be served is refused."""
        core = self.core
        if rules.num_sequences < 1:
            raise ValueError(f"a request runs at least one sequence, got num_sequences={rules.num_sequences!r}.")
        if rules.max_length > core.max_model_len:
            raise RequestError(
                f"the prompt of {len(prompt)} tokens and its new ones come to {rules.max_length} tokens, the engine "
                f"serves {core.max_model_len}: ask for fewer new tokens, or set EngineConfig(max_model_len=)."
            )
        if rules.num_sequences > core.config.max_num_seqs:
            raise RequestError(
                f"the request runs {rules.num_sequences} sequences (beams or samples), the engine "
                f"{core.config.max_num_seqs} at a time: set EngineConfig(max_num_seqs=)."
            )
        most_pages = []
        for group, table in enumerate(core.pages.tables):
            needed = core.pages.pages_for(
                len(prompt), rules.max_length, rules.num_sequences, group, core.limits.whole_prompts
            )
            most_pages.append(needed)
            total = table.allocator.num_pages
            if needed > total:
                raise RequestError(
                    f"the request needs up to {needed} pages for {rules.num_sequences} sequences of {rules.max_length} "
                    f"tokens, the pool has {total}: ask for fewer new tokens, or set EngineConfig(num_pages=)."
                )
        return most_pages
