"""What answers are judged by beside their question: language, labels, APIs of the corpus, the taught form.

In: a recipe and the parts of a release. Out: a `Rubric`. Not covered: the metrics (evaluation/metrics.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from evaluation.api_calls import ApiCatalogue
from evaluation.config import EvaluationRecipe, Task
from evaluation.parts import Parts
from retrieval.records import Question
from training.splits import TRAIN


@dataclass(frozen=True)
class Rubric:
    """What the metrics read beside a prediction."""

    language: str
    task: Task = "answers"
    labels: tuple[str, ...] = ()
    """The labels of the task `labels`, sorted."""
    apis: ApiCatalogue = field(default_factory=ApiCatalogue)
    """The APIs of the task `api_calls`."""
    quotes: bool = True
    """Whether the prompt's format asks for quotes where passages are shown."""
    longest_answer: int | None = None
    """Characters of the longest answer that training taught; None where nothing was trained."""


def rubric_of(recipe: EvaluationRecipe, parts: Parts, questions: Iterable[Question] = ()) -> Rubric:
    """The rubric of a release; `questions` are those answered, whose labels count beside those of the samples."""
    from training.samples import load_questions

    known = load_questions(parts.samples) if parts.samples else []
    return Rubric(
        language=recipe.language,
        task=recipe.evaluate.task,
        labels=labels_of([*known, *questions]) if recipe.evaluate.task == "labels" else (),
        apis=_catalogue(recipe, parts) if recipe.evaluate.task == "api_calls" else ApiCatalogue(),
        quotes=recipe.prompt.quotes,
        longest_answer=_longest_answer(recipe, known),
    )


def labels_of(questions: Iterable[Question]) -> tuple[str, ...]:
    """The distinct accepted answers, in lower case."""
    return tuple(sorted({answer.strip().lower() for question in questions for answer in question.answers} - {""}))


def commonest_share(questions: Sequence[Question], rubric: Rubric) -> float | None:
    """Share of questions that a strategy gets right which always gives the commonest label, or a call of the commonest
    domain: what a score of these tasks is to be held against. None for other tasks."""
    golden: list[str] = []
    if rubric.task == "labels":
        golden = [question.answers[0].strip().lower() for question in questions if question.answers]
    elif rubric.task == "api_calls":
        places = [place.doc_id for question in questions for place in question.golden[:1]]
        golden = [rubric.apis.cards[doc_id][0] for doc_id in places if doc_id in rubric.apis.cards]
    return max(Counter(golden).values()) / len(golden) if golden else None


def _catalogue(recipe: EvaluationRecipe, parts: Parts) -> ApiCatalogue:
    from retrieval.retriever import Retriever

    return ApiCatalogue.of(Retriever.open(parts.index, recipe.encoder, recipe.search).documents())


def _longest_answer(recipe: EvaluationRecipe, questions: Sequence[Question]) -> int | None:
    """Characters of the longest first answer of a training question that `samples.max_answer_chars` lets train."""
    taught = [len(question.answers[0]) for question in questions if question.split == TRAIN and question.answers]
    return max((length for length in taught if length <= recipe.samples.max_answer_chars), default=None)
