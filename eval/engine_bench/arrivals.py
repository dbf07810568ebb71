"""Requests that arrive at random times: the time to the first token, and the time between tokens.

Saturation comes first: as many requests as the engine runs are kept in it, a new one for each that ends, and new tokens
are counted over some seconds; the ones it starts with have a part of their output left, as in a run that has lasted.
Then, for each fraction of that rate, requests arrive as a Poisson process (seed fixed) for up to ``load_s`` seconds.
The first third of a load, in which requests only gather, is not counted. A token's time is when the step that brought
it to the host returns.
"""

import random
import time
from typing import Any

import numpy as np

import hf_paged
from eval.engine_bench.models import draw_requests
from eval.engine_bench.parts import Deadline, Sizes, config, drain

UNCOUNTED = 1 / 3
LEAST_LOAD_S = 5.0
PERCENTILES = (50, 90, 99)


class TokenTimes:
    """The times between tokens of every row, read off the engine's slots after each step.

    A row that is preempted starts anew: its pause is in no gap (``preemptions`` are reported).
    """

    def __init__(self, engine: hf_paged.Engine) -> None:
        self._slots = engine.core.slots
        self.length = self._slots.length.copy()
        self._generation = self._slots.generation.copy()
        # Of the last token; NaN where the row has none that was seen.
        self._last = np.full(self._slots.num_slots, np.nan)
        self.gaps: list[np.ndarray] = []
        self.ends: list[float] = []

    def read(self, now: float) -> None:
        """Take the tokens that came since the last call."""
        slots = self._slots
        is_same = self._generation == slots.generation
        self._last[~is_same] = np.nan
        has_new = is_same & (slots.length > self.length)
        gaps = now - self._last[has_new]
        gaps = gaps[~np.isnan(gaps)]
        if gaps.size:
            self.gaps.append(gaps)
            self.ends.append(now)
        # A prompt's first token may come in the step that admits the row, or later: the next gap starts at it.
        is_there = slots.length > slots.prompt_length
        self._last[(has_new | ~is_same) & is_there] = now
        self.length[:] = slots.length
        self._generation[:] = slots.generation

    def since(self, start: float) -> np.ndarray:
        """Gaps that ended after ``start``, in seconds."""
        counted = [gaps for gaps, end in zip(self.gaps, self.ends) if end > start]
        return np.concatenate(counted) if counted else np.zeros(0)


def percentiles(seconds: np.ndarray) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in PERCENTILES}


def arrivals(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """The sweep; see the module."""
    deadline = Deadline(limit_s)
    saturation = measure_saturation(engine, sizes, min(sizes.saturation_s, limit_s / 5))
    rows: list[dict[str, Any]] = []
    for number, fraction in enumerate(sizes.fractions):
        load_s = min(sizes.load_s, deadline.left_s / (len(sizes.fractions) - number))
        if load_s < min(LEAST_LOAD_S, sizes.load_s):
            break
        rate = fraction * saturation["requests_per_s"]
        rows.append({"fraction": fraction} | run_load(engine, sizes, rate, load_s, seed=number))
    return {
        "saturation": saturation, "rates": rows, "lengths": list(sizes.lengths),
        "cut": len(rows) < len(sizes.fractions),
    }  # fmt: skip


def measure_saturation(engine: hf_paged.Engine, sizes: Sizes, seconds: float) -> dict[str, float]:
    """Requests a second that the engine ends when there are always others."""
    running = engine.config.max_num_seqs
    prompts, outputs = draw_requests(4 * running, sizes.lengths, sizes.tokens, seed=1)
    draw, number = random.Random(2), 0
    handles: list[hf_paged.RequestHandle] = []
    for _ in range(running):
        new = draw.randint(1, outputs[number])
        handles.append(engine.submit(prompts[number], generation_config=config(new)))
        number += 1

    def keep_full(until: float) -> int:
        nonlocal handles, number
        steps = 0
        while time.perf_counter() < until and engine.step():
            steps += 1
            held = [handle for handle in handles if not handle.is_done]
            for _ in range(running - len(held)):
                index = number % len(prompts)
                held.append(engine.submit(prompts[index], generation_config=config(outputs[index])))
                number += 1
            handles = held
        return steps

    # Until the first prompts are through, and as long again for what they left behind.
    while engine.core.slots.decoding.sum() < 0.9 * running and keep_full(time.perf_counter() + 0.05):
        pass
    keep_full(time.perf_counter() + seconds / 4)
    before, started = engine.stats(), time.perf_counter()
    steps = keep_full(started + seconds)
    after, took = engine.stats(), time.perf_counter() - started
    drain(engine, handles)
    tokens_per_s = (after.new_tokens - before.new_tokens) / took
    return {
        "requests_per_s": tokens_per_s / (sum(outputs) / len(outputs)), "tokens_per_s": tokens_per_s,
        "seconds": took, "steps": steps,
    }  # fmt: skip


def run_load(engine: hf_paged.Engine, sizes: Sizes, rate: float, load_s: float, seed: int) -> dict[str, Any]:
    """Requests that arrive at ``rate`` a second for ``load_s`` seconds."""
    draw = random.Random(seed)
    times: list[float] = []
    while not times or times[-1] < load_s:
        times.append((times[-1] if times else 0.0) + draw.expovariate(rate))
    prompts, outputs = draw_requests(len(times), sizes.lengths, sizes.tokens, seed=100 + seed)
    before, tokens = engine.stats(), TokenTimes(engine)
    handles: list[hf_paged.RequestHandle] = []
    late: list[float] = []
    running: list[int] = []
    started = now = time.perf_counter()
    counted_from = UNCOUNTED * load_s
    while now - started < load_s:
        while len(handles) < len(times) and times[len(handles)] <= now - started:
            late.append(now - started - times[len(handles)])
            index = len(handles)
            handles.append(engine.submit(prompts[index], generation_config=config(outputs[index])))
        if not engine.step():
            next_s = times[len(handles)] if len(handles) < len(times) else load_s
            time.sleep(max(0.0, min(next_s, load_s) - (time.perf_counter() - started)))
        now = time.perf_counter()
        tokens.read(now)
        if now - started > counted_from:
            running.append(int((tokens.length > 0).sum()))
    after = engine.stats()
    drain(engine, handles)
    counted = [i for i in range(len(handles)) if times[i] >= counted_from]
    # From when a request was due: a request waits for the step that runs while it arrives.
    firsts = [(handles[i].result().timing.first_token_s, late[i]) for i in counted]
    gaps = percentiles(tokens.since(started + counted_from))
    return {
        "requests_per_s": rate, "load_s": load_s, "submitted": len(handles), "counted": len(counted),
        "without_first_token": sum(first is None for first, _ in firsts),
        "tokens_per_s": (after.new_tokens - before.new_tokens) / load_s,
        "mean_running": float(np.mean(running)) if running else 0.0,
        "preemptions": after.preemptions - before.preemptions,
        "first_token_ms": percentiles(np.array([first + due for first, due in firsts if first is not None])),
        "between_tokens_ms": gaps,
        "p99_over_median": None if gaps is None else gaps["p99"] / gaps["p50"],
    }  # fmt: skip
