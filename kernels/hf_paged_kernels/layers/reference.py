"""The fused operations of a decode step in plain PyTorch: what the Triton kernels compute, and what runs on CPU.

They round where transformers' eager modules round, except for the rotation, which is rounded once, at its end.
"""

import torch

from ..attention.reference import write_pages_reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""Names of :func:`gated_activation_reference`; ``gelu`` is the exact one (erf)."""


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hf_paged_kernels.layers.ops.rms_norm_op`."""
    total = x if residual is None else x + residual
    normed = _normalized(total, weight, eps, weight_offset, round_first).contiguous()
    return normed, x.new_empty(0) if residual is None else total.contiguous()


def rms_norm_parts_reference(
    parts: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hf_paged_kernels.layers.ops.rms_norm_parts_op`."""
    x = parts[0].clone()
    for part in parts[1:]:
        x += part
    return rms_norm_reference(x.to(residual.dtype), weight, eps, weight_offset, round_first, residual)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, round_first: bool
) -> torch.Tensor:
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).float()
    if weight is not None:
        normed = (weight_offset + weight.float()) * normed
    return normed.to(x.dtype)


def gated_activation_reference(gate_up: torch.Tensor, activation: str, order: str) -> torch.Tensor:
    """See :func:`hf_paged_kernels.layers.ops.gated_activation_op`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if order == "up_gate":
        gate, up = up, gate
    if activation == "silu":
        gate = torch.nn.functional.silu(gate)
    elif activation == "relu":
        gate = torch.relu(gate)
    else:
        gate = torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (gate * up).contiguous()


def rotary_write_reference(
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
    """See :func:`hf_paged_kernels.layers.ops.rotary_write_op`."""
    if q_weight is not None:
        q = _normalized(q, q_weight, eps, weight_offset, round_first)
    if k_weight is not None:
        k = _normalized(k, k_weight, eps, weight_offset, round_first)
    k = _rotated(k, cos, sin, interleaved)
    write_pages_reference(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    return _rotated(q, cos, sin, interleaved)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].float(), x[..., second].float()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., first] = (a * cos - b * sin).to(x.dtype)
    out[..., second] = (b * cos + a * sin).to(x.dtype)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def decode_inputs_reference(
    slots: torch.Tensor, computed: torch.Tensor, last_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`hf_paged_kernels.layers.ops.decode_inputs_op`."""
    before = computed[slots]
    computed[slots] = torch.where(before >= 0, before + 1, -1)
    return last_token[slots], before.clamp(min=0), (before + 1).to(torch.int32)


def decode_rows_reference(
    slots: torch.Tensor, seq_lens: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hf_paged_kernels.layers.ops.decode_rows_op`."""
    rows = page_table[slots]
    positions = (seq_lens.long() - 1).clamp(min=0)
    page = rows.gather(1, (positions // page_size)[:, None]).squeeze(1).long()
    return rows, torch.where(seq_lens > 0, page * page_size + positions % page_size, -1)
