"""The backward kernels (interpreter on CPU, compiled on a GPU) and the reference, against float64 autograd."""


import hf_paged_kernels as kernels
import pytest
import torch
from helpers import DEVICE, TOLERANCE, error, prefix_sums, softmax_attention
from hf_paged_kernels.attention import ops, reference
from hf_paged_kernels.attention.flash_backward_triton import flash_attention_backward_launch
from hf_paged_kernels.settings import AttentionSettings, BackwardSettings, choose_flash_backward_settings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PROFILE = settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate],  # shrinking costs minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
KEYS, QUERIES = AttentionSettings(16, 32, 4, 1), AttentionSettings(32, 16, 4, 1)
WAYS = {
    "pointers": BackwardSettings(KEYS, QUERIES, descriptors=False),
    "descriptors": BackwardSettings(KEYS, QUERIES, descriptors=True),
}
HEADS = st.sampled_from([(1, 1), (4, 1), (6, 3), (7, 1)])
DIMS = st.sampled_from([(16, 16), (24, 16), (32, 48), (20, 20), (80, 64)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
WINDOWS = st.sampled_from([(None, None), (None, 0), (0, 0), (5, 0), (40, 0), (3, 3), (None, 4), (2, None)])


def backward(way, *arguments):
    """The gradients that one implementation gives, with the settings of :data:`WAYS`; those of no sinks are empty."""
    if way == "reference":
        *grads, dsinks = reference.flash_attention_backward_reference(*arguments)
    else:
        *grads, dsinks = flash_attention_backward_launch(*arguments, WAYS[way])
    return *grads, torch.zeros(0) if dsinks is None else dsinks


def float64_gradients(q, k, v, sinks, dout, dlse, **options):
    """Of ``sum(out * dout) + sum(lse * dlse)`` for one sequence; a row without keys has no lse."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    sink = None if sinks is None else sinks.detach().double().cpu().requires_grad_()
    out, lse = softmax_attention(*leaves, sinks=sink, **options)
    loss = (out * dout.double().cpu()).sum() + sum(x.sum() for x in leaves) * 0.0
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * dlse.double().cpu()).sum()
    loss.backward()
    dsinks = torch.zeros(0) if sink is None or sink.grad is None else sink.grad
    return *(x.grad for x in leaves), dsinks


def assert_close(got, expected, tolerance, scale):
    """Relative to the largest of the gradients where one of them vanishes (a single key has dq = dk = 0)."""
    for name, a, b in zip(("dq", "dk", "dv", "dsinks"), got, expected):
        floor = scale * b.numel() ** 0.5
        difference = float((a.double().cpu() - b).norm())
        assert difference <= tolerance * max(float(b.norm()), floor), f"{name}: {difference} of {float(b.norm())}"


@pytest.mark.parametrize("way", ["reference", *WAYS])
@PROFILE
@given(
    data=st.data(), heads=HEADS, dims=DIMS, dtype=DTYPES, window=WINDOWS, softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(), has_dlse=st.booleans(),
)  # fmt: skip
def test_packed(way, poison, data, heads, dims, dtype, window, softcap, has_sinks, has_dlse):
    num_seqs = data.draw(st.integers(1, 3))
    q_lens = [data.draw(st.sampled_from([0, 1, 3, 33])) for _ in range(num_seqs)]
    k_lens = [data.draw(st.sampled_from([0, 1, 3, 31, 63])) for _ in range(num_seqs)]
    (hq, hk), scale = heads, dims[0] ** -0.5 * 1.3
    q = torch.randn(sum(q_lens), hq, dims[0], dtype=dtype, device=DEVICE)
    k = torch.randn(sum(k_lens), hk, dims[0], dtype=dtype, device=DEVICE)
    v = torch.randn(sum(k_lens), hk, dims[1], dtype=dtype, device=DEVICE)
    dout = torch.randn(sum(q_lens), hq, dims[1], dtype=dtype, device=DEVICE)
    dlse = torch.randn(hq, sum(q_lens), device=DEVICE) if has_dlse else None
    sinks = torch.randn(hq, device=DEVICE) if has_sinks else None
    cu_q, cu_k = prefix_sums(q_lens, DEVICE), prefix_sums(k_lens, DEVICE)
    rest = (*window, softcap, sinks, scale)
    out, lse = reference.flash_attention_reference(q, k, v, cu_q, cu_k, max(q_lens), *rest)
    dq, dk, dv, dsinks = backward(way, q, k, v, out, lse, dout, dlse, cu_q, cu_k, *rest)
    q_at = k_at = 0
    expected_dsinks = torch.zeros(hq if has_sinks else 0, dtype=torch.float64)
    for lq, lk in zip(q_lens, k_lens):
        rows, keys = slice(q_at, q_at + lq), slice(k_at, k_at + lk)
        expected = float64_gradients(
            q[rows], k[keys], v[keys], sinks, dout[rows], None if dlse is None else dlse[:, rows],
            left=window[0], right=window[1], softcap=softcap, scale=scale,
        )  # fmt: skip
        assert_close((dq[rows], dk[keys], dv[keys]), expected[:3], TOLERANCE[dtype], scale)
        if expected[3].numel():
            expected_dsinks += expected[3]
        q_at, k_at = rows.stop, keys.stop
    assert_close([dsinks], [expected_dsinks], 2 * TOLERANCE[dtype], 1.0)


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize(
    ("lq", "lk", "heads", "dims", "dtype", "window", "softcap", "has_sinks"),
    [
        (111, 111, (2, 2), (64, 64), torch.bfloat16, (None, 0), None, False),
        (63, 111, (2, 1), (32, 32), torch.float16, (None, 0), None, True),
        (63, 31, (7, 1), (16, 16), torch.float32, (None, 0), 4.0, False),  # the first queries see no key
        (65, 65, (4, 2), (128, 80), torch.bfloat16, (7, 0), None, True),
        (1, 63, (4, 4), (40, 64), torch.float32, (None, None), None, False),
        (3, 1, (1, 1), (256, 256), torch.float32, (None, None), None, False),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_dense_strided(way, poison, lq, lk, heads, dims, dtype, window, softcap, has_sinks):
    """Views of ``[B, H, L, D]``, as transformers hands them over; dout is one number, expanded."""
    (hq, hk), scale = heads, dims[0] ** -0.5
    q = torch.randn(2, hq, lq, dims[0], dtype=dtype, device=DEVICE).transpose(1, 2)
    k = torch.randn(2, hk, lk, dims[0], dtype=dtype, device=DEVICE).transpose(1, 2)
    v = torch.randn(2, hk, lk, dims[1], dtype=dtype, device=DEVICE).transpose(1, 2)
    sinks = torch.randn(hq, dtype=dtype, device=DEVICE) if has_sinks else None
    dout = torch.randn(2, lq, hq, 1, dtype=dtype, device=DEVICE).expand(-1, -1, -1, dims[1])
    rest = (*window, softcap, sinks, scale)
    out, lse = reference.flash_attention_reference(q, k, v, None, None, lq, *rest)
    got = backward(way, q, k, v, out, lse, dout, None, None, None, *rest)
    assert all(x.is_contiguous() for x in got)
    options = dict(left=window[0], right=window[1], softcap=softcap, scale=scale)
    expected = [float64_gradients(q[b], k[b], v[b], sinks, dout[b], None, **options) for b in range(2)]
    for b in range(2):
        assert_close([x[b] for x in got[:3]], expected[b][:3], TOLERANCE[dtype], scale)
    if has_sinks:
        assert_close([got[3]], [expected[0][3] + expected[1][3]], 2 * TOLERANCE[dtype], 1.0)


@pytest.mark.parametrize("way", ["reference", "pointers"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_of_sinks_are_rounded_once(way, packed, poison):
    """Sums over all rows of all sequences, of one sign and of both, in float32; bfloat16 is only what sinks get."""
    scale = 0.2
    q, dout = (torch.randn(222, 4, 32, device=DEVICE).bfloat16() for _ in "ab")
    k, v = (torch.randn(222, 2, 32, device=DEVICE).bfloat16() for _ in "ab")
    # Of half of the heads: all terms have one sign, and the sum is large beside each of them.
    v[:, 0] += 1
    dout[:, :2] += 1
    sinks = torch.randn(4, device=DEVICE).bfloat16() + 1
    cu = prefix_sums([111, 111], DEVICE) if packed else None
    inputs = (q, k, v) if packed else [x.unflatten(0, (2, 111)) for x in (q, k, v)]
    grad = dout if packed else dout.unflatten(0, (2, 111))
    rest = (None, 0, None, sinks, scale)
    out, lse = reference.flash_attention_reference(*inputs, cu, cu, 111, *rest)
    *_, got = backward(way, *inputs, out, lse, grad, None, cu, cu, *rest)
    assert got.dtype == torch.float32
    expected = torch.zeros(4, dtype=torch.float64)
    terms = torch.zeros(4, dtype=torch.float64)
    for rows in (slice(0, 111), slice(111, 222)):
        attended, lse = softmax_attention(
            q[rows], k[rows], v[rows], left=None, right=0, softcap=None, sinks=sinks, scale=scale
        )
        of_rows = -torch.exp(sinks.double().cpu() - lse.T) * (attended * dout[rows].double().cpu()).sum(-1)
        expected, terms = expected + of_rows.sum(0), terms + of_rows.abs().sum(0)
    noise = 2.0**-19 * terms
    rounded = got.cpu().bfloat16().double()
    half_ulp = torch.exp2(expected.abs().log2().floor() - 8)
    assert ((got.cpu() - expected).abs() <= noise).all()
    assert ((rounded - expected).abs() <= half_ulp + noise).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_every_time(way):
    """Also where PyTorch is told to allow nothing else."""
    q = torch.randn(1, 63, 2, 32, dtype=torch.float16, device=DEVICE)
    k = torch.randn(1, 63, 1, 32, dtype=torch.float16, device=DEVICE)
    sinks = torch.randn(2, device=DEVICE)
    out, lse = reference.flash_attention_reference(q, k, k, None, None, 63, None, 0, None, sinks, 0.2)
    arguments = (q, k, k, out, lse, torch.randn_like(out), None, None, None, None, 0, None, sinks, 0.2)
    first = backward(way, *arguments)
    torch.use_deterministic_algorithms(True)
    try:
        again = backward(way, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_does_not_see_the_numbers_of_its_neighbours(way, poison):
    """NaN in one packed sequence stays there."""
    q = torch.randn(60, 2, 16, device=DEVICE)
    dout = torch.randn(60, 2, 16, device=DEVICE)
    cu = prefix_sums([33, 27], DEVICE)
    rest = (None, 0, None, None, 0.2)
    out, lse = reference.flash_attention_reference(q, q, q, cu, cu, 33, *rest)
    alone = backward(way, q, q, q, out, lse, dout, None, cu, cu, *rest)
    q[33:] = dout[33:] = out[33:] = lse[:, 33:] = float("nan")
    for a, b in zip(alone[:3], backward(way, q, q, q, out, lse, dout, None, cu, cu, *rest)):
        assert torch.allclose(a[:33], b[:33], atol=1e-6)


# The public function


def test_gradients_of_the_public_function(poison):
    """Every differentiable argument at once, lse included; sinks keep their dtype."""
    q, k, v = (torch.randn(1, n, h, 16, device=DEVICE, requires_grad=True) for n, h in ((9, 4), (13, 2), (13, 2)))
    sinks = torch.randn(4, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dout, dlse = torch.randn(1, 9, 4, 16, device=DEVICE), torch.randn(1, 4, 9, device=DEVICE)
    out, lse = kernels.flash_attention(q, k, v, causal=True, window=5, softcap=3.0, sinks=sinks, return_lse=True)
    ((out * dout).sum() + (lse * dlse).sum()).backward()
    expected = float64_gradients(
        q[0], k[0], v[0], sinks, dout[0], dlse[0], left=4, right=0, softcap=3.0, scale=16**-0.5
    )
    assert sinks.grad.dtype == torch.bfloat16
    assert error(sinks.grad, expected[3]) <= TOLERANCE[torch.bfloat16]
    for x, y in zip((q, k, v), expected):
        assert error(x.grad[0], y) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_of_the_results_is_enough(used):
    q = torch.randn(5, 2, 16, device=DEVICE, requires_grad=True)
    out, lse = kernels.flash_attention(q, q, q, cu_seqlens_q=prefix_sums([2, 3], DEVICE), return_lse=True)
    (out if used == "out" else lse).sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad.norm() > 0


def test_no_tokens_have_no_gradients():
    q = torch.randn(1, 3, 2, 16, device=DEVICE, requires_grad=True)
    sinks = torch.randn(2, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 0, 2, 16, device=DEVICE, requires_grad=True)
    out, lse = kernels.flash_attention(q, k, k, sinks=sinks, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert not q.grad.any()
    assert k.grad.shape == k.shape
    assert torch.equal(sinks.grad, torch.full((2,), 3.0, device=DEVICE))


def test_opcheck():
    """Schema, fake implementation, and autograd registration, which AOT dispatch goes through."""
    q, k = (torch.randn(2, n, h, 16, device=DEVICE, requires_grad=True) for n, h in ((3, 4), (5, 2)))
    torch.library.opcheck(ops.flash_attention_op.op, (q, k, k, None, None, 3, None, 0, None, None, 0.25))
    cu, sinks = prefix_sums([2, 4], DEVICE), torch.randn(4, device=DEVICE, requires_grad=True)
    packed = torch.randn(6, 4, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.flash_attention_op.op, (packed, packed, packed, cu, cu, 4, 2, 0, 5.0, sinks, 0.25))
    packed, sinks = packed.detach(), sinks.detach()
    lse = torch.randn(4, 6, device=DEVICE)
    torch.library.opcheck(
        ops.flash_attention_backward_op.op,
        (packed, packed, packed, packed, lse, packed, lse, cu, cu, 2, 0, 5.0, sinks, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiled_training_step():
    def loss(q, k):
        return kernels.flash_attention(q, k, k, causal=True).square().sum()

    q, k = (torch.randn(1, 7, h, 16, device=DEVICE, requires_grad=True) for h in (4, 2))
    expected = torch.autograd.grad(loss(q, k), (q, k))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k), (q, k))
    assert all(torch.allclose(a, b) for a, b in zip(got, expected))


def test_settings_are_powers_of_two_and_fit():
    for head_dim in (16, 64, 80, 128, 192, 256, 512):
        for element_size in (2, 4):
            for kib, hopper in ((227, True), (163, False), (99, False), (64, False)):
                s = choose_flash_backward_settings(head_dim, element_size, kib * 1024, hopper)
                for tile in (s.keys, s.queries):
                    assert tile.block_m & (tile.block_m - 1) == tile.block_n & (tile.block_n - 1) == 0
                    assert min(tile.block_m, tile.block_n) >= 16
                if element_size == 4:
                    continue  # These dots keep their operands in registers.
                # In shared memory: the two tiles of the program, and in every stage the two of the loop.
                rows = max(s.keys.block_n + s.keys.num_stages * s.keys.block_m,
                           s.queries.block_m + s.queries.num_stages * s.queries.block_n)  # fmt: skip
                assert 2 * rows * (1 << (head_dim - 1).bit_length()) * element_size <= kib * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_no_worse_than_twice_the_error_of_sdpa(poison, dtype, dims, causal):
    q = torch.randn(1, 777, 8, dims[0], dtype=dtype, device="cuda", requires_grad=True)
    k = torch.randn(1, 1111, 2, dims[0], dtype=dtype, device="cuda", requires_grad=True)
    v = torch.randn(1, 1111, 2, dims[1], dtype=dtype, device="cuda", requires_grad=True)
    dout = torch.randn(1, 777, 8, dims[1], dtype=dtype, device="cuda")
    mask = torch.ones(777, 1111, dtype=torch.bool, device="cuda")
    mask = mask.tril(1111 - 777) if causal else mask

    def sdpa(x):
        heads = (y.transpose(1, 2) for y in x)
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    inputs = (q, k, v)
    ours = kernels.flash_attention(*inputs, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(sdpa(exact), exact, dout.double())
    peer = torch.autograd.grad(sdpa(inputs), inputs, dout)
    for got, theirs, right in zip(torch.autograd.grad(ours, inputs, dout), peer, expected):
        assert error(got, right) <= 2 * error(theirs, right)
