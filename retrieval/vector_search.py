"""Searching the vectors of one shard: an index file read within limits, or the vectors themselves.

In: `index.faiss` (its sha256 verified by the store), the shard's vectors, what the build measured. Out: scores (inner
products of unit vectors, exact to float32 rounding) and rows, best first.
With `allowed`, rows are exact in visibility: no other row is ever returned. Below `exhaustive_below` rows (from the
manifest, at least 20,000) the result is exact in ranking too; above it FAISS gets a selector and as many probes as
reached the recall target on random subsets of that share.
Not covered: building and tuning (`vectors.py`), several shards (`retriever.py`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, UserError
from retrieval.exhaustive import rescore, search_all, search_rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]

INDEX_FILE = "index.faiss"
GPU_LIMIT = 2048  # of k and of nprobe, in FAISS's GPU kernels


@dataclass(frozen=True)
class Effort:
    """How hard one search tries."""

    width: int
    """nprobe of an IVF index, efSearch of hnsw."""
    factor: int = 1
    """Candidates per place of the result, rescored with the vectors (ivf_pq); 1: no rescoring."""


def search_faiss(
    index: Any, queries: Vectors, vectors: Vectors, k: int, effort: Effort, selector: Any = None
) -> tuple[Vectors, Rows]:
    """Search a FAISS index at `effort`, leaving its shared parameters alone: scores and rows, (q, k), -1 where none."""
    parameters = search_parameters(index, effort, k)
    if selector is not None:
        parameters.sel = selector
    scores, rows = index.search(queries, k * effort.factor, params=parameters)
    if effort.factor > 1:
        return rescore(queries, vectors, rows, k)
    scores[rows < 0] = -float("inf")
    return scores, rows


def search_parameters(index: Any, effort: Effort, k: int) -> Any:
    """FAISS's parameters of one search for k places."""
    import faiss

    library: Any = faiss  # its stubs do not know the keyword arguments
    if isinstance(index, faiss.IndexHNSW):
        return library.SearchParametersHNSW(efSearch=max(effort.width, k))
    return library.SearchParametersIVF(nprobe=min(effort.width, index.nlist))


def selector_of(allowed: Rows, rows: int) -> tuple[Any, Any]:
    """A FAISS selector of `allowed` among `rows` rows, and the bitmap that must outlive it."""
    import faiss
    import numpy as np

    mask = np.zeros(rows, dtype=bool)
    mask[allowed] = True
    bitmap = np.packbits(mask, bitorder="little")
    return faiss.IDSelectorBitmap(len(bitmap), faiss.swig_ptr(bitmap)), bitmap


class VectorIndex:
    """The vectors of a shard, ready to search. On CPU from any number of threads; on a GPU calls take turns."""

    def __init__(self, vectors: Vectors, measured: dict[str, Any], index: Any, gpu: _GpuIndex | None) -> None:
        """Use `VectorIndex.open`."""
        self.rows: int = len(vectors)
        self.kind: str = measured["kind"]
        self._vectors = vectors
        self._measured = measured
        self._index = index
        self._gpu = gpu

    @classmethod
    def open(cls, directory: Path, vectors: Vectors, measured: dict[str, Any], *, gpu: bool = False) -> VectorIndex:
        """Read the index of a shard.

        Args:
            directory: Holds `index.faiss` (unless flat), verified against the manifest.
            vectors: (rows, dim) float32 unit vectors of the shard, memory-mapped.
            measured: What `build_vector_index` returned.
            gpu: Search on this process's GPU.

        Raises:
            ArtifactError: the file is damaged, or is not an index of these vectors.
            UserError: `gpu` where there is no GPU search.
        """
        from retrieval.faiss_guard import read_guarded

        _check_measured(measured, directory)
        kind = measured["kind"]
        if gpu:
            _require_gpu(kind)
        rows, dimension = vectors.shape
        index = None if kind == "flat" else read_guarded(directory / INDEX_FILE, kind, rows, dimension)
        return cls(vectors, measured, index, _GpuIndex(index, vectors) if gpu else None)

    def search(self, queries: Vectors, k: int, allowed: Rows | None = None) -> tuple[Vectors, Rows]:
        """The k best rows of each query.

        Args:
            queries: (q, dim) float32 unit vectors.
            k: Places per query, at least 1.
            allowed: Sorted unique rows that may be returned, (m,) int64; none: all.

        Returns:
            Scores (q, k) float32 and rows (q, k) int64, best first; -inf and -1 in the places beyond the allowed rows.

        Raises:
            ValueError: the queries are not of the vectors' dimension.
        """
        import numpy as np

        if queries.ndim != 2 or queries.shape[1] != self._vectors.shape[1]:
            raise ValueError(f"queries must be (q, {self._vectors.shape[1]}), got {queries.shape}")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if allowed is None or len(allowed) == self.rows:
            return self._search_unfiltered(queries, k)
        if self._is_exhaustive(len(allowed)) or self._gpu is not None:
            return search_rows(queries, self._vectors, allowed, k)
        return self._search_selected(queries, k, allowed)

    def _search_unfiltered(self, queries: Vectors, k: int) -> tuple[Vectors, Rows]:
        places = min(k, self.rows)
        if self._gpu is not None and self._gpu.can_search(places, self._effort(k)):
            scores, rows = self._gpu.search(queries, places, self._effort(k))
        elif self._index is None:
            scores, rows = search_all(queries, self._vectors, places)
        else:
            scores, rows = search_faiss(self._index, queries, self._vectors, places, self._effort(k))
        short = (rows < 0).any(axis=1)
        if short.any():  # fewer rows in the probed lists than asked for
            scores[short], rows[short] = search_all(queries[short], self._vectors, places)
        return _padded(scores, rows, k)

    def _search_selected(self, queries: Vectors, k: int, allowed: Rows) -> tuple[Vectors, Rows]:
        import numpy as np

        selector, bitmap = selector_of(allowed, self.rows)
        places = min(k, len(allowed))
        effort = self._effort(k, len(allowed))
        scores, rows = search_faiss(self._index, queries, self._vectors, places, effort, selector)
        granted = np.unpackbits(bitmap, bitorder="little")
        # A row outside the filter would be another tenant's: FAISS's word is not enough (faiss #4858, #5581).
        wrong = (rows < 0) | (granted[np.maximum(rows, 0)] == 0)
        short = wrong.any(axis=1)
        if short.any():
            scores[short], rows[short] = search_rows(queries[short], self._vectors, allowed, places)
        return _padded(scores, rows, k)

    def _is_exhaustive(self, allowed: int) -> bool:
        return self._index is None or allowed < max(1, self._measured["exhaustive_below"])

    def _effort(self, k: int, allowed: int | None = None) -> Effort:
        """The measured effort for k places, or for a filter that keeps `allowed` rows."""
        if self._index is None:
            return Effort(1)
        # Tuned at recall_at and at ten times as much. A caller that looks a little deeper, to settle ties, still cares
        # about the first recall_at places: those keep their recall at a greater k.
        deep = k > 4 * self._measured["recall_at"]
        steps = self._measured["deep" if deep else "plain"]
        share = 1.0 if allowed is None else allowed / self.rows
        # Shares fall from 1; the hardest measured share that is at least as selective as the filter, or the last.
        chosen = next((step for step in steps if step["share"] <= share), steps[-1])
        return Effort(chosen["width"], chosen["factor"])


def _check_measured(measured: dict[str, Any], directory: Path) -> None:
    """Refuse what is not `build_vector_index`'s: it comes from a file."""

    def counts(value: Any, least: int) -> bool:
        return isinstance(value, int) and least <= value < 2**31

    try:
        sane = measured["kind"] in ("flat", "hnsw", "ivf_flat", "ivf_pq")
        if sane and measured["kind"] != "flat":
            steps = [*measured["plain"], *measured["deep"]]
            sane = (
                counts(measured["exhaustive_below"], 0)
                and counts(measured["recall_at"], 1)
                and bool(measured["plain"])
                and bool(measured["deep"])
                and all(counts(step["width"], 1) and counts(step["factor"], 1) for step in steps)
                and all(isinstance(step["share"], float) for step in steps)
            )
    except (KeyError, TypeError):
        sane = False
    if not sane:
        raise ArtifactError(f"{directory}: index.json does not say how to search its vectors: rebuild the index")


def _padded(scores: Vectors, rows: Rows, k: int) -> tuple[Vectors, Rows]:
    import numpy as np

    missing = k - rows.shape[1]
    if missing <= 0:
        return scores, rows
    width = ((0, 0), (0, missing))
    return np.pad(scores, width, constant_values=-np.inf), np.pad(rows, width, constant_values=-1)


def _require_gpu(kind: str) -> None:
    import faiss

    if kind == "hnsw":
        raise UserError(
            "search.gpu is true but FAISS has no hnsw search on GPUs: set index.kind to flat, ivf_flat or ivf_pq"
        )
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError("search.gpu is true but the installed FAISS is the CPU one: install rayft with .[gpu]")
    if faiss.get_num_gpus() == 0:
        raise UserError(
            "search.gpu is true but FAISS sees no GPU here: set search.gpu=false or give the retriever a GPU"
        )


class _GpuIndex:
    """A copy of an index on the process's GPU, with resources of its own; one search at a time.

    Filters do not come here: a selector is honoured by cuVS builds only (faiss #4858), so filtered searches run over
    the allowed rows on the CPU.
    """

    def __init__(self, index: Any, vectors: Vectors) -> None:
        import faiss

        self._lock = threading.Lock()
        self._vectors = vectors
        self._resources = faiss.StandardGpuResources()  # must outlive the index
        if index is None:
            self._index: Any = faiss.GpuIndexFlatIP(self._resources, vectors.shape[1])
            add_in_blocks(self._index, vectors)
        else:
            self._index = faiss.index_cpu_to_gpu(self._resources, 0, index, cloner_options())

    def can_search(self, k: int, effort: Effort) -> bool:
        """Whether FAISS's GPU kernels can do a search as wide as that."""
        return k * effort.factor <= GPU_LIMIT and effort.width <= GPU_LIMIT

    def search(self, queries: Vectors, k: int, effort: Effort) -> tuple[Vectors, Rows]:
        import faiss

        with self._lock:
            if isinstance(self._index, faiss.GpuIndexFlat):
                found: tuple[Vectors, Rows] = self._index.search(queries, k)
                return found
            parameters = search_parameters(self._index, effort, k)
            scores, rows = self._index.search(queries, k * effort.factor, params=parameters)
        return rescore(queries, self._vectors, rows, k) if effort.factor > 1 else (scores, rows)


def cloner_options() -> Any:
    """How to copy an index to a GPU: with cuVS where this FAISS has it."""
    import faiss

    options = faiss.GpuClonerOptions()
    if hasattr(options, "use_cuvs"):
        options.use_cuvs = "CUVS" in faiss.get_compile_options()
    return options


def add_in_blocks(index: Any, vectors: Vectors, rows: int = 65536) -> None:
    """Add mapped vectors without copying all of them at once."""
    import numpy as np

    for start in range(0, len(vectors), rows):
        index.add(np.ascontiguousarray(vectors[start : start + rows]))
