"""Steps over chunks of prompts captured as CUDA graphs, one for each bucket of token counts.

A short prompt is bound by the host: launching its kernels takes longer than running them, and every running sequence
waits meanwhile. A graph takes one array, sent in one piece::

    slots, ends, lengths             [rows] each
    sampled_on_device, last, lengths [outputs] each
    ids, positions, row_of           [tokens] each

Small chunks take decode rows along, since reading the weights again would cost more than the tokens do. Those come
first in the step, and in what it gives. Of them the device knows more than the host, which puts ``ON_DEVICE`` in
the place of a length, token or position.

``rows`` are what attention sees as sequences: in large steps chunks, otherwise decode rows and runs of a few tokens of
a chunk each, all short enough for the kernel of decode. So a step has one launch of attention, whose work is shared out
evenly.

``outputs`` are decode rows and chunks: ``last`` is each one's last token in the step, ``lengths`` its tokens computed
by then, ``sampled_on_device`` the slots of those whose next token is chosen from this step's logits by the parameters
of the slot; for the others, the slot that has no tokens. Tokens that fill up a bucket belong to rows of that slot: they
write nothing and see nothing.

Chunks that keep the device busy for longer than it takes to launch them gain nothing, and are not captured: which ones
these are follows from the size of the model, see :func:`chunk_sizes`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..async_copy import send
from ..scheduling.slots import Slots
from ..scheduling.step import ScheduledStep
from .decode_graphs import Capture, is_short_of_memory

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

MIXED_TOTALS = (128, 256, 384, 512, 768, 1024)
"""Tokens of steps with decode rows, those included. Matmuls of 264 to 304 or 448 tokens take longer a token."""

OUTPUTS = (32, 96, 176, 256)
"""Decode rows and chunks of such steps, then 128 more each: each has a row in the matmul of the logits."""

IN_RUNS = 256
"""Chunks of so many tokens attend in runs without decode rows too: the prefill kernel has few tiles of them, each of
which walks through all keys (H200, 128 tokens behind 8,192: 149 us a layer, 60 in runs)."""

USES_BEFORE_CAPTURE = 2
"""Steps of a bucket that run eagerly, or in a larger graph, before it is captured: a capture costs two of them."""

ON_DEVICE = -1
"""Stands for what the device knows."""

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a captured step.

    Attributes:
        num_tokens: of the step.
        num_rows: what attention sees as sequences.
        num_outputs: decode rows and chunks.
        row_tokens: tokens of a row at most.
    """

    num_tokens: int
    num_rows: int
    num_outputs: int
    row_tokens: int

    @property
    def size(self) -> int:
        """Numbers of the array."""
        return 3 * sum(map(_aligned, (self.num_rows, self.num_outputs, self.num_tokens)))

    def split(self, array: Any) -> tuple[Any, Any, Any]:
        """Views ``[3, rows]``, ``[3, outputs]`` and ``[3, tokens]`` of the array, whichever library's."""
        views, start = [], 0
        for count in (self.num_rows, self.num_outputs, self.num_tokens):
            end = start + 3 * _aligned(count)
            views.append(array[start:end].reshape(3, -1)[:, :count])
            start = end
        return tuple(views)


def _aligned(count: int) -> int:
    """Numbers of 8 bytes that ``count`` of them take in an array: kernels are compiled again for other addresses than
    multiples of 16 bytes."""
    return count + count % 2


class Step(Protocol):
    """A forward over an array as above."""

    def __call__(self, buffer: torch.Tensor, layout: Layout) -> Outputs:
        """Tensors ``[num_outputs, ...]``."""


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


def mixed_totals(largest: int) -> list[int]:
    """Tokens of captured steps with decode rows, ascending, for steps of at most ``largest``."""
    return [total for total in MIXED_TOTALS if total < largest] + ([largest] if largest <= MIXED_TOTALS[-1] else [])


def output_sizes(num_slots: int) -> list[int]:
    """Numbers of decode rows and chunks of such steps, ascending: each has a slot."""
    sizes = [OUTPUTS[0]]
    while sizes[-1] < num_slots:
        sizes.append(OUTPUTS[len(sizes)] if len(sizes) < len(OUTPUTS) else sizes[-1] + 128)
    return sizes


def num_rows(num_tokens: int) -> int:
    """Rows of a bucket of ``num_tokens``, the one that fills it up included."""
    return max(MIN_ROWS, -(-num_tokens // TOKENS_PER_ROW))


class ChunkGraphs:
    """The captured steps of one model over packed chunks.

    Args:
        step: a forward over an array as above.
        slots: of the sequences, on the host.
        sizes: token counts with a graph of their own, ascending.
        device: of the model.
        capture: makes the function that replays a step.
        row_tokens: tokens of the runs that chunks attend in; None: there are none, and no decode rows go along.

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
        row_tokens: int | None = 16,
    ) -> None:
        self.step, self.slots, self.sizes, self.device = step, slots, sizes, device
        self.row_tokens = row_tokens
        self.mixed_totals = mixed_totals(sizes[-1]) if row_tokens is not None else []
        self.output_sizes = output_sizes(slots.num_slots)
        self.failure: str | None = None
        self._capture = capture
        # By tokens, and outputs of steps that may have decode rows, 0: of steps without.
        self._replays: dict[tuple[int, int], tuple[torch.Tensor, Callable[[], Outputs]]] = {}
        self._asked: dict[tuple[int, int], int] = {}
        self._failed: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, work: ScheduledStep, sampled_on_device: np.ndarray) -> Outputs | None:
        """Queue a step; None: it has no graph, nothing was done.

        Args:
            work: decode rows, and chunks whose tokens the host knows.
            sampled_on_device: bool ``[num_rows]``: rows whose next token is chosen.

        Returns:
            What the step gives, overwritten by a later one; the rows of ``work`` come first.
        """
        bucket = self._bucket(work.num_decode, work.num_tokens, len(work.slots))
        if bucket is None:
            return None
        static, replay = self._replays[bucket]
        static.copy_(send(self._pack(work, sampled_on_device, self.layout(*bucket)), self.device))
        return replay()

    def tokens_to_fill_graph(self, num_decode: int, count: int, least: int = 0) -> int | None:
        """Prompt tokens that fill the smallest captured step with ``num_decode`` rows and room for ``count``, of
        ``least`` tokens or more; None: there is none."""
        totals = self._totals(max(num_decode + max(count, 1), least))
        return totals[0] - num_decode if totals and self.failure is None else None

    def warm_up(self, progress: bool = False, wanted: Iterable[tuple[int, int]] | None = None) -> None:
        """Capture the buckets ``wanted`` (None: all), the largest first: the others use its memory."""
        missing = sorted(set(self.buckets() if wanted is None else wanted) - self._replays.keys(), reverse=True)
        for bucket in tqdm(missing, desc="capturing chunks of prompts", disable=not progress):
            if self.failure is None and bucket not in self._failed:
                self._make(bucket)

    def buckets(self) -> list[tuple[int, int]]:
        """All that a step may ask for: tokens, and outputs of steps with decode rows, 0: of steps without."""
        found, fewer = [(size, 0) for size in self.sizes], 0
        for outputs in self.output_sizes:
            # Each output has a token, and fewer of them have a bucket of their own.
            found += [(total, outputs) for total in self.mixed_totals if total > fewer]
            fewer = outputs
        return found

    def _totals(self, count: int) -> list[int]:
        """Tokens of the smallest two captured steps with room for ``count``, as far as there are any."""
        return [total for total in self.mixed_totals if total >= count][:2]

    def drop(self) -> None:
        """Forget every graph: they are captured again where they are needed."""
        self._replays.clear()
        self._asked.clear()
        self._failed.clear()

    def layout(self, num_tokens: int, num_outputs: int) -> Layout:
        """The sizes of a bucket."""
        row_tokens = self.row_tokens if num_outputs or num_tokens <= IN_RUNS else None
        num_outputs = num_outputs or num_rows(num_tokens)
        if row_tokens is None:
            return Layout(num_tokens, num_outputs, num_outputs, num_tokens)
        # The last run of each chunk may be shorter, and so may that of the tokens that fill up.
        return Layout(num_tokens, num_outputs + -(-num_tokens // row_tokens) + 1, num_outputs, row_tokens)

    def _bucket(self, num_decode: int, count: int, outputs: int) -> tuple[int, int] | None:
        """A captured bucket with room for ``count`` tokens and so many outputs, not much larger."""
        if self.failure is not None:
            return None
        if num_decode:
            numbers = [number for number in self.output_sizes if number >= outputs][:2]
            fitting = [(total, number) for total in self._totals(count) for number in numbers]
        else:
            large = [size for size in self.sizes if size >= count]
            # One row more, that fills it up.
            fitting = [(size, 0) for size in large if size < 2 * large[0] and num_rows(size) > outputs]
        if not fitting:
            return None
        best = fitting[0]
        if best not in self._replays and best not in self._failed:
            self._asked[best] = self._asked.get(best, 0) + 1
            if self._asked[best] > USES_BEFORE_CAPTURE:
                self._make(best)
        return next((bucket for bucket in fitting if bucket in self._replays), None)

    def _make(self, bucket: tuple[int, int]) -> None:
        nothing = ScheduledStep(np.empty(0, np.int64), np.empty(0, np.int64), 0, np.empty(0, bool))
        layout = self.layout(*bucket)
        static = torch.from_numpy(self._pack(nothing, nothing.samples, layout)).to(self.device)
        try:
            self._replays[bucket] = static, self._capture(partial(self.step, layout=layout), static)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if not self._failed:
                logger.warning(f"chunks of {bucket[0]} prompt tokens run without CUDA graphs: {message}")
            self._failed.add(bucket)
            # With others there, or for want of memory, it was this one's size.
            if not self._replays and not is_short_of_memory(error):
                self.failure = message

    def _pack(self, work: ScheduledStep, sampled_on_device: np.ndarray, layout: Layout) -> np.ndarray:
        """The array of a step, int64."""
        host, n, num, counts = self.slots, work.num_decode, len(work.slots), work.counts
        num_tokens, ends = work.num_tokens, work.counts.cumsum()
        array = np.zeros(layout.size, dtype=np.int64)
        rows, outputs, (ids, positions, row_of) = layout.split(array)
        computed = host.computed[work.slots] + counts
        of_token = np.repeat(np.arange(num), counts)
        positions[:num_tokens] = np.arange(num_tokens) - (ends - computed)[of_token]
        ids[n:num_tokens] = host.history[work.slots[of_token[n:]], positions[n:num_tokens]]

        chosen, last, lengths = outputs
        chosen[:] = host.num_slots
        chosen[:num][sampled_on_device] = work.slots[sampled_on_device]
        last[:num] = ends - 1
        lengths[:num] = computed

        # Runs of everything, and of the tokens behind it.
        filled = np.append(counts, layout.num_tokens - num_tokens)
        runs = -(-filled // layout.row_tokens)
        source = np.repeat(np.arange(num + 1), runs)
        num_runs, is_real = len(source), source < num
        run_ends = (np.arange(num_runs) - (runs.cumsum() - runs)[source] + 1) * layout.row_tokens
        run_ends = np.minimum(run_ends, filled[source])
        slots, row_ends, row_lengths = rows
        slots[:] = host.num_slots
        slots[:num_runs][is_real] = work.slots[source[is_real]]
        row_ends[:] = layout.num_tokens
        row_ends[:num_runs] = run_ends + (filled.cumsum() - filled)[source]
        row_lengths[:num_runs][is_real] = (computed - counts)[source[is_real]] + run_ends[is_real]
        row_of[:] = np.repeat(np.arange(num_runs), np.diff(row_ends[:num_runs], prepend=0))
        for known in (ids, positions, lengths, row_lengths):
            known[:n] = ON_DEVICE
        return array
