"""Writing new keys and values into pages, and copying whole pages, in Triton.

With scales, pages are FP8 (e4m3) or INT8 and each (token, head) has a scale of its own:

    scale = max(abs(x)) / largest,    page = round(x / scale),    x = page * scale        largest: 448 or 127

INT8 pages hold keys rotated, in runs of R channels, R the largest power of two that divides the head dim:

    k' = k H / sqrt(R)     H: the Hadamard matrix, of +1 and -1        q' . k' = q . k, for q rotated alike

A few channels of keys are often many times larger than the others and would alone choose the scale of a token; rotated
they are spread over all of its channels (Ashkboos et al. 2024, "QuaRot"; Liu et al. 2024, "SpinQuant"). Values have no
such channels, and FP8 numbers, whose steps grow with their size, lose by it: those are not rotated. The product is
taken in float32, by the fast Walsh-Hadamard transform.

Where x has a NaN or an infinity its scale is NaN: pages have no infinity, and INT8 no NaN.

A token's slot is ``page * page_size + offset``; slot -1 is not written. Pages are addressed by strides, so
``[page, head, slot, dim]`` and ``[page, slot, head, dim]`` memory both work.
"""

import torch
import triton
import triton.language as tl

from ..backend import device_guard, layout, scale_strides
from ..launch_triton import Launch, Launches, launch
from ..settings import LARGEST, hadamard_bits, next_power_of_2


@triton.jit
def highest_bits(x, axis: tl.constexpr):
    """The bits of the largest magnitude along an axis, in float32: as integers they are in the order of the numbers,
    with infinity and NaN above all. A maximum of floats would leave NaN out."""
    return tl.max(tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True), axis)


@triton.jit
def scale_of_bits(bits, LARGEST: tl.constexpr):
    """The scale of rows with these :func:`highest_bits`."""
    scale = bits.to(tl.float32, bitcast=True) / LARGEST
    # Also of a row so small that its scale is none: its numbers become zeros.
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def quantized(x, scale, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    """``x / scale`` in float32, within the range of the pages' dtype, and whole if ROUND."""
    x = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -LARGEST), LARGEST)
    if ROUND:
        # The cast to int8 truncates: round half away from zero first.
        x = tl.where(x >= 0.0, tl.floor(x + 0.5), tl.ceil(x - 0.5))
    return x


@triton.jit
def butterflies(x, COUNT: tl.constexpr):
    """COUNT steps of the fast Walsh-Hadamard transform of rows ``[N, R]``, each of which takes the lowest bit of the
    column and makes it the highest: after log2(R) of them columns are back in their order."""
    for _ in tl.static_range(COUNT):
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (x.shape[0], x.shape[1]))
    return x


@triton.jit
def hadamard(x, BITS: tl.constexpr):
    """Rows ``[N, D]``, both powers of two, in float32, with each run of 2^BITS numbers rotated."""
    SIZE: tl.constexpr = 2**BITS
    y = tl.reshape(x.to(tl.float32), (x.shape[0] * x.shape[1] // SIZE, SIZE))
    return tl.reshape(butterflies(y, BITS), (x.shape[0], x.shape[1])) * (SIZE**-0.5)


@triton.jit
def _write_pages(
    k,
    v,
    k_pages,
    v_pages,
    k_scale,
    v_scale,
    slot_mapping,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kp,
    stride_kph,
    stride_ks,
    stride_vp,
    stride_vph,
    stride_vs,
    stride_sp,
    stride_sh,
    stride_ss,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LARGEST: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    """One program: one token of one head. LARGEST is the largest quantised number, 0 without quantisation."""
    token = tl.cast(tl.program_id(0), tl.int64)
    head = tl.cast(tl.program_id(1), tl.int64)
    target = tl.load(slot_mapping + token)
    if target < 0:
        return
    page = target // PAGE_SIZE
    slot = target % PAGE_SIZE
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    key = tl.load(k + token * stride_kt + head * stride_kh + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    if HADAMARD > 0:
        key = tl.reshape(hadamard(tl.reshape(key, (1, BLOCK_D)), HADAMARD), (BLOCK_D,))
    if LARGEST > 0:
        scales = page * stride_sp + head * stride_sh + slot * stride_ss
        scale = scale_of_bits(highest_bits(key, 0), LARGEST)
        key = quantized(key, scale, LARGEST, k_pages.dtype.element_ty == tl.int8)
        tl.store(k_scale + scales, scale)
    tl.store(
        k_pages + page * stride_kp + head * stride_kph + slot * stride_ks + offs_d,
        key.to(k_pages.dtype.element_ty),
        mask=offs_d < HEAD_DIM,
    )
    value = tl.load(v + token * stride_vt + head * stride_vh + offs_dv, mask=offs_dv < V_DIM, other=0.0)
    if LARGEST > 0:
        scale = scale_of_bits(highest_bits(value, 0), LARGEST)
        value = quantized(value, scale, LARGEST, v_pages.dtype.element_ty == tl.int8)
        tl.store(v_scale + scales, scale)
    tl.store(
        v_pages + page * stride_vp + head * stride_vph + slot * stride_vs + offs_dv,
        value.to(v_pages.dtype.element_ty),
        mask=offs_dv < V_DIM,
    )


def write_pages_launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Launch on checked arguments; shapes as in :func:`hf_paged_kernels.write_pages`."""
    if k.shape[0] == 0:
        return
    tensors = (k, v, k_pages, v_pages, k_scale, v_scale, slot_mapping.contiguous())
    with device_guard(k):
        prepare_write(*tensors)(*tensors)


_writes = Launches()


def prepare_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> Launch:
    """The launch of :func:`write_pages_launch` for tensors like these, to be called with them in this order."""
    tensors = (k, v, k_pages, v_pages, k_scale, v_scale, slot_mapping)
    key = tuple(map(layout, tensors))
    write = _writes.get(key)
    if write is None:
        num_tokens, num_heads, head_dim = k.shape
        v_dim = v.shape[-1]
        write = _writes.keep(key, Launch(
            _write_pages, (num_tokens, num_heads), *tensors,
            *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            *scale_strides(k_scale, v_scale),
            PAGE_SIZE=k_pages.shape[2],
            HEAD_DIM=head_dim,
            V_DIM=v_dim,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_DV=next_power_of_2(v_dim),
            LARGEST=0.0 if k_scale is None else LARGEST[k_pages.dtype],
            HADAMARD=hadamard_bits(k_pages.dtype, head_dim),
            num_warps=1,
        ))  # fmt: skip
    return write


@triton.jit
def _copy_pages(
    pages,
    source,
    target,
    stride_p,
    stride_h,
    stride_s,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one head of one page."""
    pair = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    offs_s = tl.arange(0, PAGE_SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    tile = head * stride_h + tl.cast(offs_s, tl.int64)[:, None] * stride_s + offs_d[None, :]
    mask = (offs_d < DIM)[None, :] & (offs_s < PAGE_SIZE)[:, None]
    from_page = tl.load(source + pair).to(tl.int64)
    to_page = tl.load(target + pair).to(tl.int64)
    tl.store(pages + to_page * stride_p + tile, tl.load(pages + from_page * stride_p + tile, mask=mask), mask=mask)


def copy_pages_launch(
    k_pages: torch.Tensor, v_pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Launch on checked arguments; shapes as in :func:`hf_paged_kernels.copy_pages`."""
    if source.numel() == 0:
        return
    source, target = source.contiguous(), target.contiguous()
    with device_guard(k_pages):
        for pages in (k_pages, v_pages):
            _, num_heads, page_size, dim = pages.shape
            launch(
                _copy_pages, (source.numel(), num_heads),
                pages, source, target, *pages.stride()[:3],
                DIM=dim, PAGE_SIZE=page_size, BLOCK_D=next_power_of_2(dim),
            )  # fmt: skip
