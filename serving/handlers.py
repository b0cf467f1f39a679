"""What each route of the API does.

In: a request and `ApiParts`. Out: a response, or `ApiError`. A client that closes its connection frees what its request
held at once; a stream is answered 200 only once its first event is there (or after 15 s of silence), so that a request
that cannot be served has its proper status.
Not covered: routes and errors as responses (serving/api.py), shapes (serving/chat_shapes.py and its neighbours).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from serving.admission import Admission
from serving.api_errors import CLOSED_BY_CLIENT, NOT_READY_RETRY_S, ApiError, api_error
from serving.chat_shapes import (
    EMBEDDING_MODEL,
    MODEL_PREFIX,
    ChatRequest,
    chat_chunk,
    chat_response,
    details,
    usable,
    usage,
)
from serving.citation_shapes import answer_fields, message_fields, url_citations
from serving.completions_shapes import CompletionRequest, completion_chunk, completion_response
from serving.event_stream import ClientGoneError, EventSource, EventStream, json_bytes, unless_client_leaves
from serving.interfaces import Caller
from serving.other_shapes import (
    EmbeddingRequest,
    FeedbackRequest,
    SearchRequest,
    feedback_response,
    model_row,
    search_response,
)
from serving.records import Answer
from serving.request_bodies import Schema, read_body
from serving.request_scope import request_id

if TYPE_CHECKING:
    from serving.api import ApiParts
    from serving.conversation import Ask, Conversation

logger = logging.getLogger(__name__)

JSON = "application/json"
T = TypeVar("T")


@dataclass
class Visit:
    """One request on its way: who asks, and the release that answers it from its first hop to its last."""

    http: Request
    caller: Caller
    conversation: Conversation
    strategy: str
    """What metrics count it under."""
    outcome: str = "ok"
    began: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def labels(self) -> Any:
        """The prompt format's words for people."""
        return self.conversation.release.prompt_format.texts.labels

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began


class Handlers:
    """The routes' functions."""

    def __init__(self, parts: ApiParts) -> None:
        """Everything that they share."""
        self._parts = parts
        self._admission = Admission(parts.limits.max_in_flight, parts.observer.in_flight)
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        visit, body = await self._enter(request, ChatRequest)
        ask = body.ask(f"chatcmpl-{uuid.uuid4().hex}", visit.conversation.release.available, visit.caller)
        visit.strategy = ask.strategy
        shapes = self._parts.citation_shapes
        with_usage = body.wants_usage()
        if not body.stream:
            answer = await self._answer(visit, ask)
            return _json(chat_response(answer, body.model, visit.created, visit.labels, ask.question, shapes))

        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
            found = chat_chunk(ask.request_id, body.model, visit.created, delta, finish_reason)
            return {**found, "usage": None} if with_usage else found

        def last(answer: Answer, written: str) -> list[dict[str, Any]]:
            delta = {"annotations": url_citations(answer, written, visit.labels)}
            end = chunk({**delta, **message_fields(answer, ask.question, shapes)}, answer.finish_reason)
            return [{**end, **answer_fields(answer, shapes), "rayft": details(answer)}]

        return await self._stream(
            visit,
            ask,
            lambda text: chunk({"content": text}),
            last,
            with_usage,
            chunk({"role": "assistant", "content": ""}),
        )

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        visit, body = await self._enter(request, CompletionRequest)
        ask = body.ask(f"cmpl-{uuid.uuid4().hex}", visit.conversation.release.available, visit.caller)
        visit.strategy = ask.strategy
        shapes = self._parts.citation_shapes
        with_usage = body.wants_usage()
        if not body.stream:
            answer = await self._answer(visit, ask)
            return _json(completion_response(answer, body.model, visit.created, visit.labels, shapes))

        def chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
            found = completion_chunk(ask.request_id, body.model, visit.created, text, finish_reason)
            return {**found, "usage": None} if with_usage else found

        def last(answer: Answer, written: str) -> list[dict[str, Any]]:
            end = chunk("", answer.finish_reason)
            return [{**end, **answer_fields(answer, shapes), "rayft": details(answer)}]

        return await self._stream(visit, ask, chunk, last, with_usage)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        visit, body = await self._enter(request, EmbeddingRequest, "embeddings")
        texts = body.texts()
        if not visit.conversation.release.pins.index:
            message = "model: this release has no index, and so no encoder"
            raise ApiError(404, message, code="model_not_found", param="model")

        async def work() -> dict[str, Any]:
            async with self._under_way(visit):
                embedded = await visit.conversation.embed(texts)
                self._parts.quotas.spend(visit.caller, sum(embedded.tokens))
                return body.response(embedded)

        return _json(await self._unless_gone(visit, work()))

    async def search(self, request: Request) -> Response:
        """POST /v1/search."""
        visit, body = await self._enter(request, SearchRequest, "search")
        wanted = body.wanted()
        if not visit.conversation.release.pins.index:
            raise ApiError(400, "this release has no index to search", code="no_index")

        async def work() -> dict[str, Any]:
            async with self._under_way(visit):
                hits = await visit.conversation.search(body.query, body.k, visit.caller, wanted)
                return search_response(hits, visit.conversation.release.name)

        return _json(await self._unless_gone(visit, work()))

    async def rate(self, request: Request) -> Response:
        """POST /v1/feedback. Ratings take no slot: they come while the server is busy, and cost it next to nothing."""
        visit, body = await self._enter(request, FeedbackRequest, "feedback")
        rating = body.to_rating()
        door = self._parts.feedback
        if door is None:
            raise ApiError(503, "this server takes no feedback", code="feedback_off")
        await self._within(visit, door.rate(rating, visit.caller))
        return _json(feedback_response(rating))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: what this caller may ask for."""
        return _json({"object": "list", "data": [model_row(name, self._created) for name in self._models(request)]})

    async def model(self, request: Request, model: str) -> Response:
        """GET /v1/models/{model}."""
        found = {name.removeprefix(MODEL_PREFIX): name for name in self._models(request)}
        name = found.get(model.removeprefix(MODEL_PREFIX))
        if name is None:
            raise ApiError(404, "model: there is no such model", code="model_not_found", param="model")
        return _json(model_row(name, self._created))

    async def health(self) -> Response:
        """GET /healthz: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /readyz: every part answers, and requests are taken."""
        visit = self._visit(request, "readiness", Caller())
        await self._within(visit, self._parts.check_ready())
        return _json({"status": "ready", "release": visit.conversation.release.name})

    def count_refused(self, request: Request, error: ApiError) -> None:
        """Counts a request that was refused before it got under way."""
        if not getattr(request.state, "counted", False):
            self._parts.observer.request(strategy="none", outcome=error.code, seconds=0.0)

    def _models(self, request: Request) -> list[str]:
        visit = self._visit(request, "models", self._parts.keys.caller(request.headers.get("authorization")))
        release = visit.conversation.release
        embedding = [EMBEDDING_MODEL] if release.pins.index else []
        return [MODEL_PREFIX + name for name in usable(release.available, visit.caller)] + embedding

    async def _enter(self, request: Request, schema: type[Schema], strategy: str = "none") -> tuple[Visit, Schema]:
        """What a POST needs before it can be looked at: a server that takes it, a caller, a body."""
        self._refuse_when_draining()
        caller = self._parts.keys.caller(request.headers.get("authorization"))
        visit = self._visit(request, strategy, caller)
        return visit, read_body(await self._read(request), schema)

    def _visit(self, request: Request, strategy: str, caller: Caller) -> Visit:
        if strategy == "readiness":
            self._refuse_when_draining()
        conversation = self._parts.current()
        request.state.release = conversation.release.name
        return Visit(request, caller, conversation, strategy)

    def _refuse_when_draining(self) -> None:
        if self._parts.draining():
            raise ApiError(503, "the server is going down", code="draining", retry_after_s=NOT_READY_RETRY_S)

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too long."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise ApiError(415, f"send the body with Content-Type: {JSON}", code="unsupported_content_type")
        limit = self._parts.limits.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_long
        body = bytearray()
        async with asyncio.timeout(self._parts.limits.timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_long
        return bytes(body)

    async def _answer(self, visit: Visit, ask: Ask) -> Answer:
        async def work() -> Answer:
            async with self._under_way(visit):
                answer = await visit.conversation.answer(ask)
                self._answered(visit, ask, answer)
                return answer

        return await self._unless_gone(visit, work())

    async def _stream(
        self,
        visit: Visit,
        ask: Ask,
        piece_event: Callable[[str], dict[str, Any]],
        last_events: Callable[[Answer, str], list[dict[str, Any]]],
        with_usage: bool,
        *opening: dict[str, Any],
    ) -> Response:
        async def events() -> AsyncGenerator[dict[str, Any], None]:
            written = ""
            async with self._under_way(visit), aclosing(visit.conversation.stream(ask)) as pieces:
                async for piece in pieces:
                    if not written:
                        for event in opening:
                            yield event
                    if isinstance(piece, Answer):
                        self._answered(visit, ask, piece)
                        for event in last_events(piece, written):
                            yield event
                        if with_usage:
                            yield {**piece_event(""), "choices": [], "usage": usage(piece)}
                    else:
                        if not written:
                            self._parts.observer.first_token(strategy=visit.strategy, seconds=visit.seconds)
                        written += piece
                        yield piece_event(piece)

        source = EventSource(events(), self._parts.keep_alive_s)
        try:
            await self._unless_gone(visit, source.started())
        except BaseException:
            await source.stop()
            raise
        return EventStream(source)

    async def _unless_gone(self, visit: Visit, work: Awaitable[T]) -> T:
        try:
            return await unless_client_leaves(visit.http.receive, work)
        except ClientGoneError:
            raise ApiError(CLOSED_BY_CLIENT, "the client has gone", code="cancelled") from None

    async def _within(self, visit: Visit, work: Awaitable[T]) -> T:
        """Waits for `work` until the deadline, outside of admission."""
        try:
            async with asyncio.timeout(self._parts.limits.timeout_s):
                return await work
        except Exception as error:
            raise self._known(visit, error) from error

    @asynccontextmanager
    async def _under_way(self, visit: Visit) -> AsyncIterator[None]:
        """A slot, the quota, the deadline, a span, and the count of how it ended; failures leave as `ApiError`."""
        parts = self._parts
        visit.http.state.counted = True
        parent = visit.http.headers.get("traceparent", "")
        try:
            with self._admission.slot(), parts.observer.span("request", parent):
                await parts.quotas.admit(visit.caller)
                async with asyncio.timeout(parts.limits.timeout_s):
                    yield
        except (asyncio.CancelledError, GeneratorExit):
            visit.outcome = "cancelled"
            parts.observer.count("cancelled")
            raise
        except Exception as error:
            known = self._known(visit, error)
            visit.outcome = known.code
            if known.status == 429:
                parts.observer.count("refused")
            raise known from error
        finally:
            parts.observer.request(strategy=visit.strategy, outcome=visit.outcome, seconds=visit.seconds)

    def _known(self, visit: Visit, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            limit = self._parts.limits.timeout_s
            return ApiError(504, f"no answer within {limit:g} s", code="deadline_exceeded")
        return api_error(error, request_id(visit.http), self._parts.unavailable)

    def _answered(self, visit: Visit, ask: Ask, answer: Answer) -> None:
        if answer.finish_reason == "error":
            raise ApiError(500, "generation failed", code="internal_error")
        visit.strategy = answer.strategy
        visit.outcome = "abstained" if answer.abstained else "cut" if answer.finish_reason == "length" else "ok"
        tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
        self._parts.quotas.spend(visit.caller, tokens)
        logger.info(
            "%s %s release=%s strategy=%s prompt_tokens=%d completion_tokens=%d total_ms=%.0f finish=%s",
            request_id(visit.http),
            answer.request_id,
            answer.release,
            answer.strategy,
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
            answer.timings_ms.total,
            answer.finish_reason,
        )
        if self._parts.log_content:
            logger.info("%s question=%r answer=%r", answer.request_id, ask.question, answer.answer)


def _json(content: dict[str, Any]) -> Response:
    return Response(json_bytes(content), media_type=JSON)
