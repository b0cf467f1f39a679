"""`rayft evaluate` and `rayft batch` as a user types them, over a deterministic engine."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

import evaluation.parts
import evaluation.report
from cluster.errors import UserError
from cluster.releases import promote, publish_release
from evaluation.cli import register
from evaluation.records import Prediction
from retrieval.config import QuestionColumns
from retrieval.questions import write_questions
from tests.evaluation.fakes import make_parts, make_questions, make_recipe, make_run

DIGEST = "b" * 64


@pytest.fixture
def command(store, monkeypatch):
    """Runs a command line against a store with a promoted release; user errors come through as exceptions."""
    recipe = make_recipe(store.uri, latency_rows=0, strategies=("rag", "raft"))
    parts = make_parts(store, questions=make_questions(8))
    ref = publish_release(
        store,
        recipe.name,
        index=parts.index.ref,
        samples=parts.samples.ref,
        adapters={name: adapter.ref for name, adapter in parts.adapters.items()},
        base_digest=DIGEST,
    )
    promote(store, recipe.name, ref.version)
    monkeypatch.setattr("cluster.session.ray_session", lambda config: contextlib.nullcontext())  # the engine is a fake
    digests = [DIGEST]
    monkeypatch.setattr("training.base_model.base_model_directory", lambda config: Path("base"))
    monkeypatch.setattr("cluster.model_source.model_digest", lambda directory: digests[0])
    monkeypatch.setattr(evaluation.parts, "default_run", lambda *args, **kwargs: make_run())
    monkeypatch.setattr(evaluation.report, "default_run", lambda *args, **kwargs: make_run())
    app = typer.Typer()
    register(app, lambda name, overrides: recipe)

    def run(*arguments):
        result = CliRunner().invoke(app, [*arguments])
        if isinstance(result.exception, UserError):
            raise result.exception
        return result

    run.digests = digests
    run.recipe = recipe
    run.version = ref.version
    return run


def test_evaluate_reports_on_the_promoted_release(command):
    result = command("evaluate", "invented")
    assert result.exit_code == 0, result.output
    assert "Knowledge change, latency, cost, hallucination" in result.output
    assert "report.html" in result.output


def test_evaluate_refuses_another_base_model_naming_both(command):
    command.digests[0] = "c" * 64
    with pytest.raises(UserError, match=r"model\.base: .*cccccccc.* is not the base model of .*bbbbbbbb"):
        command("evaluate", "invented")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_batch_answers_any_questions_file(command, tmp_path, suffix):
    questions = tmp_path / "asked.jsonl"
    questions.write_text('{"_id": "a", "text": "Where is Land3?"}\n{"_id": "b", "text": "Where is Land5?"}\n')
    output = tmp_path / f"answers{suffix}"
    result = command("batch", "invented", "--questions", str(questions), "--strategy", "raft", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "2 answers" in result.output and "EM" not in result.output  # no accepted answers, no quality
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pq.read_table(output).to_pylist()
    answers = {p.question.question_id: p.answer for p in map(Prediction.from_row, rows)}
    assert answers["a"].answer == "Town3" and answers["a"].citations[0].verified
    assert answers["a"].release == command.version
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_batch_measures_quality_where_answers_are_known(command, tmp_path):
    write_questions(tmp_path / "asked.jsonl", make_questions(10))
    result = command("batch", "invented", "--questions", str(tmp_path / "asked.jsonl"), "--strategy", "raft")
    assert "EM 80% [" in result.output.replace("\n", " ")


def test_batch_reads_the_columns_that_the_recipe_names(command, tmp_path, monkeypatch):
    columns = QuestionColumns(id="key", text="asked")
    command.recipe.__dict__["questions"] = command.recipe.questions.model_copy(update={"columns": columns})
    (tmp_path / "asked.csv").write_text("key,asked\na,Where is Land3?\n")
    output = tmp_path / "answers.jsonl"
    arguments = ("--questions", str(tmp_path / "asked.csv"), "--strategy", "raft", "--output", str(output))
    result = command("batch", "invented", *arguments)
    assert result.exit_code == 0, result.output
    [row] = map(json.loads, output.read_text().splitlines())
    assert Prediction.from_row(row).question.question_id == "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "missing.jsonl"], r"--questions: missing\.jsonl does not exist"),
        (["--questions", "asked.jsonl", "--output", "a.csv"], r"--output: a\.csv must end in \.parquet or \.jsonl"),
        (["--questions", "asked.jsonl", "--output", "no/a.jsonl"], "there is no folder no"),
        (["--questions", "asked.jsonl", "--strategy", "magic"], "there is no strategy `magic`"),
        (["--questions", "asked.jsonl", "--release", "0" * 16], "release/invented/0000000000000000"),
    ],
)
def test_batch_mistakes_end_in_one_clear_line(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_questions("asked.jsonl", make_questions(2))
    with pytest.raises(UserError, match=message) as caught:
        command("batch", "invented", *arguments)
    assert "\n" not in str(caught.value)


def test_importing_the_commands_loads_nothing_heavy():
    code = (
        "import sys, evaluation.cli; print(sorted({'torch','ray','numpy','pyarrow','matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
