import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.fakes_api import QUESTION, SECRET, USER, FakeFeedback, FakeGraph, Service, error_of

JSON = {"content-type": "application/json"}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/search", "/v1/feedback")


@pytest.fixture(scope="module")
def service():
    return Service(in_flight=100, max_body_bytes=100_000)


def send(service, raw, path="/v1/chat/completions"):
    return service.client.post(path, content=raw, headers=JSON)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b"[" * 5000,
        b'{"a":' * 5000,
        b'{"model": "raft", "messages": NaN}',
        b'{"model": "raft", "temperature": -Infinity}',
        b'{"model": "raft", "seed": ' + b"9" * 5000 + b"}",
        '{"model": "raft"}'.encode("utf-16"),
        b'{"model": "raft", "model": "base", "messages": []}',
        b'{"model": "raft", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
        b'{"model": "raft", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "raft", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
        b'{"model": "raft", "\\u0000": 1}',
        b'{"model": "raft", "messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"model": "raft"} {}',
        b"{'model': 'raft'}",
    ],
)
def test_body_that_readers_disagree_about_is_400(service, raw):
    for path in PATHS:
        assert error_of(send(service, raw, path), 400)["code"] == "invalid_json"


def test_body_with_a_byte_order_mark_or_escapes_is_read(service):
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "a 😀 \\u0000 \n"}]})
    assert "\\ud83d\\ude00" in body
    before = len(service.graph.requests)
    assert send(service, b"\xef\xbb\xbf" + body.encode()).status_code == 200
    assert "a 😀 \\u0000" in str(service.graph.requests[before].messages[-1]["content"])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": f"rayft-{SECRET}"}, 404, "model"),
        ({"model": 5}, 400, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [SECRET]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        ({"messages": [*USER, {"role": "assistant", "content": SECRET}]}, 400, "messages"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": {"text": SECRET}}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, 400, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "x", SECRET: 1}]}, 400, "messages.0"),
        ({"messages": [*USER, {"role": "tool", "content": SECRET, "tool_call_id": "1"}]}, 400, "messages.1"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}, *USER]}, 400, "messages.0"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"temperature": 10**400}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_tokens": 2**40}, 400, "max_tokens"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": {"a": 1}}, 400, "stop"),
        ({"seed": 2**70}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
        ({"metadata": {"a": []}}, 400, "metadata.a"),
        ({"metadata": {str(n): 1 for n in range(17)}}, 400, "metadata"),
        ({"user": 5}, 400, "user"),
        ({"n": 2}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"tools": [{}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"logit_bias": {"1": 2}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"store": True}, 400, "store"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
        ({"top_k": 5}, 400, "top_k"),
        ({SECRET: 5}, 400, None),
        ({"rayft": {"strategy": "raft"}}, 400, "rayft.strategy"),
        ({"rayft": {"filter": {"year": {"near": SECRET}}}}, 400, "rayft.filter"),
        ({"rayft": {"filter": {"lang": [SECRET]}}}, 400, "rayft.filter"),
    ],
)
def test_chat_bad_request_names_the_field_and_not_the_value(service, body, status, param):
    before = len(service.graph.requests)
    response = send(service, json.dumps({"model": "raft", "messages": USER, **body}).encode())
    error = error_of(response, status)
    assert error["param"] == param and "\n" not in error["message"] and len(error["message"]) < 400
    assert len(service.graph.requests) == before


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_chat_images_and_audio_are_refused_in_one_clear_line(service, kind):
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": SECRET}}]
    response = send(service, json.dumps({"model": "raft", "messages": [{"role": "user", "content": content}]}).encode())
    error = error_of(response, 400)
    assert error["message"] == "messages.0.content.1: this server reads text; leave images, audio and files out"


def test_chat_misspelt_parameter_is_refused_with_the_nearest(service):
    error = error_of(service.post(temprature=0.5), 400)
    assert error["message"] == "temprature: this server does not know it; did you mean temperature?"
    assert error["code"] == "unknown_parameter"


def test_chat_parameters_that_ask_for_nothing_are_accepted(service):
    answer = service.post(
        n=1,
        tools=[],
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        user="me",
        safety_identifier="me",
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        prompt_cache_key="k",
        logprobs=False,
    )
    assert answer.status_code == 200


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NEAR = {
    "model": st.sampled_from(["raft", "rayft-base", "auto", "rayft-embedding", "nope"]),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
            optional={"content": st.text(max_size=9) | st.just([{"type": "text", "text": QUESTION}]) | _ANY},
        ),
        max_size=3,
    ),
    "prompt": st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=2),
    "input": st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=3),
    "query": st.text(max_size=9),
    "k": st.integers(-1, 200),
    "filter": st.dictionaries(st.sampled_from(["and", "or", "not", "doc_id", "x"]), _ANY, max_size=2),
    "rayft": st.fixed_dictionaries({}, optional={"filter": st.dictionaries(st.text(max_size=5), _ANY, max_size=2)}),
    "request_id": st.text(max_size=9),
    "rating": st.sampled_from(["up", "down", 5]),
    "stars": st.integers(0, 6),
    "satisfied": st.floats(-0.5, 1.5),
    "correction": st.text(max_size=9),
    "stream": st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=5),
    "max_tokens": st.integers(-1, 2**65),
    "temperature": st.floats(),
    "seed": st.integers(),
    "metadata": st.dictionaries(st.text(max_size=5), _ANY, max_size=2),
    "encoding_format": st.sampled_from(["float", "base64", "int8"]),
}
_FIELDS = {
    "/v1/chat/completions": ("model", "messages", "rayft", "stream", "stop", "max_tokens", "temperature", "seed"),
    "/v1/completions": ("model", "prompt", "stream", "stop", "max_tokens", "metadata"),
    "/v1/embeddings": ("model", "input", "encoding_format"),
    "/v1/search": ("query", "k", "filter"),
    "/v1/feedback": ("request_id", "rating", "stars", "satisfied", "correction"),
}


@st.composite
def bodies(draw):
    """A path and bytes: from near a valid body to anything at all."""
    path = draw(st.sampled_from(PATHS))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return path, draw(st.binary(max_size=60))
    fields = {name: _NEAR[name] for name in _FIELDS[path]}
    body = draw(st.fixed_dictionaries({}, optional=fields) if kind < 4 else st.fixed_dictionaries(fields))
    if kind % 2:
        name = draw(st.sampled_from([*_NEAR, "n", "tools", "user"]) | st.text(max_size=8))
        body = {**body, name: draw(_ANY)}
    raw = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == 9:
        place = draw(st.integers(0, len(raw)))
        raw = raw[:place] + draw(st.binary(max_size=3)) + raw[place:]
    return path, raw


FUZZED = {200, 400, 403, 404}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_no_body_whatever_is_a_server_error(case):
    path, raw = case
    response = send(FUZZ, raw, path)
    assert response.status_code in FUZZED, response.text
    if response.status_code != 200:
        error_of(response, response.status_code)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text


FUZZ = Service(FakeGraph(), feedback=FakeFeedback(), in_flight=100, max_body_bytes=100_000)
