"""Documents from the rows of .jsonl, .csv and .parquet files.

In: a file or a range of it. Out: a `Document` or a `Rejection` per row, in order. `corpus.columns` says which columns
hold a document's parts; all other columns become metadata. A row of a file without an id column is `name#number`,
where numbers count lines (.jsonl) or rows (.csv, .parquet) from 1.
Values of .csv metadata are numbers where the text is exactly how that number is written (`2020`, `-1.5`, not `007`),
and absent where the cell is empty; .parquet dates become ISO 8601 text, binary columns are left out.
"""

from __future__ import annotations

import codecs
import datetime
import decimal
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from retrieval.blocks import BUFFER_BYTES, CorpusBlock, Rejection, is_utf16
from retrieval.csv_records import csv_records, read_header
from retrieval.records import Document
from retrieval.sources import one_line

if TYPE_CHECKING:
    import pyarrow.fs as pafs

PARQUET_BATCH_ROWS = 1024
_CANONICAL_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?")
_BLANK = b"\xef\xbb\xbf \t\r\n"


class RowError(ValueError):
    """Why one row is no document."""


def read_lines(filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock) -> Iterator[Document | Rejection]:
    """The rows of a .jsonl file or of the block's range of it."""
    with filesystem.open_input_file(path) as raw:
        file, encoding = _decoded(raw, block)
        end = block.end if block.end >= 0 else None
        number, position = block.first_row, block.start
        while (end is None or position < end) and (line := file.readline(block.max_file_bytes + 1)):
            number += 1
            size = len(line)
            if size > block.max_file_bytes:
                size += _skip_line(file) if not line.endswith(b"\n") else 0
                yield Rejection(name, f"line {number}", too_large(block), size)
            elif line.strip(_BLANK):
                try:
                    yield _document(json_row(line), block.columns, f"{name}#{number}", encoding)
                except RowError as error:
                    yield Rejection(name, f"line {number}", str(error), size)
            position += size


def too_large(block: CorpusBlock) -> str:
    """Why a line or file is rejected."""
    return f"has more than {block.max_file_bytes / 1e6:g} MB (corpus.max_file_mb)"


def _skip_line(file: IO[bytes]) -> int:
    skipped = 0
    while part := file.readline(BUFFER_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _decoded(raw: Any, block: CorpusBlock) -> tuple[IO[bytes], str]:
    """The file at the block's start as UTF-8 bytes, and the encoding it was in where that was UTF-16."""
    if block.start == 0:
        return utf8_stream(raw)
    raw.seek(block.start)
    return io.BufferedReader(raw, BUFFER_BYTES), ""


def utf8_stream(raw: Any) -> tuple[IO[bytes], str]:
    """A file from its beginning as UTF-8 bytes, and the encoding it was in where that was UTF-16."""
    utf16 = is_utf16(raw.read(4))
    raw.seek(0)
    if utf16:
        stream = codecs.EncodedFile(io.BufferedReader(raw), "utf-8", "utf-16")
        return io.BytesIO(stream.read()), "utf-16"
    return io.BufferedReader(raw, BUFFER_BYTES), ""


def json_row(line: bytes) -> dict[str, Any]:
    """The JSON object in a line of UTF-8; raises RowError."""
    try:
        row: Any = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("is not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts, or NaN
        raise RowError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise RowError("is not a JSON object")
    if b"\\ud" in line.lower():
        refuse_lone_surrogates(row)
    return row


def refuse_constant(constant: str) -> None:
    """For `json.loads`: NaN and infinities are no JSON."""
    raise ValueError(f"{constant} is not a JSON number")


def refuse_lone_surrogates(row: Any) -> None:
    """JSON may spell half a character (`\\ud800`), which no Parquet file or tokenizer can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half a UTF-16 character (a lone surrogate)") from error


def _document(row: Mapping[str, Any], columns: Mapping[str, str], own_id: str, encoding: str = "") -> Document:
    """The document of one row; raises RowError."""
    text, title, uri = (row.get(columns[part]) for part in ("text", "title", "uri"))
    doc_id = row.get(columns["id"], own_id)
    if isinstance(doc_id, bool) or not isinstance(doc_id, str | int) or doc_id == "":
        raise RowError(f"has no id in its column {columns['id']!r}: give it a string or a whole number")
    if not isinstance(text, str):
        found = "" if columns["text"] in row else f"; its columns are {column_names(row)}"
        raise RowError(f"has no text in its column {columns['text']!r} (corpus.columns.text){found}")
    if not text.strip():
        raise RowError("holds no text: it is blank")
    if not isinstance(title or "", str) or not isinstance(uri or "", str):
        raise RowError(
            f"has a {columns['title'] if not isinstance(title or '', str) else columns['uri']!r} that is no string"
        )
    metadata = {key: value for key, value in row.items() if key not in columns.values() and value is not None}
    return Document(str(doc_id), title or "", text, uri or "", metadata | _metadata(row, columns, encoding))


def _metadata(row: Mapping[str, Any], columns: Mapping[str, str], encoding: str) -> dict[str, Any]:
    given = row.get(columns["metadata"]) or {}
    if isinstance(given, str):
        try:
            given = json.loads(given, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RowError(f"has a {columns['metadata']!r} that is not JSON: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise RowError(f"has a {columns['metadata']!r} that is no object")
    return {**given, "encoding": encoding} if encoding else dict(given)


def column_names(row: Iterable[Any]) -> str:
    """The first eight columns of a row, in words."""
    names = [repr(str(name)[:40]) for name in row]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"


def read_csv(filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock) -> Iterator[Document | Rejection]:
    """The rows of a .csv file with a header, or of the block's range of it."""
    with filesystem.open_input_file(path) as raw:
        source, encoding = _decoded(raw, block) if block.start == 0 else (io.BufferedReader(raw, BUFFER_BYTES), "")
        source.seek(0)
        header, delimiter, begin = read_header(source, block.columns["text"])
        if block.columns["text"] not in header:
            if block.first_row == 0:
                columns = column_names(header)
                reason = f"has no column {block.columns['text']!r} (corpus.columns.text); its columns are {columns}"
                yield Rejection(name, "", reason, _size(raw))
            return
        start = max(block.start, begin)
        source.seek(start)
        number, last = block.first_row, 0
        for position, record in csv_records(source, delimiter, block.end - start if block.end >= 0 else -1):
            number += 1
            try:
                if isinstance(record, Exception):
                    raise RowError(f"is not CSV: {one_line(record)}")
                yield _document(
                    csv_row(header, record, block.columns.values()), block.columns, f"{name}#{number}", encoding
                )
            except RowError as error:
                yield Rejection(name, f"row {number}", str(error), position - last)
            last = position


def _size(raw: Any) -> int:
    return int(raw.size())


def csv_row(header: list[str], record: list[str], parts: Collection[str]) -> dict[str, Any]:
    """A record in Latin-1 by column, as UTF-8; columns that are no `parts` may become numbers. Raises RowError."""
    if len(record) != len(header):
        raise RowError(f"has {len(record)} cells where the header has {len(header)}")
    row: dict[str, Any] = {}
    for column, cell in zip(header, record, strict=True):
        try:
            value = cell.encode("latin-1").decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"is not UTF-8 (byte {error.start} of its column {column!r})") from error
        row[column] = value if column in parts else _number(value)
    return row


def _number(cell: str) -> Any:
    """None for an empty cell; a number where the cell is exactly how that number is written; otherwise the text."""
    match = _CANONICAL_NUMBER.fullmatch(cell)
    if not match:
        return cell or None
    value = float(cell) if match[2] else int(cell)
    return value if str(value) == cell else cell


def read_parquet(
    filesystem: pafs.FileSystem, path: str, name: str, block: CorpusBlock
) -> Iterator[Document | Rejection]:
    """The rows of a .parquet file, or of the block's row groups of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = block.first_row
    size = 0
    try:
        with filesystem.open_input_file(path) as raw:
            size = _size(raw)
            file = pq.ParquetFile(raw)
            names = [column.name for column in file.schema_arrow if not is_binary(column.type)]
            if block.columns["text"] not in names:
                if block.first_row == 0:
                    found = column_names(names)
                    reason = f"has no text column {block.columns['text']!r} (corpus.columns.text); it has {found}"
                    yield Rejection(name, "", reason, size)
                return
            groups = list(range(block.start, block.end if block.end >= 0 else file.num_row_groups))
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=names):
                for row in batch_rows(batch):
                    number += 1
                    try:
                        if isinstance(row, Exception):
                            raise RowError(f"holds a value that cannot be read: {one_line(row)}")
                        yield _document(row, block.columns, f"{name}#{number}")
                    except RowError as error:
                        yield Rejection(
                            name, f"row {number}", str(error), 0 if isinstance(row, Exception) else len(str(row))
                        )
    except (OSError, ValueError, pa.ArrowException) as error:
        place = f"after row {number}" if number else ""
        yield Rejection(name, place, f"is not Parquet that can be read: {one_line(error)}", size)


def batch_rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Rows as JSON has them; a row with text that is not UTF-8 or a date that Python does not have is its error."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        for place in range(batch.num_rows):
            try:
                yield {key: _plain(value) for key, value in batch.slice(place, 1).to_pylist()[0].items()}
            except (ValueError, OverflowError) as error:
                yield error
        return
    for row in rows:
        yield {key: _plain(value) for key, value in row.items()}


def is_binary(kind: Any) -> bool:
    """Whether an Arrow type holds bytes."""
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _plain(value: Any) -> Any:
    """An Arrow value as JSON has it; NaN and infinities become None, binary values within lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return (
        value
        if isinstance(value, str | int | bool)
        else None
        if value is None or isinstance(value, bytes)
        else str(value)
    )
