"""What an engine step hands to attention in place of all keys and values: a stand-in that reads the pages.

As :mod:`paged_states` for a step of packed sequences: ``paged_flash`` takes the layer out of the stand-in and reads its
pages in place. Any other operation gathers the dense keys or values of the step's sequences, one after the other,
``[1, H, total keys, D]``; models that change keys after the cache (latent attention) work so, with packed lengths.
"""

from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only


class StepLayer(Protocol):
    """What attention needs to know of a layer in the running step."""

    index: int
    window: int | None

    def attend(
        self,
        query: torch.Tensor,
        left: int | None,
        right: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of packed queries ``[T, Hq, D]`` over the step's pages: ``[T, Hq, Dv]``."""

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences of the step, packed ``[1, H, total keys, D]``."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the step."""


class StepStates(torch.Tensor):
    """All keys (or values) of a layer in an engine step, lazily."""

    layer: StepLayer
    is_key: bool

    @staticmethod
    def __new__(cls, layer: StepLayer, new: torch.Tensor, num_keys: int, is_key: bool) -> "StepStates":
        """A tensor of the dense shape without storage; ``new`` are the new keys or values ``[B, H, L, D]``."""
        shape = (1, new.shape[1], num_keys, new.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        self.layer, self.is_key = layer, is_key
        return self

    def __init__(self, layer: StepLayer, new: torch.Tensor, num_keys: int, is_key: bool) -> None:
        pass

    def dense(self) -> torch.Tensor:
        """The gathered ``[1, H, total keys, D]``."""
        keys, values = self.layer.dense()
        return keys if self.is_key else values

    def __repr__(self, **_: Any) -> str:
        return f"StepStates({'keys' if self.is_key else 'values'}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(StepStates, StepStates.dense, (args, kwargs or {}))
        return func(*args, **kwargs)
