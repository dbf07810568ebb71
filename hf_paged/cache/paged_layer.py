"""One attention layer of a PagedCache."""

from typing import TYPE_CHECKING, Any

import torch
from hf_paged_kernels.attention.ops import write_pages_op
from hf_paged_kernels.attention.reference import dequantize
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ..mixed_precision import in_one_dtype
from ..transformers_internals import uses_paged_flash
from .paged_states import LayerUpdate, PagedStates
from .step_plan import StepPlan

if TYPE_CHECKING:
    from ..paging import LayerPages
    from .layer_group import LayerGroup
    from .paged_cache import PagedCache


class PagedLayer(CacheLayerMixin):
    """The keys and values of one attention layer; its page table is its group's.

    With a sliding window it shows what transformers' ``DynamicSlidingWindowLayer`` shows: the last ``window - 1``
    columns and the new ones. The window itself is applied by attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: "PagedCache", group: "LayerGroup", index: int) -> None:
        # The base class assigns keys and values, which are computed here: its __init__ is not called.
        self.cache, self.group, self.index = cache, group, index
        self.is_sliding = group.window is not None
        self.columns = 0
        self.pending: LayerUpdate | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds any token."""
        return self.columns > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """Gathered keys ``[B, H, columns, D]``, zeros where a column is padding; None before the first update."""
        return self._stored()[0] if self.columns else None

    @property
    def values(self) -> torch.Tensor | None:
        """Gathered values ``[B, H, columns, D]``."""
        return self._stored()[1] if self.columns else None

    @property
    def batch_size(self) -> int:
        """Sequences that the cache holds, -1 before the first update."""
        return self.cache.num_seqs or -1

    @property
    def record_past(self) -> bool:
        """Whether pages that the window has passed are kept until the next crop."""
        return self.group.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.group.recording = bool(value)

    def activate_past_recording(self) -> None:
        """Keep what the window passes until the next crop, so that a step can be rolled back."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: page tensors are made when the first tokens are written."""

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys ``[B, H, L, D]`` and values ``[B, H, L, Dv]``; returns all of them, lazily or gathered."""
        self.flush()
        self.cache.check_new_states(key_states, value_states)
        key_states, value_states = in_one_dtype(key_states, value_states)
        update = LayerUpdate(self, self.columns, key_states, value_states)
        num_new = key_states.shape[2]
        self.columns += num_new
        self.pending = update
        if not self.group.is_in_step(update.start, num_new):
            # Asked once a step: a config answers slowly.
            self.group.reads_pages = uses_paged_flash(self.cache.config)
        if self.group.reads_pages:
            return PagedStates.of(update, self.columns - self.group.first_column(update.start))
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
            # The pages first: new keys of another kind must be refused before the table takes their tokens.
            pages = self.group.pages.layer(self.index, update.key, update.value)
            pages.check_like(update.key, update.value)
            plan = self.group.plan_step(update, mask)
        except Exception:
            self.cache.forget_pending()
            raise
        plan = self.group.on_device(plan, update.key.device)
        if not update.written:
            write_pages_op(
                plan.pack(update.key), plan.pack(update.value), pages.k, pages.v, plan.slot_mapping, pages.k_scale,
                pages.v_scale,
            )  # fmt: skip
            update.written = True
            self.pending = None
        return plan

    def pages(self) -> "LayerPages":
        """The layer's page tensors."""
        return self.group.pages.layers[self.index]

    def dense(self, update: LayerUpdate) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[B, H, columns, D]`` and values that a query of ``update`` may see, the new ones last."""
        plan = self.write(update, None) if not update.written else self.group.plan_step(update, self.group.plan_mask)
        if plan.is_first:
            return update.key, update.value
        start = update.start
        return self._gather(self.group.first_column(start), start + update.key.shape[2], plan.page_table)

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.flush()
        return self._gather(self.group.first_column(self.columns), self.columns, self.group.page_table())

    def _gather(self, first: int, last: int, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns first..last from the pages, in the model's dtype; zeros where a column is padding."""
        pages, page_size = self.pages(), self.cache.page_size
        device = pages.k.device
        rows, columns, tokens = (x.to(device) for x in self.cache.tokens_of_columns(first, last))
        page = page_table.to(device)[rows, tokens // page_size].long()
        dense = []
        for stored, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
            out = stored.new_zeros(
                self.cache.num_seqs, last - first, stored.shape[1], stored.shape[3], dtype=pages.model_dtype
            )
            offset = tokens % page_size
            states = stored.view(torch.uint8)[page, :, offset].view(stored.dtype) if pages.is_quantized else None
            if states is None:
                states = stored[page, :, offset]
            scales = None if scale is None else scale[page, :, offset]
            out[rows, columns - first] = dequantize(states, scales, pages.model_dtype)
            dense.append(out.transpose(1, 2))
        return dense[0], dense[1]

    def get_seq_length(self) -> int:
        """Columns held: the padded length that transformers counts in."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        first = self.group.first_column(self.columns)
        return self.columns - first + query_length, first

    def get_max_length(self) -> int:
        """The sliding window, or -1: no maximum."""
        return self.group.window or -1

    get_max_cache_shape = get_max_length  # the name of earlier transformers versions

    def offload(self) -> None:
        """Refused: pages of several sequences share one tensor."""
        raise ValueError("PagedCache does not offload layers; see swap_out(), or cache_implementation='offloaded'.")

    prefetch = offload

    # One table serves all layers of a group: PagedCache changes it once, and the layers follow.
    def reset(self) -> None:
        """Refused on one layer: see :meth:`PagedCache.reset`."""
        raise ValueError("call the method of PagedCache: its layers share page tables.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused on one layer: see :meth:`PagedCache.reorder_cache`."""
        raise ValueError("call the method of PagedCache: its layers share page tables.")

    crop = batch_repeat_interleave = batch_select_indices = reorder_cache


class PagedHybridLayer(PagedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with attention and a recurrent state: keys and values in pages, the state as transformers keeps it."""

    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, cache: "PagedCache", group: "LayerGroup", index: int, number_of_states: int) -> None:
        PagedLayer.__init__(self, cache, group, index)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Called by transformers for the recurrent state only."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
