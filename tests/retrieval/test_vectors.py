from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from cluster.errors import ArtifactError, UserError
from retrieval.vectors import VectorSearch, build_vectors

Vectors = npt.NDArray[np.float32]


def unit_vectors(rows: int, dimension: int = 16, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def in_batches(vectors: Vectors, size: int) -> Callable[[], Iterator[Vectors]]:
    return lambda: (vectors[start : start + size] for start in range(0, len(vectors), size))


def search_file(vectors: Vectors, kind: str, path: Path, seed: int = 5) -> VectorSearch:
    built = build_vectors(in_batches(vectors, 300), len(vectors), kind, seed, 50)
    faiss.write_index(built.index, str(path))
    return VectorSearch(path, len(vectors), vectors.shape[1])


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat"])
def test_build_vectors_every_kind_reports_the_recall_that_numpy_finds(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(2000)
    built = build_vectors(in_batches(vectors, 300), 2000, kind, 5, 50)
    queries = vectors[np.sort(np.random.default_rng(5).choice(2000, 50, replace=False))]
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    _, found = built.index.search(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert built.recall_at_10 == pytest.approx(recall, abs=1e-6)
    assert recall >= (1.0 if kind == "flat" else 0.95)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat"])
def test_build_vectors_same_seed_with_other_thread_counts_writes_the_same_bytes(kind: str) -> None:
    vectors = unit_vectors(1200)
    files = []
    threads = faiss.omp_get_max_threads()
    for count in (1, 4):
        faiss.omp_set_num_threads(count)
        built = build_vectors(in_batches(vectors, 100), 1200, kind, 5, 20)
        files.append(faiss.serialize_index(built.index).tobytes())
        assert faiss.omp_get_max_threads() == count
    faiss.omp_set_num_threads(threads)
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat"])
def test_build_vectors_fewer_rows_than_ten_still_finds_all(kind: str, tmp_path: Path) -> None:
    search = search_file(unit_vectors(3), kind, tmp_path / "index.faiss")
    _, rows = search.search(unit_vectors(3)[:1], 3)
    assert sorted(rows[0].tolist()) == [0, 1, 2]


def test_build_vectors_duplicate_rows_count_as_found(tmp_path: Path) -> None:
    vectors = np.repeat(unit_vectors(4), 25, axis=0)
    assert build_vectors(in_batches(vectors, 7), 100, "flat", 1, 100).recall_at_10 == 1.0


def test_vector_search_shape_other_than_the_manifest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.faiss"
    search_file(unit_vectors(30), "flat", file)
    with pytest.raises(ArtifactError, match="holds 30 vectors of 16 dimensions, the manifest says 31 of 16"):
        VectorSearch(file, 31, 16)


def test_vector_search_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.faiss"
    search_file(unit_vectors(30), "flat", file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"index\.faiss is not a FAISS index that can be read"):
        VectorSearch(file, 30, 16)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS has GPU support")
def test_vector_search_gpu_without_gpu_faiss_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "index.faiss"
    search_file(unit_vectors(30), "flat", file)
    with pytest.raises(UserError, match=r"^index\.gpu is true but the installed FAISS is the CPU one"):
        VectorSearch(file, 30, 16, gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu")
@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_vector_search_gpu_finds_what_cpu_finds(kind: str, tmp_path: Path) -> None:
    vectors = unit_vectors(2000)
    on_cpu = search_file(vectors, kind, tmp_path / "index.faiss")
    on_gpu = VectorSearch(tmp_path / "index.faiss", 2000, 16, gpu=True)
    scores, rows = on_cpu.search(vectors[:64], 10)
    gpu_scores, gpu_rows = on_gpu.search(vectors[:64], 10)
    np.testing.assert_allclose(gpu_scores, scores, atol=1e-4)
    assert np.mean(gpu_rows == rows) > 0.99
