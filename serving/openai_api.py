"""OpenAI's chat-completions shapes: requests read strictly, responses and errors written.

In: request bodies as bytes, answers. Out: `Ask`, JSON-ready dicts, `ApiError`. What a request asks for and we cannot
do is refused, never ignored. Beside OpenAI's fields a response carries `rayft`: strategy, route, quotes, citations,
hits, times and release. Not covered: HTTP itself (serving/api.py). Source of the shapes:
https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.answering import readable, verified
from serving.api_errors import ApiError
from serving.conversation import Ask
from serving.records import Answer
from serving.strategies import AUTO, HYBRID, STRATEGIES
from training.format import Labels

MODEL_PREFIX = "rayft-"


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_Body):
    """A part of a message; text only."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    def text(self) -> str:
        """The message's text, its parts joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Body):
    """Wishes about a stream."""

    include_usage: bool = False


class ChatRequest(_Body):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(default=None, max_length=2000)
    metadata: dict[str, str | int | float | bool] | None = None

    def ask(self, request_id: str, available: tuple[str, ...]) -> Ask:
        """The question that this request asks: its last user message.

        Raises:
            ApiError: There is no such model, or no question.
        """
        users = [message for message in self.messages if message.role == "user"]
        question = users[-1].text().strip() if users else ""
        if not question:
            raise ApiError(400, "messages: the last user message is the question; there is none", **_at("messages"))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or not all(stop):
            raise ApiError(400, "stop: at most 4 stop strings, none of them empty", **_at("stop"))
        return Ask(
            request_id=request_id,
            question=question,
            strategy=strategy_of(self.model, available),
            metadata=self.metadata or {},
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(stop),
        )


class SearchRequest(_Body):
    """The body of POST /v1/search."""

    query: str = Field(min_length=1)
    k: int = Field(default=5, ge=1, le=100)


# What would change the answer if it were honoured: a client must hear that it is not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}

Body = TypeVar("Body", bound=_Body)


def read_body(raw: bytes, schema: type[Body]) -> Body:
    """A request body, checked.

    Raises:
        ApiError: 400, naming the field and what is wrong with it; never with the value, which is the user's text.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for name, allowed in _UNSUPPORTED.items():
        if name in content and content[name] not in allowed and schema is ChatRequest:
            raise ApiError(400, f"{name}: this server does not support it", code="unsupported_parameter", param=name)
    try:
        return schema.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{place}: {first['msg']}", **_at(place)) from None


def _at(place: str) -> dict[str, Any]:
    return {"code": "invalid_value", "param": place}


def strategy_of(model: str, available: tuple[str, ...]) -> str:
    """The strategy that a model name stands for: `rayft-raft`, or just `raft`.

    Raises:
        ApiError: 404 where there is no such model, 400 where the release lacks a part that it needs.
    """
    name = model.removeprefix(MODEL_PREFIX)
    if name in available:
        return name
    models = ", ".join(MODEL_PREFIX + other for other in available)
    if name in STRATEGIES or name in (HYBRID, AUTO):
        raise ApiError(
            400,
            f"model: this release lacks a part that {MODEL_PREFIX}{name} needs; it has {models}",
            code="strategy_unavailable",
            param="model",
        )
    raise ApiError(
        404, f"model: there is no such model; this release has {models}", code="model_not_found", param="model"
    )


def chat_response(answer: Answer, model: str, created: int, labels: Labels) -> dict[str, Any]:
    """OpenAI's chat.completion object."""
    content = readable(answer, labels)
    message = {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "annotations": url_citations(answer, content),
    }
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return {
        "id": answer.request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage(answer),
        "rayft": details(answer),
    }


def chat_chunk(
    request_id: str, model: str, created: int, delta: dict[str, Any], finish_reason: str | None = None
) -> dict[str, Any]:
    """OpenAI's chat.completion.chunk object."""
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}],
    }


def usage(answer: Answer) -> dict[str, int]:
    """OpenAI's usage object."""
    prompt, completion = answer.usage.prompt_tokens, answer.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def url_citations(answer: Answer, content: str) -> list[dict[str, Any]]:
    """A url_citation per source; the indexes are those of its marker in `content`. A source without an address is
    named by its document id."""
    found = []
    at = len(answer.answer)
    for number, citation in enumerate(dict.fromkeys(verified(answer)), start=1):
        mark = f"[{number}]"
        start = content.find(mark, at)
        if start < 0:  # an abstention lists no sources
            break
        source = {"url": citation.uri or citation.doc_id, "title": citation.title}
        at = start + len(mark)
        found.append({"type": "url_citation", "url_citation": {**source, "start_index": start, "end_index": at}})
    return found


def details(answer: Answer) -> dict[str, Any]:
    """The `rayft` object of a response."""
    row = answer.to_row()
    kept = ("strategy", "route", "reasoning", "quotes", "citations", "abstained", "timings_ms", "release")
    hits = [
        {"rank": hit.rank, "score": hit.score, **hit.passage.to_row(), "metadata": hit.passage.metadata}
        for hit in answer.hits
    ]
    return {**{name: row[name] for name in kept}, "answer": answer.answer, "hits": hits}
