"""Near-duplicate, leaking and ambiguous questions, found in time that grows linearly.

In: questions in a fixed order. Out: which are kept, and why each other one is not. Two users, two sets of rules:

- `drop_repeats` and `drop_leaks`, for questions that a user brings: two are one when their answers agree, they are
  about the same document, and they share nearly all words; a training question may not repeat a test question.
- `sift`, for questions that a teacher wrote about single chunks, is stricter: the same words with the same answer are
  one anywhere, and a question with different answers in different places is kept nowhere, since nobody can answer it
  without being told the place.

"What is the area of Greece?" and "What is the area of France?" share most words and are two questions: wording alone
never decides, and neither are two questions one whose numbers differ. Not covered: meaning (paraphrases that share no
words).
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from retrieval.records import Question
from training.format import fold_text

# Words of scripts that set spaces; of others (Chinese, Japanese, Thai) each character.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\w")
_DIGIT = re.compile(r"\d")

DUPLICATE = "near-duplicate question"
LEAK = "repeats a test question"
AMBIGUOUS = "the same question has another answer elsewhere"
ANSWERED = "meant to be unanswerable, but answered elsewhere"

Words = tuple[str, ...]


class Sifted(NamedTuple):
    """Questions that are kept, and those that are not with the reason."""

    kept: list[Question]
    dropped: list[tuple[Question, str]]


def content_words(text: str, stop_words: Collection[str]) -> list[str]:
    """The words of a text, folded, in lower case and in order, without `stop_words` (all, if none would be left)."""
    words = _WORD.findall(fold_text(text).casefold())
    return [word for word in words if word not in stop_words] or words


@dataclass(frozen=True)
class _Entry:
    question: Question
    text: str
    """All words of the question, in order."""
    words: Words
    """Its content words, each once."""
    answers: tuple[Words, ...]
    """The words of each accepted answer; one empty answer where there is none."""
    documents: Words

    @property
    def answer(self) -> Words:
        """The words of all answers."""
        return tuple(itertools.chain.from_iterable(self.answers))

    def forms(self) -> Iterator[Words]:
        """The same words with the same answer (`|` is no word)."""
        words = sorted(self.words)
        return ((*words, "|", *answer) for answer in self.answers)


def _entry(question: Question, stop_words: Collection[str]) -> _Entry:
    every = content_words(question.text, ())
    words = dict.fromkeys([word for word in every if word not in stop_words] or every)
    answers = dict.fromkeys(tuple(content_words(answer, ())) for answer in question.answers)
    documents = question.documents or (str(question.metadata.get("doc_id", "")),)
    return _Entry(question, " ".join(every), tuple(words), tuple(answers) or ((),), documents)


def drop_repeats(questions: Sequence[Question], tests: Collection[str], threshold: float) -> Sifted:
    """Keeps the first of near-duplicates, and no question that gives a test question away.

    Args:
        questions: In the order that decides which one is the first, but for tests, which come before all others.
        tests: Ids of the test questions.
        threshold: Jaccard similarity of words from which two questions with a common answer about a common document
            are one.

    Returns:
        Questions in their order. A question that is no test is dropped also when it has all words and an answer of a
        test question about another document: it gives that answer away.
    """
    entries = [_entry(question, ()) for question in questions]
    answered = {entry.text for entry in entries if entry.question.answers}
    frequency = collections.Counter(word for entry in entries for word in entry.words)
    tested, trained = _Near(threshold, frequency), _Near(threshold, frequency)
    exact: set[Words] = set()
    faults: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: entry.question.question_id not in tests):
        name = entry.question.question_id
        if entry.question.unanswerable and entry.text in answered:
            faults[name] = ANSWERED
        elif name in tests:
            if tested.has(entry):
                faults[name] = DUPLICATE
            else:
                tested.add(entry)
                exact.update(entry.forms())
        elif tested.has(entry) or any(form in exact for form in entry.forms()):
            faults[name] = LEAK
        elif trained.has(entry):
            faults[name] = DUPLICATE
        else:
            trained.add(entry)
    return Sifted(
        [question for question in questions if question.question_id not in faults],
        [(question, faults[question.question_id]) for question in questions if question.question_id in faults],
    )


def drop_leaks(questions: Sequence[Question], tests: Collection[str]) -> Sifted:
    """Drops what has all words and an answer of a test question, whatever their documents: for questions that were
    split after `drop_repeats`, which leaves nothing else to find. `tests` are the ids of the test questions."""
    entries = [_entry(question, ()) for question in questions]
    exact = {form for entry in entries if entry.question.question_id in tests for form in entry.forms()}
    kept: list[Question] = []
    dropped: list[tuple[Question, str]] = []
    for entry in entries:
        if entry.question.question_id in tests or exact.isdisjoint(entry.forms()):
            kept.append(entry.question)
        else:
            dropped.append((entry.question, LEAK))
    return Sifted(kept, dropped)


def sift(questions: Sequence[Question], stop_words: Collection[str], threshold: float) -> Sifted:
    """Keeps the first of near-duplicates, and none of ambiguous questions.

    Args:
        questions: In the order that decides which one is the first.
        stop_words: Words that duplicates may differ in.
        threshold: Jaccard similarity of content words from which two questions about one document are one.
    """
    entries = [_entry(question, stop_words) for question in questions]
    answers_of: dict[str, set[Words]] = collections.defaultdict(set)
    for entry in entries:
        answers_of[entry.text].add(entry.answer)
    ambiguous = {text for text, answers in answers_of.items() if _disagree(answers)}
    near = _Near(threshold, collections.Counter(word for entry in entries for word in entry.words))
    exact: set[Words] = set()
    kept: list[Question] = []
    dropped: list[tuple[Question, str]] = []
    for entry in entries:
        forms = {(entry.text,), *entry.forms()}
        if entry.text in ambiguous:
            dropped.append((entry.question, AMBIGUOUS))
        elif not entry.answer and len(answers_of[entry.text]) > 1:
            dropped.append((entry.question, ANSWERED))
        elif forms & exact or near.has(entry):
            dropped.append((entry.question, DUPLICATE))
        else:
            exact |= forms
            near.add(entry)
            kept.append(entry.question)
    return Sifted(kept, dropped)


def _disagree(answers: Iterable[Words]) -> bool:
    """Whether two answers differ in more than length (`Athens` and `Athens, Greece` agree)."""
    longest_first = sorted((set(answer) for answer in answers if answer), key=len, reverse=True)
    return any(not answer <= longest_first[0] for answer in longest_first[1:])


class _Near:
    """Questions by document and answer. Candidates come from an index over each one's rarest words: two sets whose
    Jaccard similarity is at least t share one of the first n - ⌈t·n⌉ + 1 words in a common order (prefix filtering,
    Chaudhuri et al. 2006), so that the work does not grow with the number of questions about a document."""

    def __init__(self, threshold: float, frequency: collections.Counter[str]) -> None:
        self._threshold = threshold
        self._frequency = frequency
        self._near: dict[tuple[str, Words, str], list[frozenset[str]]] = collections.defaultdict(list)

    def has(self, entry: _Entry) -> bool:
        words = frozenset(entry.words)
        return any(
            len(words & other) >= self._threshold * len(words | other) and _same_numbers(words, other)
            for place in self._places(entry)
            for other in self._near.get(place, ())
        )

    def add(self, entry: _Entry) -> None:
        words = frozenset(entry.words)
        for place in self._places(entry):
            self._near[place].append(words)

    def _places(self, entry: _Entry) -> Iterator[tuple[str, Words, str]]:
        rare_first = sorted(entry.words, key=lambda word: (self._frequency[word], word))
        length = len(rare_first) - math.ceil(self._threshold * len(rare_first) - 1e-9) + 1
        return itertools.product(entry.documents, entry.answers, rare_first[:length])


def _same_numbers(words: frozenset[str], other: frozenset[str]) -> bool:
    return not any(_DIGIT.search(word) for word in words ^ other)
