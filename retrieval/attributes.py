"""The filterable values of a shard's rows, as an inverted index.

In: rows with doc_id, uri, title and metadata. Out: `attributes.arrow` (rows, numbers and texts, sorted by key, then
value, then row; memory-mapped) and `attributes.json` (where each key stands); and the sorted rows that a filter
allows. Equality and ranges are binary searches, so a filter costs about the size of its answer: one that keeps 10,000 of
1,000,000 rows reads 10,000 entries. Numbers are float64: exact up to 2^53.
Not covered: the syntax of filters (`filters.py`), deleted rows.
"""

from __future__ import annotations

import bisect
import json
import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError
from retrieval.filters import LARGEST_EXACT_INTEGER, And, Exists, Filter, In, Not, Or, Range, Scalar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Rows = npt.NDArray[np.int64]

ARROW_FILE = "attributes.arrow"
JSON_FILE = "attributes.json"
OWN_FIELDS = ("doc_id", "uri", "title")
CACHE_BYTES = 64 * 1024 * 1024
FORMAT = 1


class _Column:
    """The values of one key and type while they are gathered: codes of distinct values, and their rows."""

    def __init__(self) -> None:
        self.codes: dict[str | float, int] = {}
        self.code = array("q")
        self.row = array("q")

    def add(self, value: str | float, row: int) -> None:
        self.code.append(self.codes.setdefault(value, len(self.codes)))
        self.row.append(row)


def write_attributes(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Index the values of `rows`, in row order, into `directory`.

    Holds 16 bytes for each value and one copy of each distinct one.

    Args:
        directory: An existing local folder.
        rows: Each with doc_id, uri, title and metadata (an object, or its JSON text).
    """
    columns: dict[tuple[str, str], _Column] = {}
    count = 0
    last_text, last_flat = None, []
    for count, row in enumerate(rows, start=1):
        metadata = row["metadata"]
        if not isinstance(metadata, str) or metadata != last_text:  # chunks of one document follow each other
            last_text = metadata if isinstance(metadata, str) else None
            last_flat = list(_flatten(json.loads(metadata) if isinstance(metadata, str) else metadata, ""))
        for name in OWN_FIELDS:
            columns.setdefault((name, "text"), _Column()).add(str(row[name]), count - 1)
        for name, value in last_flat:
            if name in OWN_FIELDS:
                continue
            kind, plain = _typed(value)
            columns.setdefault((name, kind), _Column()).add(plain, count - 1)
    _write(directory, columns, count)


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Scalar]]:
    """(dotted key, plain value) of everything in a metadata object that a filter can name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            if not isinstance(inner, list | tuple):
                yield from _flatten(inner, prefix)
    elif isinstance(value, str | bool) or (isinstance(value, int | float) and math.isfinite(value)):
        yield prefix, value


def _typed(value: Scalar) -> tuple[str, str | float]:
    if isinstance(value, str):
        return "text", value
    if isinstance(value, bool):
        return "bool", float(value)
    if isinstance(value, int) and abs(value) > LARGEST_EXACT_INTEGER:
        return "text", str(value)  # as text it can still be found; as a float it would be another number
    return "number", float(value)


def _write(directory: Path, columns: Mapping[tuple[str, str], _Column], rows: int) -> None:
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([("row", pa.uint32()), ("number", pa.float64()), ("text", pa.large_string())])
    assert rows < 2**32, f"a shard holds fewer than 2^32 rows, got {rows}"
    slices: dict[str, dict[str, list[int]]] = {}
    position = 0
    with pa.OSFile(str(directory / ARROW_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for name, kind in sorted(columns):
            column = columns[name, kind]
            values = sorted(column.codes)  # one column holds one type
            rank = np.empty(len(values), dtype=np.int64)
            rank[[column.codes[value] for value in values]] = np.arange(len(values))
            ranks = rank[np.frombuffer(column.code, dtype=np.int64)]
            row = np.frombuffer(column.row, dtype=np.int64)
            order = np.lexsort((row, ranks))
            row, ranks = row[order], ranks[order]
            kept = np.ones(len(row), dtype=bool)
            kept[1:] = (row[1:] != row[:-1]) | (ranks[1:] != ranks[:-1])  # a list may say a value twice
            row, ranks = row[kept], ranks[kept]
            if kind == "text":
                texts = pa.array(values, pa.large_string()).take(pa.array(ranks))
                numbers = pa.nulls(len(row), pa.float64())
            else:
                texts = pa.nulls(len(row), pa.large_string())
                numbers = pa.array(np.asarray(values, dtype=np.float64)[ranks])
            table = pa.Table.from_arrays([pa.array(row.astype(np.uint32)), numbers, texts], schema=schema)
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))
            slices.setdefault(name, {})[kind] = [position, len(table)]
            position += 1
    content = {"format": FORMAT, "rows": rows, "slices": slices}
    (directory / JSON_FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


class Attributes:
    """The opened inverted index; safe to use from several threads."""

    def __init__(self, rows: int, slices: Mapping[tuple[str, str], pa.RecordBatch]) -> None:
        """Use `Attributes.open`."""
        self.count = rows
        self._slices = slices
        self._fields = {name for name, _ in slices}
        self._cache: OrderedDict[Filter, Rows] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> Attributes:
        """Map what `write_attributes` wrote.

        Raises:
            ArtifactError: the files do not fit each other.
        """
        import numpy as np
        import pyarrow as pa

        file = directory / ARROW_FILE
        slices: dict[tuple[str, str], pa.RecordBatch] = {}
        try:
            described = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
            rows = int(described["rows"])
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            for name, kinds in described["slices"].items():
                for kind, (position, length) in kinds.items():
                    batch = reader.get_batch(position)
                    batch.validate(full=True)
                    row = batch.column("row").to_numpy()
                    if len(batch) != length or (length and int(np.max(row)) >= rows):
                        raise ValueError(f"{name} does not fit")
                    slices[name, kind] = batch
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ArtifactError(f"{file} cannot be read ({type(error).__name__}): rebuild the index") from error
        return cls(rows, slices)

    def rows(self, wanted: Filter) -> Rows:
        """The rows that `wanted` allows, sorted and unique, (n,) int64. Do not change the array: it is remembered."""
        with self._lock:
            if wanted in self._cache:
                self._cache.move_to_end(wanted)
                return self._cache[wanted]
        found = self._rows(wanted)
        found.flags.writeable = False
        with self._lock:
            if wanted not in self._cache and found.nbytes <= CACHE_BYTES:
                self._cache[wanted] = found
                self._cached_bytes += found.nbytes
                while self._cached_bytes > CACHE_BYTES:
                    self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return found

    def _rows(self, wanted: Filter) -> Rows:
        import numpy as np

        if isinstance(wanted, In):
            return _union([self._equal(wanted.field, value) for value in wanted.values])
        if isinstance(wanted, Range):
            return self._between(wanted)
        if isinstance(wanted, Exists):
            return _union([_rows_of(batch) for (name, _), batch in self._slices.items() if name == wanted.field])
        if isinstance(wanted, Not):
            kept = np.ones(self.count, dtype=bool)
            kept[self._rows(wanted.part)] = False
            return np.flatnonzero(kept)
        if isinstance(wanted, Or):
            return _union([self._rows(part) for part in wanted.parts])
        assert isinstance(wanted, And), f"unknown filter {type(wanted).__name__}"
        if not wanted.parts:
            return np.arange(self.count, dtype=np.int64)
        found = sorted((self._rows(part) for part in wanted.parts), key=len)
        kept_rows = found[0]
        for other in found[1:]:
            kept_rows = _intersection(kept_rows, other, self.count)
        return kept_rows

    def _equal(self, field: str, value: Scalar) -> Rows:
        kind, plain = _typed(value)
        return self._slice(field, kind, plain, True, plain, True)

    def _between(self, wanted: Range) -> Rows:
        bound = wanted.low if wanted.low is not None else wanted.high
        kind = "text" if isinstance(bound, str) else "number"
        found = self._slice(wanted.field, kind, wanted.low, wanted.low_included, wanted.high, wanted.high_included)
        return _union([found])

    def _slice(
        self,
        field: str,
        kind: str,
        low: str | float | None,
        low_included: bool,
        high: str | float | None,
        high_included: bool,
    ) -> Rows:
        """Rows of the values between two bounds: sorted where there is one value, else in order of value."""
        import numpy as np

        batch = self._slices.get((field, kind))
        if batch is None:
            return np.zeros(0, dtype=np.int64)
        values = _Values(batch.column("text" if kind == "text" else "number"))
        start, stop = 0, len(values)
        if low is not None:
            start = (bisect.bisect_left if low_included else bisect.bisect_right)(values, low)
        if high is not None:
            stop = (bisect.bisect_right if high_included else bisect.bisect_left)(values, high)
        return _rows_of(batch.slice(start, max(0, stop - start)))


class _Values:
    """A sorted Arrow column as a sequence that `bisect` can search without reading it whole."""

    def __init__(self, column: pa.Array) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: int) -> Any:
        return self._column[place].as_py()


def _rows_of(batch: pa.RecordBatch) -> Rows:
    import numpy as np

    rows: Rows = batch.column("row").to_numpy().astype(np.int64)
    return rows


def _union(parts: list[Rows]) -> Rows:
    import numpy as np

    if not parts:
        return np.zeros(0, dtype=np.int64)
    joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return joined if len(joined) < 2 or bool((np.diff(joined) > 0).all()) else np.unique(joined)


def _intersection(small: Rows, large: Rows, count: int) -> Rows:
    """Rows in both; `small` is not longer than `large`."""
    import numpy as np

    if len(large) == count:
        return small
    places = np.searchsorted(large, small)
    places[places == len(large)] = 0
    return small[large[places] == small] if len(large) else small[:0]
