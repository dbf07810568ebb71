"""Weights of several linear layers as one matrix: one matmul in place of many, and still separate parameters.

::

    memory      | q_proj.weight | k_proj.weight | v_proj.weight |      [Nq + Nk + Nv, K]
                  storage         storage         storage              of Parameter.data: the Parameter objects stay

Each parameter has a storage of its own over its part of the matrix: code that saves a model, or looks for shared
tensors, finds none. ``optimizer.step()``, ``load_state_dict()`` and whatever else writes in place writes into the
matrix. What gives a parameter other memory (``model.to()``, ``.data =``) is seen by :meth:`PackedLinears.is_current`.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack

HELD = "somebody else holds a weight's memory: a state dict, another model, or a graph that waits for backward()"
"""The reason that the owner of the engine may want to do something about."""


class Matrix:
    """Parameters one behind the other in one memory; engines of one model share it.

    Args:
        parameters: of the same width; they move there.

    Attributes:
        values: ``[sum of their lengths, ...]``.
        users: those :class:`PackedLinears` that read it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.values = torch.cat([parameter.data for parameter in parameters])
        self.users: weakref.WeakSet[PackedLinears] = weakref.WeakSet()
        for parameter, part in zip(parameters, self.values.split([len(p) for p in parameters])):
            # A tensor over the same memory that knows of no other; it keeps the memory alive.
            parameter.data = from_dlpack(to_dlpack(part))
        _MATRICES[self.values.data_ptr()] = self


_MATRICES: weakref.WeakValueDictionary[int, Matrix] = weakref.WeakValueDictionary()
"""By address."""


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
        # Not a view of a weight: a reader would find its memory held by two.
        self.weight: torch.Tensor = torch.empty(0)
        self.bias: torch.Tensor | None = None
        self._addresses: list[int] = []
        self._matrices: list[Matrix] = []

    def pack_blocker(self) -> str | None:
        """Why they cannot be packed now; None: they can."""
        first = self.linears[0]
        for linear in self.linears:
            for parameter in [linear.weight] if linear.bias is None else [linear.weight, linear.bias]:
                reason = _pack_blocker_of(parameter, first.weight)
                if reason is not None:
                    return reason
            if linear.in_features != first.in_features or (linear.bias is None) != (first.bias is None):
                return "the layers are not alike: some have a bias, or another input"
        for parameters in self._groups():
            if _as_one(parameters) is not None:
                continue
            for parameter in parameters:
                if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.itemsize:
                    return "a weight is a view of a larger storage, which somebody else may use"
                if _num_holders(parameter) > 1:
                    return HELD
        return None

    def pack(self) -> None:
        """Let the weights lie one behind the other, unless they do; only where there is no :meth:`pack_blocker`."""
        before, self._matrices = self._matrices, []
        values = []
        # A tensor born in inference mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            for parameters in self._groups():
                one = _as_one(parameters)
                if one is None:
                    one = Matrix(parameters)
                if isinstance(one, Matrix):
                    one.users.add(self)
                    self._matrices.append(one)
                    one = one.values
                values.append(one)
        for matrix in before:
            if matrix not in self._matrices:
                matrix.users.discard(self)
        self.weight, self.bias = values[0], values[1] if len(values) > 1 else None
        self._addresses = self._read_addresses()

    def is_current(self) -> bool:
        """Whether every parameter is where it was packed."""
        return self._read_addresses() == self._addresses

    def unpack(self) -> None:
        """Give each parameter that is still in a matrix memory of its own, if no other engine uses the matrix.

        Where other code holds a parameter's memory by now, it stays there: they go on seeing the same values.
        """
        with torch.inference_mode(False), torch.no_grad():
            for matrix in self._matrices:
                matrix.users.discard(self)
                start = matrix.values.data_ptr()
                places = range(start, start + matrix.values.numel() * matrix.values.itemsize)
                for parameter in self._parameters() if not len(matrix.users) else ():
                    if parameter.data_ptr() in places and _num_holders(parameter) == 1:
                        parameter.data = parameter.data.clone()
        self._addresses, self._matrices = [], []
        self.weight, self.bias = torch.empty(0), None

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


def _as_one(parameters: Sequence[nn.Parameter]) -> torch.Tensor | Matrix | None:
    """Parameters that lie one behind the other in one storage or one matrix, as that; None: they do not."""
    first = parameters[0]
    start = end = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end:
            return None
        end += parameter.numel() * parameter.itemsize
    if len({parameter.data.untyped_storage().data_ptr() for parameter in parameters}) == 1:
        shape = (sum(len(parameter) for parameter in parameters), *first.shape[1:])
        # No view in torch's sense: it would keep a tensor more on this storage.
        view = torch.empty(0, dtype=first.dtype, device=first.device)
        return view.set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())
    matrix = _MATRICES.get(start)
    is_there = matrix is not None and start + matrix.values.numel() * matrix.values.itemsize == end
    return matrix if is_there and matrix.values.dtype == first.dtype else None  # type: ignore[union-attr]


def _pack_blocker_of(parameter: nn.Parameter, like: nn.Parameter) -> str | None:
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
    # Of a tensor without other references: itself, and what the question takes.
    lonely = torch.empty(1)
    return _use_count(tensor) - _use_count(lonely) + 1


def _use_count(tensor: torch.Tensor) -> int:
    """As torch's own CUDA graphs ask for it."""
    return torch._C._storage_Use_Count(StorageWeakRef(tensor.untyped_storage()).cdata)
