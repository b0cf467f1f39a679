"""Which sentence of the golden passage a target quotes, where the question names none.

In: a question, its answer and reasoning, the golden chunk. Out: a span of that chunk, or "". In this order:
1. of the sentences that the golden span touches (of all, where no span is given) and that hold the answer, the one
   that has most of the question's words, then the shortest;
2. where none holds it (yes/no, free answers), the golden span's sentences, or the most related one of too many;
3. where no span is given, the most related sentence of the chunk, if it is related enough.
A verdict (`yes`, `no`) is held by no sentence: `no` stands in one for many reasons. A sentence longer than
`LONGEST_QUOTE` is cut to the clauses around the answer.
Not covered: quotes that a file or a teacher gives (training/quote_gate.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrieval.records import Chunk, Question
from training.duplicates import content_words
from training.passage_match import find_answer, is_verdict, mentions

# A line break, or the end of a sentence: a full stop before white space and a capital, a CJK full stop anywhere.
_LINE_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+(?=[\"'“(]?[A-Z])|(?<=[。！？])")
_CLAUSE_END = re.compile(r"[,;](?:\s+|$)|[，；、]|\s[-–—]\s")
LONGEST_QUOTE = 320
"""Characters: 0.93 of the sentences chosen for xquad-en's questions (n = 925) are no longer; a JSON record in one line,
or a table, is."""
SHORTEST_CUT = 60
"""Characters to which clauses are joined where a longer sentence is cut."""
LEAST_RELATED = 0.16
"""Share of the wanted words, weighted (see `_wanted`), that a sentence must have where no golden span vouches for it.
On PubMedQA (n = 250, long answers as reasoning) the golden abstract's best sentence has it in 0.82 of cases, the best
sentence of a random abstract in 0.07; without reasoning in 0.98 and 0.12."""
BEYOND_QUESTION = 3.0
"""Weight of a word of the answer or the reasoning that the question does not have. With 1, a sentence of the first 40%
of PubMedQA's abstracts, where the aim stands that the question repeats, wins in 0.85 of cases; with 3 in 0.70."""


@dataclass(frozen=True)
class _Sentence:
    text: str
    start: int
    end: int


def choose_quote(question: Question, answer: str, reasoning: str, golden: Chunk) -> str:
    """A span of the golden chunk that supports the answer, or "" where none is found."""
    spans = _golden_spans(question, golden)
    sentences = _split(golden.text, _SENTENCE_END)
    holding = [] if is_verdict(answer) else _holding(answer, golden.text, sentences, spans)
    if len(holding) == 1:
        return _shortened(holding[0], answer)
    wanted = _wanted(question, answer, reasoning, sentences)
    if holding:
        return _shortened(min(holding, key=lambda text: (-_related(text, wanted), len(text))), answer)
    inside = _touching(sentences, spans)
    if not inside:
        return _most_related(sentences, wanted, LEAST_RELATED)
    whole = golden.text[inside[0].start : inside[-1].end].strip()
    return whole if len(whole) <= LONGEST_QUOTE else _most_related(inside, wanted, 0)


def _holding(answer: str, text: str, sentences: Sequence[_Sentence], spans: Sequence[tuple[int, int]]) -> list[str]:
    """The sentences that hold the answer, of those that touch the golden spans where these do; where a full stop cuts
    the answer (`St. Petersburg`), the lines."""
    for pieces in (sentences, _split(text, _LINE_END)):
        for near in (_touching(pieces, spans), pieces):
            holding = [piece.text for piece in near if mentions(answer, piece.text)]
            if holding:
                return holding
    return []


def _golden_spans(question: Question, golden: Chunk) -> list[tuple[int, int]]:
    """The golden places with offsets, as offsets into the chunk."""
    return [
        (place.start - golden.start, place.end - golden.start)
        for place in question.golden
        if place.start is not None and place.end is not None and place.matches(golden)
    ]


def _split(text: str, ends: re.Pattern[str]) -> list[_Sentence]:
    """The pieces between `ends`, without the white space around them; offsets are the pieces' with it."""
    places = [0, *(place for match in ends.finditer(text) for place in match.span()), len(text)]
    pieces = [
        _Sentence(text[start:end].strip(), start, end) for start, end in zip(places[::2], places[1::2], strict=True)
    ]
    return [piece for piece in pieces if piece.text]


def _touching(sentences: Sequence[_Sentence], spans: Sequence[tuple[int, int]]) -> list[_Sentence]:
    return [piece for piece in sentences if any(piece.start < end and start < piece.end for start, end in spans)]


def _wanted(question: Question, answer: str, reasoning: str, sentences: Sequence[_Sentence]) -> Mapping[str, float]:
    """The words of question, answer and reasoning with their weights, which sum to 1: a word weighs more the fewer
    sentences have it, and more where the question does not have it."""
    asked = set(content_words(question.text, ()))
    words = dict.fromkeys(content_words(f"{question.text} {answer} {reasoning}", ()))
    spread = Counter(word for piece in sentences for word in set(content_words(piece.text, ())))
    weights = {
        word: math.log(1 + len(sentences) / (spread[word] or 1)) * (1 if word in asked else BEYOND_QUESTION)
        for word in words
    }
    whole = sum(weights.values()) or 1.0
    return {word: weight / whole for word, weight in weights.items()}


def _related(text: str, wanted: Mapping[str, float]) -> float:
    words = set(content_words(text, ()))
    return round(sum(weight for word, weight in wanted.items() if word in words), 9)


def _most_related(sentences: Sequence[_Sentence], wanted: Mapping[str, float], least: float) -> str:
    """The sentence with the largest share of the wanted words; a question states nothing."""
    stating = [piece.text for piece in sentences if not piece.text.endswith(("?", "？"))]
    best = max(stating, key=lambda text: _related(text, wanted), default="")
    return _shortened(best, "") if best and _related(best, wanted) >= least else ""


def _shortened(sentence: str, answer: str) -> str:
    """The sentence, or the clauses of a too long one around the answer (from its beginning, without an answer)."""
    if len(sentence) <= LONGEST_QUOTE:
        return sentence
    start, end = (find_answer(answer, sentence) if answer else None) or (0, 1)
    ends = [0, *(match.end() for match in _CLAUSE_END.finditer(sentence)), len(sentence)]
    left = max(place for place in ends if place <= start)
    right = min(place for place in ends if place >= end)
    while right - left < SHORTEST_CUT and right < len(sentence):
        right = min(place for place in ends if place > right)
    if right - left > LONGEST_QUOTE:
        return _whole_words(sentence, start, end)
    return sentence[left:end] + sentence[end:right].rstrip(" ,;，；、-–—")


def _whole_words(sentence: str, start: int, end: int) -> str:
    """Words around the answer, as many as a quote may have; the answer whole, however long."""
    spare = max(0, LONGEST_QUOTE - (end - start)) // 2
    left, right = max(0, start - spare), min(len(sentence), end + spare)
    if left > 0:
        left = next((place + 1 for place in range(left, start) if sentence[place].isspace()), left)
    if right < len(sentence):
        right = next((place for place in range(right, end, -1) if sentence[place - 1].isspace()), right)
    return sentence[left:right].strip()
