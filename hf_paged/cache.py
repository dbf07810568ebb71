"""PagedCache: a transformers ``Cache`` whose keys and values live in pages."""

from typing import Any

import torch
from hf_paged_kernels.checks import PAGE_SIZES
from hf_paged_kernels.ops import copy_pages_op, write_pages_op
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from .errors import UnsupportedModelError
from .paged_states import LayerUpdate, PagedStates
from .paging import PagePool, SequenceTable
from .step_plan import StepPlan
from .transformers_internals import is_dummy_layer, uses_paged_flash


class PagedLayer(CacheLayerMixin):
    """The keys and values of one attention layer; its pages and lengths are those of the whole cache.

    ``window`` is the layer's sliding window in tokens, or None. The window is applied by attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: "PagedCache", index: int, window: int | None) -> None:
        # The base class assigns keys and values, which are computed here: its __init__ is not called.
        self.cache, self.index, self.window = cache, index, window
        self.is_sliding = window is not None
        self.columns = 0
        self.pending: LayerUpdate | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds any token."""
        return self.columns > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """Gathered keys ``[B, H, tokens, D]``, zeros where a token is padding; None before the first update."""
        return self.dense(None)[0] if self.columns else None

    @property
    def values(self) -> torch.Tensor | None:
        """Gathered values ``[B, H, tokens, D]``."""
        return self.dense(None)[1] if self.columns else None

    @property
    def batch_size(self) -> int:
        """Sequences that the cache holds."""
        return self.cache.num_seqs

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: page tensors are made when the first tokens are written."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys ``[B, H, L, D]`` and values ``[B, H, L, Dv]``; returns all of them, lazily or gathered."""
        self.flush()
        self.cache.check_new_states(key_states, value_states)
        update = LayerUpdate(self, self.columns, key_states, value_states)
        self.columns += key_states.shape[2]
        self.pending = update
        if uses_paged_flash(self.cache.config):
            return PagedStates(update, is_key=True), PagedStates(update, is_key=False)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "PagedCache keeps keys and values without their gradients: call the model under torch.no_grad(), or "
                "train with use_cache=False."
            )
        return self.dense(update)

    def flush(self) -> None:
        """Write an update that no attention function asked for, every column taken as a token."""
        if self.pending is not None:
            self.write(self.pending, None)

    def write(self, update: LayerUpdate, mask: torch.Tensor | None) -> StepPlan:
        """Place an update's tokens in the pages, once; ``mask`` is 2D, True where a column is a token.

        Returns:
            The step's plan on the layer's device.
        """
        try:
            plan = self.cache.plan_step(update, mask)
        except Exception:
            self.cache.forget_pending()
            raise
        plan = plan.on(update.key.device)
        if not update.written:
            k_pages, v_pages = self.pages(update)
            write_pages_op(plan.pack(update.key), plan.pack(update.value), k_pages, v_pages, plan.slot_mapping)
            update.written = True
            self.pending = None
        return plan

    def pages(self, update: LayerUpdate | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(k_pages, v_pages)``, made like the update's keys and values the first time."""

        def make(num_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
            assert update is not None
            # Tensors born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                k, v = (
                    torch.empty(
                        num_pages, x.shape[1], self.cache.page_size, x.shape[3], dtype=x.dtype, device=x.device
                    )
                    for x in (update.key, update.value)
                )
            return k, v

        return self.cache.pool.layer(self.index, make)

    def dense(self, update: LayerUpdate | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, columns, D]`` and values gathered from the pages, up to and with ``update``."""
        if update is not None and not update.written:
            self.write(update, None)
        self.flush()
        columns = self.columns if update is None else update.start + update.key.shape[2]
        k_pages, v_pages = self.pages()
        rows, cols, slots = (x.to(k_pages.device) for x in self.cache.slots_of_columns(columns))
        dense = []
        for pages in (k_pages, v_pages):
            out = pages.new_zeros(self.cache.num_seqs, columns, pages.shape[1], pages.shape[3])
            out[rows, cols] = pages[slots // self.cache.page_size, :, slots % self.cache.page_size]
            dense.append(out.transpose(1, 2))
        return dense[0], dense[1]

    def get_seq_length(self) -> int:
        """Columns held: the padded length that transformers counts in."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name of earlier transformers versions)."""
        return -1

    def offload(self) -> None:
        """Refused: pages of several sequences share one tensor."""
        raise ValueError("PagedCache does not offload layers; use cache_implementation='offloaded' for that.")

    prefetch = offload

    # One table serves all layers: PagedCache changes it once, and the layers follow.
    def reset(self) -> None:
        """Called by :meth:`PagedCache.reset`."""
        self.columns, self.pending = 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused on one layer: see :meth:`PagedCache.reorder_cache`."""
        raise ValueError("call the method of PagedCache: its layers share one page table.")

    crop = batch_repeat_interleave = batch_select_indices = reorder_cache


class PagedCache(Cache):
    """Keys and values in pages, taken as tokens come and given back when they go.

    With ``attn_implementation="paged_flash"`` attention reads the pages in place; with any other, the cache gathers
    dense keys and values: same results, slower. Left padding owns no pages. Reordering, selecting and repeating
    sequences moves page-table rows and counts owners; a shared page is copied when somebody writes into it.

    Layers without keys and values (Mamba, linear attention, convolutions) keep transformers' own state layers.

    Args:
        config: the model's config (``model.config``).
        page_size: tokens of a page: 8, 16, 32, 64, 128 or 256.
        kv_dtype: "auto": the dtype of the model's keys and values.
        num_pages: a fixed number of pages; None: the pool doubles as tokens come.

    Raises:
        UnsupportedModelError: the model has cache layers that are not plain keys and values.
        ValueError: an argument is not one of those accepted.

    Example::

        cache = hf_paged.PagedCache(model.config)
        out = model.generate(**inputs, past_key_values=cache)
        cache.pages_in_use  # pages of all sequences together
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        page_size: int = 16,
        kv_dtype: str = "auto",
        num_pages: int | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers config (model.config), got {type(config).__name__}.")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size!r}.")
        if kv_dtype != "auto":
            raise ValueError(f'kv_dtype must be "auto" (the model\'s own dtype), got {kv_dtype!r}.')
        if num_pages is not None and (not isinstance(num_pages, int) or num_pages < 1):
            raise ValueError(f"num_pages must be None or a positive int, got {num_pages!r}.")
        self.config = config.get_text_config(decoder=True)
        self.page_size = page_size
        self.pool = PagePool(page_size, num_pages)
        self.table = SequenceTable(self.pool.allocator, page_size)
        self.plan: StepPlan | None = None
        self.columns = 0
        # bool [B, columns] on CPU, True where a column is a token; None while every column is.
        self.is_token: torch.Tensor | None = None
        super().__init__(layers=[self._layer(i, x) for i, x in enumerate(DynamicCache(config=self.config).layers)])

    def _layer(self, index: int, template: Any) -> Any:
        """The paged layer for one of DynamicCache's layers, or the layer itself where it holds no keys."""
        if type(template) is DynamicLayer:
            return PagedLayer(self, index, None)
        if type(template) is DynamicSlidingWindowLayer:
            return PagedLayer(self, index, template.sliding_window)
        if type(template) is LinearAttentionLayer or is_dummy_layer(template):
            return template
        raise UnsupportedModelError(
            f"PagedCache does not hold layers of type {type(template).__name__} (layer {index} of "
            f"{self.config.model_type}); leave past_key_values out, or pass a DynamicCache(config=model.config)."
        )

    # Introspection

    @property
    def num_seqs(self) -> int:
        """Sequences (batch rows) held."""
        return len(self.table)

    @property
    def pages_in_use(self) -> int:
        """Pages with an owner. A page counts once however many sequences share it."""
        return self.pool.allocator.num_used

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use, keys and values of all layers."""
        return self.pages_in_use * self.pool.page_bytes

    def check(self) -> None:
        """Prove that every page is owned by this cache or free (AssertionError if not)."""
        self.pool.check(page for pages in self.table.pages for page in pages)
        for pages, length in zip(self.table.pages, self.table.lengths):
            assert len(pages) == -(-length // self.page_size), "a sequence has more or fewer pages than it needs"

    def __repr__(self) -> str:
        return (
            f"PagedCache({self.num_seqs} sequences, {self.columns} columns, {self.pages_in_use} pages of "
            f"{self.page_size} tokens in use)"
        )

    # A step

    def check_new_states(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values must fit the sequences held."""
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"keys and values must be [batch, heads, tokens, head_dim], got {list(key.shape)}, {list(value.shape)}."
            )
        if self.num_seqs and key.shape[0] != self.num_seqs:
            raise ValueError(
                f"the cache holds {self.num_seqs} sequences, the step brings {key.shape[0]}: call reset(), "
                f"batch_repeat_interleave() or batch_select_indices() first."
            )

    def plan_step(self, update: LayerUpdate, mask: torch.Tensor | None) -> StepPlan:
        """The plan of the step that ``update`` belongs to; the first layer that asks builds it, the others share it.

        Args:
            update: new keys and values of one layer.
            mask: 2D, True where a column is a token, columns of the cache and of the step; None: all are.

        Raises:
            OutOfPagesError: a fixed pool has too few pages; the cache is as before.
            ValueError: the mask or the layers do not fit what is held.
        """
        num_seqs, _, num_new, _ = update.key.shape
        if self.plan is not None and (self.plan.start, self.plan.num_new) == (update.start, num_new):
            if mask is not None and self.is_token is None and not bool(mask.all()):
                raise UnsupportedModelError(
                    f"layer {update.layer.index} of {self.config.model_type} masks padding and an earlier layer of the "
                    f'same step took it for tokens: load the model with attn_implementation="eager" or "sdpa", or pass '
                    f"past_key_values=DynamicCache(config=model.config)."
                )
            return self.plan
        if update.written:
            raise ValueError("the cache was changed since this update: its keys and values cannot be read any more.")
        if update.start != self.columns:
            raise ValueError(
                f"layer {update.layer.index} holds {update.start} columns, the cache {self.columns}: PagedCache serves "
                f"models whose layers all see the same tokens."
            )
        new_mask = None if mask is None else self._new_columns(mask, num_seqs, num_new)
        counts = [num_new] * num_seqs if new_mask is None else new_mask.sum(1).tolist()
        if not len(self.table):
            self.table = SequenceTable(self.pool.allocator, self.page_size, num_seqs)
        before = list(self.table.lengths)
        self.pool.make_room(self.table.pages_needed(counts))
        copies = self.table.append(counts)
        self._copy(copies)
        self._record_columns(new_mask, num_seqs, num_new)
        self.plan = self._build_plan(update.start, num_new, before, counts, new_mask)
        return self.plan

    def _build_plan(
        self, start: int, num_new: int, before: list[int], counts: list[int], new_mask: torch.Tensor | None
    ) -> StepPlan:
        table = self._page_table()
        slots = [
            self._slots(row, length, length + count) for row, (length, count) in enumerate(zip(before, counts)) if count
        ]
        return StepPlan(
            start=start,
            num_new=num_new,
            is_first=not any(before),
            max_query_len=max([1, *counts]),
            slot_mapping=torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64),
            page_table=table,
            seq_lens=torch.tensor(self.table.lengths, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            token_index=None if new_mask is None else new_mask.flatten().nonzero().squeeze(1),
        )

    def _new_columns(self, mask: torch.Tensor, num_seqs: int, num_new: int) -> torch.Tensor | None:
        """The part of a 2D mask that speaks of the step's columns, on CPU; None where all are tokens."""
        expected = (num_seqs, self.columns + num_new)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"attention_mask must cover the {self.columns} columns in the cache and the {num_new} new ones, "
                f"{list(expected)}, got {list(mask.shape)}."
            )
        mask = mask.bool().cpu()
        held, new = mask[:, : self.columns], mask[:, self.columns :]
        stored = torch.ones_like(held) if self.is_token is None else self.is_token
        if bool((stored & ~held).any()):
            row, column = (stored & ~held).nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask hides column {column} of row {row}, which the cache holds as a token: pass the mask "
                f"from the first call on, or start with a new PagedCache."
            )
        return None if bool(new.all()) else new

    def _record_columns(self, new_mask: torch.Tensor | None, num_seqs: int, num_new: int) -> None:
        if self.is_token is not None or new_mask is not None:
            held = torch.ones(num_seqs, self.columns, dtype=torch.bool) if self.is_token is None else self.is_token
            new = torch.ones(num_seqs, num_new, dtype=torch.bool) if new_mask is None else new_mask
            self.is_token = torch.cat([held, new], dim=1)
        self.columns += num_new

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy shared pages that are about to be written, in every layer."""
        if not copies:
            return
        source, target = (torch.tensor(x, dtype=torch.int32) for x in zip(*copies))
        for layer, k_pages in self.pool.k_pages.items():
            device = k_pages.device
            copy_pages_op(k_pages, self.pool.v_pages[layer], source.to(device), target.to(device))

    def _page_table(self) -> torch.Tensor:
        width = max((len(pages) for pages in self.table.pages), default=0)
        rows = [pages + [0] * (width - len(pages)) for pages in self.table.pages]
        return torch.tensor(rows, dtype=torch.int32).view(len(rows), width)

    def _slots(self, row: int, first: int, last: int) -> torch.Tensor:
        """int64 slots of the tokens first..last of a row."""
        tokens = torch.arange(first, last)
        pages = torch.tensor(self.table.pages[row], dtype=torch.int64)
        return pages[tokens // self.page_size] * self.page_size + tokens % self.page_size

    def slots_of_columns(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(row, column, slot)`` of every token among the first ``columns`` columns, int64 on CPU."""
        if self.is_token is None:
            held = torch.ones(self.num_seqs, columns, dtype=torch.bool)
        else:
            held = self.is_token[:, :columns]
        rows, cols = held.nonzero(as_tuple=True)
        counts = held.sum(1).tolist()
        slots = [self._slots(row, 0, count) for row, count in enumerate(counts)]
        return rows, cols, torch.cat(slots) if slots else rows

    def forget_pending(self) -> None:
        """Take back updates that could not be placed, so that every layer agrees with the table again."""
        for layer in self._paged_layers():
            layer.columns, layer.pending = self.columns, None

    # What generation does with a cache

    def _paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _begin_change(self) -> list[Any]:
        """Write what is pending, drop the plan; returns the layers that keep states of their own."""
        for layer in self._paged_layers():
            layer.flush()
        self.plan = None
        return [layer for layer in self.layers if not isinstance(layer, PagedLayer)]

    def reset(self) -> None:
        """Give every page back; the cache is as new, for any batch size."""
        for layer in self._paged_layers():
            layer.reset()
        for layer in self._begin_change():
            layer.reset()
        self.table.clear()
        self.pool.drop_tensors()
        self.columns, self.is_token = 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the old row ``beam_idx[i]``; table rows move, keys and values do not."""
        for layer in self._begin_change():
            layer.reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (int, or a bool mask)."""
        for layer in self._begin_change():
            layer.batch_select_indices(indices)
        self._select(torch.arange(self.num_seqs)[torch.as_tensor(indices).cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row; the copies share their pages."""
        for layer in self._begin_change():
            layer.batch_repeat_interleave(repeats)
        self._select([row for row in range(self.num_seqs) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if not len(self.table):
            return
        self.table.select(rows)
        if self.is_token is not None:
            self.is_token = self.is_token[rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (a number not above 0) and give their pages back."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be 0 or negative, the number of columns to remove, got {tokens_to_remove}."
            )
        for layer in self._begin_change():
            layer.crop(tokens_to_remove)
        remove = min(-tokens_to_remove, self.columns)
        if remove == 0:
            return
        keep = self.columns - remove
        if self.is_token is None:
            lengths = [keep] * self.num_seqs
        else:
            self.is_token = self.is_token[:, :keep]
            lengths = self.is_token.sum(1).tolist()
        self.table.truncate(lengths)
        self.columns = keep
        for layer in self._paged_layers():
            layer.columns = keep

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query (asked for by transformers 5.23)."""
        return self.get_seq_length(layer_idx)
