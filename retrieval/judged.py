"""Questions that a search can be scored on.

In: a file of questions (golden documents or spans), or a folder with BEIR's `queries.jsonl` and `qrels/`. Out: those
of the wanted splits that name a golden place, the count of those that do not, and grades where judgements are graded.
Not covered: the file formats (`questions.py`), splitting questions (training).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from cluster.errors import UserError
from cluster.manifest import fingerprint
from retrieval.config import CorpusConfig, QuestionColumns
from retrieval.questions import QUESTION_COLUMNS, is_beir, read_beir_questions, read_questions
from retrieval.records import Question

TRAINED_ON = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Questions that can be scored, and what was left out."""

    questions: tuple[Question, ...]
    """Each with a golden place."""
    without_golden: int
    grades: Mapping[str, Mapping[str, int]] | None = None
    """Question to document to grade, for graded qrels; none: every golden place counts 1."""

    @functools.cached_property
    def digest(self) -> str:
        """Of everything that the scores depend on."""
        rows = [[question.to_row(), (self.grades or {}).get(question.question_id)] for question in self.questions]
        return fingerprint([rows, self.without_golden])


def choose_questions(
    questions: Sequence[Question],
    splits: Sequence[str] = (),
    grades: Mapping[str, Mapping[str, int]] | None = None,
    key: str = "questions.path",
) -> Judged:
    """The questions of `splits` that name a golden place.

    Without `splits`, those that training never sees: where questions are split, `train` and `valid` are left out.

    Raises:
        UserError: naming `key` or `--split`, when there is no such split, or no question with a golden place.
    """
    known = list(dict.fromkeys(question.split for question in questions))
    unknown = [split for split in splits if split not in known]
    if unknown:
        named = ", ".join(filter(None, known)) or "none: its questions have no split"
        raise UserError(f"--split: {key} has no split {unknown[0]!r}; it has {named}")
    wanted = set(splits) or set(known) - set(TRAINED_ON) or set(known)
    asked = [question for question in questions if question.split in wanted]
    golden = tuple(question for question in asked if _has_golden(question, grades))
    if not golden:
        raise UserError(
            f"{key}: none of {len(asked)} questions names a golden document: add `golden` to them, or give a folder "
            "with BEIR's queries.jsonl and qrels/"
        )
    return Judged(golden, len(asked) - len(golden), grades)


def _has_golden(question: Question, grades: Mapping[str, Mapping[str, int]] | None) -> bool:
    graded = (grades or {}).get(question.question_id, {})
    return any(graded.get(place.doc_id, 1) > 0 for place in question.golden)


def read_judged(
    path: str,
    splits: Sequence[str],
    key: str,
    columns: QuestionColumns = QUESTION_COLUMNS,
    corpora: Sequence[CorpusConfig] = (),
) -> Judged:
    """The questions of a file, or of a BEIR folder (or its `queries.jsonl`) with qrels.

    Args:
        path: The file or folder; see `read_questions` for its formats.
        splits: Of a file; for BEIR the name of one qrels file, `test` unless given.
        key: What `path` came from, to name in errors.
        columns: Of row formats.
        corpora: Where SQuAD's paragraphs are looked for.

    Raises:
        UserError: naming `key` or `--split`.
    """
    if not path or not is_beir(path):
        return choose_questions(read_questions(path, key, columns, corpora), splits, key=key)
    if len(splits) > 1:
        raise UserError(f"--split: {key} is a BEIR data set: name one qrels file, got {', '.join(splits)}")
    questions, qrels = read_beir_questions(path, splits[0] if splits else "test", key, columns)
    return choose_questions(questions, grades=qrels, key=key)
