"""Attributes: an inverted index of a shard's filterable values.

In: rows with doc_id, uri, title and metadata. Out: `attributes.arrow` and `attributes.json`, memory-mapped; the rows
that a `Filter` allows. Keys are doc_id, uri, title, and metadata keys, nested ones joined by dots; a metadata key of
one of those three names is `metadata.<name>`, so that no document can pass for another. Of a list, each element counts.
A (key, type) keeps its distinct values sorted, and their rows in the order of the values, so that a value is two binary
searches and a range is one slice: a filter costs about the size of its answer.
Not covered: deleted rows (tombstones), which belong to a version and not to a shard.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ArtifactError, UserError
from retrieval.filters import All, AnyOf, Exists, Filter, Kind, Not, OneOf, Range, Scalar, TypedScalar, typed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Rows = npt.NDArray[np.int64]

ARROW_FILE = "attributes.arrow"
JSON_FILE = "attributes.json"
FIELDS = ("doc_id", "uri", "title")
MAX_KEYS = 20_000
BUFFERED = 65_536
CACHE_BYTES = 64_000_000
MASK_SHARE = 64
"""An answer of more than 1/64 of the rows is sorted by marking rows in a mask, a smaller one by comparing."""

Column = Literal["text", "whole", "real", "bool"]
"""How a value is kept: bytes, int64, float64, int64."""
_KIND_COLUMNS: dict[Kind, tuple[Column, ...]] = {"text": ("text",), "number": ("whole", "real"), "bool": ("bool",)}


def attribute_values(row: Mapping[str, Any]) -> dict[str, list[TypedScalar]]:
    """The filterable values of a row with doc_id, uri, title and metadata (a dict, or its JSON text), by key."""
    found: dict[str, list[TypedScalar]] = {name: [("text", str(row[name]))] for name in FIELDS if row.get(name)}
    metadata = row.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    pending: list[tuple[str, Any]] = [
        (f"metadata.{name}" if name in FIELDS else str(name), value) for name, value in reversed(metadata.items())
    ]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend((f"{key}.{name}", inner) for name, inner in value.items())
        elif isinstance(value, list | tuple):
            pending.extend((key, inner) for inner in value)
        elif (scalar := typed(value)) is not None and scalar not in found.get(key, ()):
            found.setdefault(key, []).append(scalar)
    return found


def write_attributes(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the attributes of `rows`, in order, into the folder `directory`.

    Neighbouring rows of one document are read once. Memory: 8 bytes and the value per document and key, and
    the values of one key twice while they are sorted (1M documents of 6 keys: 500 MB, 15 s).

    Raises:
        UserError: more than 20,000 different metadata keys.
    """
    postings: dict[tuple[str, Column], _Postings] = {}
    count = 0
    for first, length, values in _runs(rows):
        count = first + length
        for key, scalars in values.items():
            for kind, value in scalars:
                column = _column(kind, value)
                if (key, column) not in postings:
                    if len(postings) >= MAX_KEYS:
                        raise UserError(
                            f"corpus.path: documents have more than {MAX_KEYS} different metadata keys; "
                            "put what varies into values, not into keys"
                        )
                    postings[key, column] = _Postings(column)
                postings[key, column].add(value, first, length)
    _write(directory, count, postings)


def _runs(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, int, dict[str, list[TypedScalar]]]]:
    """(first row, rows, values) of each run of neighbouring rows with the same values."""
    last: tuple[Any, ...] | None = None
    values: dict[str, list[TypedScalar]] = {}
    first = place = 0
    for place, row in enumerate(rows):
        metadata = row.get("metadata")
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)  # as dicts, {"a": 1} is {"a": True}
        now = (*(row.get(name) for name in FIELDS), text)
        if now != last:
            if last is not None:
                yield first, place - first, values
            last, first, values = now, place, attribute_values(row)
    if last is not None:
        yield first, place + 1 - first, values


def _column(kind: str, value: Scalar) -> Column:
    if kind == "number":
        return "whole" if isinstance(value, int) else "real"
    return "text" if kind == "text" else "bool"


class _Postings:
    """The runs of one (key, type), in Arrow arrays as soon as there are many: no Python object per row."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self._values: list[Any] = []
        self._runs: list[tuple[int, int]] = []
        self._parts: list[pa.Table] = []

    def add(self, value: Scalar, first: int, length: int) -> None:
        self._values.append(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
        self._runs.append((first, length))
        if len(self._values) >= BUFFERED:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        kinds = {"text": pa.large_binary(), "real": pa.float64()}
        columns = [
            pa.array(self._values, kinds.get(self.column, pa.int64())),
            pa.array([first for first, _ in self._runs], pa.uint32()),
            pa.array([length for _, length in self._runs], pa.uint32()),
        ]
        self._parts.append(pa.table(columns, names=["value", "first", "length"]))
        self._values, self._runs = [], []

    def sorted(self) -> tuple[pa.Array, Rows, npt.NDArray[np.uint32]]:
        """Distinct values in order (m,), where the rows of each begin (m + 1,), and the rows, sorted within a value."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        self._flush()
        table = pa.concat_tables(self._parts).sort_by([("value", "ascending"), ("first", "ascending")])
        values = table["value"].combine_chunks()
        changed = np.ones(len(values), dtype=bool)
        changed[1:] = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
        lengths = table["length"].to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        firsts = table["first"].to_numpy().astype(np.int64)
        rows = np.repeat(firsts - (ends - lengths), lengths) + np.arange(ends[-1])
        starts = np.append((ends - lengths)[changed], ends[-1])
        return values.filter(pa.array(changed)), starts, rows.astype(np.uint32)


def _schema() -> pa.Schema:
    """One row per (key, type): the values in the list of their type, the others empty."""
    import pyarrow as pa

    values = {"text": pa.large_binary(), "whole": pa.int64(), "real": pa.float64()}
    lists = {**values, "starts": pa.int64(), "rows": pa.uint32()}
    return pa.schema([pa.field(name, pa.large_list(kind)) for name, kind in lists.items()])


def _write(directory: Path, count: int, postings: dict[tuple[str, Column], _Postings]) -> None:
    import pyarrow as pa

    schema = _schema()
    slices = []
    with pa.OSFile(str(directory / ARROW_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for key, column in sorted(postings):
            values, starts, rows = postings.pop((key, column)).sorted()
            lists = {_stored(column): values, "starts": pa.array(starts), "rows": pa.array(rows)}
            arrays = [
                pa.LargeListArray.from_arrays(
                    pa.array([0, len(lists[field.name]) if field.name in lists else 0], pa.int64()),
                    lists.get(field.name, pa.array([], field.type.value_type)),
                )
                for field in schema
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            slices.append([key, column])
    (directory / JSON_FILE).write_text(json.dumps({"rows": count, "slices": slices}), encoding="utf-8")


def _stored(column: Column) -> str:
    return "whole" if column == "bool" else column


class _Slice:
    """One (key, type) of the mapped file."""

    def __init__(self, column: Column, batch: pa.RecordBatch, rows: int) -> None:
        import numpy as np

        self._values = batch.column(_stored(column))[0].values
        self._starts = batch.column("starts")[0].values.to_numpy()
        self._rows = batch.column("rows")[0].values.to_numpy()
        self._as_python: Callable[[Any], Any] = lambda scalar: scalar.as_py()
        starts, found = self._starts, self._rows
        if len(starts) != len(self._values) + 1 or starts[0] != 0 or starts[-1] != len(found) or starts[0] > starts[-1]:
            raise ValueError("slices do not add up")
        if (np.diff(starts) <= 0).any() or (len(found) and int(found.max()) >= rows):
            raise ValueError("rows outside the shard")

    def equal(self, value: Scalar) -> npt.NDArray[np.uint32]:
        """The sorted rows with this value."""
        place = self.place(value, after=False)
        if place < len(self._values) and self._values[place].as_py() == _stored_value(value):
            return self.between(place, place + 1)
        return self.between(0, 0)

    def place(self, value: Scalar, *, after: bool) -> int:
        """How many values are less than `value`, or with `after` not greater. Compared as Python compares: exactly."""
        search = bisect.bisect_right if after else bisect.bisect_left
        return search(self._values, _stored_value(value), key=self._as_python)

    def between(self, low: int, high: int) -> npt.NDArray[np.uint32]:
        """The rows of the values in these places, in the order of the values."""
        found: npt.NDArray[np.uint32] = self._rows[self._starts[low] : self._starts[max(low, high)]]
        return found

    def range(self, wanted: Range) -> npt.NDArray[np.uint32]:
        """The rows with a value in the range; a row with two such values comes twice."""
        low = 0 if wanted.low is None else self.place(wanted.low, after=wanted.low_open)
        high = len(self._values) if wanted.high is None else self.place(wanted.high, after=not wanted.high_open)
        return self.between(low, high)

    def all(self) -> npt.NDArray[np.uint32]:
        """The rows with any value."""
        return self.between(0, len(self._values))


def _stored_value(value: Scalar) -> Any:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


class Attributes:
    """The attributes of one shard, opened. May be used from several threads."""

    def __init__(self, rows: int, slices: dict[str, dict[Column, _Slice]], cache_bytes: int) -> None:
        """Use `Attributes.open`."""
        self.count = rows
        self._slices = slices
        self._cache: OrderedDict[Filter, Rows] = OrderedDict()
        self.cache_bytes = cache_bytes
        """Of the rows of filters that are remembered."""
        self._cached = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, cache_bytes: int = CACHE_BYTES) -> Attributes:
        """Map what `write_attributes` wrote; the caller has verified the files' digests.

        Raises:
            ArtifactError: a file is missing or does not hold attributes.
        """
        import pyarrow as pa

        try:
            table = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
            rows, names = int(table["rows"]), table["slices"]
            reader = pa.ipc.open_file(pa.memory_map(str(directory / ARROW_FILE)))
            if reader.schema != _schema() or reader.num_record_batches != len(names):
                raise ValueError("not the columns of attributes")
            slices: dict[str, dict[Column, _Slice]] = {}
            for place, (key, column) in enumerate(names):
                batch = reader.get_batch(place)
                batch.validate(full=True)
                slices.setdefault(key, {})[column] = _Slice(column, batch, rows)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{directory / ARROW_FILE} cannot be read ({type(error).__name__}): rebuild the index"
            ) from error
        return cls(rows, slices, cache_bytes)

    def keys(self) -> list[str]:
        """The keys that some row has a value of, sorted."""
        return sorted(self._slices)

    def kinds(self) -> dict[str, set[Kind]]:
        """The kinds of the values that rows have of each key."""
        return {
            key: {kind for kind, columns in _KIND_COLUMNS.items() if any(column in found for column in columns)}
            for key, found in self._slices.items()
        }

    def rows(self, wanted: Filter, *, remember: bool = True) -> Rows:
        """The rows that match, sorted, distinct, (n,) int64, read-only; remembered for the next search if wished."""
        with self._lock:
            if wanted in self._cache:
                self._cache.move_to_end(wanted)
                return self._cache[wanted]
        found = self._find(wanted)
        found.flags.writeable = False
        with self._lock:
            if remember and wanted not in self._cache and found.nbytes <= self.cache_bytes:
                self._cache[wanted] = found
                self._cached += found.nbytes
                while self._cached > self.cache_bytes:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
        return found

    def _find(self, wanted: Filter) -> Rows:
        import numpy as np

        if isinstance(wanted, OneOf):
            return self._union([part.equal(value) for part in self._of(wanted) for value in wanted.values])
        if isinstance(wanted, Range):
            return self._union([part.range(wanted) for part in self._of(wanted)], distinct=False)
        if isinstance(wanted, Exists):
            return self._union([part.all() for part in self._slices.get(wanted.key, {}).values()], distinct=False)
        if isinstance(wanted, AnyOf):
            return self._union([self._find(part) for part in wanted.parts])
        if isinstance(wanted, Not):
            return self._without(np.arange(self.count, dtype=np.int64), self._find(wanted.part))
        assert isinstance(wanted, All), f"unknown filter {type(wanted).__name__}"
        return self._find_all(wanted)

    def _find_all(self, wanted: All) -> Rows:
        import numpy as np

        kept = sorted((self._find(part) for part in wanted.parts if not isinstance(part, Not)), key=len)
        found = kept[0] if kept else np.arange(self.count, dtype=np.int64)
        for other in kept[1:]:
            found = found[_contained(found, other)]
        for part in wanted.parts:
            if isinstance(part, Not):
                found = self._without(found, self._find(part.part))
        return found

    def _of(self, wanted: OneOf | Range) -> list[_Slice]:
        slices = self._slices.get(wanted.key, {})
        return [slices[column] for column in _KIND_COLUMNS[wanted.kind] if column in slices]

    def _union(self, parts: Sequence[npt.NDArray[Any]], distinct: bool = True) -> Rows:
        """Sorted and distinct, (n,) int64. A lone part that is `distinct` is sorted already."""
        import numpy as np

        filled = [part for part in parts if len(part)]
        if len(filled) == 1 and distinct:
            return filled[0].astype(np.int64)
        if sum(map(len, filled)) * MASK_SHARE < self.count:
            return np.unique(np.concatenate(filled)).astype(np.int64) if filled else np.zeros(0, dtype=np.int64)
        marked = np.zeros(self.count, dtype=bool)
        for part in filled:
            marked[part] = True
        return np.flatnonzero(marked)

    def _without(self, rows: Rows, others: Rows) -> Rows:
        if not len(others):
            return rows
        return rows[~_contained(rows, others)]


def _contained(rows: Rows, others: Rows) -> npt.NDArray[np.bool_]:
    """Whether each of `rows` is in `others`, both sorted: (n,) bool."""
    import numpy as np

    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    places = np.minimum(np.searchsorted(others, rows), len(others) - 1)
    found: npt.NDArray[np.bool_] = others[places] == rows
    return found
