"""The tensors of one step, built once and shared by all layers of a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from hf_paged_kernels import backend
from hf_paged_kernels.attention.decode_step import DecodeStep
from hf_paged_kernels.attention.ops import split_plan_op
from hf_paged_kernels.settings import SHORT_QUERY

from ..paging import GONE

ALIGNMENT = 16
"""Bytes to which tensors that travel together are aligned: kernels are compiled for pointers like those of a tensor."""


class StepSplitPlans:
    """The work lists of a step's short queries, made once for all layers of a group and window.

    See :func:`hf_paged_kernels.make_split_plan`.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def __contains__(self, key: tuple[int, int | None]) -> bool:
        """Whether the plan of a group and window was asked for before."""
        return key in self._plans

    def get(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_query_len: int,
        page_size: int,
        window_left: int | None,
        group: int = 0,
    ) -> torch.Tensor | None:
        """The plan that layers of a group and window share; None where no kernel reads one.

        Args:
            page_table: int32 ``[num_seqs, max_pages]`` of the group.
            seq_lens: int32 ``[num_seqs]``.
            cu_seqlens_q: int32 ``[num_seqs + 1]``.
            max_query_len: longest query of the step, in tokens.
            page_size: tokens of a page.
            window_left: keys that a query sees before its own, None: all.
            group: number of the group of layers, where a step has several tables.
        """
        key = group, window_left
        if key not in self._plans:
            has_plan = max_query_len <= SHORT_QUERY and backend.has_gluon(seq_lens.device)
            max_tokens = page_table.shape[1] * page_size
            self._plans[key] = split_plan_op(seq_lens, cu_seqlens_q, max_tokens, window_left) if has_plan else None
        return self._plans[key]


@dataclass(slots=True)
class PagedStepPlan:
    """Where this step's tokens go and what they may read.

    A step brings ``num_new`` columns for each of ``num_seqs`` rows; a column that the mask calls padding is no token
    and owns no slot. Tokens are packed row by row::

        mask   0 0 1 1      tokens   row 0: columns 2, 3
               1 1 1 1               row 1: columns 0, 1, 2, 3      cu_seqlens_q = [0, 2, 6]

    Attributes:
        start: columns that the cache held before the step.
        num_new: columns of the step.
        is_first: no row held a token before: this step's keys and values are all there is.
        max_query_len: longest row of the step, in tokens (at least 1).
        slot_mapping: int64 ``[num_tokens]``.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, tokens of each row with the new ones.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        token_index: int64 ``[num_tokens]``, ``row * num_new + column`` of each token; None: every column is a token.
        padding_index: int64 ``[num_padding]``, the same of padding behind a row's last token; None: there is none.
        cu_seqlens_padding: int32 ``[num_seqs + 1]``, of this padding.
        sent: the plan with its tensors on a device, by device.
        decode: of a plan on a device whose rows bring one token each behind others; None: it is no such step.
    """

    start: int
    num_new: int
    is_first: bool
    max_query_len: int
    slot_mapping: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    token_index: torch.Tensor | None
    padding_index: torch.Tensor | None = None
    cu_seqlens_padding: torch.Tensor | None = None
    sent: dict[torch.device, "PagedStepPlan"] = field(init=False, default_factory=dict)
    decode: DecodeStep | None = field(init=False, default=None)
    _split_plans: StepSplitPlans = field(init=False, default_factory=StepSplitPlans)

    def on(self, device: torch.device, page_table: torch.Tensor) -> "PagedStepPlan":
        """The plan with its tensors on ``device``, where ``page_table`` is already."""
        names = "slot_mapping", "token_index", "padding_index", "seq_lens", "cu_seqlens_q", "cu_seqlens_padding"
        sent: dict[str, Any] = dict(zip(names, send_together([getattr(self, name) for name in names], device)))
        plan = replace(self, page_table=page_table, **sent)
        if plan.num_new == 1 and plan.token_index is None and not plan.is_first:
            plan.decode = DecodeStep(page_table, plan.seq_lens, plan.cu_seqlens_q, plan.slot_mapping)
        return plan

    def split_plan(self, page_size: int, window_left: int | None) -> torch.Tensor | None:
        """The work list of short queries, see :class:`StepSplitPlans`; None for other steps."""
        return self._split_plans.get(
            self.page_table, self.seq_lens, self.cu_seqlens_q, self.max_query_len, page_size, window_left
        )

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, H, L, D]`` to packed tokens ``[T, H, D]``."""
        if self.num_new == 1 and self.token_index is None:
            return states.squeeze(2)
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.token_index is None else flat[self.token_index]

    def unpack(self, packed: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Packed ``[T, H, D]`` to ``[B, L, H, D]``; padding gives zeros, or ``padding`` ``[num_padding, H, D]``."""
        num_seqs = self.seq_lens.shape[0]
        if self.token_index is None:
            return packed.unsqueeze(1) if self.num_new == 1 else packed.view(num_seqs, self.num_new, *packed.shape[1:])
        out = packed.new_zeros(num_seqs * self.num_new, *packed.shape[1:])
        out[self.token_index] = packed
        if padding is not None:
            out[self.padding_index] = padding
        return out.view(num_seqs, self.num_new, *packed.shape[1:])


def send_together(tensors: Sequence[torch.Tensor | None], device: torch.device) -> list[torch.Tensor | None]:
    """CPU tensors of one dimension on a device, by one transfer that the host does not wait for; None stays None."""
    ends = list(accumulate(0 if x is None else -(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors))
    begins = [0, *ends[:-1]]
    packed = np.empty(ends[-1], dtype=np.uint8)
    for x, begin in zip(tensors, begins):
        if x is not None:
            packed[begin : begin + x.nbytes] = x.numpy().view(np.uint8)
    host = torch.from_numpy(packed)
    sent = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return [None if x is None else sent[begin : begin + x.nbytes].view(x.dtype) for x, begin in zip(tensors, begins)]


def slots_of_tokens(
    table: np.ndarray, before: list[int], counts: list[int], page_size: int, leaders: list[int] | None
) -> np.ndarray:
    """Slots of ``counts[i]`` new tokens behind ``before[i]``, int64 ``[num_tokens]``.

    -1, do not write, where the page is gone and where a leader of the row writes the same.
    """
    if max(counts, default=0) == min(counts, default=0) == 1:  # every decode step without padding
        rows, tokens = np.arange(len(counts)), np.array(before)
    else:
        rows = np.repeat(np.arange(len(counts)), np.array(counts, dtype=np.int64))
        # A row's first token minus the tokens packed before it: added to the packed index it gives the token.
        offsets = np.array(before) - np.array([0, *accumulate(counts)][:-1], dtype=np.int64)
        tokens = np.arange(len(rows)) + offsets[rows]
    pages = table[rows, tokens // page_size].astype(np.int64)
    slots = np.where(pages == GONE, -1, pages * page_size + tokens % page_size)
    if leaders is not None:
        slots[np.array(leaders)[rows] != rows] = -1
    return slots


def padding_behind(is_token: torch.Tensor, has_tokens: torch.Tensor) -> torch.Tensor:
    """Padding behind the last token of each row: bool ``[B, L]``.

    Args:
        is_token: bool ``[B, L]``.
        has_tokens: bool ``[B]``, whether a row has a token at all; these columns may be its last ones.
    """
    is_followed = is_token.flip(1).cumsum(1).flip(1) > 0
    return ~is_followed & has_tokens[:, None]


def prefix_sums(held: torch.Tensor) -> torch.Tensor:
    """int32 ``[B + 1]``: prefix sums of how many columns of bool ``[B, L]`` are True."""
    return torch.nn.functional.pad(held.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
