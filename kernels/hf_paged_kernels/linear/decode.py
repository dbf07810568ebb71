"""Linear layers of some tens of tokens, as ``torch.library`` ops: a decode step of many sequences.

    batch_linear_op(x, weight, bias)                 x W^T + bias
    batch_gated_linear_op(x, weight, bias)           silu(x Wg^T + bg) * (x Wu^T + bu)
    linear_parts_op(x, weight, bias, num_parts)      parts of x W^T + bias, for ``rms_norm_parts_op`` to add

On a Hopper GPU a kernel of ``batch_linear_gluon`` does it where :func:`choose_batch_linear` has settings; elsewhere
PyTorch's operators do. For up to 16 tokens there is :mod:`.small_linear`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..backend import has_gluon
from ..eager import eager_op

MAX_TOKENS = 256
"""Tokens up to which there are settings for some shapes."""
FEATURES = 64
"""Output features of most programs: of the gate and of the up projection each, where there are two."""
PROGRAMS = 132
"""Multiprocessors of an H200: programs that run at the same time, one on each."""
BUSY = 64
"""Programs that a launch has at least, for the memory to be busy."""
SHORT_ROW = 1024
"""Columns of weights up to which launches cost more than what cuBLAS does better with more than 64 tokens."""
MAX_PARTS = 4
MIN_STEPS = 4
"""Tiles of 128 columns that a part adds up at least."""


@dataclass(frozen=True, slots=True)
class BatchLinearSettings:
    """Settings of one launch.

    Attributes:
        tokens: columns of a program's tile; 32, 64 or 128.
        more_tokens: columns of a second tile beside it, 0: there is none.
        block_k: in_features of a step.
        stages: steps in flight.
        num_parts: programs that share the in_features of a tile, each with a part of the sum.
        features: rows of a program's weights, of each projection; 64 or 128.
    """

    tokens: int
    more_tokens: int
    block_k: int
    stages: int
    num_parts: int = 1
    features: int = FEATURES


def choose_batch_linear(
    num_tokens: int, out_features: int, in_features: int, gated: bool = False, in_parts: bool = False
) -> BatchLinearSettings | None:
    """Settings for ``[num_tokens, in_features] x [out_features, in_features]`` in half precision; None: use cuBLAS.

    A pure function of its arguments, from measurements on an H200 (``eval/results/decode_step_h200.md``).
    ``out_features`` counts both halves of a gated layer. With ``in_parts`` the sums may come as several parts.

    Weights are read once from memory, but x once by every program from the L2 cache: more tokens than the 64 of a tile
    pay only where they let more programs share the reading of the weights.
    """
    if not 16 < num_tokens <= MAX_TOKENS or in_features < 512 or in_features % 8:
        return None
    few = 32 if num_tokens <= 32 else 64
    tiles = -(-out_features // (2 * FEATURES if gated else FEATURES))
    # Rows so short that the start is most of it, even for two tiles of tokens at a time.
    is_short = in_features <= SHORT_ROW and 2 * tiles <= PROGRAMS
    if gated:
        if tiles < 48 or (num_tokens > 64 and not is_short):
            return None
        if num_tokens > 128:
            return BatchLinearSettings(64, 0, 64, 4) if num_tokens > 152 else None
        # Two programs on a multiprocessor where there are more than one for each.
        return BatchLinearSettings(few, 0, 128, 2 if tiles > PROGRAMS else 4)
    if not in_parts:
        if num_tokens <= 64:
            return BatchLinearSettings(few, 0, 128, 6) if BUSY <= tiles <= PROGRAMS else None
        if not is_short or 2 * tiles < BUSY:
            return None
        if num_tokens <= 128:
            return BatchLinearSettings(64, 0, 128, 6)
        return BatchLinearSettings(64, 32, 128, 5) if num_tokens <= 192 else BatchLinearSettings(128, 0, 128, 4)
    max_parts = min(MAX_PARTS, in_features // (128 * MIN_STEPS))
    if num_tokens <= 64 or (tiles <= 32 and num_tokens <= 192):
        best = BatchLinearSettings(few, 0, 128, 6)
    elif tiles <= 32 or 104 < num_tokens <= 128:
        best = BatchLinearSettings(128, 0, 128, 4)
    elif num_tokens <= 104 or (num_tokens <= 192 and in_features > 8192):
        return None
    elif num_tokens <= 192:
        best = BatchLinearSettings(128, 64, 64, 7)
    else:
        best = BatchLinearSettings(128, 0, 64, 7, features=128)
    programs = -(-out_features // best.features) * -(-num_tokens // (best.tokens + best.more_tokens))
    num_parts = min(max_parts, PROGRAMS // programs)
    if num_parts * programs < BUSY or (num_tokens > 64 and num_parts < 2):
        return None
    return replace(best, num_parts=num_parts)


def batch_linear_settings(
    x: torch.Tensor, weight: torch.Tensor, gated: bool = False, in_parts: bool = False
) -> BatchLinearSettings | None:
    """Settings for these tensors, or None where PyTorch's operators run (see :func:`choose_batch_linear`)."""
    settings = _settings_of(x.shape[0], weight, gated, in_parts)
    # What TMA can read: rows that begin at multiples of 16 bytes.
    if settings is None or x.dtype != weight.dtype or x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return None
    return settings


def num_linear_parts(num_tokens: int, weight: torch.Tensor) -> int:
    """Parts for :func:`linear_parts_op` of so many contiguous tokens; 0: better not use it."""
    settings = _settings_of(num_tokens, weight, gated=False, in_parts=True)
    return 0 if settings is None else settings.num_parts


def _settings_of(num_tokens: int, weight: torch.Tensor, gated: bool, in_parts: bool) -> BatchLinearSettings | None:
    if not has_gluon(weight.device) or weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    out_features, in_features = weight.shape
    settings = choose_batch_linear(num_tokens, out_features, in_features, gated, in_parts)
    if settings is None or not weight.is_contiguous() or weight.data_ptr() % 16:
        return None
    return settings


@eager_op("hf_paged::batch_linear")
def batch_linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + bias``, [T, N], summed in float32 and rounded once.

    The kernel may start before the kernels launched just before it have ended (programmatic dependent launch) and read
    ``weight``, which none of those may write. Before it touches anything else it waits for them.

    Args:
        x: [T, K]; every tensor has its dtype.
        weight: [N, K], contiguous.
        bias: [N] or None.
    """
    settings = batch_linear_settings(x, weight)
    if settings is None:
        return F.linear(x, weight, bias)
    from .decode_gluon import batch_linear_launch

    return batch_linear_launch(x, weight, bias, settings)


@batch_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@eager_op("hf_paged::batch_gated_linear")
def batch_gated_linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``silu(x Wg^T + bg) * (x Wu^T + bu)``, [T, I], rounded where eager PyTorch does; starts early likewise.

    Args:
        x: [T, K]; every tensor has its dtype.
        weight: [2 I, K], contiguous: the rows of the gate Wg, then those of Wu.
        bias: [2 I] or None.
    """
    settings = batch_linear_settings(x, weight, gated=True)
    if settings is None:
        gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    from .decode_gluon import batch_gated_linear_launch

    return batch_gated_linear_launch(x, weight, bias, settings)


@batch_gated_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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
    settings = batch_linear_settings(x, weight, in_parts=True)
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
for _op in (batch_linear_op, batch_gated_linear_op, linear_parts_op):
    _op.register_autograd(_no_backward)
