"""Which questions train, and which test: splits that questions bring, or that follow from the seed.

In: the recipe's `questions` section. Out: questions, each with a split, without near-duplicates, and none that trains
on what a test asks. `test_new_documents` holds whole documents back; `test_new_questions` holds questions about
documents that training sees. Questions that the documents do not answer are split like all others: an abstention is
learnt, and tested. Not covered: making questions, reading their files (retrieval/questions.py).
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import UserError
from cluster.progress import say
from retrieval.questions import read_questions
from retrieval.records import Question
from training.config import QuestionsConfig, TrainingRecipe
from training.duplicates import LEAK, Sifted, content_words, drop_leaks, drop_repeats

TRAIN = "train"
NEW_QUESTIONS = "test_new_questions"
NEW_DOCUMENTS = "test_new_documents"
NEW_KINDS = "test_new_kinds"
SPLITS = (TRAIN, NEW_QUESTIONS, NEW_DOCUMENTS, NEW_KINDS)
TEST = "test"
"""What a file may call its tests: new documents where training asks about none of theirs, otherwise new questions."""
HELD_OUT = "about a document that is held out"


@dataclass(frozen=True)
class Prepared:
    """The questions of a recipe, ready to train on and to test with."""

    questions: list[Question]
    """Each with one of `SPLITS`, in the order of the files."""
    drops: collections.Counter[str]
    """How many were left out, by reason (those of training/duplicates.py)."""


def prepare_questions(recipe: TrainingRecipe) -> Prepared:
    """Reads the recipe's questions, leaves out near-duplicates and leaks, and splits what is left.

    Raises:
        UserError: naming the recipe key, for files that cannot be read, or questions that cannot be split.
    """
    config = recipe.questions
    how = (config.columns, recipe.corpora())
    asked = read_questions(config.path, "questions.path", *how)
    tests = read_questions(config.test_path, "questions.test_path", *how) if config.test_path else None
    more = read_questions(config.train_path, "questions.train_path", *how) if config.train_path else []
    _refuse_bad_splits(asked, tests)
    more = _only_training(more, {question.question_id for question in (*asked, *(tests or ()))})
    named = {question.question_id for question in asked if question.split not in ("", TRAIN)}
    named |= {question.question_id for question in tests or ()}
    sifted = drop_repeats([*asked, *(tests or ())], named, config.near_duplicate)
    kept = {question.question_id for question in sifted.kept}
    split = assign_splits(
        [question for question in asked if question.question_id in kept],
        None if tests is None else [question for question in tests if question.question_id in kept],
        config,
        recipe.seed,
    )
    drawn = {question.question_id for question in split if question.split != TRAIN} - named
    left = drop_leaks(split, drawn | named) if drawn else Sifted(split, [])
    joined = join_training(left.kept, more, config.near_duplicate)
    drops = collections.Counter(reason for _, reason in (*sifted.dropped, *left.dropped, *joined.dropped))
    if drops:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))
        say(f"questions: left out {sum(drops.values())} of {len(asked) + len(tests or ()) + len(more)}: {reasons}")
    return Prepared(joined.kept, drops)


def _only_training(more: Sequence[Question], known: Collection[str]) -> list[Question]:
    """The questions of `questions.train_path`, to train with."""
    for question in more:
        if question.question_id in known:
            raise UserError(
                f"questions.train_path: question {question.question_id} stands in questions.path or "
                "questions.test_path too; ids must differ"
            )
        if question.split not in ("", TRAIN):
            raise UserError(
                f"questions.train_path: question {question.question_id} has the split {question.split!r}; all its "
                f"questions train: leave the split out"
            )
    return [dataclasses.replace(question, split=TRAIN) for question in more]


def join_training(questions: Sequence[Question], more: Sequence[Question], near_duplicate: float) -> Sifted:
    """Adds questions that train to others that are split already, which stay as they are.

    Args:
        questions: With their splits.
        more: Questions that train; their ids are others.
        near_duplicate: As `questions.near_duplicate`.

    Returns:
        All `questions`, then what may join them; and the others of `more`, with the reason: about a document that is
        held out, the words of a test question (whatever its answer), or as `drop_repeats`.
    """
    if not more:
        return Sifted(list(questions), [])
    held_out = held_out_documents(questions)
    tests = {question.question_id for question in questions if question.split != TRAIN}
    tested = {_words(question) for question in questions if question.question_id in tests}
    faults = {question.question_id: HELD_OUT for question in more if held_out.intersection(question.documents)}
    faults |= {question.question_id: LEAK for question in more if _words(question) in tested}
    free = [question for question in more if question.question_id not in faults]
    joining = {question.question_id for question in free}
    sifted = drop_repeats([*questions, *free], tests, near_duplicate)
    faults |= {question.question_id: reason for question, reason in sifted.dropped if question.question_id in joining}
    kept = [question for question in more if question.question_id not in faults]
    dropped = [(question, faults[question.question_id]) for question in more if question.question_id in faults]
    return Sifted([*questions, *kept], dropped)


def _words(question: Question) -> frozenset[str]:
    return frozenset(content_words(question.text, ()))


def assign_splits(
    questions: Sequence[Question], tests: Sequence[Question] | None, config: QuestionsConfig, seed: int
) -> list[Question]:
    """Gives every question a split; a split that the file states is kept.

    With a test file, or questions whose split is `test`, those test new documents where none of their documents is
    asked about in training, and new questions otherwise; all others train. Without, documents are held out whole,
    drawn from the seed, and questions about the other documents.

    Raises:
        UserError: An unknown split, a question in both files, a document that is to be both seen and new, or no
            question left to train on or to test with.
    """
    _refuse_bad_splits(questions, tests)
    tested = [q if q.split not in ("", TRAIN) else dataclasses.replace(q, split=TEST) for q in tests or ()]
    together = [*questions, *tested]
    if tests is not None or any(question.split == TEST for question in questions):
        split = _tell_tests_apart(together)
    elif all(question.split for question in questions):
        split = together
    else:
        split = _split_by_document(together, config, seed)
    _refuse_leaks(split)
    present = {question.split for question in split}
    if TRAIN not in present:
        raise UserError(
            "questions.path: no question is left to train on; lower questions.test_documents_fraction "
            f"({config.test_documents_fraction:g}) or questions.test_questions_fraction "
            f"({config.test_questions_fraction:g}), or give some the split {TRAIN}"
        )
    if present == {TRAIN}:
        raise UserError(
            "questions.path: no question is left to test with; raise questions.test_documents_fraction "
            f"({config.test_documents_fraction:g}) or questions.test_questions_fraction "
            f"({config.test_questions_fraction:g}), or give questions.test_path"
        )
    return split


def _refuse_bad_splits(questions: Sequence[Question], tests: Sequence[Question] | None) -> None:
    for question in (*questions, *(tests or ())):
        if question.split and question.split not in (*SPLITS, TEST):
            raise UserError(
                f"questions.path: question {question.question_id} has the split {question.split!r}; "
                f"use one of {', '.join(SPLITS)} or {TEST}, or leave it out"
            )
    both = {question.question_id for question in questions} & {question.question_id for question in tests or ()}
    if both:
        raise UserError(f"questions.test_path: question {min(both)} stands in questions.path too; ids must differ")


def _tell_tests_apart(questions: Sequence[Question]) -> list[Question]:
    stated = [question if question.split else dataclasses.replace(question, split=TRAIN) for question in questions]
    seen = _documents(question for question in stated if question.split in (TRAIN, NEW_QUESTIONS))
    return [
        dataclasses.replace(q, split=NEW_QUESTIONS if seen.intersection(q.documents) else NEW_DOCUMENTS)
        if q.split == TEST
        else q
        for q in stated
    ]


def _documents(questions: Iterable[Question]) -> set[str]:
    return {doc_id for question in questions for doc_id in question.documents}


def _refuse_leaks(questions: Sequence[Question]) -> None:
    """A document that training shows tests nothing new, whatever the file says."""
    held_out = held_out_documents(questions)
    for question in questions:
        leaked = [doc_id for doc_id in question.documents if doc_id in held_out] if question.split == TRAIN else []
        if leaked:
            raise UserError(
                f"questions.path: question {question.question_id} trains on the document {leaked[0]}, which another "
                f"question holds back as new; give that one the split {NEW_QUESTIONS}, or leave both splits out"
            )


def _split_by_document(questions: Sequence[Question], config: QuestionsConfig, seed: int) -> list[Question]:
    documents = _documents(questions)
    held_out = held_out_documents(questions) | _draw_documents(questions, documents, config, seed)
    split = [
        question
        if question.split
        else dataclasses.replace(question, split=_draw_split(question, held_out, config, seed))
        for question in questions
    ]
    # A test about a document that no training question is about would not be about a seen document: it trains.
    seen = held_out | _documents(question for question in split if question.split == TRAIN)
    return [
        dataclasses.replace(drawn, split=TRAIN)
        if drawn.split == NEW_QUESTIONS and not question.split and _is_unseen(question, seen)
        else drawn
        for question, drawn in zip(questions, split, strict=True)
    ]


def _draw_documents(questions: Sequence[Question], documents: set[str], config: QuestionsConfig, seed: int) -> set[str]:
    if not config.test_documents_fraction:
        return set()
    if len(documents) < 2:
        raise UserError(
            f"questions.path: the questions name {len(documents)} golden documents; holding documents out needs two "
            "(questions.test_documents_fraction: 0 tests with questions about seen documents alone)"
        )
    stated = held_out_documents(questions)
    free = sorted(documents - stated - _documents(q for q in questions if q.split in (TRAIN, NEW_QUESTIONS)))
    wanted = min(max(1, round(len(documents) * config.test_documents_fraction)), len(documents) - 1) - len(stated)
    return set(random.Random(f"{seed}/documents").sample(free, min(max(0, wanted), len(free))))


def _draw_split(question: Question, held_out: set[str], config: QuestionsConfig, seed: int) -> str:
    drawn = random.Random(f"{seed}/{question.question_id}").random()
    places = set(question.documents)
    if places and places <= held_out:
        return NEW_DOCUMENTS
    if places & held_out:  # about both a held-out document and another: can neither train nor hold the other back
        return NEW_QUESTIONS
    if question.unanswerable and not places:  # about no document in particular: the shares that others have
        if drawn < config.test_documents_fraction:
            return NEW_DOCUMENTS
        drawn = (drawn - config.test_documents_fraction) / (1 - config.test_documents_fraction)
    return NEW_QUESTIONS if drawn < config.test_questions_fraction else TRAIN


def _is_unseen(question: Question, seen: set[str]) -> bool:
    return bool(question.documents) and seen.isdisjoint(question.documents)


def held_out_documents(questions: Iterable[Question]) -> set[str]:
    """Documents that no training row may show: those of the new-document splits."""
    return _documents(question for question in questions if question.split in (NEW_DOCUMENTS, NEW_KINDS))


def spread(questions: Sequence[Question], rows: int, seed: int) -> list[Question]:
    """At most `rows` questions, evenly over kinds (`metadata.kind`) and, within a kind, over documents.

    Unanswerable questions keep the share that they have among `questions`: they are no kind like the others, which
    an even spread would raise to half the rows of a set with one other kind.
    """
    rng = random.Random(f"{seed}/spread")
    by_kind: dict[str, list[Question]] = defaultdict(list)
    unanswerable = [question for question in questions if question.unanswerable]
    for question in questions:
        if not question.unanswerable:
            by_kind[str(question.metadata.get("kind", ""))].append(question)
    queues = [_round_robin(_shuffled_groups(by_kind[kind], rng)) for kind in sorted(by_kind)]
    return _blend(_round_robin(queues), _round_robin(_shuffled_groups(unanswerable, rng)))[:rows]


def _blend(first: Sequence[Question], second: Sequence[Question]) -> list[Question]:
    """Both in their orders; every beginning holds their shares, rounded."""
    places = [(place * 2 + 1) / len(first) for place in range(len(first))]
    others = [(place * 2 + 1) / len(second) for place in range(len(second))]
    keyed = [*zip(places, first, strict=True), *zip(others, second, strict=True)]
    return [question for _, question in sorted(keyed, key=lambda pair: pair[0])]


def _shuffled_groups(questions: Sequence[Question], rng: random.Random) -> list[list[Question]]:
    groups: dict[Hashable, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.documents[0] if question.documents else ""].append(question)
    keys = sorted(groups, key=str)
    rng.shuffle(keys)
    for key in keys:
        rng.shuffle(groups[key])
    return [groups[key] for key in keys]


def _round_robin(queues: Iterable[Sequence[Question]]) -> list[Question]:
    turns: list[Question] = []
    left = [iter(queue) for queue in queues]
    while left:
        some = [(queue, next(queue, None)) for queue in left]
        left = [queue for queue, question in some if question is not None]
        turns += [question for _, question in some if question is not None]
    return turns
