"""Normalise and rotate queries and keys, and write keys and values into pages: one launch, in Triton.

A head's dimensions are held in three parts, for pairs (a, b) that turn together and dimensions that do not turn:

    half-split     [ a a a a | b b b b | rest ]        rotated a = a cos - b sin
    interleaved    [ a b a b a b a b   | rest ]        rotated b = b cos + a sin

Programs along the grid's second axis: tiles of query heads, of key heads, of value heads::

    token t:   [ q heads 0..7 ][ q heads 8..15 ] ... [ k heads 0..7 ] ... [ v heads 0..7 ] ...

Pages, slots and scales are those of :mod:`.pages_triton`. Keys that get a Hadamard rotation are held in one part, in
their order in memory, and each dimension's partner is read beside it.
"""

import torch
import triton
import triton.language as tl

from ..attention.pages_triton import hadamard, highest_bits, quantized, scale_of_bits
from ..backend import contiguous, device_guard, scale_strides
from ..dependent_launch_triton import dependent_launch, start_next, wait_for_previous
from ..launch_triton import launch
from ..settings import LARGEST, cdiv, hadamard_bits, next_power_of_2

TILE = 1024
"""Elements of a program's tile of heads."""


@triton.jit
def _load_heads(
    x,
    mask,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Parts a, b [H, BLOCK_HALF] and rest [H, BLOCK_REST] of rows at the pointers ``x`` [H, 1] where ``mask`` is set.

    Where every dimension turns, the rest is a.
    """
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        pairs = tl.load(x + offs, mask=mask & (offs < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_HALF, 2)))
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, :]
        a = tl.load(x + offs, mask=mask & (offs < HALF), other=0.0)
        b = tl.load(x + HALF + offs, mask=mask & (offs < HALF), other=0.0)
    rest = a
    if 2 * HALF < HEAD_DIM:
        offs_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.load(x + offs_rest, mask=mask & (offs_rest < HEAD_DIM), other=0.0)
    return a, b, rest


@triton.jit
def _store_heads(
    x,
    a,
    b,
    rest,
    mask,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The inverse of ``_load_heads``."""
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        pairs = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK_HALF))
        tl.store(x + offs, pairs.to(x.dtype.element_ty), mask=mask & (offs < 2 * HALF))
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, :]
        tl.store(x + offs, a.to(x.dtype.element_ty), mask=mask & (offs < HALF))
        tl.store(x + HALF + offs, b.to(x.dtype.element_ty), mask=mask & (offs < HALF))
    if 2 * HALF < HEAD_DIM:
        offs_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(x + offs_rest, rest.to(x.dtype.element_ty), mask=mask & (offs_rest < HEAD_DIM))


@triton.jit
def _sum_of_squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def _norm_scale(a, b, rest, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """What a norm multiplies heads with, [H, 1], from their parts."""
    squares = _sum_of_squares(a) + _sum_of_squares(b)
    if 2 * HALF < HEAD_DIM:
        squares += _sum_of_squares(rest)
    return tl.rsqrt(squares / HEAD_DIM + eps)[:, None]


@triton.jit
def _scaled(x, scale, weight, weight_offset, ROUND_FIRST: tl.constexpr):
    """``(weight_offset + weight) * (x * scale)``, rounded to the dtype of x."""
    out = x.to(tl.float32) * scale
    if ROUND_FIRST:
        out = out.to(x.dtype).to(tl.float32)
    return (out * (weight.to(tl.float32) + weight_offset)).to(x.dtype)


@triton.jit
def _rotated_heads(
    x,
    mask,
    cos,
    sin,
    stride_c,
    stride_s,
    weight,
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Parts a, b and rest of heads, as ``_load_heads``, after norm and rotation."""
    offs = tl.cast(tl.arange(0, BLOCK_HALF), tl.int64)
    cosine = tl.load(cos + offs * stride_c, mask=offs < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + offs * stride_s, mask=offs < HALF, other=0.0).to(tl.float32)[None, :]
    a, b, rest = _load_heads(x, mask, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
    if HAS_WEIGHT:
        weight_a, weight_b, weight_rest = _load_heads(
            weight + tl.zeros((1, 1), tl.int32), True, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED
        )
        scale = _norm_scale(a, b, rest, eps, HEAD_DIM, HALF)
        a = _scaled(a, scale, weight_a, weight_offset, ROUND_FIRST)
        b = _scaled(b, scale, weight_b, weight_offset, ROUND_FIRST)
        rest = _scaled(rest, scale, weight_rest, weight_offset, ROUND_FIRST)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    turned_a = (wide_a * cosine - wide_b * sine).to(a.dtype)
    turned_b = (wide_b * cosine + wide_a * sine).to(b.dtype)
    return turned_a, turned_b, rest


@triton.jit
def _rotated_rows(
    x,
    mask,
    cos,
    sin,
    stride_c,
    stride_s,
    weight,
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """Heads [H, BLOCK_D] after norm and rotation where ``mask`` [H, 1] is set, not in parts as ``_rotated_heads``."""
    offs = tl.arange(0, BLOCK_D)
    inside, turns = offs < HEAD_DIM, offs < 2 * HALF
    if INTERLEAVED:
        is_first, partner, number = offs % 2 == 0, offs ^ 1, offs // 2
    else:
        is_first = offs < HALF
        partner = tl.where(is_first, offs + HALF, offs - HALF)
        number = tl.where(is_first, offs, offs - HALF)
    number = tl.cast(number, tl.int64)
    # A dimension that does not turn has the angle 0.
    cosine = tl.load(cos + number * stride_c, mask=turns, other=1.0).to(tl.float32)[None, :]
    sine = tl.load(sin + number * stride_s, mask=turns, other=0.0).to(tl.float32)[None, :]
    own = tl.load(x + offs[None, :], mask=mask & inside[None, :], other=0.0)
    other = tl.load(x + partner[None, :], mask=mask & turns[None, :], other=0.0)
    if HAS_WEIGHT:
        own_weight = tl.load(weight + offs, mask=inside, other=0.0)[None, :]
        other_weight = tl.load(weight + partner, mask=turns, other=0.0)[None, :]
        # Summed part by part: the bits of a key do not depend on what its pages hold.
        a, b, rest = _load_heads(x, mask, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
        scale = _norm_scale(a, b, rest, eps, HEAD_DIM, HALF)
        own = _scaled(own, scale, own_weight, weight_offset, ROUND_FIRST)
        other = _scaled(other, scale, other_weight, weight_offset, ROUND_FIRST)
    turned = other.to(tl.float32) * sine
    return (own.to(tl.float32) * cosine + tl.where(is_first[None, :], -turned, turned)).to(own.dtype)


@triton.jit
def _rotary_write(
    q,
    k,
    v,
    cos,
    sin,
    q_weight,
    k_weight,
    out,
    k_pages,
    v_pages,
    k_scale,
    v_scale,
    slot_mapping,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ct,
    stride_cd,
    stride_st,
    stride_sd,
    stride_kp,
    stride_kph,
    stride_ks,
    stride_vp,
    stride_vph,
    stride_vs,
    stride_sp,
    stride_sh,
    stride_ss,
    eps,
    weight_offset,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    LARGEST: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one token, and BLOCK_H of its query, key or value heads.

    HALF is the number of frequencies, LARGEST the largest quantised number, 0 without quantisation.
    """
    NUM_Q_TILES: tl.constexpr = (NUM_Q_HEADS + BLOCK_H - 1) // BLOCK_H
    NUM_KV_TILES: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.cast(tl.program_id(0), tl.int64)
    tile = tl.program_id(1)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    cos += token * stride_ct
    sin += token * stride_st
    # Each branch has names of its own: a name in two of them would need one type.
    if tile < NUM_Q_TILES:
        head = tl.cast(tile * BLOCK_H + tl.arange(0, BLOCK_H), tl.int64)[:, None]
        mask = head < NUM_Q_HEADS
        a, b, rest = _rotated_heads(
            q + token * stride_qt + head * stride_qh, mask, cos, sin, stride_cd, stride_sd, q_weight, eps,
            weight_offset, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_Q_WEIGHT, ROUND_FIRST,
        )  # fmt: skip
        queries = out + (token * NUM_Q_HEADS + head) * HEAD_DIM
        _store_heads(queries, a, b, rest, mask, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED)
    else:
        place = tl.load(slot_mapping + token)
        page, slot = place // PAGE_SIZE, place % PAGE_SIZE
        kv_head = tl.cast(((tile - NUM_Q_TILES) % NUM_KV_TILES) * BLOCK_H + tl.arange(0, BLOCK_H), tl.int64)
        written = (kv_head < NUM_KV_HEADS) & (place >= 0)
        scales = page * stride_sp + kv_head * stride_sh + slot * stride_ss
        kv_head = kv_head[:, None]
        if tile < NUM_Q_TILES + NUM_KV_TILES:
            if HADAMARD > 0:
                key = _rotated_rows(
                    k + token * stride_kt + kv_head * stride_kh, written[:, None], cos, sin, stride_cd, stride_sd,
                    k_weight, eps, weight_offset,
                    HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, BLOCK_D, INTERLEAVED, HAS_K_WEIGHT, ROUND_FIRST,
                )  # fmt: skip
                mixed = hadamard(key, HADAMARD)
                mixed_scale = scale_of_bits(highest_bits(mixed, 1), LARGEST)
                tl.store(k_scale + scales, mixed_scale, mask=written)
                mixed = quantized(mixed, mixed_scale[:, None], LARGEST, k_pages.dtype.element_ty == tl.int8)
                columns = tl.arange(0, BLOCK_D)[None, :]
                tl.store(
                    k_pages + page * stride_kp + kv_head * stride_kph + slot * stride_ks + columns,
                    mixed.to(k_pages.dtype.element_ty),
                    mask=written[:, None] & (columns < HEAD_DIM),
                )
            else:
                key_a, key_b, key_rest = _rotated_heads(
                    k + token * stride_kt + kv_head * stride_kh, written[:, None], cos, sin, stride_cd, stride_sd,
                    k_weight, eps, weight_offset,
                    HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, HAS_K_WEIGHT, ROUND_FIRST,
                )  # fmt: skip
                if LARGEST > 0:
                    highest = tl.maximum(highest_bits(key_a, 1), highest_bits(key_b, 1))
                    if 2 * HALF < HEAD_DIM:
                        highest = tl.maximum(highest, highest_bits(key_rest, 1))
                    key_scale = scale_of_bits(highest, LARGEST)
                    tl.store(k_scale + scales, key_scale, mask=written)
                    key_a = quantized(key_a, key_scale[:, None], LARGEST, k_pages.dtype.element_ty == tl.int8)
                    key_b = quantized(key_b, key_scale[:, None], LARGEST, k_pages.dtype.element_ty == tl.int8)
                    key_rest = quantized(key_rest, key_scale[:, None], LARGEST, k_pages.dtype.element_ty == tl.int8)
                keys = k_pages + page * stride_kp + kv_head * stride_kph + slot * stride_ks
                _store_heads(
                    keys, key_a, key_b, key_rest, written[:, None], HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED
                )
        else:
            offs = tl.arange(0, BLOCK_DV)[None, :]
            inside = written[:, None] & (offs < V_DIM)
            value = tl.load(v + token * stride_vt + kv_head * stride_vh + offs, mask=inside, other=0.0)
            if LARGEST > 0:
                value_scale = scale_of_bits(highest_bits(value, 1), LARGEST)
                tl.store(v_scale + scales, value_scale, mask=written)
                value = quantized(value, value_scale[:, None], LARGEST, v_pages.dtype.element_ty == tl.int8)
            values = v_pages + page * stride_vp + kv_head * stride_vph + slot * stride_vs
            tl.store(values + offs, value.to(v_pages.dtype.element_ty), mask=inside)


def rotary_write_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Launch on checked arguments; see :func:`hf_paged_kernels.layers.ops.rotary_write_op`."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, v_dim, half = k.shape[1], v.shape[-1], cos.shape[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    block_h = max(1, TILE // next_power_of_2(max(head_dim, v_dim)))
    block_h = min(block_h, next_power_of_2(max(num_q_heads, num_kv_heads)))
    grid = (num_tokens, cdiv(num_q_heads, block_h) + 2 * cdiv(num_kv_heads, block_h))
    with device_guard(q):
        launch(
            _rotary_write, grid,
            q, k, v, cos, sin, contiguous(q_weight), contiguous(k_weight), out, k_pages, v_pages, k_scale, v_scale,
            slot_mapping.contiguous(),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *cos.stride(), *sin.stride(),
            *k_pages.stride()[:3], *v_pages.stride()[:3],
            *scale_strides(k_scale, v_scale),
            eps, weight_offset,
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            V_DIM=v_dim,
            HALF=half,
            PAGE_SIZE=k_pages.shape[2],
            BLOCK_H=block_h,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(1, head_dim - 2 * half)),
            BLOCK_DV=next_power_of_2(v_dim),
            INTERLEAVED=interleaved,
            HAS_Q_WEIGHT=q_weight is not None,
            HAS_K_WEIGHT=k_weight is not None,
            ROUND_FIRST=round_first,
            LARGEST=0.0 if k_scale is None else LARGEST[k_pages.dtype],
            HADAMARD=hadamard_bits(k_pages.dtype, head_dim),
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=4,
            **dependent_launch(q.device),
        )  # fmt: skip
    return out
