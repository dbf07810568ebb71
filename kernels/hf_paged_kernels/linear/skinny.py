"""Linear layers of a few tokens, as ``torch.library`` ops: a decode step of few sequences reads weights, little else.

    small_linear_op(x, weight, bias, residual, norm_weight, norm_eps)   norm(x) W^T + bias + residual
    small_gated_linear_op(x, weight, bias, norm_weight, norm_eps)       silu(norm(x) Wg^T + bg) * (norm(x) Wu^T + bu)

``norm(x) = x / sqrt(mean(x^2) + norm_eps) * norm_weight``, or x itself where ``norm_weight`` is None.

On a Hopper GPU a kernel of ``small_linear_gluon`` does all of it where :func:`choose_small_linear` has settings: sums
in float32, one rounding at the end. Elsewhere PyTorch's operators run one after the other, each rounding to x's dtype.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backend import has_gluon
from ..eager import eager_op

MAX_TOKENS = 16
"""Tokens up to which the kernels are as fast as cuBLAS or faster (H200; see ``choose_small_linear``)."""
HEAD = 65536
"""Output features from which a layer counts as an LM head: large enough for cuBLAS to lose nothing on three tokens."""


@dataclass(frozen=True, slots=True)
class SmallLinearSettings:
    """Settings of one launch.

    Attributes:
        rows: tokens the kernel is compiled for. 1 and 2: multiply-adds; 8 and 16: matrix units, with unused rows.
        block_n: weight rows of a program (of the gate and of the up projection each).
        warps_n: warps side by side along these rows.
        warps_k: warps side by side along in_features.
        ahead: chunks of weights that a warp keeps in flight, and loads before it waits for the kernel before.
        x_ahead: the same for chunks of x.
        max_registers: registers a thread, or None for the compiler's choice.
        norm_first: whether the norm is a kernel of its own, because each program would repeat it.
        early: whether the kernel after this one may start as soon as all programs of this one run.
    """

    rows: int
    block_n: int
    warps_n: int
    warps_k: int
    ahead: int
    x_ahead: int
    max_registers: int | None = None
    norm_first: bool = False
    early: bool = True


def choose_small_linear(
    num_tokens: int, out_features: int, in_features: int, gated: bool, element_size: int
) -> SmallLinearSettings | None:
    """Settings for ``[num_tokens, in_features] x [out_features, in_features]``, or None: leave it to PyTorch.

    A pure function of its arguments, from measurements on an H200. ``out_features`` counts both halves of a gated
    layer. Kernels are compiled for 1, 2, up to 8 and up to 16 tokens. A row's result never depends on other rows, and
    is bitwise the same for every number of tokens from 3 to 16; fewer are summed in another order.
    """
    if not 1 <= num_tokens <= MAX_TOKENS or in_features < 64 or element_size > 4:
        return None
    wide = in_features >= 4096
    # Every program would do the norm of all tokens: where it has few weight rows of its own, that is the larger part.
    norm_first = num_tokens > 1 and in_features > 2048
    head = out_features >= HEAD and not gated
    if num_tokens == 1 or (num_tokens == 2 and (wide or head or element_size == 4)):
        if in_features <= 1536:
            return SmallLinearSettings(num_tokens, 16, 8, 1, 4, 4)
        if gated:
            return SmallLinearSettings(num_tokens, 2, 1, 4, 4, 4 // num_tokens, norm_first=norm_first)
        return SmallLinearSettings(num_tokens, 4, 1, 4, 4, 4, norm_first=norm_first and head)
    if element_size != 2 or head:
        return None
    rows = 8 if num_tokens <= 8 else 16
    if gated:
        warps_k = 4 if in_features <= 1536 else 2
        return SmallLinearSettings(rows, 16, 1, warps_k, 4, 8, norm_first=norm_first, early=wide)
    warps_k = 8 if out_features <= 2048 and in_features > 1536 else 4
    limit = 128 if in_features > 1536 and (rows == 8 or warps_k == 8) else None
    return SmallLinearSettings(rows, 16, 1, warps_k, 4, 8, limit, norm_first, early=wide)


def small_linear_settings(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> SmallLinearSettings | None:
    """Settings for these tensors, or None where PyTorch's operators run (see :func:`choose_small_linear`)."""
    if not has_gluon(x.device) or x.dtype != weight.dtype or x.stride(-1) != 1 or not weight.is_contiguous():
        return None
    out_features, in_features = weight.shape
    return choose_small_linear(x.shape[0], out_features, in_features, gated, x.element_size())


@eager_op("hf_paged::small_linear")
def small_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """``norm(x) W^T + bias + residual``, [T, N].

    The kernel may start before the kernels launched just before it have ended (programmatic dependent launch) and read
    ``weight`` and ``norm_weight``, which none of those may write. Before it touches anything else it waits for them.

    Args:
        x: [T, K]; every tensor has its dtype: float16, bfloat16 or float32.
        weight: [N, K], contiguous.
        bias: [N] or None.
        residual: [T, N], contiguous, or None; added after the bias.
        norm_weight: [K], the weight of an RMS norm of x, or None.
        norm_eps: of that norm; any number without it.
    """
    settings = small_linear_settings(x, weight, gated=False)
    if settings is not None:
        from .skinny_gluon import small_linear_launch

        return small_linear_launch(x, weight, bias, residual, norm_weight, norm_eps, settings)
    out = F.linear(_norm(x, norm_weight, norm_eps), weight, bias)
    return out if residual is None else out.add_(residual)


@small_linear_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@eager_op("hf_paged::small_gated_linear")
def small_gated_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """``silu(norm(x) Wg^T + bg) * (norm(x) Wu^T + bu)``, [T, I]; starts early like :func:`small_linear_op`.

    Args:
        x: [T, K]; every tensor has its dtype: float16, bfloat16 or float32.
        weight: [2 I, K], contiguous: the rows of the gate Wg, then those of Wu.
        bias: [2 I] or None.
        norm_weight: [K], the weight of an RMS norm of x, or None.
        norm_eps: of that norm; any number without it.
    """
    settings = small_linear_settings(x, weight, gated=True)
    if settings is not None:
        from .skinny_gluon import small_gated_linear_launch

        return small_gated_linear_launch(x, weight, bias, norm_weight, norm_eps, settings)
    gate, up = F.linear(_norm(x, norm_weight, norm_eps), weight, bias).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@small_gated_linear_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` in x's dtype, or x where ``weight`` is None."""
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError("small linear layers have no backward pass: wrap inference in torch.no_grad().")


# Without this, autograd would silently treat the outputs as constants in some dispatch modes.
for _op in (small_linear_op, small_gated_linear_op):
    _op.register_autograd(_no_backward)
