"""What each route of the API does.

In: a request and `ApiParts`. Out: a response, or `ApiError`. A client that closes its connection frees what its request
held at once; a stream is answered 200 only once its first event is there (or after 15 s of silence), so that a request
that cannot be served has its proper status.
Not covered: routes and errors as responses (serving/api.py), shapes (serving/chat_shapes.py and its neighbours).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from serving.api_errors import ApiError
from serving.chat_shapes import EMBEDDING_MODEL, MODEL_PREFIX, ChatRequest, GenerationBody, chat_response, usable
from serving.completions_shapes import CompletionRequest, completion_response
from serving.event_stream import EventSource, EventStream
from serving.interfaces import ANYBODY
from serving.other_shapes import (
    EmbeddingRequest,
    FeedbackRequest,
    SearchRequest,
    feedback_response,
    model_row,
    search_response,
)
from serving.records import Answer
from serving.responses import json_response
from serving.stream_events import StreamEvents
from serving.visits import Reception, Visit

if TYPE_CHECKING:
    from serving.api import ApiParts
    from serving.asking import Ask


class Handlers:
    """The routes' functions."""

    def __init__(self, parts: ApiParts) -> None:
        """Everything that they share."""
        self._parts = parts
        self._reception = Reception(parts)
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, ChatRequest, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, CompletionRequest, "cmpl")

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        visit, body = await self._reception.enter(request, EmbeddingRequest, "embeddings")
        texts = body.texts()
        if not visit.conversation.release.embeds:
            message = "model: this release has no encoder: its index is lexical, or it has none"
            raise ApiError(404, message, code="model_not_found", param="model")

        async def work() -> dict[str, Any]:
            async with self._reception.under_way(visit):
                embedded = await visit.conversation.embed(texts)
                self._parts.quotas.spend(visit.caller, sum(embedded.tokens))
                return body.response(embedded)

        return json_response(await self._reception.unless_gone(visit, work()))

    async def search(self, request: Request) -> Response:
        """POST /v1/search."""
        visit, body = await self._reception.enter(request, SearchRequest, "search")
        wanted = body.wanted()
        if not visit.conversation.release.pins.index:
            raise ApiError(400, "this release has no index to search", code="no_index")

        async def work() -> dict[str, Any]:
            async with self._reception.under_way(visit):
                hits = await visit.conversation.search(body.query, body.k, visit.caller, wanted)
                return search_response(hits, visit.conversation.release.name)

        return json_response(await self._reception.unless_gone(visit, work()))

    async def rate(self, request: Request) -> Response:
        """POST /v1/feedback. Ratings take no slot: they come while the server is busy, and cost it next to nothing.
        They are requests of the key's minute, and may be sent when its tokens of the day are used up."""
        visit, body = await self._reception.enter(request, FeedbackRequest, "feedback")
        rating = body.to_rating()
        door = self._parts.feedback
        if door is None:
            raise ApiError(503, "this server takes no feedback", code="feedback_off")

        async def work() -> None:
            await self._parts.quotas.admit(visit.caller, takes_tokens=False)
            await door.rate(rating, visit.caller)

        await self._reception.within(visit, work())
        return json_response(feedback_response(rating))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: what this caller may ask for."""
        return json_response(
            {"object": "list", "data": [model_row(name, self._created) for name in self._models(request)]}
        )

    async def model(self, request: Request, model: str) -> Response:
        """GET /v1/models/{model}."""
        found = {name.removeprefix(MODEL_PREFIX): name for name in self._models(request)}
        name = found.get(model.removeprefix(MODEL_PREFIX))
        if name is None:
            raise ApiError(404, "model: there is no such model", code="model_not_found", param="model")
        return json_response(model_row(name, self._created))

    async def health(self) -> Response:
        """GET /healthz: the process answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /readyz: every part answers, and requests are taken. `refused` names a promoted release that does not
        load; why stands in the log, as anybody may read this."""
        self._reception.refuse_when_draining()
        visit = self._reception.visit(request, "none", ANYBODY)
        await self._reception.within(visit, self._parts.check_ready())
        refused = self._parts.refused()
        found = {"status": "ready", "release": visit.conversation.release.name}
        return json_response({**found, "refused": refused} if refused else found)

    def count_refused(self, request: Request, error: ApiError) -> None:
        """Counts a request that was refused before it got under way."""
        if not getattr(request.state, "counted", False):
            self._parts.observer.request(strategy="none", outcome=error.code, seconds=0.0)

    def _models(self, request: Request) -> list[str]:
        visit = self._reception.visit(request, "none", self._parts.keys.caller(request.headers.get("authorization")))
        release = visit.conversation.release
        embedding = [EMBEDDING_MODEL] if release.embeds else []
        return [MODEL_PREFIX + name for name in usable(release.available, visit.caller)] + embedding

    async def _generate(
        self, request: Request, schema: type[ChatRequest | CompletionRequest], id_prefix: str
    ) -> Response:
        visit, body = await self._reception.enter(request, schema)
        ask = body.ask(f"{id_prefix}-{uuid.uuid4().hex}", visit.conversation.release.available, visit.caller)
        events = self._events(visit, ask, body)
        if body.stream:
            return await self._stream(visit, ask, events)
        answer, shapes = await self._answer(visit, ask), self._parts.citation_shapes
        if isinstance(body, ChatRequest):
            content = chat_response(answer, body.model, visit.created, visit.labels, ask.question, shapes)
        else:
            content = completion_response(answer, body.model, visit.created, visit.labels, shapes)
        return json_response(content)

    def _events(self, visit: Visit, ask: Ask, body: GenerationBody) -> StreamEvents:
        visit.strategy, visit.unpaid = ask.strategy, ask
        return StreamEvents(
            request_id=ask.request_id,
            model=body.model,
            created=visit.created,
            question=ask.question,
            labels=visit.labels,
            shapes=self._parts.citation_shapes,
            with_usage=body.wants_usage(),
            chat=isinstance(body, ChatRequest),
        )

    async def _answer(self, visit: Visit, ask: Ask) -> Answer:
        async def work() -> Answer:
            async with self._reception.under_way(visit):
                answer = await visit.conversation.answer(ask)
                self._reception.answered(visit, ask, answer)
                return answer

        return await self._reception.unless_gone(visit, work())

    async def _stream(self, visit: Visit, ask: Ask, events: StreamEvents) -> Response:
        async def run() -> AsyncGenerator[dict[str, Any], None]:
            opening = events.opening()
            async with self._reception.under_way(visit), aclosing(visit.conversation.stream(ask)) as pieces:
                async for piece in pieces:
                    while opening:
                        yield opening.pop()
                    if isinstance(piece, Answer):
                        self._reception.answered(visit, ask, piece)
                        for event in events.ending(piece):
                            yield event
                        continue
                    if not events.written:
                        self._parts.observer.first_token(strategy=visit.strategy, seconds=visit.seconds)
                    yield events.piece(piece)

        source = EventSource(run(), self._parts.keep_alive_s)
        try:
            await self._reception.unless_gone(visit, source.started())
        except BaseException:
            await source.stop()
            raise
        return EventStream(source)
