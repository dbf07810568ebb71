"""Steps over chunks of prompts captured as CUDA graphs, one for each bucket of token counts.

A short prompt is bound by the host: launching its kernels takes longer than running them, and every running sequence
waits meanwhile. A graph takes one array, sent in one piece::

    slots [rows]  ends [rows]  lengths [rows]  choosers [rows]  ids [tokens]  positions [tokens]  rows [tokens]

``choosers`` are the slots of rows whose next token is chosen from this step's logits by the parameters of the slot; for
the others, the slot that has no tokens. Tokens that fill up a bucket belong to the last row, whose slot is that one:
they write nothing and see nothing.

Chunks that keep the device busy for longer than it takes to launch them gain nothing, and are not captured: which ones
these are follows from the size of the model, see :func:`chunk_sizes`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.utils import logging
from transformers.utils.logging import tqdm

from .decode_graphs import Capture, is_short_of_memory
from .scheduler import StepWork
from .slots import Slots
from .transfers import send

logger = logging.get_logger(__name__)

MIN_ROWS = 32
"""Rows of a captured step at least, the one that fills it up included."""

TOKENS_PER_ROW = 64
"""Large buckets have a row for so many tokens: a step of many short prompts is captured too."""

ALWAYS_CAPTURED = 2048
"""Chunks of up to so many tokens are captured whatever the model."""

HOST_BOUND = 25_000_000_000_000
"""Larger chunks are captured up to this product of tokens and parameters.

At two operations for each it is some 70 ms of an H200: what a host takes for the launches of a model of 30 layers.
"""

USES_BEFORE_CAPTURE = 2
"""Steps of a bucket that run eagerly, or in a larger graph, before it is captured: a capture costs two of them."""

Outputs = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor], Outputs]


def chunk_sizes(max_tokens: int, num_parameters: int) -> list[int]:
    """Token counts with a graph of their own, ascending, for steps of at most ``max_tokens``.

    Four for each doubling from 512 on, so that filling up costs 9% on average; those of a model of 0.6 (8) billion
    parameters end at 41 (3) thousand tokens.
    """
    largest = max(ALWAYS_CAPTURED, HOST_BOUND // max(1, num_parameters))
    sizes = [16, 32, *range(64, 512, 64)]
    while sizes[-1] < min(max_tokens, largest):
        octave = 1 << sizes[-1].bit_length()
        sizes += range(octave, 2 * octave, octave // 4)
    ends = [max_tokens] if max_tokens <= largest else []
    return [size for size in sizes if size <= largest and size < max_tokens] + ends


def num_rows(num_tokens: int) -> int:
    """Rows of a bucket of ``num_tokens``, the one that fills it up included."""
    return max(MIN_ROWS, -(-num_tokens // TOKENS_PER_ROW))


class ChunkGraphs:
    """The captured steps of one model over packed chunks.

    Args:
        step: a forward over an array as above: tensors ``[rows, ...]``.
        slots: of the sequences, on the host.
        sizes: token counts with a graph of their own, ascending.
        device: of the model.
        capture: makes the function that replays a step.

    Attributes:
        failure: why there are no graphs, None while there may be.
    """

    def __init__(self, step: Step, slots: Slots, sizes: Sequence[int], device: torch.device, capture: Capture) -> None:
        self.step, self.slots, self.sizes, self.device = step, slots, sizes, device
        self.failure: str | None = None
        self._capture = capture
        self._replays: dict[int, tuple[torch.Tensor, Callable[[], Outputs]]] = {}
        self._asked: dict[int, int] = {}
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, work: StepWork, choosers: np.ndarray) -> Outputs | None:
        """Queue a step; None: it has no graph, nothing was done.

        Args:
            work: chunks whose tokens the host knows.
            choosers: bool ``[num_rows]``: rows whose next token is chosen.

        Returns:
            What the step gives of these rows: overwritten by a later one.
        """
        bucket = self._bucket(int(work.counts.sum()), len(work.slots))
        if bucket is None:
            return None
        static, replay = self._replays[bucket]
        static.copy_(send(self._pack(work, choosers, bucket), self.device))
        return tuple(output[: len(work.slots)] for output in replay())

    def warm_up(self, progress: bool = False) -> None:
        """Capture every bucket, the largest first: the others use its memory."""
        missing = [size for size in reversed(self.sizes) if size not in self._replays]
        for bucket in tqdm(missing, desc="capturing chunks of prompts", disable=not progress):
            if self.failure is None and bucket not in self._failed:
                self._make(bucket)

    def drop(self) -> None:
        """Forget every graph: they are captured again where they are needed."""
        self._replays.clear()
        self._asked.clear()
        self._failed.clear()

    def _bucket(self, count: int, rows: int) -> int | None:
        """A captured bucket with room for ``count`` tokens of ``rows`` rows, not much larger."""
        large = [size for size in self.sizes if size >= count]
        fitting = [size for size in large if size < 2 * large[0] and num_rows(size) > rows]
        if not fitting or self.failure is not None:
            return None
        bucket = fitting[0]
        if bucket not in self._replays and bucket not in self._failed:
            self._asked[bucket] = self._asked.get(bucket, 0) + 1
            if self._asked[bucket] > USES_BEFORE_CAPTURE:
                self._make(bucket)
        return next((size for size in fitting if size in self._replays), None)

    def _make(self, bucket: int) -> None:
        nothing = StepWork(np.empty(0, np.int64), np.empty(0, np.int64), 0, np.empty(0, bool))
        static = torch.from_numpy(self._pack(nothing, nothing.samples, bucket)).to(self.device)
        try:
            self._replays[bucket] = static, self._capture(self.step, static)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if not self._failed:
                logger.warning(f"chunks of {bucket} prompt tokens run without CUDA graphs: {message}")
            self._failed.add(bucket)
            # With others there, or for want of memory, it was this one's size.
            if not self._replays and not is_short_of_memory(error):
                self.failure = message

    def _pack(self, work: StepWork, choosers: np.ndarray, bucket: int) -> np.ndarray:
        """The array of a step, int64."""
        host, num, counts = self.slots, len(work.slots), work.counts
        num_tokens, size = int(counts.sum()), num_rows(bucket)
        buffer = np.zeros(4 * size + 3 * bucket, dtype=np.int64)
        slots, ends, lengths, chosen = buffer[: 4 * size].reshape(4, size)
        ids, positions, rows = buffer[4 * size :].reshape(3, bucket)
        slots[:] = host.num_slots
        slots[:num] = work.slots
        chosen[:] = host.num_slots
        chosen[:num][choosers] = work.slots[choosers]
        ends[:num] = counts.cumsum()
        ends[num:] = num_tokens
        ends[-1] = bucket
        lengths[:num] = host.computed[work.slots] + counts
        rows[:] = size - 1
        row = rows[:num_tokens] = np.repeat(np.arange(num), counts)
        positions[:num_tokens] = np.arange(num_tokens) - (ends[:num] - lengths[:num])[row]
        ids[:num_tokens] = host.history[work.slots[row], positions[:num_tokens]]
        return buffer


def unpack(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slots, ends, lengths, choosers ``[rows]`` each; ids, positions, rows ``[tokens]`` each, of a step's array."""
    # 3 tokens + 4 rows, with a row for TOKENS_PER_ROW: this is the number of tokens, or one more in the same row.
    size = num_rows(len(buffer) * TOKENS_PER_ROW // (3 * TOKENS_PER_ROW + 4))
    return (*buffer[: 4 * size].view(4, size).unbind(), *buffer[4 * size :].view(3, -1).unbind())
