"""Low-rank adapters (LoRA) of different requests in one linear layer, as a ``torch.library`` op.

    lora_linear_op(x, base, adapters, pairs, scaling, table, a, b)    base + scaling (x A^T) B^T, A and B by token

Each token names an adapter, or none; an adapter has a pair of matrices in the layer, or none. The product is computed
in two steps, as Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023, arXiv:2311.03285) do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..backend import uses_triton
from ..eager import eager_op


def lora_table(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 ``[P, 3]``: where the matrices of each pair begin in memory, and its rank.

    The matrices are read where they are: the table holds for as long as they do not move.

    Args:
        a: ``[rank, K]`` of each pair, contiguous.
        b: ``[N, rank]`` of each pair, contiguous.
        device: of the table.
    """
    rows = [[first.data_ptr(), second.data_ptr(), first.shape[0]] for first, second in zip(a, b)]
    return torch.tensor(rows, dtype=torch.int64).to(device)


@eager_op("hf_paged::lora_linear")
def lora_linear_op(
    x: torch.Tensor,
    base: torch.Tensor,
    adapters: torch.Tensor,
    pairs: torch.Tensor,
    scaling: torch.Tensor,
    table: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
) -> torch.Tensor:
    """``base[t] + scaling[i] * (x[t] A^T) B^T`` with ``i = adapters[t]`` and the matrices of pair ``pairs[i]``.

    A token's result does not depend on the other tokens. x is rounded to the dtype of the matrices, and so is the
    product with A; sums are in float32 on an accelerator. Nothing is read back to the host: one captured graph serves
    tokens of all adapters.

    Args:
        x: ``[T, K]``, rows contiguous, any floating dtype.
        base: ``[T, N]``, rows contiguous, any floating dtype; not written.
        adapters: int32 ``[T]``; -1: none.
        pairs: int32 ``[E]``: the pair of each adapter in this layer, -1: it has none.
        scaling: float64 ``[E]``: of each adapter in this layer.
        table: :func:`lora_table` of the matrices.
        a: ``[rank, K]`` of each pair, contiguous, one floating dtype for all.
        b: ``[N, rank]`` of each pair, likewise, of the same dtype.

    Returns:
        ``[T, N]``, contiguous, of the dtype of ``base``.
    """
    if not uses_triton(x) or not uses_triton(a[0]):
        return lora_linear_reference(x, base, adapters, pairs, scaling, a, b)
    from .lora_triton import lora_linear_launch

    return lora_linear_launch(x, base, adapters, pairs, scaling, table, a, b)


@lora_linear_op.register_fake
def _(x: torch.Tensor, base: torch.Tensor, *_: Any) -> torch.Tensor:
    return base.new_empty(base.shape)


def lora_linear_reference(
    x: torch.Tensor,
    base: torch.Tensor,
    adapters: torch.Tensor,
    pairs: torch.Tensor,
    scaling: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
) -> torch.Tensor:
    """See :func:`lora_linear_op`; the tokens of one adapter after those of another."""
    out = base.clone(memory_format=torch.contiguous_format)
    for index in adapters.unique().tolist():
        pair = int(pairs[index]) if index >= 0 else -1
        if pair >= 0:
            rows = (adapters == index).nonzero()[:, 0]
            low = F.linear(x[rows].to(a[pair].dtype), a[pair])
            added = F.linear(low, b[pair]) * float(scaling[index])
            out[rows] = (base[rows] + added).to(out.dtype)
    return out


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError("adapters of different requests have no backward pass: wrap inference in torch.no_grad().")


lora_linear_op.register_autograd(_no_backward)
