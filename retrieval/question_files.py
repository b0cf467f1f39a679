"""Questions from the rows of .jsonl, .csv and .parquet files, and from SQuAD's .json.

In: a file. Out: one `Asked` per question, in order: the record, and, for SQuAD's way of telling where an answer stands,
the paragraph with the answer's places in it. `questions.columns` says which columns hold a question's parts; all other
columns become metadata, like the keys of a column `metadata`. A list in a .csv cell, or in a text column of .parquet,
is JSON or what Python prints (`["a", "b"]`, `['a', 'b']`). Answers may be SQuAD's `{text: […], answer_start: […]}`.
Not covered: which documents the paragraphs are (`questions.py`, `contexts.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from retrieval.config import QuestionColumns
from retrieval.csv_records import csv_records, read_header
from retrieval.records import UNANSWERABLE, Golden, Question
from retrieval.rows import (
    PARQUET_BATCH_ROWS,
    RowError,
    batch_rows,
    column_names,
    csv_row,
    is_binary,
    json_row,
    refuse_constant,
    utf8_stream,
)
from retrieval.sources import one_line
from retrieval.squad import read_paragraphs

FORMATS = ".jsonl, .csv, .parquet, SQuAD's .json, or a BEIR folder"
_CONTEXT = "context"
_TITLE = "title"
_OWN_KEYS = ("id", "question", "answers", "is_impossible", "plausible_answers")

_DEFAULT = QuestionColumns()

Row = dict[str, Any]
Numbered = tuple[str, int, Row | Exception]
"""Its place in the file in words, its number from 1, and the row or what is wrong with it."""


@dataclass(frozen=True)
class Asked:
    """A question as its file has it."""

    question: Question
    title: str = ""
    context: str = ""
    """The paragraph that it was asked about; "" where the question names its own golden places, or none."""
    spans: tuple[tuple[int, int], ...] = ()
    """The answers in the paragraph, in characters; none where they are not there word for word."""
    place: str = ""
    """Where it stands in its file: `:7`, `, row 7` or `: data[0].paragraphs[3].qas[1]`."""


def read_asked(file: Path, shown: str, columns: QuestionColumns, *, named: bool = True) -> Iterator[Asked]:
    """The questions of one file.

    Args:
        file: Which.
        shown: Recipe key and path, to begin errors with.
        columns: Of row formats.
        named: Whether columns that the recipe names must be there; otherwise that of the text alone.

    Raises:
        UserError: a file of another format, a column that is not there, a row that is no question.
    """
    kind = file.suffix.lower()
    required = {part for part, name in columns.model_dump().items() if named and name != getattr(_DEFAULT, part)}
    try:
        if kind == ".json":
            yield from _squad(file, shown)
        elif kind == ".jsonl":
            yield from _json_questions(file, shown, columns, required)
        elif kind == ".csv":
            yield from _questions(_csv_rows(file, shown, columns, required), file, shown, columns, cells=True)
        elif kind == ".parquet":
            yield from _questions(_parquet_rows(file, shown, columns, required), file, shown, columns, cells=True)
        else:
            raise UserError(f"{shown} is of no known format: give {FORMATS}")
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {one_line(error)}") from error


def _json_questions(file: Path, shown: str, columns: QuestionColumns, required: set[str]) -> Iterator[Asked]:
    """Rows may differ: a column is missed only when no row has it."""
    seen: dict[str, None] = {}
    yield from _questions(_json_lines(file, seen), file, shown, columns, cells=False)
    if seen:
        _require_columns(seen, shown, columns, required)


def _json_lines(file: Path, seen: dict[str, None]) -> Iterator[Numbered]:
    with file.open("rb") as raw:
        stream, _ = utf8_stream(raw)
        for number, line in enumerate(stream, start=1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                try:
                    row = json_row(line)
                except RowError as error:
                    yield f":{number}", number, error
                    continue
                seen.update(dict.fromkeys(row))
                yield f":{number}", number, row


def _csv_rows(file: Path, shown: str, columns: QuestionColumns, required: set[str]) -> Iterator[Numbered]:
    with file.open("rb") as raw:
        stream, _ = utf8_stream(raw)
        header, delimiter, begin = read_header(stream, columns.text)
        _require_columns(header, shown, columns, {"text", *required})
        stream.seek(begin)
        parts = set(columns.model_dump().values())
        for number, (_, record) in enumerate(csv_records(stream, delimiter), start=1):
            row: Row | Exception
            try:
                row = record if isinstance(record, Exception) else csv_row(header, record, parts)
            except RowError as error:
                row = error
            yield f", row {number}", number, row


def _parquet_rows(file: Path, shown: str, columns: QuestionColumns, required: set[str]) -> Iterator[Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = [column.name for column in parquet.schema_arrow if not is_binary(column.type)]
            _require_columns(names, shown, columns, {"text", *required})
            for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, columns=names):
                for row in batch_rows(batch):
                    number += 1
                    yield f", row {number}", number, row
    except pa.ArrowException as error:
        place = f" after row {number}" if number else ""
        raise UserError(f"{shown} is not Parquet that can be read{place}: {one_line(error)}") from error


def _require_columns(names: Collection[str], shown: str, columns: QuestionColumns, required: set[str]) -> None:
    for part, name in columns.model_dump().items():
        if part in required and name not in names:
            raise UserError(
                f"{shown} has no column {name!r} (questions.columns.{part}); its columns are {column_names(names)}"
            )


def _questions(
    rows: Iterator[Numbered], file: Path, shown: str, columns: QuestionColumns, *, cells: bool
) -> Iterator[Asked]:
    for place, number, row in rows:
        try:
            if isinstance(row, Exception):
                raise row if isinstance(row, RowError) else RowError(f"cannot be read: {one_line(row)}")
            asked = _of_row(row, columns, f"{file.name}#{number}", cells=cells)
        except RowError as error:
            raise UserError(f"{shown}{place} {error}") from error
        yield dataclasses.replace(asked, place=place)


def _of_row(row: Row, columns: QuestionColumns, own_id: str, *, cells: bool) -> Asked:
    """The question in one row; raises RowError."""
    question_id = row.get(columns.id, own_id)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int) or question_id == "":
        raise RowError(f"has no id in its column {columns.id!r} (questions.columns.id): give text or a whole number")
    text = row.get(columns.text)
    if not isinstance(text, str) or not text.strip():
        found = "" if columns.text in row else f"; its columns are {column_names(row)}"
        raise RowError(f"has no text in its column {columns.text!r} (questions.columns.text){found}")
    split = row.get(columns.split) or ""
    if not isinstance(split, str):
        raise RowError(f"has a {columns.split!r} that is no text (questions.columns.split)")
    given = _list(row.get(columns.answers), cells=cells)
    placed = _squad_answers(given, row) if columns.golden not in row else None
    if len(given) == 1 and isinstance(given[0], dict) and "text" in given[0]:
        given = _list(given[0]["text"], cells=False)
    golden = tuple(_golden(entry, columns) for entry in _list(row.get(columns.golden), cells=cells))
    question = Question(
        str(question_id), text, _answers(given, columns), golden, split.strip(), _metadata(row, columns, placed)
    )
    if placed and not question.answers:
        question.metadata["kind"] = UNANSWERABLE
    return _placed(question, *placed) if placed else Asked(question)


def _answers(given: list[Any], columns: QuestionColumns) -> tuple[str, ...]:
    """As texts, each once; numbers are written out."""
    texts = []
    for answer in given:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise RowError(f"has an answer that is no text (questions.columns.answers: {columns.answers!r})")
        if isinstance(answer, str) and not answer.strip():
            raise RowError(f"has a blank answer (questions.columns.answers: {columns.answers!r})")
        texts.append(str(answer))
    return tuple(dict.fromkeys(texts))


def _list(value: Any, *, cells: bool) -> list[Any]:
    """What a column holds: a list, one thing, or nothing; with `cells`, a text may spell a list or an object."""
    if isinstance(value, str) and cells:
        value = _spelled(value.strip())
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _spelled(cell: str) -> Any:
    if cell[:1] + cell[-1:] not in ("[]", "{}"):
        return cell
    try:
        return json.loads(cell, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(cell)  # literals alone: nothing is called
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cell
    return value if isinstance(value, list | dict) else cell


def _golden(entry: Any, columns: QuestionColumns) -> Golden:
    if isinstance(entry, str | int) and not isinstance(entry, bool) and entry != "":
        return Golden(str(entry))
    if isinstance(entry, dict) and isinstance(entry.get("doc_id"), str | int):
        start, end = entry.get("start"), entry.get("end")
        if start is None and end is None:
            return Golden(str(entry["doc_id"]))
        if type(start) is int and type(end) is int and 0 <= start < end:
            return Golden(str(entry["doc_id"]), start, end)
    raise RowError(
        f"has a golden entry {str(entry)[:80]} that is neither a document id nor {{doc_id, start, end}} with "
        f"0 ≤ start < end (questions.columns.golden: {columns.golden!r})"
    )


def _metadata(row: Row, columns: QuestionColumns, placed: tuple[Any, ...] | None) -> dict[str, Any]:
    given = row.get("metadata") or {}
    if isinstance(given, str):
        try:
            given = json.loads(given, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RowError(f"has a 'metadata' that is not JSON: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise RowError("has a 'metadata' that is no object")
    own = {*columns.model_dump().values(), "metadata", *((_CONTEXT, _TITLE) if placed else ())}
    metadata = {key: value for key, value in row.items() if key not in own and value is not None} | given
    for part in ("reasoning", "quote"):
        text = row.get(getattr(columns, part))
        if text is not None and not isinstance(text, str):
            raise RowError(f"has a {getattr(columns, part)!r} that is no text (questions.columns.{part})")
        if text and text.strip():
            metadata[part] = text.strip()
    return metadata


def _squad_answers(given: list[Any], row: Row) -> tuple[str, str, list[dict[str, Any]]] | None:
    """(title, paragraph, answers) of a row as Hugging Face's `squad` has it."""
    context = row.get(_CONTEXT)
    if not (isinstance(context, str) and context.strip() and len(given) == 1 and isinstance(given[0], dict)):
        return None
    texts, starts = given[0].get("text"), given[0].get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    return str(row.get(_TITLE) or ""), context, answers


def _squad(file: Path, shown: str) -> Iterator[Asked]:
    try:
        for paragraph in read_paragraphs(file.read_bytes()):
            for number, entry in enumerate(paragraph.questions):
                place = f": {paragraph.place}.qas[{number}]"
                try:
                    asked = _of_squad(entry, paragraph.title, paragraph.text)
                except RowError as error:
                    raise UserError(f"{shown}{place} {error}") from error
                yield dataclasses.replace(asked, place=place)
    except RowError as error:
        raise UserError(f"{shown} {error}") from error


def _of_squad(entry: Mapping[str, Any], title: str, context: str) -> Asked:
    question_id, text, answers = entry.get("id"), entry.get("question"), entry.get("answers") or []
    if isinstance(question_id, bool) or not isinstance(question_id, str | int) or question_id == "":
        raise RowError("has no id: every question needs one")
    if not isinstance(text, str) or not text.strip():
        raise RowError("has no text `question`")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    ):
        raise RowError("has answers that are no list of {text, answer_start}")
    impossible = entry.get("is_impossible") is True
    accepted = [] if impossible else [answer for answer in answers if answer["text"].strip()]
    metadata = {key: value for key, value in entry.items() if key not in _OWN_KEYS and value is not None}
    texts = tuple(dict.fromkeys(answer["text"] for answer in accepted))
    if not texts and (impossible or "answers" in entry):  # a test set whose answers are withheld has no such key
        metadata["kind"] = UNANSWERABLE
    return _placed(Question(str(question_id), text, texts, (), "", metadata), title, context, accepted)


def _placed(question: Question, title: str, context: str, answers: list[dict[str, Any]]) -> Asked:
    """With the places of its answers in the paragraph."""
    spans = dict.fromkeys(_span(context, str(answer["text"]), answer.get("answer_start")) for answer in answers)
    return Asked(question, title, context, tuple(span for span in spans if span))


def _span(context: str, answer: str, start: Any) -> tuple[int, int] | None:
    """Where an answer stands: at `start`, else at the occurrence nearest to it; without a `start`, at its only one."""
    if not answer:
        return None
    places = []
    place = context.find(answer)
    while place >= 0:
        places.append(place)
        place = context.find(answer, place + 1)
    if type(start) is int and start >= 0 and places:
        begin = min(places, key=lambda place: abs(place - start))
    elif len(places) == 1:
        begin = places[0]
    else:
        return None
    return begin, begin + len(answer)
