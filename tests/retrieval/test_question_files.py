import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.config import CorpusConfig, QuestionColumns
from retrieval.questions import read_questions, write_questions
from retrieval.records import Golden, Question

OWN = QuestionColumns(id="id", text="question", answers="answer", golden="doc", reasoning="why", quote="said")

ROWS: list[dict[str, Any]] = [
    {
        "id": "007",
        "question": "Where?",
        "answer": "Here; there",
        "doc": "d1",
        "why": " As said. ",
        "said": "It is here.",
    },
    {"id": "b", "question": "How, “many”?", "answer": ["308", "308 points"], "doc": ["d1", "d2"], "why": None},
    {"id": "c", "question": "When?", "answer": None, "doc": [{"doc_id": "d3", "start": 2, "end": 9}], "topic": "time"},
]
EXPECTED = [
    Question("007", "Where?", ("Here; there",), (Golden("d1"),), "", {"reasoning": "As said.", "quote": "It is here."}),
    Question("b", "How, “many”?", ("308", "308 points"), (Golden("d1"), Golden("d2"))),
    Question("c", "When?", (), (Golden("d3", 2, 9),), "", {"topic": "time"}),
]


def write_csv(
    path: Path, rows: list[dict[str, Any]], spell: Any, delimiter: str = ",", encoding: str = "utf-8"
) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v if isinstance(v, str) else spell(v) for k, v in row.items()})
    return path


def test_jsonl_columns_by_other_names(tmp_path: Path) -> None:
    path = tmp_path / "faq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert read_questions(path, columns=OWN) == EXPECTED


@pytest.mark.parametrize("spell", [json.dumps, str], ids=["json", "python"])
@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16")])
def test_csv_lists_are_json_or_what_python_prints(tmp_path: Path, spell: Any, delimiter: str, encoding: str) -> None:
    path = write_csv(tmp_path / "faq.csv", ROWS, spell, delimiter, encoding)
    assert read_questions(path, columns=OWN) == EXPECTED


def test_parquet_with_lists_structs_and_nulls(tmp_path: Path) -> None:
    place = pa.struct([("doc_id", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
    table = pa.table(
        {
            "id": ["007", "b", "c"],
            "question": [row["question"] for row in ROWS],
            "answer": [["Here; there"], ["308", "308 points"], None],
            "doc": pa.array(
                [[{"doc_id": "d1"}], [{"doc_id": "d1"}, {"doc_id": "d2"}], ROWS[2]["doc"]], pa.list_(place)
            ),
            "why": [" As said. ", None, None],
            "said": ["It is here.", None, None],
            "topic": [None, None, "time"],
            "picture": [b"\x00\xff", b"", None],
        }
    )
    pq.write_table(table, tmp_path / "faq.parquet", row_group_size=1)
    assert read_questions(tmp_path / "faq.parquet", columns=OWN) == EXPECTED


def test_parquet_numbers_are_answers_and_ids(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"_id": [1, 2], "text": ["a?", "b?"], "answers": [10, 20], "golden": [5, 6]}), tmp_path / "q.parquet"
    )
    read = read_questions(tmp_path / "q.parquet")
    assert [(q.question_id, q.answers, q.golden) for q in read] == [
        ("1", ("10",), (Golden("5"),)),
        ("2", ("20",), (Golden("6"),)),
    ]


def test_row_without_an_id_column_is_its_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text("text,year\na?,2015\n\nb?,\n")
    assert read_questions(tmp_path / "faq.csv") == [
        Question("faq.csv#1", "a?", (), (), "", {"year": 2015}),
        Question("faq.csv#2", "b?"),
    ]
    (tmp_path / "faq.jsonl").write_text('{"text": "a?"}\n\n{"text": "b?", "_id": "x"}\n')
    assert [q.question_id for q in read_questions(tmp_path / "faq.jsonl")] == ["faq.jsonl#1", "x"]


def test_cell_that_only_looks_like_a_list_stays_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", [{"text": "a?", "answers": "[sic]"}, {"text": "b?", "answers": "{x}"}], str)
    assert [q.answers for q in read_questions(path)] == [("[sic]",), ("{x}",)]
    (tmp_path / "q.jsonl").write_text(json.dumps({"_id": "q", "text": "a?", "answers": '["a"]'}))
    assert read_questions(tmp_path / "q.jsonl")[0].answers == ('["a"]',)  # JSON Lines have lists of their own


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("q.csv", "question,answers\na?,b\n", "has no column 'text' (questions.columns.text)"),
        ("q.csv", "_id,text\n1,a?\n2,\n", ", row 2 has no text in its column 'text'"),
        ("q.csv", "_id,text\n1,a?\n,b?\n", ", row 2 has no id in its column '_id'"),
        ("q.csv", "_id,text\n1,a?\n1,b?\n", ", row 2 repeats the id '1'"),
        ("q.csv", "_id,text\n1,a?,x\n", ", row 1 has 3 cells where the header has 2"),
        ("q.csv", '_id,text,golden\n1,a?,"[{""doc_id"": 1, ""start"": 4}]"\n', ", row 1 has a golden entry"),
        ("q.csv", "_id,text\n1,a\xff?\n", ", row 1 is not UTF-8"),
        ("q.csv", "_id,text\n", "holds no questions"),
        ("q.parquet", "PAR1 not really", "is not Parquet that can be read"),
        ("q.xlsx", "", "is of no known format: give .jsonl, .csv, .parquet"),
        ("q.json", "[]", "is not SQuAD JSON: expected '{' at character 0"),
        ("q.jsonl", '{"text": "a?"}\n{"text": "b?", "answers": {"x": 1}}', ":2 has an answer that is no text"),
    ],
)  # fmt: skip
def test_fault_is_one_line_that_names_key_file_and_row(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(f"questions.path: {path}")
    assert told in message
    assert "\n" not in message


def test_column_that_the_recipe_names_must_be_in_the_training_file_and_may_lack_elsewhere(tmp_path: Path) -> None:
    columns = QuestionColumns(reasoning="long_answer")
    for path in (tmp_path / "q.jsonl", tmp_path / "q.csv"):
        path.write_text('{"_id": "1", "text": "a?"}' if path.suffix == ".jsonl" else "_id,text\n1,a?\n")
        with pytest.raises(UserError, match=r"has no column 'long_answer' \(questions.columns.reasoning\)"):
            read_questions(path, "questions.path", columns)
        assert [q.text for q in read_questions(path, "questions.test_path", columns)] == ["a?"]


def test_hugging_face_squad_rows_find_their_paragraphs(tmp_path: Path) -> None:
    context = "Oslo is the capital of Norway. Bergen is not."
    rows = [
        {"id": "1", "title": "Norway", "context": context, "question": "Capital?",
         "answers": {"text": ["Oslo", "Oslo"], "answer_start": [0, 0]}},
        {"id": "2", "title": "Norway", "context": context, "question": "King?",
         "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "squad.parquet")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "no", "text": f"Norway.\n{context}"}))
    corpus = CorpusConfig(path=str(tmp_path / "corpus.jsonl"))
    capital, king = read_questions(
        tmp_path / "squad.parquet", columns=QuestionColumns(id="id", text="question"), corpora=[corpus]
    )
    assert (capital.answers, capital.golden, capital.metadata) == (("Oslo",), (Golden("no", 8, 12),), {})
    assert (king.unanswerable, king.documents) == (True, ("no",))


lines = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(lines, st.lists(lines, max_size=3, unique=True), st.lists(lines, max_size=2)), min_size=1, max_size=5
    )
)
def test_jsonl_csv_and_parquet_hold_the_same_questions(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, list[str], list[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    questions = [
        Question(str(number), text, tuple(answers), tuple(map(Golden, documents)))
        for number, (text, answers, documents) in enumerate(parts)
    ]
    write_questions(folder / "q.jsonl", questions)
    rows = [json.loads(line) for line in (folder / "q.jsonl").read_bytes().splitlines()]
    write_csv(folder / "q.csv", rows, json.dumps)
    names = pa.list_(pa.string())
    schema = pa.schema([("_id", pa.string()), ("text", pa.string()), ("answers", names), ("golden", names)])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "q.parquet")
    for name in ("q.jsonl", "q.csv", "q.parquet"):
        assert read_questions(folder / name) == questions
