"""Vectors and indexes for the tests of vector search."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.vectors import VectorPolicy, build_vector_index

Vectors = npt.NDArray[np.float32]
KINDS = ("flat", "hnsw", "ivf_flat", "ivf_pq")


def unit_vectors(rows: int, dimension: int = 16, seed: int = 0) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(vectors: Vectors, kind: str, directory: Path, seed: int = 5, target: float = 0.95) -> dict[str, Any]:
    """What `build_vector_index` returns, as it comes back from `index.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    measured = build_vector_index(vectors, VectorPolicy(kind, target, 10, 100, seed), directory)
    read: dict[str, Any] = json.loads(json.dumps(measured))
    return read
