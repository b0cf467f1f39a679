"""Building and tuning the vector index of one shard.

In: the shard's unit vectors, memory-mapped, (rows, dim) float32; a policy from the recipe. Out: `index.faiss` beside
them (nothing for a flat index) and a dictionary for `index.json`: kind, search parameters, measured recall.
The index is built on the GPU that this process was given, if any. From one seed, the training sample, the lists and
the tuning are the same; hnsw built by several threads (above `HNSW_ONE_THREAD_ROWS`) is another graph each time.
Not covered: reading and searching (`vector_search.py`), several shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retrieval.exhaustive import drop_rows, search_all, search_rows
from retrieval.vector_search import (
    INDEX_FILE,
    Effort,
    VectorIndex,
    add_in_blocks,
    cloner_options,
    search_faiss,
    selector_of,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from retrieval.config import IndexConfig

    Vectors = npt.NDArray[np.float32]  # (n, dim)
    Rows = npt.NDArray[np.int64]

__all__ = ["VectorIndex", "VectorPolicy", "build_vector_index", "choose_kind"]

SAME_SCORE = 1e-5  # two float32 sums of one inner product differ by less
FLAT_ROWS = 20_000
"""Up to here `auto` is flat: 30 MB of 384 dimensions, exact, needing no training. Not yet chosen by measurement."""
IVF_FLAT_ROWS = 500_000
"""Up to here `auto` keeps float vectors in the index; above, codes of one byte for 8 dimensions, rescored.
One run at 300,000 × 384 on a loaded machine, sides not alternating, flat timed once: at batch 64 ivf_flat (nprobe 4,
recall@10 0.987) had 63 times flat's queries/s, ivf_pq (nprobe 4, 10 candidates per place, 0.974) 134 times. By
arithmetic they hold 460 MB and about 20 MB. The threshold between is a judgement: rescoring reads the mapped vectors,
which is slow while they are not in the page cache, and small float vectors need not depend on it."""
SMALLEST_INDEXED = 256
"""Shards with fewer rows (of an update, say) are flat whatever the recipe says: too few to train lists or codes on."""
HNSW_NEIGHBOURS = 32
HNSW_CONSTRUCTION = 80
HNSW_ONE_THREAD_ROWS = 100_000
"""Above this the same graph every time is not worth one thread's wait. Not yet chosen by measurement."""
TRAINING_ROWS_PER_LIST = 40
"""FAISS wants at least 39; 256 (its most) cost six times the time."""
PQ_TRAINING_ROWS = 32_768
DIMENSIONS_PER_CODE = 8
FACTORS = (4, 8, 16, 32)
"""Candidates per place that ivf_pq may rescore; the least that reaches the target is kept."""
EXHAUSTIVE_ROWS = 20_000
"""Filters that keep fewer rows are always searched exhaustively."""
SHARES = (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Shares of the rows kept by the random filters that the tuning measures."""
FILTERED_EFFORT = 4
"""A filter may widen the search by this; what then misses the target is searched exhaustively."""
DEEP = 10
"""Parameters are also tuned for this many times `recall_at` places."""


@dataclass(frozen=True)
class VectorPolicy:
    """How a shard's vectors are indexed; the recipe's `index` section without what is not of a shard."""

    kind: str
    """auto, flat, hnsw, ivf_flat or ivf_pq."""
    recall_target: float
    """Recall@`recall_at` against exact search that the search parameters shall reach."""
    recall_at: int
    recall_sample: int
    """Rows used as queries to tune."""
    seed: int

    @classmethod
    def of(cls, config: IndexConfig, seed: int) -> VectorPolicy:
        """The policy of a recipe's `index` section."""
        return cls(config.kind, config.recall_target, config.recall_at, config.recall_sample, seed)


def choose_kind(kind: str, rows: int) -> str:
    """`kind`, or what `auto` comes to for a shard of `rows` rows; always flat below `SMALLEST_INDEXED`."""
    if rows < SMALLEST_INDEXED:
        return "flat"
    if kind != "auto":
        return kind
    if rows <= FLAT_ROWS:
        return "flat"
    return "ivf_flat" if rows <= IVF_FLAT_ROWS else "ivf_pq"


def build_vector_index(vectors: Vectors, policy: VectorPolicy, directory: Path) -> dict[str, Any]:
    """Build, tune and write the index of a shard.

    Args:
        vectors: (rows, dim) float32 unit vectors, memory-mapped.
        policy: Kind, recall target, seed.
        directory: Where `index.faiss` goes.

    Returns:
        For `index.json`, and for `VectorIndex.open`: `kind`; `recall` at `recall_at` on the sample, unfiltered, and
        `reached`: whether that is the target; `nprobe` or `ef_search` (and `factor`) that reach it; `plain` and `deep`:
        the same by share of rows kept by a filter, at `recall_at` and `deep_at` places; `exhaustive_below`: allowed
        rows below which a filtered search is exhaustive; `bytes` of the file.
    """
    rows = len(vectors)
    kind = choose_kind(policy.kind, rows)
    common = {"kind": kind, "recall_at": policy.recall_at, "recall_target": policy.recall_target}
    if kind == "flat":
        return {**common, "recall": 1.0, "reached": True, "exhaustive_below": rows, "bytes": 0}
    found = {**common, **_build_tuned(vectors, kind, policy, directory / INDEX_FILE)}
    if policy.kind == "auto" and kind == "ivf_pq" and not found["reached"]:  # codes too coarse for these vectors
        found = {**common, "kind": "ivf_flat", **_build_tuned(vectors, "ivf_flat", policy, directory / INDEX_FILE)}
    return found


def _build_tuned(vectors: Vectors, kind: str, policy: VectorPolicy, file: Path) -> dict[str, Any]:
    import faiss

    rows = len(vectors)
    index = _build(vectors, kind, policy.seed)
    assert index.ntotal == rows, f"the index holds {index.ntotal} rows, expected {rows}"
    faiss.write_index(index, str(file))
    tuner = _Tuner(index, vectors, policy)
    deep_at = min(policy.recall_at * DEEP, max(rows - 1, 1))
    plain, deep = tuner.tune(min(policy.recall_at, max(rows - 1, 1))), tuner.tune(deep_at)
    best = plain[0]
    filtered = [step["share"] for step in plain[1:]]
    return {
        "recall": best["recall"],
        "reached": best["recall"] >= policy.recall_target,
        "ef_search" if kind == "hnsw" else "nprobe": best["width"],
        "factor": best["factor"],
        "plain": plain,
        "deep": deep,
        "deep_at": deep_at,
        "exhaustive_below": max(EXHAUSTIVE_ROWS, round(min(filtered, default=1.0) * rows)),
        "bytes": file.stat().st_size,
    }


def _build(vectors: Vectors, kind: str, seed: int) -> Any:
    import faiss

    rows, dimension = vectors.shape
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_CONSTRUCTION
        threads = faiss.omp_get_max_threads()
        try:
            faiss.omp_set_num_threads(1 if rows <= HNSW_ONE_THREAD_ROWS else threads)
            add_in_blocks(graph, vectors)
        finally:
            faiss.omp_set_num_threads(threads)
        return graph
    lists = max(1, min(int(4 * rows**0.5), rows // TRAINING_ROWS_PER_LIST))
    quantizer = faiss.IndexFlatIP(dimension)
    if kind == "ivf_flat":
        index: Any = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
        training = lists * TRAINING_ROWS_PER_LIST
    else:
        codes, bits = _code_shape(rows, dimension)
        index = faiss.IndexIVFPQ(quantizer, dimension, lists, codes, bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.seed = seed % 2**31
        training = max(lists * TRAINING_ROWS_PER_LIST, PQ_TRAINING_ROWS)
    index.cp.seed = seed % 2**31
    sample = _sample(vectors, training, seed)[1]
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()
        on_gpu = faiss.index_cpu_to_gpu(resources, 0, index, cloner_options())
        on_gpu.train(sample)
        add_in_blocks(on_gpu, vectors)
        return faiss.index_gpu_to_cpu(on_gpu)
    index.train(sample)
    add_in_blocks(index, vectors)
    return index


def _code_shape(rows: int, dimension: int) -> tuple[int, int]:
    """Bytes of a product-quantised vector, which divide its dimensions, and bits of each, which the rows can train."""
    codes = max(1, dimension // DIMENSIONS_PER_CODE)
    while dimension % codes:
        codes -= 1
    bits = 8
    while bits > 1 and 39 * 2**bits > rows:
        bits -= 1
    return codes, bits


def _sample(vectors: Vectors, size: int, seed: int) -> tuple[Rows, Vectors]:
    """`size` rows (or all) drawn without replacement, in order, and their vectors, copied."""
    import numpy as np

    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), size=min(size, len(vectors)), replace=False))
    return rows, np.take(vectors, rows, axis=0)


class _Recall(NamedTuple):
    """Recall on the sample."""

    mean: float
    sure: float
    """What it is at least, with 95% confidence in the sample (1.64 standard errors below the mean). The tuning wants
    this to reach the target: parameters whose mean just did, on 200 rows, gave fresh queries 0.938 for 0.95."""


class _Tuner:
    """Finds the least effort that reaches the recall target, on rows of the shard as queries, themselves left out."""

    def __init__(self, index: Any, vectors: Vectors, policy: VectorPolicy) -> None:
        import faiss

        self._index, self._vectors, self._policy = index, vectors, policy
        self._own, self._queries = _sample(vectors, policy.recall_sample, policy.seed + 1)
        hnsw, quantized = isinstance(index, faiss.IndexHNSW), isinstance(index, faiss.IndexIVFPQ)
        self._least = 16 if hnsw else 1
        self._most = 4096 if hnsw else index.nlist
        self._factors = FACTORS if quantized else (1,)

    def tune(self, k: int) -> list[dict[str, Any]]:
        """Steps for k places: the unfiltered one first, then one per share of random rows, while the target is met."""
        exact = self._exact(k, None)
        effort, recall = self._least_effort(lambda effort: self._recall(k, effort, exact, None))
        steps = [_step(1.0, effort, recall)]
        for number, share in enumerate(SHARES):
            kept = round(share * len(self._vectors))
            if kept < EXHAUSTIVE_ROWS:
                break
            allowed = _sample(self._vectors[:, :0], kept, self._policy.seed + 2 + number)[0]
            exact, selector = self._exact(k, allowed), selector_of(allowed, len(self._vectors))
            last = effort
            for width in sorted({min(last.width * factor, self._most) for factor in (1, 2, FILTERED_EFFORT)}):
                effort = Effort(width, last.factor)
                recall = self._recall(k, effort, exact, selector[0])
                if recall.sure >= self._policy.recall_target:
                    break
            if recall.sure < self._policy.recall_target or effort.width > FILTERED_EFFORT * steps[0]["width"]:
                break
            steps.append(_step(share, effort, recall))
        return steps

    def _exact(self, k: int, allowed: Rows | None) -> Vectors:
        """The k best scores of each query by exact search."""
        if allowed is None:
            found = search_all(self._queries, self._vectors, k + 1)
        else:
            found = search_rows(self._queries, self._vectors, allowed, k + 1)
        return drop_rows(*found, self._own)[0]

    def _recall(self, k: int, effort: Effort, exact: Vectors, selector: Any) -> _Recall:
        """Share of each query's k places filled with a row as good as exact search's k-th."""
        found = search_faiss(self._index, self._queries, self._vectors, k + 1, effort, selector)
        scores, rows = drop_rows(*found, self._own)
        shares = ((rows >= 0) & (scores >= exact[:, -1:] - SAME_SCORE)).mean(axis=1)
        mean = float(shares.mean())
        return _Recall(mean, mean - 1.64 * float(shares.std()) / len(shares) ** 0.5)

    def _least_effort(self, measure: Callable[[Effort], _Recall]) -> tuple[Effort, _Recall]:
        """The least factor, then the least width, that reaches the target; the most of both where none does."""
        best = (Effort(self._least, self._factors[0]), _Recall(-1.0, -1.0))
        for factor in self._factors:
            width, recall, below = self._least, measure(Effort(self._least, factor)), self._least - 1
            while recall.sure < self._policy.recall_target and width < self._most:
                below, before, width = width, recall, min(width * 2, self._most)
                recall = measure(Effort(width, factor))
                if recall.mean - before.mean < 0.001 and factor != self._factors[-1] and width >= 16:
                    break  # the codes, not the lists, lose the neighbours
            if recall.sure > best[1].sure:
                best = (Effort(width, factor), recall)
            if recall.sure >= self._policy.recall_target:
                return self._narrow(measure, below, best)
        return best

    def _narrow(
        self, measure: Callable[[Effort], _Recall], below: int, reached: tuple[Effort, _Recall]
    ) -> tuple[Effort, _Recall]:
        """Bisect between a width that was not enough and one that was."""
        effort, recall = reached
        while effort.width - below > max(1, below // 8):
            middle = Effort((effort.width + below) // 2, effort.factor)
            found = measure(middle)
            if found.sure >= self._policy.recall_target:
                effort, recall = middle, found
            else:
                below = middle.width
        return effort, recall


def _step(share: float, effort: Effort, recall: _Recall) -> dict[str, Any]:
    return {"share": share, "width": effort.width, "factor": effort.factor, "recall": round(recall.mean, 5)}
