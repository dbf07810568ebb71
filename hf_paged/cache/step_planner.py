"""A cache's steps: what each layer brings, which of it are tokens, where they go.

transformers calls ``cache.update`` on a layer, then attention. The new keys and values wait in a :class:`LayerUpdate`
until it is known which of them are padding: attention says so with its mask. The first layer of a group makes the
step's plan, the others share it.
"""

from itertools import accumulate
from typing import Any

import torch
from hf_paged_kernels.attention.ops import write_pages_op

from ..errors import UnsupportedModelError
from ..paging import LayerPages, PagePool
from .layer_group import LayerGroup
from .page_ops import SwappedSequence, copy_pages, gather
from .step_plan import PagedStepPlan, padding_behind, prefix_sums, slots_of_tokens


class LayerUpdate:
    """One call of ``cache.update`` on one layer: new keys ``[B, H, L, D]`` and values ``[B, H, L, Dv]``.

    Attributes:
        index: number of the layer.
        start: columns that the layer held before.
        written: whether they are in the pages.
    """

    __slots__ = ("group", "index", "key", "planner", "start", "value", "written")

    def __init__(
        self, planner: "StepPlanner", group: LayerGroup, index: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self.planner, self.group, self.index, self.key, self.value = planner, group, index, key, value
        self.start, self.written = planner.taken[index], False

    @property
    def pages(self) -> LayerPages:
        """The layer's page tensors."""
        return self.group.pages.layers[self.index]

    def place(self, mask: torch.Tensor | None) -> PagedStepPlan:
        """Give the tokens their places in pages; ``mask`` is 2D, True where a column is a token, None: all are.

        Returns:
            The step's plan on the layer's device.

        Raises:
            ValueError, UnsupportedModelError, OutOfPagesError: see :meth:`StepPlanner.plan_step`; the step is taken
                back.
        """
        group, key, value = self.group, self.key, self.value
        try:
            # The pages first: new keys of another kind must be refused before the table takes their tokens.
            pages = group.pages.layer(self.index, key, value)
            pages.check_like(key, value)
            plan = group.on_device(self.planner.plan_step(self, mask), key.device)
        except Exception:
            self.planner.forget_step()
            raise
        return plan

    def write(self, mask: torch.Tensor | None) -> PagedStepPlan:
        """Place the tokens and write them, once; see :meth:`place`."""
        plan = self.place(mask)
        self.write_to(plan)
        return plan

    def write_to(self, plan: PagedStepPlan) -> None:
        """Write the tokens to the places that :meth:`place` has given them, once."""
        if not self.written:
            pages = self.pages
            write_pages_op(
                plan.pack(self.key), plan.pack(self.value), pages.k, pages.v, plan.slot_mapping, pages.k_scale,
                pages.v_scale,
            )  # fmt: skip
            self._note_written()

    def decode(self, query: torch.Tensor, plan: PagedStepPlan, *options: Any) -> torch.Tensor | None:
        """Write and attend at once, where ``plan`` is one of :class:`DecodeStep`: ``[B, 1, Hq, D]``; None: not done."""
        if plan.decode is None or self.written:
            return None
        pages = self.pages
        if pages.is_quantized:
            return None
        out = plan.decode.attend(query, self.key, self.value, pages.k, pages.v, *options)
        if out is not None:
            self._note_written()
        return out

    def _note_written(self) -> None:
        self.written = True
        self.planner.pending.pop(self.index, None)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, columns, D]`` and values that a query of the step may see, the new ones last.

        Where attention has not placed them, every column is taken as a token.
        """
        group = self.group
        plan = self.planner.plan_step(self, group.plan_mask) if self.written else self.write(None)
        if plan.is_first:
            return self.key, self.value
        last = self.start + self.key.shape[2]
        return self.planner.gather(group, self.index, group.first_column(self.start), last, plan.page_table)

    def check_window(self, window: int | None) -> None:
        """Attention must not look further back than the window by which the layer's pages are kept.

        Raises:
            UnsupportedModelError: it does.
        """
        kept = self.group.window
        if kept is not None and self.start + self.key.shape[2] > kept and (window is None or window > kept):
            raise UnsupportedModelError(
                f"layer {self.index} attends over {window or 'all'} tokens, the config says {kept}: pass "
                f'past_key_values=DynamicCache(), or load the model with attn_implementation="eager".'
            )


class StepPlanner:
    """The columns of a :class:`PagedCache`, and the step that its layers take.

    Args:
        model_type: of the model, for messages.
        pool: the cache's pages.
        groups: the sequences, by the sliding window of their layers.
        layers: numbers of the layers with keys and values.
        keeps_states: whether other layers keep states that are not in pages.
        owns_pool: whether no other cache has the pool.

    Attributes:
        columns: columns of the batch held, padding counted.
        is_token: bool ``[B, columns]`` on CPU, True where a column is a token; None while every column is.
        taken: per layer, the columns that it was brought.
        pending: per layer, what it was brought last, where that is not in pages yet.
        repeats: how often each prompt comes in a row; those rows share pages until they differ.
        swapped: sequences in host memory, by row.
    """

    def __init__(
        self,
        model_type: str,
        pool: PagePool,
        groups: dict[int | None, LayerGroup],
        layers: list[int],
        keeps_states: bool,
        owns_pool: bool,
    ) -> None:
        self.model_type, self.pool, self.groups = model_type, pool, groups
        self.keeps_states, self.owns_pool = keeps_states, owns_pool
        self.taken = dict.fromkeys(layers, 0)
        self.pending: dict[int, LayerUpdate] = {}
        self.swapped: dict[int, SwappedSequence] = {}
        self.columns, self.repeats = 0, 1
        self.is_token: torch.Tensor | None = None
        # An error has ended a step after some states that are not in pages may have taken it.
        self._states_are_ahead = False

    @property
    def num_seqs(self) -> int:
        """Sequences (batch rows) held."""
        for group in self.groups.values():
            return len(group.table)  # the same in all groups
        return 0

    # A step

    def check_new_states(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values must fit the sequences held."""
        shape = key.shape
        if len(shape) != 4 or value.ndim != 4 or shape[:3] != value.shape[:3]:
            raise ValueError(
                f"keys and values must be [batch, heads, tokens, head_dim], got {list(key.shape)}, {list(value.shape)}."
            )
        self.refuse_swapped()
        if self._states_are_ahead:
            raise ValueError(
                f"an error has ended an earlier step, and the recurrent states of {self.model_type} cannot be "
                f"taken back: call reset()."
            )
        num_seqs = self.num_seqs
        if num_seqs and shape[0] != num_seqs:
            raise ValueError(
                f"the cache holds {num_seqs} sequences, the step brings {shape[0]}: call reset(), "
                f"batch_repeat_interleave() or batch_select_indices() first."
            )

    def refuse_swapped(self) -> None:
        """No sequence may be in host memory (ValueError)."""
        if self.swapped:
            raise ValueError(f"rows {sorted(self.swapped)} are swapped out: swap_in() them first.")

    def plan_step(self, update: LayerUpdate, mask: torch.Tensor | None) -> PagedStepPlan:
        """The plan of the step that ``update`` belongs to; the first layer that asks builds it, the others share it.

        Args:
            update: new keys and values of one layer.
            mask: 2D, True where a column is a token, for the last columns of the cache and the step's. None: all are.

        Raises:
            OutOfPagesError: the pool has too few pages; the cache is as before.
            UnsupportedModelError, ValueError: the mask or the layers do not fit what is held.
        """
        group, start = update.group, update.start
        num_seqs, _, num_new, _ = update.key.shape
        if group.plan is not None and group.is_in_step(start, num_new):
            if mask is not group.plan_mask:
                self._step_columns(update, mask)
            return group.plan
        if update.written:
            raise ValueError("the cache was changed since this update: its keys and values cannot be read any more.")
        if start != group.columns:
            raise ValueError(
                f"layer {update.index} holds {start} columns, its group {group.columns}: PagedCache serves "
                f"models whose layers all see the same tokens. If an error ended an earlier step half way, take it "
                f"back with crop(), or call reset()."
            )
        is_token = self._step_columns(update, mask)
        counts = [num_new] * num_seqs if is_token is None else is_token.sum(1).tolist()
        self._begin_rows(num_seqs)
        leaders = self._leaders(update, is_token)
        self._ensure_free(counts, leaders)
        before = list(group.table.lengths)
        copies = group.table.append(counts, group.keep_from(counts), leaders)
        if copies:
            # Shared pages that are about to be written.
            copy_pages(group.pages.layers.values(), *zip(*copies))
        if self.columns == start:
            self._record_columns(num_seqs, num_new, is_token)
        group.columns += num_new
        padding = None
        if is_token is not None:
            padding = padding_behind(is_token, torch.tensor(group.table.lengths) > 0)
            padding = padding if bool(padding.any()) else None
        table = group.table.as_tensor().numpy()
        group.plan_mask = mask
        group.plan = PagedStepPlan(
            start=start,
            num_new=num_new,
            is_first=not any(before),
            max_query_len=max([1, *counts]),
            slot_mapping=torch.from_numpy(slots_of_tokens(table, before, counts, group.page_size, leaders)),
            page_table=group.page_table(),
            seq_lens=torch.tensor(group.table.lengths, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            token_index=None if is_token is None else is_token.flatten().nonzero().squeeze(1),
            padding_index=None if padding is None else padding.flatten().nonzero().squeeze(1),
            cu_seqlens_padding=None if padding is None else prefix_sums(padding),
        )
        # The plan holds what this step reads; pages that no later query sees are free for the next step.
        if not group.recording:
            group.release()
        return group.plan

    def _step_columns(self, update: LayerUpdate, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of a step's columns are tokens: bool ``[B, num_new]`` on CPU, None: all of them.

        The first layer of a step says so with its mask; what it said is held against the masks of the others.

        Raises:
            ValueError: the mask does not fit the columns, or hides a stored token.
            UnsupportedModelError: two layers of one step disagree.
        """
        start, num_new = update.start, update.key.shape[2]
        masked = None if mask is None else self._new_columns(update, mask)
        if self.columns == start:
            return masked
        known = None if self.is_token is None else self.is_token[:, start : start + num_new]
        if mask is not None and masked is not None and (known is None or not torch.equal(masked, known)):
            raise UnsupportedModelError(
                f"layer {update.index} of {self.model_type} masks padding and an earlier layer of the "
                f'same step took it for tokens: load the model with attn_implementation="eager" or "sdpa", or pass '
                f"past_key_values=DynamicCache(config=model.config)."
            )
        return None if known is None or bool(known.all()) else known

    def _new_columns(self, update: LayerUpdate, mask: torch.Tensor) -> torch.Tensor | None:
        """The part of a 2D mask that speaks of the step's columns, on CPU; None where all are tokens."""
        start = update.start
        num_seqs, _, num_new, _ = update.key.shape
        windowed = start - update.group.first_column(start) + num_new
        if mask.shape[0] != num_seqs or mask.shape[1] not in (start + num_new, windowed):
            raise ValueError(
                f"attention_mask must cover the {start} columns in the cache and the {num_new} new ones, "
                f"{[num_seqs, start + num_new]}, got {list(mask.shape)}."
            )
        mask = mask.bool().cpu()
        held, new = mask[:, :-num_new], mask[:, -num_new:]
        first = start - held.shape[1]
        stored = torch.ones_like(held) if self.is_token is None else self.is_token[:, first:start]
        hidden = stored & ~held
        if bool(hidden.any()):
            row, column = hidden.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask hides column {first + column} of row {row}, which the cache holds as a token: pass "
                f"the mask from the first call on, or start with a new PagedCache. If you passed no mask, generate() "
                f"made one that hides every pad_token_id in input_ids, generated ones too: pass "
                f"attention_mask=torch.ones_like(input_ids)."
            )
        return None if bool(new.all()) else new

    def tokens_of_dense_mask(self, update: LayerUpdate, is_seen: torch.Tensor) -> torch.Tensor:
        """The 2D mask that a 4D one implies: a new column that no query of its step sees is padding.

        Args:
            update: new keys and values of one layer.
            is_seen: bool ``[B, num_keys]``, whether any query sees a key: the last columns held, then the new ones.

        Raises:
            ValueError: a query sees a column that is held as padding.
        """
        num_held = is_seen.shape[1] - update.key.shape[2]
        if self.is_token is not None:
            first = update.start - num_held
            shown = is_seen[:, :num_held].cpu() & ~self.is_token[:, first : update.start]
            if bool(shown.any()):
                row, column = shown.nonzero()[0].tolist()
                raise ValueError(
                    f"a 4D attention_mask shows column {first + column} of row {row}, which the cache holds as "
                    f"padding: no query of the step that brought it saw it."
                )
        return torch.cat([torch.ones_like(is_seen[:, :num_held]), is_seen[:, num_held:]], dim=1)

    def _begin_rows(self, num_seqs: int) -> None:
        """Have ``num_seqs`` rows in every group of layers, empty where there were none."""
        for group in self.groups.values():
            if not len(group.table):
                group.table.adopt([[] for _ in range(num_seqs)], [0] * num_seqs)

    def _ensure_free(self, counts: list[int], leaders: list[int] | None) -> None:
        """Have free pages for a step in every group that has not taken its tokens yet.

        The first group of a step asks for all: where one of them cannot have its pages, none takes tokens.

        Raises:
            OutOfPagesError: the pool has too few; no sequence was changed.
        """
        behind = min(group.columns for group in self.groups.values())
        waiting = [group for group in self.groups.values() if group.columns == behind]
        self.pool.ensure_free({group.pages: group.pages_needed(counts, leaders) for group in waiting})

    def _leaders(self, update: LayerUpdate, is_token: torch.Tensor | None) -> list[int] | None:
        """Per row, the first row of the same prompt, in whose pages a step's tokens go; None: every row for itself.

        ``repeats`` is believed only if the rows hold the same pages, bring the same keys and values, and have their
        tokens in the same columns.
        """
        repeats, num_seqs = self.repeats, update.key.shape[0]
        if repeats == 1:
            return None
        leaders = [row - row % repeats for row in range(num_seqs)]
        same = num_seqs % repeats == 0 and update.group.table.are_alike(leaders)
        if same and all(_is_repeated(x, repeats) for x in (is_token, update.key, update.value) if x is not None):
            return leaders
        self.repeats = 1  # Rows that differ once do not become the same again: later steps need not compare.
        return None

    def _record_columns(self, num_seqs: int, num_new: int, is_token: torch.Tensor | None) -> None:
        """Remember which columns of a step are tokens."""
        if self.is_token is not None or is_token is not None:
            held = torch.ones(num_seqs, self.columns, dtype=torch.bool) if self.is_token is None else self.is_token
            new = torch.ones(num_seqs, num_new, dtype=torch.bool) if is_token is None else is_token
            self.is_token = torch.cat([held, new], dim=1)
        self.columns += num_new

    def gather(
        self, group: LayerGroup, index: int, first: int, last: int, page_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns first..last of a layer ``[B, H, last - first, D]`` in the model's dtype; zeros for padding."""
        pages = group.pages.layers[index]
        device, num_seqs = pages.k.device, self.num_seqs
        if self.is_token is None:
            is_token = torch.ones(num_seqs, last, dtype=torch.bool)
        else:
            is_token = self.is_token[:, :last]
        rows, columns = is_token[:, first:].nonzero(as_tuple=True)
        tokens = (is_token.cumsum(1) - 1)[rows, columns + first]
        rows, columns, tokens = (x.to(device) for x in (rows, columns, tokens))
        page = page_table.to(device)[rows, tokens // group.page_size].long()
        dense = []
        for states in gather(pages, page, tokens % group.page_size):
            out = states.new_zeros(num_seqs, last - first, *states.shape[1:])
            out[rows, columns] = states
            dense.append(out.transpose(1, 2))
        return dense[0], dense[1]

    def forget_step(self) -> None:
        """Take back a step that an error has ended: updates that wait to be placed, and what other layers have placed.

        The second is not possible where a sliding window has passed what the shorter sequences need, or a layer keeps
        states that are not in pages: then the next step is refused.
        """
        self._states_are_ahead = self.keeps_states
        for index, update in self.pending.items():
            self.taken[index] = update.start
        self.pending.clear()
        start = min(self.taken.values())
        if not start:
            self.clear()  # rows of a first step, which may come again with another batch size
        elif start < self.columns and not self._states_are_ahead:
            lengths = self._lengths(start)
            if not any(group.lost_token(lengths) is not None for group in self.groups.values()):
                self.drop_plans()
                self.truncate(start)

    # Between steps

    def flush(self) -> None:
        """Write what no attention function asked for, every column taken as a token."""
        for update in list(self.pending.values()):
            update.write(None)

    def drop_plans(self) -> None:
        """The sequences change: no layer goes on with the step that is planned."""
        for group in self.groups.values():
            group.plan = group.plan_mask = None

    def clear(self) -> None:
        """Hold nothing."""
        for group in self.groups.values():
            group.clear()
        self.pending.clear()
        self.columns, self.is_token = 0, None
        self.taken = dict.fromkeys(self.taken, 0)

    def reset(self) -> None:
        """Hold nothing, expect nothing."""
        self.clear()
        self.swapped.clear()
        self.repeats, self._states_are_ahead = 1, False

    def begin_at(self, columns: int) -> None:
        """The groups have become sequences of ``columns`` columns."""
        self.columns = columns
        self.taken = dict.fromkeys(self.taken, columns)

    def truncate(self, columns: int) -> None:
        """Keep the first ``columns`` columns.

        Raises:
            RuntimeError: a sliding window has passed tokens that are needed again, and the cache was not recording.
        """
        lengths = self._lengths(columns)
        for group in self.groups.values():
            if len(group.table):
                group.truncate(lengths, columns)
        if self.is_token is not None:
            self.is_token = self.is_token[:, :columns]
        self.begin_at(columns)
        self.trim_if_sparse()

    def _lengths(self, columns: int) -> list[int]:
        """Tokens of each row in the first ``columns`` columns."""
        return [columns] * self.num_seqs if self.is_token is None else self.is_token[:, :columns].sum(1).tolist()

    def trim_if_sparse(self) -> None:
        """Give memory back that a pool of the cache's own no longer needs."""
        if self.owns_pool:
            self.pool.trim(only_sparse=True)


def _is_repeated(x: torch.Tensor, repeats: int) -> bool:
    """Whether the rows of ``x`` come ``repeats`` times in a row."""
    return bool((x.unflatten(0, (-1, repeats)) == x[::repeats, None]).all())
