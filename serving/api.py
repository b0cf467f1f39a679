"""The HTTP API: OpenAI's chat completions, completions, embeddings and models; search, feedback and health; as a
FastAPI application.

In: `ApiParts`: the release that is current, keys, quotas, limits, feedback, an observer. Out: the application.
A request takes the current release once and keeps it to its end. It is checked before it costs anything: whether the
server drains (503), key (401), content type (415), size (413), body (400, 403, 404), room (429), quota (429), and only
then searched and generated, until its deadline (504). Every error is OpenAI's error object.
Pages of other origins are answered no preflight and bodies must be declared as JSON, so a web site cannot make its
visitors' browsers ask, nor under a name of its own (serving/loopback.py).
User text is logged only with `serve.log_content`.
Not covered: what an answer is (serving/conversation.py), deployments (serving/graph.py), the page (serving/page.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serving.admission import Limits
from serving.api_errors import ApiError
from serving.event_stream import KEEP_ALIVE_S
from serving.handlers import Handlers
from serving.interfaces import ANYBODY, Caller, FeedbackDoor, KeyRing, Observer, PartUnavailableError, Quotas
from serving.openapi import openapi_schema
from serving.request_scope import RequestScope
from serving.responses import error_response, json_response
from serving.telemetry import SilentObserver

if TYPE_CHECKING:
    from serving.conversation import Conversation


class NoKeys:
    """Everybody may ask."""

    required = False

    def caller(self, authorization: str | None) -> Caller:
        """Anybody."""
        return ANYBODY


class NoQuotas:
    """Nobody is counted."""

    async def admit(self, caller: Caller, *, takes_tokens: bool = True) -> None:
        """Admits."""

    def spend(self, caller: Caller, tokens: int) -> None:
        """Forgets."""

    def close(self) -> None:
        """Has nothing to write."""


async def always_ready() -> None:
    """Nothing to wait for."""


@dataclass(frozen=True)
class ApiParts:
    """What the API stands on; everything but the first two has a default for a server that lacks it."""

    current: Callable[[], Conversation]
    """The conversation of the release that is promoted now; called once per request."""
    limits: Limits
    check_ready: Callable[[], Awaitable[None]] = always_ready
    """Returns when every part answers, raises when one does not."""
    refused: Callable[[], str] = lambda: ""
    """The release that is promoted and does not load, so that another one answers; empty: there is none."""
    feedback: FeedbackDoor | None = None
    """None: ratings are answered 503."""
    keys: KeyRing = field(default_factory=NoKeys)
    quotas: Quotas = field(default_factory=NoQuotas)
    observer: Observer = field(default_factory=SilentObserver)
    draining: Callable[[], bool] = lambda: False
    """Whether the server takes no more requests, because it is being taken down."""
    unavailable: tuple[type[Exception], ...] = (PartUnavailableError,)
    """Exceptions that say that a part is gone for now: 503."""
    citation_shapes: Sequence[str] = ()
    """`serve.citation_shapes`."""
    log_content: bool = False
    """`serve.log_content`."""
    behind_serve: bool = False
    """Whether Ray Serve passes requests on, and adds their ids to the responses."""
    keep_alive_s: float = KEEP_ALIVE_S
    """Seconds of silence after which a stream sends a comment."""


def make_api(parts: ApiParts) -> FastAPI:
    """The application. Its schema is at `/openapi.json`; there is no documentation page."""
    api = FastAPI(title="rayft", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    handlers = Handlers(parts)
    for path, handler in (
        ("/v1/chat/completions", handlers.chat),
        ("/v1/completions", handlers.complete),
        ("/v1/embeddings", handlers.embed),
        ("/v1/search", handlers.search),
        ("/v1/feedback", handlers.rate),
    ):
        api.add_api_route(path, handler, methods=["POST"], response_model=None)
    for path, read in (
        ("/v1/models", handlers.models),
        ("/v1/models/{model}", handlers.model),
        ("/healthz", handlers.health),
        ("/readyz", handlers.ready),
    ):
        api.add_api_route(path, read, methods=["GET", "HEAD"], response_model=None)

    async def schema(request: Request) -> Response:
        return json_response(openapi_schema())

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError), "registered for ApiError only"
        handlers.count_refused(request, error)
        return error_response(error)

    api.add_api_route("/openapi.json", schema, methods=["GET"], response_model=None)
    api.exception_handler(ApiError)(refused)
    api.exception_handler(HTTPException)(no_such_route)
    api.add_middleware(RequestScope, behind_serve=parts.behind_serve)
    return api


async def no_such_route(request: Request, error: Exception) -> Response:
    """What no route takes, in OpenAI's shape."""
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    message = {404: "there is no such address here", 405: "this address takes another method"}
    known = ApiError(error.status_code, message.get(error.status_code, error.detail), code="unknown_url")
    response = error_response(known)
    response.headers.update(error.headers or {})
    return response
