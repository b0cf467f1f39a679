from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest

from cluster.errors import ArtifactError, UserError
from retrieval import vector_search
from retrieval.vector_search import VectorIndex
from tests.retrieval.vector_data import KINDS, Vectors, build, unit_vectors

ROWS = 2000
SELECTIVITIES = (1.0, 0.9, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001)


def brute_force(queries: Vectors, vectors: Vectors, k: int, allowed: np.ndarray) -> tuple[Vectors, np.ndarray]:
    scores = queries.astype(np.float64) @ vectors[allowed].astype(np.float64).T
    order = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), allowed[order]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selectivity", SELECTIVITIES)
def test_search_any_kind_and_filter_equals_brute_force(kind: str, selectivity: float, tmp_path: Path) -> None:
    vectors = unit_vectors(ROWS)
    measured = build(vectors, kind, tmp_path)
    index = VectorIndex.open(tmp_path, vectors, measured)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        allowed = np.sort(rng.choice(ROWS, max(1, round(selectivity * ROWS)), replace=False)).astype(np.int64)
        if seed % 2 and len(allowed) < ROWS:  # one tenant's neighbourhood, the hardest filter for lists and graphs
            near = np.argsort(-(vectors @ vectors[seed]))[: len(allowed)]
            allowed = np.sort(near).astype(np.int64)
        k, queries = int(rng.integers(1, 30)), unit_vectors(int(rng.integers(1, 70)), seed=100 + seed)
        scores, rows = index.search(queries, k, allowed)
        exact, _ = brute_force(queries, vectors, k, allowed)
        filled = min(k, len(allowed))
        assert rows.shape == scores.shape == (len(queries), k) and rows.dtype == np.int64
        assert (rows[:, filled:] == -1).all() and np.isneginf(scores[:, filled:]).all()
        rows, scores = rows[:, :filled], scores[:, :filled]
        assert np.isin(rows, allowed).all()
        np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[rows]), atol=1e-5)
        if len(allowed) < ROWS or kind == "flat":
            np.testing.assert_allclose(scores, exact, atol=1e-5)
        else:
            assert (scores >= exact[:, -1:] - 1e-5).mean() >= 0.85


@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("selectivity", SELECTIVITIES)
def test_search_selector_path_returns_allowed_rows_only_and_all_places(
    kind: str, selectivity: float, tmp_path: Path
) -> None:
    vectors = unit_vectors(ROWS)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, kind, tmp_path) | {"exhaustive_below": 0})
    for seed in range(4):
        rng = np.random.default_rng(seed)
        allowed = np.sort(rng.choice(ROWS, max(1, round(selectivity * ROWS)), replace=False)).astype(np.int64)
        queries = unit_vectors(17, seed=50 + seed)
        scores, rows = index.search(queries, 12, allowed)
        filled = min(12, len(allowed))
        assert np.isin(rows[:, :filled], allowed).all() and (rows[:, filled:] == -1).all()
        assert all(len(set(row)) == filled for row in rows[:, :filled].tolist())
        np.testing.assert_allclose(
            scores[:, :filled], np.einsum("qd,qkd->qk", queries, vectors[rows[:, :filled]]), atol=1e-5
        )
        assert (np.diff(scores[:, :filled], axis=1) <= 1e-6).all()


def test_search_empty_filter_finds_nothing(tmp_path: Path) -> None:
    vectors = unit_vectors(500)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, "ivf_flat", tmp_path) | {"exhaustive_below": 0})
    assert (index.search(vectors[:2], 3, np.zeros(0, dtype=np.int64))[1] == -1).all()


def test_search_row_that_faiss_should_not_have_returned_never_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit_vectors(500)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, "ivf_flat", tmp_path) | {"exhaustive_below": 0})
    honest = vector_search.search_faiss
    monkeypatch.setattr(vector_search, "search_faiss", lambda *rest: honest(*rest[:-1], None))
    allowed = np.arange(0, 500, 7)
    scores, rows = index.search(vectors[:20], 5, allowed)
    assert np.isin(rows, allowed).all()
    np.testing.assert_allclose(scores, brute_force(vectors[:20], vectors, 5, allowed)[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_search_batch_of_64_equals_64_lone_searches(kind: str, tmp_path: Path) -> None:
    vectors, queries = unit_vectors(2000, 48), unit_vectors(64, 48, seed=3)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, kind, tmp_path))
    for allowed in (None, np.arange(0, 2000, 3)):
        together, rows = index.search(queries, 10, allowed)
        alone = [index.search(query[None], 10, allowed) for query in queries]
        np.testing.assert_allclose(together, np.concatenate([scores for scores, _ in alone]), atol=1e-5)
        assert (rows == np.concatenate([found for _, found in alone])).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_search_from_several_threads_equals_one(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(2000)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, kind, tmp_path) | {"exhaustive_below": 0})
    jobs = [(unit_vectors(9, seed=n), 3 + 40 * (n % 2), np.arange(n % 5, 2000, 1 + n % 4)) for n in range(40)]
    expected = [index.search(*job)[1] for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = [result[1] for result in pool.map(lambda job: index.search(*job), jobs)]
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_search_queries_of_another_dimension_are_refused(tmp_path: Path) -> None:
    vectors = unit_vectors(30)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, "flat", tmp_path))
    with pytest.raises(ValueError, match=r"queries must be \(q, 16\), got \(3, 8\)"):
        index.search(unit_vectors(3, 8), 2)


@pytest.mark.parametrize(
    "change", [{"kind": "lsh"}, {"plain": []}, {"plain": [{"share": 1.0, "width": -1, "factor": 1}]}]
)
def test_open_parameters_that_no_build_wrote_are_refused(change: dict, tmp_path: Path) -> None:
    vectors = unit_vectors(300)
    measured = build(vectors, "ivf_flat", tmp_path) | change
    with pytest.raises(ArtifactError, match=r"index\.json does not say how to search its vectors: rebuild the index"):
        VectorIndex.open(tmp_path, vectors, measured)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_open_gpu_where_there_is_none_names_the_keys(kind: str, tmp_path: Path) -> None:
    if kind == "flat" and hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS has GPU support")
    vectors = unit_vectors(300)
    key = "set index.kind to flat" if kind == "hnsw" else "the CPU one: install rayft with"
    with pytest.raises(UserError, match=rf"^search\.gpu is true but .*{key}"):
        VectorIndex.open(tmp_path, vectors, build(vectors, kind, tmp_path), gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu")
@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_pq"])
def test_search_gpu_finds_what_cpu_finds(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(3000, 64)
    measured = build(vectors, kind, tmp_path)
    on_cpu, on_gpu = (VectorIndex.open(tmp_path, vectors, measured, gpu=gpu) for gpu in (False, True))
    for allowed in (None, np.arange(0, 3000, 5)):
        scores, rows = on_cpu.search(vectors[:64], 10, allowed)
        gpu_scores, gpu_rows = on_gpu.search(vectors[:64], 10, allowed)
        np.testing.assert_allclose(gpu_scores, scores, atol=1e-3)
        assert np.mean(gpu_rows == rows) > 0.97
