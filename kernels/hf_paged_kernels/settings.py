"""Launch settings: tile sizes, warps and pipeline depth, chosen by pure functions from small tables.

No run-time autotuning: the same call launches the same kernel every time, so results and compilations are
reproducible. Blocks of keys never change a row's reduction order with the batch, only with these settings.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

LOG2_E = 1.4426950408889634
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Largest number of each quantised page dtype."""


def hadamard_bits(page_dtype: torch.dtype, head_dim: int) -> int:
    """Keys in pages are rotated in runs of 2^bits channels, 0: they are not; see ``pages_triton``.

    INT8 pages: 2^bits is the largest power of two that divides ``head_dim``, if that is 16 or more.
    """
    bits = (head_dim & -head_dim).bit_length() - 1
    return bits if page_dtype == torch.int8 and bits >= 4 else 0
SHORT_QUERY = 16
"""Query tokens of a sequence up to which a step takes the split path: decode, and the verification of drafts."""
SHORT_CONTEXT = 2048
"""Tokens that a step's pages hold of a sequence up to which prefill over them takes small tiles."""
LONG_SHORT_QUERY = 8
"""Short queries from this many tokens on have longer splits, see ``split_plan_triton.split_lengths``."""
LONG_SPREAD = 4
"""Their splits are spread among the others' whole splits, in the first part of so many equal ones."""
SPLIT_LENGTH = 512
"""Keys per split of the decode path, in tokens. A fixed length, not a fixed count: a row's reduction order depends on
its own length only."""


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own function, which serves kernels too, costs the host as much as a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than ``n``, 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """Tile sizes of one attention launch: query rows, keys, warps and software-pipelining stages.

    ``max_registers`` a thread, where the compiler's own choice would let fewer programs share a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class BackwardSettings:
    """Tile sizes of the backward pass.

    Attributes:
        keys: the kernel of dk and dv.
        queries: the kernel of dq.
        descriptors: load tiles through tensor descriptors where the strides allow (TMA).
    """

    keys: AttentionSettings
    queries: AttentionSettings
    descriptors: bool


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on ``device``; a conservative figure where it is not known."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # Without the first, which PyTorch does not have for AMD GPUs, a program may use no more than the second.
        optin = getattr(properties, "shared_memory_per_block_optin", None)
        return properties.shared_memory_per_block if optin is None else optin
    return 64 * 1024


def dot_precision(tensor: torch.Tensor) -> str:
    """``input_precision`` of matrix products of a tensor, as Triton accepts it for its device.

    Of 16-bit numbers every product is exact; some AMD GPUs have no "tf32", which is NVIDIA's default.
    """
    return "ieee" if tensor.dtype == torch.float32 or torch.version.hip is not None else "tf32"


def flash_settings(device: torch.device, head_dim: int, v_dim: int, element_size: int) -> AttentionSettings:
    """Settings of the dense and varlen forward kernel."""
    return choose_flash_settings(max(head_dim, v_dim), element_size, shared_memory_limit(device))


def choose_flash_settings(head_dim: int, element_size: int, shared_memory: int) -> AttentionSettings:
    """Pure part of :func:`flash_settings`: ``head_dim`` in elements, ``shared_memory`` in bytes."""
    if element_size == 4:
        # Full-precision dots run on the CUDA cores: small tiles keep the operands in registers.
        return AttentionSettings(32, 32, 4, 1) if head_dim <= 128 else AttentionSettings(16, 16, 4, 1)
    large = shared_memory >= 200 * 1024
    if head_dim <= 64:
        return AttentionSettings(128, 64, 8, 3)
    if head_dim <= 128:
        return AttentionSettings(128, 128, 8, 3) if large else AttentionSettings(64, 64, 4, 2)
    if head_dim <= 256:
        return AttentionSettings(128, 64, 8, 2) if large else AttentionSettings(64, 32, 4, 2)
    return AttentionSettings(64, 32, 8, 1) if large else AttentionSettings(16, 32, 4, 1)


HOPPER_BACKWARD: list[tuple[int, BackwardSettings]] = [
    (64, BackwardSettings(
        keys=AttentionSettings(64, 64, 4, 3, max_registers=168),
        queries=AttentionSettings(64, 64, 4, 3),
        descriptors=True,
    )),
    (128, BackwardSettings(
        keys=AttentionSettings(64, 64, 4, 2),
        queries=AttentionSettings(128, 64, 8, 3),
        descriptors=True,
    )),
    (256, BackwardSettings(
        keys=AttentionSettings(64, 64, 8, 2),
        queries=AttentionSettings(128, 32, 8, 2),
        descriptors=True,
    )),
]  # fmt: skip
"""Settings up to a head dim, with 200 KiB of shared memory; measured: eval/results/backward_h200.md."""


def flash_backward_settings(device: torch.device, head_dim: int, v_dim: int, element_size: int) -> BackwardSettings:
    """Settings of the backward kernels of the dense and varlen forward kernel."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    major = torch.cuda.get_device_capability(device)[0] if is_nvidia else 0
    return choose_flash_backward_settings(
        max(head_dim, v_dim), element_size, shared_memory_limit(device), major >= 9, major >= 10
    )


def choose_flash_backward_settings(
    head_dim: int, element_size: int, shared_memory: int, hopper: bool, blackwell: bool = False
) -> BackwardSettings:
    """Pure part of :func:`flash_backward_settings`. ``hopper``: matrix units that read shared memory, and TMA.

    ``blackwell``: theirs write beside the registers, and take more shared memory on the way.
    """
    if element_size == 4:
        tile = AttentionSettings(32, 32, 4, 1) if head_dim <= 128 else AttentionSettings(16, 16, 4, 1)
        return BackwardSettings(keys=tile, queries=tile, descriptors=False)
    if hopper and shared_memory >= 200 * 1024 and head_dim <= 256:
        chosen = next(chosen for limit, chosen in HOPPER_BACKWARD if head_dim <= limit)
        if blackwell and head_dim > 128:
            return replace(chosen, keys=replace(chosen.keys, num_stages=1))
        return chosen
    if head_dim <= 64:
        keys = queries = AttentionSettings(64, 64, 4, 2)
    elif head_dim <= 128:
        keys, queries = AttentionSettings(32, 64, 4, 2), AttentionSettings(64, 32, 4, 2)
    else:
        keys = queries = AttentionSettings(32, 32, 4, 1) if head_dim <= 256 else AttentionSettings(16, 16, 4, 1)
    return BackwardSettings(keys, queries, descriptors=False)


def paged_settings(
    device: torch.device, head_dim: int, v_dim: int, element_size: int, group: int, max_query_len: int
) -> tuple[AttentionSettings, int]:
    """Settings of ``paged_attention`` and its query tokens per block.

    Args:
        group: query heads per key/value head; they share a block's rows.
        max_query_len: longest query of the step, in tokens.
    """
    return choose_paged_settings(
        max(head_dim, v_dim), element_size, shared_memory_limit(device), group, is_short_query(group, max_query_len)
    )


def longest_short_query(group: int) -> int:
    """Tokens of the longest query that every kernel of decode takes, with ``group`` query heads per key/value head."""
    return max(1, min(SHORT_QUERY, 64 >> (group - 1).bit_length()))


def is_short_query(group: int, max_query_len: int) -> bool:
    """Whether a step takes the split path: decode, and draft verification of up to 16 tokens a sequence."""
    return max_query_len <= SHORT_QUERY and max_query_len * group <= 128


def choose_paged_settings(
    head_dim: int, element_size: int, shared_memory: int, group: int, short_query: bool
) -> tuple[AttentionSettings, int]:
    """Pure part of :func:`paged_settings`; returns ``(settings, query tokens per block)``.

    A block with fewer rows than ``group`` is for part of these heads: all would not fit into shared memory.
    """
    if short_query:
        block_m = 16
        while block_m < group:
            block_m *= 2
        block_m = min(block_m, 128)
        block_n = 64 if head_dim <= 128 and element_size <= 2 else 32
        if head_dim > 256:
            block_n = 16
        if element_size == 4:
            settings = AttentionSettings(block_m, block_n, 4, 1)
        elif head_dim <= 128:
            settings = AttentionSettings(block_m, block_n, 2 if block_m == 16 else 4, 4 if block_m == 16 else 3)
        else:
            settings = AttentionSettings(block_m, block_n, 4, 2)
    else:
        settings = choose_flash_settings(head_dim, element_size, shared_memory)
        block_m = settings.block_m
        while block_m < group:
            block_m *= 2
        # Rows of one block are GROUP heads of the same tokens; a wide group may need more rows than the table has.
        settings = replace(settings, block_m=block_m)
    while _paged_bytes(settings, head_dim, element_size) > shared_memory:
        if settings.num_stages > 3:
            settings = replace(settings, num_stages=3)
        elif settings.block_m > 16:
            settings = replace(settings, block_m=settings.block_m // 2)
        else:
            break  # Without stages keys and values are there one after the other: it fits.
    return settings, max(1, settings.block_m // group)


def _paged_bytes(settings: AttentionSettings, head_dim: int, element_size: int) -> int:
    """Shared memory that the compiler takes at most: queries and weights, and keys and values in flight.

    These wait for their page numbers: half of the stages hold them. ``architectures.md`` has what kernels take.
    """
    dim = next_power_of_2(head_dim)
    rows = settings.block_m * (dim + settings.block_n)
    return element_size * (rows + 2 * max(1, settings.num_stages // 2) * settings.block_n * dim)


@dataclass(frozen=True, slots=True)
class QuantizedSettings:
    """Settings of the Triton kernel over FP8 and INT8 pages.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a tile, a power of two up to 256. Not less than half of the threads: see ``_load_scales``.
        num_warps: of a program. One warp shares its work with no other, and needs no barriers.
        num_stages: of software pipelining; a tile of keys waits for its page numbers, so half of them hold keys.
        pairs: read values as pairs of columns, for tensor cores that take them from registers.
        programs_per_sm: programs launched for each multiprocessor, where they walk through splits.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pairs: bool = True
    programs_per_sm: int = 64


def quantized_settings(device: torch.device, head_dim: int, group: int, max_query_len: int) -> QuantizedSettings:
    """Settings of attention over FP8 and INT8 pages; ``head_dim`` the larger of keys' and values'."""
    rows = max_query_len * group if is_short_query(group, max_query_len) else None
    return choose_quantized_settings(head_dim, shared_memory_limit(device), group, rows)


def choose_quantized_settings(
    head_dim: int, shared_memory: int, group: int, short_rows: int | None
) -> QuantizedSettings:
    """Pure part of :func:`quantized_settings`; measured: eval/results/kernels_h200_notes.md.

    Args:
        head_dim: the larger of keys' and values'.
        shared_memory: in bytes.
        group: query heads per key/value head.
        short_rows: query rows of a sequence and key/value head on the split path, None: blocks of long queries.
    """
    large = shared_memory >= 200 * 1024
    if short_rows is not None and short_rows <= 32:
        block_m = 16 if short_rows <= 16 else 32
        if head_dim > 256:
            return QuantizedSettings(block_m, 32, 2, 3)
        if head_dim > 128:
            return QuantizedSettings(block_m, 64, 2, 3)
        if block_m == 32:
            return QuantizedSettings(32, 64, 2, 5)
        return QuantizedSettings(16, 64 if head_dim <= 64 else 32, 1, 5)
    needed = group if short_rows is None else short_rows
    if head_dim > 256:
        # Slow, but it fits.
        chosen = QuantizedSettings(32, 64, 4, 1, pairs=False)
    elif head_dim > 128:
        chosen = QuantizedSettings(128, 128, 8, 3, False) if large else QuantizedSettings(32, 64, 4, 2, False)
    elif large or head_dim <= 64:
        chosen = QuantizedSettings(64, 128, 4, 3, False)
    else:
        chosen = QuantizedSettings(64, 64, 4, 2, False)
    # Float16 queries of all rows pass through shared memory; where they cannot, a block is for part of the heads.
    while chosen.block_m < needed and 4 * chosen.block_m * next_power_of_2(head_dim) <= shared_memory:
        num_warps = min(2 * chosen.num_warps, chosen.block_n // 16)
        chosen = replace(chosen, block_m=2 * chosen.block_m, num_warps=num_warps)
    return chosen


@dataclass(frozen=True, slots=True)
class HopperSettings:
    """Settings of the Gluon kernel: consumer warp groups of 64 rows, keys per tile, stages, registers per thread.

    Attributes:
        pingpong: consumers start their matrix products one after the other, so that one's softmax runs under the
            others' products.
        full_weights: weights stay float32 from one tile to the next, and each thread sums its own. Fewer instructions
            and more registers.
    """

    consumers: int
    block_n: int
    stages: int
    q_stages: int = 1
    programs_per_sm: int = 1
    max_registers: int | None = None
    pingpong: bool = False
    full_weights: bool = False


def hopper_settings(
    head_dim: int, max_query_len: int, split: bool = False, max_paged_keys: int | None = None
) -> HopperSettings:
    """Settings of the Gluon kernel by head dim: decode over splits, or prefill of at most ``max_query_len`` tokens.

    Prefill over pages of at most ``max_paged_keys`` tokens a sequence takes small tiles where that is little: a large
    one is half empty at the diagonal. Three consumers are for dense and packed keys only.
    """
    if split:
        return {
            64: HopperSettings(1, 128, 3, 1, 2, 128),
            128: HopperSettings(1, 64, 2, 1, 2, 128),
            256: HopperSettings(1, 64, 2, 1, 1, 256),
        }[head_dim]
    if head_dim == 128 and max_paged_keys is not None and max_paged_keys <= SHORT_CONTEXT:
        return HopperSettings(2, 64, 4, 2)
    return {
        64: HopperSettings(3, 128, 3, 1, pingpong=True)
        if max_query_len > 8192 and max_paged_keys is None
        else HopperSettings(2, 128, 3, 2, full_weights=True),
        128: HopperSettings(2, 128, 2, 1),
        256: HopperSettings(2, 64, 2, 1),
    }[head_dim]


HOPPER_BACKWARD_ROWS = {64: 128, 128: 64}
"""Queries of a step of the Gluon backward kernel, by head dim."""


@dataclass(frozen=True, slots=True)
class QuantizedHopperSettings:
    """Settings of the Gluon decode over FP8 and INT8 pages: keys of a tile, tiles in shared memory, programs launched
    for each multiprocessor, registers of a thread."""

    block_n: int
    stages: int
    programs_per_sm: int
    max_registers: int


def choose_quantized_hopper_settings(head_dim: int) -> QuantizedHopperSettings:
    """Settings of the Gluon decode over FP8 and INT8 pages. Registers bound how many programs share a multiprocessor;
    with fewer the kernel spills."""
    return {
        64: QuantizedHopperSettings(32, 2, 64, 104),
        128: QuantizedHopperSettings(32, 2, 64, 152),
        256: QuantizedHopperSettings(32, 2, 64, 200),
    }[head_dim]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


MAX_SPLITS = 32
SHORTEST_SPLIT = 256
"""Of the Gluon decode: see ``split_plan_triton.split_lengths``."""


ITEM_NUMBERS = 8
"""Numbers of an item of a split plan."""


def max_splits(max_tokens: int) -> int:
    """Upper bound of the splits of a sequence of at most ``max_tokens`` tokens."""
    return max(1, min(MAX_SPLITS, -(-max_tokens // SHORTEST_SPLIT)))


def max_split_items(num_seqs: int, max_tokens: int) -> int:
    """Upper bound of the splits of ``num_seqs`` sequences of at most ``max_tokens`` tokens; a multiple of 4."""
    return -(-num_seqs * max_splits(max_tokens) // 4) * 4


def split_plan_size(num_seqs: int, max_tokens: int) -> int:
    """Numbers in a split plan: a head of 4, those of items, two per sequence."""
    return 4 + ITEM_NUMBERS * max_split_items(num_seqs, max_tokens) + 2 * num_seqs
