"""Labels, API calls, unanswerable questions and the style measure, on answers whose score can be worked out by hand."""

import dataclasses

import pytest

from evaluation.api_calls import ApiCall, ApiCatalogue
from evaluation.metrics import METRICS, measure, metrics_of
from evaluation.rubric import Rubric, labels_of
from evaluation.task_scores import label_of
from evaluation.tasks import SHOWN
from retrieval.records import Golden, Question
from tests.evaluation.test_metrics import QUESTION, QUOTED, predict

LABELS = Rubric("en", "labels", ("maybe", "no", "yes"))
CALLS = ApiCatalogue(
    {
        ApiCall("r", "depth"): frozenset({"Depth"}),
        ApiCall("r", "deep"): frozenset({"Depth"}),
        ApiCall("r", "say"): frozenset({"Speech"}),
    },
    {"land3": ("Depth", ApiCall("r", "depth")), "land4": ("Speech", ApiCall("r", "say"))},
)
APIS = Rubric("en", "api_calls", apis=CALLS)


def labelled(label):
    return dataclasses.replace(QUESTION, question_id=label, answers=(label,))


def score(metric, prediction, rubric):
    return METRICS[metric].score(prediction, rubric)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes.", "yes"),
        ("no, it does not", "no"),
        ("Maybe so", "maybe"),
        ("none of them", ""),
        ("The answer is yes", ""),
        ("yesterday", ""),
        ("", ""),
    ],
)
def test_a_label_is_read_from_the_first_words(text, label):
    assert label_of(text, LABELS) == label


def test_the_longest_label_wins_and_chinese_labels_are_read_by_character():
    assert label_of("Not sure at all", Rubric("en", "labels", ("not", "not sure"))) == "not sure"
    assert label_of("不确定。", Rubric("zh", "labels", ("不", "不确定", "是"))) == "不确定"


def test_labels_may_be_letters():
    letters = Rubric("en", "labels", ("a", "b", "c", "+"))
    assert [label_of(text, letters) for text in ("B.", "a) the first", "The answer is c", "C", "d")] == [
        "b", "a", "", "c", "",
    ]  # fmt: skip


def test_labels_are_what_the_questions_accept():
    assert labels_of(
        [labelled("Yes"), labelled("no "), labelled("yes"), dataclasses.replace(QUESTION, answers=())]
    ) == (
        "no",
        "yes",
    )


def test_accuracy_and_macro_f1_by_hand():
    """yes: golden 2, predicted 2, right 1 → F1 1/2. no: golden 1, predicted 1, right 0 → 0. maybe: golden 1, none
    predicted → 0. One answer has no label."""
    answers = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("maybe", "I cannot tell")]
    predictions = [predict(f"<ANSWER>: {said}", question=labelled(golden)) for golden, said in answers]
    measured = measure(predictions, LABELS, resamples=100, seed=1)
    assert (measured["accuracy"].value, measured["accuracy"].n) == (0.25, 4)
    assert measured["macro_f1"].value == pytest.approx((0.5 + 0 + 0) / 3)
    assert measured["unparsed"].value == 0.25
    assert "exact_match" not in measured


@pytest.mark.parametrize(
    ("call", "right", "golden", "invented"),
    [
        ("torch.hub.load('r', 'depth', pretrained=True)", 1, 1, 0),
        ("torch.hub.load(repo_or_dir='r', model='deep')", 1, 0, 0),  # another API of the golden one's domain
        ("torch.hub.load('r', 'say')", 0, 0, 0),
        ("torch.hub.load('r', 'made_up')", 0, 0, 1),
        ("Use MiDaS.", 0, 0, 1),
        ("The documents do not say.", 0, 0, 0),
    ],
)
def test_api_calls_are_right_by_domain_and_invented_outside_the_corpus(call, right, golden, invented):
    prediction = predict(f"<ANSWER>: {call}")
    found = [score(name, prediction, APIS)[0] for name in ("functional_accuracy", "golden_call", "hallucinated_call")]
    assert found == [right, golden, invented]


UNANSWERABLE = Question("u", "Who rules the moon?", (), (), "test_new_documents", {"kind": "unanswerable"})


@pytest.mark.parametrize(("text", "right"), [("The documents do not say.", 1.0), ("Town3", 0.0)])
def test_abstaining_is_right_where_there_is_no_answer(text, right):
    prediction = predict(f"<ANSWER>: {text}", question=UNANSWERABLE)
    for metric, rubric in (("exact_match", Rubric("en")), ("accuracy", LABELS), ("functional_accuracy", APIS)):
        assert score(metric, prediction, rubric) == (right, 1.0), metric
    closed_book = predict(f"<ANSWER>: {text}", (), "finetuned", UNANSWERABLE)
    assert score("hallucination", closed_book, Rubric("en")) == (1.0 - right, 1.0)


def test_a_failed_row_is_no_right_abstention():
    prediction = predict("", question=UNANSWERABLE, finish_reason="error", error="out of memory")
    assert score("exact_match", prediction, Rubric("en")) == (0.0, 1.0)


def test_answers_quoted_counts_all_answerable_questions():
    silent = predict("<ANSWER>: Town3")
    wrong_quote = predict("##begin_quote##founded in 1803##end_quote##<ANSWER>: Town3")
    invented = predict("##begin_quote##Town3 is big##end_quote##<ANSWER>: Town3")
    unanswerable = predict("<ANSWER>: The documents do not say.", question=UNANSWERABLE)
    measured = measure(
        [predict(QUOTED), silent, wrong_quote, invented, unanswerable], Rubric("en"), resamples=100, seed=1
    )
    assert (measured["quoted_answer"].value, measured["quoted_answer"].n) == (0.25, 4)
    assert (measured["quote_contains_answer"].value, measured["quote_contains_answer"].n) == (0.5, 2)


def test_without_quotes_in_the_prompt_no_quote_is_missed():
    rubric = Rubric("en", quotes=False)
    assert not {"quoted_answer", "verified_answers"} & measure([predict(QUOTED)], rubric, resamples=100, seed=1).keys()


@pytest.mark.parametrize(
    ("text", "strategy", "shown", "quotes", "expected"),
    [
        (QUOTED, "raft", (3, 4), True, 1.0),
        (QUOTED.replace("<ANSWER>:", "<ANSWER>\uff1a"), "raft", (3, 4), True, 1.0),
        ("<ANSWER>: Town3", "raft", (3, 4), True, 0.0),  # no quote
        ("<ANSWER>: Town3", "raft", (3, 4), False, 1.0),
        ("<ANSWER>: Town3", "finetuned", (), True, 1.0),
        ("<ANSWER>: The documents do not say.", "raft", (3, 4), True, 1.0),
        ("Town3", "rag", (3, 4), False, 0.0),  # no mark
        ("<ANSWER>:", "finetuned", (), True, 0.0),  # no answer
        ("<ANSWER>: Town3, by the sea", "finetuned", (), True, 0.0),  # longer than what was taught
    ],
)
def test_style_is_the_mark_a_quote_and_the_length(text, strategy, shown, quotes, expected):
    prediction = predict(text, shown, strategy)
    assert score("in_form", prediction, Rubric("en", quotes=quotes, longest_answer=10)) == (expected, 1.0)


@pytest.mark.parametrize("task", SHOWN)
def test_every_task_shows_metrics_that_it_has(task):
    shown, known = SHOWN[task], {metric.name for metric in metrics_of(task)}
    names = {shown.main, shown.right, shown.alarm, shown.against_latency, shown.hallucination}
    assert names | {*shown.columns, *shown.compared, *shown.told, *shown.plotted} <= known
    assert {shown.alarm, *shown.told} <= {*shown.compared}
    assert len(shown.columns) <= 5


def test_golden_places_outside_the_catalogue_are_not_scored():
    elsewhere = dataclasses.replace(QUESTION, golden=(Golden("unknown"),))
    prediction = predict("<ANSWER>: torch.hub.load('r', 'say')", question=elsewhere)
    assert score("functional_accuracy", prediction, APIS) == (0.0, 0.0)
