"""An index of made-up vectors and metadata, without an encoder and a store, for the tests of searching."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.manifest import ArtifactRef
from retrieval.lexical import LexicalIndex
from retrieval.searcher import IndexSearcher
from retrieval.shards import (
    INDEX_FORMAT,
    LEXICAL_ROWS,
    IndexFile,
    LexicalEntry,
    chunk_schema,
    document_schema,
    new_shard_id,
    write_shard,
    write_tombstones,
)
from retrieval.vectors import VectorPolicy

SEED = 11


def unit_vectors(rows: int, dimension: int = 16, seed: int = SEED) -> np.ndarray:
    """Random directions, (rows, dimension) float32."""
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def policy(kind: str) -> VectorPolicy:
    """Small samples: a test measures no recall."""
    return VectorPolicy(kind=kind, recall_target=0.95, recall_at=10, recall_sample=20, seed=SEED)


def open_made(
    directory: Path,
    vectors: np.ndarray,
    metadata: Sequence[Mapping[str, Any]],
    texts: Sequence[str] | None = None,
    *,
    cuts: Sequence[int] = (),
    deleted: Sequence[int] = (),
    kind: str = "flat",
    names: Sequence[str] | None = None,
) -> IndexSearcher:
    """Write shards that end at `cuts`, with `deleted` global rows, and open them. Chunk ids are `names`."""
    edges = [0, *cuts, len(vectors)]
    entries = []
    for start, end in itertools.pairwise(edges):
        chunks = [
            {
                "chunk_id": names[row] if names else f"c{row:06d}",
                "doc_id": f"d{row}",
                "title": "",
                "heading": "",
                "text": texts[row] if texts else f"text {row}",
                "start": 0,
                "end": 1,
                "tokens": 1,
                "uri": "",
                "metadata": json.dumps(metadata[row]),
                "text_key": 0,
            }
            for row in range(start, end)
        ]
        folder = directory / "shards" / new_shard_id()
        batches = pa.Table.from_pylist(chunks, schema=chunk_schema()).to_batches(max_chunksize=700)
        documents = pa.Table.from_pylist([], schema=document_schema()).to_batches()
        entries.append(write_shard(folder, iter(documents), iter(batches), iter([vectors[start:end]]), policy(kind)))
        gone = np.array([row - start for row in deleted if start <= row < end], dtype=np.int64)
        write_tombstones(directory, entries[-1].shard_id, gone)
    live = np.setdiff1d(np.arange(len(vectors), dtype=np.int64), np.array(deleted, dtype=np.int64))
    lexical = []
    if texts:
        folder = directory / "lexical" / "0"
        LexicalIndex.build(texts[row] for row in live).save(folder)
        np.save(folder / LEXICAL_ROWS, live, allow_pickle=False)
        lexical.append(LexicalEntry("lexical/0", len(live)))
    IndexFile("dense", "made", "0" * 64, "float32", tuple(entries), tuple(lexical)).write(directory)
    manifest = SimpleNamespace(counts={"chunks": len(live)}, kind="index", format=INDEX_FORMAT)
    artifact: Any = SimpleNamespace(
        ref=ArtifactRef("index", "made", "0" * 16), manifest=manifest, directory=lambda: directory
    )
    return IndexSearcher.open(artifact)
