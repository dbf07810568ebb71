"""Decode steps captured as CUDA graphs, one for each bucket of batch sizes, all in one memory pool.

A graph has one input, the rows' slots; everything else it takes from the tables by slot and writes back there::

    slots [bucket] -> computed, last_token, page tables -> forward -> logits, tokens -> last_token, computed + 1

so replaying it twice computes two steps, and no length is known to the host. A bucket that is larger than the batch is
filled up with the slot behind the last one, which has no tokens, writes nothing and stays as it is.
"""

import contextlib
import ctypes
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...mixed_precision import enables_autocast
from ...transformers_internals import is_moved_by_accelerate, without_autograd
from ..async_copy import send
from ..scheduling.pacing import bucket_sizes

logger = logging.get_logger(__name__)

Outputs = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor], Outputs]
Out = TypeVar("Out")


class Capture(Protocol):
    """Makes the function that replays a step over its one input."""

    def __call__(self, step: Callable[[torch.Tensor], Out], static: torch.Tensor, /) -> Callable[[], Out]:
        """Capture ``step(static)``; the result runs it again."""


PADDED_STEPS = 8
"""Rows that only fill up a captured bucket, in steps of all of its rows, before the bucket of the batch size is
captured: that takes longer than a few such steps, and batches shrink through one size after the other. Counted and not
timed, since which step runs decides how its sums are rounded."""


class CaptureError(RuntimeError):
    """A decode step that cannot be captured."""


class DecodeGraphs:
    """The captured decode steps of one model.

    Args:
        step: a decode step of the rows in slots ``[bucket]`` on the device: tensors
            ``[bucket, ...]``. It must read nothing from the host but the slots' number.
        num_slots: the slot of that number stands for no row.
        device: of the tables.
        capture: makes the function that replays a step.

    Attributes:
        failure: why there are no graphs, None while there may be.
    """

    def __init__(self, step: Step, num_slots: int, device: torch.device, capture: Capture | None = None) -> None:
        self.step, self.num_slots, self.device = step, num_slots, device
        self.sizes = bucket_sizes(num_slots)
        self.failure: str | None = None
        self._capture = capture or CudaCapture()
        self._replays: dict[int, tuple[torch.Tensor, Callable[[], Outputs]]] = {}
        self._held: dict[int, np.ndarray] = {}
        self._padded: dict[int, int] = {}
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, slots: np.ndarray) -> Outputs | None:
        """Queue a decode step; None: it cannot be captured, nothing was done.

        Returns:
            What the step gives of these rows: overwritten by a later one.
        """
        bucket = self._bucket(len(slots))
        if bucket is None:
            return None
        static, replay = self._replays[bucket]
        held = self._held.get(bucket)
        if held is None or not np.array_equal(held, slots):
            padded = np.full(bucket, self.num_slots, dtype=np.int64)
            padded[: len(slots)] = slots
            static.copy_(send(padded, self.device))
            self._held[bucket] = slots.copy()
        return tuple(output[: len(slots)] for output in replay())

    def warm_up(self, sizes: Iterable[int] | None = None, progress: bool = False) -> None:
        """Capture the buckets of these batch sizes (None: all), the largest first: the others use its memory."""
        wanted = {self._size_for(size) for size in (self.sizes if sizes is None else sizes)} - self._replays.keys()
        for bucket in tqdm(sorted(wanted, reverse=True), desc="capturing decode steps", disable=not progress):
            if bucket not in self._failed:
                self._make(bucket)
            if self.failure is not None:
                return

    def drop(self) -> None:
        """Forget every graph: they are captured again where they are needed."""
        self._replays.clear()
        self._held.clear()
        self._padded.clear()
        self._failed.clear()

    def _size_for(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def _bucket(self, count: int) -> int | None:
        """A captured bucket with room for ``count`` rows."""
        if self.failure is not None:
            return None
        bucket = self._size_for(count)
        if bucket in self._replays:
            return bucket
        larger = min((size for size in self._replays if size > bucket), default=None)
        if larger is not None:
            padded = self._padded[larger] = self._padded.get(larger, 0) + larger - bucket
            if padded < PADDED_STEPS * larger:
                return larger
            self._padded[larger] = 0
        return larger if bucket in self._failed or not self._make(bucket) else bucket

    def _make(self, bucket: int) -> bool:
        static = torch.full((bucket,), self.num_slots, dtype=torch.int64, device=self.device)
        try:
            self._replays[bucket] = static, self._capture(self.step, static)
        except Exception as error:
            # With others there, or for want of memory, it was this one's size.
            self._failed.add(bucket)
            message = f"{type(error).__name__}: {error}"
            if not self._replays and not is_short_of_memory(error):
                self.failure = message
            logger.warning_once(f"decode steps of {bucket} rows run without a CUDA graph of their own: {message}")
            return False
        return True


def is_short_of_memory(error: Exception) -> bool:
    """Whether a capture failed because the device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class CudaCapture:
    """Captures steps on one stream, into one pool of memory.

    The first step runs before it is captured, which compiles kernels and shows what cannot be captured, and so does one
    of a single row, which models like to treat in a way of its own. Others are captured at once where the driver can
    load kernels meanwhile, and replayed once: what a module kept of the captured step has its values then.

    Args:
        compiles: steps have modules that torch.compile compiles, outside of the run that is searched for host reads.
    """

    def __init__(self, compiles: bool = False) -> None:
        self._compiles = compiles
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._in_pool: weakref.WeakSet[Callable[[], Any]] = weakref.WeakSet()

    def __call__(self, step: Callable[[torch.Tensor], Out], static: torch.Tensor, /) -> Callable[[], Out]:
        """Capture the step; its inputs must be such that it may run now."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(static.device)
        is_first = not self._in_pool
        if is_first:
            # A pool dies with its last graph, and cannot be used again.
            self._pool = torch.cuda.graph_pool_handle()
        runs_ahead = is_first or len(static) == 1 or self._compiles or not loads_in_captures()
        current = torch.cuda.current_stream(static.device)
        self._stream.wait_stream(current)
        try:
            # Compiled modules would be compiled once more for a dispatcher without autograd.
            with torch.cuda.stream(self._stream), contextlib.nullcontext() if self._compiles else without_autograd():
                if runs_ahead:
                    self._run_ahead(step, static, is_first)
                graph, outputs = self._capture(step, static)
                if not runs_ahead:
                    graph.replay()
        finally:
            # Where it fails, ``static`` is let go, and what ran ahead may still read it.
            current.wait_stream(self._stream)

        def replay() -> Out:
            graph.replay()
            return outputs

        self._in_pool.add(replay)
        return replay

    def _run_ahead(self, step: Callable[[torch.Tensor], Out], static: torch.Tensor, is_first: bool) -> None:
        # Each operation is looked at once: other sizes run the same ones.
        with refuse_synchronisation(), RefuseHostReads() if is_first else contextlib.nullcontext():
            step(static)
        if self._compiles:
            step(static)

    def _capture(self, step: Callable[[torch.Tensor], Out], static: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, Out]:
        graph = torch.cuda.CUDAGraph()
        with _without_garbage_collection():
            # What other threads do meanwhile is none of this capture's business.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = step(static)
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                self._in_pool.clear()  # What it left of the pool is not used again either.
                raise
            graph.capture_end()
        return graph, outputs


@lru_cache
def loads_in_captures() -> bool:
    """Whether the driver loads kernels while a stream is captured: CUDA's can from 12.3 on."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return not failed and version.value >= 12030


@contextlib.contextmanager
def refuse_synchronisation() -> Iterator[None]:
    """Raise :class:`CaptureError` at the end if this thread waited for a CUDA device inside of an operation.

    :class:`RefuseHostReads` sees operations, this sees what they do (experts in other dtypes than bfloat16 read offsets
    back, for one). CUDA's sync debug mode warns; warnings of other threads go where they always go.
    """
    places: list[str] = []
    thread = threading.get_ident()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread and "synchronizing CUDA operation" in str(message):
                places.append(f"{filename}:{lineno}")
            else:
                show(message, category, filename, lineno, *args, **kwargs)

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if places:
        raise CaptureError(f"the model waits for the device ({places[0]})")


@contextlib.contextmanager
def _without_garbage_collection() -> Any:
    """A tensor or graph that is freed in the middle of a capture would end it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class RefuseHostReads(TorchDispatchMode):
    """Raises :class:`CaptureError` where an operation needs values of a device tensor on the host.

    A capture that fails half way leaves the allocator and the random generator in a bad state: this finds out before.
    """

    NAMES = frozenset(
        {
            "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
            "unique_consecutive", "bincount",
        }
    )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES and any(isinstance(x, torch.Tensor) and not _on_host(x) for x in args):
            raise CaptureError(f"the model reads values back to the host ({name})")
        index = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], Sequence) else ()
        if any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in index):
            raise CaptureError(f"the model indexes with a mask ({name})")
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and args and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            if isinstance(source, torch.Tensor) and _on_host(source) != _on_host(out):
                raise CaptureError(f"the model copies between host and device ({name})")
        return out


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def capture_blocker(model: Any, device: torch.device) -> str | None:
    """Why decode steps of a model cannot be captured, as far as its modules tell; None where nothing speaks against it.

    Models whose cache keeps recurrent states, or that compute keys behind the cache, are told by the cache.
    """
    if device.type != "cuda":
        return f"the model is on {device}"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return (
            f"the model is on {len(devices)} devices, and they compute one at a time. Where it fits on one, in a "
            f"smaller dtype perhaps, give each an engine in a process of its own (hf_paged.generate_distributed)"
        )
    if enables_autocast(model):
        return "its forward enables autocast; accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes that off"
    if is_moved_by_accelerate(model):
        return "accelerate moves or offloads the model's modules"
    return None
