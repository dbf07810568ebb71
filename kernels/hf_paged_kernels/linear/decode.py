"""Linear layers of some tens of tokens, as ``torch.library`` ops: a decode step of many sequences.

    decode_linear_op(x, weight, bias)                 x W^T + bias
    decode_gated_linear_op(x, weight, bias)           silu(x Wg^T + bg) * (x Wu^T + bu)
    linear_parts_op(x, weight, bias, num_parts)      parts of x W^T + bias, for ``rms_norm_parts_op`` to add

On a Hopper GPU a kernel of ``decode_gluon`` does it where :func:`choose_decode_linear` has settings; elsewhere
PyTorch's operators do. For up to 16 tokens there is :mod:`.skinny`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..backend import has_gluon
from ..eager import eager_op
from .decode_settings import DecodeLinearSettings, choose_decode_linear


def decode_linear_settings(
    x: torch.Tensor, weight: torch.Tensor, gated: bool = False, in_parts: bool = False
) -> DecodeLinearSettings | None:
    """Settings for these tensors, or None where PyTorch's operators run (see :func:`choose_decode_linear`)."""
    settings = _settings_of(x.shape[0], weight, gated, in_parts)
    # What TMA can read: rows that begin at multiples of 16 bytes.
    if settings is None or x.dtype != weight.dtype or x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return None
    return settings


def num_linear_parts(num_tokens: int, weight: torch.Tensor) -> int:
    """Parts for :func:`linear_parts_op` of so many contiguous tokens; 0: better not use it."""
    settings = _settings_of(num_tokens, weight, gated=False, in_parts=True)
    return 0 if settings is None else settings.num_parts


def _settings_of(num_tokens: int, weight: torch.Tensor, gated: bool, in_parts: bool) -> DecodeLinearSettings | None:
    if not has_gluon(weight.device) or weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    out_features, in_features = weight.shape
    settings = choose_decode_linear(num_tokens, out_features, in_features, gated, in_parts)
    if settings is None or not weight.is_contiguous() or weight.data_ptr() % 16:
        return None
    return settings


@eager_op("hf_paged::decode_linear")
def decode_linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + bias``, [T, N], summed in float32 and rounded once.

    The kernel may start before the kernels launched just before it have ended (programmatic dependent launch) and read
    ``weight``, which none of those may write. Before it touches anything else it waits for them.

    Args:
        x: [T, K]; every tensor has its dtype.
        weight: [N, K], contiguous.
        bias: [N] or None.
    """
    settings = decode_linear_settings(x, weight)
    if settings is None:
        return F.linear(x, weight, bias)
    from .decode_gluon import decode_linear_launch

    return decode_linear_launch(x, weight, bias, settings, gated=False)


@decode_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@eager_op("hf_paged::decode_gated_linear")
def decode_gated_linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``silu(x Wg^T + bg) * (x Wu^T + bu)``, [T, I], rounded where eager PyTorch does; starts early likewise.

    Args:
        x: [T, K]; every tensor has its dtype.
        weight: [2 I, K], contiguous: the rows of the gate Wg, then those of Wu.
        bias: [2 I] or None.
    """
    settings = decode_linear_settings(x, weight, gated=True)
    if settings is None:
        gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    from .decode_gluon import decode_linear_launch

    return decode_linear_launch(x, weight, bias, settings, gated=True)


@decode_gated_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


@eager_op("hf_paged::linear_parts")
def linear_parts_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_parts: int) -> torch.Tensor:
    """Parts of ``x W^T + bias``, float32 [P, T, N]: each over a run of in_features; starts early likewise.

    Args:
        x: [T, K]; every tensor has its dtype.
        weight: [N, K], contiguous.
        bias: [N] or None; in the first part.
        num_parts: P, as :func:`num_linear_parts` gives it.
    """
    settings = decode_linear_settings(x, weight, in_parts=True)
    if settings is None or settings.num_parts != num_parts:
        return linear_parts_reference(x, weight, bias, num_parts)
    from .decode_gluon import linear_parts_launch

    return linear_parts_launch(x, weight, bias, settings)


@linear_parts_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_parts: int) -> torch.Tensor:
    return x.new_empty(num_parts, x.shape[0], weight.shape[0], dtype=torch.float32)


def linear_parts_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_parts: int
) -> torch.Tensor:
    """See :func:`linear_parts_op`."""
    # Runs of as many columns, the last ones may be shorter or empty.
    length = -(-x.shape[1] // num_parts)
    parts = x.new_zeros(num_parts, x.shape[0], weight.shape[0], dtype=torch.float32)
    for part, (columns, rows) in enumerate(zip(x.split(length, 1), weight.split(length, 1))):
        parts[part] = columns.float() @ rows.float().T
    if bias is not None:
        parts[0] += bias
    return parts


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError("batched linear layers have no backward pass: wrap inference in torch.no_grad().")


# Without this, autograd would silently treat the outputs as constants in some dispatch modes.
for _op in (decode_linear_op, decode_gated_linear_op, linear_parts_op):
    _op.register_autograd(_no_backward)
