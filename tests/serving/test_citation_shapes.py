import dataclasses
import json

import jsonschema
import pytest

from retrieval.records import Hit
from serving.answering import finish, readable
from serving.chat_shapes import chat_response
from serving.citation_shapes import url_citations
from serving.engine import Completion
from serving.openapi import openapi_schema
from serving.strategies import STRATEGIES
from tests.serving.fakes import GREECE, SPAIN, prompt_format
from tests.serving.fakes_api import QUESTION, USER, FakeGraph, Service, events_of

TWO = (
    "##begin_quote##capital: Madrid##end_quote## ##begin_quote##Athens is the capital.##end_quote## "
    "##begin_quote##Lisbon!##end_quote## ##begin_quote##capital: Madrid##end_quote##\n<ANSWER>: Athens [1], not Madrid"
)
DATED = dataclasses.replace(GREECE, metadata={"date": "2024-05-01", "last_updated": 7})


def answer_of(text=TWO, passages=(DATED, SPAIN)):
    hits = [Hit(passage, 1.0, rank) for rank, passage in enumerate(passages, start=1)]
    return finish(Completion("id", text, "stop", 5, 3), STRATEGIES["raft"], hits, prompt_format())


def response(*shapes, text=TWO):
    return chat_response(answer_of(text), "rayft-raft", 0, prompt_format().texts.labels, QUESTION, shapes)


def test_markers_number_the_verified_sources_in_the_order_of_their_quotes():
    body = response()
    message = body["choices"][0]["message"]
    content = message["content"]
    assert content.startswith("Athens [1], not Madrid [1] [2]\n\nSources:\n[1] Spain: “capital: Madrid”\n[2] Greece:")
    places = [annotation["url_citation"] for annotation in message["annotations"]]
    assert [content[place["start_index"] : place["end_index"]] for place in places] == ["[1]", "[2]"]
    assert [place["start_index"] for place in places] == [23, 27]  # not the [1] of the answer's own words
    assert [place["url"] for place in places] == ["spain", "https://x.org/gr"]
    found = [(quote["number"], quote["doc_id"], quote["verified"]) for quote in body["rayft"]["citations"]]
    assert found == [(1, "spain", True), (2, "greece", True), (None, "", False), (1, "spain", True)]


def test_abstention_has_no_sources():
    text = f"##begin_quote##capital: Madrid##end_quote##<ANSWER>: {prompt_format().texts.abstention}"
    body = response("azure", "perplexity", text=text)
    assert body["rayft"]["abstained"] and body["rayft"]["citations"][0]["number"] is None
    assert body["choices"][0]["message"]["annotations"] == [] == body["citations"]
    assert body["choices"][0]["message"]["context"]["citations"] == []


def test_azure_shape_shows_the_quoted_passages():
    context = response("azure")["choices"][0]["message"]["context"]
    assert set(context) == {"citations", "intent"} and context["intent"] == QUESTION
    assert [set(citation) for citation in context["citations"]] == [
        {"content", "title", "url", "filepath", "chunk_id"}
    ] * 2
    spain, greece = context["citations"]
    assert spain == {"content": "capital: Madrid", "title": "Spain", "url": None, "filepath": "spain", "chunk_id": "c2"}
    assert greece["content"] == "capital: Athens is the capital." and greece["url"] == "https://x.org/gr"


def test_azure_intent_is_the_standalone_question():
    answer = dataclasses.replace(answer_of(), standalone="What is the population of Greece?")
    body = chat_response(answer, "rayft-raft", 0, prompt_format().texts.labels, "And its population?", ["azure"])
    assert body["choices"][0]["message"]["context"]["intent"] == "What is the population of Greece?"


def test_perplexity_shape_lists_addresses_and_results():
    body = response("perplexity")
    assert body["citations"] == ["spain", "https://x.org/gr"]
    assert [result["url"] for result in body["search_results"]] == body["citations"]
    assert body["search_results"][1] == {
        "title": "Greece",
        "url": "https://x.org/gr",
        "date": "2024-05-01",
        "last_updated": None,
        "snippet": "Athens is the capital.",
    }


@pytest.mark.parametrize("text", [TWO, "<ANSWER>: nothing", "##begin_quote##no##end_quote##<ANSWER>: no"])
def test_annotations_always_point_at_their_markers(text):
    labels, answer = prompt_format().texts.labels, answer_of(text)
    content = "shown before\n\n" + readable(answer, labels)
    for number, annotation in enumerate(url_citations(answer, content, labels), start=1):
        place = annotation["url_citation"]
        assert content[place["start_index"] : place["end_index"]] == f"[{number}]"


def test_shapes_come_with_streams_and_plain_completions_too():
    service = Service(citation_shapes=("azure", "perplexity"))
    last = service.events(stream_options={"include_usage": True})[-2]
    assert last["citations"] == ["https://x.org/gr"] and last["search_results"]
    assert last["choices"][0]["delta"]["context"]["intent"] == QUESTION
    body = {"model": "raft", "prompt": "x"}
    assert service.send("/v1/completions", body).json()["citations"] == ["https://x.org/gr"]
    streamed = events_of(service.send("/v1/completions", {**body, "stream": True}))[-1]
    assert streamed["citations"] == ["https://x.org/gr"]


SCHEMA = openapi_schema()


def check(name, content):
    schema = {**SCHEMA, "$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema).validate(content)


def answered(path, method="post", code="200", kind="application/json"):
    content = SCHEMA["paths"][path][method]["responses"][code]["content"][kind]
    return content["schema"]["$ref"].rpartition("/")[2]


def test_openapi_describes_what_is_sent():
    service = Service(citation_shapes=("azure", "perplexity"))
    chat = {"model": "raft", "messages": USER, "stream_options": None, "rayft": {"filter": {"doc_id": "greece"}}}
    first = service.send("/v1/chat/completions", chat).json()
    bodies = {
        "/v1/chat/completions": chat,
        "/v1/completions": {"model": "base", "prompt": "x"},
        "/v1/embeddings": {"model": "rayft-embedding", "input": ["a"], "encoding_format": "float"},
        "/v1/search": {"query": "x", "k": 2},
        "/v1/feedback": {"request_id": first["id"], "rating": "up"},
    }
    for path, body in bodies.items():
        check(SCHEMA["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"][21:], body)
        check(answered(path), service.send(path, body).json())
        for wrong, code in ((b"{", "400"), (b"x" * 30_000, "413")):
            error = service.client.post(path, content=wrong, headers={"content-type": "application/json"})
            assert error.status_code == int(code)
            check(answered(path, code=code), error.json())
    for path in ("/v1/chat/completions", "/v1/completions"):
        events = events_of(
            service.send(path, {**bodies[path], "stream": True, "stream_options": {"include_usage": True}})
        )
        for event in events:
            check(answered(path, kind="text/event-stream"), event)
    for path in ("/v1/models", "/v1/models/rayft-raft", "/healthz", "/readyz"):
        check(answered(path.replace("rayft-raft", "{model}"), "get"), service.client.get(path).json())


def test_openapi_leaves_out_no_field_that_is_sent():
    def described(name, sent):
        schema = SCHEMA["components"]["schemas"][name]
        assert set(sent) <= set(schema["properties"]) and set(schema["required"]) <= set(sent), name

    service = Service(citation_shapes=("azure", "perplexity"))
    whole = service.post().json()
    details = whole["rayft"]
    described("ChatCompletion", whole)
    described("Details", details)
    described("Citation", details["citations"][0])
    described("Passage", details["hits"][0])
    assert set(SCHEMA["components"]["schemas"]["Details"]["properties"]["route"]["properties"]) == set(details["route"])
    described("TextCompletion", service.send("/v1/completions", {"model": "base", "prompt": "x"}).json())
    for event in service.events(stream_options={"include_usage": True}):
        described("ChatCompletionChunk", event)


def test_openapi_refuses_what_the_server_refuses():
    for wrong in ({"model": "raft"}, {"messages": USER}, {"model": "raft", "messages": USER, "temprature": 1}):
        assert Service().send("/v1/chat/completions", wrong).status_code == 400
        with pytest.raises(jsonschema.ValidationError):
            check("ChatRequest", wrong)


def test_openapi_is_served_and_names_every_route():
    service = Service()
    shown = service.client.get("/openapi.json").json()
    assert shown == json.loads(json.dumps(SCHEMA))
    routes = {route.path for route in service.api.routes} - {"/openapi.json"}
    assert routes == set(shown["paths"])
    assert Service(FakeGraph()).client.get("/redoc").status_code == 404
