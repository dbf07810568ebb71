"""Runs the model over a step's rows."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .engine_cache import EngineCache
from .scheduler import StepWork
from .slots import Slots
from .step_inputs import SlotTables, StepInputs


@dataclass(slots=True)
class StepLogits:
    """Logits of a step.

    Attributes:
        logits: ``[num, vocab]``.
        first, last: int ``[num_rows]`` on the host: row i has ``logits[first[i]:last[i]]``, of its last tokens.
    """

    logits: torch.Tensor
    first: np.ndarray
    last: np.ndarray


class Runner:
    """Forward passes of one model over packed rows.

    Args:
        model: a causal LM whose attention is "paged_flash" while it runs.
        cache: where its keys, values and states live.
        slots: sequences, on the host.
        tables: the same on the device.
    """

    def __init__(self, model: Any, cache: EngineCache, slots: Slots, tables: SlotTables) -> None:
        self.model, self.cache, self.slots, self.tables = model, cache, slots, tables
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.needs_lengths = False
        """Whether the model computes keys from what the cache returns, so attention needs packed lengths."""

    def run(self, work: StepWork, num_logits: np.ndarray) -> StepLogits:
        """One step.

        Args:
            work: its rows.
            num_logits: int ``[num_rows]``: logits of this many last tokens of each row are needed.
        """
        self.tables.sync()
        ends = num_logits.cumsum()
        if self.cache.has_states:
            logits = self._run_with_states(work, num_logits)
        else:
            inputs = self.tables.inputs(work)
            logits = self.forward(inputs, self._index(work.counts, num_logits))[0]
        return StepLogits(logits, ends - num_logits, ends)

    def _run_with_states(self, work: StepWork, num_logits: np.ndarray) -> torch.Tensor:
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
            one = StepWork(work.slots[i : i + 1], work.counts[i : i + 1], 0, work.samples[i : i + 1])
            self.cache.begin_prompt()
            inputs = self.tables.inputs(one)
            outputs.append(self.forward(inputs, self._index(one.counts, num_logits[i : i + 1]))[0])
            self.cache.end(torch.from_numpy(one.slots))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _index(self, counts: np.ndarray, num_logits: np.ndarray) -> np.ndarray | None:
        """Packed tokens whose logits are needed; None: all."""
        if np.array_equal(counts, num_logits):
            return None
        ends = counts.cumsum()
        if int(num_logits.max()) <= 1:
            return ends[num_logits == 1] - 1
        return np.concatenate([np.arange(end - num, end) for end, num in zip(ends, num_logits)])

    def forward(self, inputs: StepInputs, index: np.ndarray | None) -> torch.Tensor:
        """Logits ``[B, num, vocab]`` of the packed tokens ``index`` (None: all)."""
        kwargs: dict[str, Any] = {}
        if self.needs_lengths:
            bounds = inputs.cu_seqlens_k
            kwargs = {
                "cu_seq_lens_q": inputs.cu_seqlens_q, "cu_seq_lens_k": bounds, "max_length_q": inputs.max_query_len,
                "max_length_k": inputs.longest,
            }  # fmt: skip
        keep = None if index is None else torch.from_numpy(index).to(inputs.input_ids.device)
        if keep is not None and self.takes_logits_to_keep and len(keep):
            kwargs["logits_to_keep"] = keep
        self.cache.step = inputs
        out = self.model(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, past_key_values=self.cache, use_cache=True,
            return_dict=True, **kwargs,
        )  # fmt: skip
        logits = out.logits
        if keep is not None and "logits_to_keep" not in kwargs:
            logits = logits[:, keep]
        return logits
