"""What the server counts, for Prometheus. Knows numbers, no HTTP; lives on the event loop alone, so it needs no locks.

Everything is a plain number until somebody asks: prometheus_client writes the text. Names are ours, and vLLM's for the
three figures that autoscalers and gateways look for.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kiloq.engine import Usage
from kiloq.engine.events import EngineStats, FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # seconds
_BETWEEN_TOKENS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Histogram:
    """How many values fell into each bucket; `bounds` are their upper ends."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        buckets: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


class Metrics(Collector):
    """One server's numbers. `stats` and `is_healthy` tell of its engine when they are asked."""

    def __init__(self, stats: Callable[[], EngineStats], is_healthy: Callable[[], bool]) -> None:
        self._stats = stats
        self._is_healthy = is_healthy
        self._http: Counter[tuple[str, ...]] = Counter()
        self._ended: Counter[tuple[str, ...]] = Counter()
        self._prompt_tokens = self._cached_tokens = self._refused = self._timed_out = 0
        self._first_token, self._between_tokens = Histogram(_FIRST_TOKEN), Histogram(_BETWEEN_TOKENS)
        self._queue, self._whole = Histogram(_FIRST_TOKEN), Histogram(_WHOLE)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def http(self, endpoint: str, status: int) -> None:
        """A request was answered. `endpoint` is a route's pattern, never a path that a client made up."""
        self._http[endpoint, str(status)] += 1

    def refused(self) -> None:
        """A request found no room."""
        self._refused += 1

    def timed_out(self) -> None:
        """A request took longer than it may."""
        self._timed_out += 1

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self._first_token.add(seconds)

    def tokens(self, gaps: Mapping[float, int]) -> None:
        """One step's tokens: how many came how long after the one before them. Most steps have one gap for all."""
        for seconds, count in gaps.items():
            self._between_tokens.add(seconds, count)

    def ended(self, reason: FinishReason, usage: Usage, seconds: float | None) -> None:
        """A request's last event; `seconds` since it came, None if nobody waits for it any more."""
        self._ended[(reason,)] += 1
        self._prompt_tokens += usage.prompt_tokens
        self._cached_tokens += usage.cached_tokens
        self._queue.add(usage.queue_seconds)
        if seconds is not None:
            self._whole.add(seconds)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        stats = self._stats()
        used = stats.blocks - stats.blocks_available
        yield _labelled("kiloq_http_requests", "Answered requests", ("endpoint", "status"), self._http)
        yield _labelled("kiloq_requests_ended", "Generations that ended, by reason", ("reason",), self._ended)
        yield CounterMetricFamily("kiloq_requests_refused", "Generations refused: queue full", self._refused)
        yield CounterMetricFamily("kiloq_requests_timed_out", "Generations cut by the time limit", self._timed_out)
        yield GaugeMetricFamily("kiloq_healthy", "1 if the engine answers", float(self._is_healthy()))
        for name in ("kiloq_sequences_running", "vllm:num_requests_running"):
            yield GaugeMetricFamily(name, "Answers in the making", stats.running)
        for name in ("kiloq_sequences_waiting", "vllm:num_requests_waiting"):
            yield GaugeMetricFamily(name, "Answers that wait for room", stats.waiting)
        yield CounterMetricFamily("kiloq_prompt_tokens", "Tokens of the prompts of ended requests", self._prompt_tokens)
        yield CounterMetricFamily("kiloq_cached_tokens", "Of those, found computed in the cache", self._cached_tokens)
        yield CounterMetricFamily("kiloq_computed_tokens", "Tokens through the model", stats.computed_tokens)
        yield CounterMetricFamily("kiloq_generated_tokens", "Tokens drawn", stats.generated_tokens)
        yield CounterMetricFamily("kiloq_guessed_tokens", "Tokens guessed by speculation", stats.guessed)
        yield CounterMetricFamily("kiloq_guessed_right_tokens", "Of those, right", stats.guessed_right)
        yield CounterMetricFamily("kiloq_preemptions", "Sequences that gave up their cache", stats.preempted)
        yield CounterMetricFamily("kiloq_engine_steps", "Steps of the engine", stats.steps)
        yield GaugeMetricFamily("kiloq_cache_blocks", "Blocks of the cache", stats.blocks)
        yield GaugeMetricFamily("kiloq_cache_blocks_used", "Blocks that running answers hold", used)
        yield GaugeMetricFamily("kiloq_cache_blocks_kept", "Free blocks kept for their prefix", stats.blocks_cached)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the cache in use, 0 to 1", used / stats.blocks)
        yield self._first_token.family("kiloq_time_to_first_token_seconds", "From the request to its first token")
        yield self._between_tokens.family("kiloq_inter_token_seconds", "Between two tokens of an answer")
        yield self._queue.family("kiloq_queue_seconds", "From the request to its first step")
        yield self._whole.family("kiloq_request_seconds", "From the request to its last token")


def _labelled(
    name: str, text: str, labels: Sequence[str], counts: Mapping[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, count in counts.items():
        family.add_metric(key, count)
    return family
