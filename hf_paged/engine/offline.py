"""Many prompts in one call that returns when all have ended."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from .admission import OfflineBatch
from .config import EngineConfig
from .core import EngineCore
from .handle import RequestHandle
from .ranks import Alone
from .scheduling.request import ACTIVE, Adapter, Request, RequestOutput
from .waiting import Steps, wait_for

PROGRESS_S = 0.5
"""A bar is drawn again after so many seconds."""
CHECK_S = 1.0
"""How often a call looks whether it is to go on."""


class OfflineEngine(Steps, Protocol):
    """What such a call needs of an engine."""

    config: EngineConfig
    ranks: Alone

    @property
    def num_new_tokens(self) -> int:
        """Tokens since the start."""

    @property
    def core(self) -> EngineCore:
        """The sequences."""

    @property
    def submit(self) -> Callable[..., RequestHandle]:
        """See :class:`Engine`."""

    @property
    def prepare(self) -> Callable[..., Request]:
        """See :class:`Engine`."""

    def submit_together(self, make: Callable[[], list[Request]]) -> list[RequestHandle]:
        """See :class:`Engine`."""

    def hand_over(self, requests: list[Request]) -> None:
        """Let the loop have requests."""

    def advance(self) -> None:
        """Launch a step if no other thread does and none is on its way."""


def generate(
    engine: OfflineEngine,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None,
    progress: bool,
    *,
    batch: OfflineBatch | None = None,
    check: Callable[[], None] | None = None,
    adapter: Adapter | Sequence[Adapter] = ACTIVE,
    **options: Any,
) -> list[RequestOutput]:
    """See :meth:`Engine.generate`.

    Args:
        batch: None: of all prompts.
        check: called now and then; what it raises ends the call.
    """
    prompts = list(prompts)
    configs, adapters = configs_of(prompts, generation_config), adapters_of(prompts, adapter)
    handles: list[RequestHandle] = []
    batch = OfflineBatch(engine.core.clock()) if batch is None else batch
    coming: list[RequestHandle] = []
    if engine.ranks.is_joint:
        return _generate_together(engine, prompts, configs, adapters, progress, batch, **options)
    try:
        for number, (prompt, config, own) in enumerate(zip(prompts, configs, adapters), 1):
            coming.append(engine.submit(prompt, generation_config=config, adapter=own, _batch=batch, **options))
            # What is enough for a step runs while the others are prepared.
            if batch.num_tokens >= engine.config.max_batch_tokens or number == len(prompts):
                engine.hand_over(batch.take())
                handles += coming
                coming = []
                engine.advance()
        if progress:
            _show_progress(engine, handles, check)
        if check is not None:
            for handle in handles:
                while not handle.is_done:
                    check()
                    with contextlib.suppress(TimeoutError):
                        handle.result(CHECK_S)
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise


def _generate_together(
    engine: OfflineEngine,
    prompts: Sequence[Any],
    configs: Sequence[Any],
    adapters: Sequence[Adapter],
    progress: bool,
    batch: OfflineBatch,
    **options: Any,
) -> list[RequestOutput]:
    """On all ranks of a sharded model."""

    def make() -> list[Request]:
        return [
            engine.prepare(prompt, generation_config=config, adapter=own, _batch=batch, **options)
            for prompt, config, own in zip(prompts, configs, adapters)
        ]

    handles = engine.submit_together(make)
    try:
        if progress and engine.ranks.leads:
            _show_progress(engine, handles, None)
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise


def configs_of(
    prompts: Sequence[Any], generation_config: GenerationConfig | Sequence[GenerationConfig] | None
) -> list[Any]:
    """One for each prompt.

    Raises:
        ValueError: their number is another.
    """
    if generation_config is None or isinstance(generation_config, GenerationConfig):
        return [generation_config] * len(prompts)
    configs = list(generation_config)
    if len(configs) != len(prompts):
        raise ValueError(
            f"generation_config must be one, or one for each of {len(prompts)} prompts, got {len(configs)}."
        )
    return configs


def adapters_of(prompts: Sequence[Any], adapter: Adapter | Sequence[Adapter]) -> list[Adapter]:
    """One for each prompt.

    Raises:
        ValueError: their number is another.
    """
    if not isinstance(adapter, (list, tuple)):
        return [adapter] * len(prompts)  # type: ignore[list-item]
    if len(adapter) != len(prompts):
        raise ValueError(f"adapter must be one, or one for each of {len(prompts)} prompts, got {len(adapter)}.")
    return list(adapter)


def _show_progress(
    engine: OfflineEngine, handles: list[RequestHandle], check: Callable[[], None] | None
) -> None:
    """A bar until all have ended, which may be at the same time: tokens show that something happens."""
    before, num_done, shown = engine.num_new_tokens, 0, time.monotonic()

    def has_news() -> bool:
        is_late = engine.num_new_tokens > before and time.monotonic() > shown + PROGRESS_S
        return is_late or sum(handle.is_done for handle in handles) > num_done

    with tqdm(total=len(handles), desc="generate", unit="prompt") as bar:
        while num_done < len(handles):
            with contextlib.suppress(TimeoutError):
                wait_for(engine, has_news, CHECK_S, "generate")
            if check is not None:
                check()
            num_ended, shown = sum(handle.is_done for handle in handles), time.monotonic()
            bar.set_postfix(new_tokens=engine.num_new_tokens - before, refresh=False)
            bar.update(num_ended - num_done)
            bar.refresh()
            num_done = num_ended
