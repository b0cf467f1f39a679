"""Quotas per API key: requests per minute and tokens per day.

In: callers before their request, tokens after their answer. Out: nothing, or 429 with the seconds after which the
same request is let in. Requests are counted in a sliding minute, so the quota holds over every minute and not only
from one full minute to the next; what is refused is not counted. Tokens are counted per day (UTC) once an answer is
there, so requests that are under way when the quota ends go on; where its caller leaves or its time is up, what it has
taken until then (serving/visits.py).
A key without a quota asks nobody. With one ingress replica the counts are in its process; several share one ledger,
the deployment `quotas`, which costs one hop. While that cannot be reached requests are let in: a quota bounds cost,
not access, the limit on requests at once still holds, and Serve replaces the ledger within seconds.
Not covered: the counts across restarts (serving/token_use.py), requests at once (serving/api.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from serving.api_errors import ApiError
from serving.config import TenantConfig
from serving.interfaces import Caller, FeedbackUnavailableError

if TYPE_CHECKING:
    from serving.token_use import TokenUse

logger = logging.getLogger(__name__)

MINUTE_S = 60.0
DAY_S = 86_400
LEDGER_TIMEOUT_S = 1.0
"""Longest wait for the shared ledger, which answers in milliseconds."""
SAVE_EVERY_S = 5.0
COMPLAIN_EVERY_S = 60.0


@dataclass(frozen=True)
class Refusal:
    """A request beyond the quota; `retry_after_s` is exact for a caller that sends nothing meanwhile."""

    quota: Literal["requests_per_minute", "tokens_per_day"]
    retry_after_s: float


class Ledger(Protocol):
    """Counts by key."""

    async def take(self, key_id: str, requests_per_minute: int | None, tokens_per_day: int | None) -> Refusal | None:
        """Counts one request, or says why not."""
        ...

    async def spend(self, key_id: str, tokens: int) -> None:
        """Counts tokens."""
        ...

    def close(self) -> None:
        """Writes what is not written yet; on shutdown."""
        ...


class QuotaLedger:
    """The counts themselves, in one process and on one event loop.

    Tokens are kept across restarts where there is a `store`: written every few seconds, so a crash forgets at most
    the last of them. Requests of the last minute are not.
    """

    def __init__(self, store: TokenUse | None = None, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970."""
        self._clock = clock
        self._requests: dict[str, deque[float]] = {}
        self._store = store
        self._day = self._today()
        self._tokens: dict[str, int] = store.load(self._day) if store else {}
        self._unsaved: dict[str, int] = {}
        self._saver: asyncio.Task[None] | None = None

    async def take(self, key_id: str, requests_per_minute: int | None, tokens_per_day: int | None) -> Refusal | None:
        """Counts one request, or says why not."""
        now = self._clock()
        if tokens_per_day is not None:
            self._turn_day()
            if self._tokens.get(key_id, 0) >= tokens_per_day:
                return Refusal("tokens_per_day", (self._day + 1) * DAY_S - now)
        if requests_per_minute is not None:
            recent = self._requests.setdefault(key_id, deque())
            while recent and recent[0] <= now - MINUTE_S:
                recent.popleft()
            if len(recent) >= requests_per_minute:
                return Refusal("requests_per_minute", recent[-requests_per_minute] + MINUTE_S - now)
            recent.append(now)
        return None

    async def spend(self, key_id: str, tokens: int) -> None:
        """Counts tokens."""
        self._turn_day()
        self._tokens[key_id] = self._tokens.get(key_id, 0) + tokens
        if self._store is None:
            return
        self._unsaved[key_id] = self._unsaved.get(key_id, 0) + tokens
        if self._saver is None or self._saver.done():
            self._saver = asyncio.create_task(self._save_soon())

    async def save(self) -> None:
        """Writes what is not written yet; what cannot be is kept for the next time."""
        if self._store is None or not self._unsaved:
            return
        day, more, self._unsaved = self._day, self._unsaved, {}
        try:
            await asyncio.to_thread(self._store.add, day, more)
        except Exception as error:  # noqa: BLE001 - counts go on without a database, and it is said
            logger.warning("token counts are not saved: %s", error)
            if day == self._day:
                for key_id, tokens in more.items():
                    self._unsaved[key_id] = self._unsaved.get(key_id, 0) + tokens

    def close(self) -> None:
        """Writes what is not written yet and ends the store's connections; on shutdown."""
        if self._store is None:
            return
        more, self._unsaved = self._unsaved, {}
        try:
            if more:
                self._store.add(self._day, more)
        except FeedbackUnavailableError as error:
            logger.warning("token counts are not saved: %s", error)
        self._store.close()
        self._store = None

    async def _save_soon(self) -> None:
        await asyncio.sleep(SAVE_EVERY_S)
        await self.save()

    def _today(self) -> int:
        return int(self._clock() // DAY_S)

    def _turn_day(self) -> None:
        if (today := self._today()) != self._day:
            self._day = today
            self._tokens.clear()
            self._unsaved.clear()  # yesterday's, which no quota asks for any more


def open_ledger(url: str, recipe: str) -> QuotaLedger:
    """A ledger that keeps tokens in the feedback database; in memory where there is none or it cannot be reached.

    Args:
        url: The recipe's `feedback.url`; may be empty.
        recipe: The recipe's name.

    Raises:
        UserError: The URL is none that feedback could use.
    """
    from serving.token_use import TokenUse

    if not url:
        return QuotaLedger()
    try:
        return QuotaLedger(TokenUse(url, recipe))
    except FeedbackUnavailableError as error:
        logger.warning("tokens per day are counted in memory only: %s", error)
        return QuotaLedger()


class QuotaReplica:
    """The ledger as the deployment `quotas`, one replica."""

    def __init__(self, url: str, recipe: str) -> None:
        """As `open_ledger`."""
        self._ledger = open_ledger(url, recipe)

    async def take(self, key_id: str, requests_per_minute: int | None, tokens_per_day: int | None) -> Refusal | None:
        """Counts one request, or says why not."""
        return await self._ledger.take(key_id, requests_per_minute, tokens_per_day)

    async def spend(self, key_id: str, tokens: int) -> None:
        """Counts tokens."""
        await self._ledger.spend(key_id, tokens)

    def __del__(self) -> None:
        if hasattr(self, "_ledger"):
            self._ledger.close()


class HandleLedger:
    """The ledger in the deployment `quotas`."""

    def __init__(self, handle: Any) -> None:
        """A Serve handle of a deployment with the methods of `QuotaLedger`."""
        self._handle = handle

    async def take(self, key_id: str, requests_per_minute: int | None, tokens_per_day: int | None) -> Refusal | None:
        """Counts one request, or says why not."""
        refusal: Refusal | None = await self._handle.take.remote(key_id, requests_per_minute, tokens_per_day)
        return refusal

    async def spend(self, key_id: str, tokens: int) -> None:
        """Counts tokens."""
        await self._handle.spend.remote(key_id, tokens)

    def close(self) -> None:
        """The deployment writes its counts itself."""


class KeyQuotas:
    """The server's `Quotas`."""

    def __init__(self, tenants: Mapping[str, TenantConfig], ledger: Ledger) -> None:
        """The quotas of `serve.tenants`, counted by `ledger`."""
        self._limits = {name: (t.requests_per_minute, t.tokens_per_day) for name, t in tenants.items()}
        self._ledger = ledger
        self._spending: set[asyncio.Task[None]] = set()
        self._complained = -math.inf

    async def admit(self, caller: Caller, *, takes_tokens: bool = True) -> None:
        """Counts one request; one that takes no tokens is let in when those of the day are used up.

        Raises:
            ApiError: 429 with Retry-After when the quota is used up.
        """
        per_minute, per_day = self._limits.get(caller.tenant, (None, None))
        per_day = per_day if takes_tokens else None
        if not caller.key_id or (per_minute is None and per_day is None):
            return
        try:
            async with asyncio.timeout(LEDGER_TIMEOUT_S):
                refusal = await self._ledger.take(caller.key_id, per_minute, per_day)
        except Exception as error:  # noqa: BLE001 - whatever keeps the ledger from answering; see the module's docstring
            self._complain(error)
            return
        if refusal is not None:
            raise _error(refusal, per_minute, per_day)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Counts tokens after an answer; at once."""
        _, per_day = self._limits.get(caller.tenant, (None, None))
        if not caller.key_id or per_day is None or tokens <= 0:
            return
        task = asyncio.get_running_loop().create_task(self._spend(caller.key_id, tokens))
        self._spending.add(task)  # a loop forgets a task that nobody else holds
        task.add_done_callback(self._spending.discard)

    def close(self) -> None:
        """Has the ledger write what it has not written yet; on shutdown."""
        self._ledger.close()

    async def _spend(self, key_id: str, tokens: int) -> None:
        try:
            async with asyncio.timeout(10 * LEDGER_TIMEOUT_S):
                await self._ledger.spend(key_id, tokens)
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_EVERY_S:
            self._complained = now
            logger.warning("quotas cannot be counted, requests are let in: %s", type(error).__name__)


def _error(refusal: Refusal, per_minute: int | None, per_day: int | None) -> ApiError:
    seconds = max(1, math.ceil(refusal.retry_after_s))
    if refusal.quota == "requests_per_minute":
        text, code = f"this key may ask {per_minute} times a minute", "rate_limit_exceeded"
    else:
        text, code = f"this key may use {per_day} tokens a day (UTC), and has", "insufficient_quota"
    return ApiError(429, f"{text}; try again in {seconds} s", code=code, retry_after_s=seconds)


def has_quotas(tenants: Mapping[str, TenantConfig]) -> bool:
    """Whether anything has to be counted."""
    return any(t.requests_per_minute is not None or t.tokens_per_day is not None for t in tenants.values())
