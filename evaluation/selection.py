"""Which questions an evaluation asks.

In: all questions of a split. Out: a seeded selection spread evenly over kinds of question (`metadata.kind`), the same
for any order of the input. Not covered: splitting (training/splits.py).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest

from cluster.errors import UserError
from retrieval.records import Question


def kind_of(question: Question) -> str:
    """The kind of question, or an empty string."""
    return str(question.metadata.get("kind", ""))


def select_questions(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` questions, kinds in turn, in an order that only the seed and the ids decide."""
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: _draw(seed, question.question_id)):
        by_kind[kind_of(question)].append(question)
    kinds = sorted(by_kind, key=lambda kind: _draw(seed, kind))
    turns = chain.from_iterable(zip_longest(*(by_kind[kind] for kind in kinds)))
    return [question for question in turns if question is not None][:count]


def _draw(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()


def questions_digest(questions: Sequence[Question]) -> str:
    """sha256 over everything in the questions, in their order."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(question.to_row(), ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()


def require_distinct(questions: Sequence[Question]) -> None:
    """Refuses questions that share an id, and an empty list.

    Raises:
        UserError: There is no question, or an id occurs twice.
    """
    if not questions:
        raise UserError("questions: there is none to answer; check the questions file and its splits")
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(f"questions: the id {question.question_id!r} occurs twice; ids must be unique")
        seen.add(question.question_id)
