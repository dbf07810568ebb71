"""Weights of several linear layers as one matrix: one matmul in place of many, and still everybody's own parameters.

::

    storage     | q_proj.weight | k_proj.weight | v_proj.weight |      [Nq + Nk + Nv, K]
                  Parameter.data   Parameter.data  Parameter.data      views: the Parameter objects stay

``optimizer.step()``, ``load_state_dict()`` and whatever else writes in place writes into the matrix. What gives a
parameter other memory (``model.to()``, ``.data =``) is seen by :meth:`PackedLinears.is_current`.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

HELD = "somebody else holds a weight's memory: a state dict, another model, or a graph that waits for backward()"
"""The objection that whoever starts the engine may want to do something about."""


class PackedLinears:
    """Linear layers with the same input, as one; a single one is used as it is.

    Args:
        linears: plain ``nn.Linear``; in the order of the packed outputs.

    Attributes:
        sizes: outputs of each.
        weight: ``[sum(sizes), K]``, contiguous; there after :meth:`pack`.
        bias: ``[sum(sizes)]`` or None.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = tuple(linears)
        self.sizes = [linear.out_features for linear in linears]
        # Not a view of a weight: whoever looks would find its memory held by two.
        self.weight: torch.Tensor = torch.empty(0)
        self.bias: torch.Tensor | None = None
        self._addresses: list[int] = []
        self._own_storages: set[int] = set()

    def objection(self) -> str | None:
        """Why they cannot be packed now; None: they can."""
        first = self.linears[0]
        for linear in self.linears:
            for parameter in [linear.weight] if linear.bias is None else [linear.weight, linear.bias]:
                reason = _objection_to(parameter, first.weight)
                if reason is not None:
                    return reason
            if linear.in_features != first.in_features or (linear.bias is None) != (first.bias is None):
                return "the layers are not alike: some have a bias, or another input"
        if len(self.linears) > 1 and not self._are_neighbours():
            for parameter in self._parameters():
                if parameter.untyped_storage().data_ptr() in self._own_storages:
                    continue
                if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.itemsize:
                    return "a weight is a view of a larger storage, which somebody else may use"
                if _num_holders(parameter) > 1:
                    return HELD
        return None

    def pack(self) -> None:
        """Make the weights views of one storage, unless they are already; only where there is no :meth:`objection`."""
        # A tensor born in inference mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            if len(self.linears) > 1 and not self._are_neighbours():
                self._own_storages = set()
                for parameters in self._groups():
                    packed = torch.cat([parameter.data for parameter in parameters])
                    self._own_storages.add(packed.untyped_storage().data_ptr())
                    for parameter, part in zip(parameters, packed.split([len(p) for p in parameters])):
                        parameter.data = part
            views = []
            for parameters in self._groups():
                first = parameters[0]
                shape = (sum(len(parameter) for parameter in parameters), *first.shape[1:])
                # No view in torch's sense: it would keep a tensor more on this storage.
                view = torch.empty(0, dtype=first.dtype, device=first.device)
                views.append(view.set_(first.untyped_storage(), first.storage_offset(), shape, first.stride()))
        self.weight, self.bias = views[0], views[1] if len(views) > 1 else None
        self._addresses = self._read_addresses()

    def is_current(self) -> bool:
        """Whether every parameter is where it was packed."""
        return self._read_addresses() == self._addresses

    def unpack(self) -> None:
        """Give each parameter that :meth:`pack` moved, and that is still there, a storage of its own.

        Where somebody else holds that memory by now, they stay views of it: they go on seeing the same values.
        """
        with torch.inference_mode(False), torch.no_grad():
            for group, view in zip(self._groups(), (self.weight, self.bias)):
                moved = [p for p in group if p.untyped_storage().data_ptr() in self._own_storages]
                # Theirs, and the matrix.
                if moved and (view is None or _num_holders(view) == len(moved) + 1):
                    for parameter in moved:
                        parameter.data = parameter.data.clone()
        self._addresses, self._own_storages = [], set()

    def _groups(self) -> list[list[nn.Parameter]]:
        """The weights, and the biases if there are any."""
        groups: list[list[nn.Parameter]] = [[linear.weight for linear in self.linears]]
        if self.linears[0].bias is not None:
            groups.append([linear.bias for linear in self.linears])
        return groups

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._groups() for parameter in group]

    def _read_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters()]

    def _are_neighbours(self) -> bool:
        """Whether the weights lie one behind the other in one storage, as :meth:`pack` leaves them."""
        for group in self._groups():
            if len({parameter.data.untyped_storage().data_ptr() for parameter in group}) > 1:
                return False
            for before, after in itertools.pairwise(group):
                if before.data_ptr() + before.numel() * before.itemsize != after.data_ptr():
                    return False
        return True


def _objection_to(parameter: nn.Parameter, like: nn.Parameter) -> str | None:
    """Why a parameter cannot become a view of a matrix together with ``like``."""
    data = parameter.data
    if type(parameter) is not nn.Parameter or type(data) is not torch.Tensor:
        return f"a weight is a {type(parameter).__name__} of its own kind"
    if data.layout != torch.strided or not data.is_contiguous():
        return "a weight is not a contiguous tensor"
    if data.is_inference() or data.is_meta or not data.is_floating_point():
        return "a weight is not a floating-point tensor with a memory of its own"
    if (data.dtype, data.device) != (like.dtype, like.device):
        return "weights of several dtypes or devices belong together"
    return None


def _num_holders(tensor: torch.Tensor) -> int:
    """Tensors that share a tensor's storage, itself counted."""
    # Of a tensor that nobody else holds: itself, and what the question takes.
    lonely = torch.empty(1)
    return _use_count(tensor) - _use_count(lonely) + 1


def _use_count(tensor: torch.Tensor) -> int:
    """As torch's own CUDA graphs ask for it."""
    return torch._C._storage_Use_Count(StorageWeakRef(tensor.untyped_storage()).cdata)
