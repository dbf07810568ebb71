"""``act(gate) * up`` of a packed gate/up projection, in Triton.

The activation is computed in float32 and rounded to the dtype before the product, as eager PyTorch does.
"""

import torch
import triton
import triton.language as tl

from ..backend import contiguous_rows, device_guard
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import launch
from ..settings import cdiv

BLOCK_N = 1024


@triton.jit
def _gated_activation(
    gate,
    up,
    out,
    stride,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK_N columns of one row; ``stride`` is that of rows of gate and up."""
    row = tl.cast(tl.program_id(0), tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    x = tl.load(gate + row * stride + offs, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * stride + offs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        # Not a maximum: that would make 0 of NaN.
        x = tl.where(x < 0.0, 0.0, x)
    x = x.to(out.dtype.element_ty).to(tl.float32) * factor
    tl.store(out + row * N + offs, x.to(out.dtype.element_ty), mask=mask)


def gated_activation_launch(gate_up: torch.Tensor, activation: str, order: str) -> torch.Tensor:
    """Launch on checked arguments; see :func:`hf_paged_kernels.layers.ops.gated_activation_op`."""
    n = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], n, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    rows = contiguous_rows(gate_up.reshape(-1, 2 * n))
    gate, up = rows[:, :n], rows[:, n:]
    if order == "up_gate":
        gate, up = up, gate
    with device_guard(gate_up):
        launch(
            _gated_activation, (len(rows), cdiv(n, BLOCK_N)),
            gate, up, out, rows.stride(0),
            N=n,
            BLOCK_N=BLOCK_N,
            ACTIVATION=activation,
            num_warps=4,
            **dependent_launch(gate_up.device),
        )  # fmt: skip
    return out
