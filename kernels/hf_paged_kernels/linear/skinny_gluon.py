# ruff: noqa: RUF005 (kernels grow tuples by adding; Triton has no unpacking)
"""Linear layers of a few tokens in Gluon: weights go from memory straight into registers.

    out[t, n] = rms_t * sum_k x[t, k] g[k] w[n, k] + bias[n] + residual[t, n]
    rms_t     = 1 / sqrt(mean_k x[t, k]^2 + eps)

The factor rms_t (1 without a norm) is taken out of the sum, so that the norm costs no pass of its own. A gated layer
has two such sums per output and stores ``silu(gate) * up``.

A program owns ``BLOCK_N`` weight rows and walks along k in chunks; each of its WARPS_K warps owns a part of a chunk,
and their sums are added at the end, in a fixed order. Nothing is shared between programs: no atomics, no second pass::

                 k ->  | warp 0 | warp 1 | warp 2 | warp 3 | warp 0 | warp 1 | ...
    rows n .. n+BLOCK_N|<------------ chunk 0 ------------>|<---- chunk 1 ...

What counts is how many bytes of weights are in flight, at all times. A step is a chain of some hundred kernels that
last 2 to 50 microseconds, each of which needs the one before: a program asks for its first AHEAD chunks of weights,
which no kernel writes, and only then waits for that kernel (programmatic dependent launch). All loops are unrolled.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..backend import contiguous, device_guard
from ..launch_triton import launch
from ..settings import cdiv, next_power_of_2
from .skinny_settings import MAX_TOKENS, SkinnyLinearSettings

FARTHEST = 2**31 // MAX_TOKENS - 1
"""Elements between two tokens up to which their offsets fit into int32: in the last tokens of long sequences
``[B, L, K]`` they are L * K apart."""


@gluon.jit
def _weights(w, row, C: gl.constexpr, K: gl.constexpr, WARPS_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk C of weight rows ``row`` for multiply-adds: [BLOCK_N, 32 * WARPS_K, 8], 8 neighbours in k a thread."""
    offs = _chunk(C, WARPS_K, LAYOUT)
    start = gl.expand_dims(gl.expand_dims(row.to(gl.int64) * K, 1), 2)
    # Read once: should leave the cache before anything else does.
    if (C + 1) * 256 * WARPS_K <= K:
        tile = gl.load(w + start + offs, eviction_policy="evict_first")
    else:
        tile = gl.load(w + start + offs, mask=offs < K, other=0.0, eviction_policy="evict_first")
    return tile


@gluon.jit
def _vector(x, C: gl.constexpr, K: gl.constexpr, WARPS_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk C of a vector for multiply-adds: [1, 32 * WARPS_K, 8]."""
    offs = _chunk(C, WARPS_K, LAYOUT)
    if (C + 1) * 256 * WARPS_K <= K:
        chunk = gl.load(x + offs)
    else:
        chunk = gl.load(x + offs, mask=offs < K, other=0.0)
    return chunk


@gluon.jit
def _chunk(C: gl.constexpr, WARPS_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Columns of chunk C: [1, 32 * WARPS_K, 8]."""
    lane = gl.arange(0, 32 * WARPS_K, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    neighbour = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 2)
    return C * (256 * WARPS_K) + lane * 8 + gl.expand_dims(gl.expand_dims(neighbour, 0), 1)


@gluon.jit
def _all_weights(
    w,
    row,
    num_features,
    C: gl.constexpr,
    K: gl.constexpr,
    WARPS_K: gl.constexpr,
    LAYOUT: gl.constexpr,
    GATED: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """A tuple: chunk C of weight rows ``row``, and of the up projection's where GATED."""
    load: gl.constexpr = _operand_weights if OPERAND else _weights
    tiles = (load(w, row, C, K, WARPS_K, LAYOUT),)
    if GATED:
        tiles = tiles + (load(w, row + num_features, C, K, WARPS_K, LAYOUT),)
    return tiles


@gluon.jit
def _vectors(
    x,
    norm_weight,
    stride_xt,
    C: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A tuple: chunk C of each token of x, and of the norm's weight where there is one."""
    chunks = ()
    for t in gl.static_range(ROWS):
        chunks = chunks + (_vector(x + t * stride_xt, C, K, WARPS_K, LAYOUT),)
    if norm_weight is not None:
        chunks = chunks + (_vector(norm_weight, C, K, WARPS_K, LAYOUT),)
    return chunks


@gluon.jit
def _normed(total, rms, bias, first, row, COLUMN: gl.constexpr):
    """``total * rms + bias[first + row]``, both where there are such; ``first`` None: 0.

    The bias runs along axis 0 of [N, ROWS] where COLUMN.
    """
    if rms is not None:
        total = total * rms
    if bias is not None:
        if first is not None:
            bias += first
        added = gl.load(bias + row).to(gl.float32)
        if COLUMN:
            added = gl.expand_dims(added, 1)
        total += added
    return total


@gluon.jit
def _skinny_linear(
    x,
    w,
    bias,
    residual,
    norm_weight,
    out,
    num_features,
    eps,
    stride_xt,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
    EARLY: gl.constexpr,
):
    """ROWS = 1 or 2 tokens: multiply-adds in float32. ``num_features``: outputs a token.

    A thread keeps 8 neighbours in k of each of its rows, and adds up products of its own columns only; lanes and warps
    are added once, at the end.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([BLOCK_N // WARPS_N, 1, 8], [1, 32, 1], [WARPS_N, WARPS_K, 1], [2, 1, 0])
    CHUNKS: gl.constexpr = (K + 256 * WARPS_K - 1) // (256 * WARPS_K)
    FIRST: gl.constexpr = AHEAD if AHEAD < CHUNKS else CHUNKS
    FIRST_X: gl.constexpr = X_AHEAD if X_AHEAD < CHUNKS else CHUNKS
    if EARLY:
        gdc_launch_dependents()
    feature = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    row = gl.minimum(feature, num_features - 1)
    tiles = ()
    for c in gl.static_range(FIRST):
        tiles = tiles + _all_weights(w, row, num_features, c, K, WARPS_K, LAYOUT, GATED, False)
    gdc_wait()
    if not EARLY:
        gdc_launch_dependents()

    chunks = ()
    for c in gl.static_range(FIRST_X):
        chunks = chunks + _vectors(x, norm_weight, stride_xt, c, K, ROWS, WARPS_K, LAYOUT)
    PER_TILE: gl.constexpr = 2 if GATED else 1
    PER_CHUNK: gl.constexpr = ROWS if norm_weight is None else ROWS + 1
    sums = ()
    squares = ()
    for c in gl.static_range(CHUNKS):
        tile = tiles[:PER_TILE]
        tiles = tiles[PER_TILE:]
        chunk = chunks[:PER_CHUNK]
        chunks = chunks[PER_CHUNK:]
        if c + FIRST < CHUNKS:
            tiles = tiles + _all_weights(w, row, num_features, c + FIRST, K, WARPS_K, LAYOUT, GATED, False)
        if c + FIRST_X < CHUNKS:
            chunks = chunks + _vectors(x, norm_weight, stride_xt, c + FIRST_X, K, ROWS, WARPS_K, LAYOUT)
        new_sums = ()
        new_squares = ()
        for t in gl.static_range(ROWS):
            values = chunk[t].to(gl.float32)
            if norm_weight is not None:
                square = gl.sum(values * values, 2)
                if c > 0:
                    square += squares[t]
                new_squares = new_squares + (square,)
                values = values * chunk[ROWS].to(gl.float32)
            for half in gl.static_range(PER_TILE):
                total = gl.sum(tile[half].to(gl.float32) * values, 2)
                if c > 0:
                    total += sums[t * PER_TILE + half]
                new_sums = new_sums + (total,)
        sums = new_sums
        squares = new_squares

    mask = feature < num_features
    for t in gl.static_range(ROWS):
        y = gl.sum(sums[t * PER_TILE], 1)
        rms = None
        if norm_weight is not None:
            rms = gl.rsqrt(gl.sum(gl.sum(squares[t], 1), 0) / K + eps)
        y = _normed(y, rms, bias, None, row, False)
        if GATED:
            up = _normed(gl.sum(sums[t * PER_TILE + 1], 1), rms, bias, num_features, row, False)
            y = y / (1.0 + gl.exp(-y)) * up
        if residual is not None:
            y += gl.load(residual + t * num_features + row).to(gl.float32)
        gl.store(out + t * num_features + feature, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _operand_weights(w, row, C: gl.constexpr, K: gl.constexpr, WARPS_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk C of weight rows ``row`` as the left operand: [WARPS_K, BLOCK_N, 64]."""
    warp = gl.arange(0, WARPS_K, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    offs = C * (64 * WARPS_K) + warp * 64 + gl.expand_dims(gl.expand_dims(column, 0), 1)
    start = gl.expand_dims(gl.expand_dims(row.to(gl.int64) * K, 0), 2)
    if (C + 1) * 64 * WARPS_K <= K:
        tile = gl.load(w + start + offs, eviction_policy="evict_first")
    else:
        tile = gl.load(w + start + offs, mask=offs < K, other=0.0, eviction_policy="evict_first")
    return tile


@gluon.jit
def _operand_x(
    x,
    num_tokens,
    stride_xt,
    C: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Chunk C of x as the right operand: [WARPS_K, 64, ROWS], zero for the tokens that are not there."""
    warp = gl.arange(0, WARPS_K, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    token = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    offs = C * (64 * WARPS_K) + warp * 64 + gl.expand_dims(gl.expand_dims(column, 0), 2)
    token = gl.expand_dims(gl.expand_dims(token, 0), 1)
    return gl.load(x + token * stride_xt + offs, mask=(token < num_tokens) & (offs < K), other=0.0)


@gluon.jit
def _operands_x(
    x,
    norm_weight,
    num_tokens,
    stride_xt,
    C: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A tuple: chunk C of x, and of the norm's weight, the same for all tokens, where there is one."""
    chunks = (_operand_x(x, num_tokens, stride_xt, C, K, ROWS, WARPS_K, LAYOUT),)
    if norm_weight is not None:
        chunks = chunks + (_operand_x(norm_weight, ROWS, 0, C, K, ROWS, WARPS_K, LAYOUT),)
    return chunks


@gluon.jit(do_not_specialize=["num_tokens"])
def _skinny_linear_mma(
    x,
    w,
    bias,
    residual,
    norm_weight,
    out,
    num_tokens,
    num_features,
    eps,
    stride_xt,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WARPS_N: gl.constexpr,
    WARPS_K: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Up to ROWS = 8 or 16 tokens on the matrix units: W is the operand of 16 rows, x^T that of 8 columns.

    A lane's 8 neighbours in k are four steps of the instruction, which takes two: the same permutation of k on both
    sides, so that both operands are loaded 16 bytes a time, without a detour through shared memory.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_K, WARPS_N, 1], [1, 16, 8])
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    CHUNKS: gl.constexpr = (K + 64 * WARPS_K - 1) // (64 * WARPS_K)
    FIRST: gl.constexpr = AHEAD if AHEAD < CHUNKS else CHUNKS
    FIRST_X: gl.constexpr = X_AHEAD if X_AHEAD < CHUNKS else CHUNKS
    if EARLY:
        gdc_launch_dependents()
    feature = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, W_LAYOUT)))
    row = gl.minimum(feature, num_features - 1)
    tiles = ()
    for c in gl.static_range(FIRST):
        tiles = tiles + _all_weights(w, row, num_features, c, K, WARPS_K, W_LAYOUT, GATED, True)
    gdc_wait()
    if not EARLY:
        gdc_launch_dependents()

    chunks = ()
    for c in gl.static_range(FIRST_X):
        chunks = chunks + _operands_x(x, norm_weight, num_tokens, stride_xt, c, K, ROWS, WARPS_K, X_LAYOUT)
    PER_TILE: gl.constexpr = 2 if GATED else 1
    PER_CHUNK: gl.constexpr = 1 if norm_weight is None else 2
    total = gl.zeros([WARPS_K, BLOCK_N, ROWS], gl.float32, MMA)
    total_up = gl.zeros([WARPS_K, BLOCK_N, ROWS], gl.float32, MMA)
    for c in gl.static_range(CHUNKS):
        tile = tiles[:PER_TILE]
        tiles = tiles[PER_TILE:]
        chunk = chunks[:PER_CHUNK]
        chunks = chunks[PER_CHUNK:]
        if c + FIRST_X < CHUNKS:
            chunks = chunks + _operands_x(
                x, norm_weight, num_tokens, stride_xt, c + FIRST_X, K, ROWS, WARPS_K, X_LAYOUT
            )
        values = chunk[0]
        if norm_weight is not None:
            exact = values.to(gl.float32)
            square = gl.sum(exact * exact, 1)
            if c == 0:
                squares = square
            else:
                squares = squares + square
            values = (exact * chunk[1].to(gl.float32)).to(values.dtype)
        total = mma_v2(tile[0], values, total)
        if GATED:
            total_up = mma_v2(tile[1], values, total_up)
        if c + FIRST < CHUNKS:
            tiles = tiles + _all_weights(w, row, num_features, c + FIRST, K, WARPS_K, W_LAYOUT, GATED, True)

    token = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OUT))
    feature = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT))
    row = gl.minimum(feature, num_features - 1)
    offs = gl.expand_dims(token, 0) * num_features + gl.expand_dims(feature, 1)
    mask = (gl.expand_dims(token, 0) < num_tokens) & (gl.expand_dims(feature, 1) < num_features)
    y = gl.sum(total, 0)
    rms = None
    if norm_weight is not None:
        rms = gl.rsqrt(gl.sum(squares, 0) / K + eps)
        rms = gl.expand_dims(gl.convert_layout(rms, gl.SliceLayout(0, OUT)), 0)
    y = _normed(y, rms, bias, None, row, True)
    if GATED:
        up = _normed(gl.sum(total_up, 0), rms, bias, num_features, row, True)
        y = y / (1.0 + gl.exp(-y)) * up
    if residual is not None:
        y += gl.load(residual + offs, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + offs, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _rms_norm(x, norm_weight, out, eps, stride_xt, K: gl.constexpr, BLOCK_K: gl.constexpr, NUM_WARPS: gl.constexpr):
    """One program: one token."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [NUM_WARPS], [0])
    token = gl.program_id(0)
    column = gl.arange(0, BLOCK_K, layout=LAYOUT)
    gdc_launch_dependents()
    weight = gl.load(norm_weight + column, mask=column < K, other=0.0).to(gl.float32)
    gdc_wait()
    values = gl.load(x + token * stride_xt + column, mask=column < K, other=0.0).to(gl.float32)
    rms = gl.rsqrt(gl.sum(values * values, 0) / K + eps)
    gl.store(out + token * K + column, (values * rms * weight).to(out.dtype.element_ty), mask=column < K)


def skinny_linear_launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    settings: SkinnyLinearSettings,
    gated: bool,
) -> torch.Tensor:
    """Launch on checked arguments; shapes as in ``skinny_linear_op``, or ``skinny_gated_linear_op`` where ``gated``."""
    num_tokens, width = x.shape
    bias, residual, norm_weight = contiguous(bias), contiguous(residual), contiguous(norm_weight)
    if x.stride(0) > FARTHEST:
        x = x.contiguous()
    num_features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(num_tokens, num_features)
    with device_guard(x):
        if norm_weight is not None and settings.norm_first:
            x, norm_weight = rms_norm_launch(x, norm_weight, norm_eps), None
        num_warps = settings.warps_n * settings.warps_k
        options = {"num_warps": num_warps, "launch_pdl": True}
        if settings.max_registers is not None:
            options["maxnreg"] = settings.max_registers
        multiply_adds = settings.rows <= 2
        kernel = _skinny_linear if multiply_adds else _skinny_linear_mma
        launch(
            kernel, (cdiv(num_features, settings.block_n),),
            x, weight, bias, residual, norm_weight, out, *(() if multiply_adds else (num_tokens,)), num_features,
            norm_eps, x.stride(0), K=width, ROWS=settings.rows, GATED=gated, BLOCK_N=settings.block_n,
            WARPS_N=settings.warps_n, WARPS_K=settings.warps_k, AHEAD=settings.ahead, X_AHEAD=settings.x_ahead,
            EARLY=settings.early, **options,
        )  # fmt: skip
    return out


def rms_norm_launch(x: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + norm_eps) * norm_weight``, [T, K] in x's dtype; x [T, K] with contiguous rows."""
    num_tokens, width = x.shape
    out = x.new_empty(num_tokens, width)
    launch(
        _rms_norm, (num_tokens,),
        x, norm_weight, out, norm_eps, x.stride(0), K=width, BLOCK_K=next_power_of_2(width), NUM_WARPS=4,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
