import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.questions import read_questions, write_questions
from retrieval.records import Golden, Question

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
golden = st.one_of(
    st.builds(Golden, text),
    st.tuples(text, st.integers(0, 99), st.integers(1, 99)).map(lambda t: Golden(t[0], t[1], t[1] + t[2])),
)
questions = st.lists(
    st.builds(
        Question,
        question_id=text,
        text=text.filter(str.strip),
        answers=st.lists(text, max_size=3).map(tuple),
        golden=st.lists(golden, max_size=3).map(tuple),
        split=st.sampled_from(["", "train", "valid"]),
        metadata=st.dictionaries(text, st.one_of(text, st.integers(), st.booleans()), max_size=2),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda question: question.question_id,
)


@settings(max_examples=60, deadline=None)
@given(questions)
def test_questions_written_and_read_are_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Question]
) -> None:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(path, rows)
    assert read_questions(path) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", r":1 is not JSON"),
        (b'{"_id": "q"}', r":1 has no text"),
        (b'{"text": "q"}', r":1 has no _id"),
        (b'{"_id": "q", "text": "t", "answers": "x"}', r":1: answers must be a list of strings"),
        (b'{"_id": "q", "text": "t", "golden": [{"doc_id": "d", "start": 5, "end": 5}]}', r":1: golden entry"),
        (b'{"_id": "q", "text": "t", "golden": [null]}', r":1: golden entry"),
        (b'{"_id": "q", "text": "t"}\n{"_id": "q", "text": "t"}', r":2 repeats the id 'q'"),
        (b"\n", r"holds no questions"),
    ],
)
def test_read_questions_bad_line_names_key_and_place(tmp_path: Path, row: bytes, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(row)
    with pytest.raises(UserError, match=rf"^questions\.test_path: .*{message}"):
        read_questions(path, "questions.test_path")


def test_read_questions_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^questions\.path: .* does not exist"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"^questions\.path is empty"):
        read_questions("")


def test_read_questions_beir_queries_need_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"_id": 1, "text": "what?"}), encoding="utf-8")
    assert read_questions(path) == [Question("1", "what?")]
