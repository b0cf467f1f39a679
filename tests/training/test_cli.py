import pytest
import typer
from typer.testing import CliRunner

from training.cli import describe_sample, samples_app, train_app
from training.samples import load_samples

pytestmark = pytest.mark.usefixtures("local_ray")


def run(app: typer.Typer, *arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_samples_show_prints_rows_as_a_person_reads_them(built):
    asked = []

    def load(path: str, overrides: list[str]):
        asked.append((path, overrides))
        return built.recipe

    result = run(samples_app(load), "show", "mine.yaml", "-n", "2", "--set", "seed=17")
    assert result.exit_code == 0, result.output
    assert asked == [("mine.yaml", ["seed=17"])]
    rows = load_samples(built.samples, "raft")
    assert result.output.count("--- raft-") == 2
    assert rows[0].question in result.output
    assert f"target: {rows[0].target}" in result.output
    assert str(built.samples.ref) in result.output
    assert "raft 24" in result.output


def test_samples_show_closed_book_rows_have_no_passages(built):
    result = run(samples_app(lambda *_: built.recipe), "show", "mine.yaml", "--objective", "dsf", "-n", "1")
    assert result.exit_code == 0, result.output
    assert "--- dsf-" in result.output
    assert "golden " not in result.output


def test_samples_build_is_skipped_when_nothing_changed(built):
    result = run(samples_app(lambda *_: built.recipe), "build", "mine.yaml")
    assert result.exit_code == 0, result.output


def test_describe_sample_marks_the_golden_passage(built):
    row = next(row for row in load_samples(built.samples, "raft") if row.golden_present)
    marks = [line.split()[0] for line in describe_sample(row).splitlines() if line.startswith(("golden", "distr"))]
    assert [mark == "golden" for mark in marks] == list(row.golden)


def test_train_lora_trains_what_is_asked(built, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "training.lora.train_adapter", lambda recipe, store, samples, objective: trained.append(objective)
    )
    for objective in ("raft", "dsf", "both"):
        result = run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", objective)
        assert result.exit_code == 0, result.output
    assert trained == ["raft", "dsf", "raft", "dsf"]
    assert run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", "none").exit_code == 2
