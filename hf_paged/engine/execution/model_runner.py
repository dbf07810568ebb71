"""Runs the model over a step's rows."""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hf_paged_kernels.settings import SHORT_CONTEXT
from transformers.utils import logging

from ...errors import UnsupportedModelError
from ...fusion import FusedModel
from ...hooks import reason_in_hooks
from ...transformers_internals import AttentionChoice, cache_name
from ..async_copy import send
from ..sampling.slot_sampling import SlotSampling
from ..scheduling.slots import Slots
from ..scheduling.step import ScheduledStep
from .adapters import ModelAdapters
from .chunk_graphs import ON_DEVICE, ChunkGraphs, Layout
from .compiled import CompiledModules, as_written
from .decode_graphs import DecodeGraphs, is_short_of_memory
from .engine_cache import EngineCache
from .model_fingerprint import ModelFingerprint
from .step_inputs import DeviceSlotState, GroupInputs, StepInputs

logger = logging.get_logger(__name__)

TRIED_TOKENS = 16
"""Different tokens that show which layers see some of them only: of a router's experts, most see none."""


@dataclass(slots=True)
class StepLogits:
    """Logits of a step, and the tokens that were chosen with them.

    Attributes:
        parts: one or two ``[num, vocab]``, which are not put together: they may be large.
        first, last: int ``[num_rows]`` on the host: row i has the logits from ``first[i]`` to ``last[i]``, counted
            through the parts, of its last tokens.
        token_index: int64 ``[num_rows]`` on the host: where a row's token is in ``tokens``, -1: it is not chosen yet.
        tokens: int64 ``[num_chosen]``, chosen by the parameters of each row's slot, -1 where none can be; they are
            noted as the rows' last tokens already. None: there are none.
        lse: float64 ``[num_chosen]`` with ``tokens``: the log-sum-exp of rows that report log-probabilities.
    """

    parts: list[torch.Tensor]
    first: np.ndarray
    last: np.ndarray
    token_index: np.ndarray
    tokens: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def of(self, start: int, end: int) -> torch.Tensor:
        """The logits from ``start`` to ``end`` of one row, a view."""
        split = len(self.parts[0])
        return self.parts[0][start:end] if start < split else self.parts[1][start - split : end - split]

    def take(self, index: np.ndarray) -> torch.Tensor:
        """The logits at ``index``, int ``[n]``: ``[n, vocab]``, a part itself where that is what is asked for."""
        found, order, start = [], [], 0
        for part in self.parts:
            mine = np.flatnonzero((index >= start) & (index < start + len(part)))
            if len(mine):
                here = index[mine] - start
                is_all = np.array_equal(here, np.arange(len(part)))
                found.append(part if is_all else part[send(here, part.device)])
                order.append(mine)
            start += len(part)
        if len(found) == 1:
            return found[0]
        both = torch.cat(found)
        return both[send(np.concatenate(order).argsort(), both.device)]


class Runner:
    """Forward passes of one model over packed rows.

    Args:
        model: a causal LM; its attention is "paged_flash" in the forwards that are run here.
        cache: where its keys, values and states live.
        slots: sequences, on the host.
        tables: the same on the device.
        sampling: parameters of the slots.

    Attributes:
        graphs, chunk_graphs: decode steps, and steps over chunks of prompts, captured as CUDA graphs. None: none are.
        compiled: modules that torch.compile compiles, None: none are.
        fused: modules that run fused, None: none do.
        adapters: what computes rows with adapters of their own, None: no request has named one, or the model was
            looked at again since.
        misfit: of the model and adapters, see :class:`ModelAdapters`.
    """

    graphs: DecodeGraphs | None = None
    chunk_graphs: ChunkGraphs | None = None
    compiled: CompiledModules | None = None
    fused: FusedModel | None = None
    adapters: ModelAdapters | None = None
    misfit: str | None = None

    def __init__(
        self, model: Any, cache: EngineCache, slots: Slots, tables: DeviceSlotState, sampling: SlotSampling
    ) -> None:
        self.model, self.cache, self.slots, self.tables, self.sampling = model, cache, slots, tables, sampling
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache_name = cache_name(model.forward)
        self.needs_lengths = False
        """Whether the model computes keys from what the cache returns, so attention needs packed lengths."""
        self.attention = AttentionChoice(model, "paged_flash")
        # Where each index is needed is the model's business: those on the host are good everywhere.
        self.is_spread = num_devices(model) > 1
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self._fingerprint = ModelFingerprint(model, tables.device)
        self._as_written = as_written(model)

    def run(self, work: ScheduledStep, num_logits: np.ndarray) -> StepLogits:
        """One step.

        Args:
            work: its rows.
            num_logits: int ``[num_rows]``: logits of this many last tokens of each row are needed.

        Raises:
            UnsupportedModelError: a module has a hook that may not see packed rows.
        """
        reason = reason_in_hooks(self._fingerprint.hooks)
        if reason is not None:
            raise UnsupportedModelError(f"the engine cannot run a step: {reason}, or remove it.")
        self.tables.sync()
        self.sampling.sync()
        ends = num_logits.cumsum()
        if self.cache.has_states:
            return StepLogits([self._run_with_states(work, num_logits)], ends - num_logits, ends, _no_token_index(work))
        if 0 < work.num_decode < len(work.slots):
            mixed = self._run_chunk_graph(work, num_logits)
            if mixed is not None:
                return mixed
        decoded = self._run_graph(work)
        if decoded is None:
            return self._run_packed(work, num_logits)
        logits, tokens, lse = decoded
        n = len(tokens)
        token_index = np.where(self._sampled_on_device(work)[:n], np.arange(n), -1)
        if n == len(work.slots):
            return StepLogits([logits], ends - num_logits, ends, token_index, tokens, lse)
        # Large chunks in a launch of their own.
        chunks = ScheduledStep(work.slots[n:], work.counts[n:], 0, work.samples[n:])
        more = self._run_packed(chunks, num_logits[n:])
        first = np.concatenate([np.arange(n), n + more.first])
        last = np.concatenate([np.arange(1, n + 1), n + more.last])
        if more.tokens is not None and more.lse is not None:
            tokens, lse = torch.cat([tokens, more.tokens]), torch.cat([lse, more.lse])
        token_index = np.concatenate([token_index, np.where(more.token_index >= 0, n + more.token_index, -1)])
        return StepLogits([logits, *more.parts], first, last, token_index, tokens, lse)

    def _run_packed(self, work: ScheduledStep, num_logits: np.ndarray) -> StepLogits:
        """Rows that no decode graph runs: chunks of prompts, candidates, and all of them without graphs."""
        chunks = self._run_chunk_graph(work, num_logits)
        if chunks is not None:
            return chunks
        ends = num_logits.cumsum()
        logits = self.forward(self.tables.inputs(work), self._index(work.counts, num_logits))[0]
        return StepLogits([logits], ends - num_logits, ends, _no_token_index(work))

    def _sampled_on_device(self, work: ScheduledStep) -> np.ndarray:
        """bool ``[num_rows]``: rows whose next token follows from this step's logits and the device's tables alone."""
        return work.samples & self.slots.is_row[work.slots] & self.sampling.on_device[work.slots]

    def use_fused(self, fused: FusedModel) -> None:
        """Run fused modules from now on; their weights have moved."""
        self.fused = fused
        self._look_again()

    def use_adapters(self, adapters: ModelAdapters | None) -> None:
        """Compute rows with adapters of their own from now on, or no longer: steps are captured again."""
        for graphs in (self.graphs, self.chunk_graphs):
            if graphs is not None:
                graphs.drop()
        self.adapters = adapters
        if adapters is not None:
            adapters.prepare()
        self.tables.has_adapters = adapters is not None and bool(adapters.forwards)

    def try_adapters(self) -> None:
        """A forward of no request, which shows whether the model's layers see tokens as :attr:`adapters` needs it.

        Raises:
            UnsupportedModelError: they do not.
        """
        adapters = self.adapters
        if adapters is None or not adapters.forwards or self.cache.has_states or self.needs_lengths:
            return
        ids = torch.arange(TRIED_TOKENS, device=self.tables.device) % self.vocab_size
        self._forward_nothing(ids, self.tables.pages.page_size)

    # Graphs

    def use_graphs(self, graphs: DecodeGraphs, chunk_graphs: ChunkGraphs) -> None:
        """Run steps through graphs of :meth:`static_decode` and :meth:`static_chunk` from now on."""
        self.graphs, self.chunk_graphs = graphs, chunk_graphs

    def static_decode(self, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A decode step over the tables by slot.

        Args:
            slots: int64 ``[n]`` on the device.

        Returns:
            Logits ``[n, vocab]``, the tokens chosen int64 ``[n]``, and float32 ``[n]``, log-sum-exps of the logits.
        """
        logits = self.forward(self.tables.static_inputs(slots), None)[0]
        # Counted already: the index of the new token.
        tokens, lse = self.sampling.choose_static(logits, slots, self.tables.computed, self.tables.last_token)
        return logits, tokens, lse

    def static_chunk(self, buffer: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
        """A step over an array of :mod:`chunk_graphs`.

        Returns:
            As :meth:`static_decode`, for each output.
        """
        _, (slots, last, lengths), _ = layout.split(buffer)
        logits = self.forward(self.tables.chunk_inputs(buffer, layout), last)[0]
        # Counted already, as in a step that only decodes.
        lengths = torch.where(lengths == ON_DEVICE, self.tables.computed[slots], lengths)
        tokens, lse = self.sampling.choose_static(logits, slots, lengths)
        self.tables.note_tokens(slots, tokens, lengths)
        return logits, tokens, lse

    def warm_up_prompts(self, num_tokens: int) -> bool:
        """Run the model over ``num_tokens`` tokens of no request, as steps too large for a graph do: kernels that only
        these take are compiled, for short contexts and for long ones. So is the copy of a page.

        Returns:
            Whether it ran: models with recurrent states have no such step, and it may find no memory.
        """
        if self.cache.has_states or self.needs_lengths:
            return False
        page_size = self.tables.pages.page_size
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.tables.device)
        widest = self.tables.page_tables[0].shape[1] if self.tables.page_tables else 0
        try:
            for width in {min(widest, SHORT_CONTEXT // page_size), widest}:
                self._forward_nothing(ids, width * page_size)
            has_room = True
        except Exception as error:
            if not is_short_of_memory(error):
                raise
            has_room = False
            logger.warning(
                f"a step of {num_tokens} tokens (max_batch_tokens) finds no room in the device's memory, nor will "
                "prompts that make one: lower EngineConfig(max_batch_tokens=) or num_pages=."
            )
        for number in range(len(self.tables.page_tables)):
            self.cache.copy_pages(number, [0], [0])
        return has_room

    def _forward_nothing(self, ids: torch.Tensor, longest: int) -> None:
        """The model's forward over tokens ``[n]`` of no request, with room for ``longest`` keys."""
        tables, device, num_tokens = self.tables, self.tables.device, len(ids)
        last = torch.tensor([num_tokens - 1], device=device)
        bounds = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        no_keys = torch.zeros(1, dtype=torch.int32, device=device)
        table = torch.zeros(1, longest // tables.pages.page_size, dtype=torch.int32, device=device)
        groups = [GroupInputs(table, torch.full_like(ids, -1)) for _ in tables.page_tables]
        no_adapters = torch.full((num_tokens,), -1, dtype=torch.int32, device=device) if tables.has_adapters else None
        self.forward(
            StepInputs(
                np.empty(0, np.int64), ids[None], torch.zeros_like(ids)[None], no_keys, bounds, num_tokens, longest,
                longest, groups, adapters=no_adapters,
            ),
            last,
        )  # fmt: skip

    def drop_graphs(self) -> None:
        """Forget what was captured: pages or modules are about to change."""
        for graphs in (self.graphs, self.chunk_graphs):
            if graphs is not None:
                graphs.drop()
        if self.compiled is not None and self._fingerprint.has_other_modules():
            self.compiled.forget()
        before, is_same = self._fingerprint, self._fingerprint.change() is None
        if self.fused is not None:
            # Moved weights are packed again: that is not a change of its own.
            self.fused.compare_tables()
            self.fused.refresh()
        self._look_again()
        if is_same:
            self._fingerprint.remember(before)

    def _look_again(self) -> None:
        self._fingerprint = ModelFingerprint(self.model, self.tables.device, self._fingerprint.written)
        self._as_written = as_written(self.model)
        self.misfit = None
        if self.adapters is not None:
            self.use_adapters(None)  # They may be others.

    # Changes of the model

    def ignore_buffers(self, names: frozenset[str]) -> None:
        """Buffers that the model's own forward writes are no change."""
        self._fingerprint = ModelFingerprint(self.model, self.tables.device, names)

    def change(self, *, look_closely: bool = False) -> str | None:
        """What is different from when captured steps were dropped last, None: nothing; see :mod:`model_fingerprint`."""
        if self.fused is not None and self.fused.has_stale_tables():
            return "frequencies of rotary embeddings are others"
        return self._fingerprint.change(look_closely=look_closely)

    def remember_values(self) -> None:
        """Take sums over the weights' bytes, unless they are known."""
        self._fingerprint.remember()

    def change_of_values(self) -> str | None:
        """What is different from :meth:`remember_values`, as far as bytes tell; takes a pass over the weights."""
        return "weights have other values" if self._fingerprint.has_other_values() else None

    def _run_graph(self, work: ScheduledStep) -> tuple[torch.Tensor, ...] | None:
        """The decode rows of a step; None: nothing was run."""
        n = work.num_decode
        if self.graphs is None or not n or int(work.counts[:n].max()) > 1:
            return None
        if self.graphs.failure is not None or not self._may_replay():
            return None
        self.tables.refresh(work.slots[:n])
        return self.graphs.run(work.slots[:n])

    def _run_chunk_graph(self, work: ScheduledStep, num_logits: np.ndarray) -> StepLogits | None:
        """:meth:`static_chunk` of chunks, with decode rows before them where there are some; None: nothing was run."""
        n = work.num_decode
        if self.chunk_graphs is None or int(num_logits.max()) > 1 or int(work.counts[:n].max(initial=1)) > 1:
            return None
        if (self.graphs is not None and self.graphs.failure is not None) or not self._may_replay():
            return None
        sampled_on_device = self._sampled_on_device(work)
        # Of decode rows the device knows what it needs, or is told now.
        self.tables.refresh(work.slots[:n])
        found = self.chunk_graphs.run(work, sampled_on_device)
        if found is None:
            return None
        logits, tokens, lse = found
        self.tables.stale[work.slots[n:]] = ~sampled_on_device[n:]
        first = np.arange(len(work.slots))
        return StepLogits([logits], first, first + num_logits, np.where(sampled_on_device, first, -1), tokens, lse)

    def _may_replay(self) -> bool:
        """Whether a replay does what the model's forward would do now."""
        replay_blocker = self._fingerprint.replay_blocker()
        if replay_blocker is not None:
            logger.warning_once(f"steps run without CUDA graphs for now: {replay_blocker}.")
        return replay_blocker is None and not self.needs_lengths

    def _run_with_states(self, work: ScheduledStep, num_logits: np.ndarray) -> torch.Tensor:
        """Decode rows as a batch ``[B, 1]``, each prompt by itself: states have no packed form."""
        outputs = []
        if work.num_decode:
            slots = work.slots[: work.num_decode]
            inputs = self.tables.decode_inputs(slots, batched=True)
            index = torch.from_numpy(slots)
            self.cache.begin_decode(index)
            logits = self.forward(inputs, None)
            self.cache.end(index)
            outputs.append(logits.flatten(0, 1))
        for i in range(work.num_decode, len(work.slots)):
            one = ScheduledStep(work.slots[i : i + 1], work.counts[i : i + 1], 0, work.samples[i : i + 1])
            self.cache.begin_prompt()
            inputs = self.tables.inputs(one)
            outputs.append(self.forward(inputs, self._index(one.counts, num_logits[i : i + 1]))[0])
            self.cache.end(torch.from_numpy(one.slots))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _index(self, counts: np.ndarray, num_logits: np.ndarray) -> torch.Tensor | None:
        """Packed tokens whose logits are needed, int64 on the device; None: all."""
        if np.array_equal(counts, num_logits):
            return None
        ends = counts.cumsum()
        if int(num_logits.max()) <= 1:
            index = ends[num_logits == 1] - 1
        else:
            index = np.concatenate([np.arange(end - num, end) for end, num in zip(ends, num_logits)])
        return torch.from_numpy(index) if self.is_spread else send(index, self.tables.device)

    def forward(self, inputs: StepInputs, keep: torch.Tensor | None) -> torch.Tensor:
        """Logits ``[B, num, vocab]`` of the packed tokens ``keep``, int64 on the device (None: all).

        Of a model that is spread over devices, ``keep`` may be on the host.
        """
        kwargs: dict[str, Any] = {}
        if self.needs_lengths:
            bounds = inputs.cu_seqlens_k
            kwargs = {
                "cu_seq_lens_q": inputs.cu_seqlens_q, "cu_seq_lens_k": bounds, "max_length_q": inputs.max_query_len,
                "max_length_k": inputs.longest,
            }  # fmt: skip
        if keep is not None and self.takes_logits_to_keep:
            # None at all: those of one token are the fewest that every model can give.
            kept: Any = keep if len(keep) else 1
            # accelerate would take a tensor to the first device.
            kwargs["logits_to_keep"] = keep.tolist() if self.is_spread and len(keep) else kept
        self.cache.step = inputs
        with ExitStack() as stack:
            stack.enter_context(self.attention.here())
            if self.compiled is None:
                stack.enter_context(self._as_written)
            if self.adapters is not None and inputs.adapters is not None:
                kept_rows = None
                if keep is not None and self.takes_logits_to_keep:
                    kept_rows = inputs.adapters[keep] if len(keep) else inputs.adapters[-1:]
                stack.enter_context(self.adapters.active(inputs.adapters, kept_rows))
            for modules in (self.fused, self.compiled):
                if modules is not None:
                    stack.enter_context(modules.active(self.cache))
            out = self.model(
                input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=True, return_dict=True,
                **{self.cache_name: self.cache}, **kwargs,
            )  # fmt: skip
        logits = out.logits.to(self.tables.device)
        if keep is not None and not len(keep):
            return logits[:, :0]
        return logits if keep is None or self.takes_logits_to_keep else logits[:, keep]


def num_devices(model: Any) -> int:
    """Devices that a model's weights are on."""
    return len({parameter.device for parameter in model.parameters()})


def _no_token_index(work: ScheduledStep) -> np.ndarray:
    """Of a step that has chosen no token."""
    return np.full(len(work.slots), -1)
