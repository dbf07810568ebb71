"""PagedCache: a transformers ``Cache`` whose keys and values live in pages."""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from hf_paged_kernels.checks import PAGE_SIZES
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..paging import GONE, GroupMemory, PagePool
from .layer_group import LayerGroup
from .layer_kinds import HYBRID, set_layers
from .page_ops import SwappedSequence, swap_in, swap_out
from .paged_layer import PagedHybridLayer, PagedLayer
from .step_planner import StepPlanner


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
            scale per token and head; "int8" holds keys rotated, so that outlier channels cost the others nothing
            (docs/guides/quantised.md). The tokens of a first step attend to each other unquantised.
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
        self.config = config.get_text_config(decoder=True)
        self.page_size = self.pool.page_size
        kinds = set_layers(self.config, self.pool)
        self.groups = {window: LayerGroup(pages) for window, pages in self.pool.groups.items()}
        if pool is not None:
            # A shared pool outlives its caches: what a dropped cache holds must come back.
            weakref.finalize(self, _release, [(group.pages, group.table) for group in self.groups.values()])
        paged = [index for index, (_, pages) in enumerate(kinds) if pages is not None]
        keeps_states = any(isinstance(template, LinearAttentionLayer) for template, _ in kinds)
        self.planner = StepPlanner(
            self.config.model_type, self.pool, self.groups, paged, keeps_states, owns_pool=pool is None
        )
        layers: list[Any] = []
        for index, (template, pages) in enumerate(kinds):
            if pages is None:
                layers.append(template)
                continue
            arguments = self.config, self.planner, self.groups[pages.window], index
            is_hybrid = type(template) in HYBRID
            layers.append(
                PagedHybridLayer(*arguments, template.number_of_states) if is_hybrid else PagedLayer(*arguments)
            )
        super().__init__(layers=layers)

    # Introspection

    @property
    def max_cache_len(self) -> int:
        """-1, no limit: PEFT's prefix tuning asks every cache for it that is no DynamicCache."""
        return -1

    @property
    def num_seqs(self) -> int:
        """Sequences (batch rows) held."""
        return self.planner.num_seqs

    @property
    def columns(self) -> int:
        """Columns of the batch held, padding counted."""
        return self.planner.columns

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

    def expect_repeats(self, repeats: int) -> None:
        """Say that every prompt comes ``repeats`` times in a row: those rows share all pages until they differ.

        ``generate()`` says so for beams and ``num_return_sequences``, which it makes by repeating rows. It holds for
        the steps from here on, the chunks of a prefill and what follows a matched prefix, up to the first in which the
        rows are not the same.
        """
        self.planner.repeats = repeats

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
            self.planner.is_token = torch.arange(columns)[None, :] >= torch.tensor(pads)[:, None]
        self.planner.begin_at(columns)
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
        if self.planner.keeps_states:
            raise ValueError(
                f"{what} is for models whose layers all keep keys and values: the recurrent states of "
                f"{self.config.model_type} are not in pages."
            )

    # Swapping: a sequence's pages in host memory

    def swap_out(self, row: int) -> SwappedSequence:
        """Move a sequence's pages to host memory (pinned, and without waiting, on a GPU) and give them back.

        The cache takes no step, and no change but ``reset``, until every sequence is back.

        Raises:
            ValueError: there is no such row, or it is swapped out already.
        """
        self.planner.flush()
        self._refuse_states("swap_out")
        if not 0 <= row < self.num_seqs or row in self.planner.swapped:
            raise ValueError(f"row must be 0 to {self.num_seqs - 1} and not swapped out yet, got {row}.")
        self.planner.drop_plans()
        length = next(iter(self.groups.values())).table.lengths[row]
        pages = {window: swap_out(group.pages, group.table, row) for window, group in self.groups.items()}
        sequence = self.planner.swapped[row] = SwappedSequence(row, length, pages)
        return sequence

    def swap_in(self, sequence: SwappedSequence) -> None:
        """Bring a sequence back into pages.

        Raises:
            OutOfPagesError: the pool has too few pages; the sequence stays swapped out.
            ValueError: the sequence is not swapped out of this cache.
        """
        if self.planner.swapped.get(sequence.row) is not sequence:
            raise ValueError(f"row {sequence.row} of this cache is not swapped out as this sequence.")
        for window, group in self.groups.items():
            try:
                swap_in(group.pages, group.table, sequence.row, sequence.length, sequence.groups[window])
            except Exception:
                for other in self.groups.values():
                    if other is group:
                        break
                    swap_out(other.pages, other.table, sequence.row)
                raise
        del self.planner.swapped[sequence.row]

    # What generation does with a cache

    def _begin_change(self) -> list[Any]:
        """Write what is pending, drop the plans; returns the layers that keep states of their own."""
        self.planner.refuse_swapped()
        self.planner.flush()
        self.planner.drop_plans()
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionLayer)]

    def reset(self) -> None:
        """Give every page back; the cache is as new, for any batch size. Stored prefixes stay.

        A pool of its own gives its memory back too (see :meth:`PagePool.trim`).
        """
        self.planner.reset()
        for layer in self._begin_change():
            # Made anew, not filled with zeros as transformers does: the next batch may be of another size.
            recording = layer.record_past
            LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
            layer.record_past = recording
        if self.planner.owns_pool and self.pool.pages_in_use:
            self.pool.trim()
        elif self.planner.owns_pool:
            # The next tokens may be of another dtype or device.
            self.pool.drop_tensors()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the old row ``beam_idx[i]``; table rows move, keys and values do not."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (int, or a bool mask)."""
        self._select(torch.arange(self.num_seqs)[torch.as_tensor(indices).cpu()].tolist())
        self.planner.trim_if_sparse()

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
                group.table.select(rows)
        if self.planner.is_token is not None:
            self.planner.is_token = self.planner.is_token[rows]

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
        self.planner.truncate(max(0, self.columns + tokens_to_remove))

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """``(keys, values, None)`` of each layer, gathered, as a DynamicCache gives them."""
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), None

    def tokens_so_far(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """A 2D mask whose held columns are what the cache knows of them, and whose new columns are tokens.

        For an assistant, whose mask hides every pad_token_id that the large model has accepted.
        """
        mask = torch.ones_like(attention_mask)
        if self.planner.is_token is not None:
            mask[:, : self.columns] = self.planner.is_token.to(mask)
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


def _release(tables: Sequence[tuple[Any, Any]]) -> None:
    for pages, table in tables:
        table.clear()
        pages.tables.remove(table)
