"""Which implementation a tensor takes, and the device a launch runs under."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from .settings import HOPPER_BACKWARD_ROWS, SHORT_QUERY, cdiv

TRITON_DEVICES = ("cuda", "xpu")
GLUON_HEAD_DIMS = (64, 128, 256)
GLUON_BACKWARD_HEAD_DIMS = (64, 128)
QUANTIZED_ROWS = 8
"""Query rows of a sequence and key/value head up to which quantised pages take the Gluon kernel: the least that the
tensor cores take as columns."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` takes the Triton kernels: on an accelerator, but in float64, in which no kernel computes.

    Others take the PyTorch reference.
    """
    return tensor.device.type != "cpu" and tensor.dtype != torch.float64 and not _takes_references()


_on_references: set[int] = set()


def _takes_references() -> bool:
    return bool(_on_references) and threading.get_ident() in _on_references


Record = Callable[[tuple | None, Any, tuple, dict[str, Any]], None]
"""Takes a launch: a key that equal ones share (None: unknown), the kernel, its arguments, its constants."""
_recorders: dict[int, Record] = {}


def recorder() -> Record | None:
    """What takes the launches of this thread in place of the GPU; None: nothing does."""
    return _recorders.get(threading.get_ident()) if _recorders else None


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """In this thread ``record`` takes launches in place of the GPU."""
    _recorders[threading.get_ident()] = record
    try:
        yield
    finally:
        del _recorders[threading.get_ident()]


@contextmanager
def _with_this_thread_in(threads: set[int]) -> Iterator[None]:
    """Blocks may lie in one another."""
    thread = threading.get_ident()
    is_outermost = thread not in threads
    threads.add(thread)
    try:
        yield
    finally:
        if is_outermost:
            threads.discard(thread)


def on_references() -> AbstractContextManager:
    """In this thread ops compute with PyTorch, as on a CPU."""
    return _with_this_thread_in(_on_references)


_keeping_nothing: set[int] = set()


def keeps_no_memory() -> bool:
    """Whether memory that this thread makes now must not be kept for later calls."""
    return bool(_keeping_nothing) and threading.get_ident() in _keeping_nothing


def keeping_no_memory() -> AbstractContextManager:
    """In this thread no memory is kept for later calls."""
    return _with_this_thread_in(_keeping_nothing)


def on_nvidia(tensor: torch.Tensor) -> bool:
    """Whether kernels on ``tensor`` may use instructions of NVIDIA GPUs."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def device_guard(tensor: torch.Tensor) -> AbstractContextManager:
    """Make ``tensor``'s device current: Triton launches on the current device, wherever its arguments live."""
    device = tensor.device
    if device.type == "cpu" or (device.type == "cuda" and device.index == torch._C._cuda_getDevice()):
        return _NO_GUARD
    return torch.get_device_module(device).device(device)


_NO_GUARD = nullcontext()


MAX_GRID = 65535
"""The most programs along the second and along the third axis of a CUDA grid."""


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, dtype and device: all of a tensor but its memory."""


def layout(tensor: torch.Tensor | None) -> Any:
    """The :data:`Layout` of a tensor, or None."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """An optional tensor that a kernel reads one element after the other; itself where it lies so."""
    return None if tensor is None else tensor.contiguous()


def new_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of a contiguous tensor of the same shape and dtype: ``new_empty(shape)`` in half the host's time."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose rows (last dimension) a kernel reads one element after the other; itself where they lie so."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def scale_strides(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> tuple[int, ...]:
    """The strides of a pair of scales, which kernels take once; zeros without scales."""
    if k_scale is None or v_scale is None:
        return 0, 0, 0
    if k_scale.stride() != v_scale.stride():
        raise ValueError(
            f"k_scale and v_scale must have the same strides, got {k_scale.stride()} and {v_scale.stride()}."
        )
    return k_scale.stride()


def has_gluon(device: torch.device) -> bool:
    """Whether the Gluon kernels run on ``device``: Hopper and a Triton that has Gluon, not switched off."""
    return _has_gluon(device) and not _takes_references()


@lru_cache
def _has_gluon(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or os.environ.get("HF_PAGED_GLUON") == "0":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and find_spec("triton.experimental.gluon") is not None


def uses_gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether attention takes the Gluon kernel: a Hopper GPU, and tensors that TMA and wgmma can read.

    ``HF_PAGED_GLUON=0`` in the environment keeps everything on portable Triton.
    """
    return (
        has_gluon(q.device)
        and scale > 0
        and _suits_gluon(*[(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v)])
        and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
    )


@lru_cache(1024)
def _suits_gluon(q: Layout, k: Layout, v: Layout) -> bool:
    """The part of :func:`uses_gluon` that asks for layouts only."""
    (q_shape, _, dtype, _), (k_shape, _, k_dtype, _), (v_shape, _, v_dtype, _) = q, k, v
    head_dim = q_shape[-1]
    group = q_shape[-2] // max(1, k_shape[-2 if len(k_shape) == len(q_shape) else 1])
    return (
        dtype in (torch.float16, torch.bfloat16)
        and k_dtype == v_dtype == dtype
        and head_dim == v_shape[-1]
        and head_dim in GLUON_HEAD_DIMS
        and group <= 64
        and all(is_in_sixteens(strides, dtype.itemsize) for _, strides, *_ in (q, k, v))
    )


def uses_gluon_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
) -> bool:
    """Whether the backward pass takes the Gluon kernel: where the forward pass does, and for what it computes.

    Softcap, sinks, float16, other head dims, and more rows than a descriptor counts are left to portable Triton. So are
    short sequences: each takes whole blocks of rows of dq in float32, many times the memory of its queries.
    """
    return (
        softcap is None
        and sinks is None
        and uses_gluon(q, k, v, scale)
        and _suits_gluon_backward(q.shape, k.shape, q.dtype, None if cu_seqlens_q is None else len(cu_seqlens_q) - 1)
    )


@lru_cache(1024)
def _suits_gluon_backward(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, num_packed: int | None
) -> bool:
    """The part of :func:`uses_gluon_backward` that asks for shapes only."""
    head_dim, num_numbers = q_shape[-1], math.prod(q_shape)
    return (
        dtype == torch.bfloat16
        and head_dim in GLUON_BACKWARD_HEAD_DIMS
        and 0 < num_numbers < 2**30 * head_dim
        and 0 not in k_shape
        and (len(q_shape) == 3 or q_shape[0] <= MAX_GRID)
        and _fills_blocks(q_shape, num_packed)
    )


def _fills_blocks(q_shape: tuple[int, ...], num_packed: int | None) -> bool:
    """Whether blocks of the Gluon backward kernel have at most twice the rows of the queries."""
    rows, seqlen_q = HOPPER_BACKWARD_ROWS[q_shape[-1]], q_shape[-3]
    blocks = cdiv(seqlen_q, rows) if num_packed is None else seqlen_q // rows + num_packed
    return blocks * rows <= 2 * seqlen_q


def uses_quantized_gluon(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    max_query_len: int,
) -> bool:
    """Whether a step over FP8 or INT8 pages takes the Gluon kernel: a Hopper GPU, short queries, what TMA can read."""
    head_dim = q.shape[-1]
    return (
        has_gluon(q.device)
        and q.dtype in (torch.float16, torch.bfloat16)
        and head_dim == v_pages.shape[-1]
        and head_dim in GLUON_HEAD_DIMS
        and max_query_len <= SHORT_QUERY
        and max_query_len * (q.shape[1] // k_pages.shape[1]) <= QUANTIZED_ROWS
        and all(
            x.data_ptr() % 16 == 0 and is_in_sixteens(x.stride(), x.element_size())
            for x in (k_pages, v_pages, k_scale, v_scale)
        )
    )


def is_in_sixteens(strides: tuple[int, ...], element_size: int) -> bool:
    """Rows of 16-byte multiples, as TMA descriptors need them."""
    elements = 16 // element_size
    return strides[-1] == 1 and all(s > 0 and s % elements == 0 for s in strides[:-1])
