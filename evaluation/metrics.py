"""The metrics of an answer, each defined once: its name, its definition in words, and how one prediction scores.

In: predictions. Out: per-question numerators and denominators (a denominator of 0: the metric does not apply to this
question), and from them estimates with bootstrap intervals. Not covered: latency and cost (evaluation/dimensions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import Estimate, share
from evaluation.records import Prediction
from retrieval.records import Passage
from training import text_match

Score = tuple[float, float]
_NOT_APPLICABLE: Score = (0.0, 0.0)


@dataclass(frozen=True)
class Metric:
    """One metric: `score(prediction, language)` gives (numerator, denominator)."""

    name: str
    label: str
    definition: str
    higher_is_better: bool
    score: Callable[[Prediction, str], Score]


def _compared(compare: Callable[[str, Sequence[str], str], float]) -> Callable[[Prediction, str], Score]:
    """A comparison with the accepted answers; an abstention or a failed row counts as wrong."""

    def score(prediction: Prediction, language: str) -> Score:
        accepted = prediction.question.answers
        if not accepted:
            return _NOT_APPLICABLE
        return compare(prediction.answer.answer, accepted, language), 1.0

    return score


def _shown(prediction: Prediction) -> list[Passage]:
    return [hit.passage for hit in prediction.answer.hits]


def _recall(prediction: Prediction, _language: str) -> Score:
    golden, shown = prediction.question.golden, _shown(prediction)
    if not golden or not shown:
        return _NOT_APPLICABLE
    return sum(any(place.matches(passage) for passage in shown) for place in golden) / len(golden), 1.0


def _verified_answer(prediction: Prediction, _language: str) -> Score:
    if not _shown(prediction):
        return _NOT_APPLICABLE
    return float(any(citation.verified for citation in prediction.answer.citations)), 1.0


def _verified_quotes(prediction: Prediction, _language: str) -> Score:
    if not _shown(prediction):
        return _NOT_APPLICABLE
    citations = prediction.answer.citations
    return float(sum(citation.verified for citation in citations)), float(len(citations))


def _quote_contains_answer(prediction: Prediction, language: str) -> Score:
    quotes = [citation.quote for citation in prediction.answer.citations if citation.verified]
    accepted = prediction.question.answers
    if not quotes or not accepted:
        return _NOT_APPLICABLE
    return max(text_match.contains(quote, accepted, language) for quote in quotes), 1.0


def _abstained(prediction: Prediction, _language: str) -> Score:
    return float(prediction.answer.abstained and not prediction.answer.error), 1.0


def _hallucination(prediction: Prediction, language: str) -> Score:
    answer, shown = prediction.answer, _shown(prediction)
    if answer.error or answer.abstained:
        return 0.0, 1.0
    if not shown:
        accepted = prediction.question.answers
        return (1.0 - text_match.contains(answer.answer, accepted, language), 1.0) if accepted else _NOT_APPLICABLE
    if any(not citation.verified for citation in answer.citations):
        return 1.0, 1.0
    sources = [f"{passage.title}\n{passage.heading}\n{passage.text}" for passage in shown]
    return float(text_match.unsupported(answer.answer, [prediction.question.text, *sources])), 1.0


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "exact_match",
            "EM",
            "Share of answers that equal an accepted answer after normalisation (English: SQuAD's, lower case without "
            "punctuation and articles; Chinese: CMRC 2018's, characters without punctuation).",
            True,
            _compared(text_match.exact_match),
        ),
        Metric(
            "f1",
            "F1",
            "Mean overlap with the best accepted answer: F1 over the bag of normalised words (English, SQuAD) or over "
            "the longest common run of characters (Chinese, CMRC 2018).",
            True,
            _compared(text_match.f1),
        ),
        Metric(
            "contained",
            "contained",
            "Share of answers in which an accepted answer stands as whole words, whatever else the answer says.",
            True,
            _compared(text_match.contains),
        ),
        Metric(
            "recall_at_k",
            "recall@k",
            "Share of golden places that are among the k passages shown to the model.",
            True,
            _recall,
        ),
        Metric(
            "verified_answers",
            "verified quote",
            "Share of answers over passages that carry at least one verified quote: one that stands word for word in "
            "a passage shown.",
            True,
            _verified_answer,
        ),
        Metric(
            "verified_quotes",
            "quotes verified",
            "Verified quotes as a share of all quotes written (n counts the answers that quote).",
            True,
            _verified_quotes,
        ),
        Metric(
            "quote_contains_answer",
            "quote holds answer",
            "Of the answers with a verified quote, the share in which one of these quotes holds an accepted answer.",
            True,
            _quote_contains_answer,
        ),
        Metric(
            "abstained",
            "abstained",
            "Share of questions to which the strategy said that it does not know, or nothing at all.",
            False,
            _abstained,
        ),
        Metric(
            "hallucination",
            "hallucination",
            "With passages: share of answers that what the model was shown does not support: a quote that stands in "
            "no passage, or a number or name (in Chinese: most character pairs) that is in no passage and not in the "
            "question, even if it happens to be right. Without passages: share of answers that are wrong (no accepted "
            "answer contained) instead of abstaining. Abstentions are not hallucinations. The two cases are measured "
            "differently: with passages it is grounding, not correctness, which EM, F1 and `contained` measure.",
            False,
            _hallucination,
        ),
        Metric(
            "cut_short",
            "cut short",
            "Share of answers that ended at `generation.max_new_tokens` instead of on their own.",
            False,
            lambda prediction, _language: (float(prediction.answer.finish_reason == "length"), 1.0),
        ),
        Metric(
            "failed",
            "failed",
            "Share of questions that ended in an error; they count as wrong in EM, F1 and `contained`.",
            False,
            lambda prediction, _language: (float(bool(prediction.answer.error)), 1.0),
        ),
    )
}


def scores(name: str, predictions: Sequence[Prediction], language: str) -> NDArray[np.float64]:
    """(n, 2) float64: numerator and denominator of the metric for each prediction."""
    rows = [METRICS[name].score(prediction, language) for prediction in predictions]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), 2)


def measure(predictions: Sequence[Prediction], language: str, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Every metric that applies to at least one of the predictions, with its interval."""
    measured: dict[str, Estimate] = {}
    for name in METRICS:
        table = scores(name, predictions, language)
        estimate = share(table[:, 0], table[:, 1], resamples=resamples, seed=seed)
        if estimate is not None:
            measured[name] = estimate
    return measured
