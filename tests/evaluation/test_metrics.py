"""Every metric on answers whose score can be worked out by hand."""

import dataclasses

import pytest

from evaluation.metrics import METRICS, measure, metrics_of
from evaluation.records import Prediction
from evaluation.rubric import Rubric
from retrieval.records import Golden, Hit, Question
from serving.answering import finish
from serving.engine import Completion
from serving.strategies import STRATEGIES
from tests.evaluation.fakes import make_recipe, passage
from training.format import PromptFormat

QUESTION = Question(
    "q", "What is the seat of Land3?", ("Town3", "Three Town"), (Golden("land3"),), metadata={"kind": "x"}
)


def predict(text, shown=(3, 4, 5), strategy="raft", question=QUESTION, finish_reason="stop", error=""):
    recipe = make_recipe("unused")
    prompt_format = PromptFormat.load(recipe.prompt, "en")
    hits = [Hit(passage(number), 1.0, rank) for rank, number in enumerate(shown, start=1)]
    completion = Completion("r", text, finish_reason, error=error)
    return Prediction(question, finish(completion, STRATEGIES[strategy], hits, prompt_format))


RUBRIC = Rubric("en")


def score(metric, prediction, rubric=RUBRIC):
    return METRICS[metric].score(prediction, rubric)


QUOTED = "##begin_quote##The seat of Land3 is Town3##end_quote##\n<ANSWER>: Town3"


def test_a_right_quoted_answer_scores_on_everything():
    prediction = predict(QUOTED)
    names = [metric.name for metric in metrics_of("answers")]
    expected = dict.fromkeys(names, (1.0, 1.0)) | dict.fromkeys(
        ("abstained", "hallucination", "cut_short", "failed"), (0.0, 1.0)
    )
    assert {name: score(name, prediction) for name in names} == expected


def test_f1_takes_the_best_accepted_answer():
    assert score("f1", predict("<ANSWER>: three big towns, Town"))[0] == pytest.approx(2 * (2 / 4) * (2 / 2) / 1.5)


def test_recall_counts_golden_places_among_the_passages_shown():
    two = dataclasses.replace(QUESTION, golden=(Golden("land3"), Golden("land9")))
    assert score("recall_at_k", predict(QUOTED, question=two)) == (0.5, 1.0)
    assert score("recall_at_k", predict(QUOTED, shown=(4, 5, 6))) == (0.0, 1.0)
    half = dataclasses.replace(QUESTION, golden=(Golden("land3", 0, 10), Golden("land3", 500, 510)))
    assert score("recall_at_k", predict(QUOTED, question=half)) == (0.5, 1.0)


def test_passage_metrics_do_not_apply_to_closed_book_answers():
    prediction = predict("<ANSWER>: Town3", strategy="finetuned")
    for metric in ("recall_at_k", "verified_answers", "verified_quotes", "quote_contains_answer"):
        assert score(metric, prediction) == (0.0, 0.0), metric


def test_quotes_count_one_by_one_and_answers_once():
    text = "##begin_quote##founded in 1803##end_quote####begin_quote##invented##end_quote##<ANSWER>: Town3"
    prediction = predict(text)
    assert score("verified_quotes", prediction) == (1.0, 2.0)
    assert score("verified_answers", prediction) == (1.0, 1.0)
    assert score("quote_contains_answer", prediction) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "shown", "strategy", "expected"),
    [
        (QUOTED, (3, 4), "raft", 0.0),
        (QUOTED, (4, 5), "raft", 1.0),  # right, but from nothing that was shown
        ("##begin_quote##made up##end_quote##<ANSWER>: Town3", (3, 4), "raft", 1.0),
        ("<ANSWER>: Town4", (3, 4), "raft", 0.0),  # wrong, yet from a passage: not a hallucination
        ("<ANSWER>: Town9", (3, 4), "rag", 1.0),  # the number 9 is nowhere
        ("<ANSWER>: 1903", (3, 4), "rag", 1.0),
        ("<ANSWER>: 1803", (3, 4), "rag", 0.0),
        ("<ANSWER>: Springfield", (3, 4), "rag", 1.0),
        ("<ANSWER>: The documents do not say.", (3, 4), "raft", 0.0),
        ("<ANSWER>: Town9", (), "finetuned", 1.0),
        ("<ANSWER>: It is Town3, I think", (), "finetuned", 0.0),
        ("<ANSWER>: The documents do not say.", (), "finetuned", 0.0),
    ],
)
def test_hallucination_is_a_lack_of_support(text, shown, strategy, expected):
    assert score("hallucination", predict(text, shown, strategy))[0] == expected


def test_failed_rows_count_as_wrong_and_not_as_abstentions():
    prediction = predict("", finish_reason="error", error="out of memory")
    assert [score(name, prediction)[0] for name in ("failed", "exact_match", "abstained", "hallucination")] == [
        1,
        0,
        0,
        0,
    ]


def test_cut_short_answers_are_counted():
    assert score("cut_short", predict(QUOTED, finish_reason="length"))[0] == 1.0


def test_questions_without_accepted_answers_are_not_scored_as_wrong():
    unknown = dataclasses.replace(QUESTION, answers=(), golden=())
    measured = measure([predict(QUOTED, question=unknown)], RUBRIC, resamples=100, seed=1)
    assert not {"exact_match", "f1", "contained", "recall_at_k", "quote_contains_answer"} & measured.keys()
    assert measured["verified_answers"].value == 1.0


def test_measures_are_means_over_the_questions_they_apply_to():
    measured = measure([predict(QUOTED), predict("<ANSWER>: Town9")], RUBRIC, resamples=100, seed=1)
    assert (measured["exact_match"].value, measured["exact_match"].n) == (0.5, 2)
    assert (measured["quote_contains_answer"].value, measured["quote_contains_answer"].n) == (1.0, 1)
