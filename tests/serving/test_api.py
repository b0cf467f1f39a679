import dataclasses
import logging
import threading

import pytest

from retrieval.filters import parse_filter
from serving.engine import Completion
from serving.interfaces import Caller, FeedbackOffError, FeedbackUnavailableError, PartUnavailableError, Pins
from tests.serving.fakes import served_release, wait_until
from tests.serving.fakes_api import (
    QUESTION,
    SECRET,
    USER,
    FakeFeedback,
    FakeGraph,
    FakeKeys,
    FakeQuotas,
    Service,
    error_of,
)
from training.format import WorkedExample


@pytest.fixture
def service():
    return Service()


def test_chat_raft_answers_with_sources_and_details(service):
    response = service.post()
    body = response.json()
    message = body["choices"][0]["message"]
    assert message["content"].startswith("Athens [1]\n\nSources:\n[1] Greece: “Athens is the capital.”")
    [annotation] = message["annotations"]
    citation = annotation["url_citation"]
    assert message["content"][citation["start_index"] : citation["end_index"]] == "[1]"
    assert (citation["url"], citation["title"]) == ("https://x.org/gr", "Greece")
    assert "context" not in message and "search_results" not in body
    details = body["rayft"]
    assert details["request_id"] == body["id"] and details["strategy"] == "raft"
    stated = {"strategy", "intent", "confidence", "reason", "propensity", "experiment", "require_quote"}
    assert set(details["route"]) == stated
    [quoted] = details["citations"]
    assert (quoted["number"], quoted["verified"], quoted["passage"]) == (1, True, 1)
    assert (quoted["title"], quoted["start"], quoted["end"]) == ("Greece", 109, 131)
    assert [hit["doc_id"] for hit in details["hits"]] == ["greece", "spain"]
    assert set(details["timings_ms"]) == {"retrieval", "queue", "generation", "total"}
    assert details["standalone"] == "" and details["passages_left_out"] == 0
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert response.headers["x-rayft-release"] == details["release"] == "release/test/0123456789abcdef"


def test_chat_unverified_quote_is_marked_and_no_source():
    made_up = Service(FakeGraph({"raft": "##begin_quote##Lisbon!##end_quote##<ANSWER>: Lisbon"}))
    body = made_up.post().json()
    assert body["choices"][0]["message"]["content"] == "Lisbon (quote not found in the documents)"
    assert body["choices"][0]["message"]["annotations"] == []
    [quoted] = body["rayft"]["citations"]
    assert (quoted["number"], quoted["verified"]) == (None, False)


def test_chat_auto_names_its_route(service):
    route = service.post("rayft-auto").json()["rayft"]["route"]
    assert (route["strategy"], route["intent"]) == ("rag", "fact_lookup") and route["reason"]


def test_chat_hybrid_asks_both_adapters():
    service = Service(FakeGraph({"raft": "<ANSWER>: Lisbon"}))
    body = service.post("hybrid").json()
    assert {request.adapter.split("/")[1] for request in service.graph.requests} == {"raft", "finetuned"}
    assert body["choices"][0]["message"]["content"] == "Patras (not from the documents)"
    assert body["rayft"]["strategy"] == "hybrid"


def test_chat_fewshot_shows_the_examples():
    service = Service(release=served_release(examples=[WorkedExample("How old?", (), "<ANSWER>: 7")]))
    assert service.post("rayft-rag_fewshot").status_code == 200
    assert [message["role"] for message in service.graph.requests[0].messages].count("assistant") == 1


def test_chat_settings_reach_the_engine(service):
    service.post(temperature=0.5, top_p=0.9, seed=3, stop=["\n", "Q:"], max_tokens=5)
    request = service.graph.requests[0]
    assert (request.temperature, request.top_p, request.seed, request.stop) == (0.5, 0.9, 3, ("\n", "Q:"))
    assert request.max_new_tokens == 5
    service.post(max_tokens=5, max_completion_tokens=6, stop="x", temperature=1)
    assert (service.graph.requests[1].max_new_tokens, service.graph.requests[1].stop) == (6, ("x",))
    service.post(temperature=None, stop=None, seed=None, stream=None, user=None)
    defaults = service.graph.requests[2]
    assert (defaults.temperature, defaults.seed, defaults.max_new_tokens, defaults.stop) == (0.0, 17, 96, ())


def test_chat_last_user_message_is_the_question(service):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "Capital of"}, {"type": "text", "text": "Greece?"}]},
    ]
    assert service.post(messages=messages).status_code == 200
    assert "Capital of\nGreece?" in service.graph.searches[0].text
    assert service.post(messages=[*messages, {"role": "system", "content": "Be brief."}]).status_code == 200
    assert "Greece" in service.graph.searches[1].text


def test_chat_filter_and_the_keys_own_are_both_applied():
    caller = Caller("acme", "k1", frozenset({"staff"}), parse_filter({"doc_id": {"in": ["greece", "italy"]}}))
    service = Service(keys=FakeKeys({"key": caller}))
    body = {"model": "raft", "messages": USER, "rayft": {"filter": {"doc_id": {"ne": "greece"}}}}
    found = service.send("/v1/chat/completions", body, authorization="Bearer key").json()
    assert found["rayft"]["hits"] == []
    assert service.graph.searches[0].groups == {"staff"}


def test_chat_strategy_that_the_key_does_not_open_is_403():
    service = Service(keys=FakeKeys({"key": Caller(strategies=("rag",))}))
    headers = {"authorization": "Bearer key"}
    response = service.send("/v1/chat/completions", {"model": "raft", "messages": USER}, **headers)
    error = error_of(response, 403)
    assert error["code"] == "model_not_allowed" and error["message"].endswith("rayft-rag, rayft-auto")
    models = service.client.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in models] == ["rayft-rag", "rayft-auto", "rayft-embedding"]


def test_key_that_is_unknown_is_401_everywhere_but_at_health():
    service = Service(keys=FakeKeys({}))
    response = service.post()
    assert error_of(response, 401)["type"] == "authentication_error" and response.headers["www-authenticate"]
    for path, body in [
        ("/v1/completions", {"model": "raft", "prompt": "x"}),
        ("/v1/embeddings", {"model": "rayft-embedding", "input": "x"}),
        ("/v1/search", {"query": "x"}),
        ("/v1/feedback", {"request_id": "x", "rating": "up"}),
    ]:
        error_of(service.send(path, body), 401)
    error_of(service.client.get("/v1/models"), 401)
    error_of(service.client.get("/v1/models/rayft-raft"), 401)
    assert service.client.get("/healthz").status_code == service.client.get("/readyz").status_code == 200
    assert not service.graph.requests and not service.graph.searches and not service.graph.embedded


def test_quota_used_up_is_429_and_tokens_are_spent():
    service = Service(quotas=FakeQuotas(requests=1))
    assert service.post().status_code == 200
    assert service.parts.quotas.spent == 18
    response = service.post()
    assert error_of(response, 429)["code"] == "quota_exceeded" and response.headers["retry-after"] == "30"
    assert len(service.graph.requests) == 1


def test_chat_strategy_that_the_release_lacks_names_what_it_has():
    error = error_of(Service(release=served_release(adapters=())).post("rayft-raft"), 400)
    assert error["code"] == "strategy_unavailable"
    assert error["message"].endswith("rayft-base, rayft-rag, rayft-auto")


def test_chat_oversize_body_is_413(service):
    error = error_of(service.post(messages=[{"role": "user", "content": "x" * 30_000}]), 413)
    assert error["code"] == "body_too_long"
    json_type = {"content-type": "application/json"}
    chunked = service.client.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(30)), headers=json_type)
    error_of(chunked, 413)


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_chat_body_not_declared_as_json_is_415(service, declared):
    """Only such bodies can a web page send without asking first."""
    headers = {"content-type": declared} if declared else {}
    response = service.client.post("/v1/chat/completions", content=b'{"model": "raft"}', headers=headers)
    assert error_of(response, 415)["code"] == "unsupported_content_type"


def test_chat_prompt_over_the_window_is_400_and_not_generated():
    service = Service(FakeGraph(error_code="context_length_exceeded"))
    error = error_of(service.post(), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(("code", "status"), [("internal", 500), ("closed", 503)])
def test_chat_engine_failure_has_its_status(code, status):
    error_of(Service(FakeGraph(error_code=code)).post("rayft-hybrid"), status)


def test_chat_deadline_is_504_and_frees_the_slot():
    service = Service(FakeGraph(delay_s=0.2), timeout_s=0.3)
    assert error_of(service.post(), 504)["code"] == "deadline_exceeded"
    assert service.graph.cancelled == 1 and service.observer.gauge == [1, 0]
    assert service.observer.requests == [("raft", "deadline_exceeded")]


def test_chat_more_than_the_limit_is_429_with_retry_after():
    service = Service(FakeGraph(delay_s=0.02), in_flight=2)
    busy = [threading.Thread(target=service.post) for _ in range(2)]
    for thread in busy:
        thread.start()
    assert wait_until(lambda: len(service.graph.requests) == 2)
    response = service.post()
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    error_of(service.post(stream=True), 429)
    for thread in busy:
        thread.join()
    assert service.post().status_code == 200
    assert service.observer.events == ["refused", "refused"] and max(service.observer.gauge) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_chat_unexpected_error_is_500_without_user_text(caplog, stream):
    service = Service(FakeGraph(raises=RuntimeError(f"cannot search {SECRET}")))
    error_of(service.post(messages=[{"role": "user", "content": SECRET}], stream=stream), 500)
    assert SECRET not in caplog.text and "RuntimeError" in caplog.text and "fakes_api.py" in caplog.text


def test_error_outside_of_any_request_is_500_without_its_text(caplog):
    def broken():
        raise RuntimeError(SECRET)

    service = Service()
    service.parts.__dict__["current"] = broken
    response = service.client.get("/v1/models")
    assert error_of(response, 500)["code"] == "internal_error" and response.headers["x-request-id"]
    assert SECRET not in caplog.text and "RuntimeError" in caplog.text


def test_chat_user_text_is_logged_only_when_asked_for(caplog):
    text = [{"role": "user", "content": f"{SECRET}?"}]
    with caplog.at_level(logging.INFO, logger="serving"):
        service = Service()
        service.post(messages=text)
        service.events(messages=text)
        service.post("nope", messages=text)
    assert caplog.text.count("strategy=raft") == 2
    assert SECRET not in caplog.text and "Athens" not in caplog.text
    with caplog.at_level(logging.INFO, logger="serving"):
        Service(log_content=True).post(messages=text)
    assert SECRET in caplog.text and "Athens" in caplog.text


def test_chat_part_that_is_gone_is_503():
    response = Service(FakeGraph(raises=PartUnavailableError("gone"))).post()
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"]


def test_draining_server_takes_nothing_new():
    service = Service(draining=lambda: True)
    response = service.post()
    assert error_of(response, 503)["code"] == "draining" and response.headers["retry-after"]
    error_of(service.client.get("/readyz"), 503)
    assert service.client.get("/healthz").status_code == 200


def test_request_keeps_its_release_while_another_is_promoted():
    service = Service(FakeGraph(delay_s=0.02))
    newer = service.converse(served_release())
    newer.release.pins.__dict__["release"] = "release/test/fedcba9876543210"
    answers = []
    running = threading.Thread(target=lambda: answers.append(service.post()))
    running.start()
    assert wait_until(lambda: service.graph.requests)
    service.conversation = newer
    running.join()
    answers.append(service.post("rayft-base"))
    assert [answer.headers["x-rayft-release"][-4:] for answer in answers] == ["cdef", "3210"]
    assert [answer.json()["rayft"]["release"][-4:] for answer in answers] == ["cdef", "3210"]


def test_outcomes_are_counted_by_strategy():
    service = Service()
    service.post()
    service.post("nope")
    service.post("auto", messages=[])
    assert service.observer.requests == [("raft", "ok"), ("none", "model_not_found"), ("none", "invalid_value")]


def test_request_id_of_the_caller_is_sent_back_where_it_is_plain(service):
    body = {"model": "raft", "messages": USER}
    plain = service.send("/v1/chat/completions", body, **{"x-request-id": "abc-1.2_3"})
    assert plain.headers["x-request-id"] == "abc-1.2_3" and plain.json()["id"] != "abc-1.2_3"
    for unsafe in ("a b", "x" * 65, "<script>", ""):
        answer = service.send("/v1/chat/completions", body, **{"x-request-id": unsafe})
        assert answer.headers["x-request-id"].startswith("req-")
    assert service.post("nope").headers["x-request-id"] != service.post("nope").headers["x-request-id"]


def test_request_id_that_serve_adds_is_not_sent_twice():
    """Ray Serve's proxy appends the id that it passed on."""
    service = Service(behind_serve=True)
    body = {"model": "raft", "messages": USER}
    assert "x-request-id" not in service.send("/v1/chat/completions", body, **{"x-request-id": "abc-1.2_3"}).headers
    ours = service.send("/v1/chat/completions", body, **{"x-request-id": "a b"}).headers["x-request-id"]
    assert ours.startswith("req-")


def test_completions_answer_a_prompt(service):
    body = service.send("/v1/completions", {"model": "rayft-raft", "prompt": [QUESTION], "max_tokens": 9}).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"][0]["text"].startswith("Athens [1]") and body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 18 and body["rayft"]["citations"][0]["verified"]
    assert service.graph.requests[0].max_new_tokens == 9 and service.graph.searches[0].text == QUESTION


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ["a", "b"]},
        {"prompt": [1, 2]},
        {"prompt": [[1]]},
        {"prompt": []},
        {"prompt": " "},
        {"echo": True},
        {"logprobs": 2},
        {"logprobs": 0},
        {"suffix": "x"},
        {"best_of": 2},
        {"n": 3},
        {"messages": USER},
    ],
)
def test_completions_refuse_what_only_continuing_texts_needs(service, wrong):
    response = service.send("/v1/completions", {"model": "raft", "prompt": "x", **wrong})
    assert error_of(response, 400)["param"] == next(iter(wrong))


def test_search_returns_hits_with_scores(service):
    body = service.send("/v1/search", {"query": "Greece", "k": 1}).json()
    assert [(hit["rank"], hit["doc_id"]) for hit in body["data"]] == [(1, "greece")]
    assert not service.graph.requests
    filtered = service.send("/v1/search", {"query": "Greece", "filter": {"doc_id": "spain"}}).json()
    assert [hit["doc_id"] for hit in filtered["data"]] == ["spain"]


def test_search_of_a_tenant_stays_inside_its_filter():
    caller = Caller("acme", "k", frozenset({"staff"}), parse_filter({"doc_id": "spain"}))
    service = Service(keys=FakeKeys({"key": caller}))
    found = service.send("/v1/search", {"query": "x", "filter": {"doc_id": "greece"}}, authorization="Bearer key")
    assert found.json()["data"] == []
    found = service.send("/v1/search", {"query": "x"}, authorization="Bearer key")
    assert [hit["doc_id"] for hit in found.json()["data"]] == ["spain"]


@pytest.mark.parametrize(
    "body",
    [
        {"query": ""},
        {"query": "  "},
        {"query": "x", "k": "2"},
        {"query": "x", "k": 0},
        {"query": "x", "k": 101},
        {},
        {"query": "x", "filter": []},
        {"query": "x", "filter": {"year": {"gt": SECRET, "gte": SECRET}}},
        {"query": "x", "filter": {"year": {"in": SECRET}}},
    ],
)
def test_search_bad_request_is_400(service, body):
    error_of(service.send("/v1/search", body), 400)


def test_release_without_an_index_searches_and_embeds_nothing():
    opened = served_release()
    closed = dataclasses.replace(opened, pins=Pins(opened.name, adapters=opened.pins.adapters), embeds=False)
    service = Service(release=closed)
    assert error_of(service.send("/v1/search", {"query": "x"}), 400)["code"] == "no_index"
    error_of(service.send("/v1/embeddings", {"model": "rayft-embedding", "input": "x"}), 404)
    assert "rayft-embedding" not in service.client.get("/v1/models").text


def test_lexical_release_searches_and_offers_no_embedding_model():
    service = Service(release=dataclasses.replace(served_release(), embeds=False))
    assert service.send("/v1/search", {"query": "x"}).status_code == 200
    error = error_of(service.send("/v1/embeddings", {"model": "rayft-embedding", "input": "x"}), 404)
    assert error["code"] == "model_not_found"
    assert "rayft-embedding" not in service.client.get("/v1/models").text
    error_of(service.client.get("/v1/models/rayft-embedding"), 404)


@pytest.mark.parametrize(
    ("body", "satisfied"),
    [
        ({"rating": "up"}, 1.0),
        ({"rating": "down", "comment": "no"}, 0.0),
        ({"stars": 5}, 1.0),
        ({"stars": 2}, 0.25),
        ({"satisfied": 0.7}, 0.7),
        ({"satisfied": 1}, 1.0),
        ({"correction": "Sparta"}, 0.0),
        ({"rating": "up", "correction": "Athens, of course"}, 1.0),
    ],
)
def test_feedback_is_stored_with_what_it_says(service, body, satisfied):
    request_id = service.post().json()["id"]
    response = service.send("/v1/feedback", {"request_id": request_id, **body})
    assert response.json() == {"object": "feedback", "request_id": request_id, "satisfied": satisfied}
    [rating] = service.feedback.ratings
    assert (rating.request_id, rating.satisfied) == (request_id, satisfied)
    assert (rating.correction, rating.comment) == (body.get("correction", ""), body.get("comment", ""))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"rating": "sideways"},
        {"rating": "up", "stars": 5},
        {"stars": 0},
        {"stars": 6},
        {"stars": 2.5},
        {"satisfied": 1.1},
        {"satisfied": True},
        {"correction": " "},
        {"rating": 5},
        {"rating": "up", "tenant": "other"},
    ],
)
def test_feedback_that_says_nothing_clear_is_400(service, body):
    error_of(service.send("/v1/feedback", {"request_id": "chatcmpl-1", **body}), 400)
    assert not service.feedback.ratings


def test_feedback_of_an_unknown_answer_or_another_keys_is_404():
    service = Service(keys=FakeKeys({"a": Caller("t", "a"), "b": Caller("t", "b")}))
    body = {"model": "raft", "messages": USER}
    request_id = service.send("/v1/chat/completions", body, authorization="Bearer a").json()["id"]
    rating = {"request_id": request_id, "rating": "up"}
    assert error_of(service.send("/v1/feedback", rating, authorization="Bearer b"), 404)["code"] == "unknown_request"
    error_of(service.send("/v1/feedback", {"request_id": "x", "rating": "up"}, authorization="Bearer a"), 404)
    assert service.send("/v1/feedback", rating, authorization="Bearer a").status_code == 200


@pytest.mark.parametrize(
    "feedback", [FakeFeedback(raises=FeedbackUnavailableError()), FakeFeedback(raises=FeedbackOffError())]
)
def test_feedback_that_cannot_be_stored_is_503_and_answers_go_on(feedback):
    service = Service(feedback=feedback)
    assert service.post().status_code == 200
    error_of(service.send("/v1/feedback", {"request_id": "x", "rating": "up"}), 503)


def test_feedback_counts_as_a_request_of_the_minute():
    service = Service(quotas=FakeQuotas(requests=2))
    rating = {"request_id": service.post().json()["id"], "rating": "up"}
    assert service.send("/v1/feedback", rating).status_code == 200
    error = error_of(service.send("/v1/feedback", rating), 429)
    assert error["code"] == "quota_exceeded" and len(service.feedback.ratings) == 1


def test_models_lists_what_can_be_asked(service):
    ids = [model["id"] for model in service.client.get("/v1/models").json()["data"]]
    assert ids == [*(f"rayft-{name}" for name in served_release().available), "rayft-embedding"]
    for name in ids:
        assert service.client.get(f"/v1/models/{name}").json()["id"] == name
    error_of(service.client.get("/v1/models/nope"), 404)


def test_readiness_fails_with_a_part():
    async def gone():
        raise PartUnavailableError

    assert Service().client.get("/readyz").json()["release"] == "release/test/0123456789abcdef"
    assert "refused" not in Service().client.get("/readyz").json()
    ready = Service(refused=lambda: "release/test/v2").client.get("/readyz").json()
    assert (ready["status"], ready["refused"]) == ("ready", "release/test/v2")
    assert error_of(Service(check_ready=gone).client.get("/readyz"), 503)["code"] == "not_ready"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/chat", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/rayft-raft", 405),
    ],
)
def test_unknown_url_or_method_has_the_error_shape(service, method, path, status):
    response = service.client.request(method, path, headers={"origin": "https://evil.example"})
    error_of(response, status)
    assert not any(name.startswith("access-control") for name in response.headers)


def test_head_is_answered_where_get_is(service):
    assert service.client.head("/healthz").status_code == service.client.head("/v1/models").status_code == 200
    assert service.client.head("/v1/chat/completions").status_code == 405


def test_completion_that_was_cut_says_length(monkeypatch, service):
    async def cut(request, pins):
        return Completion(request.request_id, "Athens", "length", 3, 1)

    service.graph.generate = cut
    service.conversation = service.converse(service.served)
    assert service.post("base").json()["choices"][0]["finish_reason"] == "length"
    assert service.observer.requests == [("base", "cut")]
