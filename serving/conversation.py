"""One question through the graph: route, retrieve, generate, answer. Plain asyncio, no Ray and no HTTP.

In: a question with what the caller wishes, and three functions that reach the retriever and the generator. Out: an
`Answer`, or pieces of readable text and then the `Answer`. The first token is two hops away: search, generate.
Not covered: admission and deadlines (serving/api.py), conversations of several turns: the last user message is the
question.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from retrieval.records import Hit
from serving.answering import combine, finish, prepare
from serving.config import GenerationConfig
from serving.engine import Completion, GenerationRequest
from serving.reading import AnswerReader
from serving.records import Answer, Route
from serving.router import RouteQuery, Router
from serving.strategies import AUTO, HYBRID, HYBRID_CITED, HYBRID_CLOSED_BOOK, STRATEGIES, Strategy
from training.format import PromptFormat, WorkedExample

Search = Callable[[str, int], Awaitable[list[Hit]]]
Generate = Callable[[GenerationRequest], Awaitable[Completion]]
Stream = Callable[[GenerationRequest], AsyncGenerator[str | Completion, None]]


@dataclass(frozen=True)
class Ask:
    """A question and the caller's wishes; None takes the recipe's."""

    request_id: str
    question: str
    strategy: str = AUTO
    metadata: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServedRelease:
    """What answers: everything that ingress needs of a release, without the models."""

    name: str
    available: tuple[str, ...]
    prompt_format: PromptFormat
    examples: tuple[WorkedExample, ...]
    generation: GenerationConfig
    seed: int
    passages: int
    """Passages that the index holds; no search asks for more."""


class GenerationFailedError(Exception):
    """The engine could not serve the request; `completion` says why."""

    def __init__(self, completion: Completion) -> None:
        """Keeps the completion."""
        super().__init__(completion.error)
        self.completion = completion


class Conversation:
    """Answers questions for one release."""

    def __init__(
        self, release: ServedRelease, router: Router, search: Search, generate: Generate, stream: Stream
    ) -> None:
        """`search`, `generate` and `stream` reach the other deployments."""
        self.release = release
        self._router = router
        self._search = search
        self._generate = generate
        self._stream = stream

    async def answer(self, ask: Ask) -> Answer:
        """The finished answer.

        Raises:
            UserError: The strategy cannot be served.
            GenerationFailedError: The engine could not serve the request.
        """
        began = time.perf_counter()
        route = self._router.route(RouteQuery(ask.question, ask.metadata, ask.strategy, request_id=ask.request_id))
        hits, retrieval_ms = await self._retrieve(ask.question, route)
        if route.strategy == HYBRID:
            return await self._hybrid(ask, route, hits, retrieval_ms, began)
        strategy = STRATEGIES[route.strategy]
        completion = await self._generate(self._request(ask, strategy, hits))
        return self._finish(completion, strategy, route, hits, retrieval_ms, began)

    async def stream(self, ask: Ask) -> AsyncGenerator[str | Answer, None]:
        """Pieces of readable text as they are generated, then the answer; raises as `answer` does.

        Joined, the pieces are the readable text of the answer. `hybrid` comes in one piece: which of its two answers
        counts is known at the end.
        """
        began = time.perf_counter()
        route = self._router.route(RouteQuery(ask.question, ask.metadata, ask.strategy, request_id=ask.request_id))
        labels = self.release.prompt_format.texts.labels
        hits, retrieval_ms = await self._retrieve(ask.question, route)
        if route.strategy == HYBRID:
            answer = await self._hybrid(ask, route, hits, retrieval_ms, began)
            yield AnswerReader(STRATEGIES[HYBRID_CITED], labels).end(answer)
            yield answer
            return
        strategy = STRATEGIES[route.strategy]
        reader = AnswerReader(strategy, labels)
        async with aclosing(self._stream(self._request(ask, strategy, hits))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Completion):
                    answer = self._finish(piece, strategy, route, hits, retrieval_ms, began)
                    if rest := reader.end(answer):
                        yield rest
                    yield answer
                elif shown := reader.push(piece):
                    yield shown

    async def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages."""
        return await self._search(query, k)

    async def _retrieve(self, question: str, route: Route) -> tuple[list[Hit], float]:
        if route.strategy != HYBRID and not STRATEGIES[route.strategy].retrieves:
            return [], 0.0
        began = time.perf_counter()
        hits = await self._search(question, min(self.release.generation.passages, self.release.passages))
        return hits, (time.perf_counter() - began) * 1000

    def _request(self, ask: Ask, strategy: Strategy, hits: list[Hit]) -> GenerationRequest:
        release = self.release
        request = prepare(
            ask.question,
            strategy,
            hits,
            release.prompt_format,
            release.examples,
            release.generation,
            request_id=ask.request_id,
            seed=release.seed if ask.seed is None else ask.seed,
        )
        wished = {"max_new_tokens": ask.max_new_tokens, "temperature": ask.temperature, "top_p": ask.top_p}
        stated: dict[str, Any] = {name: value for name, value in wished.items() if value is not None}
        return dataclasses.replace(request, stop=ask.stop, **stated)

    def _finish(
        self,
        completion: Completion,
        strategy: Strategy,
        route: Route,
        hits: list[Hit],
        retrieval_ms: float,
        began: float,
    ) -> Answer:
        if completion.finish_reason == "error":
            raise GenerationFailedError(completion)
        return finish(
            completion,
            strategy,
            hits,
            self.release.prompt_format,
            route=route,
            retrieval_ms=retrieval_ms,
            total_ms=(time.perf_counter() - began) * 1000,
            release=self.release.name,
        )

    async def _hybrid(self, ask: Ask, route: Route, hits: list[Hit], retrieval_ms: float, began: float) -> Answer:
        strategies = STRATEGIES[HYBRID_CITED], STRATEGIES[HYBRID_CLOSED_BOOK]
        try:
            async with asyncio.TaskGroup() as group:  # when one fails, the other is cancelled
                tasks = [group.create_task(self._one(self._request(ask, strategy, hits))) for strategy in strategies]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        cited, closed_book = (
            self._finish(task.result(), strategy, route, hits, retrieval_ms, began)
            for task, strategy in zip(tasks, strategies, strict=True)
        )
        return combine(cited, closed_book, self.release.prompt_format, route)

    async def _one(self, request: GenerationRequest) -> Completion:
        return await self._generate(request)
