"""Linear layers of some tens of tokens: ops, settings and kernels, against float64 and against themselves."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, TOLERANCE, error
from hf_paged_kernels.layers.ops import rms_norm_parts_op
from hf_paged_kernels.linear.decode import (
    decode_gated_linear_op,
    decode_linear_op,
    decode_linear_settings,
    linear_parts_op,
    linear_parts_reference,
    num_linear_parts,
)
from hf_paged_kernels.linear.decode_settings import DecodeLinearSettings, choose_decode_linear

HALVES = [torch.float16, torch.bfloat16]


def inputs(tokens, features, width, dtype, *, gated=False, padded=False):
    """x, weight and bias; ``padded``: x is a slice of wider rows, NaN beyond its end."""
    x = torch.full((tokens + 1, width + 8 * padded), float("nan"), dtype=dtype, device=DEVICE)[:tokens, :width]
    x.copy_(torch.randn(tokens, width))
    rows = 2 * features if gated else features
    weight = (torch.randn(rows, width) * width**-0.5).to(DEVICE, dtype)
    return x, weight, torch.randn(rows).to(DEVICE, dtype)


def linear(x, weight, bias):
    """Float64, from the definition."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def gated_linear(x, weight, bias):
    gate, up = linear(x, weight, bias).chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poison")
def test_ops(dtype, with_bias):
    x, weight, bias = inputs(21, 66, 96, dtype)
    bias = bias if with_bias else None
    out = decode_linear_op(x, weight, bias)
    assert out.dtype == dtype
    assert error(out, linear(x, weight, bias)) < TOLERANCE[dtype]
    out = decode_gated_linear_op(x, weight, bias)
    assert out.dtype == dtype
    assert error(out, gated_linear(x, weight, bias)) < TOLERANCE[dtype]
    for num_parts in (1, 2, 5):
        parts = linear_parts_op(x, weight, bias, num_parts)
        assert parts.shape == (num_parts, 21, 66)
        assert parts.dtype == torch.float32
        assert error(parts.sum(0), linear(x, weight, bias)) < 2e-6


def test_more_parts_than_columns():
    x, weight, bias = inputs(3, 5, 3, torch.float32)
    parts = linear_parts_reference(x, weight, bias, 4)
    assert error(parts.sum(0), linear(x, weight, bias)) < 2e-6


def test_ops_meet_the_contract_of_custom_ops():
    tests = ("test_schema", "test_faketensor")
    x, weight, bias = inputs(19, 24, 64, torch.float32)
    for given in (bias, None):
        torch.library.opcheck(decode_linear_op.op, (x, weight, given), test_utils=tests)
        torch.library.opcheck(decode_gated_linear_op.op, (x, weight, given), test_utils=tests)
        torch.library.opcheck(linear_parts_op.op, (x, weight, given, 3), test_utils=tests)


def test_no_backward():
    x, weight, _ = inputs(3, 24, 64, torch.float32)
    out = decode_linear_op(x.requires_grad_(), weight, None)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


SHAPES = [
    (6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (4096, 1024), (1024, 2048), (1024, 3072), (6144, 1024),
    (2560, 4096), (128256, 4096), (896, 896), (64, 64), (1, 512),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [{}, {"gated": True}, {"in_parts": True}], ids=["plain", "gated", "parts"])
def test_settings(shape, kind):
    chosen = [choose_decode_linear(tokens, *shape, **kind) for tokens in range(300)]
    assert not any(chosen[:17])
    assert not any(chosen[257:])
    # Few compilations: the number of parts is none.
    assert len({replace(s, num_parts=1) for s in chosen if s is not None}) <= 5
    for settings in filter(None, chosen):
        rows = settings.features * (2 if kind.get("gated") else 1) + settings.tokens + settings.more_tokens
        assert 2 * settings.block_k * settings.stages * rows < 226 * 1024
        assert settings.num_parts == 1 or (kind.get("in_parts") and settings.num_parts * 512 <= shape[1])
        assert not (kind.get("gated") and settings.more_tokens)


def test_settings_by_measurement():
    """What was fastest on an H200 (``eval/results/decode_step_h200.md``)."""
    assert choose_decode_linear(24, 6144, 4096) == DecodeLinearSettings(32, 0, 128, 6)
    assert choose_decode_linear(104, 6144, 4096) is None
    assert choose_decode_linear(64, 4096, 14336, in_parts=True) == DecodeLinearSettings(64, 0, 128, 6, 2)
    assert choose_decode_linear(188, 4096, 4096, in_parts=True) == DecodeLinearSettings(128, 64, 64, 7, 2)
    assert choose_decode_linear(104, 4096, 4096, in_parts=True) is None
    assert choose_decode_linear(188, 4096, 14336, in_parts=True) is None
    assert choose_decode_linear(256, 4096, 4096, in_parts=True) == DecodeLinearSettings(128, 0, 64, 7, 2, 128)
    assert choose_decode_linear(24, 1024, 2048, in_parts=True) == DecodeLinearSettings(32, 0, 128, 6, 4)
    assert choose_decode_linear(188, 1024, 3072, in_parts=True) == DecodeLinearSettings(64, 0, 128, 6, 2)
    assert choose_decode_linear(64, 28672, 4096, gated=True) == DecodeLinearSettings(64, 0, 128, 2)
    assert choose_decode_linear(104, 28672, 4096, gated=True) is None
    assert choose_decode_linear(104, 4096, 1024) == DecodeLinearSettings(64, 0, 128, 6)
    assert choose_decode_linear(188, 4096, 1024) == DecodeLinearSettings(64, 32, 128, 5)
    assert choose_decode_linear(256, 4096, 1024) == DecodeLinearSettings(128, 0, 128, 4)
    assert choose_decode_linear(104, 4096, 4096) is None
    assert choose_decode_linear(104, 6144, 1024, gated=True) == DecodeLinearSettings(64, 0, 128, 4)
    assert choose_decode_linear(144, 6144, 1024, gated=True) is None
    assert choose_decode_linear(188, 6144, 1024, gated=True) == DecodeLinearSettings(64, 0, 64, 4)
    assert choose_decode_linear(64, 4096, 4100, in_parts=True) is None  # rows that TMA cannot read


def test_pytorch_runs_without_a_hopper_gpu():
    x, weight = torch.empty(24, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    assert decode_linear_settings(x, weight) is None
    assert num_linear_parts(24, weight) == 0


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for Hopper GPUs")


KERNELS = [
    DecodeLinearSettings(32, 0, 128, 6),
    DecodeLinearSettings(64, 0, 128, 6),
    DecodeLinearSettings(128, 0, 128, 4),
    DecodeLinearSettings(64, 32, 128, 5),
    DecodeLinearSettings(128, 64, 64, 7),
    DecodeLinearSettings(128, 0, 64, 7, features=128),
]
"""All that are chosen somewhere, and with two tiles of weights :data:`GATED`."""
GATED = [
    *(DecodeLinearSettings(tokens, 0, 128, stages) for tokens in (32, 64) for stages in (2, 4)),
    DecodeLinearSettings(64, 0, 64, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("settings", KERNELS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("hopper", "poison")
def test_kernels(dtype, settings, with_bias):
    """Odd numbers of tokens, features and columns, and more tiles than one of each."""
    from hf_paged_kernels.linear.decode_gluon import decode_linear_launch, linear_parts_launch

    tile = settings.tokens + settings.more_tokens
    for tokens, features, width in ((1, 64, 64), (tile, 130, 1000), (tile - 5, 200, 4104), (tile + 9, 67, 640)):
        x, weight, bias = inputs(tokens, features, width, dtype, padded=features % 2 == 0)
        bias = bias if with_bias else None
        expected = linear(x, weight, bias)
        assert error(decode_linear_launch(x, weight, bias, settings, gated=False), expected) < TOLERANCE[dtype]
        for num_parts in (1, 2, 3, 5):
            parts = linear_parts_launch(x, weight, bias, replace(settings, num_parts=num_parts))
            assert parts.shape == (num_parts, tokens, features)
            assert error(parts.sum(0), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("settings", GATED, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("hopper", "poison")
def test_gated_kernels(dtype, settings, with_bias):
    from hf_paged_kernels.linear.decode_gluon import decode_linear_launch

    for tokens, features, width in ((1, 64, 64), (settings.tokens, 130, 1000), (settings.tokens + 3, 67, 4104)):
        x, weight, bias = inputs(tokens, features, width, dtype, gated=True)
        bias = bias if with_bias else None
        out = decode_linear_launch(x, weight, bias, settings, gated=True)
        assert error(out, gated_linear(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
@pytest.mark.usefixtures("hopper", "poison")
def test_the_settings_of_models(shape):
    for tokens in (17, 33, 100, 150, 256):
        x, weight, _ = inputs(tokens, *shape, torch.bfloat16)
        expected = linear(x, weight, None)
        assert error(decode_linear_op(x, weight, None), expected) < TOLERANCE[torch.bfloat16]
        num_parts = num_linear_parts(tokens, weight)
        if num_parts:
            assert error(linear_parts_op(x, weight, None, num_parts).sum(0), expected) < 1e-4
        gate, up = expected.chunk(2, -1)
        out = decode_gated_linear_op(x, weight, None)
        assert error(out, gate * torch.sigmoid(gate) * up) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 60, 120, 190])
@pytest.mark.usefixtures("hopper")
def test_a_row_does_not_depend_on_the_others(tokens):
    x, weight, bias = inputs(tokens, 4096, 1024, torch.bfloat16)

    def run(rows):
        num_parts = num_linear_parts(tokens, weight)
        parts = [linear_parts_op(rows, weight, bias, num_parts).sum(0)] if num_parts else []
        return [decode_linear_op(rows, weight, bias), decode_gated_linear_op(rows, weight, bias), *parts]

    alone = torch.full_like(x, float("nan"))
    alone[tokens - 2] = x[tokens - 2]
    for out, poisoned in zip(run(x), run(alone)):
        assert torch.equal(out[tokens - 2], poisoned[tokens - 2])
        assert poisoned[: tokens - 2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [20, 64, 190])
@pytest.mark.usefixtures("hopper")
def test_a_captured_chain_waits_for_its_inputs(tokens):
    """Kernels that start early: a chain of dependent layers gives bitwise what it gives one kernel at a time."""
    width, hidden, depth = 1024, 3072, 20
    qkv = [inputs(tokens, 4096, width, torch.bfloat16)[1] for _ in range(depth)]
    o = [inputs(tokens, width, 4096, torch.bfloat16)[1] for _ in range(depth)]
    gate_up = [inputs(tokens, hidden, width, torch.bfloat16, gated=True)[1] for _ in range(depth)]
    down = [inputs(tokens, width, hidden, torch.bfloat16)[1] for _ in range(depth)]
    x, norm = torch.randn(tokens, width, device=DEVICE).bfloat16(), torch.rand(width, device=DEVICE).bfloat16()

    def chain(between):
        normed, total = x, x
        for first, second, third, last in zip(qkv, o, gate_up, down):
            for op, before, after in ((decode_linear_op, first, second), (decode_gated_linear_op, third, last)):
                inner = op(normed, before, None)
                between()
                parts = linear_parts_op(inner, after, None, num_linear_parts(tokens, after))
                between()
                normed, total = rms_norm_parts_op(parts, norm, 1e-6, 0.0, True, total)
                between()
        return total

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for repeat in range(10):
        x.normal_()
        graph.replay()
        again = out.clone()
        expected = chain(torch.cuda.synchronize)
        assert torch.equal(again, expected), repeat
