"""Adapters of different tokens in one linear layer: kernel, reference and op against float64."""

import pytest
import torch
from helpers import DEVICE, TOLERANCE, error
from hf_paged_kernels.linear.lora import lora_linear_op, lora_linear_reference, lora_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launched(x, base, adapters, pairs, scaling, table, a, b):
    pytest.importorskip("triton")
    from hf_paged_kernels.linear.lora_triton import lora_linear_launch

    return lora_linear_launch(x, base, adapters, pairs, scaling, table, a, b)


def referenced(x, base, adapters, pairs, scaling, table, a, b):
    return lora_linear_reference(x, base, adapters, pairs, scaling, a, b)


def inputs(tokens, width, features, ranks, dtype, weight_dtype=None, num_adapters=6):
    """Adapters whose pairs are shuffled, one of which has no pair; tokens with them, and without any."""
    weight_dtype = weight_dtype or dtype
    x = torch.full((tokens, width + 3), float("nan"), dtype=dtype, device=DEVICE)[:, :width]
    x.copy_(torch.randn(tokens, width))
    base = torch.full((tokens, features + 5), float("nan"), dtype=dtype, device=DEVICE)[:, :features]
    base.copy_(torch.randn(tokens, features))
    a = [(torch.randn(rank, width) * width**-0.5).to(DEVICE, weight_dtype) for rank in ranks]
    b = [(torch.randn(features, rank) * rank**-0.5).to(DEVICE, weight_dtype) for rank in ranks]
    pairs = torch.full((num_adapters,), -1, dtype=torch.int32)
    pairs[torch.randperm(num_adapters - 1)[: len(ranks)]] = torch.arange(len(ranks), dtype=torch.int32)
    adapters = torch.randint(-1, num_adapters, (tokens,), dtype=torch.int32)
    scaling = torch.rand(num_adapters, dtype=torch.float64) + 0.5
    table = lora_table(a, b, torch.device(DEVICE))
    return x, base, adapters.to(DEVICE), pairs.to(DEVICE), scaling.to(DEVICE), table, a, b


def answer(x, base, adapters, pairs, scaling, table, a, b):
    """Float64, token by token, from the definition."""
    out = base.double()
    for token, index in enumerate(adapters.tolist()):
        if index >= 0 and pairs[index] >= 0:
            pair = int(pairs[index])
            out[token] += scaling[index] * (b[pair].double() @ (a[pair].double() @ x[token].double()))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "features", "ranks"),
    [
        (1, 64, 17, [3]),
        (5, 100, 130, [1, 8, 16]),
        (33, 520, 96, [4, 64, 33]),  # more columns than one program adds up
        (131, 48, 40, [8, 100]),  # large tiles, more ranks than a block has
    ],
)
@pytest.mark.usefixtures("poison")
def test_kernel_and_reference(dtype, tokens, width, features, ranks):
    arguments = inputs(tokens, width, features, ranks, dtype)
    expected = answer(*arguments)
    for compute in (launched, referenced, lora_linear_op):
        out = compute(*arguments)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.quick
@pytest.mark.usefixtures("poison")
def test_a_token_depends_on_no_other_one():
    """Whatever they are, and whatever the weights of their adapters are."""
    arguments = list(inputs(37, 64, 50, [8, 2, 16], torch.float32))
    x, base, adapters, *rest = arguments
    together = launched(*arguments)
    for token in range(0, 37, 5):
        some = slice(token, token + 1)
        out = launched(x[some], base[some], adapters[some], *rest)
        # The interpreter's matrix products are the host's, whose bits depend on where a row is.
        assert torch.equal(out, together[some]) if DEVICE == "cuda" else error(out, together[some]) < 1e-6
    bad = int(rest[0].argmax())  # the adapter of the last pair
    rest[3][-1].fill_(float("nan"))
    rest[4][-1].fill_(float("inf"))
    others = adapters != bad
    assert others.any()
    assert not others.all()
    out = launched(x, base, adapters, *rest)
    assert torch.equal(out[others], together[others])
    assert out[~others].isnan().all()


@pytest.mark.parametrize("compute", [launched, referenced])
def test_tokens_without_an_adapter_stay_as_they_are(compute):
    x, base, adapters, *rest = inputs(20, 64, 50, [8], torch.bfloat16)
    base[3] = float("-inf")
    base[4] = -0.0
    for index in (-1, 5):  # none, and one without matrices in this layer
        out = compute(x, base, torch.full_like(adapters, index), *rest)
        assert torch.equal(out.view(torch.int16), base.contiguous().view(torch.int16))
        assert out.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("compute", [launched, referenced])
def test_matrices_of_another_dtype(compute, weights):
    """PEFT keeps adapters of half-precision models in float32 unless it is told otherwise."""
    arguments = inputs(9, 80, 30, [8, 5], torch.bfloat16, weights)
    out = compute(*arguments)
    assert out.dtype == torch.bfloat16
    assert error(out, answer(*arguments)) < TOLERANCE[torch.bfloat16]


def test_the_order_of_sums_in_float32_matrices_is_exact_enough():
    """No TF32: bits of float32 matrices count."""
    arguments = inputs(40, 1030, 70, [16, 16], torch.float32)
    arguments[1].zero_()
    assert error(launched(*arguments), answer(*arguments)) < TOLERANCE[torch.float32]


def test_matrices_are_read_where_they_are():
    arguments = inputs(6, 32, 24, [4, 4], torch.float32)
    launched(*arguments)
    for matrix in (*arguments[6], *arguments[7]):
        matrix.data.copy_(torch.randn_like(matrix))
    assert error(launched(*arguments), answer(*arguments)) < TOLERANCE[torch.float32]


def test_no_tokens():
    x, base, adapters, *rest = inputs(4, 32, 24, [4], torch.float32)
    for compute in (launched, lora_linear_op):
        assert compute(x[:0], base[:0], adapters[:0], *rest).shape == (0, 24)


def test_the_op_meets_the_contract_of_custom_ops():
    arguments = inputs(7, 32, 24, [4, 8], torch.float32)
    torch.library.opcheck(lora_linear_op.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_backward():
    x, *rest = inputs(3, 32, 24, [4], torch.float32)
    out = lora_linear_op(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="no_grad"):
        out.sum().backward()
    x, *rest, a, b = inputs(3, 32, 24, [4], torch.float32)
    out = lora_linear_op(x, *rest, [a[0].requires_grad_()], b)
    with pytest.raises(RuntimeError, match="no_grad"):
        out.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 24, 200, 3000])
def test_on_a_gpu(dtype, tokens):
    """Compiled, at the sizes of a model, captured in a graph that serves other adapters later."""
    arguments = list(inputs(tokens, 4096, 1030, [16, 64, 8, 24], dtype, num_adapters=8))
    out = lora_linear_op(*arguments)
    assert error(out, answer(*arguments)) < TOLERANCE[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lora_linear_op(*arguments)
    arguments[2].copy_(torch.randint(-1, 8, (tokens,), dtype=torch.int32))
    graph.replay()
    assert torch.equal(captured, lora_linear_op(*arguments))
    assert error(captured, answer(*arguments)) < TOLERANCE[dtype]
