"""On a GPU: half-precision error no larger than 1.5 times that of PyTorch's SDPA, both against float64."""


import pytest
import torch
from helpers import error, make_pages, prefix_sums
from hf_paged_kernels import flash_attention, paged_attention

pytestmark = pytest.mark.gpu
FACTOR = 1.5
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512)]


def float64_attention(q, k, v, causal):
    """q [Lq, H, D], k and v [Lk, Hk, *]; plain PyTorch in float64, the last query on the last key."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def sdpa(q, k, v, causal):
    """The same by scaled_dot_product_attention in the inputs' dtype."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention(poison, dtype, dims, causal):
    q = torch.randn(1, 777, 8, dims[0], dtype=dtype, device="cuda")
    k = torch.randn(1, 1111, 2, dims[0], dtype=dtype, device="cuda")
    v = torch.randn(1, 1111, 2, dims[1], dtype=dtype, device="cuda")
    expected = float64_attention(q[0], k[0], v[0], causal)
    ours = error(flash_attention(q, k, v, causal=causal)[0], expected)
    assert ours <= FACTOR * error(sdpa(q[0], k[0], v[0], causal), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [300, 1, 64, 5], [4, 1, 3, 4]], ids=["decode", "mixed", "verify"])
def test_paged_attention(poison, dtype, dims, page_size, q_lens):
    totals = [3000, 17, 1025, 640]
    keys = [torch.randn(n, 2, dims[0], dtype=dtype, device="cuda") for n in totals]
    values = [torch.randn(n, 2, dims[1], dtype=dtype, device="cuda") for n in totals]
    q = torch.randn(sum(q_lens), 14, dims[0], dtype=dtype, device="cuda")
    k_pages, v_pages, table = make_pages(keys, values, page_size)
    out = paged_attention(
        q, k_pages, v_pages, table, torch.tensor(totals, dtype=torch.int32, device="cuda"),
        prefix_sums(q_lens, "cuda"), max_query_len=max(q_lens),
    )  # fmt: skip
    at, expected, peer = 0, [], []
    for i, n in enumerate(q_lens):
        rows = q[at : at + n]
        expected.append(float64_attention(rows, keys[i], values[i], True))
        peer.append(sdpa(rows, keys[i], values[i], True))
        at += n
    expected = torch.cat(expected)
    assert error(out, expected) <= FACTOR * error(torch.cat(peer), expected)


def test_float32_is_full_precision(poison):
    q = torch.randn(1, 300, 4, 128, device="cuda")
    k = torch.randn(1, 500, 2, 128, device="cuda")
    expected = float64_attention(q[0], k[0], k[0], True)
    assert error(flash_attention(q, k, k, causal=True)[0], expected) < 2e-6


def test_ops_in_a_captured_graph_at_other_lengths():
    """Lengths are device tensors: a graph captured at one length is right at others."""
    k_pages = torch.randn(400, 2, 16, 64, dtype=torch.bfloat16, device="cuda")
    v_pages = torch.randn_like(k_pages)
    q = torch.randn(3, 8, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(400, device="cuda")[:390].view(3, 130).int()
    seq_lens = torch.tensor([5, 100, 1], dtype=torch.int32, device="cuda")
    cu = prefix_sums([1, 1, 1], "cuda")
    run = lambda: paged_attention(q, k_pages, v_pages, table, seq_lens, cu, max_query_len=1)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lens in ([5, 100, 1], [2080, 17, 1030], [1, 1, 2000]):
        seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        q.normal_()
        graph.replay()
        captured = out.clone()
        assert torch.equal(captured, run())
        for i, n in enumerate(lens):
            keys, values = (p[table[i].long()].transpose(1, 2).flatten(0, 1)[:n] for p in (k_pages, v_pages))
            assert error(captured[i : i + 1], float64_attention(q[i : i + 1], keys, values, True)) < 1e-2
