"""Before serving: a few short prompts, packed over pages, against the model's own forward one prompt at a time."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...errors import UnsupportedModelError
from ...hooks import in_this_thread
from ...mixed_precision import enables_autocast
from ..config import EngineConfig
from ..core import EngineCore
from ..execution.decode_graphs import is_short_of_memory
from ..scheduling.step import ScheduledStep

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
        kinds: what the keys and values of each layer are like, by sliding window; see :class:`PageGroup`.
    """

    page_bytes: dict[torch.device, int]
    needs_lengths: bool
    kinds: dict[int | None, dict[int, tuple[torch.Tensor, torch.Tensor]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """The model's own forward.

    Attributes:
        logits: ``[L, vocab]`` of each prompt, one at a time and without a cache.
        layers: what each decoder layer gives for the second prompt, ``[L, hidden]``, by the layer's name.
        is_rounded: it computes in half precision, whatever dtype its logits have (accelerate's autocast).
    """

    logits: list[torch.Tensor]
    layers: dict[str, torch.Tensor]
    is_rounded: bool


def run_reference(model: Any) -> Reference:
    """Run the prompts through the model as it is.

    Raises:
        UnsupportedModelError: padding changes its tokens.
    """
    with _outputs(model) as layers:
        logits: list[torch.Tensor] = []
        seen: dict[str, torch.Tensor] = {}
        for number, prompt in enumerate(make_prompts(model)):
            logits.append(model(input_ids=prompt[None], use_cache=False, return_dict=True).logits[0])
            seen = dict(layers) if number == 1 else seen
    _check_padding(model, logits)
    return Reference(logits, seen, enables_autocast(model))


def _check_padding(model: Any, logits: list[torch.Tensor]) -> None:
    """Refuse a model that counts the columns of a batch, padding included, where it should count tokens.

    ``generate()`` gives positions to models whose forward names them. Others may take them from the mask, or from how
    much is in the cache; the engine gives every token its own.
    """
    if "position_ids" in inspect.signature(model.forward).parameters:
        return
    short, long = make_prompts(model)[:2]
    padding = len(long) - len(short)
    ids = torch.stack([torch.nn.functional.pad(short, (padding, 0)), long])
    mask = torch.nn.functional.pad(torch.ones_like(short), (padding, 0))
    mask = torch.stack([mask, torch.ones_like(long)])
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).logits[0, padding:]
    if not agree(logits[:1], [padded], enables_autocast(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no position_ids and counts padding as tokens: what it gives for a prompt "
            f"depends on the batch, which the engine cannot repeat. Use the model's own generate()."
        )


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
    packed, core = _packed_logits(model, plain, prompts)
    if reference is not None:
        # Not of every token, as in steps.
        wanted = [logits.to(at.device)[at] for logits, (at, _) in zip(reference.logits, packed)]
        got = [logits for _, logits in packed]
        if not agree(wanted, got, reference.is_rounded):
            raise UnsupportedModelError(_describe(model, reference, wanted, got, core))
    if config.kv_dtype != "auto":
        _, core = _packed_logits(model, config, prompts)
    page_bytes: dict[torch.device, int] = {}
    for group in core.pool.groups.values():
        for pages in group.layers.values():
            page_bytes[pages.device] = page_bytes.get(pages.device, 0) + pages.page_bytes
    kinds = {window: group.kinds for window, group in core.pool.groups.items()}
    return Probe(page_bytes, core.runner.needs_lengths, kinds)


def small_core(model: Any, config: EngineConfig, needs_lengths: bool = False) -> EngineCore:
    """Slots and pages for the prompts alone."""
    small = dataclasses.replace(
        config, max_num_seqs=len(LENGTHS), max_batch_tokens=max(64, len(LENGTHS)), num_pages=None, max_model_len=None
    )
    pages = sum(-(-length // config.page_size) for length in LENGTHS)
    core = EngineCore(model, small, num_pages=pages, max_model_len=max(LENGTHS))
    core.runner.needs_lengths = needs_lengths
    return core


Packed = list[tuple[torch.Tensor, torch.Tensor]]
"""For each prompt tokens, int64 ``[n]``, and their logits ``[n, vocab]``."""


def _packed_logits(model: Any, config: EngineConfig, prompts: list[torch.Tensor]) -> tuple[Packed, EngineCore]:
    core = small_core(model, config)
    try:
        packed = _run(core, prompts)
    except Exception as error:
        if not core.cache.num_gathers:
            raise _refusal(model, error) from error
    if core.cache.num_gathers:
        core = small_core(model, config, needs_lengths=True)
        try:
            packed = _run(core, prompts)
        except Exception as error:
            raise _refusal(model, error) from error
    return packed, core


def _refusal(model: Any, error: Exception) -> Exception:
    """What a step of the engine that a model cannot run raises."""
    if isinstance(error, (UnsupportedModelError, ValueError)) or is_short_of_memory(error):
        return error
    return UnsupportedModelError(
        f"{type(model).__name__} cannot run a step of the engine ({type(error).__name__}: {error}). Use the model's "
        f"own generate()."
    )


def _run(core: EngineCore, prompts: list[torch.Tensor]) -> Packed:
    """Chunks that mix the prompts and end with a decode step: the last token of each chunk at first, then all but the
    first one, and those of the decode step."""
    lengths = [len(prompt) for prompt in prompts]
    for slot, prompt in enumerate(prompts):
        core.slots.history[slot, : len(prompt)] = prompt.cpu().numpy()
        core.slots.length[slot] = len(prompt)
        core.pages.extend(slot, len(prompt))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    tokens: list[list[torch.Tensor]] = [[] for _ in prompts]
    first = [0] * len(prompts) if core.cache.has_states else [3, 9, 0]
    steps = ((first, False, 1), ([n - 1 for n in lengths], False, max(lengths)), (lengths, True, 1))
    for until, decodes, most in steps:
        counts = np.array(until) - core.slots.computed[: len(prompts)]
        slots = np.flatnonzero(counts)
        if not len(slots):
            continue
        num_decode = len(slots) if decodes else 0
        work = ScheduledStep(slots, counts[slots], num_decode, np.ones(len(slots), dtype=bool))
        num_logits = np.minimum(most, np.maximum(counts[slots] - (most > 1), 1))
        result = core.runner.run(work, num_logits)
        core.slots.computed[slots] += counts[slots]
        for i, slot in enumerate(slots.tolist()):
            parts[slot].append(result.of(result.first[i], result.last[i]))
            end = int(core.slots.computed[slot])
            tokens[slot].append(torch.arange(end - int(num_logits[i]), end, device=core.device))
    return [(torch.cat(where), torch.cat(part)) for where, part in zip(tokens, parts)]


def differences(dense: list[torch.Tensor], packed: list[torch.Tensor]) -> tuple[float, float]:
    """Largest and mean difference, in standard deviations of the dense logits."""
    wanted, got = torch.cat(dense).float(), torch.cat(packed).float()
    difference = (wanted - got).abs() / wanted.std()
    return float(difference.max()), float(difference.mean())


def agree(dense: list[torch.Tensor], packed: list[torch.Tensor], is_rounded: bool = False) -> bool:
    """Whether logits ``[L, vocab]`` of several prompts differ by no more than roundings.

    Args:
        dense, packed: of each prompt.
        is_rounded: those of half precision, whatever the dtype is.
    """
    most, mean = differences(dense, packed)
    # NaN agrees with nothing.
    limit = None if is_rounded else MOST_DIFFERENCE.get(dense[0].dtype)
    return most <= limit if limit is not None else mean <= MEAN_DIFFERENCE


def _describe(
    model: Any, reference: Reference, wanted: list[torch.Tensor], got: list[torch.Tensor], core: EngineCore
) -> str:
    most, mean = differences(wanted, got)
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
        core.runner.run(ScheduledStep(np.array([0]), np.array([len(prompt)]), 0, one), np.array([len(prompt)]))
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    for number, (name, layer) in enumerate(_layers(model).items()):
        own, got = reference.layers.get(name), paged.get(name)
        if own is not None and got is not None and not agree([own], [got], reference.is_rounded):
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

    def keep(name: str) -> Callable[..., None]:
        @in_this_thread
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, torch.Tensor):
                seen[name] = states.reshape(-1, states.shape[-1])

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in _layers(model).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
