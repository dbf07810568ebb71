"""Attention kernels over dense, packed and paged keys and values: tensors in, tensors out.

Each function is a custom op with a Triton kernel for accelerators and a plain PyTorch reference, which CPU tensors
take. This package needs torch and, on an accelerator, triton; it never imports transformers.

    flash_attention         dense or packed queries and keys
    paged_attention         packed queries over pages, in place: prefill, decode, mixed
    make_split_plan         the work list of a decode step, for all its layers
    write_pages             new keys and values into their slots
    copy_pages              whole pages inside a pool
    merge_attention_states  two results over disjoint keys into one
    shared_prefix_attention paged_attention of sequences that share their first pages, read once for many
    make_shared_prefix      its plan of a step, for all layers
"""

from .api import (
    copy_pages,
    flash_attention,
    make_shared_prefix,
    make_split_plan,
    merge_attention_states,
    paged_attention,
    shared_prefix_attention,
    write_pages,
)
from .attention.shared_prefix import SharedPrefix

__all__ = [
    "SharedPrefix",
    "copy_pages",
    "flash_attention",
    "make_shared_prefix",
    "make_split_plan",
    "merge_attention_states",
    "paged_attention",
    "shared_prefix_attention",
    "write_pages",
]
