"""Which questions train, and which test: splits that questions bring, or that follow from the seed.

In: questions, the recipe's `questions` section. Out: the same questions, each with a split.
`test_new_documents` holds whole documents back; `test_new_questions` holds questions about documents that training
sees. Not covered: making questions, near-duplicate removal.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from cluster.errors import UserError
from retrieval.records import Question
from training.config import QuestionsConfig

TRAIN = "train"
NEW_QUESTIONS = "test_new_questions"
NEW_DOCUMENTS = "test_new_documents"
NEW_KINDS = "test_new_kinds"
SPLITS = (TRAIN, NEW_QUESTIONS, NEW_DOCUMENTS, NEW_KINDS)


def assign_splits(
    questions: Sequence[Question], tests: Sequence[Question] | None, config: QuestionsConfig, seed: int
) -> list[Question]:
    """Gives every question a split; a split that the file states is kept.

    With a test file, its questions test new documents where none of their documents is asked about in training,
    and new questions otherwise. Without one, documents are held out whole, drawn from the seed.

    Raises:
        UserError: An unknown split, a question in both files, a document that is to be both seen and new, or no
            question left to train on or to test with.
    """
    for question in (*questions, *(tests or ())):
        if question.split and question.split not in SPLITS:
            raise UserError(
                f"questions.path: question {question.question_id} has the split {question.split!r}; "
                f"use one of {', '.join(SPLITS)}, or leave it out"
            )
    if tests is not None:
        split = _with_test_file(questions, tests)
    elif all(question.split for question in questions):
        split = list(questions)
    else:
        split = _split_by_document(questions, config, seed)
    _refuse_leaks(split)
    present = {question.split for question in split}
    if TRAIN not in present:
        raise UserError("questions.path: no question is left to train on; lower questions.test_documents_fraction")
    if present == {TRAIN}:
        raise UserError("questions.path: no question is left to test with; raise questions.test_documents_fraction")
    return split


def _with_test_file(questions: Sequence[Question], tests: Sequence[Question]) -> list[Question]:
    both = {q.question_id for q in questions} & {q.question_id for q in tests}
    if both:
        raise UserError(f"questions.test_path: question {min(both)} stands in questions.path too; ids must differ")
    trained = [q if q.split else dataclasses.replace(q, split=TRAIN) for q in questions]
    seen = _documents(q for q in trained if q.split in (TRAIN, NEW_QUESTIONS))
    tested = []
    for question in tests:
        name = NEW_QUESTIONS if any(g.doc_id in seen for g in question.golden) else NEW_DOCUMENTS
        stated = question.split not in ("", TRAIN)
        tested.append(question if stated else dataclasses.replace(question, split=name))
    return trained + tested


def _documents(questions: Iterable[Question]) -> set[str]:
    return {golden.doc_id for question in questions for golden in question.golden}


def _refuse_leaks(questions: Sequence[Question]) -> None:
    """A document that training shows tests nothing new, whatever the file says."""
    held_out = held_out_documents(questions)
    for question in questions:
        leaked = [g.doc_id for g in question.golden if g.doc_id in held_out] if question.split == TRAIN else []
        if leaked:
            raise UserError(
                f"questions.path: question {question.question_id} trains on the document {leaked[0]}, which another "
                f"question holds back as new; give that one the split {NEW_QUESTIONS}, or leave both splits out"
            )


def _split_by_document(questions: Sequence[Question], config: QuestionsConfig, seed: int) -> list[Question]:
    documents = _documents(questions)
    if len(documents) < 2:
        raise UserError(f"questions.path: the questions name {len(documents)} golden documents; splitting needs two")
    held_out = held_out_documents(questions)
    stated = held_out | _documents(q for q in questions if q.split in (TRAIN, NEW_QUESTIONS))
    free = sorted(documents - stated)
    rng = random.Random(f"{seed}/documents")
    wanted = min(max(1, round(len(documents) * config.test_documents_fraction)), len(documents) - 1) - len(held_out)
    held_out |= set(rng.sample(free, min(max(0, wanted), len(free))))
    split = []
    for question in questions:
        places = {golden.doc_id for golden in question.golden}
        asked_of_seen = random.Random(f"{seed}/{question.question_id}").random() < config.test_questions_fraction
        if places and places <= held_out:
            name = NEW_DOCUMENTS
        else:  # a question about both a held-out document and another can neither train nor hold the other back
            name = NEW_QUESTIONS if places & held_out or asked_of_seen else TRAIN
        split.append(dataclasses.replace(question, split=question.split or name))
    return split


def held_out_documents(questions: Iterable[Question]) -> set[str]:
    """Documents that no training row may show: those of the new-document splits."""
    return _documents(question for question in questions if question.split in (NEW_DOCUMENTS, NEW_KINDS))


def spread(questions: Sequence[Question], rows: int, seed: int) -> list[Question]:
    """At most `rows` questions, evenly over kinds (`metadata.kind`) and, within a kind, over documents."""
    rng = random.Random(f"{seed}/spread")
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_kind[str(question.metadata.get("kind", ""))].append(question)
    queues = [_round_robin(_shuffled_groups(by_kind[kind], rng)) for kind in sorted(by_kind)]
    return _round_robin(queues)[:rows]


def _shuffled_groups(questions: Sequence[Question], rng: random.Random) -> list[list[Question]]:
    groups: dict[Hashable, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.golden[0].doc_id if question.golden else ""].append(question)
    keys = sorted(groups, key=str)
    rng.shuffle(keys)
    for key in keys:
        rng.shuffle(groups[key])
    return [groups[key] for key in keys]


def _round_robin(queues: Sequence[Sequence[Question]]) -> list[Question]:
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
