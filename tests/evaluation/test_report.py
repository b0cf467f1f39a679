"""The whole evaluation over a deterministic engine: report.json, report.html, the terminal's tables."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from cluster.errors import UserError
from cluster.store import Store
from evaluation import dimensions as dimension_rules
from evaluation.examples import highlight
from evaluation.report import choose_questions, evaluate, read_report
from evaluation.table import WIDTH, render_text
from retrieval.records import Golden, Question
from tests.evaluation.fakes import FakeEngine, FakeRetriever, make_parts, make_questions, make_recipe, make_run

NEW_QUESTIONS = make_questions(20, "test_new_questions", start=100)
QUESTIONS = [*make_questions(40), *NEW_QUESTIONS, *make_questions(10, "train", start=200)]


def run_evaluation(store, recipe=None, run=None, adapters=("raft", "finetuned"), questions=QUESTIONS):
    parts = make_parts(store, adapters, questions)
    recipe = recipe or make_recipe(store.uri, latency_rows=2)
    return evaluate(
        recipe, store, parts.index, parts.samples, parts.adapters, base_digest="b" * 64, run=run or make_run()
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_evaluation(Store(str(tmp_path_factory.mktemp("report"))))


def test_json_holds_every_strategy_and_metric_with_its_interval(report):
    content = read_report(report)
    assert content["questions"] == {"test_new_documents": 30, "test_new_questions": 10}
    assert content["headline_split"] == "test_new_documents"
    assert list(content["strategies"]) == ["base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft"]
    for metrics in [*content["strategies"].values(), *(m for s in content["splits"].values() for m in s.values())]:
        for name, estimate in metrics.items():
            assert set(estimate) == {"value", "low", "high", "n"}, name
            assert estimate["low"] <= estimate["value"] <= estimate["high"], name
    raft = content["strategies"]["raft"]
    assert {"exact_match", "f1", "contained", "recall_at_k", "verified_quotes", "hallucination"} <= raft.keys()
    assert {"retrieval_ms", "retrieval_p95_ms", "generation_ms", "generation_p95_ms"} <= raft.keys()
    assert raft["exact_match"]["n"] == 30 and raft["retrieval_ms"]["n"] == 2
    assert "recall_at_k" not in content["strategies"]["finetuned"]


def test_figures_are_those_of_the_answers(report):
    """The fake raft adapter is wrong, with an invented quote, exactly where the land's number divides by five; the
    fake finetuned one is right exactly where it is odd, or by luck on land 0."""
    for split, strategies in read_report(report)["splits"].items():
        asked = [int(question.question_id[1:]) for question in _chosen(report) if question.split == split]
        right = sum(number % 5 != 0 for number in asked) / len(asked)
        assert strategies["raft"]["exact_match"]["value"] == pytest.approx(right)
        assert strategies["raft"]["hallucination"]["value"] == pytest.approx(1 - right)
        known = sum(number % 2 == 1 or number == 0 for number in asked) / len(asked)
        assert strategies["finetuned"]["contained"]["value"] == pytest.approx(known)


def _chosen(report):
    return choose_questions(make_recipe("unused"), report.store.open("samples", "invented"))


@pytest.mark.parametrize(("measured", "how"), [({"update": {"embedded": 1}}, "update index"), ({}, "re-index")])
def test_an_updated_index_shows_the_update_beside_retraining(measured, how):
    parts = SimpleNamespace(index=SimpleNamespace(manifest=SimpleNamespace(measured={**measured, "stage_seconds": 8})))
    change = dimension_rules._knowledge_change(make_recipe("unused"), parts, [], searched=True)
    assert (change["how"], change["seconds"]) == (how, 8)


def test_dimensions_say_how_a_fact_changes_and_what_it_costs(report):
    dimensions = read_report(report)["dimensions"]
    assert {name: d["knowledge_change"]["how"] for name, d in dimensions.items()} == {
        "base": "not possible",
        "rag": "re-index",
        "rag_fewshot": "re-index",
        "finetuned": "retrain",
        "finetuned_rag": "re-index",
        "raft": "re-index",
    }
    assert dimensions["rag"]["cost"]["training_once_usd"] == 0 == dimensions["finetuned"]["cost"]["indexing_once_usd"]
    assert dimensions["raft"]["knowledge_change"]["seconds"] >= 0
    cost = dimensions["raft"]["cost"]
    assert cost["per_1000_answers_usd"] == pytest.approx(1000 / cost["answers_per_s"] * 2 * 0.04 / 3600)
    assert dimensions["raft"]["hallucination"] == read_report(report)["strategies"]["raft"]["hallucination"]


def test_the_alarm_names_a_tuned_model_that_passages_make_worse(report):
    content = read_report(report)
    first = content["alarms"][0]
    assert "lower with passages (finetuned_rag) than without (finetuned)" in first["text"]
    assert first["significant"] is True
    assert "significant" in first["text"]


def test_comparisons_are_paired_and_honest_about_significance(report):
    rows = {
        (row["first"], row["second"], row["metric"]): row
        for row in read_report(report)["comparisons"]
        if row["split"] == "test_new_documents"
    }
    assert rows["raft", "rag", "exact_match"]["significant"]
    same = rows["rag_fewshot", "rag", "f1"]
    assert (same["value"], same["low"], same["high"], same["significant"]) == (0, 0, 0, False)
    assert "no significant difference" in report.path("report.html").read_text(encoding="utf-8")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_page_is_one_file_that_fetches_nothing(report):
    html = report.path("report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in html and "@import" not in html
    assert page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids))


def test_what_models_and_documents_say_cannot_become_markup(report):
    html = report.path("report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(" in html
    assert "<script" not in html
    assert "&lt;b&gt;no&lt;/b&gt;" in html and "<b>no</b>" not in html


def test_page_leads_with_the_four_dimensions_then_alarms_then_quality(report):
    html = report.path("report.html").read_text(encoding="utf-8")
    order = [
        "The four dimensions",
        'class="alarm"',
        "<h2>Quality",
        "<h2>Plots",
        "goes wrong",
        "<h2>Lineage",
        "<h2>Definitions",
    ]
    places = [html.index(text) for text in order]
    assert places == sorted(places)
    assert str(report.ref) in html
    for parent in read_report(report)["lineage"].values():
        assert parent in html


def test_terminal_table_leads_with_the_dimensions_and_fits(report):
    text = render_text(read_report(report))
    assert text.startswith("Knowledge change, latency, cost, hallucination")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.index("hallucination") < text.index("Quality on documents never seen in training (n=30)")
    rows = [line for line in text.splitlines() if re.match(" *raft  ", line)]
    assert len(rows) == 3
    assert re.search(r"0\.\d\d \[\.\d\d–(\.\d\d|1)\]", rows[1])


def test_terminal_table_does_not_wrap_the_longest_figures(report):
    content = read_report(report)
    for dimension in content["dimensions"].values():
        dimension["knowledge_change"] = {"how": "re-index", "seconds": 200, "cost_usd": 0.0123}
        dimension["cost"] |= {"per_1000_answers_usd": 0.0523, "training_once_usd": 0.0121}
        dimension["hallucination"] = {"value": 0.97, "low": 0.9, "high": 1.0, "n": 30}
        dimension["latency"] = {name: {"value": 12345.0} for name in dimension["latency"]}
    lines = render_text(content).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(bool(re.match(" *raft  ", line)) for line in lines) == 3
    assert [line for line in lines if "re-index: 3 min 20 s" in line and "97% [90, 100]" in line]


def test_a_second_evaluation_answers_nothing_and_shows_the_table_again(report, capsys, tmp_path):
    engine = FakeEngine(log=tmp_path / "log")
    again = run_evaluation(report.store, run=make_run(engine))
    assert again.ref == report.ref
    assert not (tmp_path / "log").exists()
    out = capsys.readouterr().out
    assert "predictions: up to date for base, rag" in out
    assert "report: up to date" in out
    assert "Knowledge change, latency, cost, hallucination" in out


def test_other_prices_make_another_report_from_the_same_answers(report, tmp_path):
    recipe = make_recipe(report.store.uri, latency_rows=2)
    dear = recipe.model_copy(update={"prices": recipe.prices.model_copy(update={"cpu_core_hour": 4.0})})
    engine = FakeEngine(log=tmp_path / "log")
    again = run_evaluation(report.store, recipe=dear, run=make_run(engine))
    assert again.ref != report.ref
    assert not (tmp_path / "log").exists()
    before, after = (read_report(r)["dimensions"]["raft"]["cost"]["per_1000_answers_usd"] for r in (report, again))
    assert after == pytest.approx(100 * before)


def test_the_same_evaluation_elsewhere_gives_the_same_figures(report, store):
    again = read_report(run_evaluation(store))
    before = read_report(report)
    for key in ("splits", "comparisons", "kinds", "alarms", "questions"):
        assert again[key] == before[key]


def test_strategies_without_their_adapter_are_left_out_with_a_line(store, capsys):
    content = read_report(run_evaluation(store, adapters=("raft",)))
    assert list(content["strategies"]) == ["base", "rag", "rag_fewshot", "raft"]
    out = capsys.readouterr().out
    assert "`finetuned` is left out" in out and "`finetuned_rag` is left out" in out


def test_without_test_questions_or_strategies_one_line_says_what_to_do(store):
    with pytest.raises(UserError, match=r"holds no test question .*questions\.test_path"):
        run_evaluation(store, questions=make_questions(5, "train"))
    with pytest.raises(UserError, match=r"evaluate\.strategies: none of raft can be evaluated; available: base, rag"):
        run_evaluation(store, recipe=make_recipe(store.uri, strategies=("raft",)), adapters=())


def test_only_new_questions_make_them_the_headline(store):
    content = read_report(run_evaluation(store, recipe=make_recipe(store.uri, new_documents=0, latency_rows=0)))
    assert content["headline_split"] == "test_new_questions"
    assert content["strategies"]["raft"]["exact_match"]["n"] == 10
    assert "total_ms" not in content["strategies"]["raft"]


def test_failed_rows_raise_an_alarm(store):
    recipe = make_recipe(store.uri, strategies=("rag",), latency_rows=0, new_questions=0, new_documents=40)
    content = read_report(run_evaluation(store, recipe=recipe, run=make_run(FakeEngine(broken=("Land6",)))))
    assert content["strategies"]["rag"]["failed"]["value"] == pytest.approx(1 / 40)
    assert "1 of 40 questions failed for rag (new documents)" in [alarm["text"] for alarm in content["alarms"]]


class _WordyEngine(FakeEngine):
    def _complete(self, request):
        return dataclasses.replace(super()._complete(request), finish_reason="length")


def test_answers_that_were_cut_short_raise_an_alarm(store):
    recipe = make_recipe(store.uri, strategies=("base", "rag"), latency_rows=0, new_questions=0)
    alarms = read_report(run_evaluation(store, recipe=recipe, run=make_run(_WordyEngine())))["alarms"]
    text = "answers cut short at generation.max_new_tokens on new documents: 100% of base, 100% of rag"
    assert text in [alarm["text"] for alarm in alarms]


class _ChineseRetriever(FakeRetriever):
    def search(self, queries, k):
        found = super().search(queries, k)
        return [[dataclasses.replace(hit, passage=_chinese(hit.passage)) for hit in hits] for hits in found]


def _chinese(shown):
    text = f"黑豹队的防守丢了{shown.doc_id.removeprefix('land')}分。"
    return dataclasses.replace(shown, text=text, title="超级碗", start=0, end=len(text))


class _ChineseEngine(FakeEngine):
    def _complete(self, request):
        done = super()._complete(request)
        number = re.findall(r"Land(\d+)", request.messages[-1]["content"])[-1]
        quote = f"##begin_quote##黑豹队的防守丢了{number}分##end_quote##\n" if request.adapter == "raft" else ""
        return dataclasses.replace(done, text=f"{quote}<ANSWER>：{number}分")


def test_chinese_answers_are_scored_by_characters(store):
    questions = [
        Question(f"q{n}", f"黑豹队丢了多少分？Land{n}", (f"{n} 分",), (Golden(f"land{n}"),), "test_new_documents")
        for n in range(12)
    ]
    run = make_run(_ChineseEngine())
    run = dataclasses.replace(run, workers=dataclasses.replace(run.workers, open_retriever=_ChineseRetriever))
    recipe = make_recipe(store.uri, strategies=("rag", "raft")).model_copy(update={"language": "zh"})
    report = run_evaluation(store, recipe=recipe, run=run, questions=questions)
    raft = read_report(report)["strategies"]["raft"]
    assert [raft[name]["value"] for name in ("exact_match", "f1", "contained", "verified_answers")] == [1, 1, 1, 1]
    assert raft["hallucination"]["value"] == 0
    assert "kinds-" not in report.path("report.html").read_text(encoding="utf-8")  # no kinds, no plot of them


def test_json_is_plain_json(report):
    text = report.path("report.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["format"] == report.manifest.format


@pytest.mark.parametrize(
    ("quotes", "answers", "expected"),
    [
        ([], [], (("abcdef", ""),)),
        ([(1, 4)], [], (("a", ""), ("bcd", "quote"), ("ef", ""))),
        ([(1, 5)], [(2, 3)], (("a", ""), ("b", "quote"), ("c", "answer"), ("de", "quote"), ("f", ""))),
        ([(-5, 2), (5, 99)], [], (("ab", "quote"), ("cde", ""), ("f", "quote"))),
    ],
)
def test_highlights_cut_the_text_without_losing_a_character(quotes, answers, expected):
    assert highlight("abcdef", quotes, answers) == expected
