"""CSV records with the bytes at which they end, so that a file can be cut at a record and read from there.

In: a binary file. Out: records as text in Latin-1, which gives each byte one character: places are bytes, and the
fields' own encoding is checked field by field afterwards.
Not covered: what the columns mean (`rows.py`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import IO

LONGEST_FIELD = 2**31 - 1
DELIMITERS = (",", ";", "\t")
UTF8_BOM = b"\xef\xbb\xbf"


def read_header(file: IO[bytes], text_column: str) -> tuple[list[str], str, int]:
    """(column names, delimiter, bytes of the header) of a CSV file that stands at its beginning.

    The delimiter is the one of `,`, `;` and tab with which the header names `text_column`, otherwise `,`.
    """
    first = file.readline(1 << 20)
    line = first.removeprefix(UTF8_BOM).decode("utf-8", errors="replace")
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        if text_column in names:
            return names, delimiter, len(first)
    return [name.strip() for name in next(csv.reader([line]), [])], ",", len(first)


def csv_records(file: IO[bytes], delimiter: str, end: int = -1) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(bytes read since the call, record or what is wrong with it) until `end` bytes; blank lines are left out."""
    csv.field_size_limit(LONGEST_FIELD)
    position = 0

    def counted(lines: io.TextIOWrapper) -> Iterator[str]:
        nonlocal position
        for line in lines:
            position += len(line)
            yield line

    text = io.TextIOWrapper(io.BufferedReader(_Unclosed(file)), encoding="latin-1", newline="")
    records = csv.reader(counted(text), delimiter=delimiter, strict=True)
    while end < 0 or position < end:
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield position, error
            continue
        if record:
            yield position, record


class _Unclosed(io.RawIOBase):
    """A view of a file that leaves it open when it is collected."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
