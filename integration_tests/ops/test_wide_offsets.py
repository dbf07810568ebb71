"""Elements that lie more than 2^31 apart, and grids with more sequences than a GPU takes along one axis."""

import mmap

import hf_paged_kernels as kernels
import pytest
import torch

pytest.importorskip("triton")

from helpers import DEVICE, prefix_sums
from hf_paged_kernels.attention import flash_backward_triton, flash_forward_triton
from hf_paged_kernels.attention.flash_backward_triton import flash_attention_backward_launch
from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch
from hf_paged_kernels.attention.merge_states_triton import merge_attention_states_launch
from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch
from hf_paged_kernels.attention.paged_triton import paged_attention_launch
from hf_paged_kernels.attention.pages_triton import copy_pages_launch, write_pages_launch
from hf_paged_kernels.attention.reference import quantize
from hf_paged_kernels.backend import MAX_GRID
from hf_paged_kernels.layers.rotary_write_triton import rotary_write_launch
from hf_paged_kernels.sampling.choose_triton import sample_tokens_launch

D, LIMIT = 16, 2**31
"""Head dim; elements that int32 cannot count, from the first to the last and before the first: where offsets that have
wrapped around point at."""


@pytest.fixture(scope="module")
def memory():
    """Bytes by the gigabyte, of which only those that are touched take memory."""
    size = 2 * (2 * LIMIT + 2**20)
    if DEVICE == "cuda":
        return torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    reserve_nothing = 0x4000  # MAP_NORESERVE
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return torch.frombuffer(space, dtype=torch.uint8)


def far(memory, x, dim):
    """The same numbers, the last along ``dim`` more than LIMIT elements behind the first; a stride fits into int32."""
    strides = list(x.stride())
    strides[dim] = (LIMIT // (x.shape[dim] - 1) // 16 + 1) * 16
    view = memory.view(x.dtype).as_strided(x.shape, strides, LIMIT)
    view.copy_(x)
    return view


def new(*shape, dtype=torch.float16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dim", [1, 2], ids=["token", "head"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_flash_attention(memory, which, dim):
    tensors = {name: new(1, 3, 3, D) for name in "qkv"}
    rest = (None, None, 3, None, 0, None, None, 0.25)
    expected = flash_attention_launch(*tensors.values(), *rest)
    grads = (*tensors.values(), *expected, new(1, 3, 3, D), None, None, None, None, 0, None, None, 0.25)
    expected_grads = flash_attention_backward_launch(*grads)[:3]
    tensors[which] = far(memory, tensors[which], dim)
    for got, want in zip(flash_attention_launch(*tensors.values(), *rest), expected):
        assert torch.equal(got, want)
    for got, want in zip(flash_attention_backward_launch(*tensors.values(), *grads[3:]), expected_grads):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dim", ["token", "head"])
def test_gradient_of_the_result(memory, dim):
    q, out, dout, lse = new(1, 3, 3, D), new(1, 3, 3, D), new(1, 3, 3, D), torch.randn(1, 3, 3, device=DEVICE)
    rest = (None, None, None, None, 0, None, None, 0.25)
    expected = flash_attention_backward_launch(q, q, q, out, lse, dout, *rest)[:3]
    dout = far(memory, dout, 1 if dim == "token" else 2)
    for got, want in zip(flash_attention_backward_launch(q, q, q, out, lse, dout, *rest), expected):
        assert torch.equal(got, want)


def paged_step(query_len):
    pages = [new(3, 3, 8, D) for _ in "kv"]
    return [new(query_len, 3, D), *pages, int32([2, 0]), int32(13), prefix_sums([query_len], DEVICE), query_len]


PAGED = {"q token": (0, 0), "q head": (0, 1), "page": (1, 0), "k head": (1, 1), "v head": (2, 1), "slot": (2, 2)}


@pytest.mark.parametrize("query_len", [3, 13], ids=["short", "long"])
@pytest.mark.parametrize("which", PAGED)
def test_paged_attention(memory, which, query_len):
    step, rest = paged_step(query_len), (None, 0, None, None, 0.25)
    expected = paged_attention_launch(*step, *rest)
    place, dim = PAGED[which]
    step[place] = far(memory, step[place], dim)
    for got, want in zip(paged_attention_launch(*step, *rest), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize("query_len", [3, 13], ids=["short", "long"])
@pytest.mark.parametrize("which", PAGED)
def test_quantised_paged_attention(memory, which, query_len):
    step, rest = paged_step(query_len), (None, 0, None, None, 0.25)
    (step[1], k_scale), (step[2], v_scale) = (quantize(x, torch.int8) for x in step[1:3])
    expected = quantized_paged_attention_launch(*step, *rest, k_scale, v_scale)
    place, dim = PAGED[which]
    step[place] = far(memory, step[place], dim)
    for got, want in zip(quantized_paged_attention_launch(*step, *rest, k_scale, v_scale), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("place", "dim"), [(0, 0), (0, 1), (2, 0), (2, 1)], ids=["token", "head", "page", "page head"])
def test_writes_and_copies_of_pages(memory, place, dim):
    slots = torch.tensor([1, 17, 9], device=DEVICE)
    plain = [new(3, 3, D), new(3, 3, D), *(torch.zeros(3, 3, 8, D, dtype=torch.float16, device=DEVICE) for _ in "kv")]
    arguments = [x.clone() for x in plain]
    arguments[place] = far(memory, arguments[place], dim)
    for tensors in (plain, arguments):
        write_pages_launch(*tensors, slots)
        copy_pages_launch(*tensors[2:], int32(2), int32(1))
    assert torch.equal(arguments[2], plain[2])
    assert torch.equal(arguments[3], plain[3])


@pytest.mark.parametrize("place", [0, 1, 2, 11, 12], ids=["q", "k", "v", "k_pages", "v_pages"])
def test_rotary_write(memory, place):
    angles, slots = new(3, D // 2), torch.tensor([1, 17, 9], device=DEVICE)
    pages = [torch.zeros(3, 3, 8, D, dtype=torch.float16, device=DEVICE) for _ in "kv"]
    plain = [*(new(3, 3, D) for _ in "qkv"), angles, angles, False, None, None, 1e-6, 0.0, True, *pages]
    arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in plain]
    arguments[place] = far(memory, arguments[place], 1)
    results = [rotary_write_launch(*tensors, None, None, slots) for tensors in (plain, arguments)]
    assert torch.equal(*results)
    assert torch.equal(arguments[11], plain[11])
    assert torch.equal(arguments[12], plain[12])


def test_merge_attention_states(memory):
    out, lse = new(3, 3, D), torch.randn(3, 3, device=DEVICE)
    expected = merge_attention_states_launch(out, lse, out, lse)
    got = merge_attention_states_launch(far(memory, out, 1), lse, out, lse)
    assert torch.equal(got[0], expected[0])


def test_more_sequences_than_a_grid_takes(monkeypatch):
    for module in (flash_forward_triton, flash_backward_triton):
        monkeypatch.setattr(module, "MAX_GRID", 2)
    q = [new(5, 3, 2, D, dtype=torch.float32) for _ in range(4)]
    out, lse = flash_attention_launch(*q[:3], None, None, 3, None, 0, None, None, 0.25)
    grads = flash_attention_backward_launch(*q[:3], out, lse, q[3], None, None, None, None, 0, None, None, 0.25)
    packed, cu = [x.flatten(0, 1) for x in q], prefix_sums([3] * 5, DEVICE)
    varlen = flash_attention_launch(*packed[:3], cu, cu, 3, None, 0, None, None, 0.25)
    assert torch.allclose(varlen[0].view_as(out), out, atol=1e-6)
    for i in range(5):
        one = [x[i : i + 1] for x in q]
        alone, alone_lse = flash_attention_launch(*one[:3], None, None, 3, None, 0, None, None, 0.25)
        assert torch.equal(alone[0], out[i])
        rest = (alone, alone_lse, one[3], None, None, None, None, 0, None, None, 0.25)
        for got, want in zip(grads[:3], flash_attention_backward_launch(*one[:3], *rest)):
            assert torch.equal(got[i], want[0])


def test_more_heads_or_rows_than_a_grid_takes_are_refused():
    many = MAX_GRID + 1
    with pytest.raises(ValueError, match=r"query heads must be at most 65535, got 65536"):
        kernels.flash_attention(new(1, 1, many, 1), new(1, 1, 1, 1), new(1, 1, 1, 1))
    pages = new(1, many, 8, 1)
    with pytest.raises(ValueError, match=r"key/value heads must be at most 65535, got 65536"):
        kernels.copy_pages(pages, pages, int32(0), int32(0))
    rows = torch.zeros(many, device=DEVICE, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 65535 rows in one call, got 65536"):
        sample_tokens_launch(rows[:, None].half(), *[rows] * 8, rows[:, None])
    step = paged_step(1)
    step[3] = step[3].new_zeros(1, 2**23)
    with pytest.raises(ValueError, match="page_table has room for 67108864 tokens of a sequence"):
        paged_attention_launch(*step, None, 0, None, None, 0.25)
