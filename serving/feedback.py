"""Feedback in the graph: the desk, where answers wait in memory for their rating, and ingress's door to it.

In: answers as they are given, ratings of them. Out: ratings in the store, durable before they are acknowledged, and
counts per intent and strategy. The desk is plain Python for one deployment of one replica; its database may be away
and come back. The door never blocks: noting an answer and asking for counts return at once, whatever the desk does.
What waits in memory is lost with the desk: its rating is then refused as unknown, never silently dropped.
Not covered: the database (serving/feedback_store.py), the HTTP endpoint (serving/api.py), deployments
(serving/graph.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cluster.errors import UserError
from cluster.progress import complain
from serving.config import ServingRecipe
from serving.feedback_schema import parse_url
from serving.feedback_store import DAY_S, MAX_COMMENT_CHARS, MAX_CORRECTION_CHARS, FeedbackStore, Selection
from serving.interfaces import Caller, FeedbackDoor, FeedbackOffError, FeedbackUnavailableError, UnknownRequestError
from serving.records import Interaction, Rating, Tally

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = 20_000
MAX_WAITING_CHARS = 64_000_000
OVERHEAD_CHARS = 500
"""What an answer takes in memory beside its texts."""
MAX_PENDING = 2_000
RETENTION_EVERY_S = 3600.0
FORGET_EVERY_S = 5.0
RETRY_S = 2.0
REFRESH_S = 3.0


@dataclass(frozen=True)
class DeskSettings:
    """What a desk needs to know; it pickles, and holds no password."""

    url: str
    recipe: str
    rating_window_s: float = 3600
    keep_unrated: bool = False
    retention_days: int | None = None
    max_waiting: int = MAX_WAITING
    """Most answers that wait; one more drops the oldest."""
    max_waiting_chars: int = MAX_WAITING_CHARS
    """Most characters that they hold together."""

    @classmethod
    def of(cls, recipe: ServingRecipe) -> DeskSettings:
        """The recipe's, the path of an SQLite file made absolute: a replica has another working directory.

        Raises:
            UserError: `feedback.url` is none.
        """
        own = recipe.feedback
        url = parse_url(own.url).render_as_string(hide_password=False)
        return cls(url, recipe.name, own.rating_window_s, own.keep_unrated, own.retention_days)


def check_feedback(recipe: ServingRecipe) -> bool:
    """Looks at the database before a graph is started; returns whether feedback is taken at all.

    A database that cannot be reached now is only warned of: ratings are answered 503 until it is back.

    Raises:
        UserError: A URL that is not supported, or tables of a newer rayft.
    """
    if not recipe.feedback.url:
        return False
    settings = DeskSettings.of(recipe)
    try:
        FeedbackStore.open(settings.url, settings.recipe).close()
    except FeedbackUnavailableError as error:
        complain(f"serve: {error}; answers are given, ratings are answered 503 until it can be reached")
    return True


@dataclass(frozen=True)
class Outcome:
    """What became of a rating; returned rather than raised, because it crosses processes."""

    state: Literal["stored", "unknown", "unavailable", "refused"]
    reason: str = ""


class FeedbackDesk:
    """Keeps answers for their rating, and owns the store. All methods run on one event loop; the database is spoken to
    in threads, one write at a time, so that of two ratings the later one counts."""

    def __init__(self, settings: DeskSettings, clock: Callable[[], float] = time.time) -> None:
        """The database is opened at the first need, and again whenever that failed."""
        self._settings = settings
        self._clock = clock
        self._waiting: OrderedDict[str, Interaction] = OrderedDict()
        self._chars = 0
        self._store: FeedbackStore | None = None
        self._refused: FeedbackUnavailableError | None = None
        self._try_again = 0.0
        self._lock = asyncio.Lock()
        self._tallies: tuple[Tally, ...] = ()
        self._forgot_at = 0.0
        self._retained_at = -RETENTION_EVERY_S
        self.dropped = 0
        """Answers that were dropped unrated for want of room."""

    async def note(self, interactions: Sequence[Interaction]) -> None:
        """Keeps answers until they are rated or the window ends."""
        for interaction in interactions:
            self._forget(interaction.request_id)
            self._waiting[interaction.request_id] = interaction
            self._chars += _size(interaction)
        self._drop_old()
        if self._settings.keep_unrated:
            try:
                await self._in_store(lambda store: store.keep(interactions))
            except FeedbackUnavailableError as error:
                logger.warning("%d unrated answers are not kept: %s", len(interactions), error)

    async def rate(self, rating: Rating, caller: Caller) -> Outcome:
        """Stores a rating; `stored` says that it is on the disk."""
        if reason := _fault(rating):
            return Outcome("refused", reason)
        interaction = self._waiting.get(rating.request_id)
        own = (caller.tenant, caller.key_id)
        if interaction is not None and (interaction.tenant, interaction.key_id) != own:
            return Outcome("unknown")
        now = self._clock()
        since = now - self._settings.rating_window_s
        if interaction is not None and interaction.at < since:
            interaction = None
        try:
            if interaction is None:
                stored = await self._in_store(
                    lambda store: store.rate_stored(rating, tenant=own[0], key_id=own[1], since=since, now=now)
                )
            else:
                waiting = interaction
                stored = await self._in_store(lambda store: store.rate(waiting, rating, now))
        except FeedbackUnavailableError as error:
            logger.warning("a rating was not stored: %s", error)
            return Outcome("unavailable", str(error))
        self._forget(rating.request_id)
        return Outcome("stored" if stored else "unknown")

    async def tallies(self) -> tuple[Tally, ...]:
        """Counts per intent and strategy; the last known ones while the database is away."""
        try:
            self._tallies = tuple(await self._in_store(lambda store: store.tallies(), write=False))
        except FeedbackUnavailableError as error:
            logger.warning("counts of ratings are not renewed: %s", error)
        return self._tallies

    async def forget(self, selection: Selection) -> int:
        """Deletes what is meant from memory and from the store; returns how many answers that were.

        Raises:
            FeedbackUnavailableError: The database cannot be reached; memory is cleared all the same.
        """
        meant = [request_id for request_id, one in self._waiting.items() if selection.covers(one)]
        for request_id in meant:
            self._forget(request_id)
        stored = await self._in_store(lambda store: store.delete(selection))
        return stored if self._settings.keep_unrated else stored + len(meant)

    async def check_health(self) -> None:
        """Called by Serve every few seconds; tidies up, and never fails because the database is away."""
        self._drop_old()
        try:
            if self._waiting and self._clock() - self._forgot_at >= FORGET_EVERY_S:
                await self._forget_deleted()
            days = self._settings.retention_days
            if days and time.monotonic() - self._retained_at >= RETENTION_EVERY_S:
                before = self._clock() - days * DAY_S
                deleted = await self._in_store(lambda store: store.delete(Selection(before=before)))
                self._retained_at = time.monotonic()
                logger.info("feedback: %d entries were older than %d days and are deleted", deleted, days)
        except FeedbackUnavailableError as error:
            logger.warning("feedback is not tidied up: %s", error)

    async def waiting(self) -> int:
        """Answers that wait for a rating."""
        self._drop_old()
        return len(self._waiting)

    async def _forget_deleted(self) -> None:
        """Another process may have deleted (`rayft feedback delete`) what is still in memory here."""
        waiting = list(self._waiting.values())
        deleted = await self._in_store(lambda store: store.is_forgotten(waiting), write=False)
        for interaction, gone in zip(waiting, deleted, strict=True):
            if gone:
                self._forget(interaction.request_id)
        self._forgot_at = self._clock()

    def _forget(self, request_id: str) -> None:
        interaction = self._waiting.pop(request_id, None)
        if interaction is not None:
            self._chars -= _size(interaction)

    def _drop_old(self) -> None:
        """Answers come in the order of time, but for seconds: the first is the oldest."""
        since = self._clock() - self._settings.rating_window_s
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            full = len(self._waiting) > self._settings.max_waiting or self._chars > self._settings.max_waiting_chars
            if not full and oldest.at >= since:
                return
            self.dropped += oldest.at >= since
            self._forget(oldest.request_id)

    async def _in_store(self, work: Callable[[FeedbackStore], T], *, write: bool = True) -> T:
        if not write:
            return await asyncio.to_thread(work, await self._opened())
        async with self._lock:
            return await asyncio.to_thread(work, await self._opened(locked=True))

    async def _opened(self, *, locked: bool = False) -> FeedbackStore:
        """The store; a database that was away is tried again after a while, not by every request."""
        if self._store is not None:
            return self._store
        if not locked:
            async with self._lock:
                return await self._opened(locked=True)
        if self._refused is not None and time.monotonic() < self._try_again:
            raise self._refused
        try:
            self._store = await asyncio.to_thread(FeedbackStore.open, self._settings.url, self._settings.recipe)
        except FeedbackUnavailableError as error:
            self._refused, self._try_again = error, time.monotonic() + RETRY_S
            raise
        except UserError as error:
            self._refused, self._try_again = FeedbackUnavailableError(str(error)), time.monotonic() + RETRY_S
            raise self._refused from None
        return self._store


def _size(interaction: Interaction) -> int:
    texts = (interaction.question, interaction.answer, *interaction.quotes, *interaction.doc_ids)
    return OVERHEAD_CHARS + sum(map(len, texts))


def _fault(rating: Rating) -> str:
    """Why a rating cannot be taken, or ""."""
    if not 0 <= rating.satisfied <= 1:  # not a number is neither
        return f"satisfied: {rating.satisfied} is not between 0 and 1"
    for name, limit in (("correction", MAX_CORRECTION_CHARS), ("comment", MAX_COMMENT_CHARS)):
        if (length := len(getattr(rating, name))) > limit:
            return f"{name}: {length} characters; the most is {limit}"
    return ""


Call = Callable[..., Awaitable[Any]]
"""Calls a desk's method by its name, with arguments."""


def desk_of_handle(handle: Any) -> Call:
    """Reaches a desk through a Ray Serve deployment handle (or any object whose methods have `.remote`)."""

    async def call(method: str, *arguments: Any) -> Any:
        return await getattr(handle, method).remote(*arguments)

    return call


def desk_of(desk: FeedbackDesk) -> Call:
    """Reaches a desk in this process."""

    async def call(method: str, *arguments: Any) -> Any:
        return await getattr(desk, method)(*arguments)

    return call


class DeskDoor:
    """Ingress's way to the desk. Lives on one event loop."""

    def __init__(self, call: Call, refresh_s: float = REFRESH_S) -> None:
        """`call` reaches the desk; counts are asked for anew when they are older than `refresh_s` seconds."""
        self._call = call
        self._refresh_s = refresh_s
        self._pending: deque[Interaction] = deque(maxlen=MAX_PENDING)
        self._sender: asyncio.Task[None] | None = None
        self._refresher: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._tallies: Sequence[Tally] = ()
        self.lost = 0
        """Answers that did not reach the desk, and cannot be rated."""

    def note(self, interaction: Interaction) -> None:
        """Sends an answer to the desk; what is noted meanwhile goes together next."""
        self.lost += len(self._pending) == MAX_PENDING
        self._pending.append(interaction)
        self._sender = _started(self._sender, self._send)

    async def rate(self, rating: Rating, caller: Caller) -> None:
        """See `serving.interfaces.FeedbackDoor`."""
        if self._sender is not None and not self._sender.done():
            await asyncio.wait([self._sender])  # the answer may be on its way
        try:
            outcome: Outcome = await self._call("rate", rating, caller)
        except Exception as error:  # noqa: BLE001 - whatever befell the desk, the rating is not stored
            logger.warning("the feedback desk is away: %s", type(error).__name__)
            raise FeedbackUnavailableError("feedback cannot be stored now") from None
        if outcome.state == "unknown":
            raise UnknownRequestError(rating.request_id)
        if outcome.state == "unavailable":
            raise FeedbackUnavailableError(outcome.reason)
        if outcome.state == "refused":
            raise UserError(outcome.reason)

    def tallies(self) -> Sequence[Tally]:
        """The newest known counts; asks for newer ones in the background where these are old."""
        if time.monotonic() - self._refreshed_at >= self._refresh_s:
            self._refresher = _started(self._refresher, self._refresh)
        return self._tallies

    async def _send(self) -> None:
        while self._pending:
            batch = list(self._pending)
            self._pending.clear()
            try:
                await self._call("note", batch)
            except Exception as error:  # noqa: BLE001 - counted; an answer without feedback is still an answer
                self.lost += len(batch)
                logger.warning("%d answers cannot be rated: the desk is away (%s)", len(batch), type(error).__name__)

    async def _refresh(self) -> None:
        try:
            self._tallies = tuple(await self._call("tallies"))
        except Exception as error:  # noqa: BLE001 - the last known counts are good enough
            logger.warning("counts of ratings are not renewed: %s", type(error).__name__)
        self._refreshed_at = time.monotonic()


def _started(task: asyncio.Task[None] | None, work: Callable[[], Any]) -> asyncio.Task[None] | None:
    """The task that does `work`, started unless it is under way; None where no event loop runs."""
    if task is not None and not task.done():
        return task
    try:
        return asyncio.get_running_loop().create_task(work())
    except RuntimeError:
        return None


class NoFeedback:
    """The door where `feedback.url` is empty."""

    def note(self, interaction: Interaction) -> None:
        """Forgets it."""

    async def rate(self, rating: Rating, caller: Caller) -> None:
        """Refuses it: FeedbackOffError."""
        raise FeedbackOffError("this server takes no feedback (feedback.url is empty)")

    def tallies(self) -> Sequence[Tally]:
        """None."""
        return ()


def open_door(call: Call | None) -> FeedbackDoor:
    """The door to a desk, or to none."""
    return NoFeedback() if call is None else DeskDoor(call)
