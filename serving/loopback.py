"""Keeps other web sites out of a server that is open to whoever sits at its machine.

In: ASGI requests to a server that is bound to loopback and asks for no API key. Out: the same, or 403 where the `Host`
is another site's name. A page that a browser has loaded from such a site may have that site's name lead to 127.0.0.1
afterwards (DNS rebinding): the browser then holds this server for the page's own, and lets it ask and read. Addresses
cannot be led elsewhere, so they pass.
Not covered: servers with keys, which no page can guess, and other addresses, whose names are not known here.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api_errors import ApiError
from serving.responses import error_response


class LocalHostsOnly:
    """ASGI middleware: refuses requests to names that are not this machine's own."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or refuses it."""
        if scope["type"] == "http" and not is_local(Headers(scope=scope).get("host", "")):
            await error_response(_refusal())(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_local(host: str) -> bool:
    """Whether a `Host` header names this machine: `localhost`, or an address. None at all passes: browsers send one."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.removesuffix(".")
    if not name or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refusal() -> ApiError:
    return ApiError(
        403,
        "this server asks for no API key, and so answers only on localhost, not under another name; a proxy before it "
        "must send `Host: localhost`, or give the server keys (serve.keys)",
        code="host_not_allowed",
    )
