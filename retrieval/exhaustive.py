"""Exact search: every row, or every row of a set, without an index.

In: unit vectors (memory-mapped), queries. Out: the k best inner products and their rows. This is the oracle that
indexes are tuned against, what a `flat` index is, and how a narrow filter is answered.
Not covered: approximate indexes (`vector_search.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    Rows = npt.NDArray[np.int64]

GATHER_BYTES = 16 << 20
"""Of vectors copied at a time from the mapped file; bounds memory whatever the filter keeps."""


def search_all(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Rows]:
    """The k best rows of `vectors` (n, dim) for each of `queries` (q, dim): scores and rows, (q, k), best first.

    Where n < k, the last places hold the score -inf and the row -1.
    """
    import faiss

    if not len(vectors):
        return _nothing(len(queries), k)
    scores, rows = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    scores[rows < 0] = -float("inf")
    return scores, rows


def search_rows(queries: Vectors, vectors: Vectors, rows: Rows, k: int) -> tuple[Vectors, Rows]:
    """As `search_all`, over `rows` of `vectors` only (m,), sorted."""
    import numpy as np

    block = max(1, GATHER_BYTES // (4 * vectors.shape[1]))
    best = _nothing(len(queries), k)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        scores, places = search_all(queries, np.take(vectors, part, axis=0), k)
        found = np.where(places >= 0, part[places], -1)
        best = (scores, found) if start == 0 else _best_of(np.hstack([best[0], scores]), np.hstack([best[1], found]), k)
    return best


def rescore(queries: Vectors, vectors: Vectors, rows: Rows, k: int) -> tuple[Vectors, Rows]:
    """The k best of each query's candidates `rows` (q, c), -1 where none, by their exact inner products."""
    import numpy as np

    scores = np.empty(rows.shape, dtype=np.float32)
    most = max(1, GATHER_BYTES // (4 * vectors.shape[1]))
    width = max(1, min(most, rows.shape[1]))
    height = max(1, most // width)
    for top in range(0, rows.shape[0], height):
        for left in range(0, rows.shape[1], width):
            part = slice(top, top + height), slice(left, left + width)
            gathered = np.take(vectors, np.maximum(rows[part], 0), axis=0)  # (height, width, dim)
            scores[part] = np.matmul(gathered, queries[part[0], :, None])[:, :, 0]
    scores[rows < 0] = -np.inf
    return _best_of(scores, rows, k)


def drop_rows(scores: Vectors, rows: Rows, unwanted: Rows) -> tuple[Vectors, Rows]:
    """Leave `unwanted` (q,) out of each query's list, or its last place where it is not in it: (q, k - 1)."""
    import numpy as np

    keep = rows != unwanted[:, None]
    keep[keep.all(axis=1), -1] = False
    shape = (len(rows), rows.shape[1] - 1)
    return np.asarray(scores[keep].reshape(shape)), np.asarray(rows[keep].reshape(shape))


def _best_of(scores: Vectors, rows: Rows, k: int) -> tuple[Vectors, Rows]:
    import numpy as np

    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _nothing(queries: int, k: int) -> tuple[Vectors, Rows]:
    import numpy as np

    return np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64)
