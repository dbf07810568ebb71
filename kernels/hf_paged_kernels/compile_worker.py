"""A process that compiles kernels for another one, in as many processes of its own as it is told.

    python -m hf_paged_kernels.compile_worker 16

Reads pairs of a number and a :class:`.launch_triton.Compilation` from its standard input, pickled one behind the other,
and writes each number to its standard output, pickled, with None or what went wrong. What it compiles is in Triton's
cache by then. It ends with its input.

It touches no GPU, and is a program of its own: ``multiprocessing`` would run the script that it is called from again.
"""

import heapq
import os
import pickle
import pkgutil
import sys
import threading
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import hf_paged_kernels

from .launch_triton import Compilation, compile_into_cache

SLOW = ("_hopper_forward", "_quantized_splits", "_paged_forward", "_quantized_forward", "_pick_rows")
"""Kernels that take several seconds: begun last, they would be waited for alone."""


def serve(num_processes: int, jobs: Any, answers: Any) -> None:
    """Compile ``jobs`` until they end, those first that take long.

    Args:
        num_processes: that compile at a time; they are forks of this one, and start at once.
        jobs, answers: binary files.
    """
    for module in pkgutil.walk_packages(hf_paged_kernels.__path__, "hf_paged_kernels."):
        if module.name.endswith(("_triton", "_gluon")):
            import_module(module.name)  # Before the forks, which share it.
    changed = threading.Condition()
    waiting: list[tuple[bool, int, Compilation]] = []
    num_running = 0

    def start_more() -> None:
        nonlocal num_running
        while waiting and num_running < num_processes:
            _, number, what = heapq.heappop(waiting)
            num_running += 1
            try:
                future = pool.submit(compile_into_cache, what)
            except BrokenExecutor as error:  # A process was killed.
                end(number, error)
            else:
                future.add_done_callback(partial(ended, number))

    def ended(number: int, future: Future) -> None:
        end(number, future.exception())

    def end(number: int, error: BaseException | None) -> None:
        nonlocal num_running
        with changed:
            num_running -= 1
            changed.notify_all()
            try:
                pickle.dump((number, None if error is None else f"{type(error).__name__}: {error}"), answers)
                answers.flush()
            finally:
                start_more()

    with ProcessPoolExecutor(num_processes, get_context("fork")) as pool:
        while True:
            try:
                number, what = pickle.load(jobs)
            except EOFError:
                break
            job = Compilation(*what)
            with changed:
                heapq.heappush(waiting, (job.name not in SLOW, number, job))
                start_more()
        with changed:
            changed.wait_for(lambda: not waiting and not num_running)


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a compiler prints is no answer.
    serve(int(sys.argv[1]), sys.stdin.buffer, output)
