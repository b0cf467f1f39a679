"""What an encoder is worth on held-out questions: a pool of passages, and the rankings in it.

In: the index's chunks, the questions to measure on and what the index finds for them. Out: a `Pool` to search in, hits
from vectors, and measures per question (retrieval/metrics.py).
A pool is the whole index up to a given number of passages. Beyond it, it holds every golden passage, what the index
finds for the questions, and passages drawn by a hash of their ids: the hardest ones are in it, so that a ranking in the
pool differs little from one in the whole index, and both sides are ranked in the same pool.
Not covered: embedding (training/retriever_step.py), whether a gain is enough (training/retriever.py).
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrieval.chunking import embedding_text
from retrieval.metrics import measure, rank_items
from retrieval.records import Chunk, Golden, Hit, Passage, Question

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from retrieval.metrics import Values

    Vectors = npt.NDArray[np.float32]

KS = (1, 5)
DEPTH = 50  # passages ranked per question: nDCG@10 over documents needs more than ten passages
SHOWN = ("recall@1", "recall@5", "nDCG@10", "MRR@10")
DECIDES = "nDCG@10"
QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Pool:
    """Passages to search in, in the index's order."""

    passages: tuple[Passage, ...]
    indexed: int
    """Passages of the whole index."""

    def texts(self) -> list[str]:
        """What the encoder reads."""
        return [embedding_text(passage.title, passage.heading, passage.text) for passage in self.passages]

    def places(self, chunk_ids: frozenset[str]) -> list[int]:
        """Places of those passages in the pool."""
        return [place for place, passage in enumerate(self.passages) if passage.chunk_id in chunk_ids]


def choose_pool(
    chunks: Iterable[Chunk], questions: Sequence[Question], found: Collection[str], limit: int, seed: int
) -> Pool:
    """The passages to search for `questions`; see the module's text.

    Args:
        chunks: Of the index, in order; read once.
        questions: With golden places.
        found: Chunk ids of what the index finds for them.
        limit: Most passages, though golden passages and those found always belong; 0: all.
        seed: Of the draw.
    """
    places: dict[str, list[Golden]] = defaultdict(list)
    for question in questions:
        for golden in question.golden:
            places[golden.doc_id].append(golden)
    kept: list[tuple[int, Passage]] = []
    others: list[tuple[int, int, Passage]] = []  # a heap of the lowest hashes: (-hash, place in the index, passage)
    place = -1
    for place, chunk in enumerate(chunks):
        passage = Passage.of(chunk)
        if not limit or chunk.chunk_id in found or any(golden.matches(chunk) for golden in places[chunk.doc_id]):
            kept.append((place, passage))
        elif len(others) < limit:
            heapq.heappush(others, (-_hash(seed, chunk.chunk_id), place, passage))
        else:
            heapq.heappushpop(others, (-_hash(seed, chunk.chunk_id), place, passage))
    drawn = heapq.nlargest(max(0, limit - len(kept)), others)
    chosen = sorted([*kept, *((place, passage) for _, place, passage in drawn)], key=lambda pair: pair[0])
    return Pool(tuple(passage for _, passage in chosen), place + 1)


def _hash(seed: int, chunk_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{chunk_id}".encode(), digest_size=8).digest(), "big")


def rank(queries: Vectors, passages: Sequence[Passage], vectors: Vectors) -> Iterator[list[Hit]]:
    """The best `DEPTH` passages of each query by inner product; equal scores by chunk id.

    Args:
        queries: (n_queries, dim) float32 unit vectors.
        passages: What is searched.
        vectors: (n_passages, dim) float32 unit vectors, a row per passage.
    """
    import numpy as np

    ids = np.array([passage.chunk_id for passage in passages])
    depth = min(DEPTH, len(passages))
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        for scores in queries[start : start + QUERIES_AT_ONCE] @ vectors.T:
            kth = np.partition(scores, len(scores) - depth)[len(scores) - depth]
            near = np.flatnonzero(scores >= kth)
            order = near[np.lexsort((ids[near], -scores[near]))][:depth]
            yield [Hit(passages[at], float(scores[at]), place) for place, at in enumerate(order, start=1)]


def score(questions: Sequence[Question], hits: Iterable[Sequence[Hit]]) -> Mapping[str, Values]:
    """Measures of each question by name, (n_questions,) float64: recall, MRR, nDCG and more."""
    rankings = [rank_items(question, {"": found})[""] for question, found in zip(questions, hits, strict=True)]
    return measure(rankings, KS, DEPTH)
