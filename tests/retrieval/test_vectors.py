import pickle
from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval import vectors as vectors_module
from retrieval.config import IndexConfig
from retrieval.vector_search import VectorIndex
from retrieval.vectors import FLAT_ROWS, IVF_FLAT_ROWS, VectorPolicy, choose_kind
from tests.retrieval.vector_data import KINDS, build, unit_vectors


def test_vector_policy_takes_the_recipes_section_and_travels_to_workers() -> None:
    policy = VectorPolicy.of(IndexConfig(kind="hnsw", recall_target=0.9, recall_at=5, recall_sample=7), 3)
    assert policy == VectorPolicy("hnsw", 0.9, 5, 7, 3)
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_choose_kind_auto_goes_by_rows_and_a_named_kind_stays() -> None:
    by_rows = [choose_kind("auto", rows) for rows in (FLAT_ROWS, FLAT_ROWS + 1, IVF_FLAT_ROWS, IVF_FLAT_ROWS + 1)]
    assert by_rows == ["flat", "ivf_flat", "ivf_flat", "ivf_pq"]
    assert [choose_kind(kind, 256) for kind in KINDS] == list(KINDS)
    assert {choose_kind(kind, 255) for kind in KINDS} == {"flat"}


@pytest.mark.parametrize("kind", KINDS)
def test_build_vector_index_reports_the_recall_that_numpy_finds(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(2000)
    measured = build(vectors, kind, tmp_path)
    index = VectorIndex.open(tmp_path, vectors, measured)
    own = np.sort(np.random.default_rng(6).choice(2000, 100, replace=False))
    similar = vectors[own] @ vectors.T
    similar[np.arange(100), own] = -2
    exact = np.argsort(-similar, axis=1)[:, :10]
    found = [
        [row for row in rows if row != me][:10] for me, rows in zip(own, index.search(vectors[own], 11)[1], strict=True)
    ]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found, strict=True)])
    assert measured["reached"] and recall >= 0.95
    assert measured["recall"] == pytest.approx(recall, abs=0.005)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_build_vector_index_width_is_the_least_that_reaches_the_target(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(2000)
    easy, hard = (build(vectors, kind, tmp_path / str(target), target=target) for target in (0.5, 0.99))
    assert easy["recall"] < hard["recall"] and easy["nprobe"] < hard["nprobe"]
    assert easy["recall"] >= 0.5


def test_build_vector_index_target_out_of_reach_is_said(tmp_path: Path) -> None:
    vectors = unit_vectors(600, 64)
    measured = build(vectors, "ivf_pq", tmp_path, target=1.0)
    assert measured["recall"] < 1.0 and measured["reached"] is False


@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "ivf_pq"])
def test_build_vector_index_same_seed_with_other_thread_counts_writes_the_same_bytes(kind: str, tmp_path: Path) -> None:
    threads = faiss.omp_get_max_threads()
    for count in (1, 4):
        faiss.omp_set_num_threads(count)
        build(unit_vectors(1200), kind, tmp_path / str(count))
        assert faiss.omp_get_max_threads() == count
    faiss.omp_set_num_threads(threads)
    assert (tmp_path / "1/index.faiss").read_bytes() == (tmp_path / "4/index.faiss").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_build_vector_index_fewer_rows_than_ten_still_finds_all(kind: str, rows: int, tmp_path: Path) -> None:
    vectors = unit_vectors(rows)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, kind, tmp_path))
    scores, found = index.search(vectors[:1], 5)
    assert sorted(found[0].tolist()) == [-1] * (5 - rows) + list(range(rows))
    assert np.isneginf(scores[0, rows:]).all()


def test_build_vector_index_no_rows_finds_nothing(tmp_path: Path) -> None:
    vectors = np.zeros((0, 16), dtype=np.float32)
    index = VectorIndex.open(tmp_path, vectors, build(vectors, "auto", tmp_path))
    assert index.search(unit_vectors(2), 3)[1].tolist() == [[-1] * 3] * 2


def test_build_vector_index_duplicate_rows_count_as_found(tmp_path: Path) -> None:
    assert build(np.repeat(unit_vectors(8), 250, axis=0), "ivf_flat", tmp_path)["recall"] == 1.0


def test_build_vector_index_filters_that_miss_the_target_become_exhaustive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "EXHAUSTIVE_ROWS", 100)
    vectors = unit_vectors(8000)
    measured = build(vectors, "ivf_flat", tmp_path)
    shares = [step["share"] for step in measured["plain"]]
    assert len(shares) > 2 and shares == sorted(shares, reverse=True)
    assert measured["exhaustive_below"] == max(100, round(shares[-1] * 8000))
    allowed = np.sort(np.random.default_rng(1).choice(8000, measured["exhaustive_below"] + 50, replace=False))
    queries = unit_vectors(200, seed=9)
    exact = np.sort(queries @ vectors[allowed].T, axis=1)[:, :-11:-1]
    scores, _ = VectorIndex.open(tmp_path, vectors, measured).search(queries, 10, allowed)
    assert (scores >= exact[:, -1:] - 1e-5).mean() >= 0.93
