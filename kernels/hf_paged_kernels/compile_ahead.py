"""Kernels compiled by threads while PyTorch computes what they would have computed.

Inside :func:`compiling` ops of this package launch nothing in the calling thread: what they would launch is compiled by
other threads, and their results come from the PyTorch references. A program that runs a few steps in it has all of its
kernels afterwards, sooner than one after the other: LLVM and ptxas run outside of Python's interpreter lock.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .backend import recording

MAX_THREADS = 16


def can_compile(device: torch.device) -> bool:
    """Whether kernels can be compiled ahead for ``device``."""
    return device.type == "cuda" and torch.version.hip is None


@contextlib.contextmanager
def compiling(device: torch.device, bar: Any) -> Iterator[None]:
    """Compile what the ops in the block would launch; leaving it waits for that.

    Kernels that do not compile are left to the calls that need them. An exception in the block leaves the rest undone.

    Args:
        device: a CUDA device.
        bar: a progress bar as of tqdm, whose ``total`` grows.
    """
    from .launch_triton import compile_only

    seen: set[tuple | None] = set()

    def prepare() -> None:
        torch.cuda.set_device(device)
        torch.cuda.current_stream().synchronize()  # Makes the device's context that of this thread.

    def compile_one(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):
            compile_only(kernel, arguments, constants)
        bar.update()

    def record(key: tuple | None, kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
        if key is None or key not in seen:
            seen.add(key)
            bar.total += 1
            pool.submit(compile_one, kernel, arguments, constants)

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "compile-ahead", initializer=prepare) as pool:
        try:
            with recording(record):
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def marker(what: str, device: torch.device) -> Path:
    """A file whose presence says that all kernels of ``what`` are in Triton's cache for devices like this one."""
    from .launch_triton import cache_folder

    versions = [importlib.metadata.version(name) for name in ("torch", "triton")]
    told = (what, _source_hash(), versions, torch.cuda.get_device_name(device))
    return cache_folder() / f"hf_paged-{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}"


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
