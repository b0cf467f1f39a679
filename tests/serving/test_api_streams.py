import asyncio
import json
import socket
import time

import httpx
import pytest

from serving.api_errors import ApiError
from serving.event_stream import EventSource
from tests.serving.fakes import wait_until
from tests.serving.fakes_api import USER, FakeGraph, Service, content_of, error_of, events_of, serving


@pytest.fixture
def service():
    return Service()


@pytest.mark.parametrize("model", ["raft", "base", "hybrid", "finetuned"])
def test_stream_joins_to_the_same_content_and_ends_with_details(service, model):
    events = service.events(model)
    whole = service.post(model).json()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content_of(events) == whole["choices"][0]["message"]["content"]
    last = events[-1]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["rayft"]["citations"] == whole["rayft"]["citations"]
    assert last["choices"][0]["delta"]["annotations"] == whole["choices"][0]["message"]["annotations"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert service.observer.first_tokens == [model]


def test_stream_annotations_point_at_the_markers_of_the_streamed_text():
    """The model goes on after its answer, so the whole answer follows what was shown first."""
    again = "##begin_quote##Athens is the capital.##end_quote##<ANSWER>: See [1] of old\n<ANSWER>: Athens"
    events = Service(FakeGraph({"raft": again})).events()
    content = content_of(events)
    assert content.startswith("See [1] of old") and "Athens [1]" in content
    [annotation] = events[-1]["choices"][0]["delta"]["annotations"]
    start, end = annotation["url_citation"]["start_index"], annotation["url_citation"]["end_index"]
    assert content[start - 7 : end] == "Athens [1]"


def test_stream_usage_comes_last_when_asked(service):
    assert not any("usage" in event for event in service.events())
    events = service.events(stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 18
    assert all(event["usage"] is None for event in events[:-1]) and "rayft" in events[-2]


def test_completions_stream(service):
    body = {"model": "raft", "prompt": "Capital?", "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(service.send("/v1/completions", body))
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert (
        text
        == service.send("/v1/completions", {**body, "stream": False, "stream_options": None}).json()["choices"][0][
            "text"
        ]
    )
    assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-2]["rayft"]["citations"][0]["verified"]
    assert events[-1]["usage"]["total_tokens"] == 18 and {event["object"] for event in events} == {"text_completion"}


@pytest.mark.parametrize(
    ("graph", "status"),
    [
        (FakeGraph(error_code="context_length_exceeded"), 400),
        (FakeGraph(raises=ConnectionError()), 500),
        (FakeGraph(breaks_after=0), 503),
        (FakeGraph(first_s=9), 504),
    ],
)
def test_stream_that_cannot_be_served_has_its_status(graph, status):
    service = Service(graph, timeout_s=0.3)
    error_of(service.post("base", stream=True), status)
    assert service.observer.gauge == [1, 0]


@pytest.mark.parametrize(
    ("graph", "code"),
    [(FakeGraph(breaks_after=3), "stream_broken"), (FakeGraph(delay_s=0.05), "deadline_exceeded")],
)
def test_stream_that_breaks_ends_in_an_error_and_without_done(graph, code):
    service = Service(graph, timeout_s=0.3)
    events = events_of(service.post("base", stream=True), done=False)
    assert content_of(events[:-1]) and events[-1]["error"]["code"] == code
    assert not any("rayft" in event for event in events)
    assert service.observer.requests == [("base", code)] and service.observer.gauge == [1, 0]


def test_stream_says_something_while_nothing_comes():
    service = Service(FakeGraph(first_s=0.25), keep_alive_s=0.05)
    response = service.post("base", stream=True)
    assert response.text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert content_of(events_of(response)).startswith("Athens of old")


def test_stream_that_fails_after_a_silence_ends_in_an_error():
    service = Service(FakeGraph(first_s=0.25, error_code="context_length_exceeded"), keep_alive_s=0.05)
    events = events_of(service.post("base", stream=True), done=False)
    assert [event["error"]["code"] for event in events] == ["context_length_exceeded"]


def test_stream_is_sent_as_it_comes():
    service = Service(FakeGraph(delay_s=0.05))
    with serving(service.api) as url, httpx.Client(base_url=url, trust_env=False) as client:
        body = {"model": "base", "messages": USER, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            times = [time.monotonic() for line in response.iter_lines() if line.startswith("data")]
    assert times[-1] - times[0] > 0.3


@pytest.mark.parametrize(("stream", "heard"), [(True, b"Ath"), (True, b""), (False, b"")])
def test_client_that_leaves_frees_its_slot_at_once(stream, heard):
    """With the first byte heard, and before: a reader that is gone must not be noticed only at the next write."""
    graph = FakeGraph(
        {None: "Athens" + " of old" * 500}, delay_s=0.005 if heard else 0.0, first_s=0.0 if heard else 9.0
    )
    service = Service(graph, timeout_s=30)
    with serving(service.api) as url:
        body = json.dumps({"model": "base", "messages": USER, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(head.encode() + body)
        if heard:
            assert b"200 OK" in client.recv(4096)
        assert wait_until(lambda: service.graph.requests)
        left = time.monotonic()
        client.close()
        assert wait_until(lambda: service.observer.gauge[-1] == 0, timeout_s=2), "the slot was not freed"
        assert time.monotonic() - left < 1
    assert graph.cancelled == 1 and service.observer.events == ["cancelled"]
    assert service.observer.requests == [("base", "cancelled")]


class PromptOf100Tokens:
    window = 10_000

    def count(self, messages):
        return 100


def test_stream_whose_reader_leaves_pays_for_its_prompt_and_for_what_it_got():
    service = Service(FakeGraph({None: "Athens" + " of old" * 500}, delay_s=0.005), tokens=PromptOf100Tokens())
    with serving(service.api) as url, httpx.Client(base_url=url, trust_env=False) as client:
        body = {"model": "base", "messages": USER, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            heard = 0
            for line in response.iter_lines():
                heard += line.startswith("data")
                if heard > 20:
                    break
        assert wait_until(lambda: service.quotas.spent, timeout_s=2), "nothing was charged"
    assert 119 <= service.quotas.spent < 1000  # its first event has no text


def test_request_that_is_cut_at_its_deadline_pays_for_what_it_took():
    service = Service(FakeGraph(delay_s=0.05), timeout_s=0.3, tokens=PromptOf100Tokens())
    with service.client:
        events_of(service.post("base", stream=True), done=False)
        assert wait_until(lambda: service.quotas.spent, timeout_s=2), "nothing was charged"
        streamed, service.quotas.spent = service.quotas.spent, 0
        error_of(service.post("base"), 504)
        assert wait_until(lambda: service.quotas.spent, timeout_s=2), "nothing was charged"
    assert 101 <= streamed < 113 and service.quotas.spent == 100


def test_answer_is_charged_once_and_a_failure_of_the_server_never():
    service = Service(tokens=PromptOf100Tokens())
    with service.client:
        service.events("base")
        service.graph.error_code = "internal_error"
        error_of(service.post("base"), 500)
        service.graph.error_code, service.graph.breaks_after = "", 3
        events_of(service.post("base", stream=True), done=False)
    assert service.quotas.spent == 18


def test_event_source_sends_together_what_is_ready():
    async def events():
        for number in range(50):
            yield {"number": number}

    async def parts():
        source = EventSource(events())
        await source.started()
        await asyncio.sleep(0.05)
        return [part async for part in source.parts()]

    found = asyncio.run(parts())
    assert len(found) <= 2 and b"".join(found).count(b"data: ") == 51


def test_event_source_that_is_stopped_ends_its_generator():
    ended = []

    async def events():
        try:
            yield {}
            await asyncio.sleep(9)
        finally:
            ended.append(True)

    async def stop():
        source = EventSource(events())
        await source.started()
        await source.stop()
        return list(ended)

    assert asyncio.run(stop()) == [True]


def test_event_source_first_error_is_raised():
    async def events():
        raise ApiError(400, "no", code="no")
        yield {}

    async def start():
        await EventSource(events()).started()

    with pytest.raises(ApiError, match="no"):
        asyncio.run(start())


def test_event_source_event_that_is_no_json_ends_the_stream_in_an_error_and_not_never():
    async def events():
        yield {"score": 1.0}
        yield {"score": float("nan")}

    async def parts():
        source = EventSource(events(), keep_alive_s=0.05)
        await source.started()
        async with asyncio.timeout(1):
            return b"".join([part async for part in source.parts()])

    found = asyncio.run(parts())
    assert b"internal_error" in found and b"[DONE]" not in found
