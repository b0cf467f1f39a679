"""Which questions train, which validate, and in what order: before any row is made.

In: questions with their splits, the recipe's `samples` section. Out: the questions of RAFT rows, of closed-book rows,
and of the rows that validate either; a question that validates trains neither. Plain Python; the same questions and
seed give the same choice. Not covered: splits (training/splits.py), the rows (training/raft_rows.py).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from retrieval.records import Golden, Question
from training.config import SamplesConfig
from training.records import RaftSample
from training.splits import NEW_QUESTIONS, TRAIN, spread

Fact = tuple[tuple[Golden, ...], tuple[str, ...]]
ClosedBook = Callable[[Question], RaftSample | str]

VALIDATION_SHARE = 5
"""At most one question in this many validates where all others are needed to train."""


@dataclass(frozen=True)
class Chosen:
    """Questions by what their rows are for, each list in the order of its rows."""

    raft: list[Question]
    dsf: list[Question]
    validation_raft: list[Question]
    validation_dsf: list[Question]
    drops: collections.Counter[str]
    """Training questions that can give no row, by reason."""
    candidates: int
    """Training questions that can give a row."""


def choose_questions(
    questions: Sequence[Question], config: SamplesConfig, seed: int, closed_book: ClosedBook
) -> Chosen:
    """Chooses among the training questions, evenly over kinds and documents.

    Validation takes questions that neither objective trains on anyway; where too few of those are left, up to a fifth
    of all. Closed-book rows validate with questions about facts that are trained in other words, where there are any:
    of a fact that it was never told, a closed-book model can only learn to guess.

    Args:
        questions: All, with their splits.
        config: How many rows of each kind.
        seed: The recipe's.
        closed_book: Makes a question's closed-book row, or says why there is none (`RowMaker.dsf`).
    """
    able, teaches, drops = _sort_out([q for q in questions if q.split == TRAIN], closed_book)
    candidates = spread(able, len(able), seed)
    spare = max(0, len(candidates) - _needed(candidates, teaches, config))
    wanted = min(config.validation_rows, max(spare, len(candidates) // VALIDATION_SHARE))
    kept_back = max(spare, wanted) if wanted else 0
    cut = len(candidates) - kept_back
    trained, pool = candidates[:cut], candidates[cut:]
    dsf = [q for q in trained if q.question_id in teaches][: config.dsf_rows]
    told = {fact_of(question) for question in dsf}
    closed = [q for q in pool if q.question_id in teaches]
    return Chosen(
        raft=trained[: config.raft_rows],
        dsf=dsf,
        validation_raft=spread(pool, wanted, seed),
        validation_dsf=spread([q for q in closed if fact_of(q) in told] or closed, wanted, seed),
        drops=drops,
        candidates=len(candidates),
    )


def _needed(candidates: Sequence[Question], teaches: Collection[str], config: SamplesConfig) -> int:
    """How many of the first candidates give all rows: unanswerable ones give no closed-book row."""
    taught = [number for number, question in enumerate(candidates, start=1) if question.question_id in teaches]
    for_dsf = taught[config.dsf_rows - 1] if len(taught) >= config.dsf_rows else len(candidates)
    return max(config.raft_rows, for_dsf)


def _sort_out(
    questions: Sequence[Question], closed_book: ClosedBook
) -> tuple[list[Question], set[str], collections.Counter[str]]:
    """Questions that can give a row, the ids of those that can give a closed-book row, and why others give none."""
    able: list[Question] = []
    teaches: set[str] = set()
    drops: collections.Counter[str] = collections.Counter()
    for question in questions:
        made = closed_book(question)
        if question.unanswerable:
            able.append(question)
        elif isinstance(made, str):
            drops[made] += 1
        elif not question.golden:
            drops["no golden place"] += 1
        else:
            able.append(question)
            teaches.add(question.question_id)
    return able, teaches, drops


def fact_of(question: Question) -> Fact:
    """What a question asks for, whatever its words: the same places with the same answers."""
    return question.golden, question.answers


def keep_questions_about_seen_facts(questions: Sequence[Question], asked: Sequence[Question]) -> list[Question]:
    """Leaves out new questions about facts that no closed-book row teaches, where new questions are rewordings: where
    at least half of them ask for what a training question asks for in other words.

    A closed-book model cannot answer what it was never told: asking it would measure the size of the training set.
    Where few are rewordings (3 of 98 in xquad-en) leaving out the others would leave no test. Questions without an
    answer stay: any model can abstain from them.
    """
    new = [q for q in questions if q.split == NEW_QUESTIONS and not q.unanswerable]
    trained = {fact_of(q) for q in questions if q.split == TRAIN}
    seen = {fact_of(question) for question in asked}
    about_seen = {q.question_id for q in new if fact_of(q) in seen}
    if not about_seen or 2 * sum(fact_of(q) in trained for q in new) < len(new):
        return list(questions)
    return [q for q in questions if q.split != NEW_QUESTIONS or q.unanswerable or q.question_id in about_seen]
