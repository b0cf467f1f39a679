import json
import math
import time

import pytest
import typer.testing

from cluster.errors import UserError
from retrieval.questions import read_questions, write_questions
from retrieval.records import Golden, Question
from serving.config import ServingRecipe
from serving.feedback_cli import feedback_app
from serving.feedback_store import FeedbackStore, Review
from serving.feedback_view import describe_entry, wilson
from tests.serving.feedback_data import interaction, rating


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/feedback.db"


@pytest.fixture
def kept(url):
    opened = FeedbackStore.open(url, "test")
    opened.rate(interaction("r1"), rating("r1", 1.0))
    opened.rate(
        interaction("r2", question="Who?", answer="Nobody"), rating("r2", 0.0, correction="Athena", comment="!")
    )
    opened.rate(interaction("r3", strategy="rag", user="bob"), rating("r3", 0.0))
    opened.keep([interaction("r4")])
    yield opened
    opened.close()


@pytest.fixture
def run(url, tmp_path):
    """Runs a command; a recipe is made of its overrides, one `questions.path=…` at most."""

    def load(name, overrides):
        sections = {"feedback": {"url": url}, "store": {"uri": str(tmp_path / "store")}}
        for override in overrides:
            key, _, value = override.partition("=")
            section, _, name_of_key = key.partition(".")
            sections.setdefault(section, {})[name_of_key] = value
        return ServingRecipe.model_validate({"name": name, **sections})

    def invoke(*arguments, typed=None):
        runner = typer.testing.CliRunner()
        result = runner.invoke(feedback_app(load), list(map(str, arguments)), input=typed, catch_exceptions=False)
        return result.output

    return invoke


def test_review_lists_what_is_new_as_a_person_reads_it(kept, run):
    told = run("review", "test")
    assert "r2  (raft, intent fact_lookup, " in told
    for line in ("Q: Who?", "A: Nobody", "“Athens is the capital.”", "in greece", "rated 0 ", "correction: Athena"):
        assert line in told
    assert "3 shown" in told
    assert "r4" not in told
    kept.review("r1", Review.REJECTED)
    assert "2 shown" in run("review", "test")
    assert "4 shown" in run("review", "test", "--all")
    assert "nothing new" in run("review", "other")


def test_review_as_json_is_one_object_per_line(kept, run):
    rows = [json.loads(line) for line in run("review", "test", "--json").splitlines()]
    assert [row["request_id"] for row in rows] == ["r1", "r2", "r3"]
    assert (rows[1]["correction"], rows[1]["satisfied"], rows[1]["review"]) == ("Athena", 0.0, "new")
    assert (rows[0]["quotes"], rows[0]["propensity"]) == (["Athens is the capital."], 0.5)


def test_review_on_a_terminal_asks_and_records(kept, run, monkeypatch):
    class Terminal:
        def __init__(self, stream):
            self._stream = stream

        def isatty(self):
            return True

        def __getattr__(self, name):
            return getattr(self._stream, name)

    import sys
    from types import SimpleNamespace

    monkeypatch.setattr(
        "serving.feedback_cli.sys", SimpleNamespace(stdin=Terminal(sys.stdin), stdout=Terminal(sys.stdout))
    )
    told = run("review", "test", typed="x\na\n\nc\nAthena Parthenos\nacropolis, greece\nr\n")
    assert "right answer as known: Athena" in told
    assert [kept.entry(name).review for name in ("r1", "r2", "r3")] == ["accepted", "corrected", "rejected"]
    assert (kept.entry("r2").answer, kept.entry("r2").doc_ids) == ("Athena Parthenos", ("acropolis", "greece"))
    assert kept.entry("r1").doc_ids == ("greece",)


def test_decisions_are_recorded_by_id(kept, run):
    run("accept", "test", "r1", "--doc", "greece-2")
    run("correct", "test", "r2", " Athena ")
    run("reject", "test", "r3")
    assert [kept.entry(name).review for name in ("r1", "r2", "r3")] == ["accepted", "corrected", "rejected"]
    assert kept.entry("r1").doc_ids == ("greece-2",)
    assert kept.entry("r2").answer == "Athena"
    for wrong in (("accept", "test", "never"), ("reject", "other", "r1")):
        with pytest.raises(UserError, match="there is no answer"):
            run(*wrong)
    with pytest.raises(UserError, match="empty"):
        run("correct", "test", "r1", " ")


def test_export_writes_reviewed_answers_that_the_recipe_reads(kept, run, tmp_path):
    out = tmp_path / "feedback.jsonl"
    with pytest.raises(UserError, match="nothing of `test` is accepted"):
        run("export", "test", "--out", out)
    kept.review("r1", Review.ACCEPTED)
    kept.review("r2", Review.CORRECTED, answer="Athena")
    told = run("export", "test", "--out", out)
    questions = read_questions(out)
    assert [(q.question_id, q.answers, q.golden) for q in questions] == [
        ("feedback-r1", ("Athens",), (Golden("greece"),)),
        ("feedback-r2", ("Athena",), ()),
    ]
    assert "1 name no document" in told
    assert "nothing could be checked" in told
    assert "questions.train_path" in told


def test_export_leaves_out_what_the_recipe_tests_with(kept, run, tmp_path):
    tests = [Question("t", "what is the CAPITAL of Greece", ("Rome",), (Golden("greece"),), "test_new_questions")]
    write_questions(tmp_path / "q.jsonl", [*tests, Question("a", "A?", ("1",), (Golden("greece"),), "train")])
    kept.review("r1", Review.ACCEPTED)
    told = ""
    with pytest.raises(UserError, match="no question is left"):
        told = run("export", "test", "--out", tmp_path / "f.jsonl", "--set", f"questions.path={tmp_path}/q.jsonl")
    assert not (tmp_path / "f.jsonl").exists()
    kept.review("r2", Review.ACCEPTED)
    told = run("export", "test", "--out", tmp_path / "f.jsonl", "--set", f"questions.path={tmp_path}/q.jsonl")
    assert "left out 1 of 2: repeats a test question" in told
    assert [question.question_id for question in read_questions(tmp_path / "f.jsonl")] == ["feedback-r2"]


def test_export_keeps_to_a_tenant_or_says_that_several_are_mixed(kept, run, tmp_path):
    kept.rate(interaction("x1", tenant="else", question="Else?"), rating("x1"))
    for name in ("r2", "x1"):
        kept.review(name, Review.ACCEPTED)
    assert "2 tenants" in run("export", "test", "--out", tmp_path / "f.jsonl")
    assert "tenants" not in run("export", "test", "--out", tmp_path / "f.jsonl", "--tenant", "else")
    assert [question.question_id for question in read_questions(tmp_path / "f.jsonl")] == ["feedback-x1"]


@pytest.mark.parametrize("what", ["--user", "--request"])
def test_delete_of_an_empty_name_deletes_nothing(kept, run, what):
    with pytest.raises(UserError, match="names nothing"):
        run("delete", "test", what, "", "--older-than", "0")
    assert "deleted 4 stored" in run("delete", "test", "--older-than", "0")


def test_delete_says_how_many(kept, run):
    with pytest.raises(UserError, match="say what"):
        run("delete", "test")
    assert "deleted 1 stored" in run("delete", "test", "--request", "r1")
    assert "deleted 0 stored" in run("delete", "test", "--user", "alice", "--tenant", "else")
    assert "deleted 2 stored" in run("delete", "test", "--user", "alice")
    kept.rate(interaction("old", user="bob", at=time.time() - 3 * 86_400), rating("old"))
    assert "deleted 1 stored" in run("delete", "test", "--older-than", "2")
    assert [entry.interaction.request_id for entry in kept.entries()] == ["r3"]


def test_stats_give_the_share_with_its_interval(kept, run):
    rows = {row["strategy"]: row for row in json.loads(run("stats", "test", "--json"))}
    assert (rows["raft"]["ratings"], rows["raft"]["corrections"], rows["raft"]["unrated"]) == (2, 1, 1)
    assert rows["raft"]["satisfied"]["value"] == 0.5
    assert rows["rag"]["satisfied"]["value"] == 0.0
    table = run("stats", "test")
    assert "0.50 [0.09, 0.91]" in table


def test_wilson_is_the_set_of_shares_that_a_score_test_does_not_reject():
    for successes, n in ((0, 5), (3, 10), (50, 100), (7, 7)):
        low, high = wilson(successes, n)
        for edge in (low, high):
            if 0 < edge < 1:
                score = (successes / n - edge) / math.sqrt(edge * (1 - edge) / n)
                assert abs(score) == pytest.approx(1.96, abs=1e-4)
        assert low <= successes / n <= high
    assert wilson(0, 0) == (0.0, 1.0)


def test_words_of_users_cannot_steer_the_terminal(kept):
    kept.rate(
        interaction("evil", question="\x1b[2J\x1b]0;owned\x07 Q?\r\n  rated 1"), rating("evil", comment="\x9b31m")
    )
    told = describe_entry(kept.entry("evil"))
    assert not any((ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160 for char in told)
    assert len(told.splitlines()) == 7


def test_feedback_without_a_url_or_a_reachable_database_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r"feedback\.url is empty"):
        run("stats", "test", "--set", "feedback.url=")
    (tmp_path / "noise.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"feedback\.url: .*noise\.db"):
        run("stats", "test", "--set", f"feedback.url=sqlite:///{tmp_path}/noise.db")
