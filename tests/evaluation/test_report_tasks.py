"""Reports of label and API-call tasks, of new kinds of question and of questions without an answer."""

import dataclasses

import pytest

from cluster.store import Store
from evaluation.api_calls import ApiCall, ApiCatalogue
from evaluation.report import read_report
from evaluation.rubric import rubric_of
from evaluation.summary import alarms
from evaluation.table import WIDTH, render_text
from retrieval.records import Question
from tests.evaluation.fakes import FakeEngine, make_parts, make_questions, make_recipe, make_run, number_of
from tests.evaluation.test_report import run_evaluation


class ScriptedEngine(FakeEngine):
    """`raft` says what `says` says about a question's number; every other strategy says the same always."""

    def __init__(self, says, otherwise):
        super().__init__()
        self.says, self.otherwise = says, otherwise

    def _complete(self, request):
        done = super()._complete(request)
        number = number_of(request.messages[-1]["content"])
        text = self.says(number) if request.adapter == "raft" else self.otherwise(request)
        return dataclasses.replace(done, text=f"<ANSWER>: {text}")


def labelled(count):
    return [
        dataclasses.replace(question, answers=("yes" if number % 4 else "no",))
        for number, question in enumerate(make_questions(count))
    ]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """RAFT is always right. DSF says yes, right three times in four; with passages it says nothing of the kind."""
    store = Store(str(tmp_path_factory.mktemp("labels")))
    recipe = make_recipe(store.uri, task="labels", new_documents=40, new_questions=0, latency_rows=1)

    def otherwise(request):
        shown = "<document" in request.messages[-1]["content"]
        return "Yes, it does" if request.adapter == "finetuned" and not shown else "It depends"

    engine = ScriptedEngine(lambda number: "yes" if number % 4 else "no", otherwise)
    return run_evaluation(store, recipe, make_run(engine), questions=labelled(40))


def test_a_label_tasks_report_shows_its_own_metrics(labels):
    content = read_report(labels)
    assert content["task"] == "labels"
    finetuned = content["strategies"]["finetuned"]
    assert finetuned["accuracy"]["value"] == 0.75
    assert finetuned["macro_f1"]["value"] == pytest.approx((2 * 30 / (40 + 30) + 0) / 2)
    assert content["strategies"]["raft"]["macro_f1"]["value"] == 1
    assert content["strategies"]["rag"]["unparsed"]["value"] == 1
    assert not {"exact_match", "f1", "contained"} & (finetuned.keys() | content["definitions"].keys())
    assert content["commonest"] == {"test_new_documents": 0.75}
    rows = {(r["first"], r["second"], r["metric"]): r for r in content["comparisons"]}
    assert rows["raft", "finetuned", "accuracy"]["value"] == 0.25
    assert rows["raft", "finetuned", "macro_f1"]["value"] == pytest.approx(1 - 3 / 7)


def test_the_alarm_about_passages_reads_the_tasks_metric(labels):
    texts = [alarm["text"] for alarm in read_report(labels)["alarms"]]
    assert any(
        "lower with passages (finetuned_rag) than without (finetuned)" in text and "accuracy −0.75" in text
        for text in texts
    )


def test_the_alarm_is_silent_where_another_metric_is_lower():
    row = {"split": "s", "first": "finetuned_rag", "second": "finetuned", "value": -0.1, "low": -0.2, "high": -0.05}
    row |= {"n": 9, "significant": True}
    assert alarms([{**row, "metric": "f1"}], {}, "accuracy") == []
    assert len(alarms([{**row, "metric": "accuracy"}], {}, "accuracy")) == 1


def test_text_and_page_show_accuracy_in_place_of_em(labels):
    text = render_text(read_report(labels))
    assert "accuracy" in text and "macro F1" in text and " EM " not in text
    assert "Always the commonest label: 0.75." in text
    assert max(map(len, text.splitlines())) <= WIDTH
    html = labels.path("report.html").read_text(encoding="utf-8")
    assert "<th>accuracy</th>" in html and "<th>EM</th>" not in html
    assert "Always the commonest label: 0.75." in html
    assert "accuracy (higher is better)" in html


def test_api_calls_are_scored_against_the_corpus(store, monkeypatch):
    """Lands below 20 are maps, the others songs. RAFT names land 1, a map, always; the others invent a call."""
    cards = {f"land{n}": ("Maps" if n < 20 else "Songs", ApiCall("w", f"land{n}")) for n in range(30)}
    catalogue = ApiCatalogue({call: frozenset({domain}) for domain, call in cards.values()}, cards)
    monkeypatch.setattr("evaluation.rubric._catalogue", lambda recipe, parts: catalogue)
    recipe = make_recipe(store.uri, task="api_calls", new_documents=30, new_questions=0, latency_rows=0)
    engine = ScriptedEngine(lambda _: "torch.hub.load('w', 'land1')", lambda _: "torch.hub.load('w', 'land')")
    report = run_evaluation(store, recipe, make_run(engine), questions=make_questions(30))
    content = read_report(report)
    raft, rag = content["strategies"]["raft"], content["strategies"]["rag"]
    assert raft["functional_accuracy"]["value"] == pytest.approx(20 / 30)
    assert raft["golden_call"]["value"] == pytest.approx(1 / 30)
    assert (raft["hallucinated_call"]["value"], rag["hallucinated_call"]["value"]) == (0, 1)
    assert content["dimensions"]["rag"]["hallucination"]["value"] == 1
    assert content["commonest"] == {"test_new_documents": pytest.approx(20 / 30)}
    html = report.path("report.html").read_text(encoding="utf-8")
    assert "Always the commonest domain: 0.67." in html


def test_new_kinds_are_asked_where_the_recipe_says_so(store):
    questions = [*make_questions(12), *make_questions(9, "test_new_kinds", start=50)]
    recipe = make_recipe(store.uri, strategies=("raft",), latency_rows=0, new_questions=0, new_kinds=5)
    content = read_report(run_evaluation(store, recipe, questions=questions))
    assert content["questions"] == {"test_new_documents": 12, "test_new_kinds": 5}
    assert "kinds of question never seen in training (n=5)" in render_text(content)
    plain = make_recipe(store.uri, strategies=("raft",), latency_rows=0, new_questions=0)
    assert "test_new_kinds" not in read_report(run_evaluation(store, plain, questions=questions))["questions"]


def test_abstaining_from_a_question_without_an_answer_is_right(store):
    unanswerable = [
        Question(f"u{n}", f"Who rules Land{n}?", (), (), "test_new_documents", {"kind": "unanswerable"})
        for n in range(4)
    ]
    recipe = make_recipe(store.uri, strategies=("rag", "raft"), latency_rows=0, new_questions=0)
    engine = ScriptedEngine(lambda n: "The documents do not say." if n < 4 else f"Town{n}", lambda _: "Town1")
    questions = [*unanswerable, *make_questions(6, start=4)]
    content = read_report(run_evaluation(store, recipe, make_run(engine), questions=questions))
    raft, rag = content["strategies"]["raft"], content["strategies"]["rag"]
    assert (raft["exact_match"]["value"], raft["exact_match"]["n"]) == (1, 10)
    assert rag["exact_match"]["value"] == 0
    assert raft["quoted_answer"]["n"] == 6


def test_the_longest_answer_taught_bounds_style(store):
    train = [
        dataclasses.replace(q, answers=("x" * length,))
        for q, length in zip(make_questions(3, "train"), (5, 120, 121), strict=True)
    ]
    parts = make_parts(store, questions=[*train, dataclasses.replace(make_questions(1)[0], answers=("y" * 110,))])
    assert rubric_of(make_recipe(store.uri), parts).longest_answer == 120
    assert rubric_of(make_recipe(store.uri), dataclasses.replace(parts, samples=None)).longest_answer is None
