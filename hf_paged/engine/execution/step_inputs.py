"""The tensors of one step, built in one place from tables by slot that live on the device.

The host sends which slots run and what it changed; everything else is computed from the tables::

    slots [n]  ->  positions = computed[slots]   input_ids = last_token[slots]      decode rows
    chunks     ->  their tokens and positions from the host                        prompts

Between two decode steps of the same slots nothing changes but what the device itself writes: ``computed`` grows by one
and ``last_token`` is the token just chosen.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from hf_paged_kernels.layers.ops import decode_inputs_op, decode_rows_op

from ...cache.step_plan import StepSplitPlans
from ..async_copy import send
from ..scheduling.slot_pages import SlotPages
from ..scheduling.slots import Slots
from ..scheduling.step import ScheduledStep
from .chunk_graphs import ON_DEVICE, Layout
from .cpu_attention import RowGroup


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """Where a group's layers find and put keys and values.

    Attributes:
        page_table: int32 ``[num_rows, width]``.
        slot_mapping: int64 ``[num_tokens]``.
    """

    page_table: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass(slots=True)
class StepInputs:
    """One forward over packed rows.

    Attributes:
        slots: int64 ``[num_rows]``, on the host.
        input_ids, position_ids: int64 ``[1, num_tokens]``, or ``[num_rows, 1]`` for a batched decode.
        seq_lens: int32 ``[num_rows]``, tokens of each row with the new ones.
        cu_seqlens_q: int32 ``[num_rows + 1]``.
        max_query_len: tokens of the row that has most in this step.
        longest: tokens of the longest row.
        num_keys: tokens of all rows together.
        groups: per group of layers.
        shares_new_keys: rows may see keys that others of them write in this step: runs of one sequence, prompts that
            begin alike.
        cpu_groups: rows that attend together on a CPU, by group of layers and window; filled by the layers.
        adapters: int32 ``[num_tokens]``, see :attr:`DeviceSlotState.adapters`; None: no request names an adapter.
    """

    slots: np.ndarray
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int
    longest: int
    num_keys: int
    groups: list[GroupInputs]
    shares_new_keys: bool = False
    cpu_groups: dict[tuple[int, int | None], list[RowGroup]] = field(default_factory=dict)
    adapters: torch.Tensor | None = None
    _copies: dict[torch.device, "StepInputs"] = field(default_factory=dict)
    _split_plans: StepSplitPlans = field(default_factory=StepSplitPlans)

    def on(self, device: torch.device) -> "StepInputs":
        """The inputs on another device of the model, copied once."""
        if device == self.seq_lens.device:
            return self
        if device not in self._copies:
            self._copies[device] = StepInputs(
                self.slots, self.input_ids, self.position_ids, self.seq_lens.to(device), self.cu_seqlens_q.to(device),
                self.max_query_len, self.longest, self.num_keys,
                [GroupInputs(g.page_table.to(device), g.slot_mapping.to(device)) for g in self.groups],
                self.shares_new_keys,
            )  # fmt: skip
        return self._copies[device]

    def split_plan(self, number: int, page_size: int, left: int | None) -> tuple[torch.Tensor | None, bool]:
        """The work list of short queries, see :class:`StepSplitPlans`, None for other steps; and ``can_prefetch_kv`` of
        ``paged_attention_op``: attention was asked for with it before, and no row sees keys of another's.

        Args:
            number: of the group of layers.
            page_size: tokens of a page.
            left: keys that a query sees before its own, None: all.
        """
        can_prefetch_kv = (number, left) in self._split_plans and not self.shares_new_keys
        plan = self._split_plans.get(
            self.groups[number].page_table,
            self.seq_lens,
            self.cu_seqlens_q,
            self.max_query_len,
            page_size,
            left,
            number,
        )
        return plan, can_prefetch_kv

    @property
    def cu_seqlens_k(self) -> torch.Tensor:
        """int32 ``[num_rows + 1]``, prefix sums of the rows' tokens."""
        return torch.nn.functional.pad(self.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))


class DeviceSlotState:
    """Tables by slot on the model's first device.

    Each has one row more, for a slot that has no tokens: it fills up batches, and stays as it is.

    Attributes:
        computed: int64 ``[num_slots + 1]``, as in :class:`Slots`; -1 in the last row.
        last_token: int64 ``[num_slots + 1]``.
        page_tables: int32 ``[num_slots + 1, width]`` for each group of layers.
        stale: bool ``[num_slots]`` on the host: the device's ``computed`` and ``last_token`` are not the host's.
        adapters: int32 ``[num_slots + 1]``: the number of each slot's adapter (:mod:`.adapters`), -1: none.
        has_adapters: steps compute with them.
    """

    def __init__(self, slots: Slots, pages: SlotPages, device: torch.device) -> None:
        self.slots, self.pages, self.device = slots, pages, device
        self.computed = torch.zeros(slots.num_slots + 1, dtype=torch.int64, device=device)
        self.computed[-1] = -1
        self.last_token = torch.zeros(slots.num_slots + 1, dtype=torch.int64, device=device)
        self.stale = np.ones(slots.num_slots, dtype=bool)
        # On CPU the host's tables are the device's.
        self.page_tables = [torch.from_numpy(table.rows).to(device) for table in pages.tables]
        self._range = torch.arange(slots.num_slots + 1, dtype=torch.int32, device=device)
        self._host_adapters = np.full(slots.num_slots + 1, -1, dtype=np.int32)
        self.adapters = torch.from_numpy(self._host_adapters).to(device)
        self.has_adapters = self._has_new_adapters = False

    def sync(self) -> None:
        """Send the page-table entries that changed."""
        for table, tensor in zip(self.pages.tables, self.page_tables):
            changes = table.take_changes()
            if changes is not None:
                rows, columns, values = self._send(np.stack(changes))
                tensor.index_put_((rows, columns), values.to(tensor.dtype))
        if self._has_new_adapters:
            self.adapters.copy_(self._send(self._host_adapters))
            self._has_new_adapters = False

    def set_adapter(self, slot: int, number: int) -> None:
        """Compute a slot with the adapter of this number from the next step on."""
        self._host_adapters[slot] = number
        self._has_new_adapters = self.device.type != "cpu"

    def _adapters_of(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Of tokens, by their slots on the device."""
        return self.adapters[slots] if self.has_adapters else None

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return send(array, self.device)

    def refresh(self, slots: np.ndarray) -> None:
        """Tell the device what only the host knows of ``slots``, before they decode."""
        stale = slots[self.stale[slots]]
        if len(stale):
            host = self.slots
            index = self._send(stale)
            self.computed[index] = self._send(host.computed[stale])
            self.last_token[index] = self._send(host.history[stale, host.computed[stale]])
            self.stale[stale] = False

    def put_tokens(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """Note the tokens just chosen for ``slots``, whose ``computed`` the host has counted: they may decode."""
        index = self._send(slots)
        self.last_token[index] = tokens.clamp(min=0).to(self.device)
        stale = slots[self.stale[slots]]
        if len(stale):
            self.computed[self._send(stale)] = self._send(self.slots.computed[stale])
            self.stale[stale] = False

    def note_tokens(self, slots: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """:meth:`put_tokens` with everything on the device; the slot without tokens stays as it is.

        Args:
            slots, tokens, lengths: int64 ``[n]``; ``lengths`` are the tokens computed by now.
        """
        self.last_token[slots] = tokens.clamp(min=0)
        self.computed[slots] = torch.where(slots < self.slots.num_slots, lengths, -1)

    def static_inputs(self, slots: torch.Tensor) -> StepInputs:
        """A decode step of ``slots`` ``[n]`` on the device, of which the host knows their number only.

        ``computed`` counts the step from then on. Slots without tokens get seq_len 0 and write nothing.
        """
        ids, positions, seq_lens = decode_inputs_op(slots, self.computed, self.last_token)
        page_size = self.pages.page_size
        groups = [GroupInputs(*decode_rows_op(slots, seq_lens, table, page_size)) for table in self.page_tables]
        num_rows = len(slots)
        longest = (self.page_tables[0].shape[1] if self.page_tables else 0) * page_size
        return StepInputs(
            np.empty(0, dtype=np.int64), ids.view(1, -1), positions.view(1, -1), seq_lens,
            self._range[: num_rows + 1], 1, longest, num_rows * longest, groups, adapters=self._adapters_of(slots),
        )  # fmt: skip

    def chunk_inputs(self, buffer: torch.Tensor, layout: Layout) -> StepInputs:
        """A step over an array of :mod:`chunk_graphs` on the device, of which the host knows the number of tokens only.

        ``computed`` counts decode rows from then on. Slots without tokens write nothing.
        """
        (slots, ends, lengths), _, (ids, positions, row_of) = layout.split(buffer)
        page_size = self.pages.page_size
        before = self.computed[slots]
        is_decode = lengths == ON_DEVICE
        lengths = torch.where(is_decode, before + 1, lengths)
        # Runs of a chunk write what is there.
        self.computed[slots] = torch.where(is_decode, lengths, before)
        slot_of = slots[row_of]
        ids = torch.where(ids == ON_DEVICE, self.last_token[slot_of], ids)
        positions = torch.where(positions == ON_DEVICE, lengths[row_of] - 1, positions)
        is_held, column = slot_of < self.slots.num_slots, positions // page_size
        groups = []
        for table in self.page_tables:
            taken = table[slots]
            page = taken[row_of, column].long()
            groups.append(GroupInputs(taken, torch.where(is_held, page * page_size + positions % page_size, -1)))
        longest = (self.page_tables[0].shape[1] if self.page_tables else 0) * page_size
        return StepInputs(
            np.empty(0, dtype=np.int64), ids.view(1, -1), positions.view(1, -1), lengths.to(torch.int32),
            torch.nn.functional.pad(ends, (1, 0)).to(torch.int32), layout.row_tokens, longest,
            len(slots) * longest, groups, shares_new_keys=True, adapters=self._adapters_of(slot_of),
        )  # fmt: skip

    def decode_inputs(self, slots: np.ndarray, batched: bool = False) -> StepInputs:
        """One token for each of ``slots``; their ``computed`` on the device counts it from then on."""
        self.refresh(slots)
        index = self._send(slots)
        positions = self.computed[index]
        ids = self.last_token[index]
        self.computed[index] = positions + 1
        groups = self._groups(index, int(self.pages.num_pages[slots].max(initial=1)), positions, None)
        lengths = self.slots.computed[slots] + 1
        shape = (-1, 1) if batched else (1, -1)
        return StepInputs(
            slots, ids.view(shape), positions.view(shape), (positions + 1).to(torch.int32),
            self._range[: len(slots) + 1], 1, int(lengths.max()), int(lengths.sum()), groups,
            adapters=self._adapters_of(index),
        )  # fmt: skip

    def inputs(self, work: ScheduledStep) -> StepInputs:
        """The whole step as one packed row."""
        if work.num_decode == len(work.slots) and int(work.counts.max()) == 1:
            return self.decode_inputs(work.slots)
        host, slots, counts = self.slots, work.slots, work.counts
        decode = work.slots[: work.num_decode]
        if work.num_decode and int(counts[: work.num_decode].max()) == 1:
            first = self.decode_inputs(decode)
            rest, rest_counts = slots[work.num_decode :], counts[work.num_decode :]
        else:
            # Drafts: the host knows every token.
            first, rest, rest_counts = None, slots, counts
        starts = host.computed[rest]
        bounds = np.concatenate([[0], rest_counts.cumsum()])
        row = np.repeat(np.arange(len(rest)), rest_counts)
        offset = np.arange(bounds[-1]) - bounds[row]
        position = starts[row] + offset
        self.stale[rest] = True
        index, sent_row, positions, ids = (
            self._send(x) for x in (rest, row, position, host.history[rest[row], position])
        )
        lengths = starts + rest_counts
        groups = self._groups(index, int(self.pages.num_pages[slots].max(initial=1)), positions, sent_row)
        seq_lens = self._send(lengths.astype(np.int32))
        num_keys, longest = int(lengths.sum()), int(lengths.max())
        adapters = self._adapters_of(index[sent_row])
        if first is not None:
            if first.adapters is not None and adapters is not None:
                adapters = torch.cat([first.adapters, adapters])
            ids, positions = torch.cat([first.input_ids[0], ids]), torch.cat([first.position_ids[0], positions])
            seq_lens = torch.cat([first.seq_lens, seq_lens])
            width = groups[0].page_table.shape[1] if groups else 0
            groups = [
                GroupInputs(
                    torch.cat(
                        [torch.nn.functional.pad(a.page_table, (0, width - a.page_table.shape[1])), b.page_table]
                    ),
                    torch.cat([a.slot_mapping, b.slot_mapping]),
                )
                for a, b in zip(first.groups, groups)
            ]
            num_keys, longest = num_keys + first.num_keys, max(longest, first.longest)
        cu_seqlens = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        return StepInputs(
            slots, ids.view(1, -1), positions.view(1, -1), seq_lens, self._send(cu_seqlens), int(counts.max()),
            longest, num_keys, groups, shares_new_keys=len(rest) > 1, adapters=adapters,
        )  # fmt: skip

    def _groups(
        self, slots: torch.Tensor, width: int, positions: torch.Tensor, row: torch.Tensor | None
    ) -> list[GroupInputs]:
        """Tables and slot mappings; ``row`` is each token's row, None: one token a row."""
        page_size = self.pages.page_size
        column, offset = positions // page_size, positions % page_size
        groups = []
        for table in self.page_tables:
            rows = table[:, :width][slots]
            if row is None:
                page = rows.gather(1, column[:, None]).squeeze(1)
            else:
                page = rows[row, column]
            groups.append(GroupInputs(rows, page.long() * page_size + offset))
        return groups
