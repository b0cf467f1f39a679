"""Server-sent events: a stream whose status is decided by its first event, and whose reader may leave at any time.

In: an async generator of JSON-ready objects. Out: an ASGI response. One task runs the generator from its start to its
end, so that spans and slots that it holds open and close in one context; what it has ready is sent together. While
nothing comes, a comment is sent every `KEEP_ALIVE_S`, because proxies close idle connections (nginx after 60 s).
A reader that leaves cancels the task at once. A stream that ended well ends in `[DONE]`; one that broke ends in an
error event and has none, so that a client can tell a short answer from a whole one.
Not covered: what the events say (serving/chat_shapes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api_errors import ApiError, api_error
from serving.responses import json_bytes

KEEP_ALIVE_S = 15.0
_COMMENT = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was there."""


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """Waits for `work`, and cancels it at once when the client closes the connection. The body must have been read.

    Raises:
        ClientGoneError: The client has gone.
    """
    running = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        leaving.result()
        raise ClientGoneError
    finally:
        for task in (leaving, running):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventSource:
    """Runs a generator of events in a task of its own."""

    def __init__(self, events: AsyncGenerator[Mapping[str, Any], None], keep_alive_s: float = KEEP_ALIVE_S) -> None:
        """Starts it. `events` raises `ApiError`; anything else is our fault, and ends the stream as such."""
        self._keep_alive_s = keep_alive_s
        self._first: list[bytes | ApiError | None] = []
        self._ready: asyncio.Queue[bytes | ApiError | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(events))

    async def started(self) -> None:
        """Returns when there is a first event, or after `keep_alive_s` without one: a proxy must hear something.

        Raises:
            ApiError: There is an error instead: it decides the status.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._keep_alive_s):
                self._first = [await self._ready.get()]
        if self._first and isinstance(self._first[0], ApiError):
            raise self._first[0]

    async def parts(self) -> AsyncIterator[bytes]:
        """The stream, in parts ready to be sent."""
        items, self._first = self._first, []
        if not items:
            yield _COMMENT
        while True:
            if items:
                yield b"".join(map(_written, items))
                if not isinstance(items[-1], bytes):
                    return
            items = []
            try:
                async with asyncio.timeout(self._keep_alive_s):
                    items.append(await self._ready.get())
            except TimeoutError:
                yield _COMMENT
            while not self._ready.empty():
                items.append(self._ready.get_nowait())

    async def stop(self) -> None:
        """Cancels the generator if it still runs, and waits until it has let go of what it held."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, events: AsyncGenerator[Mapping[str, Any], None]) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._ready.put_nowait(_event(event))
        except ApiError as error:
            self._ready.put_nowait(error)
        except Exception as error:  # noqa: BLE001 - logged by its type; a reader would wait for ever for an end
            self._ready.put_nowait(api_error(error, "a stream", ()))
        else:
            self._ready.put_nowait(None)


class EventStream(Response):
    """Sends an `EventSource`."""

    media_type = "text/event-stream"

    def __init__(self, source: EventSource) -> None:
        """`source` has started."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it until its end, or until the client leaves."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_client_leaves(receive, self._send(send))
        except (ClientGoneError, OSError):
            pass  # the source is told below, and counts it
        finally:
            await self._source.stop()

    async def _send(self, send: Send) -> None:
        async for part in self._source.parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


def _written(item: bytes | ApiError | None) -> bytes:
    return item if isinstance(item, bytes) else _DONE if item is None else _event(item.body())
