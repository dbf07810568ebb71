"""Models and devices by their names, with errors that name the argument; what a report says of where it was made."""

import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

import hf_paged  # importing it is what registers "paged_flash"

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
ACCEPTED_DEVICE_MAPS = (
    f"one of {', '.join(DEVICE_MAPS)}, or a JSON object of modules and devices such as "
    '{"": "cuda:0"}, or a .json file with one'
)


def attention_implementation(model: PreTrainedModel) -> str:
    """Name of the attention implementation that the decoder of `model` runs with."""
    # Underscored, yet it is the name by which the attention interface is documented; there is no other way to ask.
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def cache_name(model: PreTrainedModel) -> str | None:
    """What the model calls its cache, "cache" from transformers 5.24 on; None: its forward takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def with_cache(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to the model's forward or `generate()`.

    Raises:
        ValueError: the model takes none.
    """
    name = cache_name(model)
    if name is None:
        raise ValueError(f"{type(model).__name__}.forward takes no cache.")
    return {name: cache}


def check_window(config: PreTrainedConfig, window: int) -> None:
    """Raise ValueError if `window` is longer than a model of `config` has positions for."""
    limit = max_positions(config)
    if limit is not None and window > limit:
        raise ValueError(
            f"window={window} is larger than the model's max_position_embeddings={limit}; pass a window (--window) of "
            f"at most {limit}"
        )


def check_attention(name: str) -> None:
    """Raise ValueError unless `name` is a registered attention implementation, or "owner/kernel" of the hub."""
    known = ("eager", *sorted(AttentionInterface().valid_keys()))
    if name not in known and "/" not in name:
        raise ValueError(f"attn (--attn) {name!r} is unknown{did_you_mean(name, known)}; pass one of {known}")


def max_positions(config: PreTrainedConfig) -> int | None:
    """Most tokens in a sequence, None where the model sets no limit (ALiBi, for one)."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Part of an error message: the known name that is closest, or nothing."""
    close = get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name, **kwargs)`, its errors naming the argument."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    # A device that is not there: RuntimeError, or AssertionError of a torch without CUDA.
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        options, said = f" with {kwargs}" if kwargs else "", " ".join(str(error).split())
        raise ValueError(
            f"model (--model) {name!r}: {auto_class.__name__}.from_pretrained{options} failed: {said}; pass a "
            "folder with a model and its tokenizer, or a reachable hub id"
        ) from error


def checked_device(name: str | None) -> torch.device:
    """The device of that name, or the default for None, tried out."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # A torch built without CUDA raises AssertionError for "cuda".
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device (--device) {name!r} cannot be used here: {error}; pass cpu, cuda or cuda:0"
        ) from error


def parsed_device_map(text: str) -> str | dict[str, Any]:
    """A `device_map` of `from_pretrained`.

    Raises:
        ValueError: `text` is none of `ACCEPTED_DEVICE_MAPS`.
    """
    if text in DEVICE_MAPS:
        return text
    source = Path(text).read_text(encoding="utf-8") if text.endswith(".json") and Path(text).is_file() else text
    try:
        device_map = json.loads(source)
    except json.JSONDecodeError:
        device_map = None
    if not isinstance(device_map, dict):
        raise ValueError(
            f"device_map (--device-map) {text!r} is unknown{did_you_mean(text, DEVICE_MAPS)}; pass "
            f"{ACCEPTED_DEVICE_MAPS}"
        )
    return device_map


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention implementation; ValueError where the model cannot take it."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn (--attn) {name!r} cannot be used with {type(model).__name__} here: {error}") from error
    # transformers may answer with another implementation and a warning: a figure under the wrong name.
    if attention_implementation(model) != name:
        raise ValueError(
            f"attn (--attn) {name!r}: transformers gave {type(model).__name__} "
            f"{attention_implementation(model)!r} in its place; pass that, or another implementation"
        )


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of every parameter and buffer, as hexadecimal digits: another if any weight is, on any device.

    Each tensor counts by its name, shape, dtype and two sums of its bits, one weighed by place. A part that accelerate
    has offloaded to a disk counts by name, shape and dtype only.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type == "meta":
            continue
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        for index, part in enumerate(bits.split(2**24)):
            part = part.to(torch.int64)
            places = torch.arange(1, len(part) + 1, device=part.device)
            # int64 wraps around: the sums are exact whatever their order.
            digest.update(f"{index} {part.sum().item()} {(part * places).sum().item()}".encode())
    return digest.hexdigest()


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype of as many bytes."""


def device_name(device: torch.device) -> str:
    """What a report calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of everything a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    found["hf_paged"] = hf_paged.__version__
    return found
