"""What operators see: Prometheus metrics on Ray's own metrics endpoint, and OpenTelemetry spans.

In: what ingress and the replicas report through the `Observer` protocol. Out: the metrics of `METRICS`, which Ray
exports with the prefix `ray_` and Serve's labels (deployment, replica, application); spans to the OTLP endpoint of
`telemetry.traces`. Labels take few values: strategies, outcomes and events that this program knows, never a tenant, a
user or a question. Nothing here raises or waits; spans leave in batches on a thread of their own.
The user's text is in no metric and, without `telemetry.trace_content`, in no span.
Not covered: where things are measured (serving/api.py, serving/conversation.py), the dashboard
(cluster/grafana/rayft.json).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serving.config import TelemetryConfig
from serving.interfaces import SpanContext, Took
from serving.strategies import AUTO, HYBRID, STRATEGIES
from serving.tracing import NO_SPAN, Attribute, Tracer, open_tracer

logger = logging.getLogger(__name__)

OTHER = "other"
MOST_VALUES = 64
"""Values of a label that is not from a fixed list; what comes after them counts as `other`."""

# From a GPU (5 ms to the first token) to a small CPU (SmolLM2 on 2 shared cores: seconds), in steps of about 2.
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SEARCH_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True)
class Metric:
    """One metric; Ray exports it as `ray_` and its name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Metric("rayft_requests_total", "counter", "Requests that have ended.", ("strategy", "outcome"))
REQUEST_S = Metric("rayft_request_seconds", "histogram", "From the request to its end.", ("strategy",), _LATENCY_S)
FIRST_TOKEN_S = Metric(
    "rayft_first_token_seconds", "histogram", "From the request to a stream's first text.", ("strategy",), _LATENCY_S
)
OUTPUT_TOKEN_S = Metric(
    "rayft_output_token_seconds",
    "histogram",
    "Generation time per token of the completion, the prompt's share included.",
    ("strategy",),
    _TOKEN_S,
)
QUEUE_S = Metric("rayft_queue_seconds", "histogram", "Waiting for the engine.", ("strategy",), _LATENCY_S)
RETRIEVAL_S = Metric("rayft_retrieval_seconds", "histogram", "Searching, both ways of the hop included.", (), _SEARCH_S)
GENERATION_S = Metric("rayft_generation_seconds", "histogram", "Generating an answer.", ("strategy",), _LATENCY_S)
TOKENS = Metric("rayft_tokens_total", "counter", "Tokens: prompt, completion, cached (of the prompt).", ("kind",))
QUOTES = Metric("rayft_quotes_total", "counter", "Quotes in answers.", ("strategy",))
QUOTES_VERIFIED = Metric("rayft_quotes_verified_total", "counter", "Quotes found in a passage shown.", ("strategy",))
IN_FLIGHT = Metric("rayft_requests_in_flight", "gauge", "Requests under way in an ingress replica.")
EVENTS = Metric("rayft_events_total", "counter", "Retries, broken streams, refusals, releases taken up.", ("event",))

METRICS = (
    REQUESTS,
    REQUEST_S,
    FIRST_TOKEN_S,
    OUTPUT_TOKEN_S,
    QUEUE_S,
    RETRIEVAL_S,
    GENERATION_S,
    TOKENS,
    QUOTES,
    QUOTES_VERIFIED,
    IN_FLIGHT,
    EVENTS,
)


class Registry(Protocol):
    """Makes metrics: the module `ray.serve.metrics`."""

    Counter: Callable[..., Any]
    Gauge: Callable[..., Any]
    Histogram: Callable[..., Any]


class Metrics:
    """The metrics of one replica."""

    def __init__(self, registry: Registry) -> None:
        """Makes every metric, so that each is known by name before its first value."""
        self._made = {metric.name: _make(metric, registry) for metric in METRICS}
        self._known: dict[str, set[str]] = {}

    def inc(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Adds to a counter; nothing where `amount` is 0."""
        if amount > 0:
            self._made[metric.name].inc(amount, tags=self._bounded(labels))

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""
        self._made[metric.name].observe(max(0.0, value), tags=self._bounded(labels))

    def set(self, metric: Metric, value: float) -> None:
        """Sets a gauge."""
        self._made[metric.name].set(value)

    def _bounded(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {name: self._bounded_value(name, value) for name, value in labels.items()}

    def _bounded_value(self, name: str, value: str) -> str:
        if name == "strategy":
            return value if value in STRATEGIES or value in (HYBRID, AUTO) else OTHER
        known = self._known.setdefault(name, set())
        if value not in known:
            if len(known) >= MOST_VALUES or not (value.isidentifier() and len(value) <= 40):
                return OTHER
            known.add(value)
        return value


def _make(metric: Metric, registry: Registry) -> Any:
    if metric.kind == "counter":
        return registry.Counter(metric.name, description=metric.description, tag_keys=metric.labels)
    if metric.kind == "gauge":
        return registry.Gauge(metric.name, description=metric.description, tag_keys=metric.labels)
    return registry.Histogram(
        metric.name, description=metric.description, boundaries=list(metric.buckets), tag_keys=metric.labels
    )


class Telemetry:
    """The `Observer` of a replica: metrics, spans, both or neither."""

    def __init__(self, metrics: Metrics | None = None, tracer: Tracer | None = None) -> None:
        """None leaves that part out; without both it does nothing."""
        self._metrics = metrics
        self._tracer = tracer
        self._complained = False

    def request(self, *, strategy: str, outcome: str, seconds: float) -> None:
        """A request has ended."""
        self._tell(lambda to: to.inc(REQUESTS, strategy=strategy, outcome=outcome))
        self._tell(lambda to: to.observe(REQUEST_S, seconds, strategy=strategy))

    def first_token(self, *, strategy: str, seconds: float) -> None:
        """A stream's first piece of text was sent."""
        self._tell(lambda to: to.observe(FIRST_TOKEN_S, seconds, strategy=strategy))

    def answer(self, took: Took) -> None:
        """What an answer took."""
        strategy = took.strategy

        def tell(to: Metrics) -> None:
            if took.retrieval_s > 0:  # strategies that do not retrieve report 0
                to.observe(RETRIEVAL_S, took.retrieval_s)
            to.observe(QUEUE_S, took.queue_s, strategy=strategy)
            to.observe(GENERATION_S, took.generation_s, strategy=strategy)
            if took.completion_tokens > 0:
                to.observe(OUTPUT_TOKEN_S, took.generation_s / took.completion_tokens, strategy=strategy)
            to.inc(TOKENS, took.prompt_tokens, kind="prompt")
            to.inc(TOKENS, took.completion_tokens, kind="completion")
            to.inc(TOKENS, took.cached_tokens, kind="cached")
            to.inc(QUOTES, took.quotes, strategy=strategy)
            to.inc(QUOTES_VERIFIED, took.verified, strategy=strategy)

        self._tell(tell)

    def in_flight(self, requests: int) -> None:
        """Requests under way now."""
        self._tell(lambda to: to.set(IN_FLIGHT, requests))

    def count(self, event: str) -> None:
        """Something to watch happened."""
        self._tell(lambda to: to.inc(EVENTS, event=event))

    def span(self, name: str, parent: str = "", **attributes: Attribute) -> SpanContext:
        """A span around a request or a hop."""
        return NO_SPAN if self._tracer is None else self._tracer.span(name, parent, attributes)

    def close(self) -> None:
        """Sends the spans that are not sent yet; on shutdown."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.close()

    def _tell(self, tell: Callable[[Metrics], None]) -> None:
        if self._metrics is None:
            return
        try:
            tell(self._metrics)
        except Exception as error:  # noqa: BLE001 - an answer matters more than its measurement; said once, not per request
            if not self._complained:
                self._complained = True
                logger.warning("metrics fail: %s", type(error).__name__)


class SilentObserver(Telemetry):
    """Neither metrics nor spans, for tests and `telemetry.metrics: false`."""

    def __init__(self) -> None:
        """Nothing to set up."""
        super().__init__()


def make_observer(config: TelemetryConfig, deployment: str = "ingress") -> Telemetry:
    """The observer of a replica; called on it.

    Raises:
        UserError: `telemetry.traces` is no URL, or the extra `traces` is not installed.
    """
    metrics = None
    if config.metrics:
        from ray.serve import metrics as registry

        metrics = Metrics(registry)
    tracer = open_tracer(config.traces, deployment, content=config.trace_content) if config.traces else None
    return Telemetry(metrics, tracer)
