"""OpenAI's chat-completions shapes: requests read strictly, responses and chunks written.

In: `ChatRequest` bodies, answers. Out: `Ask`, JSON-ready dicts. What a request asks for and we cannot do is refused,
never ignored. System and developer messages are the caller's instructions; earlier turns tell what the question refers
to; the last user message is the question. This server calls no tools, so tool messages are refused.
Beside OpenAI's fields a response carries `rayft` (see `details`).
Shapes: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from retrieval.records import Hit
from serving.answering import readable
from serving.api_errors import ApiError, invalid
from serving.asking import Ask
from serving.citation_shapes import answer_fields, message_fields, numbered, url_citations
from serving.interfaces import Caller
from serving.records import Answer
from serving.request_bodies import Body, Unsupported, read_filter
from serving.strategies import AUTO, HYBRID, STRATEGIES
from training.format import Labels, Message

MODEL_PREFIX = "rayft-"
EMBEDDING_MODEL = "rayft-embedding"
MAX_STOPS = 4
MAX_METADATA = 16
MAX_USER = 512
INT32 = 2**31


class StreamOptions(Body):
    """Wishes about a stream."""

    unsupported: ClassVar[Unsupported] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class RayftOptions(Body):
    """What OpenAI's API has no name for: `extra_body={"rayft": {…}}` in the official client."""

    filter: dict[str, Any] | None = None
    """Only matching documents are searched, among those that the key opens (the syntax of `index search --filter`)."""


class GenerationBody(Body):
    """What chat completions and plain completions share."""

    unsupported: ClassVar[Unsupported] = {
        "n": (None, 1),
        "logit_bias": (None, {}),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=INT32)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(default=None, max_length=2000)
    user: str | None = Field(default=None, max_length=MAX_USER)
    metadata: dict[str, str | int | float | bool] | None = Field(default=None, max_length=MAX_METADATA)
    """What the router's rules may read; at most 16 values."""
    rayft: RayftOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise invalid("stop", f"at most {MAX_STOPS} stop strings, none of them empty")
        return tuple(stops)

    def wants_usage(self) -> bool:
        """Whether a stream shall end in a usage chunk."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "only allowed together with stream: true")
        return bool(self.stream_options and self.stream_options.include_usage)


class ContentPart(Body):
    """A part of a message; text only."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise ValueError("this server reads text; leave images, audio and files out")
        return part


class ChatMessage(Body):
    """One message of a conversation. A message that this server wrote may be sent back as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    context: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_no_tool(cls, message: Any) -> Any:
        if isinstance(message, dict):
            if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
                raise ValueError("this server calls no tools; leave tool messages out")
            if message.get("audio"):
                raise ValueError("this server reads text; leave audio out")
            empty = ("tool_calls", "function_call", "audio", "tool_call_id")
            message = {key: value for key, value in message.items() if key not in empty}
        return message

    def text(self) -> str:
        """The message's text, its parts joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(GenerationBody):
    """The body of POST /v1/chat/completions."""

    unsupported: ClassVar[Unsupported] = {
        **GenerationBody.unsupported,
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "logprobs": (None, False),
        "top_logprobs": (None, 0),
        "response_format": (None, {"type": "text"}),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
        "reasoning_effort": (None,),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
        "moderation": (None,),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    )

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT32)
    safety_identifier: str | None = Field(default=None, max_length=MAX_USER)

    def _split(self) -> tuple[list[ChatMessage], str]:
        """What stands before and beside the question, and the question."""
        users = [place for place, message in enumerate(self.messages) if message.role == "user"]
        question = self.messages[users[-1]].text().strip() if users else ""
        if not question:
            raise invalid("messages", "the last user message is the question; there is none, or it is empty")
        after = self.messages[users[-1] + 1 :]
        if any(message.role == "assistant" for message in after):
            raise invalid("messages", "nothing may follow the question but system messages")
        return [*self.messages[: users[-1]], *after], question

    def ask(self, request_id: str, available: Sequence[str], caller: Caller) -> Ask:
        """The question that this request asks.

        Raises:
            ApiError: There is no such model, this caller may not use it, or a value is wrong.
        """
        before, question = self._split()
        turns = [(message.role, message.text()) for message in before]
        return Ask(
            request_id=request_id,
            question=question,
            strategy=strategy_of(self.model, available, caller),
            metadata=self.metadata or {},
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stops(),
            caller=caller,
            history=tuple(Message(role=role, content=text) for role, text in turns if text.strip()),
            user=self.user or self.safety_identifier or "",
            filter=read_filter(self.rayft.filter, "rayft.filter") if self.rayft else None,
        )


def strategy_of(model: str, available: Sequence[str], caller: Caller) -> str:
    """The strategy that a model name stands for: `rayft-raft`, or just `raft`.

    Raises:
        ApiError: 404 where there is no such model, 400 where the release lacks a part that it needs, 403 where the
            caller may not use it.
    """
    name = model.removeprefix(MODEL_PREFIX)
    models = ", ".join(MODEL_PREFIX + other for other in usable(available, caller))
    if name in usable(available, caller):
        return name
    if name in available:
        raise ApiError(
            403, f"model: this key may not use it; it may use {models}", code="model_not_allowed", param="model"
        )
    if name in STRATEGIES or name in (HYBRID, AUTO):
        raise invalid(
            "model",
            f"this release lacks a part that {MODEL_PREFIX}{name} needs; it has {models}",
            "strategy_unavailable",
        )
    raise ApiError(
        404, f"model: there is no such model; this release has {models}", code="model_not_found", param="model"
    )


def usable(available: Sequence[str], caller: Caller) -> list[str]:
    """The strategies that the caller may ask for; `auto` chooses among them."""
    return [name for name in available if not caller.strategies or name == AUTO or name in caller.strategies]


def chat_response(
    answer: Answer, model: str, created: int, labels: Labels, question: str = "", shapes: Sequence[str] = ()
) -> dict[str, Any]:
    """OpenAI's chat.completion object; `question` and `shapes` are for the optional citation shapes."""
    content = readable(answer, labels)
    message = {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "annotations": url_citations(answer, content, labels),
        **message_fields(answer, question, shapes),
    }
    whole = completion("chat.completion", answer.request_id, model, created, answer.finish_reason, message=message)
    return {**whole, "usage": usage(answer), **answer_fields(answer, shapes), "rayft": details(answer)}


def completion(
    kind: str, request_id: str, model: str, created: int, finish_reason: str | None, **content: Any
) -> dict[str, Any]:
    """OpenAI's object of one choice, whole or a part of a stream; `content` is the choice's own (`message`, `delta`,
    `text`)."""
    choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}
    return {"id": request_id, "object": kind, "created": created, "model": model, "choices": [choice]}


def usage(answer: Answer) -> dict[str, int]:
    """OpenAI's usage object."""
    prompt, completion = answer.usage.prompt_tokens, answer.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def details(answer: Answer) -> dict[str, Any]:
    """The `rayft` object of a response: how the answer came about, what was shown to the model, what it quoted. Each
    citation has the number of its marker in the text; none where its quote could not be verified."""
    row = answer.to_row()
    kept = (
        "request_id",
        "strategy",
        "route",
        "reasoning",
        "quotes",
        "abstained",
        "standalone",
        "passages_left_out",
        "timings_ms",
        "release",
    )
    return {
        **{name: row[name] for name in kept},
        "answer": answer.answer,
        "citations": numbered(answer),
        "hits": [hit_row(hit) for hit in answer.hits],
    }


def hit_row(hit: Hit) -> dict[str, Any]:
    """A hit as JSON: rank, score and the passage's fields, flat."""
    passage = {**hit.passage.to_row(), "metadata": hit.passage.metadata}
    return {"rank": hit.rank, "score": hit.score, **passage, "collection": hit.collection}
