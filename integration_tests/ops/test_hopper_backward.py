"""On a Hopper GPU: the Gluon backward kernel against float64, and what it leaves to portable Triton."""

import pytest
import torch
from helpers import error, prefix_sums
from hf_paged_kernels import flash_attention
from hf_paged_kernels.attention import hopper_backward_gluon
from hf_paged_kernels.backend import uses_gluon_backward

pytestmark = pytest.mark.gpu
FACTOR = 1.5
"""Largest error in units of SDPA's."""


def inputs(q_lens, k_lens, heads, dim):
    q, dout = (torch.randn(sum(q_lens), heads[0], dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    k, v = (torch.randn(sum(k_lens), heads[1], dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    if not uses_gluon_backward(q, k, v, None, None, 1.0):
        pytest.skip("the Gluon kernel needs a Hopper GPU")
    return *(x.requires_grad_() for x in (q, k, v)), dout


def dense_gradients(q, k, v, dout, left, right, dtype):
    """dq, dk, dv of one sequence by PyTorch in ``dtype``, the last query on the last key."""
    at = torch.arange(q.shape[0], device="cuda")[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0], device="cuda")[None]
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device="cuda")
    mask = mask if left is None else mask & (key >= at - left)
    mask = mask if right is None else mask & (key <= at + right)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(0, 1)[None] for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return torch.autograd.grad(out[0].transpose(0, 1), leaves, dout.to(dtype))


def check(got, q, k, v, dout, left, right):
    arguments = q, k, v, dout, left, right
    expected = dense_gradients(*arguments, torch.float64)
    peer = dense_gradients(*arguments, q.dtype)
    for ours, theirs, right_one in zip(got, peer, expected):
        assert error(ours, right_one) <= FACTOR * error(theirs, right_one)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_packed(poison, dim, window):
    """With a sequence of NaN that nobody else may see, and one without queries, whose keys have gradients of zero."""
    q_lens, k_lens = [70, 63, 300, 129, 0, 777], [100, 63, 300, 400, 5, 777]
    q, k, v, dout = inputs(q_lens, k_lens, (4, 2), dim)
    cu_q, cu_k = prefix_sums(q_lens, "cuda"), prefix_sums(k_lens, "cuda")
    with torch.no_grad():
        q[70:133], k[100:163], v[100:163], dout[70:133] = (float("nan"),) * 4
    out = flash_attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=777, max_seqlen_k=777, causal=True, window=window
    )
    got = torch.autograd.grad(out, (q, k, v), dout)
    left = None if window is None else window - 1
    for i in (0, 2, 3, 5):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        check((got[0][rows], got[1][keys], got[2][keys]), q[rows], k[keys], v[keys], dout[rows], left, 0)
    assert not got[1][cu_k[4] : cu_k[5]].any()
    assert not got[2][cu_k[4] : cu_k[5]].any()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_dense(poison, dim, causal):
    """More queries than keys too: the first ones see none, and have gradients of zero."""
    for batch, lq, lk, heads in ((2, 300, 300, (4, 4)), (1, 777, 1111, (8, 2)), (3, 200, 64, (2, 1))):
        q, k, v, dout = inputs([lq] * batch, [lk] * batch, heads, dim)
        q, k, v, dout = (x.detach().view(batch, -1, *x.shape[1:]) for x in (q, k, v, dout))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        got = torch.autograd.grad(flash_attention(*leaves, causal=causal), leaves, dout)
        unseen = max(0, lq - lk) if causal else 0
        assert not got[0][:, :unseen].any()
        for b in range(batch):
            rows = slice(unseen, None)
            check(
                (got[0][b, rows], got[1][b], got[2][b]), q[b, rows], k[b], v[b], dout[b, rows], None,
                0 if causal else None,
            )  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_bits_every_time(dim):
    """Where many programs add to the same rows of dq."""
    q, k, v, dout = inputs([4096] * 2, [4096] * 2, (8, 4), dim)
    q, k, v, dout = (x.detach().view(2, 4096, -1, dim) for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, causal=True)
    calls = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(30)]
    assert all(torch.equal(x, y) for call in calls for x, y in zip(call, calls[0]))


def test_what_is_left_to_portable_triton(monkeypatch):
    """Softcap, sinks, float16 and other head dims."""
    q, k, v, _ = inputs([64], [64], (2, 2), 128)

    def refuse(*_):
        raise AssertionError("the Gluon kernel was called")

    monkeypatch.setattr(hopper_backward_gluon, "hopper_backward_launch", refuse)
    cu = prefix_sums([64], "cuda")
    packed = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=64, max_seqlen_k=64, causal=True)
    sinks = torch.randn(2, dtype=torch.bfloat16, device="cuda")
    for options in (dict(softcap=20.0), dict(sinks=sinks)):
        flash_attention(q, k, v, **packed, **options).sum().backward()
    for dim, dtype in ((256, torch.bfloat16), (128, torch.float16)):
        x = torch.randn(64, 2, dim, dtype=dtype, device="cuda", requires_grad=True)
        flash_attention(x, x, x, **packed).sum().backward()
    with pytest.raises(AssertionError, match="was called"):
        flash_attention(q, k, v, **packed).sum().backward()
