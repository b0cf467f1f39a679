"""FAISS indexes over unit vectors: building, measuring recall, reading within limits, searching.

In: Parquet parts with an `embedding` column, read in row groups. Out: an index file and its recall@10 against exact
search; from a verified file, ids and scores of the nearest rows. Scores are inner products of unit vectors (cosine).
Not covered: sharding over several files, filters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]  # (n, dim)
    Ids = npt.NDArray[np.int64]

RECALL_AT = 10
AIMED_RECALL = 0.95
SAME_SCORE = 1e-5  # two float32 sums of one inner product differ by less
HNSW_NEIGHBOURS = 32
HNSW_CONSTRUCTION = 80
HNSW_SEARCH = 64
TRAINING_ROWS_PER_LIST = 64

VectorBatches = Callable[[], Iterator["Vectors"]]
"""Starts a fresh pass over all vectors, in row order."""


@dataclass(frozen=True)
class BuiltVectors:
    """A finished FAISS index and what was measured on it."""

    index: Any
    rows: int
    dimension: int
    recall_at_10: float


def build_vectors(batches: VectorBatches, rows: int, kind: str, seed: int, recall_sample: int) -> BuiltVectors:
    """Build an index of `kind` over `rows` vectors and measure its recall@10 on a seeded sample of them as queries.

    `ivf_flat` takes the smallest power of two as nprobe that reaches a recall of 0.95 on the sample. `hnsw` is built
    by one thread, because FAISS's parallel construction gives another graph each time; its graph also follows the
    batches, which are the corpus's own.
    """
    import faiss
    import numpy as np

    queries = _sampled(batches, rows, recall_sample, seed)
    dimension = int(queries.shape[1])
    index = _empty_index(batches, rows, dimension, kind, seed)
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(1 if kind == "hnsw" else threads)
        for batch in batches():
            index.add(np.ascontiguousarray(batch))
    finally:
        faiss.omp_set_num_threads(threads)
    assert index.ntotal == rows, f"the index holds {index.ntotal} rows, expected {rows}"
    exact = _exact_scores(batches, queries, min(RECALL_AT, rows))
    recall = _recall(index, queries, exact)
    while kind == "ivf_flat" and recall < AIMED_RECALL and index.nprobe < index.nlist:
        index.nprobe = min(index.nprobe * 2, index.nlist)
        recall = _recall(index, queries, exact)
    return BuiltVectors(index, rows, dimension, recall)


def _empty_index(batches: VectorBatches, rows: int, dimension: int, kind: str, seed: int) -> Any:
    import faiss

    if kind == "flat":
        return faiss.IndexFlatIP(dimension)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_CONSTRUCTION
        graph.hnsw.efSearch = HNSW_SEARCH
        return graph
    assert kind == "ivf_flat", f"unknown index kind {kind}"
    lists = max(1, min(int(4 * rows**0.5), rows // 39))  # FAISS wants at least 39 training rows per list
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed % 2**31
    index.train(_sampled(batches, rows, lists * TRAINING_ROWS_PER_LIST, seed))
    index.nprobe = 1
    return index


def _sampled(batches: VectorBatches, rows: int, size: int, seed: int) -> Vectors:
    """`size` rows (or all) drawn without replacement, in row order: (size, dim) float32."""
    import numpy as np

    chosen = np.sort(np.random.default_rng(seed).choice(rows, size=min(size, rows), replace=False))
    parts, passed = [], 0
    for batch in batches():
        inside = chosen[(chosen >= passed) & (chosen < passed + len(batch))] - passed
        parts.append(batch[inside])
        passed += len(batch)
    return np.ascontiguousarray(np.concatenate(parts))


def _exact_scores(batches: VectorBatches, queries: Vectors, k: int) -> Vectors:
    """The k best inner products of each query over all rows, best first: (n_queries, k) float32. Needs no FAISS."""
    import numpy as np

    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    for batch in batches():
        best = np.concatenate([best, queries @ batch.T], axis=1)
        if best.shape[1] > k:
            best = -np.partition(-best, k - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)


def _recall(index: Any, queries: Vectors, exact: Vectors) -> float:
    """Share of each query's k places that the index fills with a row as good as exact search's k-th."""
    scores, ids = index.search(queries, exact.shape[1])
    found = (ids >= 0) & (scores >= exact[:, -1:] - SAME_SCORE)
    return float(found.mean())


class VectorSearch:
    """A FAISS index read from a verified file, on CPU or on one GPU."""

    def __init__(self, file: Path, rows: int, dimension: int, gpu: bool = False) -> None:
        """Read the index within limits taken from the file's size, and check its shape against the manifest's.

        Raises:
            ArtifactError: when rows or dimension are not the manifest's, or FAISS refuses the file.
            UserError: when a GPU is asked for and this FAISS, this machine or this index kind has no GPU search.
        """
        import faiss

        size = file.stat().st_size
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(max(size, 1024))
        try:
            index = faiss.read_index(str(file))
        except RuntimeError as error:
            raise ArtifactError(f"{file.name} is not a FAISS index that can be read: rebuild the index") from error
        if index.ntotal != rows or index.d != dimension:
            raise ArtifactError(
                f"{file.name} holds {index.ntotal} vectors of {index.d} dimensions, the manifest says "
                f"{rows} of {dimension}: rebuild the index"
            )
        self._resources: Any = None
        self._lock = threading.Lock()
        self._index = self._to_gpu(index) if gpu else index
        self.rows = rows

    def _to_gpu(self, index: Any) -> Any:
        import faiss

        if not hasattr(faiss, "StandardGpuResources"):
            raise UserError("search.gpu is true but the installed FAISS is the CPU one: install rayft with .[gpu]")
        if faiss.get_num_gpus() == 0:
            raise UserError(
                "search.gpu is true but FAISS sees no GPU here: set search.gpu=false or give the retriever a GPU"
            )
        if isinstance(index, faiss.IndexHNSW):
            raise UserError(
                "search.gpu is true but FAISS has no hnsw search on GPUs: set index.kind to flat or ivf_flat"
            )
        self._resources = faiss.StandardGpuResources()  # must outlive the index
        return faiss.index_cpu_to_gpu(self._resources, 0, index)

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Scores and row numbers of the k nearest rows, (n_queries, k) each, best first; row -1 where none was found.

        On a GPU calls take turns: a FAISS GPU index must not be searched from two threads at once.
        """
        if self._resources is None:
            scores, ids = self._index.search(queries, k)
        else:
            with self._lock:
                scores, ids = self._index.search(queries, k)
        return scores, ids
