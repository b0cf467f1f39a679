"""The metrics of an answer, each defined once: its name, its definition in words, and how one prediction scores.

In: predictions and a rubric. Out: per question a row of numbers (all zeros: the metric does not apply to it), and from
their sums estimates with bootstrap intervals. Which metrics a task has, and which it shows, is in evaluation/tasks.py.
Not covered: latency and cost (evaluation/dimensions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation import intervals, task_scores
from evaluation.config import Task
from evaluation.intervals import Combine, Estimate, ratio
from evaluation.records import Prediction
from evaluation.rubric import Rubric
from evaluation.task_scores import NOT_APPLICABLE, Score
from retrieval.records import Passage
from training import text_match
from training.format import ANSWER_MARK, fold


@dataclass(frozen=True)
class Metric:
    """One metric: `score(prediction, rubric)` gives a row of numbers, whose sums over questions `combine` makes one.

    The row is (numerator, denominator) unless `combine` says otherwise.
    """

    name: str
    label: str
    definition: str
    higher_is_better: bool
    score: Callable[[Prediction, Rubric], Score]
    tasks: tuple[Task, ...] = ("answers", "labels", "api_calls")
    combine: Combine = ratio


def _compared(compare: Callable[[str, Sequence[str], str], float]) -> Callable[[Prediction, Rubric], Score]:
    """A comparison with the accepted answers; an abstention or a failed row counts as wrong, except that abstaining
    is right where the documents hold no answer."""

    def score(prediction: Prediction, rubric: Rubric) -> Score:
        accepted = prediction.question.answers
        if not accepted:
            return task_scores.unanswerable(prediction)
        return compare(prediction.answer.answer, accepted, rubric.language), 1.0

    return score


def _shown(prediction: Prediction) -> list[Passage]:
    return [hit.passage for hit in prediction.answer.hits]


def _recall(prediction: Prediction, _rubric: Rubric) -> Score:
    golden, shown = prediction.question.golden, _shown(prediction)
    if not golden or not shown:
        return NOT_APPLICABLE
    return sum(any(place.matches(passage) for passage in shown) for place in golden) / len(golden), 1.0


def _quotes_asked(prediction: Prediction, rubric: Rubric) -> bool:
    return rubric.quotes and bool(_shown(prediction))


def _verified_answer(prediction: Prediction, rubric: Rubric) -> Score:
    if not _quotes_asked(prediction, rubric):
        return NOT_APPLICABLE
    return float(any(citation.verified for citation in prediction.answer.citations)), 1.0


def _verified_quotes(prediction: Prediction, rubric: Rubric) -> Score:
    if not _quotes_asked(prediction, rubric):
        return NOT_APPLICABLE
    citations = prediction.answer.citations
    return float(sum(citation.verified for citation in citations)), float(len(citations))


def _quote_contains_answer(prediction: Prediction, rubric: Rubric) -> Score:
    quoted, applies = _quoted_answer(prediction, rubric)
    verified = any(citation.verified for citation in prediction.answer.citations)
    return (quoted, applies) if verified else NOT_APPLICABLE


def _quoted_answer(prediction: Prediction, rubric: Rubric) -> Score:
    accepted = prediction.question.answers
    if not accepted or not _quotes_asked(prediction, rubric):
        return NOT_APPLICABLE
    quotes = [citation.quote for citation in prediction.answer.citations if citation.verified]
    return max((text_match.contains(quote, accepted, rubric.language) for quote in quotes), default=0.0), 1.0


def _hallucination(prediction: Prediction, rubric: Rubric) -> Score:
    answer, shown = prediction.answer, _shown(prediction)
    if answer.error or answer.abstained:
        return 0.0, 1.0
    if not shown:
        accepted = prediction.question.answers
        if not accepted:
            return (1.0, 1.0) if prediction.question.unanswerable else NOT_APPLICABLE
        return 1.0 - text_match.contains(answer.answer, accepted, rubric.language), 1.0
    if any(not citation.verified for citation in answer.citations):
        return 1.0, 1.0
    sources = [f"{passage.title}\n{passage.heading}\n{passage.text}" for passage in shown]
    return float(text_match.unsupported(answer.answer, [prediction.question.text, *sources])), 1.0


def _in_form(prediction: Prediction, rubric: Rubric) -> Score:
    answer = prediction.answer
    quoted = answer.abstained or not _quotes_asked(prediction, rubric) or bool(answer.quotes)
    short = rubric.longest_answer is None or answer.abstained or len(answer.answer) <= rubric.longest_answer
    marked = ANSWER_MARK in fold(answer.text)[0]
    return float(marked and bool(answer.answer) and quoted and short), 1.0


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
            ("answers",),
        ),
        Metric(
            "f1",
            "F1",
            "Mean overlap with the best accepted answer: F1 over the bag of normalised words (English, SQuAD) or over "
            "the longest common run of characters (Chinese, CMRC 2018).",
            True,
            _compared(text_match.f1),
            ("answers",),
        ),
        Metric(
            "contained",
            "contained",
            "Share of answers in which an accepted answer stands as whole words, whatever else the answer says.",
            True,
            _compared(text_match.contains),
            ("answers",),
        ),
        Metric(
            "accuracy",
            "accuracy",
            "Share of answers whose first words are an accepted label (case and punctuation aside); an answer that "
            "begins with no label is wrong.",
            True,
            task_scores.accuracy,
            ("labels",),
        ),
        Metric(
            "macro_f1",
            "macro F1",
            "Unweighted mean over the labels of each label's F1, 2·right / (predicted + golden); an answer without a "
            "label counts against its golden label.",
            True,
            task_scores.label_counts,
            ("labels",),
            intervals.macro_f1,
        ),
        Metric(
            "unparsed",
            "no label",
            "Share of answers that begin with none of the labels; they count as wrong.",
            False,
            task_scores.unparsed,
            ("labels",),
        ),
        Metric(
            "functional_accuracy",
            "right function",
            "Share of answers whose call matches an API of the corpus (repository and model are equal) of the golden "
            "API's domain (APIBench's AST match).",
            True,
            task_scores.functional_accuracy,
            ("api_calls",),
        ),
        Metric(
            "golden_call",
            "golden call",
            "Share of answers whose call is the golden API's own: repository and model are equal.",
            True,
            task_scores.golden_call,
            ("api_calls",),
        ),
        Metric(
            "hallucinated_call",
            "invented call",
            "Share of answers whose call matches no API of the corpus, or that hold no call; abstentions are none.",
            False,
            task_scores.hallucinated_call,
            ("api_calls",),
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
            "quoted_answer",
            "answer quoted",
            "Share of all answerable questions over passages whose answer carries a verified quote that holds an "
            "accepted answer; what retrieval missed counts against it.",
            True,
            _quoted_answer,
        ),
        Metric(
            "in_form",
            "in form",
            "Style: share of answers in the taught form: the answer mark, a quote where passages are shown and the "
            "prompt asks for quotes (unless it abstains), and an answer no longer than the longest that was taught.",
            True,
            _in_form,
        ),
        Metric(
            "abstained",
            "abstained",
            "Share of questions to which the strategy said that it does not know, or nothing at all.",
            False,
            lambda prediction, _rubric: task_scores.abstained(prediction),
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
            ("answers", "labels"),
        ),
        Metric(
            "cut_short",
            "cut short",
            "Share of answers that ended at `generation.max_new_tokens` instead of on their own.",
            False,
            lambda prediction, _rubric: (float(prediction.answer.finish_reason == "length"), 1.0),
        ),
        Metric(
            "failed",
            "failed",
            "Share of questions that ended in an error; they count as wrong.",
            False,
            lambda prediction, _rubric: (float(bool(prediction.answer.error)), 1.0),
        ),
    )
}


def metrics_of(task: Task) -> list[Metric]:
    """The metrics that a task has."""
    return [metric for metric in METRICS.values() if task in metric.tasks]


def scores(name: str, predictions: Sequence[Prediction], rubric: Rubric) -> NDArray[np.float64]:
    """(n, columns) float64: the metric's row of each prediction, for `intervals.statistic`."""
    rows = [METRICS[name].score(prediction, rubric) for prediction in predictions]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 2)


def measure(predictions: Sequence[Prediction], rubric: Rubric, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Every metric of the rubric's task that applies to at least one of the predictions, with its interval."""
    measured: dict[str, Estimate] = {}
    for metric in metrics_of(rubric.task):
        table = scores(metric.name, predictions, rubric)
        estimate = intervals.statistic(table, metric.combine, resamples=resamples, seed=seed)
        if estimate is not None:
            measured[metric.name] = estimate
    return measured
