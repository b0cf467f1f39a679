"""The runs of docs/results.md: read, carried out one after another, resumed, and none stopped by another's failure."""

import dataclasses
import json
from pathlib import Path

import pytest

import rayft
from benchmarks import results
from benchmarks.results_cells import read_cells
from benchmarks.results_runs import Workplace, carry_out_next, command_of, settings_of
from cluster.errors import UserError
from cluster.manifest import ArtifactRef
from cluster.recipe import load_recipe
from evaluation.summary import REPORT_FORMAT
from tests.benchmarks.fake_results import make_report, publish_report

ROOT = Path(rayft.__file__).parent
FILES = ("results.yaml", "results_gpu.yaml")

CELLS = """
steps:
  all: [index build, train lora --force, release, evaluate]
  answers: [release, evaluate]
runs:
  - {name: first, part: table, column: One, recipe: factbook, settings: [seed=3]}
  - {name: second, part: table, column: One, like: first, settings: [name=second, seed=4]}
grids:
  - {part: passages, like: first, steps: answers, axes: {generation.passages: [1, 2], seed: [5]}}
"""


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.yaml"
    path.write_text(CELLS, encoding="utf-8")
    return path


class FakeRayft:
    """Takes the commands down, fails where told, and publishes a report at `evaluate`."""

    def __init__(self, store, failing=()):
        self.store, self.failing, self.asked = store, failing, []

    def __call__(self, words, log):
        self.asked.append(words)
        text = " ".join(words)
        with log.open("a", encoding="utf-8") as file:
            if any(part in text for part in self.failing):
                file.write("rayft: train.workers is 9: the cluster holds 2\nsome trailing noise\n")
                return 2
            file.write("fine\n")
        if words[0] == "evaluate":
            name = next((word[5:] for word in words if word.startswith("name=")), "factbook")
            publish_report(self.store, name, make_report({"raft": 0.5 + len(self.asked) / 100}))
        return 0


def place_of(store, tmp_path, **options):
    rayft_command = FakeRayft(store, **options)
    return Workplace(tmp_path / "work", store, call=rayft_command), rayft_command


def test_a_grid_and_a_likeness_are_filled_in(cells):
    runs = {run.name: run for run in read_cells(cells)}
    assert list(runs) == ["first", "second", "first-passages-1-seed-5", "first-passages-2-seed-5"]
    assert runs["second"].settings == ("seed=3", "name=second", "seed=4")
    last = runs["first-passages-2-seed-5"]
    assert (last.recipe, last.column, last.settings) == (
        "factbook",
        "One",
        ("seed=3", "generation.passages=2", "seed=5"),
    )
    assert last.axes == (("generation.passages", 2), ("seed", 5))
    assert last.steps == ("release", "evaluate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {}\nruns: [{name: a, part: table, recipe: x}]", "no steps are named all"),
        ("steps: {all: []}\nruns: [{name: a, part: table}]", "neither a recipe"),
        ("steps: {all: []}\nruns: [{name: a, part: table, like: b}]", "like b, which is no run before it"),
        ("steps: {all: []}\nruns: [{name: a, part: tabel, recipe: x}]", r"runs\.0\.part"),
        ("steps: {all: []}\nruns: [{name: a, part: table, recipe: x}, {name: a, part: table, recipe: x}]", "two runs"),
        ("steps: [", "cannot read"),
    ],
)
def test_a_mistake_in_the_cells_file_is_named(tmp_path, text, message):
    path = tmp_path / "cells.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_cells(path)


@pytest.mark.parametrize("name", FILES)
def test_the_committed_runs_load_their_recipes(name, tmp_path):
    for run in read_cells(ROOT / "benchmarks" / name):
        for key in ("corpus", "questions"):
            if run.data:
                (tmp_path / run.data).mkdir(exist_ok=True)
                (tmp_path / run.data / f"{key}.jsonl").touch()
        recipe = load_recipe(run.recipe, settings_of(run, tmp_path, "store"), rayft.Recipe)
        assert recipe.store.uri == "store"
        assert not recipe.prompt.path or (ROOT / recipe.prompt.path).is_file()


def test_the_committed_cells_are_those_of_the_page():
    runs = read_cells(ROOT / "benchmarks" / "results.yaml")
    parts = [run.part for run in runs]
    assert {part: parts.count(part) for part in parts} == {
        **{"table": 5, "quotes": 1, "reasoning": 1, "retriever": 1, "chinese": 2, "passages": 5, "ablation": 6}
    }
    wide = read_cells(ROOT / "benchmarks" / "results_gpu.yaml")
    assert sum(run.part == "ablation" for run in wide) == 16


def test_a_licence_is_accepted_only_where_the_caller_says_so(cells):
    run = read_cells(cells)[0]
    assert settings_of(run, None, "s") == ["store.uri=s", "seed=3"]
    assert settings_of(run, None, "s", "gemma") == ["store.uri=s", "model.accept_licence=gemma", "seed=3"]


def test_a_steps_own_options_come_last():
    words = command_of("train lora --objective raft --set seed=9", "factbook", ["seed=3", "name=x"])
    assert words == [
        *("train", "lora", "factbook", "--set", "seed=3", "--set", "name=x"),
        *("--objective", "raft", "--set", "seed=9"),
    ]


def test_runs_are_carried_out_in_order_and_not_repeated(store, tmp_path, cells):
    place, command = place_of(store, tmp_path)
    runs = read_cells(cells)
    records = [carry_out_next(place, run, REPORT_FORMAT, "") for run in runs]
    assert [record.state for record in records] == ["done"] * 4
    assert [words[0] for words in command.asked] == ["index", "train", "release", "evaluate"] * 2 + [
        "release",
        "evaluate",
    ] * 2
    assert records[0].report != records[1].report
    assert [step for step, _ in records[0].seconds] == list(runs[0].steps)
    before = len(command.asked)
    assert [carry_out_next(place, run, REPORT_FORMAT, "") for run in runs] == records
    assert len(command.asked) == before


def test_a_changed_cell_is_run_again(store, tmp_path, cells):
    place, command = place_of(store, tmp_path)
    carry_out_next(place, read_cells(cells)[0], REPORT_FORMAT, "")
    cells.write_text(CELLS.replace("seed=3", "seed=6"), encoding="utf-8")
    carry_out_next(place, read_cells(cells)[0], REPORT_FORMAT, "")
    assert len(command.asked) == 8


def test_an_edited_recipe_or_prompt_is_another_run(tmp_path, cells, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, prompt = tmp_path / "mine.yaml", tmp_path / "prompt.yaml"
    cells.write_text(CELLS.replace("recipe: factbook", "recipe: mine.yaml"), encoding="utf-8")
    digests = []
    for content, words in (("name: x", "a"), ("name: x # said otherwise", "a"), ("name: y", "a"), ("name: y", "b")):
        recipe.write_text(f"{content}\nprompt: {{path: prompt.yaml}}\n", encoding="utf-8")
        prompt.write_text(words, encoding="utf-8")
        digests.append(read_cells(cells)[0].digest())
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    recipe.unlink()
    assert read_cells(cells)[0].digest() not in digests


def test_a_failing_run_is_recorded_and_the_others_go_on(store, tmp_path, cells, capsys):
    place, command = place_of(store, tmp_path, failing=("train lora factbook --set store.uri", "seed=5"))
    runs = read_cells(cells)[:2]
    command.failing = ("seed=3 --force",)
    records = [carry_out_next(place, run, REPORT_FORMAT, "") for run in runs]
    assert [record.state for record in records] == ["failed", "done"]
    assert records[0].reason == (
        "`rayft train lora --force` ended with status 2: rayft: train.workers is 9: the cluster holds 2"
    )
    assert [words[0] for words in command.asked] == ["index", "train", "index", "train", "release", "evaluate"]
    command.failing = ()
    assert carry_out_next(place, runs[0], REPORT_FORMAT, "").state == "done"
    assert "failed: `rayft train lora" in capsys.readouterr().out


def test_a_command_that_crashes_is_tried_once_more(store, tmp_path, cells):
    place, command = place_of(store, tmp_path)
    run = read_cells(cells)[0]
    crashes = iter([137, 0, 0, 1, 1])

    def crashing(words, log):
        return command(words, log) or next(crashes, 0) if words[0] == "train" else command(words, log)

    place = dataclasses.replace(place, call=crashing)
    assert carry_out_next(place, run, REPORT_FORMAT, "").state == "done"
    assert [words[0] for words in command.asked] == ["index", "train", "train", "release", "evaluate"]
    (tmp_path / "work" / "first.json").unlink()
    next(crashes)
    record = carry_out_next(place, run, REPORT_FORMAT, "")
    assert record.state == "failed" and "ended with status 1" in record.reason


def test_a_report_of_an_older_format_is_made_again_without_training(store, tmp_path, cells):
    place, command = place_of(store, tmp_path)
    run = read_cells(cells)[0]
    first = carry_out_next(place, run, REPORT_FORMAT, "")
    publish_report(store, "factbook", make_report({"raft": 0.9}), REPORT_FORMAT - 1)
    promoted = store.current("release", "factbook")
    old = store.current("report", "factbook")
    path = tmp_path / "work" / "first.json"
    row = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**row, "report": f"report/factbook/{old}"}), encoding="utf-8")
    command.asked.clear()
    again = carry_out_next(place, run, REPORT_FORMAT, "")
    assert [words[0] for words in command.asked] == ["evaluate"]
    assert command.asked[0][-2:] == ["--release", promoted]
    assert again.release == first.release and again.conditions == first.conditions
    assert store.open_ref(ArtifactRef.parse(again.report)).manifest.format == REPORT_FORMAT


def test_a_data_set_that_is_not_there_fails_its_run_alone(store, tmp_path, cells):
    cells.write_text(CELLS.replace("seed=3]", "seed=3], data: xquad-en"), encoding="utf-8")
    place, command = place_of(store, tmp_path)
    record = carry_out_next(place, read_cells(cells)[0], REPORT_FORMAT, "")
    assert record.state == "failed" and "needs --data DIR with xquad-en/corpus.jsonl" in record.reason
    assert command.asked == []


def test_the_command_writes_the_page_and_tells_what_failed(store, tmp_path, cells, monkeypatch, capsys):
    command = FakeRayft(store, failing=("seed=4 --force",))
    monkeypatch.setattr(results, "Workplace", lambda *parts: Workplace(*parts, call=command))
    words = [
        "--cells",
        str(cells),
        "--store",
        store.uri,
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "docs/r.md"),
    ]
    assert results.main([*words, "--only", "table"]) == 1
    page = (tmp_path / "docs" / "r.md").read_text(encoding="utf-8")
    assert "| RAFT | 0.54 [0.49, 0.59] |" in page
    assert "failed: second" in capsys.readouterr().out
    asked = len(command.asked)
    assert results.main([*words, "--assemble"]) == 0
    assert len(command.asked) == asked
    assert results.main([*words, "--only", "tabel"]) == 2
    assert "no run or part is named tabel" in capsys.readouterr().err
