"""Linear layers of some tens of tokens in Gluon: TMA, wgmma, and weights asked for before the kernel before has ended.

    out[t, n] = sum_k x[t, k] w[n, k] + bias[n]

A program owns 64 or 128 output features, whose weights are the rows of wgmma, and a tile of tokens, its columns. A
gated layer has two such sums, of the gate and of the up projection; without a gate the second may be of more tokens::

                     k ->  | step 0 | step 1 | step 2 |  ...      STAGES steps are in flight
    w  FEATURES x BLOCK_K  |========|========|========|           asked for at once, no kernel writes them
    x  TOKENS x BLOCK_K             wait | ====== | ====== |      asked for when the kernel before has ended

What that gains: in the chain of short kernels of a decode step the memory would be idle while one ends and the next one
starts. So long as this kernel fits beside the one before, it is not.

Programs may share the in_features of a tile, each leaving its sum as a part in float32. The reader of the parts adds
them in their order: no atomics, no second pass here, and a row's result depends on no other row.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..backend import contiguous, device_guard
from ..compat_gluon import barrier, load_async
from ..dependent_launch_triton import has_dependent_launch
from ..launch_triton import Tile, launch
from ..settings import cdiv
from .decode_settings import DecodeLinearSettings


@gluon.jit
def _load_weights(w_desc, w_smem, full, stage, feature, k, num_features, pred, OPTIONS: gl.constexpr):
    """Ask for a step's weights; its barrier waits for its tokens as well."""
    TOKENS: gl.constexpr = OPTIONS[0]
    MORE: gl.constexpr = OPTIONS[1]
    BLOCK_K: gl.constexpr = OPTIONS[2]
    GATED: gl.constexpr = OPTIONS[4]
    FEATURES: gl.constexpr = w_desc.block_shape[0]
    PIECES: gl.constexpr = 2 if GATED else 1
    mbarrier.expect(full.index(stage), (PIECES * FEATURES + TOKENS + MORE) * BLOCK_K * 2, pred=pred)
    for piece in gl.static_range(PIECES):
        load_async(
            w_desc, [piece * num_features + feature, k], full.index(stage), w_smem.index(stage * PIECES + piece),
            pred=pred,
        )  # fmt: skip


@gluon.jit
def _load_tokens(x_desc, more_desc, x_smem, more_smem, full, stage, token, k, pred, OPTIONS: gl.constexpr):
    """Ask for a step's tokens; those behind the last one read as zeros."""
    TOKENS: gl.constexpr = OPTIONS[0]
    MORE: gl.constexpr = OPTIONS[1]
    load_async(x_desc, [token, k], full.index(stage), x_smem.index(stage), pred=pred)
    if MORE > 0:
        load_async(more_desc, [token + TOKENS, k], full.index(stage), more_smem.index(stage), pred=pred)


@gluon.jit
def _store(out, bias, total, up, part, token, feature, num_tokens, num_features, GATED: gl.constexpr):
    """Add the bias, and store a tile ``[features, tokens]`` to rows of ``out``."""
    dtype: gl.constexpr = out.dtype.element_ty
    LAYOUT: gl.constexpr = total.type.layout
    features = feature + gl.arange(0, total.type.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    tokens = token + gl.arange(0, total.type.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    held = features < num_features
    if bias is not None:
        # Part 0 has it.
        first = held & (part == 0)
        total += gl.load(bias + features, mask=first, other=0.0).to(gl.float32)[:, None]
        if GATED:
            up += gl.load(bias + num_features + features, mask=first, other=0.0).to(gl.float32)[:, None]
    if GATED:
        gate = total.to(dtype).to(gl.float32)
        total = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32) * up.to(dtype).to(gl.float32)
    rows = gl.cast(part * num_tokens + tokens, gl.int64) * num_features
    gl.store(
        out + rows[None, :] + features[:, None], total.to(dtype), mask=held[:, None] & (tokens < num_tokens)[None, :]
    )


@gluon.jit(do_not_specialize=["num_tokens", "num_features", "num_steps", "num_parts"])
def _decode_linear(
    x_desc,
    more_desc,
    w_desc,
    bias,
    out,
    num_tokens,
    num_features,
    num_steps,
    num_parts,
    TOKENS: gl.constexpr,
    MORE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
):
    """One program: tile of tokens, part, tile of features. ``num_features`` of a token, ``num_steps`` of all parts."""
    PIECES: gl.constexpr = 2 if GATED else 1
    FEATURES: gl.constexpr = w_desc.block_shape[0]
    dtype: gl.constexpr = w_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    MORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE, 16])
    OPTIONS: gl.constexpr = (TOKENS, MORE, BLOCK_K, STAGES, GATED)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PIECES, FEATURES, BLOCK_K], TILE)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BLOCK_K], TILE)
    if MORE > 0:
        more_smem = gl.allocate_shared_memory(dtype, [STAGES, MORE, BLOCK_K], TILE)
    else:
        more_smem = x_smem
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gdc_launch_dependents()

    part = gl.program_id(1)
    first = num_steps * part // num_parts
    steps = num_steps * (part + 1) // num_parts - first
    token = gl.program_id(0) * (TOKENS + MORE)
    feature = gl.program_id(2) * FEATURES
    for i in gl.static_range(STAGES):
        _load_weights(w_desc, w_smem, full, i, feature, (first + i) * BLOCK_K, num_features, i < steps, OPTIONS)
    gdc_wait()
    for i in gl.static_range(STAGES):
        _load_tokens(x_desc, more_desc, x_smem, more_smem, full, i, token, (first + i) * BLOCK_K, i < steps, OPTIONS)

    total = gl.zeros([FEATURES, TOKENS], gl.float32, LAYOUT)
    # Of the up projection, or of more tokens.
    if MORE > 0:
        second = gl.zeros([FEATURES, MORE], gl.float32, MORE_LAYOUT)
    else:
        second = total
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        w = w_smem.index(stage * PIECES)
        x = x_smem.index(stage).permute((1, 0))
        total = warpgroup_mma(w, x, total, is_async=True)
        # The products of the step before end, those of this one go on.
        if GATED:
            second = warpgroup_mma(w_smem.index(stage * 2 + 1), x, second, is_async=True)
            total, second = warpgroup_mma_wait(2, deps=[total, second])
        elif MORE > 0:
            second = warpgroup_mma(w, more_smem.index(stage).permute((1, 0)), second, is_async=True)
            total, second = warpgroup_mma_wait(2, deps=[total, second])
        else:
            total = warpgroup_mma_wait(1, deps=[total])
        # All warps have read that step: its place is free.
        barrier()
        ahead = i - 1 + STAGES
        k = (first + ahead) * BLOCK_K
        wanted = (i > 0) & (ahead < steps)
        _load_weights(w_desc, w_smem, full, ahead % STAGES, feature, k, num_features, wanted, OPTIONS)
        _load_tokens(x_desc, more_desc, x_smem, more_smem, full, ahead % STAGES, token, k, wanted, OPTIONS)
    total, second = warpgroup_mma_wait(0, deps=[total, second])
    _store(out, bias, total, second, part, token, feature, num_tokens, num_features, GATED)
    if MORE > 0:
        _store(out, bias, second, second, part, token + TOKENS, feature, num_tokens, num_features, False)


def decode_linear_launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: DecodeLinearSettings, gated: bool
) -> torch.Tensor:
    """Launch on checked arguments; see ``decode_linear_op``, and ``decode_gated_linear_op`` where ``gated``."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])
    _launch(x, weight, bias, out, settings, gated)
    return out


def linear_parts_launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: DecodeLinearSettings
) -> torch.Tensor:
    """Launch on checked arguments; see ``linear_parts_op``."""
    out = x.new_empty(settings.num_parts, x.shape[0], weight.shape[0], dtype=torch.float32)
    _launch(x, weight, bias, out, settings, gated=False)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    settings: DecodeLinearSettings,
    gated: bool,
) -> None:
    s = settings
    num_tokens, num_features = out.shape[-2:]
    grid = (cdiv(num_tokens, s.tokens + s.more_tokens), s.num_parts, cdiv(num_features, s.features))
    x_desc = _descriptor(x, s.tokens, s.block_k)
    more_desc = _descriptor(x, s.more_tokens, s.block_k) if s.more_tokens else x_desc
    with device_guard(x):
        launch(
            _decode_linear, grid,
            x_desc, more_desc, _descriptor(weight, s.features, s.block_k), contiguous(bias), out,
            num_tokens, num_features, cdiv(x.shape[1], s.block_k), s.num_parts,
            TOKENS=s.tokens, MORE=s.more_tokens, BLOCK_K=s.block_k, STAGES=s.stages, GATED=gated,
            num_warps=4, launch_pdl=has_dependent_launch(x.device),
        )  # fmt: skip


LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
"""Of a tile that TMA copies."""


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> Tile:
    return Tile(x, x.shape, x.stride(), (rows, columns), LAYOUT)
