"""Kernels compiled by other processes while PyTorch computes what they would have computed.

Inside :func:`compiling` ops of this package launch nothing in the calling thread: what they would launch is compiled by
processes of :mod:`.compile_worker`, and their results come from the PyTorch references. A program that runs a few steps
in it has all of its kernels afterwards, sooner than one after the other: much of a compilation is Python, so threads
would wait for one another.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from .backend import recording

MAX_PROCESSES = 16
FIRST = ("_finish_rows", "_merge_partials")
"""Kernels that take longest to compile, most of it outside of Python: threads of this process do it, and begin before
the other processes have started, which takes seconds."""


def can_compile(device: torch.device) -> bool:
    """Whether kernels can be compiled ahead for ``device``."""
    return device.type == "cuda" and torch.version.hip is None and hasattr(os, "fork")


@contextlib.contextmanager
def compiling(device: torch.device, bar: Any) -> Iterator[None]:
    """Compile what the ops in the block would launch; leaving it waits for that.

    Kernels that do not compile are left to the calls that need them. An exception in the block leaves the rest undone.

    Args:
        device: a CUDA device.
        bar: a progress bar as of tqdm, whose ``total`` grows.

    Raises:
        RuntimeError: the compiling process has ended before its work.
    """
    from .launch_triton import compilation_of

    launches: list[tuple[Any, tuple, dict[str, Any]]] = []
    seen: set[tuple | None] = set()
    compiled: set[str] = set()
    jobs: SimpleQueue[tuple | None] = SimpleQueue()
    with _worker() as worker:
        # A pipe takes little as long as the worker starts: this thread does not wait for it.
        threads = [
            threading.Thread(target=_write, args=(worker, jobs), name="compile-ahead jobs", daemon=True),
            threading.Thread(target=_load, args=(worker, device, launches, bar), name="compile-ahead", daemon=True),
        ]
        for thread in threads:
            thread.start()

        def record(key: tuple | None, kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
            if key is not None and key in seen:
                return
            seen.add(key)
            what = compilation_of(kernel, arguments, constants)
            if repr(what) not in compiled:  # Keys of launches say more than what is compiled depends on.
                compiled.add(repr(what))
                bar.total += 1
                if kernel.fn.__name__ in FIRST:
                    one = (device, (kernel, arguments, constants), bar)
                    threads.append(threading.Thread(target=_compile_here, args=one, name="compile-ahead", daemon=True))
                    threads[-1].start()
                    return
                launches.append((kernel, arguments, constants))
                jobs.put((len(launches) - 1, tuple(what)))

        try:
            with recording(record):
                yield
        finally:
            jobs.put(None)
        for thread in threads:
            thread.join()
    if worker.returncode:
        raise RuntimeError(f"the process that compiles kernels has ended with status {worker.returncode}.")


@contextlib.contextmanager
def _worker() -> Iterator[subprocess.Popen]:
    from .launch_triton import cache_folder

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache_folder())}
    command = [sys.executable, "-m", f"{__package__}.compile_worker", str(min(MAX_PROCESSES, os.cpu_count() or 1))]
    # A session of its own: Ctrl-C is for this process, which ends that one.
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        yield worker
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        raise
    finally:
        worker.wait()


def _write(worker: subprocess.Popen, jobs: "SimpleQueue[tuple | None]") -> None:
    """Hand jobs over until None comes. If the worker has ended, the calls that need a kernel compile it."""
    stdin: Any = worker.stdin
    with contextlib.suppress(BrokenPipeError):
        while (job := jobs.get()) is not None:
            stdin.write(pickle.dumps(job))
            stdin.flush()
    with contextlib.suppress(BrokenPipeError):
        stdin.close()


def _load(worker: subprocess.Popen, device: torch.device, launches: list, bar: Any) -> None:
    """Take what has been compiled from the cache into this process."""
    _use(device)
    while True:
        try:
            number, error = pickle.load(worker.stdout)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError):
            return
        if error is None:
            _compile(*launches[number])
        bar.update()


def _compile_here(device: torch.device, launch: tuple[Any, tuple, dict[str, Any]], bar: Any) -> None:
    """Compile one kernel in a thread of its own."""
    _use(device)
    _compile(*launch)
    bar.update()


def _use(device: torch.device) -> None:
    """Make the device's context that of this thread."""
    torch.cuda.set_device(device)
    torch.cuda.current_stream().synchronize()


def _compile(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
    """Compile, or take from the cache. What fails is left to the call that needs it."""
    from .launch_triton import compile_only

    with contextlib.suppress(Exception):
        compile_only(kernel, arguments, constants)


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
