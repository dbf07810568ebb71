"""LoRA adapters that requests name: rows of one step that have different ones are computed together.

    layer(x) = base(x) + scaling_i (x A_i^T) B_i^T        i: the adapter of each packed token; none: base(x)

PEFT puts a layer around each linear layer that some adapter changes, with the matrices of all adapters inside. While an
engine runs a step, the forwards here stand in for those layers' own, in its thread: other forwards of the model run
what is active on it. The matrices are read where they are, so a step has the weights of its time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hf_paged_kernels.linear.lora import lora_linear_op, lora_table
from torch import nn

from ...errors import UnsupportedModelError
from ...fusion import has_own_forward, standing_in
from ..scheduling.request import ACTIVE, Adapter

NO_ADAPTER, ACTIVE_INDEX = -1, 0
"""Rows of the base model, and of what is active on the model; adapters by name have the numbers from 1 on."""

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]
"""``pairs, scaling, table, a, b`` of :func:`lora_linear_op`."""

LAYERS = "peft.tuners.lora.layer."
WITH_BASE = {
    **{f"{LAYERS}{name}": "base_layer" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")},
    "peft.utils.other.ModulesToSaveWrapper": "original_module",
}
"""Modules of PEFT that compute what the module of this name inside them does, where no adapter is active."""


class ModelAdapters:
    """The adapters that are loaded into a model, as they are when this is made.

    Attributes:
        refusals: of each adapter, by name: why requests cannot name it, None: they can.
        blocker: why they can name none at present, not even None; None: nothing is against it.
        forwards: what runs in the place of PEFT's modules, once :meth:`prepare` was called.
        misfit: why the model has no way to compute rows of several, as a forward has shown; None: none has.
    """

    def __init__(self, model: Any, misfit: str | None = None) -> None:
        self._model, self._device = model, model.get_input_embeddings().weight.device
        self._modules = dict(_modules_of_peft("", model, set()))
        self.refusals: dict[str, str | None] = {}
        self.misfit = misfit
        self.blocker: str | None = misfit
        self._homes: dict[str, nn.ModuleDict] = {}
        self._head = model.get_output_embeddings()
        self._inside = set(model.base_model.modules())
        active: set[str] = set()
        for name, module in self._modules.items():
            self.blocker = self.blocker or _reason_against_module(name, module)
            active |= set(_active(module))
            for adapter, reason in self._reasons(name, module):
                self.refusals[adapter] = self.refusals.get(adapter) or reason
        for adapter in sorted(active):
            reason = self.refusals.get(adapter)
            if reason is not None and self.blocker is None:
                self.blocker = (
                    f"the adapter {adapter!r} is active on the model, and cannot be computed beside others ({reason}): "
                    f"make another one active, or none"
                )
        usable = sorted(adapter for adapter, reason in self.refusals.items() if reason is None)
        self._numbers = {adapter: number for number, adapter in enumerate(usable, ACTIVE_INDEX + 1)}
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._called: set[nn.Module] = set()
        self._rows: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None

    def _reasons(self, name: str, module: nn.Module) -> Iterator[tuple[str, str | None]]:
        """Adapters that a module has, and why requests cannot name them."""
        kind = _kind(module)
        if kind != f"{LAYERS}Linear":
            for adapter in _names_in(module):
                yield adapter, f"it has weights in {name}, a {kind.rsplit('.', 1)[-1]}: linear layers are accepted"
            return
        for adapter in module.lora_A:
            self._homes.setdefault(adapter, module.lora_A)
            reason = _reason_against(module, adapter, self._device)
            if reason is None and module is not self._head and module not in self._inside:
                reason = "is outside of the decoder"
            yield adapter, None if reason is None else f"{name} {reason}"

    def is_current(self, adapter: Adapter) -> bool:
        """Whether an adapter that can be named is still there, as far as one of its layers tells."""
        if self.blocker is not None:
            return False
        if not isinstance(adapter, str):
            return True
        return adapter in self._numbers and adapter in self._homes[adapter]

    def reason_against(self, adapter: Adapter) -> str | None:
        """Why rows of an adapter cannot be computed, None: they can."""
        if self.blocker is not None:
            return f"adapter={adapter!r} cannot be served: {self.blocker}."
        if not isinstance(adapter, str):
            return None
        if adapter not in self.refusals:
            loaded = ", ".join(map(repr, self.refusals)) or "none"
            return f"adapter={adapter!r} is not loaded into the model: {loaded} {'is' if loaded == 'none' else 'are'}."
        reason = self.refusals[adapter]
        return None if reason is None else f"adapter={adapter!r} cannot be served by name: {reason}."

    def number(self, adapter: Adapter) -> int:
        """Of rows of an adapter that can be computed, in the tensors of a step."""
        if adapter is ACTIVE:
            return ACTIVE_INDEX
        return NO_ADAPTER if adapter is None else self._numbers[adapter]

    def prepare(self) -> None:
        """Make :attr:`forwards`."""
        if self.blocker is not None:
            return
        for name, module in self._modules.items():
            if _kind(module) == f"{LAYERS}Linear":
                self.forwards[module] = _MixedLinear(self, name, module, self._calls(module))
            else:
                self.forwards[module] = _Base(module)

    def _calls(self, layer: Any) -> list[Call]:
        """The products of a layer: one, or more where several adapters are active together or dtypes differ."""
        here = [adapter for adapter in self._numbers if adapter in layer.lora_A]
        sets = {self._numbers[adapter]: [adapter] for adapter in here}
        sets[ACTIVE_INDEX] = [adapter for adapter in _active(layer) if adapter in layer.lora_A]
        calls = []
        for dtype in {layer.lora_A[adapter].weight.dtype: None for adapter in here}:
            alike = [adapter for adapter in here if layer.lora_A[adapter].weight.dtype == dtype]
            a = [layer.lora_A[adapter].weight for adapter in alike]
            b = [layer.lora_B[adapter].weight for adapter in alike]
            own = {number: [x for x in names if x in alike] for number, names in sets.items()}
            for turn in range(max(map(len, own.values()))):
                pairs = torch.full((len(self._numbers) + 1,), -1, dtype=torch.int32)
                scaling = torch.zeros(len(self._numbers) + 1, dtype=torch.float64)
                for number, names in own.items():
                    if turn < len(names):
                        pairs[number] = alike.index(names[turn])
                        scaling[number] = layer.scaling[names[turn]]
                device = self._device
                calls.append((pairs.to(device), scaling.to(device), lora_table(a, b, device), a, b))
        return calls

    @contextlib.contextmanager
    def active(self, rows: torch.Tensor, kept: torch.Tensor | None) -> Iterator[None]:
        """One forward of the model over packed tokens, in this thread.

        Args:
            rows: int32 ``[num_tokens]``: the number of each token's adapter, -1: none.
            kept: the same of the tokens whose logits are computed; None: all.

        Raises:
            UnsupportedModelError: a layer has not seen the packed tokens.
        """
        self._rows, self._kept = rows, rows if kept is None else kept
        self._called.clear()
        try:
            with standing_in(self.forwards):
                yield
        finally:
            self._rows = self._kept = None
        for module, forward in self.forwards.items():
            if isinstance(forward, _MixedLinear) and module not in self._called:
                raise self._misfit(f"{forward.name} was not called in a step, as the forward of a linear layer")

    def rows_for(self, layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        """The numbers of the adapters of a layer's input.

        Raises:
            UnsupportedModelError: it is not one vector for each token.
        """
        rows = self._kept if layer is self._head else self._rows
        assert rows is not None
        self._called.add(layer)
        if x.shape[:-1].numel() != len(rows):
            raise self._misfit(
                f"{name} computes {x.shape[:-1].numel()} vectors in a step of {len(rows)} tokens, and which tokens "
                f"they are of is not known"
            )
        return rows

    def _misfit(self, reason: str) -> UnsupportedModelError:
        self.misfit = self.blocker = f"{reason}. Give no adapter=, and make one active on the model"
        return UnsupportedModelError(f"requests cannot name adapters: {self.misfit}.")


class _MixedLinear:
    """The forward of a linear layer for tokens of several adapters.

    Args:
        owner: knows the tokens' adapters.
        name: of the layer.
        layer: PEFT's.
        calls: its low-rank products.
    """

    def __init__(self, owner: ModelAdapters, name: str, layer: Any, calls: list[Call]) -> None:
        self._owner, self.name, self._layer, self._calls = owner, name, layer, calls

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's forward."""
        out = self._layer.base_layer(x, *args, **kwargs)
        rows = self._owner.rows_for(self._layer, self.name, x)
        if not self._calls:
            return out
        shape, tokens, total = out.shape, x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for call in self._calls:
            total = lora_linear_op(tokens, total, rows, *call)
        return total.view(shape)


class _Base:
    """The forward of a module in which no adapter that is computed has weights."""

    def __init__(self, module: nn.Module) -> None:
        self._base = getattr(module, WITH_BASE[_kind(module)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module inside."""
        return self._base(*args, **kwargs)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _modules_of_peft(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """PEFT's modules inside a model, by name; of what is in them, the module that they have been put around."""
    if id(module) in seen:
        return
    seen.add(id(module))
    prefix = f"{name}." if name else ""
    if not _kind(module).startswith("peft."):
        for child_name, child in module.named_children():
            yield from _modules_of_peft(prefix + child_name, child, seen)
        return
    yield name, module
    inside = WITH_BASE.get(_kind(module))
    if inside is not None:
        yield from _modules_of_peft(prefix + inside, getattr(module, inside), seen)


def _reason_against_module(name: str, module: Any) -> str | None:
    """Why a module leaves no way to compute rows of several adapters."""
    if _kind(module) not in WITH_BASE:
        return f"{name} is a {type(module).__name__} of {type(module).__module__}: LoRA of linear layers is accepted"
    if module.merged_adapters:
        merged = ", ".join(map(repr, module.merged_adapters))
        return f"adapters are merged into the weights ({merged} in {name}): call unmerge_adapter()"
    if has_own_forward(module):
        return f"{name} has a forward of its own, given to it by other code"
    return None


def _reason_against(layer: Any, adapter: str, device: torch.device) -> str | None:
    """What is against rows of an adapter, in words that follow the layer's name; ``device``: of the model's inputs."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"is of the variant {type(variant).__name__}: plain LoRA is accepted"
    if getattr(layer, "use_dora", {}).get(adapter):
        return "uses DoRA: plain LoRA is accepted"
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"has a {type(a).__name__} and a {type(b).__name__} for it: linear layers are accepted"
    if a.bias is not None or b.bias is not None:
        return "has a bias for it (lora_bias): plain LoRA is accepted"
    dropout = layer.lora_dropout[adapter]
    if layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0):
        return "is in training mode and has dropout: call model.eval()"
    for weight in (a.weight, b.weight):
        if type(weight.data) is not torch.Tensor or weight.dtype not in FLOATS:
            return f"has matrices of {type(weight.data).__name__}, {weight.dtype}: plain floating ones are accepted"
        if weight.device != device:
            return f"has a matrix on {weight.device}: that of the model's inputs, {device}, is accepted"
        if not weight.is_contiguous():
            return "has a matrix that is not contiguous"
    if a.weight.dtype != b.weight.dtype:
        return f"has matrices of {a.weight.dtype} and {b.weight.dtype}: one dtype is accepted"
    return None


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names_in(module: Any) -> set[str]:
    """Adapters that have weights in a module."""
    tables = (getattr(module, name, None) for name in module.adapter_layer_names)
    return {adapter for table in tables if isinstance(table, (nn.ModuleDict, nn.ParameterDict)) for adapter in table}


def _active(module: Any) -> list[str]:
    """Adapters that PEFT's own forward of a module applies, in its order."""
    if getattr(module, "disable_adapters", False):
        return []
    return [adapter for adapter in getattr(module, "active_adapters", []) if adapter in _names_in(module)]
