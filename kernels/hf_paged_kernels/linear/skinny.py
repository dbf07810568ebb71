"""Linear layers of a few tokens, as ``torch.library`` ops: a decode step of few sequences reads weights, little else.

    skinny_linear_op(x, weight, bias, residual, norm_weight, norm_eps)   norm(x) W^T + bias + residual
    skinny_gated_linear_op(x, weight, bias, norm_weight, norm_eps)       silu(norm(x) Wg^T + bg) * (norm(x) Wu^T + bu)

``norm(x) = x / sqrt(mean(x^2) + norm_eps) * norm_weight``, or x itself where ``norm_weight`` is None.

On a Hopper GPU a kernel of ``skinny_gluon`` does all of it where :func:`choose_skinny_linear` has settings: sums
in float32, one rounding at the end. Elsewhere PyTorch's operators run one after the other, each rounding to x's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..backend import has_gluon
from ..eager import eager_op
from .skinny_settings import SkinnyLinearSettings, choose_skinny_linear


def skinny_linear_settings(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> SkinnyLinearSettings | None:
    """Settings for these tensors, or None where PyTorch's operators run (see :func:`choose_skinny_linear`)."""
    if not has_gluon(x.device) or x.dtype != weight.dtype or x.stride(-1) != 1 or not weight.is_contiguous():
        return None
    out_features, in_features = weight.shape
    return choose_skinny_linear(x.shape[0], out_features, in_features, gated, x.element_size())


@eager_op("hf_paged::skinny_linear")
def skinny_linear_op(
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
    settings = skinny_linear_settings(x, weight, gated=False)
    if settings is not None:
        from .skinny_gluon import skinny_linear_launch

        return skinny_linear_launch(x, weight, bias, residual, norm_weight, norm_eps, settings, gated=False)
    out = F.linear(_norm(x, norm_weight, norm_eps), weight, bias)
    return out if residual is None else out.add_(residual)


@skinny_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@eager_op("hf_paged::skinny_gated_linear")
def skinny_gated_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """``silu(norm(x) Wg^T + bg) * (norm(x) Wu^T + bu)``, [T, I]; starts early like :func:`skinny_linear_op`.

    Args:
        x: [T, K]; every tensor has its dtype: float16, bfloat16 or float32.
        weight: [2 I, K], contiguous: the rows of the gate Wg, then those of Wu.
        bias: [2 I] or None.
        norm_weight: [K], the weight of an RMS norm of x, or None.
        norm_eps: of that norm; any number without it.
    """
    settings = skinny_linear_settings(x, weight, gated=True)
    if settings is not None:
        from .skinny_gluon import skinny_linear_launch

        return skinny_linear_launch(x, weight, bias, None, norm_weight, norm_eps, settings, gated=True)
    gate, up = F.linear(_norm(x, norm_weight, norm_eps), weight, bias).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@skinny_gated_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` in x's dtype, or x where ``weight`` is None."""
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError("small linear layers have no backward pass: wrap inference in torch.no_grad().")


# Without this, autograd would silently treat the outputs as constants in some dispatch modes.
for _op in (skinny_linear_op, skinny_gated_linear_op):
    _op.register_autograd(_no_backward)
