"""Answers a window of questions with an engine: the part of a batch run that knows nothing of Ray or of files.

In: questions, the strategy's name, hits, an engine. Out: predictions, one per question, in the order given; a row that
fails carries its error. `serving.answering` renders and parses, so that offline answers are the online ones.
Not covered: distribution (evaluation/pipeline.py), durability (evaluation/windows.py).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from evaluation.records import Prediction
from retrieval.records import Hit, Question
from serving.answering import Prepared, combine, finish, passage_tokens, prepare
from serving.config import GenerationConfig
from serving.context_budget import ContextLengthError, CountsTokens
from serving.engine import Completion, GenerationRequest
from serving.records import Answer, Route, Timings
from serving.router import RouteQuery, known_facts
from serving.strategies import AUTO, HYBRID, HYBRID_CITED, HYBRID_CLOSED_BOOK, STRATEGIES, Strategy
from training.format import PromptFormat, WorkedExample

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Embedding = npt.NDArray[np.float32] | None

_log = logging.getLogger(__name__)


class Generates(Protocol):
    """The part of `serving.engine.Engine` that a batch run uses."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """One completion per request, in order."""
        ...


class Searches(Protocol):
    """The part of `retrieval.retriever.Retriever` that a batch run uses."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best hits of each query."""
        ...

    def search_and_embed(
        self, queries: Sequence[str], k: int
    ) -> tuple[list[list[Hit]], npt.NDArray[np.float32] | None]:
        """`search`, and the queries' embeddings (n, dim) float32, which the router reads; none without an encoder."""
        ...


class ChoosesRoute(Protocol):
    """The part of `serving.router.Router` that a batch run uses."""

    def route(self, query: RouteQuery) -> Route:
        """The strategy for one question."""
        ...


@dataclass(frozen=True)
class AnswerSettings:
    """What answering needs beside the engine and the hits."""

    prompt_format: PromptFormat
    generation: GenerationConfig
    examples: tuple[WorkedExample, ...] = ()
    router: ChoosesRoute | None = None
    seed: int = 0
    release: str = ""
    tokens: CountsTokens | None = None
    """Counts prompts, so that passages are trimmed to the context as in serving."""
    update_frequencies: Mapping[str, str] = field(default_factory=dict)
    """How often each collection changes, for the router."""


def legs_of(strategy: str) -> tuple[Strategy, ...]:
    """The completions that a strategy may ask for: two for `hybrid`, any for `auto`."""
    if strategy == AUTO:
        return tuple(STRATEGIES.values())
    if strategy == HYBRID:
        return STRATEGIES[HYBRID_CITED], STRATEGIES[HYBRID_CLOSED_BOOK]
    return (STRATEGIES[strategy],)


def retrieves(strategy: str) -> bool:
    """Whether a strategy is shown passages."""
    return any(leg.retrieves for leg in legs_of(strategy))


@dataclass(frozen=True)
class _Asked:
    """One question on its way: its route, and one request per leg."""

    question: Question
    route: Route
    legs: tuple[Strategy, ...]
    prepared: tuple[Prepared, ...] = ()
    refused: str = ""
    """Why nothing is asked: the question does not fit the model's context."""


def answer_window(
    strategy: str,
    questions: Sequence[Question],
    hits: Sequence[Sequence[Hit]],
    engine: Generates,
    settings: AnswerSettings,
    *,
    retrieval_ms: float = 0.0,
    embeddings: Sequence[Embedding] = (),
) -> list[Prediction]:
    """Answers `questions` (hits[i] were found for questions[i]) in as few batches as the engine needs.

    `embeddings` are the questions', each (dim,) float32 or None, for the router of `auto`; left out: none.

    Requests go to the engine sorted by prompt length, so that rows of one padded batch are alike.
    `retrieval_ms` is the time per query, a batch's time divided by its queries.
    """
    rows = zip(questions, hits, embeddings or [None] * len(questions), strict=True)
    asked = [_ask(strategy, *row, settings) for row in rows]
    requests = sorted((leg.request for item in asked for leg in item.prepared), key=_prompt_characters)
    completions = {completion.request_id: completion for completion in _generate(engine, requests)}
    return [Prediction(item.question, _answer(item, completions, settings, retrieval_ms)) for item in asked]


def answer_singly(
    strategy: str,
    questions: Sequence[Question],
    search: Callable[[str], tuple[list[Hit], Embedding]] | None,
    engine: Generates,
    settings: AnswerSettings,
) -> list[Prediction]:
    """Answers one question after the other, timing each as a lone request sees it: search, then generation at
    batch size 1, in milliseconds of wall clock."""
    predictions = []
    for question in questions:
        began = time.perf_counter()
        hits, embedding = search(question.text) if search else ([], None)
        searched = time.perf_counter() if search else began
        [prediction] = answer_window(strategy, [question], [hits], engine, settings, embeddings=[embedding])
        ended = time.perf_counter()
        timings = Timings(
            retrieval=(searched - began) * 1000, generation=(ended - searched) * 1000, total=(ended - began) * 1000
        )
        predictions.append(Prediction(question, dataclasses.replace(prediction.answer, timings_ms=timings)))
    return predictions


def _ask(
    strategy: str, question: Question, hits: Sequence[Hit], embedding: Embedding, settings: AnswerSettings
) -> _Asked:
    route = Route(strategy, reason="asked for")
    if strategy == AUTO:
        assert settings.router is not None, "`auto` needs a router"
        found = hits[: settings.generation.passages]
        known = known_facts(found, settings.update_frequencies, passage_tokens(found, settings.tokens))
        query = RouteQuery(
            question.text, question.metadata, embedding=embedding, request_id=question.question_id, known=known
        )
        route = settings.router.route(query)
    legs = legs_of(route.strategy)
    try:
        prepared = tuple(_prepare(question, leg, hits, settings) for leg in legs)
    except ContextLengthError as error:
        return _Asked(question, route, legs, refused=str(error))
    return _Asked(question, route, legs, prepared)


def _prepare(question: Question, leg: Strategy, hits: Sequence[Hit], settings: AnswerSettings) -> Prepared:
    return prepare(
        question.text,
        leg,
        hits,
        settings.prompt_format,
        settings.examples,
        settings.generation,
        request_id=f"{question.question_id}/{leg.name}",
        seed=settings.seed,
        tokens=settings.tokens,
    )


def _answer(item: _Asked, completions: dict[str, Completion], settings: AnswerSettings, retrieval_ms: float) -> Answer:
    if item.refused:
        refused = Completion(
            f"{item.question.question_id}/{item.legs[0].name}",
            finish_reason="error",
            error=item.refused,
            error_code="context_length_exceeded",
        )
        made = finish(
            refused,
            item.legs[0],
            (),
            settings.prompt_format,
            question_id=item.question.question_id,
            route=item.route,
            release=settings.release,
        )
        return dataclasses.replace(made, strategy=item.route.strategy)
    answers = [
        finish(
            completions[prepared.request.request_id],
            leg,
            prepared.hits,
            settings.prompt_format,
            question_id=item.question.question_id,
            route=item.route,
            retrieval_ms=retrieval_ms if leg.retrieves else 0.0,
            release=settings.release,
            passages_left_out=prepared.passages_left_out,
        )
        for leg, prepared in zip(item.legs, item.prepared, strict=True)
    ]
    if item.route.strategy == HYBRID:
        return combine(answers[0], answers[1], settings.prompt_format, item.route)
    return answers[0]


def _prompt_characters(request: GenerationRequest) -> int:
    return sum(len(message["content"]) for message in request.messages)


def _generate(engine: Generates, requests: Sequence[GenerationRequest]) -> list[Completion]:
    """All completions. A request that an internal error ended is tried once more on its own, because an engine ends
    every row of a batch when one of them breaks it (out of memory, a bad row).

    Raises:
        Exception: The engine's own, when it raises for each of several requests: then it is the engine that is broken.
    """
    try:
        completions = engine.generate(requests)
    except Exception as error:  # noqa: BLE001 (told apart below: one bad row, or a broken engine, which is re-raised)
        _log.warning("generating %d requests together failed: %s", len(requests), type(error).__name__)
        completions = [_failed(request, error) for request in requests]
    last: Exception | None = None
    for position, request in enumerate(requests):
        if completions[position].error_code == "internal" and len(requests) > 1:
            try:
                [completions[position]] = engine.generate([request])
            except Exception as error:  # noqa: BLE001 (recorded in the row)
                last = error
                completions[position] = _failed(request, error)
    if last is not None and all(completion.finish_reason == "error" for completion in completions):
        raise last
    return completions


def _failed(request: GenerationRequest, error: Exception) -> Completion:
    return Completion(
        request.request_id,
        finish_reason="error",
        error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300],
        error_code="internal",
    )
