"""One index, opened: its shards searched densely and lexically, under a filter, without the deleted rows.

In: the verified files of an index artifact. Out: rankings of global rows with exact scores, equal scores by chunk id,
and chunks by row. Only mapped files and FAISS's own structures are held, never the chunks.
A filter's rows, less the tombstones, are known before any shard looks for its best.
Not covered: embedding queries, fusing both kinds of search, several indexes (`retriever.py`).
"""

from __future__ import annotations

import bisect
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError
from retrieval.attributes import CACHE_BYTES
from retrieval.filters import Filter, Kind, OneOf
from retrieval.fusion import Ranking, best_rows, by_score
from retrieval.lexical import LexicalIndex
from retrieval.records import Chunk, Document
from retrieval.shards import LEXICAL_ROWS, IndexFile, ShardReader, load_array, open_shards
from retrieval.vector_search import VectorIndex

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from cluster.store import Artifact

    Rows = npt.NDArray[np.int64]
    Vectors = npt.NDArray[np.float32]

SPARE_HITS = 16
SAME_SCORE = 1e-5
"""Two float32 sums of one inner product differ by less."""
FEW_TIES = 4096
"""Up to this many equal scores are told apart by reading their chunk ids; for more, all ids are ranked once."""
RESCORED_ROWS = 4096
FILTERS_BYTES = 512_000_000
"""Memory in which all shards of an index together may remember the rows of filters."""


@dataclass(frozen=True)
class _Shard:
    reader: ShardReader
    offset: int
    """Global row at which it begins."""
    vectors: VectorIndex | None
    deleted: npt.NDArray[np.bool_] | None
    """(rows,) bool; none where nothing is deleted."""

    @property
    def live(self) -> int:
        return self.reader.rows - len(self.reader.tombstones)

    def allowed(self, wanted: Filter, *, remember: bool = True) -> Rows:
        """Sorted rows that match and are not deleted; `remember` them for the next search under the same filter."""
        rows = self.reader.attributes.rows(wanted, remember=remember)
        return rows if self.deleted is None else rows[~self.deleted[rows]]


@dataclass(frozen=True)
class _LexicalPart:
    index: LexicalIndex
    rows: Rows
    """Global row of each of its rows, (n,) int64, sorted."""


class IndexSearcher:
    """The shards of an index and their lexical parts. May be used from several threads."""

    def __init__(self, artifact: Artifact, table: IndexFile, shards: list[_Shard], lexical: list[_LexicalPart]) -> None:
        """Use `IndexSearcher.open`."""
        self.ref = artifact.ref
        self.table = table
        self.live = sum(shard.live for shard in shards)
        """Chunks that are not deleted."""
        self._shards = shards
        self._lexical = lexical
        self._offsets = [shard.offset for shard in shards]
        self.ids = _RowIds(self)

    @classmethod
    def open(cls, artifact: Artifact, *, gpu: bool = False) -> IndexSearcher:
        """Verify and map the files of an index artifact.

        Raises:
            ArtifactError: a file is damaged, or does not fit the others.
            UserError: `gpu` where there is no GPU search.
        """
        import numpy as np

        directory = artifact.directory()
        table, readers = open_shards(directory)
        shards = []
        for reader, offset in zip(readers, table.offsets(), strict=True):
            vectors = None
            if reader.vectors is not None:
                vectors = VectorIndex.open(reader.directory, reader.vectors, reader.entry.vectors, gpu=gpu)
            deleted = None
            if len(reader.tombstones):
                deleted = np.zeros(reader.rows, dtype=bool)
                deleted[reader.tombstones] = True
            reader.attributes.cache_bytes = min(CACHE_BYTES, FILTERS_BYTES // len(readers))
            if reader.attributes.count != reader.rows:
                raise ArtifactError(
                    f"{artifact.ref}: shard {reader.entry.shard_id} has attributes of {reader.attributes.count} rows "
                    f"and {reader.rows} chunks, they must be equal: rebuild the index"
                )
            shards.append(_Shard(reader, offset, vectors, deleted))
        index = cls(artifact, table, shards, _open_lexical(directory, table))
        counted = int(artifact.manifest.counts["chunks"])
        if index.live != counted or (table.mode == "dense" and any(not shard.vectors for shard in shards)):
            raise ArtifactError(
                f"{artifact.ref}: {counted} chunks in the manifest and {index.live} in its {len(shards)} shards, with "
                f"{sum(shard.vectors is not None for shard in shards)} of them embedded: rebuild the index"
            )
        if index._lexical and sum(len(part.rows) for part in index._lexical) != index.live:
            raise ArtifactError(
                f"{artifact.ref}: its lexical files are not of its {index.live} chunks: rebuild the index"
            )
        return index

    @property
    def has_vectors(self) -> bool:
        """Whether it can be searched densely."""
        return self.table.mode == "dense"

    @property
    def has_words(self) -> bool:
        """Whether it can be searched lexically."""
        return bool(self._lexical)

    def kinds(self) -> dict[str, set[Kind]]:
        """The keys that a filter may name, deleted rows' included, and the kinds of their values."""
        found: dict[str, set[Kind]] = {}
        for shard in self._shards:
            for key, kinds in shard.reader.attributes.kinds().items():
                found.setdefault(key, set()).update(kinds)
        return found

    def holds(self, doc_id: str) -> bool:
        """Whether a document of that id has a passage that is not deleted."""
        wanted = OneOf("doc_id", "text", (doc_id,))
        return any(len(shard.allowed(wanted)) for shard in self._shards)

    def rows_of(self, doc_id: str) -> Rows:
        """Global rows of a document's live chunks, sorted, (n,) int64."""
        import numpy as np

        wanted = OneOf("doc_id", "text", (doc_id,))
        return np.concatenate([shard.allowed(wanted, remember=False) + shard.offset for shard in self._shards])

    def spans(self, rows: Rows) -> tuple[Rows, Rows]:
        """Offsets `start` and `end` of the chunks at sorted global `rows`, (n,) int64 each."""
        import numpy as np

        found = [
            (batch.column(0).to_numpy(), batch.column(1).to_numpy())
            for shard, inside in self._by_shard(rows.tolist())
            for batch in shard.reader.batches(np.asarray(inside, dtype=np.int64) - shard.offset, ("start", "end"))
        ]
        return np.concatenate([starts for starts, _ in found]), np.concatenate([ends for _, ends in found])

    def document_ids(self) -> Iterator[pa.Array]:
        """Ids of the documents with live chunks, in corpus order, shard by shard."""
        import pyarrow.compute as pc

        for shard in self._shards:
            ids = shard.reader.column("doc_id")
            yield pc.unique(ids if shard.deleted is None else ids.filter(~shard.deleted))

    def dense(self, vectors: Vectors, k: int, wanted: Filter | None) -> list[Ranking[int]]:
        """The k best allowed rows of each query, by inner product.

        Args:
            vectors: Queries, (q, dim) float32, of length 1.
            k: Rows per query; fewer come back only where fewer are allowed.
            wanted: Only rows that match.
        """
        parts: list[list[Ranking[int]]] = self._each_shard(lambda shard: _dense(shard, vectors, k, wanted, self.ids))
        if len(parts) == 1:
            return parts[0]
        return [
            by_score([item for part in parts for item in part[query]], k, self.ids.of) for query in range(len(vectors))
        ]

    def lexical(
        self, queries: Sequence[str], k: int, wanted: Filter | None, *, worded: bool = False
    ) -> list[Ranking[int]]:
        """The k best allowed rows of each query by BM25.

        A row may score 0; with `worded` only rows with a word of the query count, so that the rest, all equal and
        perhaps millions, need no order.
        """
        import numpy as np

        places = None
        if wanted is not None:
            allowed = self._each_shard(lambda shard: shard.allowed(wanted) + shard.offset)
            mask = np.zeros(self.table.rows, dtype=bool)
            for rows in allowed:
                mask[rows] = True
            places = [np.flatnonzero(mask[part.rows]) for part in self._lexical]
        found = []
        for query in queries:
            parts = []
            for number, part in enumerate(self._lexical):
                scores, rows = part.index.scores(query), part.rows
                if places is not None:
                    scores, rows = scores[places[number]], rows[places[number]]
                if worded:
                    positive = np.flatnonzero(scores > 0)
                    scores, rows = scores[positive], rows[positive]
                parts.append(best_rows(rows, scores, k, self.ids))
            found.append(
                parts[0] if len(parts) == 1 else by_score([item for part in parts for item in part], k, self.ids.of)
            )
        return found

    def chunks_at(self, rows: Sequence[int]) -> dict[int, Chunk]:
        """Chunks by global row, read shard by shard."""
        import numpy as np

        found: dict[int, Chunk] = {}
        for shard, inside in self._by_shard(sorted(set(rows))):
            local = np.asarray(inside, dtype=np.int64) - shard.offset
            records = (row for batch in shard.reader.batches(local, _chunk_columns()) for row in batch.to_pylist())
            found.update((row, Chunk.from_row(record)) for row, record in zip(inside, records, strict=True))
        return found

    def chunk_ids(self, rows: Sequence[int]) -> list[str]:
        """Chunk ids of global rows, in their order."""
        names: dict[int, str] = {}
        for shard, inside in self._by_shard(sorted(set(rows))):
            names.update(zip(inside, shard.reader.chunk_ids([row - shard.offset for row in inside]), strict=True))
        return [names[row] for row in rows]

    def chunks(self) -> Iterator[Chunk]:
        """Live chunks in document and offset order."""
        for shard in self._shards:
            yield from shard.reader.chunks()

    def documents(self) -> Iterator[Document]:
        """Live documents in corpus order, with their text."""
        for shard in self._shards:
            yield from shard.reader.documents()

    def rank_ids(self) -> npt.NDArray[np.uint32]:
        """Place of each row's chunk id among all, (rows,) uint32."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = [chunk for shard in self._shards for chunk in shard.reader.column("chunk_id").chunks]
        order = pc.sort_indices(pa.chunked_array(columns)).to_numpy()
        ranks = np.empty(len(order), dtype=np.uint32)
        ranks[order] = np.arange(len(order), dtype=np.uint32)
        return ranks

    def _by_shard(self, rows: Sequence[int]) -> Iterator[tuple[_Shard, list[int]]]:
        """Sorted global `rows`, divided among their shards."""
        start = 0
        while start < len(rows):
            number = bisect.bisect_right(self._offsets, rows[start]) - 1
            shard = self._shards[number]
            end = bisect.bisect_left(rows, shard.offset + shard.reader.rows, start)
            yield shard, list(rows[start:end])
            start = end

    def _each_shard(self, call: Callable[[_Shard], Any]) -> list[Any]:
        """`call` for every shard, in order; several shards at a time, because FAISS and numpy release the GIL."""
        if len(self._shards) == 1:
            return [call(self._shards[0])]
        return list(self._threads.map(call, self._shards))

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(len(self._shards), os.cpu_count() or 1), thread_name_prefix="shards")


class _RowIds:
    """`ChunkIds` of global rows."""

    def __init__(self, index: IndexSearcher) -> None:
        self._index = index
        self._ranks: npt.NDArray[np.uint32] | None = None
        self._lock = threading.Lock()

    def of(self, rows: Sequence[int]) -> list[str]:
        return self._index.chunk_ids(rows)

    def least(self, rows: Rows, count: int) -> Rows:
        import numpy as np

        if len(rows) <= FEW_TIES:
            names = self.of(rows.tolist())
            return rows[sorted(range(len(rows)), key=lambda place: names[place])[:count]]
        with self._lock:
            if self._ranks is None:
                self._ranks = self._index.rank_ids()
        return rows[np.argpartition(self._ranks[rows], count - 1)[:count]] if count < len(rows) else rows


class _ShardIds:
    """`ChunkIds` of the rows of one shard."""

    def __init__(self, ids: _RowIds, offset: int) -> None:
        self._ids, self._offset = ids, offset

    def of(self, rows: Sequence[int]) -> list[str]:
        return self._ids.of([row + self._offset for row in rows])

    def least(self, rows: Rows, count: int) -> Rows:
        return self._ids.least(rows + self._offset, count) - self._offset


def _chunk_columns() -> list[str]:
    return list(Chunk.schema().names)


def _open_lexical(directory: Path, table: IndexFile) -> list[_LexicalPart]:
    import numpy as np

    parts = []
    for entry in table.lexical:
        folder = directory / entry.folder
        index, rows = LexicalIndex.load(folder), load_array(folder / LEXICAL_ROWS)
        sane = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) == index.texts == entry.rows
        if not sane or (np.diff(rows) <= 0).any() or (len(rows) and not 0 <= rows[0] <= rows[-1] < table.rows):
            raise ArtifactError(f"{folder} does not name the rows of the index: rebuild the index")
        parts.append(_LexicalPart(index, rows))
    return parts


def _dense(shard: _Shard, queries: Vectors, k: int, wanted: Filter | None, ids: _RowIds) -> list[Ranking[int]]:
    """The k best allowed rows of a shard, as global rows.

    Searches a little deeper than k, and deeper still for queries whose k-th score is not yet told from the last one's.
    Scores are computed anew from the vectors, each by itself, so that equal texts have equal scores whatever the index,
    the batch and the division into shards. Without a filter, deleted rows are dropped afterwards: a selector over
    nearly all rows costs more than the few places that they take.
    """
    import numpy as np

    assert shard.vectors is not None, "a dense search needs vectors"
    allowed = None if wanted is None else shard.allowed(wanted)
    most = shard.reader.rows if allowed is None else len(allowed)
    reachable = min(k, shard.live if allowed is None else most)
    results: list[Ranking[int]] = [[] for _ in queries]
    pending = np.arange(len(queries)) if reachable else np.arange(0)
    depth = min(most, k + SPARE_HITS)
    shard_ids = _ShardIds(ids, shard.offset)
    while len(pending):
        scores, rows = shard.vectors.search(np.ascontiguousarray(queries[pending]), depth, allowed)
        unsettled = []
        kept = rows >= 0
        if shard.deleted is not None and allowed is None:
            kept &= ~shard.deleted[np.maximum(rows, 0)]
        exact = _rescored(shard, queries[pending], rows, kept)
        for place, query in enumerate(pending):
            mine = kept[place]
            best = best_rows(rows[place][mine], exact[place][mine], k, shard_ids)
            results[query] = [(row + shard.offset, score) for row, score in best]
            last = scores[place][rows[place] >= 0].min(initial=np.inf)
            if len(best) < reachable or last >= best[-1][1] - SAME_SCORE:
                unsettled.append(query)
        if depth == most:
            break
        pending, depth = np.array(unsettled, dtype=np.int64), min(most, depth * 2)
    return results


def _rescored(shard: _Shard, queries: Vectors, rows: Rows, kept: npt.NDArray[np.bool_]) -> Vectors:
    """Inner products of each query with its rows, (q, d) float32; -inf where not `kept`."""
    import numpy as np

    vectors = shard.reader.vectors
    assert vectors is not None, "a dense search needs vectors"
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    which, place = np.nonzero(kept)
    for start in range(0, len(which), RESCORED_ROWS):
        part = slice(start, start + RESCORED_ROWS)
        found = np.take(vectors, rows[which[part], place[part]], axis=0)
        scores[which[part], place[part]] = np.einsum("nd,nd->n", found, queries[which[part]])
    return scores
