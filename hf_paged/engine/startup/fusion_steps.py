"""Short steps on which a model's modules are watched, before they are fused (see :mod:`hf_paged.fusion`)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ...fusion import FusedModel, fuse_model
from ..config import EngineConfig
from ..core import EngineCore
from ..execution.step_inputs import StepInputs
from ..scheduling.page_budget import LENGTH_NAMES, model_length
from ..scheduling.step import ScheduledStep
from .self_check import agree, differences, make_prompts, small_core

logger = logging.get_logger(__name__)

COUNTS = ((2, 11, 4), (1, 3, 6), (1, 1, 1), (1, 0, 0), (0, 2, 0))
"""Tokens of each prompt of :data:`~.self_check.LENGTHS` that the steps compute, each where the one before has ended:
numbers of tokens that kernels of few tokens treat in their own ways, and one that they leave to others."""
WITH_STATES = ((3, 0, 0), (0, 17, 0), (1, 0, 0), (1, 0, 0))
"""The same for models that keep states: prompts alone, then decode steps."""
FEW_ROWS = 2
"""The step of decode rows alone. With the last one, whose positions are far from the start, it shows whether a layer's
weights make a difference to what another one like it was verified for with every step."""


def fuse(model: Any, config: EngineConfig, needs_lengths: bool, max_model_len: int) -> FusedModel:
    """Fuse what can be fused of a model."""
    core = small_core(model, dataclasses.replace(config, kv_dtype="auto", compile=False), needs_lengths)
    last_position = _last_position(model, max_model_len)
    steps = _make_steps(model, core, last_position)
    quick_steps = (FEW_ROWS, len(steps) - 1)
    with core.runner.attention.here():
        fused = fuse_model(model, core.cache, steps, quick_steps, max_model_len if last_position else 0)
    if len(fused):
        # Each module was proven by itself; this is what they hand to one another.
        own = [step.logits[-1] for step in steps]
        core.runner.use_fused(fused)
        got = [step.run() for step in steps]
        if not agree(own, got):
            fused.restore()
            most, mean = differences(own, got)
            fused.refusals[type(model).__name__] = f"logits differ by {most:.2g} standard deviations ({mean:.2g})"
            logger.warning_once(f"{type(model).__name__} runs unfused: {fused}")
    return fused


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of the engine; see :class:`hf_paged.fusion.recording.Step`.

    Attributes:
        logits: ``[T, vocab]`` of every run.
    """

    core: EngineCore
    inputs: StepInputs
    begin: Callable[[], None]
    end: Callable[[], None]
    logits: list[torch.Tensor] = field(default_factory=list)

    def run(self) -> torch.Tensor:
        """Run the model: logits ``[T, vocab]``."""
        self.begin()
        logits = self.core.runner.forward(self.inputs, None)
        self.end()
        self.logits.append(logits.flatten(0, 1))
        return self.logits[-1]

    def enter(self) -> None:
        """Let modules run one at a time."""
        self.core.cache.step = self.inputs


def _make_steps(model: Any, core: EngineCore, last_position: int) -> list[_Step]:
    """The steps, and a prompt again at the last positions that a request can have."""
    slots, has_states = core.slots, core.cache.has_states
    prompts = make_prompts(model)
    for slot, prompt in enumerate(prompts):
        slots.history[slot, : len(prompt)] = prompt.cpu().numpy()
        slots.length[slot] = len(prompt)
        core.pages.extend(slot, len(prompt))
    core.tables.sync()
    steps: list[_Step] = []
    for tokens in WITH_STATES if has_states else COUNTS:
        chosen = np.flatnonzero(tokens)
        taken = np.array(tokens)[chosen]
        decodes = int(taken.max()) == 1
        work = ScheduledStep(chosen, taken, len(chosen) if decodes else 0, np.ones(len(chosen), dtype=bool))
        steps.append(_step(core, work, has_states))
        slots.computed[chosen] += taken
    slots.computed[: len(prompts)] = 0
    counts = np.array(WITH_STATES[1] if has_states else COUNTS[0])
    chosen = np.flatnonzero(counts)
    far = _step(core, ScheduledStep(chosen, counts[chosen], 0, np.ones(len(chosen), dtype=bool)), has_states)
    far.inputs.position_ids = far.inputs.position_ids + max(0, last_position - int(counts.max()))
    return [*steps, far]


def _last_position(model: Any, max_model_len: int) -> int:
    """The last position that a request can have; 0: not to be tried, it may be behind the end of a table."""
    text = model.config.get_text_config(decoder=True)
    is_named = any(isinstance(getattr(text, name, None), int) for name in LENGTH_NAMES)
    tokens = model.get_input_embeddings()
    has_tables = any(isinstance(x, torch.nn.Embedding) and x is not tokens for x in model.modules())
    return min(max_model_len, model_length(model.config)) - 1 if is_named and not has_tables else 0


def _step(core: EngineCore, work: ScheduledStep, has_states: bool) -> _Step:
    cache, index = core.cache, torch.from_numpy(work.slots)
    core.tables.stale[:] = True

    def nothing() -> None:
        pass

    if has_states and work.num_decode:
        inputs = core.tables.decode_inputs(work.slots, batched=True)
        return _Step(core, inputs, lambda: cache.begin_decode(index), lambda: cache.end(index))
    inputs = core.tables.inputs(work)
    if has_states:
        return _Step(core, inputs, cache.begin_prompt, lambda: cache.end(index))
    return _Step(core, inputs, nothing, nothing)
