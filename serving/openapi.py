"""The API's description in OpenAPI 3.1: bodies from the very classes that read them, responses as they are written.

In: nothing. Out: a JSON-ready dict, made once. Fields that a response may grow are not closed, so a client generated
from it stays valid. Not covered: the chat page and its files.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from serving.chat_shapes import ChatRequest
from serving.completions_shapes import CompletionRequest
from serving.other_shapes import EmbeddingRequest, FeedbackRequest, SearchRequest
from serving.request_bodies import Body

_REF = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_NUMBER = {"type": "number"}
_BOOL = {"type": "boolean"}

_ERRORS = {
    "400": "The body cannot be answered; `error.param` names the field.",
    "401": "There is no valid API key.",
    "403": "The key does not open this model.",
    "404": "There is no such model, or no such answer to rate.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
    "415": "The body is not declared as application/json.",
    "429": "The server is full, or the key's quota is used up; see Retry-After.",
    "500": "The server failed.",
    "503": "A part of the server is not ready, or it is going down; see Retry-After.",
    "504": "There was no answer within the server's deadline.",
}


def _object(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _array(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=name)}


def _passage_schemas() -> dict[str, Any]:
    place = {"doc_id": _TEXT, "title": _TEXT, "uri": _TEXT, "start": _WHOLE, "end": _WHOLE}
    metadata = {"type": "object", "description": "The document's own."}
    passage = {"chunk_id": _TEXT, **place, "heading": _TEXT, "text": _TEXT, "metadata": metadata, "collection": _TEXT}
    return {
        "Passage": _object({"rank": _WHOLE, "score": _NUMBER, **passage}),
        "Citation": _object(
            {"number": _or_null(_WHOLE), "quote": _TEXT, "passage": _WHOLE, **place, "verified": _BOOL}
        ),
        "SearchResults": _object({"object": {"const": "list"}, "data": _array(_ref("Passage")), "release": _TEXT}),
    }


def _details_schema() -> dict[str, Any]:
    route = _object(
        {
            "strategy": _TEXT,
            "intent": _TEXT,
            "confidence": _NUMBER,
            "reason": _TEXT,
            "propensity": _NUMBER,
            "experiment": _TEXT,
            "require_quote": _BOOL,
        }
    )
    return _object(
        {
            "request_id": _TEXT,
            "strategy": _TEXT,
            "route": route,
            "reasoning": _TEXT,
            "quotes": _array(_TEXT),
            "citations": _array(_ref("Citation")),
            "abstained": _BOOL,
            "standalone": _TEXT,
            "passages_left_out": _WHOLE,
            "timings_ms": _object(dict.fromkeys(("retrieval", "queue", "generation", "total"), _NUMBER)),
            "release": _TEXT,
            "answer": _TEXT,
            "hits": _array(_ref("Passage")),
        }
    )


def _answer_schemas() -> dict[str, Any]:
    usage = _object({"prompt_tokens": _WHOLE, "completion_tokens": _WHOLE, "total_tokens": _WHOLE})
    finish = _or_null({"type": "string", "enum": ["stop", "length"]})
    url_citation = _object({"url": _TEXT, "title": _TEXT, "start_index": _WHOLE, "end_index": _WHOLE})
    annotations = _array(_object({"type": {"const": "url_citation"}, "url_citation": url_citation}))
    azure = {"type": "object", "description": "With serve.citation_shapes: [azure]."}
    message = _object(
        {"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}, "annotations": annotations},
        context=azure,
    )
    delta = _object({}, role=_TEXT, content=_TEXT, annotations=annotations, context=azure)
    further = {
        "usage": _or_null(usage),
        "rayft": _ref("Details"),
        "citations": {**_array(_TEXT), "description": "With serve.citation_shapes: [perplexity]."},
        "search_results": _array({"type": "object"}),
    }

    def answer(kind: str, choice: Mapping[str, Any], **required: Any) -> dict[str, Any]:
        content = {"index": _WHOLE, **choice, "finish_reason": finish, "logprobs": {"type": "null"}}
        head = {"id": _TEXT, "object": {"const": kind}, "created": _WHOLE, "model": _TEXT}
        optional = {name: further[name] for name in further if name not in required}
        return _object({**head, "choices": _array(_object(content)), **required}, **optional)

    return {
        "ChatCompletion": answer("chat.completion", {"message": message}, usage=usage, rayft=_ref("Details")),
        "ChatCompletionChunk": answer("chat.completion.chunk", {"delta": delta}),
        "TextCompletion": answer("text_completion", {"text": _TEXT}),
    }


def _responses() -> dict[str, Any]:
    error = {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)}
    vector = {"anyOf": [_array(_NUMBER), {**_TEXT, "contentEncoding": "base64"}]}
    embedding = _object({"object": {"const": "embedding"}, "index": _WHOLE, "embedding": vector})
    embedded = {"object": {"const": "list"}, "data": _array(embedding), "model": _TEXT}
    usage = _object({"prompt_tokens": _WHOLE, "total_tokens": _WHOLE})
    return {
        "Error": _object({"error": _object(error)}),
        "Details": _details_schema(),
        **_passage_schemas(),
        **_answer_schemas(),
        "Embeddings": _object({**embedded, "usage": usage}),
        "Feedback": _object({"object": {"const": "feedback"}, "request_id": _TEXT, "satisfied": _NUMBER}),
        "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE, "owned_by": _TEXT}),
        "Models": _object({"object": {"const": "list"}, "data": _array(_ref("Model"))}),
        "Health": _object({"status": _TEXT}, release=_TEXT, refused=_TEXT),
    }


def _content(schema: str, stream: str = "") -> dict[str, Any]:
    plain = {"application/json": {"schema": _ref(schema)}}
    return {**plain, "text/event-stream": {"schema": _ref(stream)}} if stream else plain


def _answers(schema: str, stream: str, errors: tuple[str, ...]) -> dict[str, Any]:
    known = {code: {"description": _ERRORS[code], "content": _content("Error")} for code in errors}
    return {"200": {"description": "The answer.", "content": _content(schema, stream)}, **known}


def _post(name: str, summary: str, body: type[Body], schema: str, stream: str = "") -> dict[str, Any]:
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": {"required": True, "content": _content(body.__name__)},
            "responses": _answers(schema, stream, tuple(_ERRORS)),
        }
    }


def _get(name: str, summary: str, schema: str, *errors: str, **more: Any) -> dict[str, Any]:
    return {
        "get": {"operationId": name, "summary": summary, "responses": _answers(schema, "", errors), **more},
    }


@functools.cache
def openapi_schema() -> dict[str, Any]:
    """The description; do not change what it returns."""
    bodies: list[type[Body]] = [ChatRequest, CompletionRequest, EmbeddingRequest, SearchRequest, FeedbackRequest]
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    model = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    health: dict[str, Any] = {"security": []}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rayft", "version": "1"},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": _post(
                "chat", "Answers a conversation's last question.", ChatRequest, "ChatCompletion", "ChatCompletionChunk"
            ),
            "/v1/completions": _post(
                "complete", "Answers a question.", CompletionRequest, "TextCompletion", "TextCompletion"
            ),
            "/v1/embeddings": _post("embed", "Embeds texts with the index's encoder.", EmbeddingRequest, "Embeddings"),
            "/v1/search": _post("search", "Finds passages.", SearchRequest, "SearchResults"),
            "/v1/feedback": _post("rate", "Rates or corrects an answer.", FeedbackRequest, "Feedback"),
            "/v1/models": _get("models", "What can be asked.", "Models", "401"),
            "/v1/models/{model}": _get("model", "One model.", "Model", "401", "404", parameters=[model]),
            "/healthz": _get("health", "The process answers.", "Health", **health),
            "/readyz": _get("ready", "Every part answers.", "Health", "503", **health),
        },
        "components": {
            "schemas": {**found["$defs"], **_responses()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
