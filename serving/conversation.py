"""One question through the graph: retrieve, route, generate, answer. Plain asyncio, no Ray and no HTTP.

In: a question with who asks and what they wish, and the doors to retriever, generator and feedback. Out: an `Answer`,
or pieces of readable text and then the `Answer`. The first token is at most two hops away: one search, which also
embeds the question for the router, and one generation; a third, where a later turn is rewritten by the model.
One release answers a question from its first hop to its last.
Not covered: admission and deadlines (serving/api.py), which release is current (serving/live_releases.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retrieval.filters import Filter, all_of
from retrieval.records import Hit
from serving.answering import Prepared, combine, finish, passage_tokens, prepare, readable, verified
from serving.asking import Ask, Doors, GenerationFailedError, ServedRelease
from serving.closed_book_leg import ClosedBookLeg
from serving.context_budget import ContextLengthError, CountsTokens
from serving.engine import Completion, GenerationRequest
from serving.follow_up import by_rules, rewriting, rewritten
from serving.interfaces import (
    ANYBODY,
    Caller,
    Embedded,
    SearchQuery,
)
from serving.observing import Watch
from serving.reading import AnswerReader
from serving.records import Answer, Interaction, Route, Usage
from serving.router import RouteQuery, Router, known_facts
from serving.strategies import AUTO, HYBRID, HYBRID_CITED, HYBRID_CLOSED_BOOK, STRATEGIES, Strategy, require_strategy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

READ_CHARACTERS = 20_000
"""Characters of a question that the router and the retriever read: encoders read the first few hundred tokens anyway,
and recognising the intent of a body's 1,000,000 characters held ingress up for seconds."""


@dataclass
class _Question:
    """A question on its way through the graph, with what has been found out about it."""

    ask: Ask
    text: str
    """The question as it is searched and answered."""
    began: float
    route: Route = field(default_factory=lambda: Route(AUTO))
    hits: tuple[Hit, ...] = ()
    retrieval_ms: float = 0.0
    cached_tokens: int = 0
    rewriting: Usage = field(default_factory=Usage)
    """Tokens that making the question stand alone has taken."""

    @property
    def read(self) -> str:
        """What the router and the retriever read of it."""
        return self.text[:READ_CHARACTERS]

    @property
    def standalone(self) -> str:
        return self.text if self.text != self.ask.question else ""


class Conversation:
    """Answers questions for one release."""

    def __init__(
        self, release: ServedRelease, router: Router, doors: Doors, tokens: CountsTokens | None = None
    ) -> None:
        """`tokens` counts prompts of the release's base model; without it nothing is trimmed to its context."""
        self.release = release
        self._router = router
        self._doors = doors
        self._tokens = tokens
        self._watch = Watch(doors.observer, doors.feedback)

    async def answer(self, ask: Ask) -> Answer:
        """The finished answer.

        Raises:
            StrategyNotAllowedError: The caller may not use the strategy.
            UserError: The strategy cannot be served.
            GenerationFailedError: The engine could not serve the request, or it does not fit the model's context.
        """
        return await self._answer_whole(await self._understand(ask))

    async def _answer_whole(self, question: _Question) -> Answer:
        if question.route.strategy == HYBRID:
            return self._done(question, await self._hybrid(question))
        strategy = STRATEGIES[question.route.strategy]
        prepared = await self._prepare(question, strategy)
        with self._watch.span("generate", strategy=strategy.name) as span:
            completion = await self._doors.generate(_traced(prepared, span.traceparent).request, self.release.pins)
        return self._done(question, self._finish(question, completion, strategy, prepared))

    async def stream(self, ask: Ask) -> AsyncGenerator[str | Answer, None]:
        """Pieces of readable text as they are generated, then the answer; raises as `answer` does, and
        `StreamBrokenError` where the rest of an answer is lost.

        Joined, the pieces are the readable text of the answer. `hybrid` comes in one piece, as soon as it is known
        which of its two answers counts, and so does what needs a verified quote (`Route.require_quote`).
        """
        question = await self._understand(ask)
        labels = self.release.prompt_format.texts.labels
        if question.route.strategy == HYBRID or question.route.require_quote:
            answer = await self._answer_whole(question)
            yield readable(answer, labels)
            yield answer
            return
        strategy = STRATEGIES[question.route.strategy]
        prepared = await self._prepare(question, strategy)
        reader = AnswerReader(strategy, labels)
        with self._watch.span("generate", strategy=strategy.name) as span:
            request = _traced(prepared, span.traceparent).request
            async with aclosing(self._doors.stream(request, self.release.pins)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Completion):
                        answer = self._done(question, self._finish(question, piece, strategy, prepared))
                        if rest := reader.end(answer):
                            yield rest
                        yield answer
                        continue
                    ask.taken.pieces += 1
                    if shown := reader.push(piece):
                        yield shown

    async def search(
        self, query: str, k: int, caller: Caller = ANYBODY, filter: Filter | None = None
    ) -> tuple[Hit, ...]:
        """The k best passages that the caller may see; fewer where there are fewer."""
        found = await self._doors.search(_search_query(query, k, caller, filter), self.release.pins)
        return found.hits

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Embeddings by the index's encoder; only for a release that `embeds`."""
        assert self._doors.embed is not None, "a release that embeds has a retriever"
        return await self._doors.embed(texts, self.release.pins)

    async def tokens_taken(self, ask: Ask) -> int:
        """The least that a question without an answer has taken: its prompts, and a token per piece of text."""
        taken, tokens = ask.taken, self._tokens
        if tokens is None:
            return taken.pieces
        return taken.pieces + await asyncio.to_thread(lambda: sum(map(tokens.count, taken.prompts)))

    async def _understand(self, ask: Ask) -> _Question:
        """The question with its route and hits. What was asked for decides whether anything is searched; for `auto`
        the search comes first, because the router reads the question's embedding and what was found."""
        require_strategy(ask.strategy, self.release.available, ask.caller.strategies)
        question = _Question(ask, ask.question, time.perf_counter())
        await self._make_standalone(question)
        if ask.strategy != AUTO:
            question.route = self._route(question, None, {})
            if question.route.strategy == HYBRID or STRATEGIES[question.route.strategy].retrieves:
                await self._retrieve(question, embed=False)
            return question
        embedding, known = None, {}
        if self.release.pins.index:
            embedding = await self._retrieve(question, embed=True)
            length = await asyncio.to_thread(passage_tokens, question.hits, self._tokens)
            known = known_facts(question.hits, self.release.update_frequencies, length)
        question.route = self._route(question, embedding, known)
        return question

    async def _make_standalone(self, question: _Question) -> None:
        """Puts what the earlier turns imply into the question; by the model, that is one more hop."""
        ask, release = question.ask, self.release
        if release.follow_up == "off" or not ask.history:
            return
        prompt = release.rewrite_prompt if release.follow_up == "model" else None
        messages = rewriting(ask.history, ask.question, prompt) if prompt else ()
        if prompt and messages:
            request = GenerationRequest(
                f"{ask.request_id}/question", messages, max_new_tokens=prompt.max_new_tokens, seed=release.seed
            )
            ask.taken.prompts.append(messages)
            with self._watch.span("generate", strategy="question") as span:
                request = dataclasses.replace(request, traceparent=span.traceparent)
                reply = await self._doors.generate(request, release.pins)
            question.rewriting = Usage(reply.prompt_tokens, reply.completion_tokens)
            question.cached_tokens += reply.cached_tokens
            ask.taken.pieces += reply.completion_tokens
            if reply.finish_reason == "stop" and (found := rewritten(reply.text, ask.history, ask.question)):
                question.text = found
                return
        question.text = by_rules(ask.history, ask.question)

    def _route(self, question: _Question, embedding: npt.NDArray[np.float32] | None, known: Mapping[str, Any]) -> Route:
        ask = question.ask
        query = RouteQuery(
            question.read, ask.metadata, ask.strategy, embedding, ask.user, ask.request_id, ask.caller.strategies, known
        )
        with self._watch.span("route") as span:
            route = self._router.route(query, self._watch.tallies())
            span.set(strategy=route.strategy, intent=route.intent)
        return route

    async def _retrieve(self, question: _Question, *, embed: bool) -> npt.NDArray[np.float32] | None:
        ask, began = question.ask, time.perf_counter()
        query = _search_query(question.read, self.release.generation.passages, ask.caller, ask.filter, embed=embed)
        with self._watch.span("retrieve", k=query.k) as span:
            found = await self._doors.search(
                dataclasses.replace(query, traceparent=span.traceparent), self.release.pins
            )
        question.hits = found.hits
        question.retrieval_ms = (time.perf_counter() - began) * 1000
        return found.embedding

    async def _prepare(self, question: _Question, strategy: Strategy, leg: str = "") -> Prepared:
        """The request, its passages fitted to the model's context; tokenising happens in a thread. `leg` tells the two
        requests of one `hybrid` question apart."""
        ask, release = question.ask, self.release
        wished = {"max_new_tokens": ask.max_new_tokens, "temperature": ask.temperature}
        stated = {name: value for name, value in wished.items() if value is not None}
        try:
            prepared = await asyncio.to_thread(
                prepare,
                question.text,
                strategy,
                question.hits,
                release.prompt_format,
                release.examples,
                release.generation.model_copy(update=stated),
                request_id=f"{ask.request_id}/{leg}" if leg else ask.request_id,
                seed=release.seed if ask.seed is None else ask.seed,
                tokens=self._tokens,
                instructions=ask.instructions,
            )
        except ContextLengthError as error:
            raise GenerationFailedError(
                Completion(
                    ask.request_id, finish_reason="error", error=str(error), error_code="context_length_exceeded"
                )
            ) from error
        request = dataclasses.replace(
            prepared.request,
            adapter=None if strategy.adapter is None else release.pins.adapters[strategy.adapter],
            top_p=1.0 if ask.top_p is None else ask.top_p,
            stop=ask.stop,
        )
        ask.taken.prompts.append(request.messages)
        return dataclasses.replace(prepared, request=request)

    def _finish(self, question: _Question, completion: Completion, strategy: Strategy, prepared: Prepared) -> Answer:
        if completion.finish_reason == "error":
            raise GenerationFailedError(completion)
        return self._answer_of(question, completion, strategy, prepared)

    def _answer_of(self, question: _Question, completion: Completion, strategy: Strategy, prepared: Prepared) -> Answer:
        question.cached_tokens += completion.cached_tokens
        return finish(
            dataclasses.replace(completion, request_id=question.ask.request_id),
            strategy,
            prepared.hits,
            self.release.prompt_format,
            route=question.route,
            retrieval_ms=question.retrieval_ms,
            total_ms=(time.perf_counter() - question.began) * 1000,
            release=self.release.name,
            standalone=question.standalone,
            passages_left_out=prepared.passages_left_out,
        )

    async def _hybrid(self, question: _Question) -> Answer:
        """Both answers at once. A cited answer whose quote verifies is taken as soon as it is there, and the
        closed-book one is then cancelled."""
        legs = STRATEGIES[HYBRID_CITED], STRATEGIES[HYBRID_CLOSED_BOOK]
        for_cited, for_closed = [await self._prepare(question, leg, leg.name) for leg in legs]
        with self._watch.span("generate", strategy=HYBRID) as span:
            for_cited, for_closed = _traced(for_cited, span.traceparent), _traced(for_closed, span.traceparent)
            closed_book = ClosedBookLeg(for_closed.request, self.release.pins, self._doors, question.ask.taken)
            try:
                completion = await self._doors.generate(for_cited.request, self.release.pins)
                cited = self._finish(question, completion, legs[0], for_cited)
                if verified(cited) and not cited.abstained:
                    # What became of the other, be it an error, does not matter any more, except for what it took.
                    other = self._answer_of(question, await closed_book.so_far(self._tokens), legs[1], for_closed)
                else:
                    other = self._finish(question, await closed_book.completion(), legs[1], for_closed)
            finally:
                await closed_book.end()
        return combine(cited, other, self.release.prompt_format, question.route)

    def _done(self, question: _Question, answer: Answer) -> Answer:
        """The answer, told to feedback and metrics."""
        ask, route, more = question.ask, answer.route, question.rewriting
        usage = Usage(
            answer.usage.prompt_tokens + more.prompt_tokens, answer.usage.completion_tokens + more.completion_tokens
        )
        answer = dataclasses.replace(answer, usage=usage)
        interaction = Interaction(
            request_id=ask.request_id,
            at=time.time(),
            question=question.text,
            answer=answer.answer,
            strategy=answer.strategy,
            intent=route.intent,
            confidence=route.confidence,
            propensity=route.propensity,
            experiment=route.experiment,
            release=answer.release,
            tenant=ask.caller.tenant,
            key_id=ask.caller.key_id,
            user=ask.user,
            abstained=answer.abstained,
            quotes=tuple(dict.fromkeys(citation.quote for citation in verified(answer))),
            doc_ids=tuple(dict.fromkeys(citation.doc_id for citation in verified(answer))),
            total_ms=answer.timings_ms.total,
        )
        self._watch.answered(answer, interaction, question.cached_tokens)
        return answer


def _search_query(query: str, k: int, caller: Caller, wished: Filter | None, *, embed: bool = False) -> SearchQuery:
    """A search within what the caller's key opens; a request's own filter only narrows it."""
    filters = [part for part in (caller.filter, wished) if part is not None]
    return SearchQuery(query, k, caller.groups, all_of(filters) if filters else None, embed)


def _traced(prepared: Prepared, traceparent: str) -> Prepared:
    return dataclasses.replace(prepared, request=dataclasses.replace(prepared.request, traceparent=traceparent))
