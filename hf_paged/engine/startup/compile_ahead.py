"""Compile the kernels that an engine of a model will need, many at a time, before the first of them is waited for.

Without it each kernel is compiled by the step that meets it first, one after the other: about a minute for a model on a
machine that has compiled nothing yet. Here the steps of an engine run once with the first layers of the model, computed
in plain PyTorch, while other processes compile what they would have launched (``hf_paged_kernels.compile_ahead``).
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hf_paged_kernels import compile_ahead as kernels
from torch import nn
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...transformers_internals import shallow_copy
from ..config import EngineConfig
from ..core import EngineCore
from ..execution.decode_graphs import Out, capture_blocker
from .fusion_steps import fuse

logger = logging.get_logger(__name__)

LEAST_PARAMETERS, FEWEST_CORES = 100_000_000, 4
"""Of a model whose kernels are compiled ahead if nothing is said, and of its machine: with fewer cores, other processes
take the time from this one."""
NUM_PAGES = 512
"""Pages of the steps that are run for their kernels."""
DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)
"""Rows of decode steps with kernels of their own, about."""
PROMPT_TOKENS = 300
"""Tokens of a prompt that takes the kernels of long ones."""


def compile_ahead(model: Any, config: EngineConfig, max_model_len: int) -> None:
    """Compile what an engine's steps launch, if this machine has not done so before for a model of this shape.

    Args:
        model: as it runs in the engine. Nothing is done for one whose steps cannot be captured.
        config: the engine's options.
        max_model_len: of the engine.
    """
    device = model.get_input_embeddings().weight.device
    wanted = config.compile_ahead
    if wanted is None:
        num_parameters = sum(weight.numel() for weight in model.parameters())
        wanted = num_parameters >= LEAST_PARAMETERS and (os.cpu_count() or 1) >= FEWEST_CORES
    if not wanted or not kernels.can_compile(device) or capture_blocker(model, device) is not None:
        return
    done = kernels.marker(_shape(model, config, max_model_len), device)
    if done.exists():
        return
    bar = tqdm(desc="compiling kernels", unit="kernel", delay=2.0, leave=False, total=0)
    try:
        with bar, kernels.compiling(device, bar):
            _run_steps(with_first_layers(model), config, max_model_len)
    except Exception as error:
        # The engine's own steps meet the same, and say so in their own way.
        logger.info(f"not all kernels were compiled ahead: {type(error).__name__}: {error}")
        return
    with contextlib.suppress(OSError):  # A cache folder that cannot be written.
        done.touch()


def _run_steps(model: Any, config: EngineConfig, max_model_len: int) -> None:
    core = EngineCore(model, config, NUM_PAGES, max_model_len)
    # First what takes longest to compile: attention, and the choice of tokens.
    core.runner.warm_up_prompts(min(PROMPT_TOKENS, config.max_batch_tokens))
    _run_graphs(core, config, DECODE_SIZES[:1], with_chunks=False)
    fused = fuse(model, config, False, max_model_len) if config.fuse is not False else None
    try:
        if fused is not None:
            core.runner.use_fused(fused)
        core.runner.warm_up_prompts(min(PROMPT_TOKENS, config.max_batch_tokens))
        _run_graphs(core, config, DECODE_SIZES, with_chunks=True)
    finally:
        if fused is not None:
            fused.restore()


def _run_graphs(core: EngineCore, config: EngineConfig, sizes: Sequence[int], with_chunks: bool) -> None:
    """Run what an engine captures, without a capture."""
    if config.cuda_graphs is False or core.use_graphs(_run_once) is not None:
        return
    graphs, chunk_graphs = core.runner.graphs, core.runner.chunk_graphs
    assert graphs is not None
    assert chunk_graphs is not None
    graphs.warm_up(size for size in sizes if size <= config.max_num_seqs)
    if with_chunks:
        # Kernels depend on the tokens of a step or on its outputs, not on both.
        of_tokens, of_outputs = ({bucket[i]: bucket for bucket in chunk_graphs.buckets()} for i in (0, 1))
        alone = {bucket for bucket in chunk_graphs.buckets() if not bucket[1]}
        chunk_graphs.warm_up(wanted=alone | {*of_tokens.values(), *of_outputs.values()})


def _run_once(step: Callable[[torch.Tensor], Out], static: torch.Tensor, /) -> Callable[[], Out]:
    """Stands for a capture."""
    outputs = step(static)
    return lambda: outputs


def with_first_layers(model: Any) -> Any:
    """A model of the same modules and parameters that runs the first layers only, all kinds of layers among them.

    The model itself where its layers are not found.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        return model
    *path, last = found[0].split(".")
    owner = top = shallow_copy(model)
    for name in path:
        setattr(owner, name, shallow_copy(getattr(owner, name)))
        owner = getattr(owner, name)
    layers = getattr(owner, last)
    kinds = [_kind(model, number, layer) for number, layer in enumerate(layers)]
    enough = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    setattr(owner, last, nn.ModuleList(list(layers)[:enough]))
    return top


def _kind(model: Any, number: int, layer: nn.Module) -> tuple[Any, ...]:
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return (
        type(layer),
        types[number] if number < len(types) else None,
        *((name, weight.shape, weight.dtype) for name, weight in layer.named_parameters()),
    )


def _shape(model: Any, config: EngineConfig, max_model_len: int) -> str:
    """What kernels of a model's steps depend on, in short."""
    text = model.config.get_text_config(decoder=True)
    weights = sorted({(str(tuple(weight.shape)), str(weight.dtype)) for weight in model.parameters()})
    options = (
        config.page_size, config.max_batch_tokens, config.max_num_seqs, config.kv_dtype, config.fuse,
        config.cuda_graphs, config.mixed_prompt_tokens,
    )  # fmt: skip
    told = (type(model).__name__, text.to_json_string(), weights, options, max_model_len)
    return hashlib.sha256(repr(told).encode()).hexdigest()
