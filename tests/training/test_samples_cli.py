import json

import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import UserError
from tests.training.tiny import passage
from training.records import RaftSample
from training.samples import load_samples, load_validation
from training.samples_cli import samples_app
from training.samples_view import describe_card, describe_sample, mark_quotes, pick_rows


def run(built, *arguments: str):
    return CliRunner().invoke(samples_app(lambda *_: built.recipe), list(arguments))


def shown_ids(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("--- ")]


def test_samples_show_prints_rows_as_a_person_reads_them(built):
    asked = []

    def load(path: str, overrides: list[str]):
        asked.append((path, overrides))
        return built.recipe

    app: typer.Typer = samples_app(load)
    result = CliRunner().invoke(app, ["show", "mine.yaml", "-n", "2", "--set", "seed=17"])
    assert result.exit_code == 0, result.output
    assert asked == [("mine.yaml", ["seed=17"])]
    rows = {row.sample_id: row for row in load_samples(built.samples, "raft")}
    shown = shown_ids(result.output)
    assert len(shown) == 2
    for name in shown:
        row = rows[name]
        assert f"question: {row.question}" in result.output
        assert all(f"      {line}" in result.output for line in row.target.splitlines())
    assert str(built.samples.ref) in result.output
    assert "raft 24" in result.output


def test_samples_show_draws_rows_from_the_seed(built):
    def drawn(*options: str) -> list[str]:
        return shown_ids(run(built, "show", "mine.yaml", "-n", "5", *options).output)

    assert drawn() == drawn("--seed", "17")
    assert len({tuple(drawn("--seed", str(seed))) for seed in range(4)}) > 1
    order = [row.sample_id for row in load_samples(built.samples, "raft")]
    assert drawn() == sorted(drawn(), key=order.index)


def test_samples_show_chooses_by_question_golden_and_split(built):
    rows = load_samples(built.samples, "raft")
    one = rows[7]
    assert shown_ids(run(built, "show", "mine.yaml", "--question", one.question_id).output) == [one.sample_id]
    without = {row.sample_id for row in rows if not row.golden_present}
    shown = shown_ids(run(built, "show", "mine.yaml", "-n", "99", "--without-golden").output)
    assert set(shown) == without
    assert len(shown) == len(without) > 0
    validation = shown_ids(run(built, "show", "mine.yaml", "-n", "99", "--split", "validation").output)
    assert validation == [row.sample_id for row in load_validation(built.samples, "raft")]


def test_samples_show_what_is_not_there_is_one_line(built):
    for options, told in (
        (("--question", "nothing"), "no raft row of the question 'nothing' in its train rows"),
        (("--without-golden", "--objective", "dsf"), "--without-golden is about passages"),
    ):
        result = run(built, "show", "mine.yaml", *options)
        assert isinstance(result.exception, UserError)
        assert told in str(result.exception)
        assert "\n" not in str(result.exception)


def test_samples_show_closed_book_rows_have_no_passages(built):
    result = run(built, "show", "mine.yaml", "--objective", "dsf", "-n", "1")
    assert result.exit_code == 0, result.output
    assert "--- dsf-" in result.output
    assert "golden " not in result.output


def test_samples_build_is_skipped_when_nothing_changed(built):
    result = run(built, "build", "mine.yaml")
    assert result.exit_code == 0, result.output


def test_pick_rows_reads_across_files(built, tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(built.samples.path("raft/part-00000.parquet"))
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(table.slice(number * 8, 8), files[-1])
    assert pick_rows(files, 24, 0) == load_samples(built.samples, "raft")
    assert pick_rows(files, 7, 3) == pick_rows([built.samples.path("raft/part-00000.parquet")], 7, 3)


def test_describe_sample_marks_the_golden_passage_and_the_quote_where_it_stands():
    shown = (passage("Cold winters.\nThe total area is  83,871 sq km. More."), passage("Nothing here.", "d2"))
    sample = RaftSample(
        "raft-1", "1", "raft", "Area?", shown, (True, False), True, "", ("The total area is 83,871 sq km.",),
        "83,871 sq km", "##begin_quote##The total area is 83,871 sq km.##end_quote##\n<ANSWER>: 83,871 sq km", "train",
    )  # fmt: skip
    lines = describe_sample(sample).splitlines()
    assert [line.split()[1] for line in lines if line[:4] in ("  1 ", "  2 ")] == ["golden", "distractor"]
    assert "      Cold winters. ⟪The total area is 83,871 sq km.⟫ More." in lines
    assert "\x1b" not in describe_sample(sample)
    assert "\x1b[1m⟪The total" in describe_sample(sample, bold=True)


def test_mark_quotes_that_overlap_are_one():
    assert mark_quotes("a b c d e", ["b c", "c d", "x"]) == "a ⟪b c d⟫ e"
    assert mark_quotes("a b", []) == "a b"


def test_samples_card_prints_what_the_manifest_holds(built):
    card = built.samples.manifest.measured["card"]
    result = run(built, "card", "mine.yaml")
    assert result.exit_code == 0, result.output
    text = result.output
    assert str(built.samples.ref) in text
    for split, kinds in card["questions"].items():
        assert any(line.split()[:2] == [split, str(sum(kinds.values()))] for line in text.splitlines())
    found = card["tokens"]["raft"]
    assert f"mean {found['mean']:g}, median {found['median']}" in text
    held = [count for count in found["counts"] if count]
    bars = [line for line in text.split("Tokens of raft rows")[1].split("\n\n")[0].splitlines() if "–" in line]
    assert [int(line.split()[-1]) for line in bars if int(line.split()[-1])] == held
    longest = max(bars, key=lambda line: int(line.split()[-1]))
    assert longest.count("█") == 40 == max(line.count("█") for line in bars)
    json.dumps(card)


def test_describe_card_of_older_samples_is_one_line():
    with pytest.raises(UserError, match="has no data card"):
        describe_card({}, "samples/x/1")
