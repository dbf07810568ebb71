"""What the engine did: its statistics; and step by step, a Chrome trace, a CSV, or a picture."""

import csv
import json
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

KINDS = (".json", ".csv", ".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds and has done.

    Attributes:
        running, waiting: requests.
        waiting_tokens: prompt tokens of the requests in the queue, as of the last step.
        rows: sequences in slots.
        pages_total, pages_used, pages_cached, pages_free: over all groups of layers; cached pages are those in use by
            the prefix cache alone.
        steps, prompt_tokens, new_tokens: since the start; prompt tokens without those found in the prefix cache.
        tokens_per_s: new tokens per second of stepping.
        prefix_hit_rate: the part of the prompts' tokens that was found in the prefix cache.
        preemptions: requests that lost their pages, by recomputing and by swapping.
        recomputed, swapped: the same, apart.
        finished: requests that have ended, by finish reason.
    """

    running: int
    waiting: int
    waiting_tokens: int
    rows: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    steps: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    prefix_hit_rate: float
    preemptions: int
    recomputed: int
    swapped: int
    finished: dict[str, int]


class Seen(NamedTuple):
    """Counts as of the end of a step; ``pages``: those in all, in use, and held by the prefix cache alone, of each
    group of layers."""

    running: int
    queued: int
    queued_tokens: int
    rows: int
    steps: int
    prompt_tokens: int
    new_tokens: int
    busy_s: float
    prefix_tokens: int
    asked_tokens: int
    recomputed: int
    swapped: int
    finished: dict[str, int]
    pages: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Counters:
    """Counts since the engine started, for :class:`EngineStats`."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    busy_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)

    def snapshot(self, core: Any) -> Seen:
        """What :func:`engine_stats` is made of, as of now: it is taken after every step."""
        counts, queue = core.scheduler.counts, core.scheduler.waiting
        return Seen(
            len(core.scheduler.running), len(queue), queue.num_tokens, core.slots.num_used, self.steps,
            self.prompt_tokens, self.new_tokens, self.busy_s, counts.prefix_tokens, counts.prompt_tokens,
            counts.recomputed, counts.swapped, self.finished,
            tuple((a.num_pages, a.num_used, a.num_kept_alone) for a in core.allocators),
        )  # fmt: skip


def engine_stats(seen: Seen, num_unfinished: int) -> EngineStats:
    """The statistics of a snapshot, while so many requests have not ended."""
    total, used, cached = (sum(counts) for counts in zip(*seen.pages))
    return EngineStats(
        running=seen.running,
        waiting=max(0, num_unfinished - seen.running),
        waiting_tokens=seen.queued_tokens,
        rows=seen.rows,
        pages_total=total,
        pages_used=used,
        pages_cached=cached,
        pages_free=total - used,
        steps=seen.steps,
        prompt_tokens=seen.prompt_tokens,
        new_tokens=seen.new_tokens,
        tokens_per_s=seen.new_tokens / seen.busy_s if seen.busy_s else 0.0,
        prefix_hit_rate=seen.prefix_tokens / seen.asked_tokens if seen.asked_tokens else 0.0,
        preemptions=seen.recomputed + seen.swapped,
        recomputed=seen.recomputed,
        swapped=seen.swapped,
        finished=dict(seen.finished),
    )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Attributes:
        start_s: seconds since the engine started.
        duration_s: of the whole step.
        forward_s: of its forward, as far as the host waited for it.
        num_rows: rows of the step.
        num_decode: of these, rows that computed one token.
        num_tokens: tokens computed.
        running: requests that ran.
        waiting: requests in the queue.
        pages_used: pages with an owner, over all groups of layers.
        preemptions: since the engine started.
    """

    start_s: float
    duration_s: float
    forward_s: float
    num_rows: int
    num_decode: int
    num_tokens: int
    running: int
    waiting: int
    pages_used: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that has ended; seconds since the engine started."""

    request_id: str
    submitted_s: float
    started_s: float | None
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    preemptions: int


class Trace:
    """The last steps and requests of an engine.

    Args:
        max_steps: how many of each are remembered.
        start: the clock's time that counts as 0.
    """

    def __init__(self, max_steps: int, start: float) -> None:
        self.start = start
        self.steps: deque[StepRecord] = deque(maxlen=max_steps)
        self.requests: deque[RequestRecord] = deque(maxlen=max_steps)

    def write(self, path: str | Path) -> Path:
        """Write ``.json`` (Chrome trace: chrome://tracing, Perfetto), ``.csv`` (steps), or a picture (matplotlib).

        Raises:
            ValueError: the path ends in none of these.
            ImportError: a picture without matplotlib (the extra "eval").
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}), encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [column.name for column in fields(StepRecord)])
                writer.writeheader()
                writer.writerows(asdict(step) for step in self.steps)
        elif path.suffix in KINDS:
            self._draw(path)
        else:
            raise ValueError(f"path must end in one of {', '.join(KINDS)}, got {str(path)!r}.")
        return path

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events: process 1 has the steps and counters, process 2 one track for each request."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "steps"}},
            {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "requests"}},
        ]
        for step in self.steps:
            name = "decode" if step.num_decode == step.num_rows else "mixed" if step.num_decode else "prefill"
            at = step.start_s * 1e6
            args = {key: value for key, value in asdict(step).items() if not key.endswith("_s")}
            events.append(
                {"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": at, "dur": step.duration_s * 1e6, "args": args}
            )
            for counter in ("running", "waiting", "pages_used", "num_tokens"):
                events.append({"ph": "C", "name": counter, "pid": 1, "ts": at, "args": {counter: args[counter]}})
        for track, request in enumerate(self.requests):
            parts: list[tuple[str, float | None, float | None]] = [
                ("queued", request.submitted_s, request.started_s),
                ("prompt", request.started_s, request.first_token_s),
                ("tokens", request.first_token_s, request.finished_s),
            ]
            for name, first, last in parts:
                if first is not None:
                    last = request.finished_s if last is None else last
                    events.append(
                        {"ph": "X", "name": f"{request.request_id} {name}", "pid": 2, "tid": track, "ts": first * 1e6,
                         "dur": (last - first) * 1e6, "args": asdict(request)}
                    )  # fmt: skip
        return events

    def _draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (bars, rows, pages) = plt.subplots(
            3, 1, figsize=(10, 8), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
        )
        colours = ("#c8c8c8", "#f2a65a", "#3a7ca5")
        for track, request in enumerate(sorted(self.requests, key=lambda r: r.submitted_s)):
            ends = (request.submitted_s, request.started_s, request.first_token_s, request.finished_s)
            for colour, first, last in zip(colours, ends, ends[1:]):
                if first is not None:
                    last = request.finished_s if last is None else last
                    bars.barh(track, last - first, left=first, height=0.9, color=colour)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
        bars.legend(handles, ("waits", "prompt", "new tokens"), loc="lower right")
        bars.set_ylabel("requests, as they came")
        times = [step.start_s for step in self.steps]
        rows.step(times, [step.num_rows for step in self.steps], where="post", color=colours[2], label="rows")
        rows.step(times, [step.waiting for step in self.steps], where="post", color=colours[0], label="waiting")
        rows.legend(loc="upper right")
        rows.set_ylabel("a step")
        pages.step(times, [step.pages_used for step in self.steps], where="post", color=colours[2])
        pages.set_ylabel("pages in use")
        pages.set_xlabel("seconds")
        figure.savefig(path, dpi=120)
        plt.close(figure)
