import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from retrieval.config import CorpusConfig
from retrieval.documents import corpus_digest, read_documents, scan_corpus
from retrieval.questions import read_questions
from retrieval.records import Document, Golden, Question
from retrieval.squad import paragraph_id

FIRST = "Oslo is the capital of Norway; the harbour of Oslo is deep."
SECOND = "Bergen lies in the west."


def squad(*paragraphs: dict[str, Any], title: str = "Norway_(country)") -> bytes:
    return json.dumps({"version": "v2.0", "data": [{"title": title, "paragraphs": list(paragraphs)}]}).encode()


def paragraph(context: str, *questions: dict[str, Any]) -> dict[str, Any]:
    return {"context": context, "qas": list(questions)}


def asked(name: str, *answers: tuple[str, Any], **more: Any) -> dict[str, Any]:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": f"{name}?", "answers": given, **more}


FILE = squad(
    paragraph(
        FIRST,
        asked("second", ("Oslo", 46), ("Oslo", 46), ("the harbour of Oslo", 31)),
        asked("shifted", ("Norway", 20)),
        asked("elsewhere", ("a fjord", 3)),
        asked("no", ("Oslo", 0), is_impossible=True, plausible_answers=[{"text": "Oslo", "answer_start": 0}]),
    ),
    paragraph(SECOND, asked("west", ("in the west", 12), hint="compass")),
)
OWN = paragraph_id("Norway_(country)", FIRST)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "dev.json"
    file.write_bytes(FILE)
    return file


def test_questions_name_the_answer_s_characters(path: Path) -> None:
    read = read_questions(path)
    assert read[:3] == [
        Question("second", "second?", ("Oslo", "the harbour of Oslo"), (Golden(OWN, 46, 50), Golden(OWN, 31, 50))),
        Question("shifted", "shifted?", ("Norway",), (Golden(OWN, 23, 29),)),  # the start is three characters off
        Question("elsewhere", "elsewhere?", ("a fjord",), (Golden(OWN),)),
    ]
    assert read[4].metadata == {"hint": "compass"}
    assert [FIRST[g.start : g.end] for g in read[0].golden] == list(read[0].answers)


def test_impossible_question_is_unanswerable_and_knows_its_document(path: Path) -> None:
    (impossible,) = [question for question in read_questions(path) if question.unanswerable]
    assert (impossible.question_id, impossible.answers, impossible.golden) == ("no", (), ())
    assert impossible.documents == (OWN,)


def test_question_whose_answers_are_withheld_is_not_unanswerable(tmp_path: Path) -> None:
    hidden, none = {"id": "hidden", "question": "Where?"}, asked("none")
    (tmp_path / "test.json").write_bytes(squad(paragraph(FIRST, hidden, none)))
    assert [question.unanswerable for question in read_questions(tmp_path / "test.json")] == [False, True]


def test_file_as_corpus_has_the_documents_that_its_questions_name(path: Path) -> None:
    corpus = CorpusConfig(path=str(path))
    documents = list(read_documents(corpus))
    path.write_bytes(squad(paragraph(FIRST), paragraph(SECOND), paragraph(FIRST)))
    assert list(read_documents(CorpusConfig(path=str(path), strict=True))) == documents  # a repeated one is no fault
    path.write_bytes(FILE)
    assert documents == [
        Document(OWN, "Norway (country)", FIRST),
        Document(paragraph_id("Norway_(country)", SECOND), "Norway (country)", SECOND),
    ]
    assert scan_corpus(corpus, 1).sample == (FIRST, SECOND)
    assert read_questions(path, corpora=[corpus]) == read_questions(path)
    assert {g.doc_id for q in read_questions(path) for g in q.golden} == {document.doc_id for document in documents}


def test_corpus_of_several_files_by_pattern_and_none_from_a_folder(path: Path, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(squad(paragraph(FIRST), paragraph("Lapland lies in the north.")))
    (tmp_path / "notes.txt").write_text("Nothing.")
    named = list(read_documents(CorpusConfig(path=str(tmp_path / "*.json"))))
    assert [document.text for document in named] == [FIRST, SECOND, "Lapland lies in the north."]  # each once
    assert [document.text for document in read_documents(CorpusConfig(path=str(tmp_path)))] == ["Nothing."]
    before = corpus_digest(CorpusConfig(path=str(tmp_path)))
    path.write_bytes(b"{}")
    assert corpus_digest(CorpusConfig(path=str(tmp_path))) == before


def test_questions_find_their_paragraphs_in_the_documents_of_the_corpus(path: Path, tmp_path: Path) -> None:
    rows = [
        {"_id": "article", "text": "# Norway\n\nOslo is the capital\n  of Norway; the harbour of Oslo is deep.\nMore."},
        {"_id": "other", "text": "Bergen lies in the west of Norway."},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = CorpusConfig(path=str(tmp_path / "corpus.jsonl"))
    read = {question.question_id: question for question in read_questions(path, corpora=[corpus])}
    text = rows[0]["text"]
    assert [text[g.start : g.end] for g in read["second"].golden] == ["Oslo", "the harbour of Oslo"]
    assert read["second"].golden[0].start == text.rindex("Oslo")
    assert read["no"].documents == ("article",)
    assert read["west"].golden == ()  # "west." ends the paragraph, and "west of" does not


def test_some_paragraphs_in_no_document_are_said(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(FIRST)
    read_questions(path, corpora=[CorpusConfig(path=str(tmp_path / "a.txt"))])
    told = capsys.readouterr()
    assert "1 of 2 paragraphs stand in no document" in told.out + told.err


def test_no_paragraph_in_any_document_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Something else.")
    with pytest.raises(
        UserError, match=r"^questions\.path: .*none of its 2 paragraphs .*make the file itself the corpus"
    ):
        read_questions(path, corpora=[CorpusConfig(path=str(tmp_path / "a.txt"))])


FAULTS = [
    (b'{"version": 1}', "is not SQuAD JSON: it has no `data`"),
    (b'{"data": {}}', "is not SQuAD JSON: its `data` is no list of articles"),
    (b'{"data": []}', "is not SQuAD JSON: its `data` holds no article"),
    (b'{"data": [{"title": "x"}]}', "is not SQuAD JSON: data[0] has no list `paragraphs`"),
    (squad({"qas": []}), "is not SQuAD JSON: data[0].paragraphs[0] has no text `context`"),
    (squad({"context": "x", "qas": [1]}), "is not SQuAD JSON: data[0].paragraphs[0].qas is no list of objects"),
    (squad(paragraph(FIRST)).replace(b"Oslo", b"\\ud800", 1), "data[0].paragraphs[0] holds half a UTF-16 character"),
    (FILE[:-40], "is not JSON: "),
    (b"\xff" + FILE, "is not UTF-8 (byte 0)"),
]


@pytest.mark.parametrize(("content", "told"), FAULTS)
def test_malformed_file_is_refused_as_questions_and_rejected_as_corpus(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^corpus\.path: bad\.json: ") as caught:
        list(read_documents(CorpusConfig(path=str(path), strict=True)))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"question": "a?"}, "has no id"),
        ({"id": "a", "question": " "}, "has no text `question`"),
        ({"id": "a", "question": "a?", "answers": ["b"]}, "has answers that are no list of {text, answer_start}"),
        (asked("twice", ("x", 0)), "repeats the id 'twice'"),
    ],
)
def test_malformed_question_is_named_by_its_place(tmp_path: Path, question: dict[str, Any], told: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(squad(paragraph(SECOND, asked("twice", ("west", 0)), question)))
    with pytest.raises(
        UserError, match=r"^questions\.path: .*bad\.json: data\[0\]\.paragraphs\[0\]\.qas\[1\] "
    ) as caught:
        read_questions(path)
    assert told in str(caught.value)


def test_too_large_file_is_rejected_as_a_corpus(path: Path) -> None:
    with pytest.raises(UserError, match=r"has more than 0\.0001 MB"):
        list(read_documents(CorpusConfig(path=str(path), strict=True, max_file_mb=0.0001)))
