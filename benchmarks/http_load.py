"""A closed-loop load generator over HTTP: so many clients, each asking its next question when the last is answered.

In: a base URL, request bodies, the number of clients. Out: one `Reply` per request, in the order of their end.
Not covered: what is asked, what it means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Reply:
    """One request: HTTP status, seconds from sending to the whole answer, its JSON."""

    status: int
    seconds: float
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return int(self.body.get("usage", {}).get("completion_tokens", 0))


@dataclass(frozen=True)
class Load:
    """All replies of one run and its seconds."""

    replies: list[Reply]
    seconds: float

    @property
    def answered(self) -> list[Reply]:
        """Those that were answered 200."""
        return [reply for reply in self.replies if reply.status == 200]

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens of all answers over the whole run."""
        return sum(reply.tokens for reply in self.answered) / self.seconds


def run_load(url: str, bodies: Sequence[dict[str, Any]], clients: int, pause_s: float = 0.0) -> Load:
    """Sends all bodies by so many clients; `pause_s` is what a client waits after a reply other than 200."""
    return asyncio.run(_run(url, bodies, clients, pause_s))


async def _run(url: str, bodies: Sequence[dict[str, Any]], clients: int, pause_s: float) -> Load:
    waiting = list(reversed(bodies))
    replies: list[Reply] = []
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            body, began = waiting.pop(), time.perf_counter()
            async with session.post(url, json=body) as response:
                content = await response.json(content_type=None)
                replies.append(Reply(response.status, time.perf_counter() - began, content))
            if replies[-1].status != 200 and pause_s:
                await asyncio.sleep(pause_s)

    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(session))
    return Load(replies, time.perf_counter() - began)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
