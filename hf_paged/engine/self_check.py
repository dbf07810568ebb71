"""Before serving: a few short prompts, packed over pages, against the model's own forward one prompt at a time."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedModelError
from .config import EngineConfig
from .core import EngineCore
from .scheduler import StepWork

LENGTHS = (5, 17, 11)
"""Tokens of the prompts: shorter than a page, longer, and not a multiple."""

MOST_DIFFERENCE = {torch.float32: 2e-3, torch.float64: 2e-3}
"""Largest difference of any logit, in standard deviations of the logits."""
MEAN_DIFFERENCE = 0.15
"""Mean difference for half precision, whose largest one is a matter of luck (a router's close choice, for example)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """What the check has learned of a model.

    Attributes:
        page_bytes: bytes of one page of all layers, by device.
        needs_lengths: the model changes keys behind the cache, so attention needs packed lengths.
    """

    page_bytes: dict[torch.device, int]
    needs_lengths: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """The model's own forward.

    Attributes:
        logits: ``[L, vocab]`` of each prompt, one at a time and without a cache.
        layers: what each decoder layer gives for the second prompt, ``[L, hidden]``, by the layer's name.
    """

    logits: list[torch.Tensor]
    layers: dict[str, torch.Tensor]


def run_reference(model: Any) -> Reference:
    """Run the prompts through the model as it is."""
    with _outputs(model) as layers:
        logits: list[torch.Tensor] = []
        seen: dict[str, torch.Tensor] = {}
        for number, prompt in enumerate(make_prompts(model)):
            logits.append(model(input_ids=prompt[None], use_cache=False, return_dict=True).logits[0])
            seen = dict(layers) if number == 1 else seen
    return Reference(logits, seen)


def make_prompts(model: Any) -> list[torch.Tensor]:
    """Prompts of :data:`LENGTHS` tokens, always the same."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    device = model.get_input_embeddings().weight.device
    draw = np.random.default_rng(0)
    return [torch.from_numpy(draw.integers(0, vocab_size, length)).to(device) for length in LENGTHS]


def probe(model: Any, config: EngineConfig, reference: Reference | None) -> Probe:
    """Run the prompts through the engine's own forward, and hold them against ``reference`` (None: only look).

    Raises:
        UnsupportedModelError: the logits differ; the message names the first layer that does, if one can be named.
    """
    prompts = make_prompts(model)
    # The check is of the packing: quantised pages differ by their rounding, whatever the model.
    plain = dataclasses.replace(config, kv_dtype="auto")
    logits, core = _packed_logits(model, plain, prompts)
    if reference is not None and not agree(reference.logits, logits):
        raise UnsupportedModelError(_describe(model, reference, logits, core))
    if config.kv_dtype != "auto":
        _, core = _packed_logits(model, config, prompts)
    page_bytes: dict[torch.device, int] = {}
    for group in core.pool.groups.values():
        for pages in group.layers.values():
            page_bytes[pages.device] = page_bytes.get(pages.device, 0) + pages.page_bytes
    return Probe(page_bytes, core.runner.needs_lengths)


def small_core(model: Any, config: EngineConfig, needs_lengths: bool = False) -> EngineCore:
    """Slots and pages for the prompts alone."""
    small = dataclasses.replace(
        config, max_num_seqs=len(LENGTHS), max_batch_tokens=max(64, len(LENGTHS)), num_pages=None, max_model_len=None
    )
    pages = sum(-(-length // config.page_size) for length in LENGTHS)
    core = EngineCore(model, small, num_pages=pages, max_model_len=max(LENGTHS))
    core.runner.needs_lengths = needs_lengths
    return core


def _packed_logits(
    model: Any, config: EngineConfig, prompts: list[torch.Tensor]
) -> tuple[list[torch.Tensor], EngineCore]:
    core = small_core(model, config)
    try:
        logits = _run(core, prompts)
    except Exception:
        if not core.cache.num_gathers:
            raise
    if core.cache.num_gathers:
        core = small_core(model, config, needs_lengths=True)
        logits = _run(core, prompts)
    return logits, core


def _run(core: EngineCore, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits ``[L, vocab]`` of each prompt, from chunks that mix the prompts and end with a decode step."""
    lengths = [len(prompt) for prompt in prompts]
    for slot, prompt in enumerate(prompts):
        core.slots.history[slot, : len(prompt)] = prompt.cpu().numpy()
        core.slots.length[slot] = len(prompt)
        core.pages.extend(slot, len(prompt))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    first = [0] * len(prompts) if core.cache.has_states else [3, 9, 0]
    for until, decodes in ((first, False), ([n - 1 for n in lengths], False), (lengths, True)):
        counts = np.array(until) - core.slots.computed[: len(prompts)]
        slots = np.flatnonzero(counts)
        if not len(slots):
            continue
        num_decode = len(slots) if decodes else 0
        work = StepWork(slots, counts[slots], num_decode, np.ones(len(slots), dtype=bool))
        result = core.runner.run(work, counts[slots])
        core.slots.computed[slots] += counts[slots]
        for i, slot in enumerate(slots.tolist()):
            parts[slot].append(result.of(result.first[i], result.last[i]))
    return [torch.cat(part) for part in parts]


def differences(dense: list[torch.Tensor], packed: list[torch.Tensor]) -> tuple[float, float]:
    """Largest and mean difference, in standard deviations of the dense logits."""
    wanted, got = torch.cat(dense).float(), torch.cat(packed).float()
    difference = (wanted - got).abs() / wanted.std()
    return float(difference.max()), float(difference.mean())


def agree(dense: list[torch.Tensor], packed: list[torch.Tensor]) -> bool:
    """Whether logits ``[L, vocab]`` of several prompts differ by no more than roundings."""
    most, mean = differences(dense, packed)
    # NaN agrees with nothing.
    limit = MOST_DIFFERENCE.get(dense[0].dtype)
    return most <= limit if limit is not None else mean <= MEAN_DIFFERENCE


def _describe(model: Any, reference: Reference, packed: list[torch.Tensor], core: EngineCore) -> str:
    most, mean = differences(reference.logits, packed)
    return (
        f"{type(model).__name__} computes something else in the engine than by itself: logits of short prompts differ "
        f"by up to {most:.2g} standard deviations ({mean:.2g} on average). {_blame(model, reference, core)} Use the "
        f"model's own generate(), or EngineConfig(self_check=False) if you know why."
    )


def _blame(model: Any, reference: Reference, core: EngineCore) -> str:
    """Name the first layer whose output differs when one prompt is computed alone, in one step."""
    prompt = make_prompts(model)[1]
    core = small_core(model, core.config, core.runner.needs_lengths)
    core.slots.history[0, : len(prompt)] = prompt.cpu().numpy()
    core.slots.length[0] = len(prompt)
    core.pages.extend(0, len(prompt))
    one = np.ones(1, dtype=bool)
    with _outputs(model) as paged:
        core.runner.run(StepWork(np.array([0]), np.array([len(prompt)]), 0, one), np.array([len(prompt)]))
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    for number, (name, layer) in enumerate(_layers(model).items()):
        own, got = reference.layers.get(name), paged.get(name)
        if own is not None and got is not None and not agree([own], [got]):
            kind = f" ({kinds[number]})" if kinds and number < len(kinds) else ""
            return f"The first layer that differs is {name}{kind}, a {type(layer).__name__}."
    return "A prompt computed alone agrees: its layers mix the sequences of a packed batch."


def _layers(model: Any) -> dict[str, torch.nn.Module]:
    """The decoder layers, by their names."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return {}


@contextmanager
def _outputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what the decoder layers return, as ``[tokens, hidden]``, by their names."""
    seen: dict[str, torch.Tensor] = {}
    thread = threading.get_ident()  # Others may run the model meanwhile.

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, torch.Tensor) and threading.get_ident() == thread:
                seen[name] = states.reshape(-1, states.shape[-1])

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in _layers(model).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
