"""Numbers that are not finite stay visible, rows without keys are zeros, large logits are no other than small ones."""

import hf_paged_kernels as kernels
import pytest
import torch
from hf_paged_kernels.attention import ops
from hf_paged_kernels.attention.reference import paged_attention_reference, quantize
from hf_paged_kernels.layers.ops import rotary_write_op

pytest.importorskip("triton")

from helpers import DEVICE, make_pages, prefix_sums
from hf_paged_kernels.attention.flash_backward_triton import flash_attention_backward_launch
from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
from hf_paged_kernels.attention.merge_states_triton import merge_attention_states_launch
from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch
from hf_paged_kernels.attention.paged_triton import paged_attention_launch
from hf_paged_kernels.attention.pages_triton import write_pages_launch
from hf_paged_kernels.layers.rotary_write_triton import rotary_write_launch

NAN, INF = float("nan"), float("inf")
D = 64


def new(*shape, dtype=torch.float16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def paged_op(*arguments):
    """What the device takes: a Gluon kernel, the reference."""
    return ops.paged_attention_op(*arguments, None, None)


def flash_op(*arguments):
    return ops.flash_attention_op(*arguments)


@pytest.mark.parametrize("attend", [paged_attention_launch, paged_op, paged_attention_reference])
@pytest.mark.parametrize("seq_len", [40, 1300])
@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_over_pages(attend, seq_len, number, where):
    """Decode and a short query, in one split and in several: the sequence that holds the number, and no other."""
    query, key, value = new(3, 4, D).abs(), new(seq_len, 2, D).abs(), new(seq_len, 2, D).abs()
    {"q": query, "k": key, "v": value}[where][0, 0, 5] = number
    k_pages, v_pages, table = make_pages([key, new(seq_len, 2, D)], [value, new(seq_len, 2, D)], 16)
    step = (query, k_pages, v_pages, table, int32(seq_len, seq_len), int32(0, 1, 3), 2)
    out, lse = attend(*step, None, 0, None, None, 0.1)
    heads = slice(0, 1 if where == "q" else 2)
    if where == "v":
        assert not out[0, heads, 5].isfinite().any()
    else:
        assert out[0, heads].isnan().all()
        assert not lse[heads, 0].isfinite().any()
    assert out[1:].isfinite().all()
    assert out[0, heads.stop :].isfinite().all()


@pytest.mark.parametrize("attend", [flash_attention_launch, flash_op])
@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_dense(attend, number, where):
    tensors = {"q": new(1, 300, 2, D).abs(), "k": new(1, 300, 1, D).abs(), "v": new(1, 300, 1, D).abs()}
    tensors[where][0, 140, 0, 5] = number
    out, _ = attend(*tensors.values(), None, None, 300, None, 0, None, None, 0.1)
    bad = slice(140, 141) if where == "q" else slice(140, 300)
    assert not out[0, bad, 0, 5].isfinite().any()
    if where != "v":
        # A row multiplies values that it does not see by 0, here at least those of its tile of keys.
        assert out[0, :140].isfinite().all()
    if where == "q":
        assert out[0, :, 1].isfinite().all()


@pytest.mark.parametrize("query_len", [1, 20])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("where", ["k", "v"])
def test_over_quantised_pages(query_len, dtype, where):
    """In one of two splits, or in a tile: what was not finite does not come back as a number."""
    seq_len = 300
    pages = {name: new(19, 2, 16, D) for name in "kv"}
    pages[where][1, 0, 3, 5] = INF
    (k_pages, k_scale), (v_pages, v_scale) = (quantize(x, dtype) for x in pages.values())
    table = torch.arange(19, dtype=torch.int32, device=DEVICE)[None]
    step = (new(query_len, 4, D), k_pages, v_pages, table, int32(seq_len), prefix_sums([query_len], DEVICE), query_len)
    for attend in (quantized_paged_attention_launch, ops.paged_attention_op, paged_attention_reference):
        out, _ = attend(*step, None, 0, None, None, 0.1, k_scale, v_scale)
        assert out[:, :2].isnan().all(), attend
        assert out[:, 2:].isfinite().all(), attend


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_rows_that_are_not_finite(dtype):
    """NaN, whether the row is normalised and rotated on its way or not; other rows have theirs."""
    key, value = new(5, 2, D), new(5, 2, D)
    for row, number in enumerate((NAN, INF, -INF)):
        key[row, 1, 7 * row], value[row, 0, 40] = number, number
    slots = torch.arange(5, device=DEVICE)
    angles = torch.ones(5, D // 4, device=DEVICE)
    for write in (
        lambda *out: write_pages_launch(key, value, *out[:2], slots, *out[2:]),
        lambda *out: kernels.write_pages(key, value, *out[:2], slots, k_scale=out[2], v_scale=out[3]),
        lambda *out: rotary_write_launch(
            new(5, 4, D), key, value, angles, angles, False, None, None, 1e-6, 0.0, True, *out, slots
        ),
        lambda *out: rotary_write_op(
            new(5, 4, D), key, value, angles, angles, False, None, None, 1e-6, 0.0, True, *out, slots
        ),
    ):
        pages = [torch.zeros(1, 2, 8, D, device=DEVICE).to(dtype) for _ in "kv"]
        scales = [torch.zeros(1, 2, 8, device=DEVICE) for _ in "kv"]
        write(*pages, *scales)
        for held, x in zip(scales, (key, value)):
            assert torch.equal(held[0, :, :5].T.isnan(), ~x.isfinite().all(-1))
    _, scale = quantize(value, dtype)
    assert torch.equal(scale.isnan(), ~value.isfinite().all(-1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_too_small_for_a_scale(dtype):
    """Numbers whose largest one over 448 is no number of float32 any more: zeros, not zero by zero."""
    key = torch.zeros(1, 2, D, device=DEVICE)
    key[0, 0, 3] = 1e-44
    for write in (write_pages_launch, kernels.write_pages):
        pages = [torch.ones(1, 2, 8, D, device=DEVICE).to(dtype) for _ in "kv"]
        scales = [torch.ones(1, 2, 8, device=DEVICE) for _ in "kv"]
        out = dict(k_scale=scales[0], v_scale=scales[1])
        write(key, key, *pages, torch.zeros(1, dtype=torch.int64, device=DEVICE), **out)
        assert not pages[0][0, :, 0].float().any()
        assert scales[0][0, :, 0].tolist() == [1.0, 1.0]


MERGES = [merge_attention_states_launch, ops.merge_attention_states_op]


@pytest.mark.parametrize("merge", MERGES)
def test_merging(merge):
    out, other = new(1, 5, 16, dtype=torch.float32), new(1, 5, 16, dtype=torch.float32)
    lse_a = torch.tensor([[NAN], [1.0], [-INF], [-200.0], [-INF]], device=DEVICE)
    lse_b = torch.tensor([[1.0], [INF], [2.0], [200.0], [-INF]], device=DEVICE)
    out[0, 2:] = NAN
    other[0, 4] = NAN
    merged, lse = merge(out, lse_a, other, lse_b)
    assert merged[0, :2].isnan().all()
    assert not lse[:2].isfinite().any()
    # Without a key a side may hold anything; with keys, however unlikely they are, its NaN is a NaN.
    assert torch.equal(merged[0, 2], other[0, 2])
    assert merged[0, 3].isnan().all()
    assert not merged[0, 4].any()
    assert lse[2:, 0].tolist() == [2.0, 200.0, -INF]


@pytest.mark.parametrize("sinks", [None, (-INF, 0.5), (-INF, -INF)], ids=str)
def test_rows_without_keys(sinks):
    """Zeros, whatever the sink is; its logit as lse, -inf without one."""
    sink = None if sinks is None else torch.tensor(sinks, device=DEVICE)
    expected = [-INF, -INF] if sinks is None else list(sinks)
    q, k = new(1, 3, 2, D), new(1, 1, 2, D)
    for attend in (flash_attention_launch, flash_op):
        out, lse = attend(q, k, k, None, None, 3, None, 0, None, sink, 0.1)
        assert not out[0, :2].any()
        assert lse[0, :, 0].tolist() == lse[0, :, 1].tolist() == expected
        none = new(1, 0, 2, D)
        out, lse = attend(q, none, none, None, None, 3, None, 0, None, sink, 0.1)
        assert not out.any()
        assert lse[0, :, 2].tolist() == expected
    grads = ops.flash_attention_backward_op(
        q, k, k, *flash_op(q, k, k, None, None, 3, None, 0, None, sink, 0.1), new(1, 3, 2, D), None, None, None, None,
        0, None, sink, 0.1,
    )  # fmt: skip
    assert all(x.isfinite().all() for x in grads)
    pages = new(40, 2, 16, D)
    for attend in (paged_attention_launch, paged_op):
        for width in (2, 40):
            table = torch.zeros(2, width, dtype=torch.int32, device=DEVICE)
            step = (q[0, :2], pages, pages, table, int32(0, 5), int32(0, 1, 2), 1)
            out, lse = attend(*step, None, 0, None, sink, 0.1)
            assert not out[0].any()
            assert lse[:, 0].tolist() == expected
            assert out[1].isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_large_logits(size):
    """Equal keys: the mean of their values, and gradients that are shared among them, at any size of the logits."""
    keys = 7
    q, k, v = (torch.zeros(1, n, 1, 16, device=DEVICE) for n in (1, keys, keys))
    q[..., 0], k[..., 0] = size, 1.0
    v[0, :, 0] = torch.randn(keys, 16, device=DEVICE)
    mean = v[0].mean(0)[0]
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = kernels.flash_attention(*tensors, scale=1.0)
    assert torch.allclose(out[0, 0, 0], mean, atol=1e-6)
    out.sum().backward()
    if DEVICE == "cpu":
        # On a GPU weights are computed again from the log-sum-exp, whose float32 has no room for their number.
        assert torch.allclose(v.grad, torch.full_like(v, 1 / keys), atol=1e-6)
    with torch.no_grad():
        pages, table = torch.zeros(1, 1, 8, 16, device=DEVICE), int32(0)[None]
        k_pages, v_pages = pages.clone(), pages.clone()
        kernels.write_pages(k[0], v[0], k_pages, v_pages, torch.arange(keys, device=DEVICE))
        step = (q[0], k_pages, v_pages, table, int32(keys), int32(0, 1))
        assert torch.allclose(kernels.paged_attention(*step, max_query_len=1, scale=1.0)[0, 0], mean, atol=1e-6)
        lse = torch.full((1, 1), size, device=DEVICE)
        for merge in MERGES:
            merged, _ = merge(v[0, :1], lse, v[0, 1:2], lse)
            assert torch.allclose(merged, v[0, :2].mean(0, keepdim=True), atol=1e-6)


def test_gradient_of_sinks_is_rounded_once():
    """bfloat16: the sum over all rows is that of float64 within half a unit in the last place, which out's rounding
    before would spoil."""
    rows, heads = 200, 4
    q, k, v, grad = (new(1, rows, heads, 16, dtype=torch.bfloat16) for _ in range(4))
    v, grad = v.abs() + 1, grad.abs() + 1
    sinks = torch.full((heads,), 3.0, device=DEVICE)
    arguments = (None, None, None, 0, None, sinks)
    out, lse = flash_attention_launch(q, k, v, None, None, rows, None, 0, None, sinks, 0.25)
    scores = torch.einsum("blhd,bnhd->bhln", q.double(), k.double()) * 0.25
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=DEVICE).triu(1)
    exact = sinks.double().requires_grad_()
    scores = torch.cat([scores.masked_fill(hidden, -INF), exact[:, None, None].expand(1, -1, rows, 1)], -1)
    (torch.einsum("bhln,bnhd->blhd", scores.softmax(-1)[..., :rows], v.double()) * grad.double()).sum().backward()
    for backward in (flash_attention_backward_launch, ops.flash_attention_backward_op):
        *_, got = backward(q, k, v, out, lse, grad, None, *arguments, 0.25)
        assert (got.double() / exact.grad - 1).abs().max() < 2e-5
