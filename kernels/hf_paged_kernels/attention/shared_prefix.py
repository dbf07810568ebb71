"""Sequences that share their first pages: the shared pages are read once for many sequences, not once for each.

    sequence 0   | p p p p p p p | a a .      prefix part: the queries of 0, 1 and 2 as one run over p, not causal
    sequence 1   | p p p p p p p | b          suffix part: every sequence over its own pages, causal
    sequence 2   | p p p p p p p | c c c .    both merged by their log-sum-exp, which is exact
    sequence 3   | d d d                      in no group: its prefix has no tokens, all of it is suffix

A run is neighbours in the packed token axis, so its queries are a slice of ``q``: nothing is gathered but page numbers.
It is cut short enough for the split path of ``paged_attention``, whose programs read a tile of keys once for all of a
run's rows. Source: Juravsky et al., "Hydragen" (2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checks import require
from . import ops

SPLIT_ROWS = 64
"""Rows of one key/value head, query tokens times query heads, that the split path takes as one tile."""
SPLIT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The step plan of :func:`shared_prefix_attention`, shared by all layers; made by :func:`make_shared_prefix`.

    Its shapes depend on the groups only, or on the bounds given, never on lengths.

    Attributes:
        page_size: tokens of a page.
        max_run_len: upper bound of a run's query tokens.
        run_starts: int64 ``[num_runs + 1]``, the first sequence of every run; runs past the last one are empty.
        prefix_pages: int64 ``[num_seqs]``, pages that each sequence shares.
        page_table: int32 ``[num_runs, max_prefix_pages]``, of the prefixes.
        seq_lens: int32 ``[num_runs]``, tokens of the prefixes.
        cu_seqlens_q: int32 ``[num_runs + 1]``, prefix sums of the runs' query tokens.
        plan: the split plan of the prefix part.
        suffix_page_table: int32 ``[num_seqs, max_suffix_pages]``, of what follows the prefixes.
        suffix_lens: int32 ``[num_seqs]``, tokens of each sequence after its prefix.
        suffix_plan: the split plan of the suffix part.
    """

    page_size: int
    max_run_len: int
    run_starts: torch.Tensor
    prefix_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    plan: torch.Tensor
    suffix_page_table: torch.Tensor
    suffix_lens: torch.Tensor
    suffix_plan: torch.Tensor

    def next_step(self, page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor) -> "SharedPrefix":
        """The plan of another step of the same groups, made on the device without a check: it may be captured.

        Args:
            page_table: int32 ``[num_seqs, max_pages_per_seq]``.
            seq_lens: int32 ``[num_seqs]``.
            cu_seqlens_q: int32 ``[num_seqs + 1]``; queries no longer than at first.
        """
        return _plan_step(
            self.run_starts, self.prefix_pages, page_table, seq_lens, cu_seqlens_q, self.page_size, self.max_run_len,
            self.page_table.shape[1], self.suffix_page_table.shape[1],
        )  # fmt: skip

    def check_values(self, page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
        """Refuse lengths that leave no private tokens, groups whose pages differ, and the plan of another step.

        Reads the device.
        """
        num_seqs, width = self.suffix_page_table.shape
        query_lens, prefix_lens = cu_seqlens_q.diff(), self.prefix_pages * self.page_size
        private = seq_lens - prefix_lens
        bad = private < query_lens
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"seq_lens[{i}] is {int(seq_lens[i])}: new tokens are private, so it must be at least the "
                f"{int(prefix_lens[i])} tokens of its shared prefix and {int(query_lens[i])} new ones."
            )
        bad = private > width * self.page_size
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"seq_lens[{i}] is {int(seq_lens[i])}: {int(private[i])} tokens follow its shared prefix, more than "
                f"the {width * self.page_size} that max_suffix_pages = {width} has room for."
            )
        run = torch.searchsorted(self.run_starts, torch.arange(num_seqs, device=seq_lens.device), right=True) - 1
        shared = torch.arange(self.page_table.shape[1], device=seq_lens.device) < self.prefix_pages[:, None]
        first_rows = page_table[self.run_starts[run], : shared.shape[1]]
        bad = ((page_table[:, : shared.shape[1]] != first_rows) & shared).any(1)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"groups: sequence {i} does not share its first {int(self.prefix_pages[i])} pages with sequence "
                f"{int(self.run_starts[run[i]])}; page_table holds others."
            )
        step = self.next_step(page_table, seq_lens, cu_seqlens_q)
        held = torch.arange(width, device=seq_lens.device) * self.page_size < step.suffix_lens[:, None]
        is_same = (
            torch.equal(self.suffix_lens, step.suffix_lens)
            and torch.equal(self.cu_seqlens_q, step.cu_seqlens_q)
            and torch.equal(self.seq_lens, step.seq_lens)
            and not bool(((self.suffix_page_table != step.suffix_page_table) & held).any())
            and not bool(((self.page_table[run] != step.page_table[run]) & shared).any())
        )
        require(
            is_same,
            "prefix was made for another step: its pages or lengths are not those of page_table, seq_lens and "
            "cu_seqlens_q. Call prefix.next_step() with them.",
        )


def run_length(head_group: int, max_query_len: int, num_seqs: int) -> int:
    """Sequences of one run: as many as the split path takes.

    Queries too long for it take the path of prefill, which cuts its own tiles: there a run is all of a group.

    Args:
        head_group: query heads per key/value head.
        max_query_len: upper bound of the query lengths.
        num_seqs: sequences of the step.
    """
    rows_per_token = 1 << (head_group - 1).bit_length()
    tokens = max(1, min(SPLIT_TOKENS, SPLIT_ROWS // rows_per_token))
    return tokens // max_query_len or max(1, num_seqs)


def cut_runs(groups: Sequence[tuple[int, int, int]], num_seqs: int, length: int) -> tuple[list[int], list[int]]:
    """Cut sequences into runs of at most ``length`` neighbours of one group, or of none.

    Args:
        groups: ``(first_sequence, num_sequences, prefix_pages)``, disjoint.
        num_seqs: sequences of the step.
        length: sequences of one run.

    Returns:
        ``(the first sequence of every run, the pages that each sequence shares)``.
    """
    starts: list[int] = []
    prefix_pages = [0] * num_seqs
    at = 0
    for first, count, pages in [*sorted(groups), (num_seqs, 0, 0)]:
        starts += [*range(at, first, length), *range(first, first + count, length)]
        prefix_pages[first : first + count] = [pages] * count
        at = first + count
    return starts, prefix_pages


def plan_groups(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    groups: Sequence[tuple[int, int, int]],
    page_size: int,
    head_group: int,
    max_query_len: int,
    max_runs: int | None,
    max_prefix_pages: int | None,
    max_suffix_pages: int | None,
) -> SharedPrefix:
    """:func:`make_shared_prefix` on checked arguments; ``head_group``: query heads per key/value head."""
    num_seqs, max_pages = page_table.shape
    length = run_length(head_group, max_query_len, num_seqs)
    starts, pages = cut_runs(groups, num_seqs, length)
    for name, bound, needed in (
        ("max_runs", max_runs, len(starts)),
        ("max_prefix_pages", max_prefix_pages, max(pages, default=0)),
    ):
        require(bound is None or bound >= needed, f"{name} must be at least the {needed} of groups, got {bound!r}.")
    num_runs = len(starts) if max_runs is None else max_runs
    starts += [num_seqs] * (num_runs + 1 - len(starts))
    return _plan_step(
        torch.tensor(starts, device=page_table.device), torch.tensor(pages, device=page_table.device),
        page_table, seq_lens, cu_seqlens_q, page_size, min(length, max(1, num_seqs)) * max_query_len,
        max_prefix_pages or max(1, max(pages, default=0)),
        max_suffix_pages or max(1, max_pages - min(pages, default=0)),
    )  # fmt: skip


def _plan_step(
    run_starts: torch.Tensor,
    prefix_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    page_size: int,
    max_run_len: int,
    max_prefix_pages: int,
    max_suffix_pages: int,
) -> SharedPrefix:
    num_seqs, max_pages = page_table.shape
    # A run's table is that of its first sequence. Empty runs point past the last one and read nothing.
    first = run_starts[:-1].clamp(max=num_seqs - 1)
    columns = torch.arange(max(max_prefix_pages, max_suffix_pages), device=page_table.device)
    suffix_columns = (prefix_pages[:, None] + columns[:max_suffix_pages]).clamp(max=max_pages - 1)
    prefix_lens = (prefix_pages * page_size).to(torch.int32)
    table = page_table[first[:, None], columns[:max_prefix_pages].clamp(max=max_pages - 1)]
    run_lens, run_sums = prefix_lens[first], cu_seqlens_q[run_starts]
    suffix_table, suffix_lens = page_table.gather(1, suffix_columns), seq_lens - prefix_lens
    # Neither part has a left bound, so the plans do not ask whether a part is causal.
    return SharedPrefix(
        page_size=page_size,
        max_run_len=max_run_len,
        run_starts=run_starts,
        prefix_pages=prefix_pages,
        page_table=table,
        seq_lens=run_lens,
        cu_seqlens_q=run_sums,
        plan=ops.split_plan_op(run_lens, run_sums, max_prefix_pages * page_size, None),
        suffix_page_table=suffix_table,
        suffix_lens=suffix_lens,
        suffix_plan=ops.split_plan_op(suffix_lens, cu_seqlens_q, max_suffix_pages * page_size, None),
    )


def attend_shared_prefix(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    prefix: SharedPrefix,
    max_query_len: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`shared_prefix_attention` without its checks, for callers that launch many layers with one ``prefix``.

    Returns:
        ``(out [T, Hq, Dv], lse [Hq, T])``.
    """
    shared, shared_lse = ops.paged_attention_op(
        q, k_pages, v_pages, prefix.page_table, prefix.seq_lens, prefix.cu_seqlens_q, prefix.max_run_len,
        None, None, softcap, None, scale, k_scale, v_scale, prefix.plan,
    )  # fmt: skip
    # Sinks take part once.
    private, private_lse = ops.paged_attention_op(
        q, k_pages, v_pages, prefix.suffix_page_table, prefix.suffix_lens, cu_seqlens_q, max_query_len,
        None, 0, softcap, sinks, scale, k_scale, v_scale, prefix.suffix_plan,
    )  # fmt: skip
    return ops.merge_attention_states_op(shared, shared_lse, private, private_lse)
