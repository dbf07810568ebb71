"""PagedCache: a transformers ``Cache`` whose keys and values live in pages."""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from hf_paged_kernels.checks import PAGE_SIZES
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ..errors import UnsupportedModelError
from ..paging import GONE, GroupMemory, PagePool, SequenceTable
from ..transformers_internals import is_dummy_layer
from .layer_group import LayerGroup
from .paged_layer import PagedHybridLayer, PagedLayer
from .paged_states import LayerUpdate
from .swap import SwappedSequence, swap_in, swap_out

HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


class PagedCache(Cache):
    """Keys and values in pages, taken as tokens come and given back when they go.

    With ``attn_implementation="paged_flash"`` attention reads the pages in place; with any other, the cache gathers
    dense keys and values: same results, slower. Padding owns no pages. Reordering, selecting and repeating sequences
    moves page-table rows and counts owners; a shared page is copied when somebody writes into it. Layers with a sliding
    window give pages back as it moves.

    Layers without keys and values (Mamba, linear attention, convolutions) keep transformers' own states beside it.

    Args:
        config: the model's config (``model.config``).
        page_size: tokens of a page: 8, 16, 32, 64, 128 or 256.
        kv_dtype: "auto": the dtype of the model's keys and values; "fp8" (e4m3) or "int8": quantised, with a float32
            scale per token and head. The tokens of a first step attend to each other unquantised.
        num_pages: a budget of pages (see :class:`PagePool`); None: the pool grows as tokens come.
        pool: a :class:`PagePool` to share with other caches of the same model; the three arguments before are then the
            pool's, and must not be given.

    Raises:
        UnsupportedModelError: the model has cache layers that are not plain keys and values.
        ValueError, TypeError: an argument is not one of those accepted.

    Example::

        cache = hf_paged.PagedCache(model.config)
        out = model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
        cache.pages_in_use  # pages of all sequences together
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        page_size: int | None = None,
        kv_dtype: str | None = None,
        num_pages: int | None = None,
        pool: PagePool | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers config (model.config), got {type(config).__name__}.")
        if pool is None:
            self.pool = make_pool(16 if page_size is None else page_size, kv_dtype or "auto", num_pages)
        elif page_size is not None or kv_dtype is not None or num_pages is not None:
            raise ValueError("page_size, kv_dtype and num_pages are those of the pool: do not give them with pool=.")
        else:
            self.pool = pool
        self.owns_pool = pool is None
        self.config = config.get_text_config(decoder=True)
        self.page_size = self.pool.page_size
        self.columns = 0
        # bool [B, columns] on CPU, True where a column is a token; None while every column is.
        self.is_token: torch.Tensor | None = None
        self.swapped: dict[int, SwappedSequence] = {}
        self._repeats = 1
        # An error has ended a step after some states that are not in pages may have taken it.
        self._states_are_ahead = False

        templates = DynamicCache(config=self.config).layers
        windows = [layer_window(template, i, self.config) for i, template in enumerate(templates)]
        counts: dict[int | None, int] = {}
        for window in windows:
            if window != "none":
                counts[window] = counts.get(window, 0) + 1
        self.pool.set_layers(counts)
        self.groups = {window: LayerGroup(self, self.pool.groups[window]) for window in counts}
        if pool is not None:
            # A shared pool outlives its caches: what a dropped cache holds must come back.
            weakref.finalize(self, _release, [(group.pages, group.table) for group in self.groups.values()])
        super().__init__(layers=[self._layer(i, t, w) for i, (t, w) in enumerate(zip(templates, windows))])

    def _layer(self, index: int, template: Any, window: Any) -> Any:
        if window == "none":
            return template
        if type(template) in HYBRID:
            return PagedHybridLayer(self, self.groups[window], index, template.number_of_states)
        return PagedLayer(self, self.groups[window], index)

    # Introspection

    @property
    def max_cache_len(self) -> int:
        """-1, no limit: PEFT's prefix tuning asks every cache for it that is no DynamicCache."""
        return -1

    @property
    def num_seqs(self) -> int:
        """Sequences (batch rows) held."""
        return next((len(group.table) for group in self.groups.values()), 0)

    @property
    def pages_in_use(self) -> int:
        """Pages that the sequences hold, over all groups of layers. A page counts once however many share it."""
        return sum(len(set(group.table.held())) for group in self.groups.values())

    @property
    def bytes_in_use(self) -> int:
        """Bytes of :attr:`pages_in_use`, keys and values of all layers."""
        return sum(len(set(group.table.held())) * group.pages.page_bytes for group in self.groups.values())

    def memory(self) -> tuple[GroupMemory, ...]:
        """What the pool's pages are used for, by group of layers: held, shared, cached, free, and bytes."""
        return tuple(group.memory() for group in self.pool.groups.values())

    def check(self) -> None:
        """Prove that every page is owned or free (AssertionError if not)."""
        self.pool.check()

    def __repr__(self) -> str:
        return (
            f"PagedCache({self.num_seqs} sequences, {self.columns} columns, {self.pages_in_use} pages of "
            f"{self.page_size} tokens in use)"
        )

    # A step

    def check_new_states(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values must fit the sequences held."""
        shape = key.shape
        if len(shape) != 4 or value.ndim != 4 or shape[:3] != value.shape[:3]:
            raise ValueError(
                f"keys and values must be [batch, heads, tokens, head_dim], got {list(key.shape)}, {list(value.shape)}."
            )
        self._refuse_swapped()
        if self._states_are_ahead:
            raise ValueError(
                f"an error has ended an earlier step, and the recurrent states of {self.config.model_type} cannot be "
                f"taken back: call reset()."
            )
        num_seqs = self.num_seqs
        if num_seqs and shape[0] != num_seqs:
            raise ValueError(
                f"the cache holds {num_seqs} sequences, the step brings {shape[0]}: call reset(), "
                f"batch_repeat_interleave() or batch_select_indices() first."
            )

    def step_columns(self, update: LayerUpdate, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of a step's columns are tokens: bool ``[B, num_new]`` on CPU, None: all of them.

        The first layer of a step says so with its mask; what it said is held against the masks of the others.

        Raises:
            ValueError: the mask does not fit the columns, or hides a stored token.
            UnsupportedModelError: two layers of one step disagree.
        """
        num_seqs, _, num_new, _ = update.key.shape
        start = update.start
        told = None if mask is None else self._told(update, mask, num_seqs, num_new)
        if self.columns == start:
            return told
        known = None if self.is_token is None else self.is_token[:, start : start + num_new]
        if mask is not None and told is not None and (known is None or not torch.equal(told, known)):
            raise UnsupportedModelError(
                f"layer {update.layer.index} of {self.config.model_type} masks padding and an earlier layer of the "
                f'same step took it for tokens: load the model with attn_implementation="eager" or "sdpa", or pass '
                f"past_key_values=DynamicCache(config=model.config)."
            )
        return None if known is None or bool(known.all()) else known

    def _told(self, update: LayerUpdate, mask: torch.Tensor, num_seqs: int, num_new: int) -> torch.Tensor | None:
        """The part of a 2D mask that speaks of the step's columns, on CPU; None where all are tokens."""
        start = update.start
        windowed = start - update.layer.group.first_column(start) + num_new
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

    def begin_rows(self, num_seqs: int) -> None:
        """Have ``num_seqs`` rows in every group of layers, empty where there were none."""
        for group in self.groups.values():
            if not len(group.table):
                group.table.adopt([[] for _ in range(num_seqs)], [0] * num_seqs)

    def make_room(self, counts: list[int], leaders: list[int] | None) -> None:
        """Have free pages for a step in every group that has not taken its tokens yet.

        The first group of a step asks for all: where one of them cannot have its pages, none takes tokens.

        Raises:
            OutOfPagesError: the pool has too few; no sequence was changed.
        """
        behind = min(group.columns for group in self.groups.values())
        waiting = [group for group in self.groups.values() if group.columns == behind]
        self.pool.make_room({group.pages: group.pages_needed(counts, leaders) for group in waiting})

    def expect_repeats(self, repeats: int) -> None:
        """Say that every prompt comes ``repeats`` times in a row: those rows share all pages until they differ.

        ``generate()`` says so for beams and ``num_return_sequences``, which it makes by repeating rows. It holds for
        the steps from here on, the chunks of a prefill and what follows a matched prefix, up to the first in which the
        rows are not the same.
        """
        self._repeats = repeats

    def leaders(self, update: LayerUpdate, is_token: torch.Tensor | None, table: SequenceTable) -> list[int] | None:
        """Per row, the first row of the same prompt, in whose pages a step's tokens go; None: every row for itself.

        What :meth:`expect_repeats` said is believed only if the rows hold the same pages, bring the same keys and
        values, and have their tokens in the same columns.
        """
        repeats, num_seqs = self._repeats, update.key.shape[0]
        if repeats == 1:
            return None
        leaders = [row - row % repeats for row in range(num_seqs)]
        same = num_seqs % repeats == 0 and table.are_alike(leaders)
        if same and all(_is_repeated(x, repeats) for x in (is_token, update.key, update.value) if x is not None):
            return leaders
        self._repeats = 1  # Rows that differ once do not become the same again: later steps need not compare.
        return None

    def record_columns(self, update: LayerUpdate, is_token: torch.Tensor | None) -> None:
        """Remember which columns of a step are tokens; called once by each group of layers."""
        if self.columns != update.start:
            return
        num_seqs, _, num_new, _ = update.key.shape
        if self.is_token is not None or is_token is not None:
            held = torch.ones(num_seqs, self.columns, dtype=torch.bool) if self.is_token is None else self.is_token
            new = torch.ones(num_seqs, num_new, dtype=torch.bool) if is_token is None else is_token
            self.is_token = torch.cat([held, new], dim=1)
        self.columns += num_new

    def tokens_of_columns(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(row, column, token)`` of every token in the columns first..last, int64 on CPU."""
        if self.is_token is None:
            is_token = torch.ones(self.num_seqs, last, dtype=torch.bool)
        else:
            is_token = self.is_token[:, :last]
        rows, columns = is_token[:, first:].nonzero(as_tuple=True)
        return rows, columns + first, (is_token.cumsum(1) - 1)[rows, columns + first]

    def forget_pending(self) -> None:
        """Take back a step that an error has ended: updates that wait to be placed, and what other layers have placed.

        The second is not possible where a sliding window has passed what the shorter sequences need, or a layer keeps
        states that are not in pages: then the next step is refused.
        """
        self._states_are_ahead = self._keeps_states()
        layers = self._paged_layers()
        for layer in layers:
            if layer.pending is not None:
                layer.columns, layer.pending = layer.pending.start, None
        start = min(layer.columns for layer in layers)
        if not start:
            for group in self.groups.values():
                group.clear()  # rows of a first step, which may come again with another batch size
            self.columns, self.is_token = 0, None
            for layer in layers:
                layer.columns = 0
        elif start < self.columns and not self._states_are_ahead:
            lengths = self._lengths(start)
            if not any(group.lost_token(lengths) is not None for group in self.groups.values()):
                self.crop(start - self.columns)

    # Prefixes: full pages that are found again by later calls

    def match_prefix(
        self, input_ids: torch.Tensor | Sequence[int], attention_mask: torch.Tensor | None = None, salt: Hashable = None
    ) -> int:
        """Start an empty cache with the longest stored beginning of a prompt; ``generate()`` computes the rest.

        At least the last token is left to compute. Every row of a batch starts with the same number of columns, so the
        shortest match counts; a left-padded batch of a model with sliding windows starts from nothing.

        Args:
            input_ids: the prompt, ``[tokens]`` or ``[B, columns]``.
            attention_mask: ``[B, columns]`` for a left-padded batch.
            salt: prefixes are found only under the salt they were stored with, to keep tenants apart.

        Returns:
            Tokens found again, over all rows.

        Raises:
            ValueError: the cache holds tokens already, or the model keeps states that are not in pages.
        """
        rows, pads = self._rows(input_ids, attention_mask)
        if self.columns:
            raise ValueError(f"match_prefix needs an empty cache, this one holds {self.columns} columns: call reset().")
        self._refuse_states("match_prefix")
        if self.pool.prefixes is None or (any(pads) and set(self.groups) != {None}):
            return 0
        matches = [self.pool.prefixes.match(row, salt, max_tokens=len(row) - 1) for row in rows]
        columns = min(pad + match.num_tokens for pad, match in zip(pads, matches))
        lengths = [max(0, columns - pad) for pad in pads]
        for index, group in enumerate(self.groups.values()):
            group.adopt([match.pages[index] for match in matches], lengths, columns)
        if not any(lengths):
            self.reset()
            return 0
        if any(pads):
            self.is_token = torch.arange(columns)[None, :] >= torch.tensor(pads)[:, None]
        self.columns = columns
        for layer in self._paged_layers():
            layer.columns = columns
        return sum(lengths)

    def store_prefix(
        self, input_ids: torch.Tensor | Sequence[int], attention_mask: torch.Tensor | None = None, salt: Hashable = None
    ) -> int:
        """Keep the full pages of what this cache holds, to be found by :meth:`match_prefix`.

        Args:
            input_ids: the tokens that the cache holds, ``[tokens]`` or ``[B, columns]``; tokens behind them, which were
                sampled last and never computed, may follow.
            attention_mask: ``[B, columns]`` for a left-padded batch.
            salt: see :meth:`match_prefix`.

        Returns:
            Pages newly stored.
        """
        rows, _ = self._rows(input_ids, attention_mask)
        self._refuse_states("store_prefix")
        self._begin_change()
        stored = 0
        if len(rows) != self.num_seqs or self.pool.prefixes is None:
            raise ValueError(f"input_ids must have the {self.num_seqs} rows that the cache holds, got {len(rows)}.")
        tables = [group.table for group in self.groups.values()]
        for row, tokens in enumerate(rows):
            count = min(tables[0].lengths[row], len(tokens)) // self.page_size
            pages = [[None if page == GONE else page for page in table.pages[row][:count]] for table in tables]
            stored += self.pool.prefixes.insert(tokens[: count * self.page_size], pages, salt)
        return stored

    def _rows(
        self, input_ids: torch.Tensor | Sequence[int], attention_mask: torch.Tensor | None
    ) -> tuple[list[list[int]], list[int]]:
        """Tokens of each row without padding, and the columns of padding before them."""
        ids = torch.as_tensor(input_ids).cpu()
        ids = ids[None] if ids.ndim == 1 else ids
        if attention_mask is None:
            return ids.tolist(), [0] * ids.shape[0]
        behind = ids.shape[1] - attention_mask.shape[1]  # generated since: all tokens
        held = torch.nn.functional.pad(attention_mask.bool().cpu(), (0, behind), value=True)
        if bool((held[:, :-1] & ~held[:, 1:]).any()):
            raise ValueError("attention_mask must be left-padded: a row has padding behind a token.")
        return [row[keep].tolist() for row, keep in zip(ids, held)], (~held).sum(1).tolist()

    def _refuse_states(self, what: str) -> None:
        if self._keeps_states():
            raise ValueError(
                f"{what} is for models whose layers all keep keys and values: the recurrent states of "
                f"{self.config.model_type} are not in pages."
            )

    def _keeps_states(self) -> bool:
        """Whether a layer keeps states that are not in pages."""
        return any(isinstance(layer, LinearAttentionLayer) for layer in self.layers)

    # Swapping: a sequence's pages in host memory

    def swap_out(self, row: int) -> SwappedSequence:
        """Move a sequence's pages to host memory (pinned, and without waiting, on a GPU) and give them back.

        The cache takes no step, and no change but ``reset``, until every sequence is back.

        Raises:
            ValueError: there is no such row, or it is swapped out already.
        """
        for layer in self._paged_layers():
            layer.flush()
        self._refuse_states("swap_out")
        if not 0 <= row < self.num_seqs or row in self.swapped:
            raise ValueError(f"row must be 0 to {self.num_seqs - 1} and not swapped out yet, got {row}.")
        for group in self.groups.values():
            group.plan = group.plan_mask = None
        length = next(iter(self.groups.values())).table.lengths[row]
        pages = {window: swap_out(group, row) for window, group in self.groups.items()}
        self.swapped[row] = SwappedSequence(row, length, pages)
        return self.swapped[row]

    def swap_in(self, sequence: SwappedSequence) -> None:
        """Bring a sequence back into pages.

        Raises:
            OutOfPagesError: the pool has too few pages; the sequence stays swapped out.
            ValueError: the sequence is not swapped out of this cache.
        """
        if self.swapped.get(sequence.row) is not sequence:
            raise ValueError(f"row {sequence.row} of this cache is not swapped out as this sequence.")
        for window, group in self.groups.items():
            try:
                swap_in(group, sequence.row, sequence.length, sequence.groups[window])
            except Exception:
                for other in self.groups.values():
                    if other is group:
                        break
                    swap_out(other, sequence.row)
                raise
        del self.swapped[sequence.row]

    def _refuse_swapped(self) -> None:
        if self.swapped:
            raise ValueError(f"rows {sorted(self.swapped)} are swapped out: swap_in() them first.")

    # What generation does with a cache

    def _paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _begin_change(self) -> list[Any]:
        """Write what is pending, drop the plans; returns the layers that keep states of their own."""
        self._refuse_swapped()
        for layer in self._paged_layers():
            layer.flush()
        for group in self.groups.values():
            group.plan = group.plan_mask = None
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionLayer)]

    def reset(self) -> None:
        """Give every page back; the cache is as new, for any batch size. Stored prefixes stay.

        A pool of its own gives its memory back too (see :meth:`PagePool.trim`).
        """
        self.swapped.clear()
        for layer in self._paged_layers():
            layer.columns, layer.pending = 0, None
        for layer in self._begin_change():
            # Made anew, not filled with zeros as transformers does: the next batch may be of another size.
            recording = layer.record_past
            LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
            layer.record_past = recording
        for group in self.groups.values():
            group.clear()
        if self.owns_pool and self.pool.pages_in_use:
            self.pool.trim()
        elif self.owns_pool:
            # The next tokens may be of another dtype or device.
            self.pool.drop_tensors()
        self.columns, self.is_token, self._repeats, self._states_are_ahead = 0, None, 1, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the old row ``beam_idx[i]``; table rows move, keys and values do not."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (int, or a bool mask)."""
        self._select(torch.arange(self.num_seqs)[torch.as_tensor(indices).cpu()].tolist())
        self._trim_if_sparse()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row; the copies share their pages."""
        self._select([row for row in range(self.num_seqs) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        for layer in self._begin_change():
            states = [x for x in (*layer.conv_states.values(), *layer.recurrent_states.values()) if x is not None]
            if states:
                LinearAttentionLayer.reorder_cache(layer, torch.tensor(rows, device=states[0].device))
        for group in self.groups.values():
            if len(group.table):
                group.select(rows)
        if self.is_token is not None:
            self.is_token = self.is_token[rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (a number not above 0) and give their pages back.

        Raises:
            RuntimeError: a sliding window has passed tokens that are needed again, and the cache was not recording.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands over a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be 0 or negative, the number of columns to remove, got {tokens_to_remove}."
            )
        for layer in self._begin_change():
            if tokens_to_remove or layer.record_past:
                LinearAttentionLayer.crop(layer, tokens_to_remove)
        keep = max(0, self.columns + tokens_to_remove)
        lengths = self._lengths(keep)
        for group in self.groups.values():
            if len(group.table):
                group.truncate(lengths, keep)
        if self.is_token is not None:
            self.is_token = self.is_token[:, :keep]
        self.columns = keep
        for layer in self._paged_layers():
            layer.columns = keep
        self._trim_if_sparse()

    def _lengths(self, columns: int) -> list[int]:
        """Tokens of each row in the first ``columns`` columns."""
        return [columns] * self.num_seqs if self.is_token is None else self.is_token[:, :columns].sum(1).tolist()

    def _trim_if_sparse(self) -> None:
        if self.owns_pool:
            self.pool.trim(only_sparse=True)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """``(keys, values, None)`` of each layer, gathered, as a DynamicCache gives them."""
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), None

    def tokens_so_far(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """A 2D mask whose held columns are what the cache knows of them, and whose new columns are tokens.

        For an assistant, whose mask hides every pad_token_id that the large model has accepted.
        """
        mask = torch.ones_like(attention_mask)
        if self.is_token is not None:
            mask[:, : self.columns] = self.is_token.to(mask)
        return mask

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query (asked for by transformers 5.23)."""
        return self.get_seq_length(layer_idx)


def make_pool(page_size: int = 16, kv_dtype: str = "auto", num_pages: int | None = None) -> PagePool:
    """A :class:`PagePool` from checked arguments, as in :class:`PagedCache`."""
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size!r}.")
    if num_pages is not None and (not isinstance(num_pages, Integral) or isinstance(num_pages, bool) or num_pages < 1):
        raise ValueError(f"num_pages must be None or a positive int, got {num_pages!r}.")
    return PagePool(int(page_size), None if num_pages is None else int(num_pages), kv_dtype)


def layer_window(template: Any, index: int, config: PreTrainedConfig) -> Any:
    """The sliding window of one of DynamicCache's layers, None for full attention, "none" where it has no keys."""
    if type(template) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return None
    if type(template) in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return template.sliding_window
    if type(template) is LinearAttentionLayer or is_dummy_layer(template):
        return "none"
    raise UnsupportedModelError(
        f"PagedCache does not hold layers of type {type(template).__name__} (layer {index} of {config.model_type}); "
        f"leave past_key_values out, or pass a DynamicCache(config=model.config)."
    )


def _is_repeated(x: torch.Tensor, repeats: int) -> bool:
    """Whether the rows of ``x`` come ``repeats`` times in a row."""
    return bool((x.unflatten(0, (-1, repeats)) == x[::repeats, None]).all())


def _release(tables: Sequence[tuple[Any, Any]]) -> None:
    for pages, table in tables:
        table.clear()
        pages.tables.remove(table)
