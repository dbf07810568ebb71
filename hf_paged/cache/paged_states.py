"""What :class:`PagedCache` returns in place of all keys and values: a stand-in that is not copied from the pages.

transformers hands the result of ``cache.update`` straight to the attention function. ``paged_flash`` takes the layer
and the new tokens out of the stand-in and reads the pages in place. To any other code it is an ordinary tensor of shape
``[B, H, tokens, D]``: the first operation on it gathers the dense keys or values, so results are the same everywhere.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from .paged_layer import PagedLayer


class LayerUpdate:
    """One call of ``cache.update`` on one layer: new keys and values that the attention function will place.

    They are written once it is known which of them are padding: by ``paged_flash`` with its mask, or by whoever looks
    at the dense keys first, with every token taken as real.
    """

    __slots__ = ("key", "layer", "start", "value", "written")

    def __init__(self, layer: "PagedLayer", start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.layer, self.start, self.key, self.value = layer, start, key, value
        self.written = False


class PagedStates(torch.Tensor):
    """All keys (or values) of a layer, lazily: see the module's docstring."""

    update: LayerUpdate
    is_key: bool

    @staticmethod
    def of(update: LayerUpdate, num_keys: int) -> tuple["PagedStates", "PagedStates"]:
        """Keys and values of the dense shapes, ``num_keys`` columns, without storage of their own."""
        pair = []
        for new, is_key in ((update.key, True), (update.value, False)):
            num_seqs, heads, _, head_dim = new.shape
            states = torch.Tensor._make_wrapper_subclass(
                PagedStates, (num_seqs, heads, num_keys, head_dim), dtype=new.dtype, device=new.device
            )
            states.update, states.is_key = update, is_key
            pair.append(states)
        return pair[0], pair[1]

    def dense(self) -> torch.Tensor:
        """The gathered ``[B, H, tokens, D]``."""
        keys, values = self.update.layer.dense(self.update)
        return keys if self.is_key else values

    def __repr__(self, **_: Any) -> str:
        return f"PagedStates({'keys' if self.is_key else 'values'}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(PagedStates, PagedStates.dense, (args, kwargs or {}))
        return func(*args, **kwargs)
