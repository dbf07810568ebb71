"""gated_activation: kernel and reference against float64 and against eager PyTorch."""


import pytest
import torch
from helpers import DEVICE, TOLERANCE, error
from hf_paged_kernels.layers.gated_activation_triton import gated_activation_launch
from hf_paged_kernels.layers.ops import gated_activation_op
from hf_paged_kernels.layers.reference import ACTIVATIONS, gated_activation_reference
from transformers.activations import ACT2FN

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def definition(x, activation):
    """Float64, from the formulas."""
    x = x.double().cpu()
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if activation == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("n", [1, 72, 1100])
def test_gated_activation(triton, poison, dtype, activation, order, n):
    gate, up = 3 * torch.randn(2, 3, n), torch.randn(2, 3, n)
    gate, up = gate.to(dtype), up.to(dtype)
    packed = torch.cat([gate, up] if order == "gate_up" else [up, gate], -1).to(DEVICE)
    out = (gated_activation_launch if triton else gated_activation_reference)(packed, activation, order)
    assert out.shape == (2, 3, n)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert error(out, definition(gate, activation) * up.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activations_of_transformers_bit_by_bit(dtype, activation):
    packed = 3 * torch.randn(5, 66).to(dtype)
    out = gated_activation_reference(packed, activation, "gate_up")
    # Views, as the packed projection's users have them: PyTorch's gelu on CPU rounds by layout.
    assert torch.equal(out, ACT2FN[NAMES[activation]](packed[:, :33]) * packed[:, 33:])


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_and_nan(triton, activation):
    """No overflow on the way to a finite answer, and no number made of NaN."""
    gate = torch.tensor([[-1e4, -100.0, 100.0, 1e4, float("nan")]], device=DEVICE)
    run = gated_activation_launch if triton else gated_activation_reference
    out = run(torch.cat([gate, torch.ones_like(gate)], -1), activation, "gate_up")[0]
    assert out[:2].abs().max() < 1e-20
    assert out[2:4].tolist() == [100.0, 1e4]
    assert out[4].isnan()


@both
def test_rows_of_a_wider_matrix(triton, poison):
    wide = torch.full((4, 50), float("nan"), device=DEVICE)
    wide[:, :40] = torch.randn(4, 40)
    out = (gated_activation_launch if triton else gated_activation_reference)(wide[:, :40], "silu", "gate_up")
    assert error(out, definition(wide[:, :20], "silu") * wide[:, 20:40].double().cpu()) <= TOLERANCE[torch.float32]


@both
def test_no_rows(triton):
    run = gated_activation_launch if triton else gated_activation_reference
    assert run(torch.empty(0, 8, device=DEVICE), "silu", "gate_up").shape == (0, 4)


def test_the_op():
    packed = torch.randn(3, 16, device=DEVICE)
    torch.library.opcheck(gated_activation_op.op, (packed, "silu", "gate_up"))
    with pytest.raises(RuntimeError, match="no backward pass"):
        gated_activation_op(packed.requires_grad_(), "silu", "gate_up").sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [3072, 14336])
def test_on_a_gpu_as_eager_pytorch(activation, n):
    """The same roundings: an element differs by one of them at most, and few do."""
    packed = (3 * torch.randn(300, 2 * n)).bfloat16().to(DEVICE)
    out = gated_activation_op(packed, activation, "gate_up")
    eager = ACT2FN[NAMES[activation]](packed[:, :n]) * packed[:, n:]
    assert error(out, eager) <= 1e-5
