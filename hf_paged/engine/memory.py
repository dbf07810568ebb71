"""How many pages the engine takes, and how groups of layers share them."""

import os
from collections.abc import Sequence
from typing import Any

import torch

DEFAULT_MODEL_LEN = 32_768
"""Tokens of a request where the model's config names no maximum."""

LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def model_length(config: Any) -> int:
    """Tokens that a model says it can attend to."""
    text = config.get_text_config(decoder=True)
    for name in LENGTH_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return DEFAULT_MODEL_LEN


def free_bytes(device: torch.device) -> int:
    """Memory of a device, or of the machine, that nobody uses at the moment."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def choose_num_pages(bytes_by_device: dict[torch.device, int], fraction: float, most: int) -> int:
    """Pages of the whole model that fit into ``fraction`` of the free memory of every device, ``most`` at most.

    Args:
        bytes_by_device: bytes of one page of all layers that are on a device.
        fraction: of the memory that is free now.
        most: pages that the engine can use at all.
    """
    fit = [int(free_bytes(device) * fraction) // size for device, size in bytes_by_device.items() if size]
    return max(1, min([most, *fit]))


def split_pages(num_pages: int, num_layers: Sequence[int], useful: Sequence[int]) -> list[int]:
    """Pages of each group of layers out of a budget of ``num_pages`` for every layer.

    A group gets no more than it can use (layers with a sliding window hold little), what it leaves goes to the others.

    Args:
        num_pages: pages of every layer.
        num_layers: layers of each group.
        useful: pages that each group can use at most.
    """
    pages = [min(num_pages, most) for most in useful]
    left = num_pages * sum(num_layers) - sum(p * n for p, n in zip(pages, num_layers))
    for group in sorted(range(len(pages)), key=lambda g: useful[g], reverse=True):
        more = min(useful[group] - pages[group], left // num_layers[group])
        pages[group] += more
        left -= more * num_layers[group]
    return pages
