"""`auto` against exact search over synthetic vectors: recall, queries per second, memory, and what our layer adds.

    python -m benchmarks.vector_search [--rows 1000000] [--dim 384] [--kind auto] [--rounds 3]

Data: a mixture of Gaussians, normalised. `--components` centres of uneven weight (log-normal); axis i of the centres
has variance 1/(1+i), and of a component `--spread`² times that. Decaying axes are what text embeddings look like
(participation ratio of the axes 26 of 384), and they let components overlap: neighbours are not one component. Queries
are fresh draws from the same mixture, never rows.
Sides take turns in every round: `auto` (`VectorIndex.search`), flat (`faiss.IndexFlatIP`), `auto` under random filters
that keep 1% and 0.1% against flat without a filter and against flat with an `IDSelectorBatch` of the same rows, and the
bare FAISS index with the same parameters (for ivf_pq with the same rescoring, written in NumPy).
Not measured: embedding, reading passages.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.conditions import describe_conditions, describe_load
from retrieval.vector_search import INDEX_FILE, VectorIndex
from retrieval.vectors import VectorPolicy, build_vector_index

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Search = Callable[[Vectors], tuple[Any, Rows]]
K = 10
DRAWN_AT_ONCE = 50_000
SIDE_S = 1.0


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the unit sphere."""

    centres: Vectors  # (components, dim)
    weights: npt.NDArray[np.float64]
    axes: Vectors  # (dim,) standard deviations
    spread: float

    @classmethod
    def of(cls, components: int, dim: int, spread: float, rng: np.random.Generator) -> Mixture:
        """Draw the centres and weights."""
        axes = (1 / np.sqrt(1 + np.arange(dim))).astype(np.float32)
        weights = rng.lognormal(size=components)
        return cls(rng.standard_normal((components, dim), np.float32) * axes, weights / weights.sum(), axes, spread)

    def draw(self, out: Vectors, rng: np.random.Generator) -> None:
        """Fill `out` with unit vectors."""
        for start in range(0, len(out), DRAWN_AT_ONCE):
            part = out[start : start + DRAWN_AT_ONCE]
            chosen = rng.choice(len(self.centres), len(part), p=self.weights)
            noise = rng.standard_normal(part.shape, np.float32) * self.axes
            drawn = self.centres[chosen] + np.float32(self.spread) * noise
            part[:] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def resident_gib(peak: bool = False) -> float:
    """Resident memory of this process in GiB, mapped files included."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**30


def queries_per_second(search: Search, queries: Vectors, batch: int) -> float:
    """Over at least `SIDE_S` seconds of batches, one after the other."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SIDE_S:
        start = done % (len(queries) - batch + 1)
        search(queries[start : start + batch])
        done += batch
    return done / (time.perf_counter() - began)


def recall(search: Search, queries: Vectors, exact: Rows) -> float:
    """Share of the exact rows that `search` finds."""
    found = search(queries)[1]
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def bare_search(directory: Path, vectors: Vectors, measured: dict[str, Any]) -> Search:
    """The same index and parameters through FAISS's own interface."""
    index = faiss.read_index(str(directory / INDEX_FILE))
    step = measured["plain"][0]
    library: Any = faiss
    if measured["kind"] == "hnsw":
        parameters = library.SearchParametersHNSW(efSearch=max(step["width"], K))
    else:
        parameters = library.SearchParametersIVF(nprobe=step["width"])
    if step["factor"] == 1:
        return lambda batch: index.search(batch, K, params=parameters)

    def search(batch: Vectors) -> tuple[Any, Rows]:
        rows = index.search(batch, K * step["factor"], params=parameters)[1]
        scores = np.einsum("qcd,qd->qc", vectors[np.maximum(rows, 0)], batch)
        best = np.argsort(-np.where(rows < 0, -np.inf, scores), axis=1, kind="stable")[:, :K]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)

    return search


def filtered_sides(
    index: VectorIndex, flat: Any, rows: int, rng: np.random.Generator
) -> dict[str, tuple[Search, Search]]:
    """For each share of rows kept: ours, and flat with a selector."""
    sides: dict[str, tuple[Search, Search]] = {}
    for share in (0.01, 0.001):
        allowed = np.sort(rng.choice(rows, max(K, round(rows * share)), replace=False)).astype(np.int64)
        parameters = faiss.SearchParameters()
        parameters.sel = faiss.IDSelectorBatch(allowed)

        def ours(batch: Vectors, allowed: Rows = allowed) -> tuple[Any, Rows]:
            return index.search(batch, K, allowed)

        def selected(batch: Vectors, parameters: Any = parameters) -> tuple[Any, Rows]:
            return flat.search(batch, K, params=parameters)

        sides[f"{share:.1%} kept"] = (ours, selected)
    return sides


def compare(sides: dict[str, Search], queries: Vectors, batch: int, rounds: int) -> dict[str, list[float]]:
    """Queries/s of each side, all sides in turn in every round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for search in sides.values():
        search(queries[:batch])
    for _ in range(rounds):
        for name, search in sides.items():
            rates[name].append(queries_per_second(search, queries, batch))
    return rates


def print_ratio(name: str, ours: list[float], theirs: list[float]) -> None:
    """Median queries/s of both and the ratios round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(
        f"  {name}: {statistics.median(ours):.1f} against {statistics.median(theirs):.1f} queries/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def measure(directory: Path, vectors: Vectors, queries: Vectors, measured: dict[str, Any], options: Any) -> None:
    """Recall and queries/s of all sides."""
    before = resident_gib()
    index = VectorIndex.open(directory, vectors, measured)
    print(f"opened: resident {before:.2f} → {resident_gib():.2f} GiB (the mapped vectors it has touched included)")
    flat = faiss.IndexFlatIP(options.dim)
    flat.add(vectors)
    filters = filtered_sides(index, flat, len(vectors), np.random.default_rng(options.seed + 2))
    exact = flat.search(queries, K)[1]
    print(f"recall@{K} of {index.kind}: {recall(lambda batch: index.search(batch, K), queries, exact):.4f}", flush=True)
    sides: dict[str, Search] = {
        "flat": lambda batch: flat.search(batch, K),
        "ours": lambda batch: index.search(batch, K),
    }
    if index.kind != "flat":
        sides["bare"] = bare_search(directory, vectors, measured)
    for name, (ours, selected) in filters.items():
        print(f"recall@{K} with {name}: {recall(ours, queries, selected(queries)[1]):.4f}", flush=True)
        sides |= {name: ours, f"flat, {name}": selected}
    for batch in (1, 64):
        rates = compare(sides, queries, batch, options.rounds)
        print(f"batch {batch} (load {describe_load()}):")
        print_ratio(f"{index.kind} against flat", rates["ours"], rates["flat"])
        for name in filters:
            print_ratio(f"{name}, against flat without a filter", rates[name], rates["flat"])
            print_ratio(f"{name}, against flat with IDSelectorBatch", rates[name], rates[f"flat, {name}"])
        if "bare" in rates:
            print_ratio("VectorIndex.search against bare FAISS", rates["ours"], rates["bare"])


def main() -> None:
    """Draws, builds, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--components", type=int, default=2000)
    parser.add_argument("--spread", type=float, default=0.7)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    print(describe_conditions(("faiss-cpu", "numpy"), options.seed))
    print(f"mixture: {options.components} components, spread {options.spread}, seed {options.seed}", flush=True)
    rng = np.random.default_rng(options.seed)
    mixture = Mixture.of(options.components, options.dim, options.spread, rng)
    with tempfile.TemporaryDirectory(prefix="vector-search-") as folder:
        file = Path(folder) / "vectors.npy"
        shape = (options.rows, options.dim)
        drawn = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        mixture.draw(drawn, rng)
        drawn.flush()
        del drawn
        queries = np.empty((options.queries, options.dim), dtype=np.float32)
        mixture.draw(queries, rng)
        vectors = np.load(file, mmap_mode="r")
        began = time.perf_counter()
        policy = VectorPolicy(options.kind, 0.95, K, 200, options.seed)
        measured = build_vector_index(vectors, policy, Path(folder))
        built = time.perf_counter() - began
        print(f"{options.rows} × {options.dim}: {measured['kind']} built and tuned in {built:.1f} s")
        print(f"peak {resident_gib(peak=True):.2f} GiB resident (mapped vectors included)\n{measured}", flush=True)
        measure(Path(folder), vectors, queries, measured, options)
    print(f"peak of the whole run: {resident_gib(peak=True):.2f} GiB, flat's own copy included")


if __name__ == "__main__":
    main()
