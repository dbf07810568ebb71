"""One attention layer of a PagedCache."""

from typing import Any

import torch
from hf_paged_kernels.backend import contiguous_rows
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ..mixed_precision import in_one_dtype
from ..transformers_internals import uses_paged_flash
from .layer_group import LayerGroup
from .lazy_states import LazyStates
from .step_planner import LayerUpdate, StepPlanner


class PagedLayer(CacheLayerMixin):
    """The keys and values of one attention layer; its page table is its group's.

    With a sliding window it shows what transformers' ``DynamicSlidingWindowLayer`` shows: the last ``window - 1``
    columns and the new ones. The window itself is applied by attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, config: PreTrainedConfig, planner: StepPlanner, group: LayerGroup, index: int) -> None:
        # The base class assigns keys and values, which are computed here: its __init__ is not called.
        self.config, self.planner, self.group, self.index = config, planner, group, index
        self.is_sliding = group.window is not None

    @property
    def columns(self) -> int:
        """Columns held, padding counted."""
        return self.planner.taken[self.index]

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
        return self.planner.num_seqs or -1

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
        self._flush()
        planner, group, index = self.planner, self.group, self.index
        planner.check_new_states(key_states, value_states)
        key_states, value_states = map(contiguous_rows, in_one_dtype(key_states, value_states))
        update = planner.pending[index] = LayerUpdate(planner, group, index, key_states, value_states)
        start = update.start
        num_seqs, _, num_new, _ = key_states.shape
        planner.taken[index] = start + num_new
        if not group.is_in_step(start, num_new):
            # Asked once a step: a config answers slowly.
            group.reads_pages = uses_paged_flash(self.config)
        if group.reads_pages:
            num_keys = start + num_new - group.first_column(start)
            return LazyStates.pair(update, num_seqs, num_keys, key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "PagedCache keeps keys and values without their gradients: call the model under torch.no_grad(), or "
                "train with use_cache=False."
            )
        return update.dense()

    def _flush(self) -> None:
        """Write an update that no attention function asked for, every column taken as a token."""
        if self.index in self.planner.pending:
            self.planner.pending[self.index].write(None)

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._flush()
        group, columns = self.group, self.columns
        return self.planner.gather(group, self.index, group.first_column(columns), columns, group.page_table())

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

    def __init__(
        self, config: PreTrainedConfig, planner: StepPlanner, group: LayerGroup, index: int, number_of_states: int
    ) -> None:
        PagedLayer.__init__(self, config, planner, group, index)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Called by transformers for the recurrent state only."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
