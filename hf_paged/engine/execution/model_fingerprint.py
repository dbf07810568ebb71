"""Whether a model still computes the same: keys, values and captured steps of another one are of no use.

Every step asks whether weights are the same objects, in the same places, with the same count of changes, and whether an
optimiser has made a step. What leaves no trace (a custom kernel, ``parameter.data.add_()``) is seen by sums
over all bytes, which take a pass over the weights: after a pause, and when an idle engine could use what it has kept.
"""

import copy
import operator
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...fusion import has_own_forward
from ...hooks import active_hooks
from ...mixed_precision import enables_autocast
from ...transformers_internals import any_hooks, hooks_of, tables_of, tensor_version, tensor_versions

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Attributes that tell which adapters a module of PEFT runs."""
NUM_SUMS = 8191
"""Sums over every so manyth word of a tensor; a prime, so that rows that change places are seen."""


class ModelFingerprint:
    """A model as it was when this was made.

    Args:
        model: the model.
        device: of its inputs.
        written: buffers that the model's own forward writes, see :func:`written_buffers`: they are not looked at.

    Attributes:
        hooks: of its modules, see :func:`~hf_paged.transformers_internals.hooks_of`.
        was_optimised: an optimiser has made a step with its parameters since.
        ids: of its parameters and buffers.
        remembered: sums over their bytes, None: not taken yet.
    """

    def __init__(self, model: Any, device: torch.device, written: frozenset[str] = frozenset()) -> None:
        self._model, self._device, self.written = model, device, written
        self._is_training = model.training
        self.hooks = hooks_of(model)
        self._active_hooks = active_hooks(self.hooks)
        self._modules = list(model.modules())
        self._own_forwards = self._read_own_forwards()
        named = list(model.named_modules(remove_duplicate=True))
        children = [
            (table, name, child) for module in self._modules for table in tables_of(module)[:1]
            for name, child in table.items()
        ]  # fmt: skip
        weights = [
            (tensors, name, tensor)
            for prefix, module in named
            for tensors in tables_of(module)[1:]
            for name, tensor in tensors.items()
            if f"{prefix}.{name}" not in written and not (tensor is not None and tensor.is_meta)
        ]
        # As columns: every step compares them.
        self._owners, self._names, self._objects = zip(*children, *weights)
        self._all_owners = [table for module in self._modules for table in tables_of(module)]
        self._num_objects = sum(map(len, self._all_owners))
        self._weights = [tensor for _, _, tensor in weights if tensor is not None]
        # What a tensor subclass (of a sharded model) is made of has an address, and a count of changes of its own.
        parts = [part for tensor in self._weights for part in parts_of(tensor)]
        self._placed = [*self._weights, *parts]
        self._tracked = [tensor for tensor in self._placed if not tensor.is_inference()]
        self._places, self._versions = self._read_places(), self._read_versions()
        self._adapters = [
            (module.__dict__, name, copy.copy(module.__dict__[name]))
            for module in self._modules
            for name in ADAPTERS
            if name in module.__dict__
        ]
        self.was_optimised = False
        self.ids = {id(tensor) for tensor in self._weights}
        self.remembered: list[torch.Tensor] | None = None
        _watch_optimizers(self)

    def _read_places(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._placed))

    def _read_versions(self) -> list[int]:
        return tensor_versions(self._tracked)

    def _read_own_forwards(self) -> list[tuple[int, Any]]:
        return [
            (i, module.__dict__.get("forward")) for i, module in enumerate(self._modules) if has_own_forward(module)
        ]

    def has_other_modules(self) -> bool:
        """Whether modules, parameters or adapters are others than they were, or have other forwards."""
        has_others = self._has_other_objects() or self._has_more_objects()
        return has_others or self._has_other_adapters() or self._has_forwards()

    def _has_other_objects(self) -> bool:
        return not all(map(operator.is_, map(dict.get, self._owners, self._names), self._objects))

    def _has_more_objects(self) -> bool:
        return sum(map(len, self._all_owners)) != self._num_objects

    def _has_other_adapters(self) -> bool:
        return any(attributes.get(name) != value for attributes, name, value in self._adapters)

    def _has_forwards(self) -> bool:
        return self._read_own_forwards() != self._own_forwards

    def change(self, *, look_closely: bool = False) -> str | None:
        """What is different now, None: nothing.

        Args:
            look_closely: at hooks and at what modules were given beside what they had, too, which takes longer.
        """
        if self._is_training != self._model.training:
            return "it is in training mode" if self._model.training else "it is in evaluation mode"
        if self._has_other_objects():
            return "modules or parameters were exchanged"
        if self._has_other_adapters():
            return "other adapters are active"
        if self.was_optimised or self._read_versions() != self._versions:
            return "weights were changed in place"
        if self._read_places() != self._places:
            return "weights have moved"
        if look_closely and self._has_more_objects():
            return "modules or parameters were added"
        if look_closely and active_hooks(hooks_of(self._model)) != self._active_hooks:
            return "other hooks are registered"
        if look_closely and self._has_forwards():
            return "modules were given other forwards"
        return None

    def replay_blocker(self) -> str | None:
        """Why the model's forward must be run at present, and not a replay of it; None: it need not."""
        if any_hooks(self.hooks):
            return "a module of the model has forward hooks, which a graph would not call"
        if torch.is_autocast_enabled(self._device.type):
            return "autocast is on, which keeps copies of weights that a graph would outlive"
        if enables_autocast(self._model):
            return "the model's forward enables autocast"
        return None

    def remember(self, other: "ModelFingerprint | None" = None) -> None:
        """Take the sums, unless they are there; those of ``other``, if nothing has changed since."""
        if other is not None:
            self.remembered = other.remembered
        elif self.remembered is None:
            self.remembered = sums(self._weights)

    def has_other_values(self) -> bool:
        """Whether the weights' bytes are others than they were at :meth:`remember`; those of now are remembered."""
        before, self.remembered = self.remembered, sums(self._weights)
        return before is None or not all(map(torch.equal, before, self.remembered))


def written_buffers(model: torch.nn.Module, before: dict[str, tuple[int, int]]) -> frozenset[str]:
    """Buffers that are not as they were, by :func:`read_buffers`: a forward of the model was run meanwhile."""
    return frozenset(name for name, state in read_buffers(model).items() if before.get(name) != state)


def read_buffers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Addresses and versions of buffers, by their names with a module's prefix, which may be empty."""
    return {
        f"{prefix}.{name}": (id(buffer), tensor_version(buffer))
        for prefix, module in model.named_modules()
        for name, buffer in tables_of(module)[2].items()
        if buffer is not None
    }


# Optimisers: fused ones change weights and not their counts of changes.

_LIVE: weakref.WeakSet[ModelFingerprint] = weakref.WeakSet()


def _watch_optimizers(live: ModelFingerprint) -> None:
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_note_step))
    _LIVE.add(live)


_HOOKS: list[Any] = []


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for live in list(_LIVE):
        if not live.was_optimised and any(id(p) in live.ids for g in optimizer.param_groups for p in g["params"]):
            live.was_optimised = True


# Sums over bytes


def sums(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Numbers of all bytes: for each device int64 ``[n]``, by :func:`weighted_sums`; on a CPU a CRC of each tensor."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            for plain in _plain(tensor):
                by_device.setdefault(plain.device, []).append(plain.reshape(-1).view(torch.uint8))
        return [
            torch.tensor([zlib.crc32(memoryview(raw.numpy())) for raw in found], dtype=torch.int64)
            if device.type == "cpu"
            else weighted_sums(found)
            for device, found in by_device.items()
        ]


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor subclass is made of; none of a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [part for part in parts if isinstance(part, torch.Tensor)]  # DTensors name their mesh among them


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor subclass is made of, or the tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        for part in parts_of(tensor):
            yield from _plain(part)
    elif not tensor.is_meta and tensor.layout == torch.strided:
        yield tensor.detach()


def weighted_sums(raws: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 ``[n]``, on the device of ``raws``, uint8: the 32-bit words of each, times factors by their places.

    Two kernels for each: one adds up every :data:`NUM_SUMS` th word, one what is left over.
    """
    table = torch.zeros(len(raws), NUM_SUMS, dtype=torch.int64, device=raws[0].device)
    for raw, row in zip(raws, table):
        if raw.storage_offset() % 4:
            raw = raw.clone()
        num_words = len(raw) // 4
        num_even = num_words // NUM_SUMS * NUM_SUMS
        words = raw[: num_words * 4].view(torch.int32)
        if num_even:
            torch.sum(words[:num_even].view(-1, NUM_SUMS), 0, dtype=torch.int64, out=row)
        for rest in (words[num_even:], raw[num_words * 4 :]):
            if len(rest):
                row[: len(rest)] += rest
    return (table * _factors(table.device)).sum(1)


@lru_cache
def _factors(device: torch.device) -> torch.Tensor:
    """int64 ``[NUM_SUMS]``, odd."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (NUM_SUMS,), generator=draw) * 2 + 1).to(device)
