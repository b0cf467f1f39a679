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


def worst_examples(predictions: Sequence[Prediction], language: str, count: int) -> list[Example]:
    """Up to `count` answers that do not contain an accepted answer, unsupported ones and low F1 first."""

    def value(metric: str, prediction: Prediction) -> float:
        return METRICS[metric].score(prediction, language)[0]

    wrong = [p for p in predictions if p.question.answers and not value("contained", p)]
    ranked = sorted(wrong, key=lambda p: (-value("hallucination", p), value("f1", p), p.question.question_id))
    return [_example(prediction, language) for prediction in ranked[:count]]


def _example(prediction: Prediction, language: str) -> Example:
    question, answer = prediction.question, prediction.answer
    quotes = tuple((citation.quote, citation.verified) for citation in answer.citations)
    return Example(
        question=question.text,
        kind=str(question.metadata.get("kind", "")),
        expected=question.answers,
        answer=answer.answer or answer.error,
        quotes=quotes,
        faults=_faults(prediction, language),
        passages=tuple(_passage(hit, prediction, number) for number, hit in enumerate(answer.hits, start=1)),
    )


def _faults(prediction: Prediction, language: str) -> tuple[str, ...]:
    answer, found = prediction.answer, []
    recall, applies = METRICS["recall_at_k"].score(prediction, language)
    if answer.error:
        found.append("failed")
    elif answer.abstained:
        found.append("abstained")
    if applies and recall == 0:
        found.append("golden passage not retrieved")
    if METRICS["hallucination"].score(prediction, language)[0]:
        found.append("not supported by what was shown")
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
