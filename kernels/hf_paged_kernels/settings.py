"""Launch settings: tile sizes, warps and pipeline depth, chosen by pure functions from small tables.

No run-time autotuning: the same call launches the same kernel every time, so results and compilations are
reproducible. Blocks of keys never change a row's reduction order with the batch, only with these settings.
"""

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Largest number of each quantised page dtype."""
SPLIT_LENGTH = 512
"""Keys per split of the decode path, in tokens. A fixed length, not a fixed count: a row's reduction order depends on
its own length only."""


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """Tile sizes of one attention launch: query rows, keys, warps and software-pipelining stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on ``device``; a conservative figure where it is not known."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return 64 * 1024


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


def is_short_query(group: int, max_query_len: int) -> bool:
    """Whether a step takes the split path: decode, and draft verification of up to 16 tokens a sequence."""
    return max_query_len <= 16 and max_query_len * group <= 128


def choose_paged_settings(
    head_dim: int, element_size: int, shared_memory: int, group: int, short_query: bool
) -> tuple[AttentionSettings, int]:
    """Pure part of :func:`paged_settings`; returns ``(settings, query tokens per block)``."""
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
        settings = AttentionSettings(block_m, settings.block_n, settings.num_warps, settings.num_stages)
    return settings, max(1, settings.block_m // group)
