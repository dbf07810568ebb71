"""The mask function that transformers calls for ``attn_implementation="paged_flash"``."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..transformers_internals import is_causal_mask, is_plain_mask, packed_segments


def paged_flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that ``paged_flash_attention`` gets for what a model asks for.

    Causal, sliding-window and bidirectional masks are the kernels' own: only padding is left to say.

    Returns:
        None: no padding. 2D bool ``[B, kv_length]``: True where a column is a token. 2D int32: 1, 2, ... by packed
        sequence. 4D bool ``[B, 1, q_length, kv_length]``: any other mask function, and a window that reaches over
        padding between tokens.
    """
    is_plain, segments = is_plain_mask(mask_function), packed_segments(mask_function)
    given = segments if attention_mask is None else attention_mask
    if isinstance(given, FakeTensor) and not torch.compiler.is_compiling() and (is_plain or segments is not None):
        return None  # Shapes alone are asked for, and no mask changes them.
    # An exported program has no number of tokens that depends on values: it gets masks as sdpa does.
    is_exporting = _is_exporting()
    is_causal = is_plain and is_causal_mask(mask_function)
    if is_plain and not (is_exporting and attention_mask is not None):
        if attention_mask is None:
            num_filled = int(q_offset) + q_length - int(kv_offset) if is_causal else kv_length
            if num_filled >= kv_length:
                return None
            # A static cache hands over keys that are not filled yet.
            return torch.ones(batch_size, num_filled, dtype=torch.bool, device=device)
        # Windowed dense caches hold only the last columns; for all others this keeps everything.
        shown, window = attention_mask[:, -kv_length:], kwargs.get("local_size")
        if torch.compiler.is_compiling():
            # A graph has one kind of mask, whatever the values: what needs the other one is refused when it runs.
            return shown if window is None else without_gaps_op(shown, attention_mask, q_length, window, is_causal)
        if shown.shape[1] == kv_length and bool(shown.all()):
            return None
        if window is None or not _has_gaps(attention_mask[:, : int(q_offset) + q_length], q_length, window, is_causal):
            return shown
    if segments is not None and attention_mask is None and q_length == kv_length and not is_exporting:
        return (segments + 1).to(torch.int32).expand(batch_size, -1)
    if q_length == 1 and attention_mask is None and not kwargs.get("use_vmap"):
        return None
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **kwargs,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which torch 2.11 traces as True in every compiled model."""
    return torch.compiler.is_exporting()


@torch.library.custom_op("hf_paged::without_gaps", mutates_args=())
def without_gaps_op(
    shown: torch.Tensor, mask: torch.Tensor, num_queries: int, window: int, is_causal: bool
) -> torch.Tensor:
    """The columns of ``mask`` that a layer sees, as they are; looked at where a compiled model runs.

    Args:
        shown: 2D ``[B, columns]``.
        mask, num_queries, window, is_causal: as of :func:`_has_gaps`.

    Raises:
        ValueError: padding between tokens within the window.
    """
    is_captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if not is_captured and _has_gaps(mask, num_queries, window, is_causal):
        raise ValueError(
            f"attention_mask hides columns between tokens, within a sliding window of {window} columns: a compiled "
            f"model cannot serve that on paged_flash. Pad each row at one end, or call the model without torch.compile."
        )
    return shown.clone()  # An op must not return its argument.


@without_gaps_op.register_fake
def _(shown: torch.Tensor, mask: torch.Tensor, num_queries: int, window: int, is_causal: bool) -> torch.Tensor:
    return torch.empty_like(shown)


def _has_gaps(mask: torch.Tensor, num_queries: int, window: int, is_causal: bool) -> bool:
    """Whether padding between tokens lies within a sliding window that hides tokens before it.

    A mask's windows count columns, the kernels' count tokens: a query would see tokens too far back.

    Args:
        mask: 2D ``[B, L]``; the last ``num_queries`` columns are the queries.
        window: columns that a causal query sees, itself counted; without ``is_causal``, on each side.
    """
    held = mask.bool()
    if not is_causal:
        # Causal windows to either side.
        return any(_has_gaps(side, side.shape[1], window + 1, True) for side in (held, held.flip(1)))
    num_before = torch.nn.functional.pad(held.cumsum(1), (window, 0))
    num_tokens = num_before[:, window:]
    num_in_window = num_tokens - num_before[:, : num_tokens.shape[1]]
    has_gap = held & (num_in_window < num_tokens.clamp(max=window))
    return bool(has_gap[:, -num_queries:].any())
