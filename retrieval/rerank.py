"""Reranking: a cross-encoder reads the query together with each of the best hits, and orders them anew.

In: a sentence-transformers CrossEncoder (`search.rerank`) and hits. Out: hits with its scores, best first.
Not covered: training one.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from retrieval.chunking import embedding_text
from retrieval.records import Hit

if TYPE_CHECKING:
    from pathlib import Path

KEY = "search.rerank"
BATCH_PAIRS = 32


class Reranker:
    """A loaded cross-encoder. Searches from several threads take turns."""

    def __init__(self, model: str, device: str | None = None) -> None:
        """Fetch `model` where it is remote, and load it.

        Raises:
            UserError: naming `search.rerank`, when it is no cross-encoder with one score.
        """
        from cluster.model_source import local_model_directory
        from retrieval.encoder import default_device

        self._model = _load(local_model_directory(model, None, key=KEY), model, device or default_device())
        self._lock = threading.Lock()

    def rerank(self, queries: Sequence[str], found: Sequence[Sequence[Hit]], k: int) -> list[list[Hit]]:
        """The k best of each query's hits by the cross-encoder's score; equal scores by chunk id."""
        pairs = [
            (query, embedding_text(hit.passage.title, hit.passage.heading, hit.passage.text))
            for query, hits in zip(queries, found, strict=True)
            for hit in hits
        ]
        if not pairs:
            return [[] for _ in found]
        with self._lock:
            scores = iter(self._model.predict(pairs, batch_size=BATCH_PAIRS, show_progress_bar=False).tolist())
        results = []
        for hits in found:
            scored = sorted(
                ((next(scores), hit) for hit in hits),
                key=lambda item: (-item[0], item[1].passage.chunk_id, item[1].collection),
            )
            results.append(
                [dataclasses.replace(hit, score=score, rank=rank) for rank, (score, hit) in enumerate(scored[:k], 1)]
            )
        return results


def _load(directory: Path, name: str, device: str) -> Any:
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(str(directory), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{KEY}: {name} is not a sentence-transformers cross-encoder ({type(error).__name__})"
        ) from error
    if model.num_labels != 1:
        raise UserError(f"{KEY}: {name} gives {model.num_labels} scores per pair, expected 1: name a reranker")
    return model
