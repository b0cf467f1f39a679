"""An append-only journal of paid replies: what was received is on disk before the next request is sent.

In: rows (JSON objects) under a key. Out: the rows of a key, also after a crash. One JSON line per row, flushed to the
disk (fsync) before `append` returns; a line that a crash cut off is removed at the next opening. One process holds a
journal at a time. Memory holds keys and offsets only.
Not covered: what a row means; object stores (they have no append: a journal lies on a local disk).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from cluster import locks
from cluster.errors import UserError
from cluster.storage import fsync_directory


class Journal:
    """Rows by key, in the order in which they were written. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the journal, and holds it until `close`.

        Raises:
            UserError: Another process holds it, or its folder cannot be written.
        """
        self.path = path
        self.damaged_lines = 0
        """Lines inside the file that are no rows: left where they are, and counted."""
        self._places: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # offset and length of each row
        self._rows = 0
        self._lock_path = path.with_name(f".{path.name}.lock")
        with _blames_directory(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.acquire(self._lock_path)
        if lock is None:
            raise UserError(
                f"teacher.directory: another process is writing {path}; wait for it, or set another teacher.directory"
            )
        self._lock = lock
        try:
            with _blames_directory(path):
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                self._end = self._read_places()
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
                fsync_directory(path.parent)
        except BaseException:
            locks.release(self._lock_path, self._lock, remove=False)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process open the journal."""
        os.close(self._file)
        # The lock file stays: removing it would let a third process lock a new one beside a waiting second.
        locks.release(self._lock_path, self._lock, remove=False)

    def __len__(self) -> int:
        """Number of rows."""
        return self._rows

    def count(self, key: str) -> int:
        """How many rows a key has."""
        return len(self._places.get(key, ()))

    def rows(self, key: str) -> Iterator[dict[str, Any]]:
        """The rows of a key, oldest first."""
        for offset, length in self._places.get(key, ()):
            row: dict[str, Any] = json.loads(os.pread(self._file, length, offset))
            yield row

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes rows (each with its `key`); when it returns, they survive a crash of the machine.

        Raises:
            UserError: The disk is full or gone; nothing of these rows is kept.
        """
        lines = [json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows]
        data = b"".join(lines)
        try:
            with _blames_directory(self.path):
                written = 0
                while written < len(data):
                    written += os.write(self._file, data[written:])
                os.fsync(self._file)
        except UserError:
            with contextlib.suppress(OSError):  # else the next opening finds the torn line and removes it
                os.ftruncate(self._file, self._end)
            raise
        for row, line in zip(rows, lines, strict=True):
            self._places[row["key"]].append((self._end, len(line)))
            self._end += len(line)
            self._rows += 1

    def _read_places(self) -> int:
        """Reads which keys are stored; returns where the last whole line ends."""
        position = end = 0
        with self.path.open("rb") as file:
            for line in file:
                position += len(line)
                if not line.endswith(b"\n"):
                    break
                key = _key_of(line)
                if key is None:
                    self.damaged_lines += 1
                else:
                    self._places[key].append((end, len(line)))
                    self._rows += 1
                end = position
        return end


def _key_of(line: bytes) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    key = row.get("key") if isinstance(row, dict) else None
    return key if isinstance(key, str) else None


@contextlib.contextmanager
def _blames_directory(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"teacher.directory: cannot write {path}: {error.strerror}") from error
