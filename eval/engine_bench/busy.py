"""How busy the device is while the engine decodes, from a profile of some steps; figures only.

* ``busy``: the time in which a kernel, copy or fill runs, of a step in the profile, over the time of a step without the
  profiler, which itself lengthens steps. As many steps before the profile as behind it are timed for that, so contexts
  are as long on average.

Two more shares, of the wall time inside the profile, from a few steps behind its start to its last kernel:

* ``kernels``: at least one kernel, copy or fill is running.
* ``queued``: the same, with gaps up to :data:`DISPATCH_US` counted as busy: the device takes about a microsecond from
  one kernel to the next that depends on it, also inside a captured graph and however far ahead the host is. What is
  left are gaps in which the device had no work.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import hf_paged
from eval.engine_bench.parts import Deadline, Sizes, all_decoding, synchronize, timed_steps

DISPATCH_US = 3.0
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
NUM_KERNELS = 15
NUM_GAPS = 10
STARTING = 3
"""Steps at the start of a profile, in which the host gets ahead again, that the shares of wall time leave out."""
NAME_LENGTH = 90

Event = tuple[str, float, float]
"""Name, start and end in microseconds."""


def busy(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """Shares, kernels and gaps of greedy decode steps of all requests.

    Raises:
        RuntimeError: no CUDA device was seen by the profiler.
    """
    deadline, steps = Deadline(limit_s), sizes.profile_steps
    with all_decoding(engine, sizes, 3 * steps, deadline):
        before_ms, done = timed_steps(engine, steps, max(0.5, deadline.left_s / 2))
        with profiled() as found:
            started = time.perf_counter()
            for _ in range(steps):
                engine.step()
            synchronize()
            profiled_ms = (time.perf_counter() - started) * 1e3 / steps
        after_ms, done_after = timed_steps(engine, steps, max(0.5, deadline.left_s / 2))
    step_ms = (before_ms + after_ms) / 2
    kernel_ms = summarize(found.events)["kernel_ms"] / steps
    steady = summarize(found.events, skip_us=min(STARTING, steps // 2) * profiled_ms * 1e3)
    return steady | {
        "running": sizes.num_requests, "steps": steps, "busy": kernel_ms / step_ms, "kernel_ms": kernel_ms,
        "step_ms": step_ms, "profiled_ms": profiled_ms, "cut": min(done, done_after) < steps,
    }  # fmt: skip


class profiled:
    """Profiles the device meanwhile; ``events`` has its kernels, copies and fills, in the order of their starts."""

    events: list[Event]

    def __enter__(self) -> "profiled":
        activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
        synchronize()
        self._profile = profile(activities=activities)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        synchronize()
        self._profile.__exit__(*exception)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            self.events = read_events(json.loads(path.read_text(encoding="utf-8")))


def read_events(trace: dict[str, Any]) -> list[Event]:
    """What ran on the device, from a Chrome trace of torch's profiler."""
    events = [
        (event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE
    ]
    return sorted(events, key=lambda event: event[1])


def summarize(events: Sequence[Event], skip_us: float = 0.0) -> dict[str, Any]:
    """Shares of wall time, kernels by their time and the largest gaps, from events in the order of their starts.

    A kernel's time is what it adds, from the end of all that started before it: one that starts early waits first.

    Args:
        events: of :func:`read_events`.
        skip_us: microseconds from the first event on that are left out.

    Raises:
        RuntimeError: there are none.
    """
    events = [event for event in events if event[1] >= events[0][1] + skip_us]
    if not events:
        raise RuntimeError("the profiler saw nothing on the device: a busy share needs a CUDA GPU.")
    first, reached = events[0][1], events[0][1]
    running, gaps = 0.0, []
    totals: dict[str, tuple[float, int]] = {}
    for name, start, end in events:
        if start > reached:
            gaps.append((start - reached, start - first, name))
            reached = start
        added = max(0.0, end - reached)
        running += added
        reached = max(reached, end)
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + added, count + 1
    wall = max(reached - first, 1e-9)
    short = sum(gap for gap, _, _ in gaps if gap <= DISPATCH_US)
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:NUM_KERNELS]
    return {
        "kernels": running / wall, "queued": (running + short) / wall, "dispatch_us": DISPATCH_US,
        "wall_ms": wall / 1e3, "kernel_ms": running / 1e3, "num_events": len(events),
        "top_kernels": [
            {"name": name[:NAME_LENGTH], "count": count, "mean_us": total / count, "share": total / wall}
            for name, (total, count) in ranked
        ],
        "largest_gaps": [
            {"us": gap, "at_ms": at / 1e3, "before": name[:NAME_LENGTH]}
            for gap, at, name in sorted(gaps, reverse=True)[:NUM_GAPS]
        ],
    }  # fmt: skip
