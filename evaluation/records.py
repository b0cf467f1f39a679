"""What evaluation writes down per question. Imports no torch, ray or faiss.

In: a question and the answer that a strategy gave. Out: one flat row: the columns of `serving.records.Answer`, and
beside them the question with its accepted answers, so that a predictions file can be scored on its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrieval.records import Golden, Question
from serving.records import Answer

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Prediction:
    """A question and its answer."""

    question: Question
    answer: Answer

    def to_row(self) -> dict[str, Any]:
        """One flat row: `Answer`'s columns and `question`, `expected`, `golden`, `split`, `question_metadata`."""
        return {
            **self.answer.to_row(),
            "question_id": self.question.question_id,
            "question": self.question.text,
            "expected": list(self.question.answers),
            "golden": [golden.to_row() for golden in self.question.golden],
            "split": self.question.split,
            "question_metadata": json.dumps(self.question.metadata, ensure_ascii=False, sort_keys=True),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_row`."""
        question = Question(
            question_id=row["question_id"],
            text=row["question"],
            answers=tuple(row["expected"]),
            golden=tuple(Golden.from_row(golden) for golden in row["golden"]),
            split=row["split"],
            metadata=json.loads(row["question_metadata"]),
        )
        return cls(question, Answer.from_row(row))

    @classmethod
    def schema(cls) -> pa.Schema:
        """The Arrow schema of `to_row`."""
        import pyarrow as pa

        extra = [
            ("question", pa.string()),
            ("expected", pa.list_(pa.string())),
            ("golden", pa.list_(pa.struct(list(Golden.schema())))),
            ("split", pa.string()),
            ("question_metadata", pa.string()),
        ]
        return pa.schema([*Answer.schema(), *(pa.field(name, kind) for name, kind in extra)])
