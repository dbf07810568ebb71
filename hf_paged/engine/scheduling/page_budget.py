"""How many pages the engine takes, and how groups of layers share them."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..config import EngineConfig
from ..ranks import ALONE, Alone
from .pacing import bucket_sizes

DEFAULT_MODEL_LEN = 32_768
"""Tokens of a request where the model's config names no maximum."""

LIBRARY_BYTES = 256 << 20
"""Workspaces of cuBLAS, kernels that are loaded as they are first used, and holes in PyTorch's cache."""
UNLIMITED = 1 << 62

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
    """Memory of a device, or of the machine, that is unused at the moment."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "xpu":
        return torch.xpu.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def choose_num_pages(bytes_by_device: dict[torch.device, int], fraction: float, most: int, reserve: int = 0) -> int:
    """Pages of the whole model that fit into ``fraction`` of the free memory of every device, ``most`` at most.

    Args:
        bytes_by_device: bytes of one page of all layers that are on a device.
        fraction: of the memory that is free now.
        most: pages that the engine can use at all.
        reserve: bytes of every device that are not for pages.
    """
    fit = []
    for device, size in bytes_by_device.items():
        if size:
            free = free_bytes(device)
            fit.append(min(int(free * fraction), free - reserve) // size)
    return max(1, min([most, *fit]))


def working_bytes(model: Any, config: EngineConfig, step_bytes: int | None = None) -> int:
    """Memory of a GPU that the engine needs beside pages and weights, at most: of the largest step its activations and
    logits, the logits that captured steps keep, and what libraries take.

    Args:
        step_bytes: activations of the largest step (:meth:`PageRoom.measure`); None: an estimate from the widths.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    widths = [getattr(module, "out_features", 0) for module in model.modules() if module is not head]
    hidden, size = embeddings.shape[-1], embeddings.element_size()
    # Experts have a row of their own for each token that they get.
    widest = max([4 * hidden, *widths]) * (getattr(text, "num_experts_per_tok", None) or 1)
    activations = config.max_batch_tokens * (6 * hidden + 4 * widest) * size
    # Of the model's dtype, and twice in float32 where they are changed on the way to a token.
    logits = config.max_num_seqs * text.vocab_size * (size + 8)
    captured = 0 if config.cuda_graphs is False else sum(bucket_sizes(config.max_num_seqs)) * text.vocab_size * size
    return LIBRARY_BYTES + (activations if step_bytes is None else step_bytes) + logits + captured


class PageRoom:
    """Bytes of a device that pages may take now: what is free, without what the engine's steps have not taken yet of
    their :func:`working_bytes`.

    Args:
        reserve: these bytes, on every device.
        devices: where pages are.
        ranks: that hold the model: pages may take what all of them have.
    """

    def __init__(self, reserve: int, devices: Iterable[torch.device], ranks: Alone = ALONE) -> None:
        self.reserve, self._ranks = reserve, ranks
        self._devices = [d for d in devices if d.type == "cuda"]
        self._note_taken()

    def measure(self, step: Callable[[], bool]) -> int | None:
        """Run a step, and return the bytes that PyTorch took for it on the device where it took most.

        PyTorch keeps them, so they count as taken from then on.

        Args:
            step: returns False if it could not run; then the result is None.
        """
        torch.cuda.empty_cache()  # What was cached already would not be counted.
        self._note_taken()
        if not step():
            return None
        return max(torch.cuda.memory_reserved(d) - before for d, before in self._before.items())

    def _note_taken(self) -> None:
        self._before = {d: torch.cuda.memory_reserved(d) for d in self._devices}

    def __call__(self, device: torch.device) -> int:
        """Of this device."""
        if device.type != "cuda":
            return UNLIMITED  # The system commits a page when it is touched.
        free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        if free < self.reserve < reserved - torch.cuda.memory_allocated(device):
            # PyTorch keeps more than steps need: another part of the process (a trainer) has left it there.
            torch.cuda.empty_cache()
            free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        return self._ranks.least(free - max(0, self.reserve - max(0, reserved - self._before[device])))


CACHED_BYTES = 512 * 2**20
"""Unused memory that PyTorch may keep of a GPU while an engine sleeps: to ask for a little again costs more."""


def give_back_unused(device: torch.device) -> None:
    """Let PyTorch give back what it keeps of a GPU unused, if that is more than :data:`CACHED_BYTES`."""
    if device.type != "cuda":
        return
    if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > CACHED_BYTES:
        torch.cuda.empty_cache()


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
