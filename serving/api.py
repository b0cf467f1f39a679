"""The HTTP API: OpenAI's chat completions, models, search and health, as a FastAPI application.

In: a `Conversation` and the limits. Out: the application. Admission, deadlines, body size and the mapping of every
failure to OpenAI's error object are here. A stream is answered 200 only once its first event is there, so that a
request that cannot be served has its proper status. User text is never logged.
Not covered: what an answer is (serving/conversation.py), deployments (serving/graph.py), API keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from cluster.errors import UserError
from serving.api_errors import ApiError
from serving.conversation import Ask, Conversation, GenerationFailedError
from serving.openai_api import (
    MODEL_PREFIX,
    ChatRequest,
    SearchRequest,
    chat_chunk,
    chat_response,
    details,
    read_body,
    url_citations,
    usage,
)
from serving.records import Answer

logger = logging.getLogger(__name__)

CLOSED_BY_CLIENT = 499
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one ingress takes on."""

    max_in_flight: int
    timeout_s: float
    max_body_bytes: int


class Admission:
    """Counts requests under way, and refuses more than the limit."""

    def __init__(self, limit: int) -> None:
        """`limit` requests at once."""
        self._limit = limit
        self._recent_s = 1.0
        self.in_flight = 0

    @contextlib.contextmanager
    def slot(self) -> Any:
        """Holds a slot.

        Raises:
            ApiError: 429 with the seconds that recent requests took.
        """
        if self.in_flight >= self._limit:
            seconds = max(1, math.ceil(self._recent_s))
            raise ApiError(
                429,
                f"{self.in_flight} requests are under way, which is this server's limit; try again in {seconds} s",
                code="overloaded",
                retry_after_s=seconds,
            )
        self.in_flight += 1
        began = time.perf_counter()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._recent_s += 0.2 * (time.perf_counter() - began - self._recent_s)


def make_api(
    conversation: Conversation,
    limits: Limits,
    check_ready: Callable[[], Awaitable[None]],
    unavailable: tuple[type[Exception], ...] = (),
) -> FastAPI:
    """The application.

    Args:
        conversation: Answers.
        limits: What is taken on.
        check_ready: Returns when every part answers, raises when one does not.
        unavailable: Exceptions that say that a part is gone for now: 503.
    """
    api = FastAPI(title="rayft", docs_url=None, redoc_url=None)
    handlers = _Handlers(conversation, limits, check_ready, unavailable)
    api.post("/v1/chat/completions")(handlers.chat)
    api.post("/v1/search")(handlers.search)
    api.get("/v1/models")(handlers.models)
    api.get("/v1/models/{model}")(handlers.model)
    api.get("/healthz")(handlers.health)
    api.get("/readyz")(handlers.ready)
    api.exception_handler(ApiError)(_error_response)
    api.exception_handler(HTTPException)(_unknown_route)
    return api


class _Handlers:
    def __init__(
        self,
        conversation: Conversation,
        limits: Limits,
        check_ready: Callable[[], Awaitable[None]],
        unavailable: tuple[type[Exception], ...],
    ) -> None:
        self._conversation = conversation
        self._limits = limits
        self._check_ready = check_ready
        self._unavailable = unavailable
        self._admission = Admission(limits.max_in_flight)
        self._created = int(time.time())

    async def chat(self, request: Request) -> Any:
        body = read_body(await self._read(request), ChatRequest)
        ask = body.ask(f"chatcmpl-{uuid.uuid4().hex}", self._conversation.release.available)
        if body.stream:
            events = self._events(body, ask)
            first = await anext(events)  # raises what the request deserves, before a status has been sent
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        with self._admission.slot():
            answer = await self._within(ask.request_id, self._conversation.answer(ask))
        _log(ask, answer)
        labels = self._conversation.release.prompt_format.texts.labels
        return JSONResponse(chat_response(answer, body.model, int(time.time()), labels))

    async def search(self, request: Request) -> Any:
        body = read_body(await self._read(request), SearchRequest)
        known = self._conversation.release.passages
        if body.k > known:
            raise ApiError(400, f"k: the index has {known} passages", code="invalid_value", param="k")
        with self._admission.slot():
            hits = await self._within("search", self._conversation.search(body.query, body.k))
        data = [{"rank": h.rank, "score": h.score, **h.passage.to_row(), "metadata": h.passage.metadata} for h in hits]
        return JSONResponse({"object": "list", "data": data, "release": self._conversation.release.name})

    async def models(self) -> Any:
        return JSONResponse({"object": "list", "data": [self._model(n) for n in self._conversation.release.available]})

    async def model(self, model: str) -> Any:
        name = model.removeprefix(MODEL_PREFIX)
        if name not in self._conversation.release.available:
            raise ApiError(404, "model: there is no such model", code="model_not_found", param="model")
        return JSONResponse(self._model(name))

    async def health(self) -> Any:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Any:
        await self._within("readiness", self._check_ready())
        return JSONResponse({"status": "ready", "release": self._conversation.release.name})

    def _model(self, strategy: str) -> dict[str, Any]:
        return {"id": MODEL_PREFIX + strategy, "object": "model", "created": self._created, "owned_by": "rayft"}

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too long."""
        limit = self._limits.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise too_long
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_long
        return bytes(body)

    async def _within(self, request_id: str, work: Awaitable[T], deadline: float | None = None) -> T:
        """Waits for `work` until the deadline, and turns every failure into an `ApiError`."""
        limit = self._limits.timeout_s
        try:
            async with asyncio.timeout(limit if deadline is None else max(0.0, deadline - time.perf_counter())):
                return await work
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {limit:g} s", code="deadline_exceeded") from error
        except GenerationFailedError as error:
            raise _generation_error(error) from error
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_request") from error
        except self._unavailable as error:
            logger.warning("%s: a part of the graph is unavailable: %s", request_id, type(error).__name__)
            raise ApiError(503, "a part of the server is not ready", code="not_ready", retry_after_s=5) from error
        except StopAsyncIteration:
            raise
        except Exception as error:
            # Frames without the message, which may hold the user's text.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s failed: %s\n%s", request_id, type(error).__name__, where)
            raise ApiError(500, "internal error", code="internal_error") from error

    async def _events(self, body: ChatRequest, ask: Ask) -> AsyncGenerator[str, None]:
        """Server-sent events of one stream; an error before the first one is raised, a later one is an event."""
        deadline = time.perf_counter() + self._limits.timeout_s
        created = int(time.time())
        written = ""
        started = False

        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
            return chat_chunk(ask.request_id, body.model, created, delta, finish_reason)

        with self._admission.slot():
            async with contextlib.aclosing(self._conversation.stream(ask)) as pieces:
                while True:
                    try:
                        piece = await self._within(ask.request_id, anext(pieces), deadline)
                    except StopAsyncIteration:
                        break
                    except ApiError as error:
                        if not started:
                            raise
                        yield _event(error.body())
                        break
                    if not started:
                        started = True
                        yield _event(chunk({"role": "assistant", "content": ""}))
                    if isinstance(piece, str):
                        written += piece
                        yield _event(chunk({"content": piece}))
                        continue
                    _log(ask, piece)
                    last = chunk({"annotations": url_citations(piece, written)}, piece.finish_reason)
                    yield _event({**last, "rayft": details(piece)})
                    if body.stream_options and body.stream_options.include_usage:
                        yield _event({**chunk({}), "choices": [], "usage": usage(piece)})
        yield "data: [DONE]\n\n"


async def _chain(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _generation_error(error: GenerationFailedError) -> ApiError:
    code, text = error.completion.error_code, error.completion.error
    if code == "context_length_exceeded":
        return ApiError(400, text, code=code, param="messages")
    if code == "unknown_adapter":
        return ApiError(400, text, code=code, param="model")
    if code == "cancelled":
        return ApiError(CLOSED_BY_CLIENT, text, code=code)
    if code == "closed":
        return ApiError(503, text, code="not_ready", retry_after_s=5)
    return ApiError(500, "generation failed", code="internal_error")


async def _error_response(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError), "registered for ApiError only"
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _unknown_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    known = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code="unknown_url")
    return JSONResponse(known.body(), status_code=error.status_code, headers=error.headers)


def _log(ask: Ask, answer: Answer) -> None:
    logger.info(
        "%s strategy=%s prompt_tokens=%d completion_tokens=%d total_ms=%.0f finish=%s",
        ask.request_id,
        answer.strategy,
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.timings_ms.total,
        answer.finish_reason,
    )
