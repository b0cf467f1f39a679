import contextlib
import json

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from retrieval.questions import read_questions
from retrieval.retriever import Retriever
from tests.training.teacher_stub import Answer, running
from training.asking import LocalTeacher
from training.chat_response import Reply
from training.questions_cli import questions_app
from training.samples import build_samples, load_samples


def refuse_local(recipe):
    raise AssertionError("an endpoint needs no local model")


def question_about(prompt: str) -> str:
    """A question about the last passage of a prompt: what stands at its beginning, word for word."""
    title = prompt.rpartition("Title: ")[2].split("\n")[0]
    passage = prompt.rpartition("<document>\n")[2].partition("\n</document>")[0]
    line = next(line for line in passage.splitlines() if len(line.split()) > 3)
    asked = {"kind": "fact", "question": f"What is said of {title} beside {len(passage)}?"}
    return json.dumps({"questions": [{**asked, "answer": line.split()[1], "quote": line}]})


def recipe_for(built, folder, **teacher):
    values = {"model": "stub-1", "kinds": ("fact",), "directory": str(folder / "teacher"), "min_chunk_chars": 20}
    section = type(built.recipe.teacher).model_validate({**values, **teacher})
    return built.recipe.model_copy(update={"teacher": section})


def generate(recipe, *arguments, local=refuse_local):
    return CliRunner().invoke(
        questions_app(lambda *_: recipe, local), ["generate", "mine.yaml", *arguments], catch_exceptions=True
    )


def test_generated_questions_become_samples(built, tmp_path, monkeypatch):
    stubs = []

    def script(place, nth):
        return Answer(content=question_about(stubs[0].seen[-1].body["messages"][-1]["content"]))

    with running(script) as stub:
        stubs.append(stub)
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        recipe = recipe_for(built, tmp_path, concurrency=1)
        result = generate(recipe, "--limit", "12", "--out", str(tmp_path / "asked.jsonl"))
    assert result.exit_code == 0, result.output
    assert len(stub.seen) == 12
    questions = read_questions(tmp_path / "asked.jsonl")
    retriever = Retriever.open(built.index, recipe.encoder, recipe.search)
    documents = {document.doc_id: document.text for document in retriever.documents()}
    assert len({question.golden[0].doc_id for question in questions}) > 3
    for question in questions:
        golden = question.golden[0]
        assert question.answers[0] in documents[golden.doc_id][golden.start : golden.end]
    section = recipe.questions.model_copy(update={"path": str(tmp_path / "asked.jsonl")})
    samples = build_samples(recipe.model_copy(update={"questions": section}), built.store, built.index)
    rows = load_samples(samples, "raft")
    assert rows
    assert {row.question for row in rows} <= {question.text for question in questions}
    assert any(row.quotes for row in rows)


def test_local_engine_is_opened_and_closed(built, tmp_path):
    opened = []

    @contextlib.contextmanager
    def local(recipe):
        opened.append("open")
        yield LocalTeacher("tiny", lambda request: Reply(question_about(request.messages[-1]["content"])), 2)
        opened.append("closed")

    result = generate(recipe_for(built, tmp_path, engine="local"), "--limit", "3", local=local)
    assert result.exit_code == 0, result.output
    assert opened == ["open", "closed"]
    assert len(read_questions(tmp_path / "teacher" / "tiny" / "questions.jsonl")) == 3


def test_missing_address_is_told_before_anything_is_asked(built, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    result = generate(recipe_for(built, tmp_path))
    assert isinstance(result.exception, UserError)
    assert "OPENAI_BASE_URL is not set" in str(result.exception)


@pytest.mark.parametrize("limit", ["0", "-1", "some"])
def test_limit_must_be_a_number_of_chunks(built, tmp_path, limit):
    assert generate(recipe_for(built, tmp_path), "--limit", limit).exit_code == 2
