"""Near-duplicate and ambiguous questions, found in time that grows linearly.

In: questions in a fixed order. Out: which are kept, and why each other one is not. Four rules: the same words with the
same answer (anywhere); nearly the same words with the same answer about the same document; the same question with
different answers in different places, which nobody can answer without being told the place; a question meant to be
unanswerable that another place answers.
"What is the area of Greece?" and "What is the area of France?" share most words and are two questions: wording alone
never decides. Not covered: meaning (paraphrases that share no words).
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from retrieval.records import Question
from training.format import fold

# Words of scripts that set spaces; of others (Chinese, Japanese, Thai) each character.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\w")

DUPLICATE = "near-duplicate question"
AMBIGUOUS = "the same question has another answer elsewhere"
ANSWERED = "meant to be unanswerable, but answered elsewhere"


class Sifted(NamedTuple):
    """Questions that are kept, and those that are not with the reason."""

    kept: list[Question]
    dropped: list[tuple[Question, str]]


def content_words(text: str, stop_words: Collection[str]) -> list[str]:
    """The words of a text, folded, in lower case and in order, without `stop_words` (all, if none would be left)."""
    words = _WORD.findall(fold(text)[0].casefold())
    return [word for word in words if word not in stop_words] or words


@dataclass(frozen=True)
class _Entry:
    question: Question
    text: str
    words: tuple[str, ...]
    answer: tuple[str, ...]


def sift(questions: Sequence[Question], stop_words: Collection[str], threshold: float) -> Sifted:
    """Keeps the first of near-duplicates, and none of ambiguous questions.

    Args:
        questions: In the order that decides which one is the first.
        stop_words: Words that duplicates may differ in.
        threshold: Jaccard similarity of content words from which two questions about one document are one.
    """
    entries = [_entry(question, stop_words) for question in questions]
    answers_of: dict[str, set[tuple[str, ...]]] = collections.defaultdict(set)
    for entry in entries:
        answers_of[entry.text].add(entry.answer)
    ambiguous = {text for text, answers in answers_of.items() if _disagree(answers)}
    frequency = collections.Counter(word for entry in entries for word in set(entry.words))
    seen = _Seen(threshold, frequency)
    kept: list[Question] = []
    dropped: list[tuple[Question, str]] = []
    for entry in entries:
        if entry.text in ambiguous:
            dropped.append((entry.question, AMBIGUOUS))
        elif not entry.answer and len(answers_of[entry.text]) > 1:
            dropped.append((entry.question, ANSWERED))
        elif seen.has(entry):
            dropped.append((entry.question, DUPLICATE))
        else:
            seen.add(entry)
            kept.append(entry.question)
    return Sifted(kept, dropped)


def _entry(question: Question, stop_words: Collection[str]) -> _Entry:
    words = tuple(dict.fromkeys(content_words(question.text, stop_words)))
    answer = tuple(word for answer in question.answers for word in content_words(answer, ()))
    return _Entry(question, " ".join(content_words(question.text, ())), words, answer)


def _disagree(answers: Iterable[tuple[str, ...]]) -> bool:
    """Whether two answers differ in more than length (`Athens` and `Athens, Greece` agree)."""
    longest_first = sorted((set(answer) for answer in answers if answer), key=len, reverse=True)
    return any(not answer <= longest_first[0] for answer in longest_first[1:])


class _Seen:
    """The questions kept so far. Candidates come from an index over each one's rarest words: two sets whose Jaccard
    similarity is at least t share one of the first n - ⌈t·n⌉ + 1 words in a common order (prefix filtering, Chaudhuri
    et al. 2006), so that the work does not grow with the number of questions about a document."""

    def __init__(self, threshold: float, frequency: collections.Counter[str]) -> None:
        self._threshold = threshold
        self._frequency = frequency
        self._exact: set[tuple[str, ...]] = set()
        self._near: dict[tuple[str, tuple[str, ...], str], list[frozenset[str]]] = collections.defaultdict(list)

    def has(self, entry: _Entry) -> bool:
        if any(form in self._exact for form in self._forms(entry)):
            return True
        words = frozenset(entry.words)
        return any(
            len(words & other) >= self._threshold * len(words | other)
            for place in self._places(entry)
            for other in self._near.get(place, ())
        )

    def add(self, entry: _Entry) -> None:
        self._exact.update(self._forms(entry))
        for place in self._places(entry):
            self._near[place].append(frozenset(entry.words))

    def _forms(self, entry: _Entry) -> tuple[tuple[str, ...], ...]:
        """The same text, or the same words with the same answer (`|` is no word)."""
        return (entry.text,), (*sorted(entry.words), "|", *entry.answer)

    def _places(self, entry: _Entry) -> list[tuple[str, tuple[str, ...], str]]:
        golden = entry.question.golden
        document = golden[0].doc_id if golden else str(entry.question.metadata.get("doc_id", ""))
        rare_first = sorted(entry.words, key=lambda word: (self._frequency[word], word))
        length = len(rare_first) - math.ceil(self._threshold * len(rare_first) - 1e-9) + 1
        return [(document, entry.answer, word) for word in rare_first[:length]]
