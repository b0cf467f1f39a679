"""Question files: BEIR `queries.jsonl` with `answers`, `golden`, `split` and `metadata` added, and BEIR `qrels/*.tsv`.

In: a path. Out: `Question` records, and back. `golden` entries are document ids, or `{doc_id, start, end}` for a span.
Qrels are relevance judgements: question id to document id to grade, where more than 0 is relevant.
Not covered: splitting questions (training).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from retrieval.records import Golden, Question

Qrels = dict[str, dict[str, int]]


def read_questions(path: str | Path, key: str = "questions.path") -> list[Question]:
    """The questions in a JSON Lines file.

    Raises:
        UserError: naming `key`, for a missing or empty file, a line that is not a question, or a duplicate id.
    """
    file = Path(path).expanduser()
    if not str(path):
        raise UserError(f"{key} is empty: set it to a questions.jsonl (--set {key}=…)")
    if not file.is_file():
        raise UserError(f"{key}: {path} does not exist: give a questions.jsonl")
    questions: list[Question] = []
    seen: set[str] = set()
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                continue
            question = _parse_line(line, f"{key}: {path}:{number}")
            if question.question_id in seen:
                raise UserError(f"{key}: {path}:{number} repeats the id {question.question_id!r}: ids must differ")
            seen.add(question.question_id)
            questions.append(question)
    if not questions:
        raise UserError(f"{key}: {path} holds no questions")
    return questions


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


def read_beir_questions(
    path: str | Path, split: str = "test", key: str = "questions.path"
) -> tuple[list[Question], Qrels]:
    """The judged questions of a BEIR data set, with their relevant documents as `golden`, and the judgements.

    Args:
        path: A folder with `queries.jsonl` and `qrels/<split>.tsv`, or its `queries.jsonl`.
        split: Which judgements; only questions that have some are returned, in the order of `queries.jsonl`.
        key: What to name in errors.

    Raises:
        UserError: naming `key`, for what is missing or malformed, or a judgement of a question that is not there.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.is_file() else given
    judged = folder / "qrels" / f"{split}.tsv"
    if not judged.is_file():
        found = ", ".join(sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"{key}: {judged} does not exist; splits with judgements: {found}")
    qrels = read_qrels(judged, key)
    asked = read_questions(given if given.is_file() else folder / "queries.jsonl", key)
    questions = []
    for question in asked:
        if question.question_id in qrels:
            relevant = [Golden(doc_id) for doc_id, grade in qrels[question.question_id].items() if grade > 0]
            questions.append(dataclasses.replace(question, golden=tuple(relevant), split=question.split or split))
    unknown = qrels.keys() - {question.question_id for question in questions}
    if unknown:
        raise UserError(f"{key}: {judged} judges {len(unknown)} questions that are not there, such as {min(unknown)!r}")
    return questions, qrels


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


def _parse_line(line: bytes, where: str) -> Question:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object with _id, text, answers and golden")
    question_id, text = row.get("_id"), row.get("text")
    if isinstance(question_id, bool) or not isinstance(question_id, str | int) or question_id == "":
        raise UserError(f"{where} has no _id: every question needs one")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no text: every question needs one")
    answers, golden = row.get("answers") or [], row.get("golden") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: answers must be a list of strings")
    if not isinstance(golden, list):
        raise UserError(f"{where}: golden must be a list of document ids or of {{doc_id, start, end}}")
    split, metadata = row.get("split") or "", row.get("metadata") or {}
    if not isinstance(split, str) or not isinstance(metadata, dict):
        raise UserError(f"{where}: split must be a string and metadata an object")
    places = tuple(_parse_golden(entry, where) for entry in golden)
    return Question(str(question_id), text, tuple(answers), places, split, metadata)


def _parse_golden(entry: Any, where: str) -> Golden:
    if isinstance(entry, str | int) and not isinstance(entry, bool):
        return Golden(str(entry))
    if isinstance(entry, dict) and isinstance(entry.get("doc_id"), str | int):
        start, end = entry.get("start"), entry.get("end")
        if start is None and end is None:
            return Golden(str(entry["doc_id"]))
        if type(start) is int and type(end) is int and 0 <= start < end:
            return Golden(str(entry["doc_id"]), start, end)
    raise UserError(
        f"{where}: golden entry {str(entry)[:80]} is neither a document id "
        "nor {doc_id, start, end} with 0 ≤ start < end"
    )
