"""The work lists of a step's short queries, made once for all layers of a window."""

import torch
from hf_paged_kernels import backend
from hf_paged_kernels.attention.ops import split_plan_op
from hf_paged_kernels.settings import SHORT_QUERY


class StepSplitPlans:
    """Plans of one step by group of layers and window; see :func:`hf_paged_kernels.make_split_plan`."""

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
