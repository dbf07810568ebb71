"""Settings of the kernels for linear layers of a few tokens, from measurements on an H200."""

from dataclasses import dataclass

MAX_TOKENS = 16
"""Tokens up to which the kernels are as fast as cuBLAS or faster (H200; see ``choose_skinny_linear``)."""
HEAD = 65536
"""Output features from which a layer counts as an LM head: large enough for cuBLAS to lose nothing on three tokens."""


@dataclass(frozen=True, slots=True)
class SkinnyLinearSettings:
    """Settings of one launch.

    Attributes:
        rows: tokens the kernel is compiled for. 1 and 2: multiply-adds; 8 and 16: matrix units, with unused rows.
        block_n: weight rows of a program (of the gate and of the up projection each).
        warps_n: warps side by side along these rows.
        warps_k: warps side by side along in_features.
        ahead: chunks of weights that a warp keeps in flight, and loads before it waits for the kernel before.
        x_ahead: the same for chunks of x.
        max_registers: registers a thread, or None for the compiler's choice.
        norm_first: whether the norm is a kernel of its own, because each program would repeat it.
        early: whether the kernel after this one may start as soon as all programs of this one run.
    """

    rows: int
    block_n: int
    warps_n: int
    warps_k: int
    ahead: int
    x_ahead: int
    max_registers: int | None = None
    norm_first: bool = False
    early: bool = True


def choose_skinny_linear(
    num_tokens: int, out_features: int, in_features: int, gated: bool, element_size: int
) -> SkinnyLinearSettings | None:
    """Settings for ``[num_tokens, in_features] x [out_features, in_features]``, or None: leave it to PyTorch.

    A pure function of its arguments, from measurements on an H200. ``out_features`` counts both halves of a gated
    layer. Kernels are compiled for 1, 2, up to 8 and up to 16 tokens. A row's result never depends on other rows, and
    is bitwise the same for every number of tokens from 3 to 16; fewer are summed in another order.
    """
    if not 1 <= num_tokens <= MAX_TOKENS or in_features < 64 or element_size > 4:
        return None
    wide = in_features >= 4096
    # Every program would do the norm of all tokens: where it has few weight rows of its own, that is the larger part.
    norm_first = num_tokens > 1 and in_features > 2048
    head = out_features >= HEAD and not gated
    if num_tokens == 1 or (num_tokens == 2 and (wide or head or element_size == 4)):
        if in_features <= 1536:
            return SkinnyLinearSettings(num_tokens, 16, 8, 1, 4, 4)
        if gated:
            return SkinnyLinearSettings(num_tokens, 2, 1, 4, 4, 4 // num_tokens, norm_first=norm_first)
        return SkinnyLinearSettings(num_tokens, 4, 1, 4, 4, 4, norm_first=norm_first and head)
    if element_size != 2 or head:
        return None
    rows = 8 if num_tokens <= 8 else 16
    if gated:
        warps_k = 4 if in_features <= 1536 else 2
        return SkinnyLinearSettings(rows, 16, 1, warps_k, 4, 8, norm_first=norm_first, early=wide)
    warps_k = 8 if out_features <= 2048 and in_features > 1536 else 4
    limit = 128 if in_features > 1536 and (rows == 8 or warps_k == 8) else None
    return SkinnyLinearSettings(rows, 16, 1, warps_k, 4, 8, limit, norm_first, early=wide)
