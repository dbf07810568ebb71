"""What a cache returns in place of all keys and values: a stand-in that is not copied from the pages.

transformers hands the result of ``cache.update`` straight to the attention function. ``paged_flash`` takes the source
out of the stand-in and reads the pages in place. To any other code it is an ordinary tensor: the first operation on it
gathers the dense keys or values, so results are the same everywhere.
"""

from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UnsupportedModelError
from ..transformers_internals import written_arguments

BEHIND = (
    "behind the cache, which holds them in pages: write it out of place (x = x.add(y)), or pass "
    "past_key_values=DynamicCache(config=model.config)."
)


class StatesSource(Protocol):
    """Where the keys and values of a layer are in the running step."""

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, gathered."""


class StepLayer(StatesSource, Protocol):
    """What attention needs to know of a layer in a step of the engine, whose sequences are packed.

    ``dense()`` gives the keys and values of the step's sequences one after the other, ``[1, H, total keys, D]``; models
    that change keys after the cache (latent attention) work so, with packed lengths.
    """

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

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the step."""


class LazyStates(torch.Tensor):
    """All keys (or values) of a layer: see the module's docstring."""

    source: Any
    is_key: bool
    shared: list[tuple[torch.Tensor, torch.Tensor]]
    # No more than dispatch is asked for: with it, every look at a shape would go through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def pair(
        source: StatesSource, num_seqs: int, num_keys: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple["LazyStates", "LazyStates"]:
        """Keys and values ``[num_seqs, H, num_keys, D]`` without storage, of the kinds of the new ones."""
        pair = []
        for new, is_key in ((key, True), (value, False)):
            _, heads, _, head_dim = new.shape
            states = torch.Tensor._make_wrapper_subclass(
                LazyStates, (num_seqs, heads, num_keys, head_dim), dtype=new.dtype, device=new.device
            )
            states.source, states.is_key, states.shared = source, is_key, []
            pair.append(states)
        return pair[0], pair[1]

    def dense(self) -> torch.Tensor:
        """The gathered keys or values: a copy, or in a first step the new ones themselves."""
        self.refuse_changes()
        keys, values = self.source.dense()
        return keys if self.is_key else values

    def refuse_changes(self) -> None:
        """To be called by what reads the pages: they do not hold what was written through a view of the stand-in.

        A view shares its base's version counter. Tensors of inference mode have none: their numbers are compared.

        Raises:
            UnsupportedModelError: a view of the keys or values was written.
        """
        if self.is_inference():
            is_changed = any(not _has_same_bits(*pair) for pair in self.shared)
        else:
            is_changed = self._version != 0
        if is_changed:
            raise UnsupportedModelError(f"a view of the {'keys' if self.is_key else 'values'} was written, {BEHIND}")

    def __repr__(self, **_: Any) -> str:
        return f"LazyStates({'keys' if self.is_key else 'values'}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in written_arguments(func, args):
            if isinstance(given, LazyStates):
                raise UnsupportedModelError(f"{func} changes keys or values in place {BEHIND}")
        taken: list[tuple[LazyStates, torch.Tensor]] = []

        def gathered(states: LazyStates) -> torch.Tensor:
            dense = states.dense()
            # The stand-in is contiguous: what is a view of such a tensor must not fail, nor be a copy. Outside of
            # inference mode reshape() and its like arrive as view().
            if func is torch.ops.aten.view.default or states.is_inference():
                dense = dense.contiguous()
            taken.append((states, dense))
            return dense

        args, kwargs = tree_map_only(LazyStates, gathered, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for states, dense in taken:
            if states.is_inference() and _shares_memory(result, dense):
                states.shared.append((dense, dense.clone()))
        return result


def _shares_memory(result: Any, dense: torch.Tensor) -> bool:
    """Whether an operation's result holds a tensor in the memory of ``dense``."""
    memory = dense.untyped_storage().data_ptr()
    return any(
        isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == memory for x in tree_leaves(result)
    )


def _has_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN in the same places is the same."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
