"""The transformers ``Cache`` that the engine hands to the model: pages of many sequences, states by slot."""

from collections.abc import Sequence
from typing import Any

import torch
from hf_paged_kernels.attention.ops import paged_attention_op, write_pages_op
from hf_paged_kernels.backend import contiguous_rows
from hf_paged_kernels.layers.ops import rotary_write_op
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ...cache.layer_kinds import HYBRID, set_layers
from ...cache.lazy_states import LazyStates
from ...cache.page_ops import copy_pages, gather
from ...errors import UnsupportedModelError
from ...mixed_precision import in_one_dtype
from ...paging import PageGroup, PagePool
from .cpu_attention import attend_groups, plan_groups
from .step_inputs import StepInputs


class EngineLayer(CacheLayerMixin):
    """One attention layer: new keys and values go to pages, a stand-in for all of them comes back."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: "EngineCache", group: PageGroup, number: int, index: int) -> None:
        # The base class assigns keys and values, which are in pages: its __init__ is not called.
        self.cache, self.group, self.number, self.index = cache, group, number, index
        self.window = group.window
        self.is_sliding = self.window is not None
        self.is_initialized = True
        self.keys = self.values = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the step."""
        return self.cache.step.longest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values ``[B, H, L, D]``, packed over B and L in the step's order."""
        if self.cache.has_autocast:
            key_states, value_states = in_one_dtype(key_states, value_states)
        if key_states.dtype != value_states.dtype:
            raise UnsupportedModelError(
                f"layer {self.index} brings keys in {key_states.dtype} and values in {value_states.dtype}, as under "
                f"autocast, and the engine's pages have one dtype: cast the model to it, let accelerate prepare the "
                f"model before the engine starts (autocast is then a decorator of its forward), or use its generate()."
            )
        step = self.cache.step.on(key_states.device)
        pages = self.group.layer(self.index, key_states, value_states)
        pages.check_like(key_states, value_states)
        key, value = (contiguous_rows(x.transpose(1, 2).flatten(0, 1)) for x in (key_states, value_states))
        mapping = step.groups[self.number].slot_mapping
        write_pages_op(key, value, pages.k, pages.v, mapping, pages.k_scale, pages.v_scale)
        return LazyStates.pair(self, 1, step.num_keys, key_states, value_states)

    def rotate_and_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        interleaved: bool,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        weight_offset: float,
        round_first: bool,
    ) -> torch.Tensor:
        """Rotate queries and keys, write keys and values to pages: :func:`rotary_write_op`; the queries come back.

        Without ``tables`` (cos, sin) there is no rotation, and no norm either.
        """
        step = self.cache.step.on(q.device)
        key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        pages = self.group.layer(self.index, key, value)
        pages.check_like(key, value)
        mapping = step.groups[self.number].slot_mapping
        if tables is None:
            write_pages_op(k, v, pages.k, pages.v, mapping, pages.k_scale, pages.v_scale)
            return q
        return rotary_write_op(
            q, k, v, *tables, interleaved, q_weight, k_weight, eps, weight_offset, round_first,
            pages.k, pages.v, pages.k_scale, pages.v_scale, mapping,
        )  # fmt: skip

    def attend(
        self,
        query: torch.Tensor,
        left: int | None,
        right: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of packed queries ``[T, Hq, D]`` over the step's pages: ``[T, Hq, Dv]``."""
        step, pages = self.cache.step.on(query.device), self.group.layers[self.index]
        page_size, is_plain = pages.k.shape[2], right == 0 and softcap is None and sinks is None
        table = step.groups[self.number].page_table
        if query.device.type == "cpu" and is_plain and not pages.is_quantized:
            key = (self.number, left)
            if key not in step.cpu_groups:
                step.cpu_groups[key] = plan_groups(table, step.seq_lens, step.cu_seqlens_q, page_size, left)
            return attend_groups(query, pages, step.cpu_groups[key], scale)
        plan, can_prefetch_kv = step.split_plan(self.number, page_size, left)
        return paged_attention_op(
            query, pages.k, pages.v, table, step.seq_lens, step.cu_seqlens_q, step.max_query_len, left, right,
            softcap, sinks, scale, pages.k_scale, pages.v_scale, plan, can_prefetch_kv,
        )[0]  # fmt: skip

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences of the step, one after the other, ``[1, H, total keys, D]``."""
        if not self.cache.may_gather:
            raise UnsupportedModelError(
                f"layer {self.index} asks for all keys and values of a step, which it did not do when the engine was "
                f"started: its attention has been exchanged. Close this engine and make another."
            )
        pages = self.group.layers[self.index]
        step = self.cache.step.on(pages.k.device)
        self.cache.num_gathers += 1
        page_size = pages.k.shape[2]
        lengths = step.seq_lens.long()
        row = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths, output_size=step.num_keys
        )
        token = torch.arange(step.num_keys, device=lengths.device) - (lengths.cumsum(0) - lengths)[row]
        page = step.groups[self.number].page_table[row, token // page_size].long()
        keys, values = gather(pages, page, token % page_size)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: page tensors are made when the first tokens are written."""

    def get_seq_length(self) -> int:
        """0: the sequences of a step have no length in common; their positions are in ``position_ids``."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is needed: every row of the step sees its own tokens only."""
        return query_length, 0

    def get_max_length(self) -> int:
        """The sliding window, or -1: no maximum."""
        return self.window or -1

    get_max_cache_shape = get_max_length  # the name of earlier transformers versions


class EngineHybridLayer(EngineLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with attention and a recurrent state."""

    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, cache: "EngineCache", group: PageGroup, number: int, index: int, number_of_states: int) -> None:
        EngineLayer.__init__(self, cache, group, number, index)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Called by transformers for the recurrent state only."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


class EngineCache(Cache):
    """Keys and values of the sequences in slots, over a pool of pages; recurrent states in tensors by slot.

    Args:
        config: the model's config.
        pool: an empty pool; its groups of layers are made here.
        num_slots: sequences at a time.

    Attributes:
        step: inputs of the running step.
        num_gathers: how often a model asked for dense keys or values instead of reading pages in place.
        may_gather: whether it may: what does not know the step's sequences would mix them.
        has_states: whether layers keep recurrent states beside pages.
        has_autocast: the model's forward enables autocast: pages have the dtype in which its attention multiplies.

    Raises:
        UnsupportedModelError: the model has cache layers that are not plain keys, values and states.
    """

    step: StepInputs
    has_autocast = False

    def __init__(self, config: Any, pool: PagePool, num_slots: int) -> None:
        self.config, self.pool, self.num_slots = config.get_text_config(decoder=True), pool, num_slots
        kinds = set_layers(self.config, pool)
        numbers = {window: number for number, window in enumerate(pool.groups)}
        layers: list[Any] = []
        for index, (template, group) in enumerate(kinds):
            if group is None:
                layers.append(template)
            elif type(template) in HYBRID:
                states = template.number_of_states
                layers.append(EngineHybridLayer(self, group, numbers[group.window], index, states))
            else:
                layers.append(EngineLayer(self, group, numbers[group.window], index))
        self.num_gathers, self.may_gather = 0, True
        self._state_layers = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
        self.has_states = bool(self._state_layers)
        # Per layer and state: tensors [num_slots, ...], made by the first prompt.
        self._states: dict[tuple[int, str, int], torch.Tensor] = {}
        self._kinds: list[dict[str, Any]] = []
        super().__init__(layers=layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: see :meth:`EngineLayer.get_seq_length`."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0 as well (asked for by transformers 5.23)."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """See :meth:`EngineLayer.get_mask_sizes`."""
        return query_length, 0

    # States by slot

    def begin_prompt(self) -> None:
        """The next forward brings the whole prompt of one sequence: states start from nothing."""
        for layer in self._state_layers:
            LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)

    def begin_decode(self, slots: torch.Tensor) -> None:
        """The next forward brings one token for each of ``slots``: states go on from where they were."""
        for number, (layer, kind) in enumerate(zip(self._state_layers, self._kinds)):
            for name, value in kind.items():
                setattr(layer, name, value.copy() if isinstance(value, dict) else value)
            for what, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                for i in states:
                    stored = self._states.get((number, what, i))
                    states[i] = None if stored is None else stored[slots.to(stored.device)]

    def end(self, slots: torch.Tensor) -> None:
        """Keep the states of the forward that has just run for ``slots``."""
        if not self._kinds:
            names = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
            self._kinds = [
                {name: dict(getattr(layer, name)) for name in (*names, "conv_kernel_size")}
                # transformers before 5.24 keeps the dtype too.
                | {name: getattr(layer, name) for name in ("device", "dtype") if hasattr(layer, name)}
                for layer in self._state_layers
            ]
        for number, layer in enumerate(self._state_layers):
            for what, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                for i, state in states.items():
                    if state is None:
                        continue
                    key = (number, what, i)
                    if key not in self._states:
                        self._states[key] = state.new_zeros(self.num_slots, *state.shape[1:])
                    self._states[key][slots.to(state.device)] = state

    def copy_states(self, targets: list[int], sources: list[int]) -> None:
        """Slot ``targets[i]`` goes on from the states that ``sources[i]`` has."""
        for stored in self._states.values():
            stored[targets] = stored[sources]

    # Pages

    def copy_pages(self, number: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages ``sources[i]`` to ``targets[i]`` in all layers of a group; no target is a source."""
        copy_pages(list(self.pool.groups.values())[number].layers.values(), sources, targets)

    def page_bytes(self) -> int:
        """Bytes of a page of every layer, once all layers have seen a token."""
        return self.pool.page_bytes

    def drop(self) -> None:
        """Give the memory of pages and states back; contents are lost, the page ids stay."""
        for group in self.pool.groups.values():
            group.drop_layers()
        self._drop_states()

    def num_used(self) -> list[int]:
        """Pages of each group that have an owner, cached prefixes among them."""
        return [group.allocator.num_used for group in self.pool.groups.values()]

    def release(self, num_wanted: Sequence[int]) -> bool:
        """As :meth:`drop`, but the addresses of pages stay; False: they cannot.

        ``num_wanted`` pages of each group are to have memory again at :meth:`restore`.
        """
        self._drop_states()
        kept = [group.release(count) for group, count in zip(self.pool.groups.values(), num_wanted)]
        return all(kept)

    def restore(self) -> None:
        """Have memory behind the pages again, after :meth:`release`.

        Raises:
            torch.OutOfMemoryError: the device has less.
        """
        for group in self.pool.groups.values():
            group.restore()

    def _drop_states(self) -> None:
        self._states.clear()
        self._kinds.clear()
