"""Steps over chunks of prompts captured as CUDA graphs, one for each bucket of token counts.

A short prompt is bound by the host: launching its kernels takes longer than running them, and every running sequence
waits meanwhile. A graph takes one array, sent in one piece::

    slots [ROWS]  ends [ROWS]  lengths [ROWS]  ids [tokens]  positions [tokens]  rows [tokens]

Tokens that fill up a bucket belong to the last row, whose slot has no tokens: they write nothing and see nothing. Long
chunks keep the device busy by themselves and are not captured.
"""

from collections.abc import Callable

import numpy as np
import torch
from transformers.utils import logging
from transformers.utils.logging import tqdm

from .decode_graphs import Capture
from .scheduler import StepWork
from .slots import Slots
from .transfers import send

logger = logging.get_logger(__name__)

ROWS = 32
"""Rows of a captured step, the one that fills it up included."""

USES_BEFORE_CAPTURE = 2
"""Steps of a bucket that run eagerly, or in a larger graph, before it is captured: a capture costs two of them."""

Step = Callable[[torch.Tensor], torch.Tensor]


def chunk_sizes(max_tokens: int) -> list[int]:
    """Token counts with a graph of their own, ascending, for steps of at most ``max_tokens``."""
    sizes = [16, 32, *range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256)]
    smaller = [size for size in sizes if size < max_tokens]
    return smaller if max_tokens > sizes[-1] else [*smaller, max_tokens]


class ChunkGraphs:
    """The captured steps of one model over packed chunks.

    Args:
        step: a forward over an array as above: logits ``[ROWS, vocab]`` of each row's last token.
        slots: of the sequences, on the host.
        max_tokens: of a step.
        device: of the model.
        capture: makes the function that replays a step.

    Attributes:
        failure: why there are no graphs, None while there may be.
    """

    def __init__(self, step: Step, slots: Slots, max_tokens: int, device: torch.device, capture: Capture) -> None:
        self.step, self.slots, self.device = step, slots, device
        self.sizes = chunk_sizes(max_tokens)
        self.failure: str | None = None
        self._capture = capture
        self._replays: dict[int, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        self._asked: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, work: StepWork) -> torch.Tensor | None:
        """Queue a step; None: it has no graph, nothing was done.

        Args:
            work: chunks whose tokens the host knows.

        Returns:
            Logits of each row's last token ``[num_rows, vocab]``: overwritten by a later step.
        """
        bucket = self._bucket(int(work.counts.sum())) if len(work.slots) < ROWS else None
        if bucket is None:
            return None
        static, replay = self._replays[bucket]
        static.copy_(send(self._pack(work, bucket), self.device))
        return replay()[: len(work.slots)]

    def warm_up(self, progress: bool = False) -> None:
        """Capture every bucket, the largest first: the others use its memory."""
        missing = [size for size in reversed(self.sizes) if size not in self._replays]
        for bucket in tqdm(missing, desc="capturing chunks of prompts", disable=not progress):
            if self.failure is None:
                self._make(bucket)

    def drop(self) -> None:
        """Forget every graph: they are captured again where they are needed."""
        self._replays.clear()
        self._asked.clear()

    def _bucket(self, num_tokens: int) -> int | None:
        """A captured bucket with room for ``num_tokens``, not much larger."""
        bucket = next((size for size in self.sizes if size >= num_tokens), None)
        if bucket is None or self.failure is not None:
            return None
        if bucket not in self._replays:
            self._asked[bucket] = self._asked.get(bucket, 0) + 1
            if self._asked[bucket] > USES_BEFORE_CAPTURE:
                self._make(bucket)
        return next((size for size in self.sizes if size in self._replays and bucket <= size < 2 * bucket), None)

    def _make(self, bucket: int) -> None:
        nothing = StepWork(np.empty(0, np.int64), np.empty(0, np.int64), 0, np.empty(0, bool))
        static = torch.from_numpy(self._pack(nothing, bucket)).to(self.device)
        try:
            self._replays[bucket] = static, self._capture(self.step, static)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.warning_once(f"chunks of prompts run without CUDA graphs: {self.failure}")

    def _pack(self, work: StepWork, bucket: int) -> np.ndarray:
        """The array of a step, int64."""
        host, num, counts = self.slots, len(work.slots), work.counts
        num_tokens = int(counts.sum())
        buffer = np.zeros(3 * ROWS + 3 * bucket, dtype=np.int64)
        slots, ends, lengths = buffer[: 3 * ROWS].reshape(3, ROWS)
        ids, positions, rows = buffer[3 * ROWS :].reshape(3, bucket)
        slots[:] = host.num_slots
        slots[:num] = work.slots
        ends[:num] = counts.cumsum()
        ends[num:] = num_tokens
        ends[-1] = bucket
        lengths[:num] = host.computed[work.slots] + counts
        rows[:] = ROWS - 1
        row = rows[:num_tokens] = np.repeat(np.arange(num), counts)
        positions[:num_tokens] = np.arange(num_tokens) - (ends[:num] - lengths[:num])[row]
        ids[:num_tokens] = host.history[work.slots[row], positions[:num_tokens]]
        return buffer


def unpack(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slots, ends, lengths ``[ROWS]`` each; ids, positions, rows ``[tokens]`` each, of a step's array."""
    return (*buffer[: 3 * ROWS].view(3, ROWS).unbind(), *buffer[3 * ROWS :].view(3, -1).unbind())
