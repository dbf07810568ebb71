"""Layers that hold the same tokens: one page table, one step plan."""

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from hf_paged_kernels.attention.ops import copy_pages_op

from ..errors import UnsupportedModelError
from ..paging import GONE, DeviceTable, PageGroup, SequenceTable
from .step_plan import StepPlan, padding_behind, prefix_sums

if TYPE_CHECKING:
    from .paged_cache import PagedCache
    from .paged_states import LayerUpdate


class LayerGroup:
    """The sequences of a cache in the layers that share a sliding window (None: full attention).

    Attributes:
        columns: columns of the batch that the table knows, padding counted.
        recording: keep what the window has passed until the next crop, for models that roll back.
        reads_pages: whether attention of the running step reads pages in place.
    """

    def __init__(self, cache: "PagedCache", pages: PageGroup) -> None:
        self.cache, self.pages, self.window = cache, pages, pages.window
        self.page_size = pages.pool.page_size
        self.table = SequenceTable(pages.allocator, self.page_size)
        pages.tables.append(self.table)
        self.plan: StepPlan | None = None
        self.plan_mask: torch.Tensor | None = None
        self.columns = 0
        self.recording = self.reads_pages = False
        self.device_tables: dict[torch.device, DeviceTable] = {}

    # A step

    def is_in_step(self, start: int, num_new: int) -> bool:
        """Whether another layer of the group has placed a step of ``num_new`` columns behind ``start``."""
        return self.plan is not None and self.plan.start == start and self.plan.num_new == num_new

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
        if self.plan is not None and self.is_in_step(update.start, num_new):
            if mask is not self.plan_mask:
                self.cache.step_columns(update, mask)
            return self.plan
        if update.written:
            raise ValueError("the cache was changed since this update: its keys and values cannot be read any more.")
        if update.start != self.columns:
            raise ValueError(
                f"layer {update.layer.index} holds {update.start} columns, its group {self.columns}: PagedCache serves "
                f"models whose layers all see the same tokens. If an error ended an earlier step half way, take it "
                f"back with crop(), or call reset()."
            )
        is_token = self.cache.step_columns(update, mask)
        counts = [num_new] * num_seqs if is_token is None else is_token.sum(1).tolist()
        self.cache.begin_rows(num_seqs)
        leaders = self.cache.leaders(update, is_token, self.table)
        self.cache.make_room(counts, leaders)
        before = list(self.table.lengths)
        self._copy(self.table.append(counts, self._keep_from(counts), leaders))
        self.cache.record_columns(update, is_token)
        self.columns += num_new
        table = self.table.as_tensor()
        padding = None
        if is_token is not None:
            padding = padding_behind(is_token, torch.tensor(self.table.lengths) > 0)
            padding = padding if bool(padding.any()) else None
        self.plan = StepPlan(
            start=update.start,
            num_new=num_new,
            is_first=not any(before),
            max_query_len=max([1, *counts]),
            slot_mapping=torch.from_numpy(_slots(table.numpy(), before, counts, self.page_size, leaders)),
            page_table=self.page_table(),
            seq_lens=torch.tensor(self.table.lengths, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            token_index=None if is_token is None else is_token.flatten().nonzero().squeeze(1),
            padding_index=None if padding is None else padding.flatten().nonzero().squeeze(1),
            cu_seqlens_padding=None if padding is None else prefix_sums(padding),
        )
        self.plan_mask = mask
        # The plan holds what this step reads; pages that no later query sees are free for the next step.
        if not self.recording:
            self.release()
        return self.plan

    def pages_needed(self, counts: list[int], leaders: list[int] | None) -> int:
        """Pages that a step of ``counts`` tokens takes; see :meth:`SequenceTable.append`."""
        if leaders is not None and not self.table.are_alike(leaders):
            leaders = None
        return self.table.pages_needed(counts, self._keep_from(counts), leaders)

    def _keep_from(self, counts: list[int]) -> list[int] | None:
        """Per sequence, the first of a step's ``counts`` tokens worth keeping; None: all.

        A first step attends to its own keys, dense: of a windowed layer only the end is worth keeping.
        """
        return self._first_kept(counts) if not self.recording and not any(self.table.lengths) else None

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
                copy_pages_op(pages.k_scale[..., None], pages.v_scale[..., None], source.to(device), target.to(device))

    def page_table(self) -> torch.Tensor:
        """int32 ``[num_seqs, max_pages]`` on CPU; 0 where there is no page."""
        return self.table.as_tensor().clamp(min=0)

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


def _slots(
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


def check_window(update: "LayerUpdate", window: int | None, num_columns: int) -> None:
    """A layer must not look further back than the window by which its pages are kept."""
    kept = update.layer.group.window
    if kept is not None and num_columns > kept and (window is None or window > kept):
        raise UnsupportedModelError(
            f"layer {update.layer.index} attends over {window or 'all'} tokens, the config says {kept}: pass "
            f'past_key_values=DynamicCache(), or load the model with attn_implementation="eager".'
        )
