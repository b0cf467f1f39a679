"""OpenTelemetry spans per hop, joined across processes by W3C's trace context.

In: names, attributes, and the `traceparent` of a caller or of the hop before. Out: spans to an OTLP endpoint over
HTTP (`OTEL_EXPORTER_OTLP_HEADERS` gives it a token), or nothing at all. A span may be opened inside an async generator
whose steps run in different tasks: which span is open is kept in a context variable of our own, since
OpenTelemetry's complains when a token comes back in another context. The process's global tracer is left alone.
Not covered: `tracestate` and baggage, which are not passed on; metrics (serving/telemetry.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from serving.interfaces import SpanContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

Attribute = str | int | float | bool

_open: ContextVar[str] = ContextVar("rayft_traceparent", default="")
CLOSE_MS = 2000


class _NoSpan:
    """Where nothing is traced."""

    traceparent = ""

    def __enter__(self) -> SpanContext:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def set(self, **attributes: Attribute) -> None:
        return None

    def content(self, **texts: str) -> None:
        return None


NO_SPAN: SpanContext = _NoSpan()


class Tracer:
    """Makes spans."""

    def __init__(self, processor: SpanProcessor, deployment: str, *, content: bool = False) -> None:
        """`processor` takes the finished spans; `content` records the user's text, too."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "rayft", "rayft.deployment": deployment})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("rayft")
        self._content = content

    def span(self, name: str, parent: str, attributes: Mapping[str, Attribute]) -> SpanContext:
        """A span that opens where its `with` block begins; without `parent`, below the one that is open there."""
        return _OpenSpan(self._tracer, name, parent, attributes, self._content)

    def close(self) -> None:
        """Sends what is not sent yet, for at most two seconds."""
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()


class _OpenSpan:
    def __init__(self, tracer: Any, name: str, parent: str, attributes: Mapping[str, Attribute], content: bool) -> None:
        self._tracer, self._name, self._parent = tracer, name, parent
        self._attributes = _named(attributes)
        self._content = content
        self._span: Span | None = None
        self._outer = ""
        self._token: Token[str] | None = None

    def __enter__(self) -> SpanContext:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._outer = _open.get()
        outer = self._parent or self._outer
        context = TraceContextTextMapPropagator().extract({"traceparent": outer}) if outer else None
        # An empty context, not the process's current one: Ray's own tracing may have a span open there.
        from opentelemetry.context import Context

        self._span = self._tracer.start_span(self._name, context=context or Context(), attributes=self._attributes)
        self._token = _open.set(self.traceparent)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._span is not None and self._token is not None, "a span is closed once, after it was opened"
        try:
            _open.reset(self._token)
        except ValueError:  # opened by another task's step of an async generator, whose context ends with that task
            _open.set(self._outer)
        self._mark(exception[0] if exception else None)
        self._span.end()

    def _mark(self, kind: object) -> None:
        from opentelemetry.trace import StatusCode

        assert self._span is not None, "opened"
        if not isinstance(kind, type):
            return
        if issubclass(kind, asyncio.CancelledError | GeneratorExit):
            self._span.set_attribute("rayft.cancelled", True)
        else:  # the type alone: a message may hold the user's text
            self._span.set_attribute("error.type", kind.__name__)
            self._span.set_status(StatusCode.ERROR)

    @property
    def traceparent(self) -> str:
        if self._span is None:
            return ""
        found = self._span.get_span_context()
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"

    def set(self, **attributes: Attribute) -> None:
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def content(self, **texts: str) -> None:
        if self._content:
            self.set(**{f"content_{name}": text for name, text in texts.items()})


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"rayft.{name}": value for name, value in attributes.items()}


def open_tracer(endpoint: str, deployment: str, *, content: bool) -> Tracer:
    """A tracer that sends to an OTLP endpoint (`http://collector:4318`) over HTTP.

    Raises:
        UserError: The endpoint is no URL, or the extra `traces` is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"telemetry.traces is {endpoint!r}: give the collector's HTTP address, http://HOST:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UserError("telemetry.traces needs OpenTelemetry's exporter: pip install 'rayft[traces]'") from None
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(endpoint=url if url.endswith("/v1/traces") else f"{url}/v1/traces")
    return Tracer(BatchSpanProcessor(exporter), deployment, content=content)
