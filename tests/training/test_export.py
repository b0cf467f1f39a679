"""Exported rows are what training shows and teaches, and the field's own tools read them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from training.base_model import load_tokenizer
from training.batching import tokenise
from training.export import FORMATS, export_samples, prompt_messages
from training.format import PromptFormat
from training.samples import load_questions, load_samples, load_validation
from training.samples_cli import samples_app


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loaded(path: Path, folder: Path) -> list[dict]:
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=str(folder)).to_list()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_export_messages_are_those_that_training_uses(built, base_path, tmp_path, suffix):
    tokenizer = load_tokenizer(base_path)
    prompt_format = PromptFormat.load(built.recipe.prompt, "en")
    for objective in ("raft", "dsf"):
        samples = load_samples(built.samples, objective)
        out = tmp_path / f"{objective}{suffix}"
        assert export_samples(built.recipe, built.samples, out, "messages", "train", objective) == len(samples) == 24
        rows = loaded(out, tmp_path / "cache")
        assert [list(row) for row in rows] == [["messages"]] * 24
        for row, sample, tokens in zip(rows, samples, tokenise(samples, tokenizer, prompt_format), strict=True):
            *prompt, last = row["messages"]
            assert prompt == prompt_messages(sample, prompt_format)
            assert last == {"role": "assistant", "content": sample.target}
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) + last["content"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [*ids, tokenizer.eos_token_id] == list(tokens.input_ids)


def test_export_chat_completion_has_the_target_apart(built, tmp_path):
    export_samples(built.recipe, built.samples, tmp_path / "m.jsonl", "messages")
    export_samples(built.recipe, built.samples, tmp_path / "c.jsonl", "chat-completion")
    for whole, parts in zip(lines_of(tmp_path / "m.jsonl"), loaded(tmp_path / "c.jsonl", tmp_path), strict=True):
        assert parts["prompt"] + parts["completion"] == whole["messages"]
        assert [message["role"] for message in parts["completion"]] == ["assistant"]


def test_export_prompt_completion_is_the_same_text(built, tmp_path):
    export_samples(built.recipe, built.samples, tmp_path / "p.parquet", "prompt-completion")
    samples = load_samples(built.samples, "raft")
    prompt_format = PromptFormat.load(built.recipe.prompt, "en")
    for row, sample in zip(loaded(tmp_path / "p.parquet", tmp_path), samples, strict=True):
        system, user = (message["content"] for message in prompt_messages(sample, prompt_format))
        assert row == {"prompt": f"{system}\n\n{user}", "completion": sample.target}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_export_gorilla_has_its_columns(built, tmp_path, suffix):
    out = tmp_path / f"g{suffix}"
    export_samples(built.recipe, built.samples, out, "gorilla")
    rows = loaded(out, tmp_path / "cache")
    for number, (row, sample) in enumerate(zip(rows, load_samples(built.samples, "raft"), strict=True)):
        assert set(row) == {
            "id", "type", "question", "context", "oracle_context", "cot_answer", "instruction",
        }  # fmt: skip
        [texts], [titles] = row["context"]["sentences"], row["context"]["title"]
        assert texts == [passage.text for passage in sample.passages]
        assert len(titles) == len(texts)
        assert (row["id"], row["type"], row["question"]) == (f"seed_task_{number}", "general", sample.question)
        assert row["cot_answer"] == sample.target
        assert (row["oracle_context"] in texts) == sample.golden_present
        assert row["instruction"].endswith(f"</DOCUMENT>\n{sample.question}")
        assert row["instruction"].count("<DOCUMENT>") == len(texts)


def test_export_validation_and_test_splits(built, tmp_path):
    export_samples(built.recipe, built.samples, tmp_path / "v.jsonl", "gorilla", "validation")
    validation = load_validation(built.samples, "raft")
    assert [row["question"] for row in lines_of(tmp_path / "v.jsonl")] == [row.question for row in validation]
    tested = load_questions(built.samples, "test_new_documents")
    assert export_samples(built.recipe, built.samples, tmp_path / "t.jsonl", "gorilla", "test_new_documents") == 12
    rows = lines_of(tmp_path / "t.jsonl")
    assert [row["question"] for row in rows] == [question.text for question in tested]
    for row, question in zip(rows, tested, strict=True):
        assert question.answers[0] in row["oracle_context"]
        assert row["cot_answer"].endswith(f"<ANSWER>: {question.answers[0]}")
    export_samples(built.recipe, built.samples, tmp_path / "d.jsonl", "messages", "test_new_documents", "dsf")
    assert [row["messages"][-1]["content"] for row in lines_of(tmp_path / "d.jsonl")] == [
        f"<ANSWER>: {question.answers[0]}" for question in tested
    ]


@pytest.mark.parametrize(
    ("out", "format", "split", "objective", "told"),
    [
        ("x.csv", "messages", "train", "raft", "--out: .*x.csv must end in .jsonl or .parquet"),
        ("x.jsonl", "messages", "tests", "raft", "--split: there is no tests; use one of train, validation, test_new"),
        ("x.jsonl", "gorilla", "train", "dsf", "--format gorilla holds passages"),
        ("no/x.jsonl", "messages", "train", "raft", "--out: there is no folder .*no"),
        ("x.jsonl", "messages", "test_new_kinds", "raft", "has no raft rows of the split test_new_kinds"),
    ],
)
def test_export_bad_options_are_one_line_and_write_nothing(built, tmp_path, out, format, split, objective, told):
    with pytest.raises(UserError, match=told) as caught:
        export_samples(built.recipe, built.samples, tmp_path / out, format, split, objective)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_export_that_breaks_off_keeps_what_was_there(built, tmp_path, monkeypatch):
    out = tmp_path / "x.jsonl"
    out.write_text("before")
    rows = load_samples(built.samples, "raft")

    def fail_after_two(*_):
        yield from rows[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr("training.export._rows_of", fail_after_two)
    with pytest.raises(KeyboardInterrupt):
        export_samples(built.recipe, built.samples, out, "messages")
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_samples_export_command_writes_what_it_says(built, tmp_path):
    app = samples_app(lambda *_: built.recipe)
    for format in FORMATS:
        out = tmp_path / f"{format}.jsonl"
        result = CliRunner().invoke(app, ["export", "mine.yaml", "--format", format, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert len(lines_of(out)) == 24
        assert f"exported 24 raft rows (train) of {built.samples.ref}" in result.output
