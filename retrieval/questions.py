"""Question files at the borders, BEIR `qrels/*.tsv`, and our own `questions.jsonl`: BEIR's `queries.jsonl` with
`answers`, `golden`, `split` and `metadata` added.

In: a path. Out: `Question` records, and back. `golden` entries are document ids, or `{doc_id, start, end}` for a span.
Qrels are relevance judgements: question id to document id to grade, where more than 0 is relevant.
Not covered: what the rows of a file mean (`question_files.py`), splitting questions (training).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.progress import say
from retrieval.config import CorpusConfig, QuestionColumns
from retrieval.contexts import Place, find_contexts
from retrieval.documents import read_documents
from retrieval.question_files import FORMATS, Asked, read_asked
from retrieval.records import Golden, Question
from retrieval.squad import paragraph_id

Qrels = dict[str, dict[str, int]]

BEIR_QUERIES = "queries.jsonl"
QUESTION_COLUMNS = QuestionColumns()


def read_questions(
    path: str | Path,
    key: str = "questions.path",
    columns: QuestionColumns = QUESTION_COLUMNS,
    corpora: Sequence[CorpusConfig] = (),
) -> list[Question]:
    """The questions in a file: .jsonl, .csv, .parquet, SQuAD's .json; or in a BEIR folder (or its `queries.jsonl`),
    with all relevant documents as `golden` (see `read_beir_folder`).

    Args:
        path: The file or folder.
        key: What `path` came from, to name in errors.
        columns: Of row formats. A column that the recipe names, other than the default, must be in `questions.path`;
            other files (tests, `--questions`) may lack all but the text.
        corpora: Where SQuAD's paragraphs are looked for: golden places are then in these documents. Without, a
            paragraph's golden document is the paragraph itself, as it is in an index over the same SQuAD file.

    Raises:
        UserError: naming `key`, for a missing or empty file or one of another format, a row that is no question, a
            duplicate id, or SQuAD paragraphs none of which stands in a document.
    """
    if not str(path):
        raise UserError(f"{key} is empty: set it to your questions: {FORMATS} (--set {key}=…)")
    if is_beir(path):
        return read_beir_folder(path, key, columns)
    return _read_file(path, key, columns, corpora)


def _read_file(
    path: str | Path, key: str, columns: QuestionColumns, corpora: Sequence[CorpusConfig] = ()
) -> list[Question]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: {path} does not exist: give {FORMATS}")
    asked: list[Asked] = []
    seen: set[str] = set()
    for one in read_asked(file, f"{key}: {path}", columns, named=key == "questions.path"):
        if one.question.question_id in seen:
            raise UserError(f"{key}: {path}{one.place} repeats the id {one.question.question_id!r}: ids must differ")
        seen.add(one.question.question_id)
        asked.append(one)
    if not asked:
        raise UserError(f"{key}: {path} holds no questions")
    return place_contexts(asked, corpora, f"{key}: {path}")


def place_contexts(asked: Sequence[Asked], corpora: Sequence[CorpusConfig], shown: str) -> list[Question]:
    """The questions, those about a paragraph with the documents that hold it as golden (see `read_questions`).

    Raises:
        UserError: beginning with `shown`, when no paragraph stands in a document of `corpora`.
    """
    paragraphs = {one.context: paragraph_id(one.title, one.context) for one in asked if one.context}
    named = [corpus for corpus in corpora if corpus.path]
    if not paragraphs or not named:
        own = {context: [Place(doc_id, whole=True)] for context, doc_id in paragraphs.items()}
        return [_place(one, own.get(one.context, [])) for one in asked]
    documents = itertools.chain.from_iterable(read_documents(corpus) for corpus in named)
    found = dict(zip(paragraphs, find_contexts(list(paragraphs), documents), strict=True))
    lost = sum(not places for places in found.values())
    if lost == len(paragraphs):
        raise UserError(
            f"{shown}: none of its {lost} paragraphs stands in a document of corpus.path "
            f"({', '.join(corpus.path for corpus in named)}): make the file itself the corpus "
            "(--set corpus.path=…), or name golden documents in a questions.jsonl"
        )
    if lost:
        say(f"{shown}: {lost} of {len(paragraphs)} paragraphs stand in no document: their questions have no golden one")
    return [_place(one, found.get(one.context, [])) for one in asked]


def _place(asked: Asked, places: Sequence[Place]) -> Question:
    question = asked.question
    if not places:
        return question
    if not question.answers:
        return dataclasses.replace(question, metadata={**question.metadata, "doc_id": places[0].doc_id})
    golden = [place.golden(*span) for place in places for span in asked.spans]
    return dataclasses.replace(question, golden=tuple(golden or (Golden(place.doc_id) for place in places)))


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Write `questions` as JSON Lines that `read_questions` reads back unchanged."""
    with Path(path).open("w", encoding="utf-8") as file:
        for question in questions:
            row: dict[str, Any] = {"_id": question.question_id, "text": question.text}
            row["answers"] = list(question.answers)
            row["golden"] = [_golden_to_json(golden) for golden in question.golden]
            if question.split:
                row["split"] = question.split
            if question.metadata:
                row["metadata"] = question.metadata
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def is_beir(path: str | Path) -> bool:
    """Whether it is a folder, or a `queries.jsonl` with judgements beside it."""
    given = Path(path).expanduser()
    return given.is_dir() or (given.name == BEIR_QUERIES and (given.parent / "qrels").is_dir())


def read_beir_questions(
    path: str | Path,
    split: str = "test",
    key: str = "questions.path",
    columns: QuestionColumns = QUESTION_COLUMNS,
) -> tuple[list[Question], Qrels]:
    """The judged questions of a BEIR data set, with their relevant documents as `golden`, and the judgements.

    Args:
        path: A folder with `queries.jsonl` and `qrels/<split>.tsv`, or its `queries.jsonl`.
        split: Which judgements; only questions that have some are returned, in the order of `queries.jsonl`.
        key: What to name in errors.
        columns: Of `queries.jsonl`.

    Raises:
        UserError: naming `key`, for what is missing or malformed, or a judgement of a question that is not there.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.is_file() else given
    judged = folder / "qrels" / f"{split}.tsv"
    if not judged.is_file():
        found = ", ".join(_judgements(folder)) or "none"
        raise UserError(f"{key}: {judged} does not exist; splits with judgements: {found}")
    qrels = read_qrels(judged, key)
    asked = _read_file(folder / BEIR_QUERIES, key, columns)
    questions = []
    for question in asked:
        if question.question_id in qrels:
            relevant = [Golden(doc_id) for doc_id, grade in qrels[question.question_id].items() if grade > 0]
            questions.append(dataclasses.replace(question, golden=tuple(relevant), split=question.split or split))
    unknown = qrels.keys() - {question.question_id for question in questions}
    if unknown:
        raise UserError(f"{key}: {judged} judges {len(unknown)} questions that are not there, such as {min(unknown)!r}")
    return questions, qrels


def _judgements(folder: Path) -> list[str]:
    return sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))


def read_beir_folder(
    path: str | Path, key: str = "questions.path", columns: QuestionColumns = QUESTION_COLUMNS
) -> list[Question]:
    """All judged questions of a BEIR data set, to train and test with: those of `qrels/train.tsv` have the split
    `train`, of `test.tsv` (without one: `dev.tsv`) `test`, of any other `train`; a single file of judgements leaves the
    split open. A question that several files judge has the golden documents of all, and tests if one of them tests.

    Raises:
        UserError: naming `key`, as `read_beir_questions`.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.is_file() else given
    splits = _judgements(folder) or ["test"]
    tests = next((name for name in ("test", "dev") if name in splits), "")
    merged: dict[str, Question] = {}
    for name in sorted(splits, key=lambda name: name != tests):
        role = "" if len(splits) == 1 else "test" if name == tests else "train"
        for question in read_beir_questions(folder, name, key, columns)[0]:
            before = merged.get(question.question_id)
            stated = question.split if question.split != name else role
            golden = (*(before.golden if before else ()), *question.golden)
            merged[question.question_id] = dataclasses.replace(
                question, golden=tuple(dict.fromkeys(golden)), split=before.split if before else stated
            )
    return list(merged.values())


def read_qrels(path: str | Path, key: str = "questions.path") -> Qrels:
    """Judgements by question and document id: BEIR `query-id, corpus-id, score` separated by tabs, with or without that
    header, or the four columns of TREC (`query-id 0 corpus-id score`).

    Raises:
        UserError: naming `key`, the file and the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: {path} does not exist: give a .tsv with query-id, corpus-id and score")
    qrels: Qrels = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise UserError(f"{key}: {path}:{number} is not UTF-8 (byte {error.start})") from error
            if cells == [""] or (number == 1 and cells[-1].strip().lower() == "score"):
                continue
            judgement = _parse_judgement(cells, f"{key}: {path}:{number}")
            question_id, doc_id, grade = judgement
            if doc_id in qrels.setdefault(question_id, {}):
                raise UserError(f"{key}: {path}:{number} judges {doc_id!r} for {question_id!r} a second time")
            qrels[question_id][doc_id] = grade
    if not qrels:
        raise UserError(f"{key}: {path} holds no judgements")
    return qrels


def _parse_judgement(cells: list[str], where: str) -> tuple[str, str, int]:
    cells = cells[0].split() if len(cells) == 1 else [cell.strip() for cell in cells]
    if len(cells) not in (3, 4) or not (cells[0] and cells[-2]):
        raise UserError(f"{where} is not query-id, corpus-id and score separated by tabs")
    try:
        grade = int(cells[-1])
    except ValueError:
        raise UserError(f"{where}: score {cells[-1][:40]!r} is not a whole number") from None
    return cells[0], cells[-2], grade


def _golden_to_json(golden: Golden) -> str | dict[str, Any]:
    if golden.start is None or golden.end is None:
        return golden.doc_id
    return {"doc_id": golden.doc_id, "start": golden.start, "end": golden.end}
