"""Steps over chunks of prompts captured as CUDA graphs, one for each bucket of token counts.

A short prompt is bound by the host: launching its kernels takes longer than running them, and every running sequence
waits meanwhile. A graph takes one array, sent in one piece::

    decode [D]  |  slots, ends, lengths, choosers [rows] each  |  ids, positions, rows [tokens] each

``choosers`` are the slots of rows whose next token is chosen from this step's logits by the parameters of the slot; for
the others, the slot that has no tokens. Tokens that fill up a bucket belong to the last row, whose slot is that one:
they write nothing and see nothing.

``decode`` are slots that decode in the same step: small chunks take them along, since reading the weights again would
cost more than the tokens do. They come first in the step, and in what it gives. ``D`` is 0 for large chunks.

Chunks that keep the device busy for longer than it takes to launch them gain nothing, and are not captured: which ones
these are follows from the size of the model, see :func:`chunk_sizes`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

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

MIXED_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Token counts of chunks that take decode rows along; of those, four at most, around the usual one."""
USUALLY_MIXED = 256
"""Where that one is not known."""

USES_BEFORE_CAPTURE = 2
"""Steps of a bucket that run eagerly, or in a larger graph, before it is captured: a capture costs two of them."""

Outputs = tuple[torch.Tensor, ...]


class Step(Protocol):
    """A forward over an array as above."""

    def __call__(self, buffer: torch.Tensor, num_decode: int) -> Outputs:
        """Tensors ``[num_decode + rows, ...]``."""


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


def mixed_sizes(largest: int, usual: int) -> list[int]:
    """Token counts of graphs with decode rows, ascending, for steps of at most ``largest``.

    About a half, one, two and four times the usual number.
    """
    sizes = [size for size in MIXED_SIZES if size < largest] + ([largest] if largest <= MIXED_SIZES[-1] else [])
    wanted = (min(times * usual // 2, sizes[-1]) for times in (1, 2, 4, 8))
    return sorted({next(size for size in sizes if size >= count) for count in wanted})


def decode_sizes(num_slots: int) -> list[int]:
    """Numbers of decode rows that chunks take along, ascending; the last one is at least ``num_slots``."""
    sizes = [8]
    while sizes[-1] < num_slots:
        # 8, 16, 32, 64, and from there on two for each doubling.
        last = sizes[-1]
        sizes.append(last + (last if last < 64 else 1 << (last.bit_length() - 2)))
    return sizes


def num_rows(num_tokens: int) -> int:
    """Rows of a bucket of ``num_tokens``, the one that fills it up included."""
    return max(MIN_ROWS, -(-num_tokens // TOKENS_PER_ROW))


class ChunkGraphs:
    """The captured steps of one model over packed chunks.

    Args:
        step: a forward over an array as above, and the number of its decode rows: tensors ``[D + rows, ...]``.
        slots: of the sequences, on the host.
        sizes: token counts with a graph of their own, ascending.
        device: of the model.
        capture: makes the function that replays a step.
        mixed_tokens: prompt tokens of most steps with decode rows; None: not known.

    Attributes:
        failure: why there are no graphs, None while there may be.
    """

    def __init__(
        self,
        step: Step,
        slots: Slots,
        sizes: Sequence[int],
        device: torch.device,
        capture: Capture,
        mixed_tokens: int | None = None,
    ) -> None:
        self.step, self.slots, self.sizes, self.device = step, slots, sizes, device
        self.mixed_tokens = mixed_tokens or USUALLY_MIXED
        self.mixed_sizes = mixed_sizes(sizes[-1], self.mixed_tokens)
        self.decode_sizes = decode_sizes(slots.num_slots)
        self.failure: str | None = None
        self._capture = capture
        # By decode rows and tokens.
        self._replays: dict[tuple[int, int], tuple[torch.Tensor, Callable[[], Outputs]]] = {}
        self._asked: dict[tuple[int, int], int] = {}
        self._failed: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, work: StepWork, choosers: np.ndarray) -> tuple[Outputs, np.ndarray] | None:
        """Queue a step; None: it has no graph, nothing was done.

        Args:
            work: decode rows, and chunks whose tokens the host knows.
            choosers: bool ``[num_rows]``: rows whose next token is chosen.

        Returns:
            What the step gives, overwritten by a later one, and int64 ``[num_rows]``: where it is of each row.
        """
        n = work.num_decode
        bucket = self._bucket(n, int(work.counts[n:].sum()), len(work.slots) - n)
        if bucket is None:
            return None
        static, replay = self._replays[bucket]
        static.copy_(send(self._pack(work, choosers, bucket), self.device))
        return replay(), np.concatenate([np.arange(n), bucket[0] + np.arange(len(work.slots) - n)])

    def warm_up(self, progress: bool = False) -> None:
        """Capture every bucket without decode rows, and those of most steps with some; the largest first: the others
        use its memory."""
        wanted = [(0, size) for size in self.sizes]
        usual = next((size for size in self.mixed_sizes if size >= self.mixed_tokens), self.mixed_sizes[-1])
        wanted += [(num, usual) for num in self.decode_sizes]
        missing = sorted(set(wanted) - self._replays.keys(), key=sum, reverse=True)
        for bucket in tqdm(missing, desc="capturing chunks of prompts", disable=not progress):
            if self.failure is None and bucket not in self._failed:
                self._make(bucket)

    def drop(self) -> None:
        """Forget every graph: they are captured again where they are needed."""
        self._replays.clear()
        self._asked.clear()
        self._failed.clear()

    def _bucket(self, num_decode: int, count: int, rows: int) -> tuple[int, int] | None:
        """A captured bucket with room for decode rows and ``count`` tokens of ``rows`` rows, not much larger."""
        sizes = self.mixed_sizes if num_decode else self.sizes
        large = [size for size in sizes if size >= count]
        tokens = [size for size in large if size < 2 * large[0] and num_rows(size) > rows]
        if not tokens or self.failure is not None:
            return None
        decode = [0]
        if num_decode:
            decode = [num for num in self.decode_sizes if num >= num_decode]
            decode = [num for num in decode if num <= 2 * decode[0]]
        bucket = decode[0], tokens[0]
        if bucket not in self._replays and bucket not in self._failed:
            self._asked[bucket] = self._asked.get(bucket, 0) + 1
            if self._asked[bucket] > USES_BEFORE_CAPTURE:
                self._make(bucket)
        fitting = ((num, size) for size in tokens for num in decode)
        return next((bucket for bucket in fitting if bucket in self._replays), None)

    def _make(self, bucket: tuple[int, int]) -> None:
        nothing = StepWork(np.empty(0, np.int64), np.empty(0, np.int64), 0, np.empty(0, bool))
        static = torch.from_numpy(self._pack(nothing, nothing.samples, bucket)).to(self.device)
        try:
            self._replays[bucket] = static, self._capture(partial(self.step, num_decode=bucket[0]), static)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if not self._failed:
                logger.warning(f"chunks of {bucket[1]} prompt tokens run without CUDA graphs: {message}")
            self._failed.add(bucket)
            # With others there, or for want of memory, it was this one's size.
            if not self._replays and not is_short_of_memory(error):
                self.failure = message

    def _pack(self, work: StepWork, choosers: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
        """The array of a step, int64."""
        host, n, (room, tokens) = self.slots, work.num_decode, bucket
        first, counts, choosers = work.slots[n:], work.counts[n:], choosers[n:]
        num, num_tokens, size = len(first), int(counts.sum()), num_rows(tokens)
        array = np.zeros(room + 4 * size + 3 * tokens, dtype=np.int64)
        decode, buffer = array[:room], array[room:]
        decode[:] = host.num_slots
        decode[:n] = work.slots[:n]
        slots, ends, lengths, chosen = buffer[: 4 * size].reshape(4, size)
        ids, positions, rows = buffer[4 * size :].reshape(3, tokens)
        slots[:] = host.num_slots
        slots[:num] = first
        chosen[:] = host.num_slots
        chosen[:num][choosers] = first[choosers]
        ends[:num] = counts.cumsum()
        ends[num:] = num_tokens
        ends[-1] = tokens
        lengths[:num] = host.computed[first] + counts
        rows[:] = size - 1
        row = rows[:num_tokens] = np.repeat(np.arange(num), counts)
        positions[:num_tokens] = np.arange(num_tokens) - (ends[:num] - lengths[:num])[row]
        ids[:num_tokens] = host.history[first[row], positions[:num_tokens]]
        return array


def unpack(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slots, ends, lengths, choosers ``[rows]`` each; ids, positions, rows ``[tokens]`` each, of a step's array behind
    the decode rows."""
    # 3 tokens + 4 rows, with a row for TOKENS_PER_ROW: this is the number of tokens, or one more in the same row.
    size = num_rows(len(buffer) * TOKENS_PER_ROW // (3 * TOKENS_PER_ROW + 4))
    return (*buffer[: 4 * size].view(4, size).unbind(), *buffer[4 * size :].view(3, -1).unbind())
