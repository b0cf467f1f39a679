"""What belongs to one HTTP request: its id, the release that answers it, and the headers that say so on every response.

In: ASGI messages. Out: the same with `x-request-id` and `x-rayft-release`; an error that nobody expected leaves as a
plain 500 and is logged without its message, which may hold the user's text. A caller's own `x-request-id` is sent back
where it is short and plain, so that it can stand in logs; the id of an answer, which feedback names, is always ours.
Ray Serve adds the header to every response itself, with the caller's own value whatever it holds, or one that it made:
behind it, only an id that differs is sent, which stands beside Serve's.
Not covered: the routes (serving/api.py).
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api_errors import api_error
from serving.responses import error_response

REQUEST_ID = "x-request-id"
RELEASE = "x-rayft-release"
_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RequestScope:
    """ASGI middleware; puts `request_id` into the request's state, and reads `release` from there."""

    def __init__(self, app: ASGIApp, *, behind_serve: bool = False) -> None:
        """Wraps an application; `behind_serve`: Ray Serve adds the request's own id to the response."""
        self._app = app
        self._behind_serve = behind_serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A dict of its own: the server shares one between requests.
        state = scope["state"] = dict(scope.get("state", {}))
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state["request_id"] = given if _PLAIN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                if not (self._behind_serve and state["request_id"] == given):
                    headers[REQUEST_ID] = state["request_id"]
                if release := state.get("release"):
                    headers[RELEASE] = release
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - logged by its type and place
            known = api_error(error, state["request_id"], ())
            if started:
                raise RuntimeError("the response broke off") from None
            await error_response(known)(scope, receive, send_with_headers)


def request_id(request: Request) -> str:
    """The id of an HTTP request."""
    return str(request.state.request_id)
