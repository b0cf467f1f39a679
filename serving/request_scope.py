"""What belongs to one HTTP request: its id, the release that answers it, and the headers that say so on every response.

In: ASGI messages. Out: the same with `x-request-id` and `x-rayft-release`. A caller's own `x-request-id` is sent back
where it is short and plain, so that it can stand in logs; the id of an answer, which feedback names, is always ours.
Not covered: the routes (serving/api.py).
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "x-request-id"
RELEASE = "x-rayft-release"
_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ResponseHeaders:
    """ASGI middleware; puts `request_id` into the request's state, and reads `release` from there."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state["request_id"] = given if _PLAIN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = state["request_id"]
                if release := state.get("release"):
                    headers[RELEASE] = release
            await send(message)

        await self._app(scope, receive, send_with_headers)


def request_id(request: Request) -> str:
    """The id of an HTTP request."""
    return str(request.state.request_id)
