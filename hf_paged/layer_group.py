"""Layers that hold the same tokens: one page table, one step plan."""

from typing import TYPE_CHECKING

import torch
from hf_paged_kernels.ops import copy_pages_op

from .errors import UnsupportedModelError
from .paging import GONE, DeviceTable, PageGroup, SequenceTable
from .step_plan import StepPlan

if TYPE_CHECKING:
    from .cache import PagedCache
    from .paged_states import LayerUpdate


class LayerGroup:
    """The sequences of a cache in the layers that share a sliding window (None: full attention).

    Attributes:
        columns: columns of the batch that the table knows, padding counted.
        recording: keep what the window has passed until the next crop, for models that roll back.
    """

    def __init__(self, cache: "PagedCache", pages: PageGroup) -> None:
        self.cache, self.pages, self.window = cache, pages, pages.window
        self.page_size = pages.pool.page_size
        self.table = SequenceTable(pages.allocator, self.page_size)
        pages.tables.append(self.table)
        self.plan: StepPlan | None = None
        self.plan_mask: torch.Tensor | None = None
        self.columns = 0
        self.recording = False
        self.device_tables: dict[torch.device, DeviceTable] = {}

    # A step

    def plan_step(self, update: "LayerUpdate", mask: torch.Tensor | None) -> StepPlan:
        """The plan of the step that ``update`` belongs to; the first layer that asks builds it, the others share it.

        Args:
            update: new keys and values of one layer.
            mask: 2D, True where a column is a token, for the last columns of the cache and the step's. None: all are.

        Raises:
            OutOfPagesError: the pool has too few pages; the cache is as before.
            UnsupportedModelError, ValueError: the mask or the layers do not fit what is held.
        """
        num_seqs, _, num_new, _ = update.key.shape
        if self.plan is not None and (self.plan.start, self.plan.num_new) == (update.start, num_new):
            if mask is not self.plan_mask:
                self.cache.step_columns(update, mask)
            return self.plan
        if update.written:
            raise ValueError("the cache was changed since this update: its keys and values cannot be read any more.")
        if update.start != self.columns:
            raise ValueError(
                f"layer {update.layer.index} holds {update.start} columns, its group {self.columns}: PagedCache serves "
                f"models whose layers all see the same tokens."
            )
        is_token = self.cache.step_columns(update, mask)
        counts = [num_new] * num_seqs if is_token is None else is_token.sum(1).tolist()
        if not len(self.table):
            self.table.adopt([[] for _ in range(num_seqs)], [0] * num_seqs)
        before = list(self.table.lengths)
        is_first = not any(before)
        # A first step attends to its own keys, dense: of a windowed layer only the end is worth keeping.
        keep_from = self._first_kept(counts) if is_first and not self.recording else None
        repeats = self.cache.repeats_in(update, counts) if is_first else 1
        own = [0 if row % repeats else count for row, count in enumerate(counts)]
        self.pages.make_room(self.table.pages_needed(own, keep_from))
        self._copy(self.table.append(own, keep_from))
        if repeats > 1:
            self.table.select([row - row % repeats for row in range(num_seqs)])
        self.cache.record_columns(update, is_token)
        self.columns += num_new
        slots = [
            self.slots(row, first, first + count) if own[row] == count else torch.full((count,), -1)
            for row, (first, count) in enumerate(zip(before, counts))
        ]
        self.plan = StepPlan(
            start=update.start,
            num_new=num_new,
            is_first=is_first,
            max_query_len=max([1, *counts]),
            slot_mapping=torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64),
            page_table=self.page_table(),
            seq_lens=torch.tensor(self.table.lengths, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            token_index=None if is_token is None else is_token.flatten().nonzero().squeeze(1),
        )
        self.plan_mask = mask
        # The plan holds what this step reads; pages that no later query sees are free for the next step.
        if not self.recording:
            self.release()
        return self.plan

    def on_device(self, plan: StepPlan, device: torch.device) -> StepPlan:
        """A plan with its tensors on ``device``; of the page table only what changed is sent."""
        if device not in self.device_tables:
            self.device_tables[device] = DeviceTable(device)
        return plan.on(device, self.device_tables[device].update)

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

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy shared pages that are about to be written, in every layer."""
        if not copies:
            return
        source, target = (torch.tensor(x, dtype=torch.int32) for x in zip(*copies))
        for pages in self.pages.layers.values():
            device = pages.k.device
            copy_pages_op(pages.k, pages.v, source.to(device), target.to(device))
            if pages.k_scale is not None and pages.v_scale is not None:
                copy_pages_op(
                    pages.k_scale[..., None], pages.v_scale[..., None], source.to(device), target.to(device)
                )

    def page_table(self) -> torch.Tensor:
        """int32 ``[num_seqs, max_pages]`` on CPU; 0 where there is no page."""
        width = max((len(pages) for pages in self.table.pages), default=0)
        rows = [[max(page, 0) for page in pages] + [0] * (width - len(pages)) for pages in self.table.pages]
        return torch.tensor(rows, dtype=torch.int32).view(len(rows), width)

    def slots(self, row: int, first: int, last: int) -> torch.Tensor:
        """int64 slots of the tokens first..last of a row, -1 where the page is gone."""
        tokens = torch.arange(first, last)
        pages = torch.tensor(self.table.pages[row], dtype=torch.int64)[tokens // self.page_size]
        return torch.where(pages == GONE, -1, pages * self.page_size + tokens % self.page_size)

    # Between steps

    def first_column(self, columns: int) -> int:
        """The first column that a query after ``columns`` columns sees."""
        return 0 if self.window is None else max(0, columns - self.window + 1)

    def select(self, rows: list[int]) -> None:
        """Make the batch ``[old[i] for i in rows]``."""
        self.table.select(rows)

    def truncate(self, lengths: list[int], columns: int) -> None:
        """Shorten the sequences, and the batch to ``columns``.

        Raises:
            RuntimeError: the window has passed tokens that the shorter sequences need.
        """
        for length, held in zip(lengths, self.table.first_tokens()):
            needed = self.first_column(length)
            if needed < held:
                raise RuntimeError(
                    f"the sliding window of {self.window} tokens has given back token {needed}, which the shorter "
                    f"sequence needs: call activate_past_recording() on the cache before the step to be rolled back."
                )
        self.table.truncate(lengths)
        self.columns = columns
        self.release()

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


def check_window(update: "LayerUpdate", window: int | None, num_columns: int) -> None:
    """A layer must not look further back than the window by which its pages are kept."""
    kept = update.layer.group.window
    if kept is not None and num_columns > kept and (window is None or window > kept):
        raise UnsupportedModelError(
            f"layer {update.layer.index} attends over {window or 'all'} tokens, the config says {kept}: pass "
            f'past_key_values=DynamicCache(), or load the model with attn_implementation="eager".'
        )
