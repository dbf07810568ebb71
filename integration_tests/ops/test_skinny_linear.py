"""Linear layers of a few tokens: ops, settings and kernels, against float64 and against themselves."""


import pytest
import torch
from helpers import DEVICE, TOLERANCE, error
from hf_paged_kernels.linear.skinny import (
    skinny_gated_linear_op,
    skinny_linear_op,
    skinny_linear_settings,
)
from hf_paged_kernels.linear.skinny_settings import MAX_TOKENS, choose_skinny_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
# Out features (per half of a gated layer) and in features: odd, and on both sides of the limits in the settings.
SHAPES = [(1, 64), (17, 100), (1030, 1000), (300, 1544), (96, 2048), (131, 3000), (40, 4104)]


def inputs(tokens, features, width, dtype, *, gated=False, padded=False):
    """x, weight, bias, residual and norm weight; ``padded``: x is a slice of wider rows, NaN beyond its end."""
    x = torch.full((tokens + 1, width + 8 * padded), float("nan"), dtype=dtype, device=DEVICE)[:tokens, :width]
    x.copy_(torch.randn(tokens, width))
    rows = 2 * features if gated else features
    weight = (torch.randn(rows, width) * width**-0.5).to(DEVICE, dtype)
    bias, residual = torch.randn(rows).to(DEVICE, dtype), torch.randn(tokens, features).to(DEVICE, dtype)
    return x, weight, bias, residual, (1 + 0.2 * torch.randn(width)).to(DEVICE, dtype)


def linear(x, weight, bias, residual, norm_weight):
    """Float64, from the definition."""
    x = x.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    out = x @ weight.double().T
    for term in (bias, residual):
        out = out if term is None else out + term.double()
    return out


def gated_linear(x, weight, bias, norm_weight):
    gate, up = linear(x, weight, bias, None, norm_weight).chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def check_both(tokens, features, width, dtype, *, bias, residual, norm, padded=False):
    x, weight, b, r, g = inputs(tokens, features, width, dtype, padded=padded)
    b, r, g = (tensor if used else None for tensor, used in ((b, bias), (r, residual), (g, norm)))
    out = skinny_linear_op(x, weight, b, r, g, EPS)
    assert out.dtype == dtype
    assert error(out, linear(x, weight, b, r, g)) < TOLERANCE[dtype]
    x, weight, b, _, _ = inputs(tokens, features, width, dtype, gated=True, padded=padded)
    b = b if bias else None
    out = skinny_gated_linear_op(x, weight, b, g, EPS)
    assert out.dtype == dtype
    assert error(out, gated_linear(x, weight, b, g)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("terms", [(False, False, False), (True, True, True)], ids=["plain", "all"])
@pytest.mark.usefixtures("poison")
def test_ops(dtype, tokens, terms):
    bias, residual, norm = terms
    check_both(tokens, 130, 96, dtype, bias=bias, residual=residual, norm=norm)


@pytest.mark.parametrize("all_terms", [False, True])
def test_ops_meet_the_contract_of_custom_ops(all_terms):
    x, weight, bias, residual, norm_weight = inputs(3, 24, 64, torch.float32)
    tests = ("test_schema", "test_faketensor")
    if not all_terms:
        bias = residual = norm_weight = None
    torch.library.opcheck(skinny_linear_op.op, (x, weight, bias, residual, norm_weight, EPS), test_utils=tests)
    torch.library.opcheck(skinny_gated_linear_op.op, (x, weight, bias, norm_weight, EPS), test_utils=tests)


def test_no_backward():
    x, weight, *_ = inputs(3, 24, 64, torch.float32)
    out = skinny_linear_op(x.requires_grad_(), weight, None, None, None, 0.0)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_inputs_are_left_alone():
    x, weight, bias, residual, norm_weight = inputs(3, 24, 64, torch.float32)
    before = [tensor.clone() for tensor in (x, weight, bias, residual, norm_weight)]
    skinny_linear_op(x, weight, bias, residual, norm_weight, EPS)
    skinny_gated_linear_op(x, weight, bias, norm_weight, EPS)
    for tensor, copy in zip((x, weight, bias, residual, norm_weight), before):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(6144, 4096), (4096, 14336), (1024, 2048), (4096, 1024), (151936, 1024), (1, 64)]
)
def test_settings(out_features, in_features, gated):
    chosen = [choose_skinny_linear(tokens, out_features, in_features, gated, 2) for tokens in range(1, 20)]
    assert all(settings is None for settings in chosen[MAX_TOKENS:])
    assert chosen[0] is not None
    # Few compilations: one for every bucket of token counts.
    assert len({settings.rows for settings in chosen if settings is not None}) <= 4
    assert len(set(chosen) - {None}) <= 4
    for tokens, settings in enumerate(chosen[:MAX_TOKENS], 1):
        if settings is not None:
            assert settings.rows >= tokens
            assert settings.block_n % settings.warps_n == 0
            assert settings.rows <= 2 or settings.block_n // settings.warps_n % 16 == 0
    # The reduction order of the matrix units does not change with the number of tokens.
    orders = {(settings.warps_k, settings.norm_first) for settings in chosen[2:] if settings is not None}
    assert len(orders) <= 1


def test_settings_refuse():
    assert choose_skinny_linear(0, 64, 64, False, 2) is None
    assert choose_skinny_linear(1, 64, 32, False, 2) is None
    assert choose_skinny_linear(3, 64, 64, False, 4) is None  # the matrix units would round float32
    assert choose_skinny_linear(1, 64, 64, False, 8) is None  # no kernel computes in float64
    assert choose_skinny_linear(3, 128256, 4096, False, 2) is None  # a head


def test_pytorch_runs_without_a_hopper_gpu():
    assert skinny_linear_settings(torch.empty(1, 64), torch.empty(64, 64), gated=False) is None


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for Hopper GPUs")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 11, 16])
@pytest.mark.usefixtures("hopper", "poison")
def test_kernels(dtype, tokens):
    if dtype == torch.float32 and tokens > 2:
        pytest.skip("float32 takes the kernels of multiply-adds only")
    every = SHAPES if dtype == torch.bfloat16 else SHAPES[1::3]
    for index, (features, width) in enumerate(every):
        assert skinny_linear_settings(*inputs(tokens, features, width, dtype)[:2], gated=False) is not None
        some = index % 2 == tokens % 2
        check_both(tokens, features, width, dtype, bias=some, residual=some, norm=some, padded=not some)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 1024), (40, 4104)], ids=str)
@pytest.mark.usefixtures("hopper")
def test_a_row_does_not_depend_on_the_others(shape):
    x, weight, bias, residual, norm_weight = inputs(16, *shape, torch.bfloat16)
    gated_weight = torch.cat([weight, weight.flip(0)])

    def run(rows):
        plain = skinny_linear_op(rows, weight, bias, residual[: len(rows)], norm_weight, EPS)
        return plain, skinny_gated_linear_op(rows, gated_weight, None, norm_weight, EPS)

    for first, counts in ((2, [2]), (16, [3, 7, 8, 9, 15, 16])):
        whole = run(x[:first])
        for count in counts:
            poisoned = torch.full_like(x[:count], float("nan"))
            poisoned[count - 1] = x[count - 1]
            for out, again, alone in zip(whole, run(x[:count]), run(poisoned)):
                assert torch.equal(out[:count], again)
                assert torch.equal(out[count - 1], alone[count - 1])
                assert alone[: count - 1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
@pytest.mark.usefixtures("hopper")
def test_a_captured_chain_waits_for_its_inputs(tokens):
    """Kernels that start early: a chain of dependent layers gives bitwise what it gives one kernel at a time."""
    width, hidden, depth = 1024, 512, 30
    attention = [inputs(tokens, width, width, torch.bfloat16)[1:] for _ in range(depth)]
    gate_up = [inputs(tokens, hidden, width, torch.bfloat16, gated=True)[1:] for _ in range(depth)]
    down = [inputs(tokens, width, hidden, torch.bfloat16)[1] for _ in range(depth)]
    x = torch.randn(tokens, width, device=DEVICE).bfloat16()

    def chain(between):
        state = x
        for (weight, bias, _, norm), (both, *_, norm_too), last in zip(attention, gate_up, down):
            state = skinny_linear_op(state, weight, bias, state, norm, EPS)
            between()
            inner = skinny_gated_linear_op(state, both, None, norm_too, EPS)
            between()
            state = skinny_linear_op(inner, last, None, state, None, 0.0)
            between()
        return state

    graph = torch.cuda.CUDAGraph()
    expected = chain(torch.cuda.synchronize)
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for repeat in range(10):
        x.normal_()
        graph.replay()
        again = out.clone()
        expected = chain(torch.cuda.synchronize)
        assert torch.equal(again, expected), repeat
