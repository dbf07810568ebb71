"""Prometheus metrics of an engine and of what clients see."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..engine import Engine, EngineStats, RequestHandle

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

GAUGES: dict[str, tuple[str, str]] = {
    "requests_running": ("running", "Requests that run."),
    "requests_waiting": ("waiting", "Requests that wait for a slot."),
    "waiting_tokens": ("waiting_tokens", "Prompt tokens of requests in the queue."),
    "sequences": ("rows", "Sequences in slots."),
    "pages": ("pages_total", "Pages of the cache."),
    "pages_used": ("pages_used", "Pages with an owner, the prefix cache included."),
    "pages_cached": ("pages_cached", "Pages that the prefix cache alone holds."),
    "prefix_hit_rate": ("prefix_hit_rate", "The part of prompt tokens that was found in the prefix cache."),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "steps": ("steps", "Steps."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens that were computed."),
    "generated_tokens": ("new_tokens", "New tokens."),
    "preemptions": ("preemptions", "Requests that lost their pages."),
}


class _EngineCollector:
    """Reads the engine's statistics when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        stats: EngineStats = self._engine.stats()
        for name, (field, text) in GAUGES.items():
            yield GaugeMetricFamily(f"hf_paged_{name}", text, value=getattr(stats, field))
        for name, (field, text) in COUNTERS.items():
            yield CounterMetricFamily(f"hf_paged_{name}", text, value=getattr(stats, field))
        ended = CounterMetricFamily("hf_paged_requests", "Requests that have ended.", labels=["finish_reason"])
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended
        healthy = self._engine.health().is_serving
        yield GaugeMetricFamily("hf_paged_serving", "1 while the engine takes requests.", value=int(healthy))


class Metrics:
    """Metrics of one server.

    Args:
        engine: that is served.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))  # type: ignore[arg-type]

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"hf_paged_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        self._queue = histogram("queue", "From submit until a request first ran.")
        self._first = histogram("time_to_first_token", "From submit to the first token.")
        self._between = histogram("time_between_tokens", "Mean time between the tokens of a request.")
        self._total = histogram("request", "From submit to the end.")
        self._refused = Counter(
            "hf_paged_requests_refused", "Requests that were not taken.", ["reason"], registry=self.registry
        )
        self._server: Any = None

    def refused(self, reason: str) -> None:
        """A request was not taken: "invalid", "queue_full" or "closed"."""
        self._refused.labels(reason).inc()

    def ended(self, handle: RequestHandle) -> None:
        """A request's client has what it gets."""
        if not handle.is_done:
            return
        output = handle.result()
        timing, num_tokens = output.timing, max(len(sequence.token_ids) for sequence in output.sequences)
        self._total.observe(timing.total_s)
        if timing.queued_s is not None:
            self._queue.observe(timing.queued_s)
        if timing.first_token_s is not None:
            self._first.observe(timing.first_token_s)
            if num_tokens > 1:
                self._between.observe((timing.total_s - timing.first_token_s) / (num_tokens - 1))

    def listen(self, port: int) -> int:
        """Answer Prometheus on loopback; returns the port."""
        self._server, _ = start_http_server(port, "127.0.0.1", registry=self.registry)
        return self._server.server_port

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
