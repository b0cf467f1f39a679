"""How an ingress replica is emptied before the graph is taken down.

In: ASGI requests. Out: the same, counted while they are under way, so that whoever takes the graph down knows when the
last has ended, and can cut off those whose time is up. Not covered: refusing new ones (serving/api.py), who drains, and
how long (serving/service.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

NOT_COUNTED = ("/healthz", "/readyz")


class Gate:
    """One replica's gate; lives on one event loop."""

    def __init__(self) -> None:
        """Open."""
        self.draining = False
        self._under_way: set[asyncio.Task[object]] = set()

    def close(self) -> int:
        """No new request is admitted from now on; returns how many are still under way."""
        self.draining = True
        return len(self._under_way)

    def cut(self) -> int:
        """Cancels what is still under way; returns how many that were."""
        tasks: Iterable[asyncio.Task[object]] = tuple(self._under_way)
        return sum(task.cancel() for task in tasks)

    def enter(self, task: asyncio.Task[object]) -> None:
        """A request begins."""
        self._under_way.add(task)

    def leave(self, task: asyncio.Task[object]) -> None:
        """It has ended."""
        self._under_way.discard(task)


class CountsUnderWay:
    """ASGI middleware that tells the gate about requests; add it outermost."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        """Wraps an application."""
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        task = asyncio.current_task()
        if scope["type"] != "http" or scope["path"] in NOT_COUNTED or task is None:
            await self._app(scope, receive, send)
            return
        self._gate.enter(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave(task)
