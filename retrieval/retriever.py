"""Searching a published index.

In: an index artifact (every file verified before it is parsed), and the recipe's encoder. Out: the k best passages of
each query, best first, equal scores by chunk id. Dense search embeds queries with the encoder that built the index and
refuses any other; lexical search needs no encoder.
Not covered: filters, fusing both kinds of search.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ArtifactError, UserError
from retrieval.config import EncoderConfig, SearchConfig
from retrieval.encoder import Encoder, EncoderSource, encoder_digest, load_encoder
from retrieval.lexical import LexicalIndex
from retrieval.records import Chunk, Document, Hit, Passage
from retrieval.shards import INDEX_FORMAT, LEXICAL_FOLDER
from retrieval.vectors import VectorSearch

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from cluster.manifest import ArtifactRef
    from cluster.store import Artifact

SPARE_HITS = 16


def require_chunks(index: Artifact, k: int, key: str) -> None:
    """Refuses a `k` that no search of the index could fill, before anything is loaded.

    Raises:
        UserError: naming `key`, the recipe key that `k` came from.
    """
    chunks = int(index.manifest.counts["chunks"])
    if not 1 <= k <= chunks:
        raise UserError(f"{key} is {k} but the index has {chunks} chunks: set {key} to between 1 and {chunks}")


class Retriever:
    """An opened index. Searches on CPU may run from several threads; on a GPU they take turns."""

    def __init__(
        self,
        artifact: Artifact,
        chunks: pa.Table,
        search: VectorSearch | LexicalIndex,
        encoder: EncoderConfig,
        device: str | None,
    ) -> None:
        """Use `Retriever.open`."""
        import numpy as np

        self.ref: ArtifactRef = artifact.ref
        self.mode: Literal["dense", "lexical"] = "dense" if isinstance(search, VectorSearch) else "lexical"
        self._artifact = artifact
        self._chunks = chunks
        self._search = search
        self._encoder_config = encoder
        self._device = device
        self._encoder: Encoder | None = None
        self._encoder_lock = threading.Lock()
        order = np.argsort(np.array(chunks["chunk_id"].to_pylist(), dtype=object))
        self._id_rank = np.empty(len(chunks), dtype=np.int64)
        """Place of each row's chunk id among all, to order equal scores."""
        self._id_rank[order] = np.arange(len(chunks))

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        encoder: EncoderConfig,
        search: SearchConfig | None = None,
        *,
        device: str | None = None,
    ) -> Retriever:
        """Verify and load an index artifact.

        Args:
            artifact: Of kind `index`.
            encoder: The recipe's encoder; loaded at the first dense search.
            search: How to search (the recipe's `search` section); none takes the defaults.
            device: Of the query encoder; by default `cuda` where there is one.

        Raises:
            ArtifactError: damaged, of another format, or built by another encoder (both are named).
            UserError: `search.gpu` where there is no GPU search.
        """
        manifest = artifact.manifest
        if manifest.kind != "index" or manifest.format != INDEX_FORMAT:
            raise ArtifactError(
                f"{artifact.ref} is a {manifest.kind} of format {manifest.format}, this rayft searches an index of "
                f"format {INDEX_FORMAT}: run `rayft index build RECIPE`"
            )
        lexical = manifest.measured.get("mode") == "lexical"
        if not lexical:
            _refuse_other_encoder(artifact, encoder)
        directory = artifact.directory()
        chunks = _read_chunks(directory)
        rows = int(manifest.counts["chunks"])
        gpu = search is not None and search.gpu
        files: VectorSearch | LexicalIndex
        if lexical:
            files = LexicalIndex.load(directory / LEXICAL_FOLDER)
            found = files.texts
        else:
            files = VectorSearch(directory / "index.faiss", rows, int(manifest.measured["dimension"]), gpu)
            found = files.rows
        if not len(chunks) == found == rows:
            raise ArtifactError(
                f"{artifact.ref}: {rows} chunks in the manifest, {len(chunks)} in its parts and {found} in the search "
                "files must be equal: rebuild the index"
            )
        return cls(artifact, chunks, files, encoder, device)

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self._chunks)

    def search(self, queries: Sequence[str], k: int, key: str = "k") -> list[list[Hit]]:
        """The k best passages of each query, best first; always k of them, so a lexical hit may score 0.

        Args:
            queries: Any number; embedded and searched together.
            k: Passages per query.
            key: Recipe key that `k` came from, to name in the error.

        Raises:
            UserError: `k` is not between 1 and the number of chunks.
        """
        if not 1 <= k <= len(self):
            raise UserError(
                f"{key} is {k} but the index has {len(self)} chunks: set {key} to between 1 and {len(self)}"
            )
        if not queries:
            return []
        if isinstance(self._search, VectorSearch):
            found = self._search_dense(self._search, queries, k)
        else:
            found = [self._best(self._search.scores(query), k) for query in queries]
        return [
            [Hit(Passage.of(self._chunk(row)), score, rank) for rank, (row, score) in enumerate(best, start=1)]
            for best in found
        ]

    def chunks(self) -> list[Chunk]:
        """All chunks, in document and offset order."""
        return [Chunk.from_row(row) for row in self._chunks.to_pylist()]

    def documents(self) -> list[Document]:
        """All documents, in corpus order, with their text."""
        rows = _read_table(self._artifact.directory() / "documents", Document.schema()).to_pylist()
        return [Document.from_row(row) for row in rows]

    def encode_queries(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """Query embeddings, (n, dim) float32; loads the encoder at the first call."""
        with self._encoder_lock:  # one owner: padding buffers and torch's thread pool are shared
            if self._encoder is None:
                self._encoder = load_encoder(EncoderSource(self._encoder_config), self._device)
            return self._encoder.encode_queries(queries)

    def _search_dense(self, search: VectorSearch, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """Search a little deeper than k; deeper still for queries whose k-th score is not yet told from the last."""
        vectors = self.encode_queries(queries)
        results: list[list[tuple[int, float]]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        depth = min(len(self), k + SPARE_HITS)
        while pending:
            scores, rows = search.search(vectors[pending], depth)
            unsettled = []
            for query, query_scores, query_rows in zip(pending, scores, rows, strict=True):
                valid = query_rows >= 0
                results[query] = self._ordered(query_rows[valid], query_scores[valid], k)
                if query_scores[-1] == query_scores[k - 1] and valid[-1]:
                    unsettled.append(query)
            if depth == len(self):
                break
            pending, depth = unsettled, min(len(self), depth * 2)
        return results

    def _best(self, scores: npt.NDArray[np.float32], k: int) -> list[tuple[int, float]]:
        """The k best of a score per row, (n_chunks,) float32."""
        import numpy as np

        kth = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero(scores >= kth)
        return self._ordered(rows, scores[rows], k)

    def _ordered(self, rows: npt.NDArray[Any], scores: npt.NDArray[Any], k: int) -> list[tuple[int, float]]:
        import numpy as np

        order = np.lexsort((self._id_rank[rows], -scores))[:k]
        return [(int(rows[place]), float(scores[place])) for place in order]

    def _chunk(self, row: int) -> Chunk:
        return Chunk.from_row(self._chunks.slice(row, 1).to_pylist()[0])


def _refuse_other_encoder(artifact: Artifact, encoder: EncoderConfig) -> None:
    built_with = artifact.manifest.inputs.get("encoder.model", "")
    offered = encoder_digest(encoder)
    if built_with != offered:
        raise ArtifactError(
            f"{artifact.ref} was built with the encoder {artifact.manifest.measured.get('encoder')} "
            f"({built_with[:12]}), the recipe's encoder.model is {encoder.model} ({offered[:12]}): "
            "run `rayft index build RECIPE`, or set encoder.model back"
        )


def _read_chunks(directory: Path) -> pa.Table:
    return _read_table(directory / "chunks", Chunk.schema())


def _read_table(folder: Path, schema: pa.Schema) -> pa.Table:
    """The parts of `folder` in row order, without the columns that `schema` does not have (embeddings)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [pq.read_table(part, columns=schema.names) for part in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(parts).combine_chunks() if parts else schema.empty_table()
