import asyncio
import dataclasses
import json
import re
import time
import urllib.request
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.config import RayConfig
from cluster.errors import UserError
from cluster.session import ray_session
from serving.config import TelemetryConfig
from serving.interfaces import Took
from serving.telemetry import METRICS, MOST_VALUES, Metrics, SilentObserver, Telemetry, make_observer
from serving.tracing import NO_SPAN, Tracer

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "rayft.json"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ANSWER = Took(
    strategy="raft",
    retrieval_s=0.02,
    queue_s=0.1,
    generation_s=2.0,
    prompt_tokens=300,
    completion_tokens=40,
    verified=2,
    quotes=3,
    cached_tokens=120,
)


class Registry:
    """Stands in for `ray.serve.metrics`: keeps what is recorded, and is as strict about labels."""

    def __init__(self):
        self.values = {}

    def _metric(self, name, tag_keys, add):
        def record(value=1, tags=None):
            assert set(tags or {}) == set(tag_keys), f"{name} has the labels {tag_keys}"
            key = (name, *sorted((tags or {}).items()))
            self.values[key] = add(self.values.get(key), value)

        return record

    def Counter(self, name, description, tag_keys):  # noqa: N802 - Ray's name
        record = self._metric(name, tag_keys, lambda before, value: (before or 0) + value)
        return type("Counter", (), {"inc": staticmethod(record)})

    def Gauge(self, name, description, tag_keys):  # noqa: N802 - Ray's name
        return type("Gauge", (), {"set": staticmethod(self._metric(name, tag_keys, lambda _, value: value))})

    def Histogram(self, name, description, boundaries, tag_keys):  # noqa: N802 - Ray's name
        assert boundaries == sorted(set(boundaries)) and boundaries[0] > 0
        record = self._metric(name, tag_keys, lambda before, value: [*(before or []), value])
        return type("Histogram", (), {"observe": staticmethod(record)})


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def observer(registry):
    return Telemetry(Metrics(registry))


def test_an_answer_is_counted_in_every_metric_that_it_touches(observer, registry):
    observer.answer(ANSWER)
    observer.answer(ANSWER)
    raft = ("strategy", "raft")
    assert registry.values == {
        ("rayft_retrieval_seconds",): [0.02, 0.02],
        ("rayft_queue_seconds", raft): [0.1, 0.1],
        ("rayft_generation_seconds", raft): [2.0, 2.0],
        ("rayft_output_token_seconds", raft): [0.05, 0.05],
        ("rayft_tokens_total", ("kind", "prompt")): 600,
        ("rayft_tokens_total", ("kind", "completion")): 80,
        ("rayft_tokens_total", ("kind", "cached")): 240,
        ("rayft_quotes_total", raft): 6,
        ("rayft_quotes_verified_total", raft): 4,
    }


def test_an_answer_without_retrieval_tokens_or_quotes_adds_none(observer, registry):
    nothing = {"retrieval_s": 0.0, "completion_tokens": 0, "quotes": 0, "verified": 0, "cached_tokens": 0}
    observer.answer(dataclasses.replace(ANSWER, **nothing))
    names = {name for name, *_ in registry.values}
    assert names == {"rayft_queue_seconds", "rayft_generation_seconds", "rayft_tokens_total"}


def test_requests_events_and_load_are_counted(observer, registry):
    observer.request(strategy="auto", outcome="ok", seconds=1.5)
    observer.request(strategy="auto", outcome="overloaded", seconds=0.0)
    observer.first_token(strategy="hybrid", seconds=0.7)
    observer.in_flight(3)
    observer.in_flight(1)
    observer.count("retried")
    auto = ("strategy", "auto")
    assert registry.values == {
        ("rayft_requests_total", ("outcome", "ok"), auto): 1,
        ("rayft_requests_total", ("outcome", "overloaded"), auto): 1,
        ("rayft_request_seconds", auto): [1.5, 0.0],
        ("rayft_first_token_seconds", ("strategy", "hybrid")): [0.7],
        ("rayft_requests_in_flight",): 1,
        ("rayft_events_total", ("event", "retried")): 1,
    }


def test_labels_stay_few_whatever_is_reported(observer, registry):
    for number in range(1000):
        observer.request(strategy=f"user {number}", outcome=f"code_{number}", seconds=0.1)
    observer.request(strategy="rag", outcome="Bearer rk-secret", seconds=0.1)
    labels = {key[1:] for key in registry.values if key[0] == "rayft_requests_total"}
    assert len(labels) == MOST_VALUES + 2
    assert (("outcome", "other"), ("strategy", "rag")) in labels, "an outcome that is no name"


def test_a_registry_that_fails_fails_no_request_and_is_said_once(registry, caplog):
    observer = Telemetry(Metrics(registry))
    observer._metrics._made.clear()
    for _ in range(3):
        observer.answer(ANSWER)
        observer.in_flight(1)
    assert [record.message for record in caplog.records] == ["metrics fail: KeyError"]


def test_a_silent_observer_does_nothing():
    observer = make_observer(TelemetryConfig(metrics=False))
    for each in (observer, SilentObserver()):
        each.answer(ANSWER)
        each.request(strategy="rag", outcome="ok", seconds=1)
        with each.span("request", parent=PARENT, k=1) as span:
            span.set(release="r")
            span.content(question="q")
            assert span is NO_SPAN and span.traceparent == ""
        each.close()


def test_metrics_are_scraped_from_rays_own_endpoint(monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    with ray_session(RayConfig(num_cpus=1)):
        import ray

        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        observer = make_observer(TelemetryConfig())
        observer.answer(ANSWER)
        observer.request(strategy="raft", outcome="ok", seconds=2.5)
        observer.first_token(strategy="raft", seconds=0.3)
        observer.in_flight(2)
        observer.count("retried")
        names = {f"ray_{metric.name}" for metric in METRICS}
        deadline = time.monotonic() + 30
        while True:
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            typed = {name for name in names if f"# TYPE {name} " in text}
            if typed == names or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    assert typed == names
    (verified,) = re.findall(r'^ray_rayft_quotes_verified_total\{.*strategy="raft".*\} (\S+)$', text, re.M)
    assert float(verified) == 2
    (count,) = re.findall(r'^ray_rayft_first_token_seconds_bucket\{.*le="0\.5".*\} (\S+)$', text, re.M)
    assert float(count) == 1


def expressions():
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]


def test_the_dashboard_names_only_metrics_and_labels_that_are_exported():
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    exported = {f"ray_{m.name}{s}": m for m in METRICS for s in suffixes.get(m.kind, ("",))}
    of_serve = {"deployment", "replica", "application"}
    used = set()
    for expression in expressions():
        named = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
        assert named, f"no metric in {expression}"
        for name, selector in named:
            assert name in exported, f"{name} is not exported"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            labels |= {word.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for word in by.split(",")}
            assert labels <= {*exported[name].labels, *of_serve, "le"}, f"{name} has no such label: {expression}"
            used.add(exported[name])
    assert used == set(METRICS), "what is exported is also shown"


def test_the_dashboards_panels_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)


# Spans.


@pytest.fixture
def spans():
    return InMemorySpanExporter()


def tracing(spans, *, content=False, deployment="ingress"):
    return Telemetry(tracer=Tracer(SimpleSpanProcessor(spans), deployment, content=content))


def ids(span):
    parent = f"{span.parent.span_id:016x}" if span.parent else None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", parent


def test_spans_of_one_request_are_one_trace_below_the_callers(spans):
    ingress, replica = tracing(spans), tracing(spans, deployment="generator")
    with ingress.span("request", parent=PARENT) as request:
        with ingress.span("route"):
            pass
        with ingress.span("generate", strategy="raft") as hop:
            sent = hop.traceparent
        request.set(strategy="raft", release="r1", prompt_tokens=12)
    with replica.span("engine", parent=sent):
        pass
    found = {span.name: span for span in spans.get_finished_spans()}
    trace, root, above = ids(found["request"])
    assert (trace, above) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
    assert ids(found["route"])[::2] == (trace, root)
    assert ids(found["generate"])[::2] == (trace, root)
    assert ids(found["engine"])[::2] == (trace, ids(found["generate"])[1])
    assert found["request"].attributes == {"rayft.strategy": "raft", "rayft.release": "r1", "rayft.prompt_tokens": 12}
    assert found["engine"].resource.attributes["rayft.deployment"] == "generator"


@pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"])
def test_without_a_valid_parent_a_new_trace_begins(spans, parent):
    observer = tracing(spans)
    for _ in range(2):
        with observer.span("request", parent=parent):
            pass
    first, second = spans.get_finished_spans()
    assert first.parent is None and first.context.trace_id != second.context.trace_id


def test_a_caller_that_does_not_sample_is_not_recorded_but_stays_connected(spans):
    observer = tracing(spans)
    with observer.span("request", parent=PARENT[:-2] + "00") as span:
        assert span.traceparent.startswith("00-4bf92f3577b34da6a3ce929d0e0e4736-") and span.traceparent.endswith("-00")
    assert not spans.get_finished_spans()


def test_a_failed_hop_names_the_error_and_not_what_it_says(spans):
    with pytest.raises(ValueError), tracing(spans).span("retrieve"):
        raise ValueError("the user's question")
    (span,) = spans.get_finished_spans()
    assert not span.status.is_ok and span.attributes == {"error.type": "ValueError"}
    assert "question" not in span.to_json()


def test_a_client_that_goes_away_is_no_error(spans):
    async def story():
        task = asyncio.create_task(hang())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def hang():
        with tracing(spans).span("generate"):
            await asyncio.sleep(60)

    asyncio.run(story())
    (span,) = spans.get_finished_spans()
    assert span.status.is_unset and span.attributes == {"rayft.cancelled": True}


@pytest.mark.parametrize(("content", "expected"), [(False, {}), (True, {"rayft.content_question": "Who is ill?"})])
def test_content_is_recorded_only_where_the_recipe_says_so(spans, content, expected):
    with tracing(spans, content=content).span("request") as span:
        span.content(question="Who is ill?")
    assert spans.get_finished_spans()[0].attributes == expected


def test_a_span_inside_a_generator_may_be_closed_by_another_task(spans, caplog):
    observer = tracing(spans)

    async def pieces():
        with observer.span("generate"):
            yield 1
            yield 2

    async def story():
        with observer.span("request"):
            async with aclosing(pieces()) as stream:
                await anext(stream)

                async def rest():
                    return [piece async for piece in stream]

                assert await asyncio.create_task(rest()) == [2]
            with observer.span("after"):
                pass

    asyncio.run(story())
    found = {span.name: span for span in spans.get_finished_spans()}
    assert ids(found["generate"])[2] == ids(found["request"])[1]
    assert found.keys() == {"generate", "request", "after"} and not caplog.records


def test_requests_at_once_do_not_mix_their_spans(spans):
    observer = tracing(spans)

    async def one(number):
        with observer.span("request", number=number):
            await asyncio.sleep(0.01 * (number % 3))
            with observer.span("hop", number=number):
                await asyncio.sleep(0.005)

    async def story():
        await asyncio.gather(*(one(number) for number in range(20)))

    asyncio.run(story())
    outer = {s.attributes["rayft.number"]: s for s in spans.get_finished_spans() if s.name == "request"}
    inner = {s.attributes["rayft.number"]: s for s in spans.get_finished_spans() if s.name == "hop"}
    assert len(outer) == len(inner) == 20
    assert all(ids(inner[number])[2] == ids(outer[number])[1] for number in range(20))


class Collector(BaseHTTPRequestHandler):
    """Takes what an OTLP exporter posts."""

    def do_POST(self):
        self.server.got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_spans_reach_an_otlp_collector(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Collector)
    server.got = []
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    observer = make_observer(TelemetryConfig(metrics=False, traces=f"http://127.0.0.1:{server.server_port}/"))
    with observer.span("request", parent=PARENT, strategy="rag") as span:
        span.content(question="Who is ill?")
    observer.close()
    server.shutdown()
    server.server_close()
    ((path, body),) = server.got
    assert path == "/v1/traces"
    for part in (b"request", b"rayft.strategy", bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")):
        assert part in body
    assert b"Who is ill?" not in body


def test_an_endpoint_that_is_no_address_is_one_line():
    with pytest.raises(UserError, match=r"telemetry\.traces is 'collector:4317'"):
        make_observer(TelemetryConfig(metrics=False, traces="collector:4317"))


def test_traces_without_the_extra_say_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"rayft\[traces\]"):
        make_observer(TelemetryConfig(metrics=False, traces="http://127.0.0.1:4318"))
