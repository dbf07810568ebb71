"""The small work of a decode step, fused, as ``torch.library`` custom ops (namespace ``hf_paged``).

As in :mod:`.ops`: arguments are taken as checked, Triton runs on an accelerator, the PyTorch reference on CPU, and no
op that mutates has a default. The ops are for inference: none has a backward pass.
"""

from typing import Any

import torch

from ..backend import uses_triton
from ..eager import eager_op
from . import reference


@eager_op("hf_paged::rms_norm")
def rms_norm_op(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual and normalise: ``total = x + residual`` in the dtype of x, ``normed = RMSNorm(total)``.

    In float32, with ``r = rsqrt(mean(total^2) + eps)``::

        round_first:  ((weight_offset + weight) * (total * r).to(x.dtype)).to(x.dtype)    Llama, Qwen3
        otherwise:    ((weight_offset + weight) * (total * r)).to(x.dtype)                Gemma (offset 1), gpt-oss

    Args:
        x: ``[..., N]`` of one floating dtype; rows must lie at one distance (a view of 2-D memory), the last dimension
            contiguous.
        weight: ``[N]``, or None: no multiplication.
        eps: added to the mean square.
        weight_offset: added to the weight, in float32.
        round_first: round to the dtype of x before the multiplication.
        residual: like x, or None.

    Returns:
        ``(normed, total)``, both ``[..., N]`` and contiguous. Without a residual the total is x itself, and what comes
        back in its place is an empty tensor ``[0]``: an op must not return its argument.
    """
    if not uses_triton(x):
        return reference.rms_norm_reference(x, weight, eps, weight_offset, round_first, residual)
    from .rms_norm_triton import rms_norm_launch

    return rms_norm_launch(x, weight, eps, weight_offset, round_first, residual)


@rms_norm_op.register_fake
def _(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, residual = others
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@eager_op("hf_paged::rms_norm_parts")
def rms_norm_parts_op(
    parts: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm_op` of the sum of ``parts``, taken in float32 in their order, rounded to the residual's dtype.

    Args:
        parts: float32 ``[P, T, N]``, contiguous, as ``linear_parts_op`` leaves them.
        weight, eps, weight_offset, round_first: as there.
        residual: ``[T, N]``; rows at one distance, the last dimension contiguous.

    Returns:
        ``(normed, total)``, both ``[T, N]``, contiguous, of the residual's dtype.
    """
    if not uses_triton(parts):
        return reference.rms_norm_parts_reference(parts, weight, eps, weight_offset, round_first, residual)
    from .rms_norm_triton import rms_norm_parts_launch

    return rms_norm_parts_launch(parts, weight, eps, weight_offset, round_first, residual)


@rms_norm_parts_op.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, residual = arguments
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@eager_op("hf_paged::gated_activation")
def gated_activation_op(gate_up: torch.Tensor, activation: str, order: str) -> torch.Tensor:
    """``act(gate) * up``: the activation is rounded to the dtype, then the product, as eager PyTorch does.

    Args:
        gate_up: ``[..., 2 * I]``, the packed output of one matmul; rows at one distance, the last dimension contiguous.
        activation: one of ``reference.ACTIVATIONS``: "silu", "gelu" (erf), "gelu_tanh", "relu".
        order: "gate_up", or "up_gate" where the gate is the second half.

    Returns:
        ``[..., I]``, contiguous.
    """
    if not uses_triton(gate_up):
        return reference.gated_activation_reference(gate_up, activation, order)
    from .gated_activation_triton import gated_activation_launch

    return gated_activation_launch(gate_up, activation, order)


@gated_activation_op.register_fake
def _(gate_up: torch.Tensor, *_: Any) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@eager_op("hf_paged::rotary_write", mutates_args=("k_pages", "v_pages", "k_scale", "v_scale"))
def rotary_write_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, write keys and values to pages, return the queries.

    With R/2 frequencies, frequency i turns the pair (i, R/2 + i) of a head, or (2i, 2i + 1) if ``interleaved``; the
    dimensions from R on stay as they are. The rotation is in float32 and rounded once, at its end.

    transformers' ``cos`` ``[1, T, R]`` has every frequency twice. Pass each once, as a view:
    ``cos[0, :, : R // 2]`` (Llama and most others; GLM, interleaved), ``cos[0, :, ::2]`` (Cohere, interleaved),
    ``cos[0]`` (gpt-oss, which has R/2 columns).

    Args:
        q: ``[T, Hq, D]``, any strides with the last dimension contiguous: a view of a packed matmul's output.
        k: ``[T, Hk, D]``, likewise.
        v: ``[T, Hk, Dv]``, likewise.
        cos, sin: ``[T, R/2]``, any strides (T of stride 0 for one row too), any floating dtype, scaled.
        interleaved: which dimensions make a pair.
        q_weight, k_weight: ``[D]``: an RMSNorm over each head before the rotation; None: none.
        eps, weight_offset, round_first: of those norms, as in :func:`rms_norm_op`.
        k_pages, v_pages, k_scale, v_scale, slot_mapping: as in :func:`hf_paged_kernels.write_pages`; slot -1 is not
            written, though its query comes back.

    Returns:
        ``[T, Hq, D]``, contiguous, of the dtype of q.
    """
    arguments = (
        q, k, v, cos, sin, interleaved, q_weight, k_weight, eps, weight_offset, round_first,
        k_pages, v_pages, k_scale, v_scale, slot_mapping,
    )  # fmt: skip
    if not uses_triton(q):
        return reference.rotary_write_reference(*arguments)
    from .rotary_write_triton import rotary_write_launch

    return rotary_write_launch(*arguments)


@rotary_write_op.register_fake
def _(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


@eager_op("hf_paged::decode_inputs", mutates_args=("computed",))
def decode_inputs_op(
    slots: torch.Tensor, computed: torch.Tensor, last_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a decode step of ``slots``, one token each, from tables by slot.

    ``computed`` counts the step from then on. A slot without tokens (``computed`` -1) stays so: its position and its
    length are 0. Such a slot may come up many times in ``slots``, any other once.

    Args:
        slots: int64 ``[n]``.
        computed: int64 ``[num_slots]``, tokens that are in pages.
        last_token: int64 ``[num_slots]``, the token to compute now.

    Returns:
        ``(input_ids, positions, seq_lens)``: int64, int64 and int32 ``[n]``; lengths count the new token.
    """
    if not uses_triton(slots):
        return reference.decode_inputs_reference(slots, computed, last_token)
    from .decode_inputs_triton import decode_inputs_launch

    return decode_inputs_launch(slots, computed, last_token)


@decode_inputs_op.register_fake
def _(slots: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return slots.new_empty(slots.shape), slots.new_empty(slots.shape), slots.new_empty(slots.shape, dtype=torch.int32)


@eager_op("hf_paged::decode_rows")
def decode_rows_op(
    slots: torch.Tensor, seq_lens: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The page-table rows of a decode step, and where its new tokens are written.

    Args:
        slots: int64 ``[n]``.
        seq_lens: int32 ``[n]``, with the new token, as :func:`decode_inputs_op` returns them.
        page_table: int32 ``[num_slots, width]``, rows contiguous.
        page_size: tokens of a page.

    Returns:
        ``(rows, slot_mapping)``: int32 ``[n, width]``, whose entries beyond the pages of a row are undefined, and int64
        ``[n]``, the slot of each row's last token, -1 where ``seq_lens`` is 0.
    """
    if not uses_triton(slots):
        return reference.decode_rows_reference(slots, seq_lens, page_table, page_size)
    from .decode_inputs_triton import decode_rows_launch

    return decode_rows_launch(slots, seq_lens, page_table, page_size)


@decode_rows_op.register_fake
def _(
    slots: torch.Tensor, seq_lens: torch.Tensor, page_table: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return page_table.new_empty(slots.shape[0], page_table.shape[1]), slots.new_empty(slots.shape)


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError("the fused operations of inference have no backward pass: wrap the call in torch.no_grad().")


# Ops that mutate cannot register one, and raise by themselves.
for _op in (rms_norm_op, rms_norm_parts_op, gated_activation_op):
    _op.register_autograd(_no_backward)
