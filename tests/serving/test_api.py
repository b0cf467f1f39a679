import asyncio
import json
import logging
import threading

import openai
import pytest
from fastapi.testclient import TestClient

from serving.api import Limits, make_api
from serving.conversation import Conversation
from serving.graph import Generator
from serving.router import Router
from serving.router_config import RouterConfig
from tests.serving.fakes import FakeEngine, FakeRetriever, base_request, served_release, wait_until
from training.format import WorkedExample

QUESTION = "What is the capital of Greece?"
USER = [{"role": "user", "content": QUESTION}]


class Service:
    """The API over a fake engine and retriever, and a client for it."""

    def __init__(self, engine=None, *, timeout_s=5.0, in_flight=4, ready_error=None, **release):
        self.engine = engine or FakeEngine()
        self.retriever = FakeRetriever()
        generator = Generator(lambda: self.engine)
        served = served_release(**release)

        async def search(query, k):
            return self.retriever.search([query], k)[0]

        async def ready():
            if ready_error:
                raise ready_error

        router = Router(RouterConfig(), served.available)
        conversation = Conversation(served, router, search, generator.generate, generator.stream)
        self.api = make_api(conversation, Limits(in_flight, timeout_s, 20_000), ready, (ConnectionError,))
        self.client = TestClient(self.api)

    def post(self, model="rayft-raft", messages=USER, **body):
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **body})

    def events(self, model="rayft-raft", **body):
        response = self.post(model, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def service():
    return Service()


def content_of(events):
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_chat_raft_answers_with_sources_and_details(service):
    body = service.post().json()
    message = body["choices"][0]["message"]
    assert message["content"].startswith("Athens [1]\n\nSources:\n[1] Greece: “Athens is the capital.”")
    [annotation] = message["annotations"]
    citation = annotation["url_citation"]
    assert message["content"][citation["start_index"] : citation["end_index"]] == "[1]"
    assert (citation["url"], citation["title"]) == ("https://x.org/gr", "Greece")
    details = body["rayft"]
    assert details["strategy"] == "raft" and details["release"] == "release/test/0123456789abcdef"
    assert details["citations"][0]["verified"] and details["quotes"] == ["Athens is the capital."]
    assert [hit["doc_id"] for hit in details["hits"]] == ["greece", "spain"]
    assert set(details["timings_ms"]) == {"retrieval", "queue", "generation", "total"}
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    assert body["choices"][0]["finish_reason"] == "stop"


def test_chat_unverified_quote_is_no_source():
    made_up = Service(FakeEngine({"raft": "##begin_quote##Lisbon!##end_quote##<ANSWER>: Lisbon"}))
    body = made_up.post().json()
    assert body["choices"][0]["message"]["content"] == "Lisbon (quote not found in the documents)"
    assert body["choices"][0]["message"]["annotations"] == []
    assert not body["rayft"]["citations"][0]["verified"]


def test_chat_auto_names_its_route_and_takes_metadata(service):
    route = service.post("rayft-auto").json()["rayft"]["route"]
    assert (route["strategy"], route["intent"]) == ("rag", "fact_lookup") and route["reason"]
    route = service.post("auto", metadata={"context_length": "3000"}).json()["rayft"]["route"]
    assert route["strategy"] == "raft"


def test_chat_hybrid_asks_both_adapters_and_says_which_it_took():
    service = Service(FakeEngine({"raft": "<ANSWER>: Lisbon"}))
    body = service.post("hybrid").json()
    assert {request.adapter for request in service.engine.requests} == {"raft", "finetuned"}
    assert body["choices"][0]["message"]["content"] == "Patras (not from the documents)"
    assert body["rayft"]["strategy"] == "hybrid"
    assert content_of(service.events("hybrid")) == "Patras (not from the documents)"


def test_chat_fewshot_shows_the_examples():
    service = Service(examples=[WorkedExample("How old?", (), "<ANSWER>: 7")])
    assert service.post("rayft-rag_fewshot").status_code == 200
    assert [message["role"] for message in service.engine.requests[0].messages].count("assistant") == 1


def test_chat_settings_reach_the_engine(service):
    service.post(temperature=0.5, top_p=0.9, seed=3, stop=["\n", "Q:"], max_tokens=5)
    request = service.engine.requests[0]
    assert (request.temperature, request.top_p, request.seed, request.stop) == (0.5, 0.9, 3, ("\n", "Q:"))
    assert request.max_new_tokens == 5
    service.post(max_tokens=5, max_completion_tokens=6, stop="x", temperature=1)
    assert (service.engine.requests[1].max_new_tokens, service.engine.requests[1].stop) == (6, ("x",))
    service.post()
    defaults = service.engine.requests[2]
    assert (defaults.temperature, defaults.seed, defaults.max_new_tokens, defaults.stop) == (0.0, 17, 96, ())


def test_chat_last_user_message_is_the_question(service):
    messages = [
        {"role": "system", "content": "Be rude."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Capital of"}, {"type": "text", "text": "Greece?"}]},
    ]
    assert service.post(messages=messages).status_code == 200
    assert service.retriever.batches == [["Capital of\nGreece?"]]
    prompt = json.dumps(service.engine.requests[0].messages)
    assert "rude" not in prompt and "Hello" not in prompt


def test_stream_joins_to_the_same_content_and_ends_with_details(service):
    events = service.events()
    whole = service.post().json()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content_of(events) == whole["choices"][0]["message"]["content"]
    assert len([event for event in events if event["choices"][0]["delta"].get("content")]) > 3
    last = events[-1]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["rayft"]["citations"] == whole["rayft"]["citations"]
    assert last["choices"][0]["delta"]["annotations"] == whole["choices"][0]["message"]["annotations"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1


def test_stream_usage_comes_when_asked(service):
    assert not any("usage" in event for event in service.events())
    events = service.events(stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 18


def test_stream_that_cannot_be_served_has_its_status():
    service = Service(FakeEngine(error_code="context_length_exceeded"))
    assert error_of(service.post(stream=True), 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": 5}, 400, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": 2**70}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"metadata": {"a": []}}, 400, None),
        ({"n": 2}, 400, "n"),
        ({"tools": [{}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)
def test_chat_bad_request_names_the_field(service, body, status, param):
    error = error_of(service.post(**{"model": "raft", "messages": USER, **body}), status)
    assert param is None or error["param"] == param
    assert not service.engine.requests


@pytest.mark.parametrize("raw", [b"{", b"", b"[]", b"\xff\xfe", b'"x"', b"[" * 5000])
def test_chat_malformed_json_is_400(service, raw):
    assert error_of(service.client.post("/v1/chat/completions", content=raw), 400)["code"] == "invalid_json"


def test_chat_harmless_defaults_are_accepted(service):
    assert (
        service.post(n=1, tools=[], presence_penalty=0, response_format={"type": "text"}, user="me").status_code == 200
    )


def test_chat_strategy_that_the_release_lacks_names_what_it_has():
    error = error_of(Service(adapters=()).post("rayft-raft"), 400)
    assert error["code"] == "strategy_unavailable"
    assert error["message"].endswith("rayft-base, rayft-rag, rayft-auto")


def test_chat_oversize_body_is_413(service):
    long = [{"role": "user", "content": "x" * 30_000}]
    assert error_of(service.post(messages=long), 413)["code"] == "body_too_long"
    chunked = service.client.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(30)))
    assert chunked.status_code == 413


def test_chat_prompt_over_the_window_is_400():
    error = error_of(Service(FakeEngine(error_code="context_length_exceeded")).post(), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(("code", "status"), [("internal", 500), ("closed", 503)])
def test_chat_engine_failure_has_its_status_and_no_details(code, status):
    error = error_of(Service(FakeEngine(error_code=code)).post("rayft-hybrid"), status)
    assert "Greece" not in error["message"]


def test_chat_deadline_is_504_and_frees_the_slot():
    service = Service(FakeEngine(delay_s=0.2), timeout_s=0.3)
    assert error_of(service.post(), 504)["code"] == "deadline_exceeded"
    assert wait_until(lambda: service.engine.cancelled)
    assert (
        Service(FakeEngine(delay_s=0.2), timeout_s=0.3).post("base", stream=True).text.count("deadline_exceeded") == 1
    )


def test_chat_more_than_the_limit_is_429_with_retry_after():
    service = Service(FakeEngine(delay_s=0.02), in_flight=2)
    busy = [threading.Thread(target=service.post) for _ in range(2)]
    for thread in busy:
        thread.start()
    assert wait_until(lambda: len(service.engine.requests) == 2)
    response = service.post()
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(service.post(stream=True), 429)
    for thread in busy:
        thread.join()
    assert service.post().status_code == 200


def test_chat_unexpected_error_is_500_without_user_text(service, caplog):
    def broken(queries, k):
        raise RuntimeError(f"cannot search {queries}")

    service.retriever.search = broken
    error = error_of(service.post(), 500)
    assert "Greece" not in error["message"] and "Greece" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_chat_success_is_logged_without_user_text(service, caplog):
    with caplog.at_level(logging.INFO):
        service.post()
        service.events()
    assert caplog.text.count("strategy=raft") == 2
    assert "Greece" not in caplog.text and "Athens" not in caplog.text


def test_chat_part_that_is_gone_is_503(service):
    def gone(queries, k):
        raise ConnectionError

    service.retriever.search = gone
    response = service.post()
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"]


def test_search_returns_hits_with_scores(service):
    body = service.client.post("/v1/search", json={"query": "Greece", "k": 1}).json()
    assert [(hit["rank"], hit["doc_id"]) for hit in body["data"]] == [(1, "greece")]
    assert not service.engine.requests


@pytest.mark.parametrize("body", [{"query": "x", "k": 3}, {"query": ""}, {"query": "x", "k": "2"}, {}])
def test_search_bad_request_is_400(service, body):
    error_of(service.client.post("/v1/search", json=body), 400)


def test_models_lists_what_can_be_asked(service):
    ids = [model["id"] for model in service.client.get("/v1/models").json()["data"]]
    assert ids == [f"rayft-{name}" for name in served_release().available]
    assert service.client.get("/v1/models/rayft-raft").json()["id"] == "rayft-raft"
    error_of(service.client.get("/v1/models/nope"), 404)


def test_health_and_readiness(service):
    assert service.client.get("/healthz").status_code == 200
    assert service.client.get("/readyz").json()["release"] == "release/test/0123456789abcdef"
    assert error_of(Service(ready_error=ConnectionError()).client.get("/readyz"), 503)["code"] == "not_ready"


def test_unknown_url_has_the_error_shape(service):
    error_of(service.client.get("/v2/chat"), 404)
    error_of(service.client.get("/v1/chat/completions"), 405)


@pytest.fixture
def official(service):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=service.client, max_retries=0)


def test_openai_client_works_unchanged(official):
    completion = official.chat.completions.create(model="rayft-raft", messages=USER, temperature=0, max_tokens=50)
    assert completion.choices[0].message.content.startswith("Athens [1]")
    assert completion.choices[0].message.annotations[0].url_citation.title == "Greece"
    assert completion.usage.total_tokens == 18
    assert completion.rayft["strategy"] == "raft"
    assert "rayft-auto" in [model.id for model in official.models.list()]


def test_openai_client_streams(official):
    stream = official.chat.completions.create(
        model="rayft-auto", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Athens of old" and chunks[-1].usage.completion_tokens == 7


def test_openai_client_raises_its_own_errors(official):
    with pytest.raises(openai.NotFoundError):
        official.chat.completions.create(model="gpt-5", messages=USER)
    with pytest.raises(openai.BadRequestError, match="messages"):
        official.chat.completions.create(model="rayft-raft", messages=[])


def test_stream_reader_that_leaves_frees_the_slot():
    engine = FakeEngine(delay_s=0.05)
    generator = Generator(lambda: engine)

    async def leave_early():
        stream = generator.stream(base_request(QUESTION))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave_early())
    assert wait_until(lambda: engine.cancelled)
