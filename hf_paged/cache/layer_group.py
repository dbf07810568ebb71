"""Layers that hold the same tokens: one page table, one step plan."""

import torch

from ..paging import GONE, DeviceTable, PageGroup, SequenceTable
from .step_plan import PagedStepPlan


class LayerGroup:
    """The sequences of a cache in the layers that share a sliding window (None: full attention).

    Attributes:
        plan: of the running step; None before its first layer.
        plan_mask: the mask that it was made with.
        columns: columns of the batch that the table knows, padding counted.
        recording: keep what the window has passed until the next crop, for models that roll back.
        reads_pages: whether attention of the running step reads pages in place.
    """

    def __init__(self, pages: PageGroup) -> None:
        self.pages, self.window = pages, pages.window
        self.page_size = pages.pool.page_size
        self.table = SequenceTable(pages.allocator, self.page_size)
        pages.tables.append(self.table)
        self.plan: PagedStepPlan | None = None
        self.plan_mask: torch.Tensor | None = None
        self.columns = 0
        self.recording = self.reads_pages = False
        self.device_tables: dict[torch.device, DeviceTable] = {}

    # A step

    def is_in_step(self, start: int, num_new: int) -> bool:
        """Whether another layer of the group has placed a step of ``num_new`` columns behind ``start``."""
        return self.plan is not None and self.plan.start == start and self.plan.num_new == num_new

    def pages_needed(self, counts: list[int], leaders: list[int] | None) -> int:
        """Pages that a step of ``counts`` tokens takes; see :meth:`SequenceTable.append`."""
        if leaders is not None and not self.table.are_alike(leaders):
            leaders = None
        return self.table.pages_needed(counts, self.keep_from(counts), leaders)

    def keep_from(self, counts: list[int]) -> list[int] | None:
        """Per sequence, the first of a step's ``counts`` tokens worth keeping; None: all.

        A first step attends to its own keys, dense: of a windowed layer only the end is worth keeping.
        """
        return self._first_kept(counts) if not self.recording and not any(self.table.lengths) else None

    def on_device(self, plan: PagedStepPlan, device: torch.device) -> PagedStepPlan:
        """A plan with its tensors on ``device``; of the page table only what changed is sent."""
        sent = plan.sent.get(device)
        if sent is None:
            if device not in self.device_tables:
                self.device_tables[device] = DeviceTable(device)
            sent = plan.sent[device] = plan.on(device, self.device_tables[device].update(plan.page_table))
        return sent

    def _first_kept(self, lengths: list[int]) -> list[int] | None:
        """Per sequence, the first token worth keeping after ``lengths`` tokens.

        That is what a query sees at the last page boundary, a little more than the next query does: so the full pages
        of a sequence can always be stored as a prefix that somebody can go on from.
        """
        if self.window is None:
            return None
        return [max(0, n // self.page_size * self.page_size - self.window + 1) for n in lengths]

    def release(self) -> None:
        """Give back the pages that the window has passed."""
        first = self._first_kept(self.table.lengths)
        if first is not None:
            self.table.release_before(first)

    def page_table(self) -> torch.Tensor:
        """int32 ``[num_seqs, max_pages]`` on CPU; 0 where there is no page."""
        return self.table.as_tensor().clamp(min=0)

    # Between steps

    def first_column(self, columns: int) -> int:
        """The first column that a query after ``columns`` columns sees."""
        return 0 if self.window is None else max(0, columns - self.window + 1)

    def truncate(self, lengths: list[int], columns: int) -> None:
        """Shorten the sequences, and the batch to ``columns``.

        Raises:
            RuntimeError: the window has passed tokens that the shorter sequences need.
        """
        lost = self.lost_token(lengths)
        if lost is not None:
            raise RuntimeError(
                f"the sliding window of {self.window} tokens has given back token {lost}, which the shorter "
                f"sequence needs: call activate_past_recording() on the cache before the step to be rolled back."
            )
        self.table.truncate(lengths)
        self.columns = columns
        self.release()

    def lost_token(self, lengths: list[int]) -> int | None:
        """A token that the window has passed and that sequences of these lengths need; None if there is no such."""
        for length, held in zip(lengths, self.table.first_tokens()):
            if self.first_column(length) < held:
                return self.first_column(length)
        return None

    def adopt(self, pages: list[list[int | None]], lengths: list[int], columns: int) -> None:
        """Become sequences of ``lengths`` tokens in pages that the caller owns; what is behind them is given back."""
        count = [-(-length // self.page_size) for length in lengths]
        self.table.allocator.free(p for row, n in zip(pages, count) for p in row[n:] if p is not None)
        self.table.adopt([[GONE if p is None else p for p in row[:n]] for row, n in zip(pages, count)], lengths)
        self.columns = columns

    def clear(self) -> None:
        """Give every page back."""
        self.table.clear()
        self.columns, self.plan, self.plan_mask = 0, None, None
