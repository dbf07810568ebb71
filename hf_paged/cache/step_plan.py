"""The tensors of one step, built once and shared by all layers of a cache."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .split_plans import SplitPlans


@dataclass(slots=True)
class StepPlan:
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
    _copies: dict[torch.device, "StepPlan"] = field(default_factory=dict)
    _split_plans: SplitPlans = field(default_factory=SplitPlans)

    def on(self, device: torch.device, place_table: Callable[[torch.Tensor], torch.Tensor]) -> "StepPlan":
        """The plan with its tensors on ``device``; one copy per device, made once.

        ``place_table`` brings the page table there, which is kept from step to step.
        """
        if device not in self._copies:
            move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
            self._copies[device] = StepPlan(
                self.start, self.num_new, self.is_first, self.max_query_len, move(self.slot_mapping),
                place_table(self.page_table), move(self.seq_lens), move(self.cu_seqlens_q), move(self.token_index),
                move(self.padding_index), move(self.cu_seqlens_padding),
            )  # fmt: skip
        return self._copies[device]

    def split_plan(self, page_size: int, window_left: int | None) -> torch.Tensor | None:
        """The work list of short queries, see :class:`SplitPlans`; None for other steps."""
        return self._split_plans.get(
            self.page_table, self.seq_lens, self.cu_seqlens_q, self.max_query_len, page_size, window_left
        )

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, H, L, D]`` to packed tokens ``[T, H, D]``."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.token_index is None else flat[self.token_index]

    def unpack(self, packed: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Packed ``[T, H, D]`` to ``[B, L, H, D]``; padding gives zeros, or ``padding`` ``[num_padding, H, D]``."""
        num_seqs = self.seq_lens.shape[0]
        if self.token_index is None:
            return packed.view(num_seqs, self.num_new, *packed.shape[1:])
        out = packed.new_zeros(num_seqs * self.num_new, *packed.shape[1:])
        out[self.token_index] = packed
        if padding is not None:
            out[self.padding_index] = padding
        return out.view(num_seqs, self.num_new, *packed.shape[1:])


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
