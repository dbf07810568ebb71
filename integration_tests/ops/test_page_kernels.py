"""write_pages, copy_pages and merge_attention_states: kernels and references against loops and float64."""


import pytest
import torch
from helpers import DEVICE, TOLERANCE, error, softmax_attention
from hf_paged_kernels.attention import reference
from hf_paged_kernels.attention.merge_states_triton import merge_attention_states_launch
from hf_paged_kernels.attention.pages_triton import copy_pages_launch, write_pages_launch

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])


def pool(num_pages, heads, page_size, dim, dtype, layout):
    shape = (num_pages, heads, page_size, dim) if layout == "page-head" else (num_pages, page_size, heads, dim)
    pages = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    return pages if layout == "page-head" else pages.transpose(1, 2)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["page-head", "slot-head"])
@pytest.mark.parametrize(("page_size", "dims"), [(8, (16, 16)), (16, (80, 96)), (64, (192, 128)), (256, (24, 20))])
def test_write_pages(triton, dtype, layout, page_size, dims):
    tokens, heads, num_pages = 37, 3, 7
    k_pages = pool(num_pages, heads, page_size, dims[0], dtype, layout)
    v_pages = pool(num_pages, heads, page_size, dims[1], dtype, layout)
    slots = torch.randperm(num_pages * page_size)[:tokens]
    slots[[0, 5, 36]] = -1
    # Views of [heads, tokens, dim] memory, as a model hands them over.
    k = torch.randn(heads, tokens, dims[0], dtype=dtype, device=DEVICE).transpose(0, 1)
    v = torch.randn(heads, tokens, dims[1], dtype=dtype, device=DEVICE).transpose(0, 1)
    run = write_pages_launch if triton else reference.write_pages_reference
    run(k, v, k_pages, v_pages, slots.to(DEVICE))
    written = 0
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        written += 1
        assert torch.equal(k_pages[slot // page_size, :, slot % page_size], k[token])
        assert torch.equal(v_pages[slot // page_size, :, slot % page_size], v[token])
    # Every other slot is still poison.
    assert int((~k_pages.isnan()).any(-1).any(1).sum()) == written
    assert int((~v_pages.isnan()).any(-1).any(1).sum()) == written


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["page-head", "slot-head"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_copy_pages(triton, dtype, layout, index_dtype):
    k_pages = pool(9, 2, 8, 48, dtype, layout).normal_()
    v_pages = pool(9, 2, 8, 20, dtype, layout).normal_()
    before = k_pages.clone(), v_pages.clone()
    source = torch.tensor([3, 3, 0], dtype=index_dtype, device=DEVICE)
    target = torch.tensor([5, 8, 1], dtype=index_dtype, device=DEVICE)
    (copy_pages_launch if triton else reference.copy_pages_reference)(k_pages, v_pages, source, target)
    for pages, old in zip((k_pages, v_pages), before):
        expected = old.clone()
        for a, b in zip(source.tolist(), target.tolist()):
            expected[b] = old[a]
        assert torch.equal(pages, expected)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v_dim", [16, 80])
def test_merge_attention_states(triton, poison, dtype, v_dim):
    """Attention over two halves of the keys, merged, is attention over all of them."""
    q = torch.randn(5, 4, 32, dtype=dtype)
    k, v = torch.randn(40, 2, 32, dtype=dtype), torch.randn(40, 2, v_dim, dtype=dtype)
    options = {"left": None, "right": None, "softcap": None, "sinks": None, "scale": 0.3}
    expected, expected_lse = softmax_attention(q, k, v, **options)
    parts = [softmax_attention(q, k[part], v[part], **options) for part in (slice(0, 13), slice(13, 40))]
    states = [x for out, lse in parts for x in (out.to(dtype).to(DEVICE), lse.float().to(DEVICE))]
    run = merge_attention_states_launch if triton else reference.merge_attention_states_reference
    out, lse = run(*states)
    assert error(out, expected) <= TOLERANCE[dtype]
    assert torch.allclose(lse.double().cpu(), expected_lse, atol=1e-5, rtol=0)


@both
def test_merge_with_a_side_without_keys(triton, poison):
    """A side with lse -inf may hold NaN; two such sides give zeros and -inf."""
    out_a = torch.randn(2, 1, 16, device=DEVICE)
    nothing = torch.full((2, 1, 16), float("nan"), device=DEVICE)
    lse_a = torch.tensor([[0.5, float("-inf")]], device=DEVICE)
    lse_b = torch.full((1, 2), float("-inf"), device=DEVICE)
    out_a[1] = float("nan")
    run = merge_attention_states_launch if triton else reference.merge_attention_states_reference
    out, lse = run(out_a, lse_a, nothing, lse_b)
    assert torch.allclose(out[0], out_a[0])
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert lse.tolist() == [[0.5, float("-inf")]]
