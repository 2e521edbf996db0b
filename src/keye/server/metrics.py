"""Metrics for Prometheus, named by its rules. No label holds anything that a user wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keye.engine.request import Delta, Event, Finished

_SECONDS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


_HELP: Final = {
    "requests_waiting": "Requests that wait for their media or for memory",
    "requests_running": "Requests that are computed",
    "computed_prompt_tokens_total": "Tokens of prompts computed, also of aborted requests",
    "computed_reply_tokens_total": "Tokens generated, also of aborted requests",
    "preemptions_total": "Requests that were preempted",
    "prefix_cache_hits_total": "Prompts whose beginning was computed before",
    "prefix_cache_queries_total": "Prompts whose beginning was looked for",
}


class _EngineGauges(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            counted = name.removesuffix("_total")
            kind = GaugeMetricFamily if counted == name else CounterMetricFamily
            help_text = _HELP.get(name) or counted.replace("_", " ").capitalize()
            yield kind(f"keye_{counted}", help_text, value=value)


class Metrics:
    """The counters of one server."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        disable_created_metrics()
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineGauges(gauges))

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"keye_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"keye_{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("request", "Requests by how they ended", ["outcome"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.media_tokens = counter("media_tokens", "Visual tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts not computed again")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token")
        self.between_tokens = histogram("inter_token_latency_seconds", "Between tokens of one reply")
        self.request_seconds = histogram("e2e_request_latency_seconds", "From request to end")
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.active = Gauge("keye_num_requests_active", "Requests being served", registry=registry)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)


class RequestWatch:
    """One request's share of the metrics from now on. `see` takes every event, `end` how it ended."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start, self._ended = metrics, time.perf_counter(), False
        self._last: dict[int, float] = {}
        metrics.active.inc()

    def see(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Delta) and event.tokens:
            if not self._last:
                self._metrics.first_token.observe(now - self._start)
            elif event.choice_index in self._last:
                self._metrics.between_tokens.observe(now - self._last[event.choice_index])
            self._last[event.choice_index] = now
            self._metrics.generation_tokens.inc(len(event.tokens))
        elif isinstance(event, Finished):
            self._metrics.prompt_tokens.inc(event.prompt_tokens)
            self._metrics.media_tokens.inc(event.media_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)
            self._metrics.prompt_length.observe(event.prompt_tokens)
            self.end("finished")

    def end(self, outcome: str) -> None:
        """`outcome` is "finished", "refused", "failed" or "cancelled"; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.active.dec()
        self._metrics.requests.labels(outcome).inc()
        self._metrics.request_seconds.observe(time.perf_counter() - self._start)
