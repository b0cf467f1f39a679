"""The answers that a reader of the report should see: the worst ones, with what the model was shown.

In: predictions of one strategy. Out: examples whose passages are cut into plain and highlighted pieces. The pieces are
plain text: whoever renders them escapes them. Not covered: HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.metrics import METRICS
from evaluation.records import Prediction
from evaluation.rubric import Rubric
from evaluation.tasks import SHOWN
from retrieval.records import Hit
from training.format import find_quote

Mark = Literal["", "quote", "answer"]


@dataclass(frozen=True)
class ShownPassage:
    """A passage as it was shown, in pieces; `golden` says whether it holds the answer's golden place."""

    title: str
    golden: bool
    pieces: tuple[tuple[str, Mark], ...]


@dataclass(frozen=True)
class Example:
    """One wrong answer."""

    question: str
    kind: str
    expected: tuple[str, ...]
    answer: str
    quotes: tuple[tuple[str, bool], ...]
    faults: tuple[str, ...]
    passages: tuple[ShownPassage, ...]


def worst_examples(predictions: Sequence[Prediction], rubric: Rubric, count: int) -> list[Example]:
    """Up to `count` answers that are wrong (`Shown.right`), unsupported ones first, then those least like an answer."""
    shown = SHOWN[rubric.task]

    def rank(prediction: Prediction) -> tuple[float, float, str]:
        unsupported = METRICS[shown.hallucination].score(prediction, rubric)[0]
        return -unsupported, METRICS[shown.alarm].score(prediction, rubric)[0], prediction.question.question_id

    def wrong(prediction: Prediction) -> bool:
        right, applies, *_ = METRICS[shown.right].score(prediction, rubric)
        return bool(applies) and not right

    return [_example(p, rubric) for p in sorted(filter(wrong, predictions), key=rank)[:count]]


def _example(prediction: Prediction, rubric: Rubric) -> Example:
    question, answer = prediction.question, prediction.answer
    quotes = tuple((citation.quote, citation.verified) for citation in answer.citations)
    return Example(
        question=question.text,
        kind=str(question.metadata.get("kind", "")),
        expected=question.answers,
        answer=answer.answer or answer.error,
        quotes=quotes,
        faults=_faults(prediction, rubric),
        passages=tuple(_passage(hit, prediction, number) for number, hit in enumerate(answer.hits, start=1)),
    )


def _faults(prediction: Prediction, rubric: Rubric) -> tuple[str, ...]:
    answer, found = prediction.answer, []
    recall, applies = METRICS["recall_at_k"].score(prediction, rubric)
    if answer.error:
        found.append("failed")
    elif answer.abstained:
        found.append("abstained")
    if applies and recall == 0:
        found.append("golden passage not retrieved")
    if METRICS[SHOWN[rubric.task].hallucination].score(prediction, rubric)[0]:
        found.append("no API of the corpus" if rubric.task == "api_calls" else "not supported by what was shown")
    if answer.finish_reason == "length":
        found.append("cut short")
    return tuple(found) or ("wrong, though from the passages",)


def _passage(hit: Hit, prediction: Prediction, number: int) -> ShownPassage:
    passage = hit.passage
    quoted = [
        (citation.start - passage.start, citation.end - passage.start)
        for citation in prediction.answer.citations
        if citation.verified and citation.passage == number
    ]
    answers = [find_quote(answer, passage.text) for answer in prediction.question.answers]
    golden = any(place.matches(passage) for place in prediction.question.golden)
    title = f"{passage.title} | {passage.heading}" if passage.heading else passage.title
    return ShownPassage(
        title, golden, highlight(passage.text, quoted, [span for span in answers if span] if golden else [])
    )


def highlight(
    text: str, quotes: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]
) -> tuple[tuple[str, Mark], ...]:
    """`text` cut into pieces; where a quote and an answer overlap, the answer's mark wins. Joined, they are `text`."""
    marks: list[Mark] = [""] * len(text)
    _mark(marks, quotes, "quote")
    _mark(marks, answers, "answer")
    pieces: list[tuple[str, Mark]] = []
    for char, mark_here in zip(text, marks, strict=True):
        if pieces and pieces[-1][1] == mark_here:
            pieces[-1] = (pieces[-1][0] + char, mark_here)
        else:
            pieces.append((char, mark_here))
    return tuple(pieces)


def _mark(marks: list[Mark], spans: Sequence[tuple[int, int]], mark: Mark) -> None:
    for start, end in spans:
        for place in range(max(0, start), min(end, len(marks))):
            marks[place] = mark
