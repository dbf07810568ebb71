"""rotary_write: kernel and reference against a loop in float64 over heads and pairs, and against transformers."""


import pytest
import torch
from helpers import DEVICE, TOLERANCE, error, held_keys
from hf_paged_kernels.attention.pages_triton import write_pages_launch
from hf_paged_kernels.attention.reference import write_pages_reference
from hf_paged_kernels.layers.ops import (
    decode_inputs_op,
    decode_rows_op,
    gated_activation_op,
    rms_norm_op,
    rotary_write_op,
)
from hf_paged_kernels.layers.reference import rotary_write_reference
from hf_paged_kernels.layers.rotary_write_triton import rotary_write_launch
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
TOKENS = 5
SLOTS = [9, -1, 3, 16, 31]


def packed_qkv(num_q, num_kv, dim, v_dim, dtype):
    """Views of one matrix, as a packed projection leaves them; its last columns are NaN."""
    widths = [num_q * dim, num_kv * dim, num_kv * v_dim, 8]
    matrix = torch.randn(TOKENS, sum(widths), device=DEVICE).to(dtype)
    matrix[:, -8:] = float("nan")
    q, k, v, _ = matrix.split(widths, -1)
    return q.view(TOKENS, num_q, dim), k.view(TOKENS, num_kv, dim), v.view(TOKENS, num_kv, v_dim)


def pool(heads, page_size, dim, dtype, layout="page-head"):
    """Pages for 32 slots, every byte of which is poison."""
    middle = (heads, page_size) if layout == "page-head" else (page_size, heads)
    pages = torch.full((32 // page_size, *middle, dim * dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(
        dtype
    )
    return pages if layout == "page-head" else pages.transpose(1, 2)


def angles(half, dtype):
    angle = torch.rand(TOKENS, half, dtype=torch.float64) * 6
    return (1.1 * angle.cos()).to(dtype).to(DEVICE), (1.1 * angle.sin()).to(dtype).to(DEVICE)


def expected_heads(x, cos, sin, interleaved, weight, eps, offset):
    """Float64: pair by pair."""
    x, cos, sin = (t.double().cpu() for t in (x, cos, sin))
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double().cpu() + offset)
    out = x.clone()
    half = cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        c, s = cos[:, i : i + 1], sin[:, i : i + 1]
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
    return out


def as_queries(k, num_q):
    """Keys, repeated to as many heads as there are queries: the kernel's tiles, and so its sums, stay the same."""
    return k.repeat(1, -(-num_q // k.shape[1]), 1)[:, :num_q]


def at_slots(pages, page_size):
    """``[tokens written, heads, dim]``."""
    return torch.stack([pages[slot // page_size, :, slot % page_size] for slot in SLOTS if slot >= 0])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)], ids=["plain", "qwen", "gemma"])
@pytest.mark.parametrize(
    ("heads", "dims", "half", "page_size"),
    [((4, 2), (16, 16), 8, 8), ((7, 1), (80, 64), 10, 16), ((3, 3), (24, 40), 12, 4)],
    ids=["gqa", "partial-rotary", "odd"],
)
def test_rotary_write(triton, poison, dtype, interleaved, norm, heads, dims, half, page_size):
    q, k, v = packed_qkv(*heads, *dims, dtype)
    cos, sin = angles(half, dtype)
    weights = [None, None] if norm is None else [torch.rand(dims[0], device=DEVICE).to(dtype) for _ in range(2)]
    offset, round_first = norm or (0.0, True)
    k_pages, v_pages = (pool(heads[1], page_size, dim, dtype, "slot-head") for dim in dims)
    before = k_pages.clone(), v_pages.clone()
    run = rotary_write_launch if triton else rotary_write_reference
    slots = torch.tensor(SLOTS, device=DEVICE)
    out = run(
        q, k, v, cos, sin, interleaved, *weights, 1e-5, offset, round_first, k_pages, v_pages, None, None, slots
    )  # fmt: skip
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert error(out, expected_heads(q, cos, sin, interleaved, weights[0], 1e-5, offset)) <= TOLERANCE[dtype]
    written = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    expected = expected_heads(k, cos, sin, interleaved, weights[1], 1e-5, offset)[written]
    assert error(at_slots(k_pages, page_size), expected) <= TOLERANCE[dtype]
    assert torch.equal(at_slots(v_pages, page_size), v[written])
    # Every other slot is as it was.
    for pages, old in zip((k_pages, v_pages), before):
        for slot in set(range(32)) - set(SLOTS):
            new, was = (x[slot // page_size, :, slot % page_size].contiguous() for x in (pages, old))
            assert torch.equal(new.view(torch.uint8), was.view(torch.uint8))


@both
@pytest.mark.parametrize("pages_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("half", "interleaved"), [(8, False), (6, False), (8, True), (6, True)])
def test_quantised_pages(triton, poison, pages_dtype, dtype, half, interleaved):
    """Pages and scales are those of write_pages on the same rotated keys."""
    q, k, v = packed_qkv(4, 2, 16, 24, dtype)
    k[0, 1], v[2, 0] = 0.0, 0.0
    cos, sin = angles(half, torch.float32)
    weight = torch.rand(16, device=DEVICE).to(dtype)
    slots = torch.tensor(SLOTS, device=DEVICE)
    pages, plain = ([pool(2, 8, 16, pages_dtype), pool(2, 8, 24, pages_dtype)] for _ in range(2))
    scales, plain_scales = ([torch.full((4, 2, 8), float("nan"), device=DEVICE) for _ in range(2)] for _ in range(2))
    arguments = (cos, sin, interleaved, weight, weight, 1e-5, 0.0, True)
    run = rotary_write_launch if triton else rotary_write_reference
    out = run(q, k, v, *arguments, *pages, *scales, slots)
    # The keys as a query of the same numbers comes back, then the plain way into pages.
    spare = [pool(2, 8, dim, dtype) for dim in (16, 24)]
    turned = run(as_queries(k, 4), k, v, *arguments, *spare, None, None, slots)[:, :2]
    (write_pages_launch if triton else write_pages_reference)(turned, v, *plain, slots, *plain_scales)
    for new, old, scale, old_scale in zip(pages, plain, scales, plain_scales):
        assert torch.equal(new.view(torch.uint8), old.view(torch.uint8))
        assert torch.equal(scale.nan_to_num(-1.0), old_scale.nan_to_num(-1.0))
    written = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    assert error(out, expected_heads(q, cos, sin, interleaved, weight, 1e-5, 0.0)) <= TOLERANCE[dtype]
    stored = held_keys(at_slots(pages[0], 8), at_slots(scales[0][..., None], 8)[..., 0])
    bound = 0.05 if pages_dtype == torch.float8_e4m3fn else 0.02
    assert error(stored, expected_heads(k, cos, sin, interleaved, weight, 1e-5, 0.0)[written]) <= bound


def llama_angles(half):
    angle = torch.rand(1, TOKENS, half) * 6
    return torch.cat([angle, angle], -1)


@both
@pytest.mark.parametrize("family", ["llama", "cohere", "glm", "gpt_oss"])
def test_the_rotations_of_transformers(triton, poison, family):
    """Each family's own cos and sin, in the views that the op's docstring names."""
    q, k, v = packed_qkv(4, 2, 32, 32, torch.float32)
    half = 8 if family == "glm" else 16
    angle = llama_angles(half)
    module, columns, interleaved = {
        "llama": (modeling_llama, slice(0, half), False),
        "cohere": (modeling_cohere, slice(0, None, 2), True),
        "glm": (modeling_glm, slice(0, half), True),
        "gpt_oss": (modeling_gpt_oss, slice(None), False),
    }[family]
    if family == "cohere":
        angle = angle[..., :half].repeat_interleave(2, -1)
    if family == "gpt_oss":
        angle = angle[..., :half]
    cos, sin = angle.cos(), angle.sin()
    heads_first = (x.cpu().transpose(0, 1)[None] for x in (q, k))
    expected_q, expected_k = (x[0].transpose(0, 1) for x in module.apply_rotary_pos_emb(*heads_first, cos, sin))
    cos, sin = (x[0, :, columns].to(DEVICE) for x in (cos, sin))
    k_pages, v_pages = pool(2, 8, 32, torch.float32), pool(2, 8, 32, torch.float32)
    slots = torch.arange(TOKENS, device=DEVICE)
    run = rotary_write_launch if triton else rotary_write_reference
    out = run(q, k, v, cos, sin, interleaved, None, None, 0.0, 0.0, True, k_pages, v_pages, None, None, slots)
    assert error(out, expected_q) <= TOLERANCE[torch.float32]
    assert error(k_pages[0, :, :TOKENS].transpose(0, 1), expected_k) <= TOLERANCE[torch.float32]


@both
def test_a_norm_of_qwen3_before_the_rotation(triton, poison):
    """One without the other, and no rotation at all where sin is 0: what is left is the module's norm."""
    q, k, v = packed_qkv(3, 1, 16, 16, torch.bfloat16)
    norm = Qwen3RMSNorm(16, eps=1e-5).bfloat16().to(DEVICE)
    torch.nn.init.uniform_(norm.weight)
    cos, sin = torch.ones(1, 8, device=DEVICE).expand(TOKENS, 8), torch.zeros(1, 8, device=DEVICE).expand(TOKENS, 8)
    k_pages, v_pages = pool(1, 8, 16, torch.bfloat16), pool(1, 8, 16, torch.bfloat16)
    slots = torch.arange(TOKENS, device=DEVICE)
    run = rotary_write_launch if triton else rotary_write_reference
    with torch.no_grad():
        out = run(
            q, k, v, cos, sin, False, norm.weight, None, 1e-5, 0.0, True, k_pages, v_pages, None, None, slots
        )  # fmt: skip
        assert error(out, norm(q)) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(k_pages[0, :, :TOKENS].transpose(0, 1), k)


@both
def test_no_tokens(triton):
    q, k, v = (x[:0] for x in packed_qkv(4, 2, 16, 16, torch.float32))
    cos, sin = (x[:0] for x in angles(8, torch.float32))
    k_pages, v_pages = pool(2, 8, 16, torch.float32), pool(2, 8, 16, torch.float32)
    run = rotary_write_launch if triton else rotary_write_reference
    slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = run(q, k, v, cos, sin, False, None, None, 0.0, 0.0, True, k_pages, v_pages, None, None, slots)
    assert out.shape == (0, 4, 16)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_op(quantised):
    q, k, v = packed_qkv(4, 2, 16, 16, torch.float32)
    cos, sin = angles(8, torch.float32)
    dtype = torch.int8 if quantised else torch.float32
    pages = [torch.zeros(4, 2, 8, 16, dtype=dtype, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(4, 2, 8, device=DEVICE) for _ in range(2)] if quantised else [None, None]
    slots = torch.tensor(SLOTS, device=DEVICE)
    torch.library.opcheck(
        rotary_write_op.op, (q, k, v, cos, sin, False, None, None, 0.0, 0.0, True, *pages, *scales, slots)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pages_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("heads", "dim", "half"), [((16, 8), 128, 64), ((7, 1), 80, 20)], ids=["qwen", "partial"])
def test_on_a_gpu_as_the_reference(pages_dtype, interleaved, heads, dim, half):
    """The shapes of models and BF16; pages bit by bit those of write_pages of the keys as they come back as queries."""
    tokens, dtype, quantised = 1000, torch.bfloat16, pages_dtype != torch.bfloat16
    widths = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
    packed = torch.randn(tokens, sum(widths), device=DEVICE).to(dtype).split(widths, -1)
    q, k, v = (x.view(tokens, -1, dim) for x in packed)
    angle = torch.rand(tokens, half, device=DEVICE) * 6
    weight = torch.rand(dim, device=DEVICE).to(dtype)
    slots = torch.randperm(1024, device=DEVICE)[:tokens]
    slots[::9] = -1
    arguments = (angle.cos(), angle.sin(), interleaved, weight, weight, 1e-5, 0.0, True)

    def empty(dtype):
        rows = (64, heads[1], 16)
        pages = [torch.zeros(*rows, dim * dtype.itemsize, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        scales = [torch.zeros(rows, device=DEVICE) if quantised else None for _ in range(2)]
        return [x.view(dtype) for x in pages], scales

    (pages, scales), (plain, plain_scales), (spare, _) = empty(pages_dtype), empty(pages_dtype), empty(dtype)
    out = rotary_write_op(q, k, v, *arguments, *pages, *scales, slots)
    turned = rotary_write_op(as_queries(k, heads[0]), k, v, *arguments, *spare, None, None, slots)[:, : heads[1]]
    write_pages_launch(turned, v, *plain, slots, *plain_scales)
    for new, old in zip(pages, plain):
        assert torch.equal(new.view(torch.uint8), old.view(torch.uint8))
    if quantised:
        assert all(torch.equal(new, old) for new, old in zip(scales, plain_scales))
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in (q, k, v, *arguments, *spare, None, None, slots)]
    assert error(out, rotary_write_reference(*on_cpu)) <= 1e-4


@pytest.mark.gpu
def test_one_compilation_whatever_the_lengths(monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs["fn"].name)
    )
    weight = torch.rand(768, device=DEVICE)
    table = torch.zeros(601, 64, dtype=torch.int32, device=DEVICE)
    for tokens in (1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 48, 64, 100, 128, 129, 255, 256, 300, 512, 600):
        x = torch.randn(tokens, 768, device=DEVICE)
        rms_norm_op(x, weight, 1e-6, 0.0, True, x)
        gated_activation_op(x, "silu", "gate_up")
        q, k, v = (part.view(tokens, -1, 64) for part in x.split([512, 128, 128], -1))
        cos = torch.rand(1, tokens, 64, device=DEVICE)[0, :, :32]
        pages = [torch.zeros(64, 2, 16, 64, device=DEVICE) for _ in range(2)]
        slots = torch.arange(tokens, device=DEVICE)
        rotary_write_op(q, k, v, cos, cos, False, None, None, 0.0, 0.0, True, *pages, None, None, slots)
        computed = torch.arange(601, device=DEVICE)
        _, _, seq_lens = decode_inputs_op(slots, computed, torch.arange(601, device=DEVICE))
        decode_rows_op(slots, seq_lens, table, 16)
    for name in set(compiled):
        assert compiled.count(name) == 1, name
    assert len(compiled) <= 5
