import tracemalloc

import numpy as np

from retrieval import exhaustive
from retrieval.exhaustive import rescore
from tests.retrieval.vector_data import unit_vectors


def test_rescore_of_many_candidates_is_exact_in_bounded_memory(monkeypatch) -> None:
    monkeypatch.setattr(exhaustive, "GATHER_BYTES", 64 * 1024)
    vectors = unit_vectors(500, 64)
    queries, rng = unit_vectors(9, 64, seed=3), np.random.default_rng(1)
    for candidates in (3, 40, 6000):  # several queries at a time, one, and one in several parts
        rows = rng.integers(-1, 500, size=(9, candidates)).astype(np.int64)
        tracemalloc.start()
        scores, found = rescore(queries, vectors, rows, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        exact = np.where(rows >= 0, np.take_along_axis(queries @ vectors.T, np.maximum(rows, 0), axis=1), -np.inf)
        np.testing.assert_allclose(scores, np.sort(exact, axis=1)[:, ::-1][:, :3], atol=1e-6)
        assert np.isin(found, rows).all()
        assert peak < 8 * exhaustive.GATHER_BYTES + 10 * rows.nbytes
