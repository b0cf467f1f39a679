import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.questions import read_beir_questions, read_qrels, read_questions, write_questions
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
        answers=st.lists(text.filter(str.strip), max_size=3, unique=True).map(tuple),
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
        (b'{"_id": null, "text": "q"}', r":1 has no id in its column '_id'"),
        (b'{"_id": "q", "text": "t", "answers": [true]}', r":1 has an answer that is no text"),
        (b'{"_id": "q", "text": "t", "answers": [" "]}', r":1 has a blank answer"),
        (b'{"_id": "q", "text": "t", "golden": [{"doc_id": "d", "start": 5, "end": 5}]}', r":1 has a golden entry"),
        (b'{"_id": "q", "text": "t", "golden": [null]}', r":1 has a golden entry"),
        (b'{"_id": "q", "text": "t", "split": 1}', r":1 has a 'split' that is no text"),
        (b'{"_id": "q", "text": "t", "reasoning": ["a"]}', r":1 has a 'reasoning' that is no text"),
        (b'{"_id": "q", "text": "t", "metadata": [1]}', r":1 has a 'metadata' that is no object"),
        (b'{"_id": "q", "text": "t", "x": NaN}', r":1 is not JSON"),
        (b'{"_id": "q", "text": "\\ud800"}', r":1 holds half a UTF-16 character"),
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


def write_beir(folder: Path, qrels: str) -> Path:
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    rows = [{"_id": f"q{n}", "text": f"question {n}"} for n in range(4)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_read_beir_questions_only_judged_questions_with_relevant_documents_as_golden(tmp_path: Path) -> None:
    write_beir(tmp_path, "query-id\tcorpus-id\tscore\nq2\td 1\t2\nq2\td2\t0\r\nq0\td2\t1\n\nq2\td3\t1\n")
    for path in (tmp_path, tmp_path / "queries.jsonl"):
        questions, qrels = read_beir_questions(path)
        assert [(q.question_id, q.split) for q in questions] == [("q0", "test"), ("q2", "test")]
        assert questions[1].golden == (Golden("d 1"), Golden("d3"))
        assert qrels == {"q0": {"d2": 1}, "q2": {"d 1": 2, "d2": 0, "d3": 1}}


def test_read_qrels_trec_columns_and_files_without_header_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("q1 0 d1 3\nq1 0 d2 -1\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("q1\td1\t3\nq1\td2\t-1\n", encoding="utf-8")
    assert read_qrels(tmp_path / "a.tsv") == read_qrels(tmp_path / "b.tsv") == {"q1": {"d1": 3, "d2": -1}}


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("query-id\tcorpus-id\tscore\n", r"test\.tsv holds no judgements"),
        ("q0\td1\n", r"test\.tsv:1 is not query-id, corpus-id and score"),
        ("q0\td1\thigh\n", r"test\.tsv:1: score 'high' is not a whole number"),
        ("q0\td1\t1\nq0\td1\t2\n", r"test\.tsv:2 judges 'd1' for 'q0' a second time"),
        ("q9\td1\t1\n", r"judges 1 questions that are not there, such as 'q9'"),
    ],
)
def test_read_beir_questions_bad_judgements_name_key_and_place(tmp_path: Path, qrels: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^--questions: .*{message}"):
        read_beir_questions(write_beir(tmp_path, qrels), "test", "--questions")


def test_read_beir_questions_missing_split_names_the_others(tmp_path: Path) -> None:
    write_beir(tmp_path, "q0\td1\t1\n")
    with pytest.raises(UserError, match=r"dev\.tsv does not exist; splits with judgements: test"):
        read_beir_questions(tmp_path, "dev")


def test_beir_folder_gives_training_and_test_questions_with_all_their_documents(tmp_path: Path) -> None:
    write_beir(tmp_path, "q2\td1\t2\nq3\td9\t0\n")
    (tmp_path / "qrels" / "train.tsv").write_text("q0\td2\t1\nq2\td3\t1\n", encoding="utf-8")
    (tmp_path / "qrels" / "dev.tsv").write_text("q1\td4\t1\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "queries.jsonl"):
        read = {q.question_id: (q.split, q.golden) for q in read_questions(path)}
        assert read == {
            "q2": ("test", (Golden("d1"), Golden("d3"))),
            "q3": ("test", ()),
            "q1": ("train", (Golden("d4"),)),
            "q0": ("train", (Golden("d2"),)),
        }


def test_beir_folder_tests_with_dev_where_there_is_no_test_and_leaves_a_lone_split_open(tmp_path: Path) -> None:
    write_beir(tmp_path, "q2\td1\t2\n")
    assert [(q.question_id, q.split) for q in read_questions(tmp_path)] == [("q2", "")]
    (tmp_path / "qrels" / "test.tsv").rename(tmp_path / "qrels" / "dev.tsv")
    (tmp_path / "qrels" / "train.tsv").write_text("q0\td2\t1\n", encoding="utf-8")
    assert {q.question_id: q.split for q in read_questions(tmp_path)} == {"q2": "test", "q0": "train"}


def test_folder_that_is_not_beir_s_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^questions\.path: .*qrels/test\.tsv does not exist"):
        read_questions(tmp_path)


@pytest.mark.parametrize(
    ("question", "unanswerable"),
    [
        (Question("q", "?", metadata={"kind": "unanswerable", "doc_id": "d"}), True),
        (Question("q", "?", metadata={"is_impossible": True}), True),
        (Question("q", "?", metadata={"answerable": False}), True),
        (Question("q", "?"), False),
        (Question("q", "?", ("a",), metadata={"kind": "unanswerable"}), False),
        (Question("q", "?", (), (Golden("d"),), metadata={"kind": "unanswerable"}), False),
    ],
)
def test_question_without_answers_is_unanswerable_only_where_it_says_so(question: Question, unanswerable: bool) -> None:
    assert question.unanswerable is unanswerable
    assert question.documents == (("d",) if question.golden or question.metadata.get("doc_id") else ())
