"""rms_norm: kernel and reference against float64, and the reference against transformers' modules bit by bit."""


import pytest
import torch
from helpers import DEVICE, TOLERANCE, error
from hf_paged_kernels import dependent_launch_triton
from hf_paged_kernels.layers import reference
from hf_paged_kernels.layers.ops import gated_activation_op, rms_norm_op, rms_norm_parts_op
from hf_paged_kernels.layers.rms_norm_triton import rms_norm_launch, rms_norm_parts_launch, rms_norm_warps
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])


def expected_norm(total, weight, eps, weight_offset):
    """Float64, from the definition."""
    total = total.double().cpu()
    normed = total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * (weight.double().cpu() + weight_offset)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)], ids=["llama", "gemma"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("n", [1, 24, 130, 512, 2880])
def test_rms_norm(triton, poison, dtype, offset, round_first, with_residual, n):
    x, residual = (torch.randn(3, n, dtype=dtype, device=DEVICE) for _ in range(2))
    weight = torch.randn(n, dtype=dtype, device=DEVICE)
    run = rms_norm_launch if triton else reference.rms_norm_reference
    normed, total = run(x, weight, 1e-5, offset, round_first, residual if with_residual else None)
    if with_residual:
        assert torch.equal(total, x + residual)
    else:
        assert total.shape == (0,)
    expected = expected_norm(total if with_residual else x, weight, 1e-5, offset)
    assert normed.dtype == dtype
    assert error(normed, expected) <= TOLERANCE[dtype]


@both
def test_without_a_weight(triton, poison):
    x = torch.randn(5, 48, device=DEVICE)
    run = rms_norm_launch if triton else reference.rms_norm_reference
    normed, _ = run(x, None, 1e-6, 0.0, False, None)
    assert error(normed, expected_norm(x, None, 1e-6, 0.0)) <= TOLERANCE[torch.float32]


@both
def test_views_and_leading_dimensions(triton, poison):
    """Rows of a wider matrix, whose other columns hold NaN; outputs are contiguous."""
    wide = torch.full((6, 40), float("nan"), device=DEVICE)
    wide[:, :24] = torch.randn(6, 24)
    x, residual = wide[:, :24].view(2, 3, 24), torch.randn(2, 3, 24, device=DEVICE)
    weight = torch.randn(24, device=DEVICE)
    run = rms_norm_launch if triton else reference.rms_norm_reference
    normed, total = run(x, weight, 1e-6, 0.0, True, residual)
    assert normed.is_contiguous()
    assert total.is_contiguous()
    assert torch.equal(total, x + residual)
    assert error(normed, expected_norm(total, weight, 1e-6, 0.0)) <= TOLERANCE[torch.float32]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)], ids=["llama", "gemma"])
@pytest.mark.parametrize(("num_parts", "tokens", "n"), [(1, 3, 24), (2, 1, 130), (5, 4, 2880)])
def test_parts(triton, poison, dtype, offset, round_first, num_parts, tokens, n):
    """The same as of their sum, added one after the other and rounded."""
    parts = torch.randn(num_parts, tokens, n, device=DEVICE)
    residual, weight = torch.randn(tokens, n, dtype=dtype, device=DEVICE), torch.randn(n, dtype=dtype, device=DEVICE)
    x = parts[0].clone()
    for part in parts[1:]:
        x += part
    run = rms_norm_parts_launch if triton else reference.rms_norm_parts_reference
    normed, total = run(parts, weight, 1e-5, offset, round_first, residual)
    assert torch.equal(total, x.to(dtype) + residual)
    assert normed.dtype == dtype
    assert error(normed, expected_norm(total, weight, 1e-5, offset)) <= TOLERANCE[dtype]


@both
def test_no_rows(triton):
    x = torch.empty(0, 16, device=DEVICE)
    run = rms_norm_launch if triton else reference.rms_norm_reference
    normed, total = run(x, torch.ones(16, device=DEVICE), 1e-6, 0.0, True, x)
    assert normed.shape == total.shape == (0, 16)
    run = rms_norm_parts_launch if triton else reference.rms_norm_parts_reference
    normed, total = run(torch.empty(2, 0, 16, device=DEVICE), None, 1e-6, 0.0, True, x)
    assert normed.shape == total.shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "offset", "round_first"),
    [(LlamaRMSNorm, 0.0, True), (Gemma2RMSNorm, 1.0, False), (GptOssRMSNorm, 0.0, False)],
)
def test_the_modules_of_transformers_bit_by_bit(dtype, kind, offset, round_first):
    module = kind(72, eps=1e-5).to(dtype)
    torch.nn.init.normal_(module.weight)
    x, residual = torch.randn(7, 72, dtype=dtype), torch.randn(7, 72, dtype=dtype)
    with torch.no_grad():
        normed, total = rms_norm_op(x, module.weight, 1e-5, offset, round_first, residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, module(x + residual))


def test_a_large_residual_is_rounded_before_the_norm():
    """What is normalised is the sum that the next layer adds to, not a more exact one."""
    x, residual = torch.full((1, 4), 0.4, dtype=torch.bfloat16), torch.tensor([[256.0, 2.0, 2.0, 2.0]]).bfloat16()
    run = (rms_norm_launch, reference.rms_norm_reference)
    for normed, total in (f(x.to(DEVICE), None, 0.0, 0.0, False, residual.to(DEVICE)) for f in run):
        assert float(total[0, 0]) == 256.0
        assert error(normed, expected_norm(total, None, 0.0, 0.0)) <= TOLERANCE[torch.bfloat16]


def test_the_op():
    x, weight = torch.randn(3, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    for residual in (None, torch.randn(3, 16, device=DEVICE)):
        torch.library.opcheck(rms_norm_op.op, (x, weight, 1e-6, 0.0, True, residual))
    torch.library.opcheck(rms_norm_parts_op.op, (torch.randn(2, 3, 16, device=DEVICE), weight, 1e-6, 0.0, True, x))
    normed, _ = rms_norm_op(x.requires_grad_(), weight, 1e-6, 0.0, True, None)
    with pytest.raises(RuntimeError, match="no backward pass"):
        normed.sum().backward()


def test_warps_of_a_program():
    assert [rms_norm_warps(n) for n in (1, 256, 1024, 2880, 4096, 16384)] == [1, 1, 4, 16, 16, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 5000])
def test_a_chain_of_dependent_launches_in_a_graph(tokens, monkeypatch):
    """Each kernel starts while the one before it runs, ours and PyTorch's by turns: the numbers are those without."""
    x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.rand(1024, dtype=torch.bfloat16, device=DEVICE)
    matrix = torch.randn(1024, 2048, dtype=torch.bfloat16, device=DEVICE) / 32

    def chain():
        residual, hidden = x.clone(), x
        for i in range(20):
            hidden, residual = rms_norm_op(hidden, weight, 1e-6, 0.0, True, residual)
            packed = hidden @ matrix if i % 3 == 0 else torch.cat([hidden, residual], -1) if i % 3 == 1 else None
            hidden = hidden if packed is None else gated_activation_op(packed, "silu", "gate_up")
        return hidden, residual

    monkeypatch.setattr(dependent_launch_triton, "has_dependent_launch", lambda device: False)
    expected = chain()
    monkeypatch.undo()
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
