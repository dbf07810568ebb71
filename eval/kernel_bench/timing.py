"""The stop watches of ``eval.bench_kernels``, and the compilation ahead of them.

A call is timed as ``triton.testing.do_bench`` does it, the L2 cleared before each; decode and everything else that is
short runs many times inside one CUDA graph, over rotated buffers so that keys and values are not in L2 either. Kernels
are compiled ahead in parallel, by processes that call each once; the measurement finds them in the caches on disk.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from .calls import COMPILED_PEERS, MAKERS, Call, columns_of, has_flex
from .rows import DENSE, FA4, FLEX, OURS, Row

OUTSIDE_A_GRAPH = ("prefill", "backward")
SPLIT_TABLES = ("decode", "verify")
"""Tables whose rows rotate buffers."""


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def measure(row: Row, make: Callable[[], list[Call]], quick: bool) -> float:
    """Median microseconds of one call, forward without autograd."""
    rep = 30 if quick else 60
    with torch.no_grad():
        calls = make()
        if row.table in OUTSIDE_A_GRAPH:
            return _median_us(calls[0], rep)
        # A replay costs some microseconds of its own, which many short launches share.
        launches = 2 if row.table == "paged" else 20 if row.bytes < 2**29 else 6
        graph, launches = _capture(calls, launches)
        return _median_us(graph.replay, rep) / launches


def _capture(calls: list[Call], launches: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of every call in turn, at least ``launches`` of them, and how many it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = -(-launches // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph, rounds * len(calls)


def measure_copy() -> float:
    """TB/s of a device copy, read and written."""
    source = torch.zeros(_num_rows(), 8192, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_us(lambda: target.copy_(source), 60) / 1e6


def measure_read() -> float:
    """TB/s of reading: the sum of every row of float32 ``[rows, 8192]``."""
    source = torch.zeros(_num_rows(), 8192, device="cuda")
    sums = torch.empty(source.shape[0], device="cuda")
    return source.nbytes / _median_us(lambda: torch.sum(source, -1, out=sums), 60) / 1e6


def measure_matmul() -> float:
    """TFLOP/s of an 8192³ BF16 matmul."""
    a, b, out = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    return 2 * 8192**3 / _median_us(lambda: torch.mm(a, b, out=out), 150) / 1e6


CEILINGS = {"copy": measure_copy, "read": measure_read, "matmul": measure_matmul}
"""The card's own rates by name."""


def _num_rows() -> int:
    """Rows of 32 KiB: 4 GiB, or an eighth of a small card."""
    return min(4 * 2**30, torch.cuda.get_device_properties(0).total_memory // 8) // 2**15


def _median_us(call: Call, rep: int) -> float:
    """Median microseconds by ``do_bench`` in ``rep`` milliseconds."""
    from triton.testing import do_bench

    return do_bench(call, warmup=max(10, rep // 3), rep=rep, return_mode="median") * 1e3


def compile_key(row: Row, column: str) -> tuple[Any, ...]:
    """Rows of one key run the same compiled kernels."""
    query_len = max(row.query_lens)
    # Peers compile for what they like: for some every shape is another.
    shape = row.seq_lens if column in (FLEX, FA4) else ()
    return (
        MAKERS[row.table], column, row.head_dim, row.causal, row.group, row.page_size, row.kv_dtype,
        query_len if query_len <= 16 else query_len > 8192 and row.head_dim == 64, shape,
    )  # fmt: skip


def compiled_columns(row: Row, peers: set[str], ours: tuple[str, ...]) -> set[str]:
    """Columns of a row that compile when they are first called."""
    columns = {OURS} if row.table in ("write_pages", "backward", "shared_prefix") else set(ours)
    if row.table == "paged":
        columns.add(DENSE)
    return columns | {name for name, tables in COMPILED_PEERS.items() if name in peers and row.table in tables}


def compile_jobs(rows: list[Row], peers: set[str], ours: tuple[str, ...]) -> list[tuple[Row, str]]:
    """``(row, column)`` of everything that compiles when first called, each once and small, the slowest peers first."""
    found: dict[tuple[Any, ...], tuple[Row, str]] = {}
    for row in sorted(rows, key=lambda row: (sum(row.seq_lens), row.label)):
        for column in sorted(compiled_columns(row, peers, ours)):
            if column != FLEX or has_flex(row):
                found.setdefault(compile_key(row, column), (row, column))
    return sorted(found.values(), key=lambda job: job[1] not in COMPILED_PEERS)


def compile_one(job: tuple[Row, str, set[str], tuple[str, ...]]) -> tuple[Row, str, str | None]:
    """In a process of its own: one call of a row's column, which fills the compilers' caches on disk.

    Returns:
        ``(row, column, why it failed or None)``.
    """
    row, column, peers, ours = job
    try:
        with torch.no_grad():
            columns = columns_of(row, peers, ours, **({"num_sets": 1} if row.table in SPLIT_TABLES else {}))
            if column in columns:
                for call in columns[column]():
                    call()
            torch.cuda.synchronize()
    except Exception as error:
        return row, column, reason(error)
    finally:
        torch.cuda.empty_cache()
    return row, column, None


def _start_worker() -> None:
    """One core a worker; torch.compile must not start workers of its own in one."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)


def compile_all(
    rows: list[Row], peers: set[str], ours: tuple[str, ...], limit_s: float, done: Callable[[int, int], None]
) -> dict[tuple[Any, ...], str]:
    """Compile in parallel what the rows need, for at most ``limit_s`` seconds.

    Args:
        done: called with the jobs done so far and all of them.

    Returns:
        For each :func:`compile_key` of a peer that failed or was not ready: why. Our own kernels are not among them:
        the measurement compiles what is missing, and says itself what fails.
    """
    jobs = compile_jobs(rows, peers, ours)
    bad = {compile_key(row, column): f"not compiled within {limit_s:.0f} s" for row, column in jobs}
    started, free = time.monotonic(), torch.cuda.mem_get_info()[0]
    workers = max(1, min(14, os.cpu_count() or 1, len(jobs), int(free // (4 * 2**30))))
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
        answers = pool.imap_unordered(compile_one, [(row, column, peers, ours) for row, column in jobs])
        for i in range(len(jobs)):
            try:
                row, column, failed = answers.next(timeout=max(0.1, limit_s - (time.monotonic() - started)))
            except multiprocessing.TimeoutError:
                break
            del bad[compile_key(row, column)]
            if failed is not None:
                bad[compile_key(row, column)] = failed
            done(i + 1, len(jobs))
        # What is timed next shares the card with nobody.
        pool.terminate()
        pool.join()
    return {key: why for key, why in bad.items() if key[1] in COMPILED_PEERS}
