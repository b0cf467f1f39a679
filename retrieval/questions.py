"""Question files: BEIR `queries.jsonl` with `answers`, `golden`, `split` and `metadata` added.

In: a path. Out: `Question` records, and back. `golden` entries are document ids, or `{doc_id, start, end}` for a span.
Not covered: splitting questions (training), `qrels/*.tsv`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from retrieval.records import Golden, Question


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
