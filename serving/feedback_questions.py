"""Reviewed feedback becomes training questions, and never a question that tests.

In: reviewed entries, the recipe's questions and the promoted release. Out: `Question` records for
`questions.train_path`: `answers` from the reviewer, the user or the answer that was accepted; `golden` from documents
that a verified quote of the answer stands in, or that the reviewer named; where it comes from in `metadata`, without
the user. Left out, with the reason: what asks for a held-out document, what repeats a test question of the recipe or
of the promoted release, what repeats or contradicts newer feedback.
Not covered: writing samples from them (training/samples.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from retrieval.records import UNANSWERABLE, Golden, Question
from serving.feedback_store import Entry, Review
from training.config import TrainingRecipe
from training.duplicates import DUPLICATE, content_words
from training.passage_match import mentions
from training.splits import TRAIN, join_training, prepare_questions

if TYPE_CHECKING:
    from cluster.store import Store

ID_PREFIX = "feedback-"
KIND = "feedback"
"""`metadata.kind`, so that samples take their share of feedback whatever the number of other questions."""
TRAINS = (Review.ACCEPTED, Review.CORRECTED)

SHORTENED = "was cut when it was stored"
EMPTY = "has no answer"
CONTRADICTED = "a newer one gives another answer"
REPEATED = "repeats newer feedback"


@dataclass(frozen=True)
class Exported:
    """Questions from feedback."""

    questions: list[Question]
    left_out: list[tuple[str, str]]
    """Request id and reason of each entry that gives none."""
    repeats: int
    """How many of `questions` nearly repeat a training question that the recipe has (`metadata.near_duplicate`)."""

    @property
    def without_golden(self) -> int:
        """How many name no document: they train no RAFT row until a reviewer does."""
        return sum(not question.golden and not question.unanswerable for question in self.questions)

    def reasons(self) -> Counter[str]:
        """How many entries were left out, by reason."""
        return Counter(reason for _, reason in self.left_out)


def export_questions(entries: Iterable[Entry], known: Sequence[Question], near_duplicate: float) -> Exported:
    """The questions that reviewed entries give.

    Args:
        entries: Of any state; others than accepted and corrected ones are passed over.
        known: The recipe's questions and all held-out ones, with their splits.
        near_duplicate: As `questions.near_duplicate`.
    """
    reviewed = [entry for entry in entries if entry.review in TRAINS]
    newest_first = sorted(
        reviewed, key=lambda entry: (entry.interaction.at, entry.interaction.request_id), reverse=True
    )
    left_out: list[tuple[str, str]] = []
    questions: list[Question] = []
    answered: dict[frozenset[str], frozenset[str]] = {}
    for entry in newest_first:
        request_id, question = entry.interaction.request_id, question_of(entry)
        if isinstance(question, str):
            left_out.append((request_id, question))
            continue
        asked, answer = _words(question.text), _words(" ".join(question.answers))
        if asked in answered:
            left_out.append((request_id, REPEATED if answered[asked] == answer else CONTRADICTED))
            continue
        answered[asked] = answer
        questions.append(question)
    joined = join_training(known, questions, near_duplicate)
    dropped = {question.question_id: reason for question, reason in joined.dropped}
    repeated = {name for name, reason in dropped.items() if reason == DUPLICATE}
    left_out += [(_request_id(name), reason) for name, reason in dropped.items() if name not in repeated]
    kept = [
        _marked(q, q.question_id in repeated) for q in questions if dropped.get(q.question_id, DUPLICATE) == DUPLICATE
    ]
    return Exported(kept[::-1], left_out, len(repeated))


def question_of(entry: Entry) -> Question | str:
    """The question that an entry gives, or the reason for none."""
    given = entry.interaction
    answer = entry.answer.strip()
    if entry.shortened:
        return SHORTENED
    # What the model left unanswered, and was right to: teaches to abstain.
    unanswerable = given.abstained and entry.review == Review.ACCEPTED and answer == given.answer.strip()
    if not answer and not unanswerable:
        return EMPTY
    quote = next((quote for quote in given.quotes if mentions(answer, quote)), "")
    metadata = {
        "kind": UNANSWERABLE if unanswerable else KIND,
        "source": "feedback",
        "request_id": given.request_id,
        "asked": datetime.datetime.fromtimestamp(given.at, datetime.UTC).date().isoformat(),
        "release": given.release,
        "strategy": given.strategy,
        "review": str(entry.review),
        **({"intent": given.intent} if given.intent else {}),
        **({"satisfied": entry.rating.satisfied} if entry.rating else {}),
        **({"quote": quote} if quote and not unanswerable else {}),
    }
    golden = () if unanswerable else tuple(Golden(doc_id) for doc_id in _documents(entry, quote))
    name = f"{ID_PREFIX}{given.request_id}"
    return Question(name, given.question.strip(), () if unanswerable else (answer,), golden, TRAIN, metadata)


def _documents(entry: Entry, quote: str) -> tuple[str, ...]:
    """Those that a reviewer named; else those that were quoted, if a quote holds the answer: the documents behind a
    wrong answer need not hold the right one."""
    return tuple(dict.fromkeys(entry.doc_ids)) if entry.named or quote else ()


def _words(text: str) -> frozenset[str]:
    return frozenset(content_words(text, ()))


def _request_id(question_id: str) -> str:
    return question_id.removeprefix(ID_PREFIX)


def _marked(question: Question, repeats: bool) -> Question:
    if not repeats:
        return question
    return dataclasses.replace(question, metadata={**question.metadata, "near_duplicate": True})


def known_questions(recipe: TrainingRecipe, store: Store) -> list[Question]:
    """The recipe's questions with their splits, without those of `questions.train_path`, and the test questions of the
    promoted release, which may have been made from other files."""
    from cluster.releases import KIND as RELEASE
    from cluster.releases import read_release
    from training.samples import load_questions

    known: list[Question] = []
    if recipe.questions.path:
        own = recipe.questions.model_copy(update={"train_path": ""})
        known = prepare_questions(recipe.model_copy(update={"questions": own})).questions
    if store.current(RELEASE, recipe.name) is None:
        return known
    samples = read_release(store, recipe.name).samples
    if samples is None or not store.exists(samples):
        return known
    tests = [question for question in load_questions(store.open_ref(samples)) if question.split != TRAIN]
    places = {question.question_id: place for place, question in enumerate(known)}
    for test in tests:
        if test.question_id in places:  # the release held it out, whatever the files say now
            known[places[test.question_id]] = test
        else:
            known.append(test)
    return known


def write_export(path: Path, questions: Sequence[Question]) -> None:
    """Writes a questions file whole or not at all, in place of an earlier export.

    Raises:
        UserError: It holds other questions than feedback's, or cannot be written.
    """
    from retrieval.questions import read_questions, write_questions

    if path.exists():
        others = [q for q in read_questions(path, "--out") if not q.question_id.startswith(ID_PREFIX)]
        if others:
            raise UserError(f"--out: {path} holds questions that are not from feedback; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None
    try:
        write_questions(name, questions)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
