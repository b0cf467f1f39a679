"""Retrieval metrics. In: questions with golden places, and the hits found for each. Out: plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import UserError
from retrieval.records import Hit, Question


def recall_at_k(questions: Sequence[Question], hits: Sequence[Sequence[Hit]], k: int) -> float:
    """Mean over questions of the share of golden places that the first k hits hold (`Golden.matches`).

    Questions without golden places are left out.

    Raises:
        UserError: no question has a golden place.
    """
    recalls = [
        sum(any(golden.matches(hit.passage) for hit in found[:k]) for golden in question.golden) / len(question.golden)
        for question, found in zip(questions, hits, strict=True)
        if question.golden
    ]
    if not recalls:
        raise UserError("questions.path: no question names a golden document, so recall cannot be measured")
    return sum(recalls) / len(recalls)
