"""The RAFT sample: one training row. Imports no torch, ray or faiss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.records import Record
from retrieval.records import Passage

Objective = Literal["raft", "dsf"]
"""What a row teaches: to answer from the passages shown, or closed book."""


@dataclass(frozen=True)
class RaftSample(Record):
    """A question, the passages shown with it, and the target that the model learns to write.

    `golden[i]` says whether `passages[i]` is golden. A row without the golden document carries no quote.
    `objective` is `raft` (passages shown) or `dsf` (closed book, no passages).
    """

    sample_id: str
    question_id: str
    objective: str
    question: str
    passages: tuple[Passage, ...]
    golden: tuple[bool, ...]
    golden_present: bool
    reasoning: str
    quotes: tuple[str, ...]
    answer: str
    target: str
    split: str
