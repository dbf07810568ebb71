"""The dtype that attention runs in where a model's queries, keys and values have different ones.

Under autocast a projection gives bfloat16, and rotary embeddings or norms behind it float32: queries and keys then come
in another dtype than values. So they do from norms that were left in float32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
UNCHANGED = nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None where it is not enabled."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def enables_autocast(model: torch.nn.Module) -> bool:
    """Whether a decorator of the model's forward is ``torch.autocast``: accelerate leaves one in a prepared model."""
    function: Any = model.__dict__.get("forward")
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(isinstance(cell.cell_contents, torch.autocast) for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def in_one_dtype(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values (the values last) in the dtype that attention runs in; what has it is not copied.

    Under autocast that is autocast's, in which eager and sdpa attention multiply, for all but float64. Without, float32
    beside values of half precision is brought to the values' dtype, as transformers does for flash attention. Any other
    difference stays.
    """
    target = autocast_dtype(states[-1].device)
    sources: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    if target is None:
        target, sources = states[-1].dtype, (torch.float32,)
        if target not in HALF or states[0].dtype == states[-2].dtype == target:  # at most three
            return states
    return tuple(x.to(target) if x.dtype in sources and x.dtype != target else x for x in states)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which references compute in float32, whatever autocast says outside of it."""
    return UNCHANGED if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
