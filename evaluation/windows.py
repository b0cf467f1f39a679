"""Finished windows of a batch run, durable one by one.

In: the predictions of a window and its measured seconds. Out: one Parquet file per window under the artifact's work
directory, written under a temporary name, flushed, then renamed; after a crash or SIGKILL the next run reads what is
whole and answers only the rest. Not covered: what makes two runs the same (the plan's fingerprint names the directory).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.records import Prediction

if TYPE_CHECKING:
    import pyarrow as pa

_MEASURED_KEY = b"rayft.measured"


@dataclass(frozen=True)
class WindowMeasures:
    """Wall-clock seconds that a window took, and its rows."""

    rows: int
    retrieval_s: float
    generation_s: float


class WindowLedger:
    """The windows of one job that are finished; `prefix` separates batch windows from single-request ones."""

    def __init__(self, directory: Path, prefix: str = "window") -> None:
        self.directory = directory
        self.prefix = prefix
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, predictions: Sequence[Prediction], retrieval_s: float, generation_s: float) -> None:
        """Commit one window; after this returns, a crash does not lose it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        measured = json.dumps({"retrieval_s": retrieval_s, "generation_s": generation_s}).encode()
        schema = Prediction.schema().with_metadata({_MEASURED_KEY: measured})
        table = pa.Table.from_pylist([prediction.to_row() for prediction in predictions], schema=schema)
        path = self.directory / f"{self.prefix}-{number:09d}.parquet"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_directory(self.directory)

    def finished(self) -> set[str]:
        """Ids of the questions that are answered."""
        return {
            question_id for table in self._tables(["question_id"]) for question_id in table["question_id"].to_pylist()
        }

    def measures(self) -> list[WindowMeasures]:
        """What each finished window took."""
        found = []
        for table in self._tables(["question_id"]):
            measured = json.loads((table.schema.metadata or {})[_MEASURED_KEY])
            found.append(WindowMeasures(table.num_rows, measured["retrieval_s"], measured["generation_s"]))
        return found

    def errors(self) -> list[str]:
        """The error of each row that failed."""
        return [error for table in self._tables(["error"]) for error in table["error"].to_pylist() if error]

    def clear(self) -> None:
        """Forget every finished window."""
        for path in self.directory.glob(f"{self.prefix}-*.parquet"):
            path.unlink()

    def assemble(self, path: Path) -> None:
        """Write all windows as one Parquet file, a window at a time, so that memory stays flat."""
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, Prediction.schema()) as writer:
            for table in self._tables(None):
                writer.write_table(table.replace_schema_metadata(None))

    def _tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in sorted(self.directory.glob(f"{self.prefix}-*.parquet")):
            try:
                yield pq.read_table(path, columns=columns)
            except (pa.ArrowInvalid, OSError):
                path.unlink()  # a file that a failing disk cut short: its window is answered again


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file that `assemble` wrote."""
    import pyarrow.parquet as pq

    return [Prediction.from_row(row) for row in pq.read_table(path).to_pylist()]


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """A predictions file as JSON lines (`.jsonl`) or Parquet (any other suffix), complete or not there at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows = [prediction.to_row() for prediction in predictions]
    try:
        if path.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(rows, schema=Prediction.schema()), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
