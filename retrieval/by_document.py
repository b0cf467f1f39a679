"""The chunks of an opened index or catalog by document, read from its mapped files only when they are asked for.

In: the searchers of a retriever's members. Out: document id to its chunks in order, the ids of all documents, and the
numbers of the chunks that hold a golden place. What is held is the distinct document ids, as one Arrow array, and the
few documents that were read last: the memory of a reader does not grow with the text of the corpus.
Not covered: searching (`retriever.py`), documents' whole text.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

from retrieval.records import Chunk, Golden
from retrieval.searcher import IndexSearcher

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Rows = npt.NDArray[np.int64]

DOCUMENTS_HELD = 32
"""Documents whose chunks stay in memory, for several golden places of one question and questions that stand together;
training questions go from document to document, so that more would be held for nothing."""


class DocumentIds(Sequence[str]):
    """Document ids in index order; an id becomes a Python string when it is asked for."""

    def __init__(self, ids: pa.Array) -> None:
        self._ids = ids

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> DocumentIds: ...
    def __getitem__(self, place: int | slice) -> str | DocumentIds:
        """The id at a place, or those of a slice."""
        if isinstance(place, slice):
            import pyarrow as pa

            return DocumentIds(self._ids.take(pa.array(range(len(self))[place], pa.int64())))
        return str(self._ids[place].as_py())

    def without(self, doc_ids: Collection[str]) -> DocumentIds:
        """The same ids in the same order, less `doc_ids`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        gone = pa.array(sorted(doc_ids), self._ids.type)
        return DocumentIds(self._ids.filter(pc.invert(pc.is_in(self._ids, gone))))


class DocumentChunks(Sequence[Chunk]):
    """The chunks of one document: counted at once, read one by one, or all together at the first iteration."""

    def __init__(self, places: Sequence[tuple[IndexSearcher, int]]) -> None:
        self._places = places
        """Each chunk's index and global row in it."""

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Chunk: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, place: int | slice) -> Chunk | Sequence[Chunk]:
        """The chunk at a place, read by itself, or those of a slice."""
        if isinstance(place, slice):
            return self._all[place]
        if "_all" in self.__dict__:
            return self._all[place]
        searcher, row = self._places[place]
        return searcher.chunks_at([row])[row]

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks in order."""
        return iter(self._all)

    @functools.cached_property
    def _all(self) -> list[Chunk]:
        read = {
            id(searcher): searcher.chunks_at([row for other, row in self._places if other is searcher])
            for searcher in dict.fromkeys(searcher for searcher, _ in self._places)
        }
        return [read[id(searcher)][row] for searcher, row in self._places]


class GoldenPlaces(NamedTuple):
    """Numbers of chunks, counted through all members of a catalog, deleted ones included."""

    document: int | None
    """The first chunk of the document, which stands for it; none where the index does not have it."""
    chunks: list[int]
    """Chunks that hold the place."""


class ChunksByDocument(Mapping[str, Sequence[Chunk]]):
    """Document id to its live chunks, in document and offset order; a catalog's collections one after the other."""

    def __init__(self, searchers: Sequence[IndexSearcher]) -> None:
        self._searchers = searchers
        self._read = functools.lru_cache(DOCUMENTS_HELD)(self._find)

    @functools.cached_property
    def doc_ids(self) -> DocumentIds:
        """Distinct ids of live documents, in index order."""
        import pyarrow as pa
        import pyarrow.compute as pc

        parts = [ids for searcher in self._searchers for ids in searcher.document_ids()]
        return DocumentIds(pc.unique(pa.chunked_array(parts, pa.string())))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.doc_ids)

    def __iter__(self) -> Iterator[str]:
        """Document ids in index order."""
        return iter(self.doc_ids)

    def __getitem__(self, doc_id: str) -> Sequence[Chunk]:
        """The chunks of a document.

        Raises:
            KeyError: it has none here.
        """
        chunks = self._read(doc_id)
        if not chunks:
            raise KeyError(doc_id)
        return chunks

    def _find(self, doc_id: str) -> DocumentChunks:
        return DocumentChunks(
            [(searcher, row) for searcher in self._searchers for row in searcher.rows_of(doc_id).tolist()]
        )

    def places(self, golden: Golden) -> GoldenPlaces:
        """Where a golden place stands in the index; chunks as `golden.matches` judges them."""
        document: int | None = None
        found: list[int] = []
        before = 0
        for searcher in self._searchers:
            rows = searcher.rows_of(golden.doc_id)
            if document is None and len(rows):
                document = int(rows[0]) + before
            if golden.start is not None and golden.end is not None and len(rows):
                starts, ends = searcher.spans(rows)
                overlap = ends.clip(max=golden.end) - starts.clip(min=golden.start)
                rows = rows[overlap * 2 > golden.end - golden.start]
            found.extend((rows + before).tolist())
            before += searcher.table.rows
        return GoldenPlaces(document, found)
