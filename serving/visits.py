"""A request on its way through the API, and what every request passes: the door, admission, the deadline, the count.

In: HTTP requests and `ApiParts`. Out: a `Visit` with its checked body; a context for the work that answers it. A client
that closes its connection frees what its request held at once.
Not covered: what each route does (serving/handlers.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from serving.admission import Admission
from serving.api_errors import CLOSED_BY_CLIENT, NOT_READY_RETRY_S, ApiError, api_error
from serving.event_stream import ClientGoneError, unless_client_leaves
from serving.interfaces import Caller, SpanContext
from serving.records import Answer
from serving.request_bodies import Schema, read_body
from serving.request_scope import request_id
from serving.responses import JSON
from serving.tracing import NO_SPAN

if TYPE_CHECKING:
    from serving.api import ApiParts
    from serving.asking import Ask
    from serving.conversation import Conversation
    from training.format import Labels

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Visit:
    """One request on its way: who asks, and the release that answers it from its first hop to its last."""

    http: Request
    caller: Caller
    conversation: Conversation
    strategy: str
    """What metrics count it under."""
    outcome: str = "ok"
    unpaid: Ask | None = None
    """The question that is being answered; none once its answer is charged."""
    span: SpanContext = NO_SPAN
    began: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def labels(self) -> Labels:
        """The prompt format's words for people."""
        return self.conversation.release.prompt_format.texts.labels

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began


class Reception:
    """What every request passes."""

    def __init__(self, parts: ApiParts) -> None:
        """Everything that requests share."""
        self.parts = parts
        self._admission = Admission(parts.limits.max_in_flight, parts.observer.in_flight)
        self._charging: set[asyncio.Task[None]] = set()

    async def enter(self, request: Request, schema: type[Schema], strategy: str = "none") -> tuple[Visit, Schema]:
        """What a POST needs before it can be looked at: a server that takes it, a caller, a body."""
        self.refuse_when_draining()
        caller = self.parts.keys.caller(request.headers.get("authorization"))
        visit = self.visit(request, strategy, caller)
        return visit, read_body(await self._read(request), schema)

    def visit(self, request: Request, strategy: str, caller: Caller) -> Visit:
        """Takes the current release, once."""
        conversation = self.parts.current()
        request.state.release = conversation.release.name
        return Visit(request, caller, conversation, strategy)

    def refuse_when_draining(self) -> None:
        """Raises 503 while the server is being taken down."""
        if self.parts.draining():
            raise ApiError(503, "the server is going down", code="draining", retry_after_s=NOT_READY_RETRY_S)

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too long."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise ApiError(415, f"send the body with Content-Type: {JSON}", code="unsupported_content_type")
        limit = self.parts.limits.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_long")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self.parts.limits.timeout_s):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, "the body did not arrive", code="timeout") from None
        except ClientDisconnect:
            raise client_gone() from None
        return bytes(body)

    async def unless_gone(self, visit: Visit, work: Awaitable[T]) -> T:
        """Waits for `work`, and cancels it when the client leaves."""
        try:
            return await unless_client_leaves(visit.http.receive, work)
        except ClientGoneError:
            raise client_gone() from None

    async def within(self, visit: Visit, work: Awaitable[T]) -> T:
        """Waits for `work` until the deadline, outside of admission."""
        try:
            async with asyncio.timeout(self.parts.limits.timeout_s):
                return await work
        except Exception as error:
            raise self._known(visit, error) from error

    @asynccontextmanager
    async def under_way(self, visit: Visit) -> AsyncIterator[None]:
        """A slot, the quota, the deadline, a span, and the count of how it ended; failures leave as `ApiError`."""
        parts = self.parts
        visit.http.state.counted = True
        parent = visit.http.headers.get("traceparent", "")
        try:
            with self._admission.slot(), parts.observer.span("request", parent) as span:
                visit.span = span
                await parts.quotas.admit(visit.caller)
                async with asyncio.timeout(parts.limits.timeout_s):
                    yield
        except (asyncio.CancelledError, GeneratorExit):
            visit.outcome = "cancelled"
            parts.observer.count("cancelled")
            self._charge_unanswered(visit)
            raise
        except Exception as error:
            known = self._known(visit, error)
            visit.outcome = known.code
            if known.status == 429:
                parts.observer.count("refused")
            if isinstance(error, TimeoutError):
                self._charge_unanswered(visit)
            raise known from error
        finally:
            parts.observer.request(strategy=visit.strategy, outcome=visit.outcome, seconds=visit.seconds)

    def _known(self, visit: Visit, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            limit = self.parts.limits.timeout_s
            return ApiError(504, f"no answer within {limit:g} s", code="deadline_exceeded")
        return api_error(error, request_id(visit.http), self.parts.unavailable)

    def _charge_unanswered(self, visit: Visit) -> None:
        """Charges what a question has taken whose caller left or whose time was up; what fails here costs nothing.
        Nobody waits for it, as prompts are tokenised."""
        if (ask := visit.unpaid) is None:
            return

        async def charge() -> None:
            self.parts.quotas.spend(visit.caller, await visit.conversation.tokens_taken(ask))

        task = asyncio.get_running_loop().create_task(charge())
        self._charging.add(task)  # a loop forgets a task that nobody else holds
        task.add_done_callback(self._charging.discard)

    def answered(self, visit: Visit, ask: Ask, answer: Answer) -> None:
        """Counts, charges and logs an answer."""
        visit.unpaid = None
        visit.strategy = answer.strategy
        visit.outcome = "abstained" if answer.abstained else "cut" if answer.finish_reason == "length" else "ok"
        tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
        self.parts.quotas.spend(visit.caller, tokens)
        visit.span.set(strategy=answer.strategy, release=answer.release, tokens=tokens)
        visit.span.content(question=ask.question, answer=answer.answer)
        logger.info(
            "%s %s release=%s strategy=%s prompt_tokens=%d completion_tokens=%d total_ms=%.0f finish=%s",
            request_id(visit.http),
            answer.request_id,
            answer.release,
            answer.strategy,
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
            answer.timings_ms.total,
            answer.finish_reason,
        )
        if self.parts.log_content:
            logger.info("%s question=%r answer=%r", answer.request_id, ask.question, answer.answer)


def client_gone() -> ApiError:
    """Nobody reads this response; the status is for access logs, as nginx has it."""
    return ApiError(CLOSED_BY_CLIENT, "the client has gone", code="cancelled")
