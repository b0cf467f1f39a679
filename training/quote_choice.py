"""Which sentence of the golden passage a target quotes, where the question names none.

In: a question, its answer and reasoning, the golden chunk. Out: a span of that chunk, or "". In this order: the
shortest sentence that holds the answer; where no sentence does (yes/no, free answers), the sentence of the golden span
that shares most with question, reasoning and answer; where no span is given, such a sentence of the whole chunk, if it
shares enough. A sentence longer than `LONGEST_QUOTE` is cut to the clauses around the answer.
Not covered: quotes that a file or a teacher gives (training/quote_gate.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from retrieval.records import Chunk, Question
from training.duplicates import content_words
from training.passage_match import find_answer, mentions

# A line break, or the end of a sentence: a full stop before white space and a capital, a CJK full stop anywhere.
_LINE_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+(?=[\"'“(]?[A-Z])|(?<=[。！？])")
_CLAUSE_END = re.compile(r"[,;:](?:\s+|$)|[，；：、]|\s[-–—]\s")
LONGEST_QUOTE = 320
"""Characters. Sentences of prose are shorter (0.98 of those of xquad-en's paragraphs); a JSON record in one line, or a
table, is not."""
SHORTEST_CUT = 60
"""Characters to which clauses are joined where a longer sentence is cut."""
LEAST_OVERLAP = 0.2
"""Share of the question's, reasoning's and answer's words, weighted by rarity, that a sentence must hold."""


def choose_quote(question: Question, answer: str, reasoning: str, golden: Chunk) -> str:
    """A span of the golden chunk that supports the answer, or "" where none is found."""
    spans = _golden_spans(question, golden)
    texts = [golden.text[start:end] for start, end in spans] or [golden.text]
    holding = _holding(answer, texts) or (_holding(answer, [golden.text]) if spans else "")
    if holding:
        return _shortened(holding, answer)
    sentences = [sentence for sentence, _, _ in _sentences(golden.text)]
    if spans:
        inside = [
            sentence for sentence, start, end in _sentences(golden.text) if any(_meet(start, end, s) for s in spans)
        ]
        return _most_related(question, answer, reasoning, inside, sentences, 0)
    return _most_related(question, answer, reasoning, sentences, sentences, LEAST_OVERLAP)


def _golden_spans(question: Question, golden: Chunk) -> list[tuple[int, int]]:
    """The golden places with offsets, as offsets into the chunk."""
    return [
        (max(place.start, golden.start) - golden.start, min(place.end, golden.end) - golden.start)
        for place in question.golden
        if place.start is not None and place.end is not None and place.matches(golden)
    ]


def _holding(answer: str, texts: Sequence[str]) -> str:
    """The shortest sentence that holds the answer; a line, where a full stop cuts the answer (`St. Petersburg`)."""
    for ends in (_SENTENCE_END, _LINE_END):
        pieces = [piece.strip() for text in texts for piece in ends.split(text)]
        holding = [piece for piece in pieces if mentions(answer, piece)]
        if holding:
            return min(holding, key=len)
    return ""


def _sentences(text: str) -> list[tuple[str, int, int]]:
    """Sentences with their offsets, without the white space between them."""
    ends = [0, *(place for match in _SENTENCE_END.finditer(text) for place in match.span()), len(text)]
    pieces = [(text[start:end], start, end) for start, end in zip(ends[::2], ends[1::2], strict=True)]
    return [(piece.strip(), start, end) for piece, start, end in pieces if piece.strip()]


def _meet(start: int, end: int, span: tuple[int, int]) -> bool:
    return start < span[1] and span[0] < end


def _most_related(
    question: Question, answer: str, reasoning: str, candidates: Sequence[str], sentences: Sequence[str], least: float
) -> str:
    """The candidate with the largest share of the words asked for; a word weighs more the fewer sentences have it."""
    wanted = set(content_words(f"{question.text} {reasoning} {answer}", ()))
    words = {sentence: set(content_words(sentence, ())) for sentence in sentences}
    spread = Counter(word for found in words.values() for word in found)
    weight = {word: math.log(1 + len(sentences) / (spread[word] or 1)) for word in sorted(wanted)}
    whole = sum(weight.values())

    def share(sentence: str) -> float:
        return sum(weight[word] for word in sorted(wanted & words[sentence])) / whole

    best = max(candidates, key=share, default="")
    return _shortened(best, "") if best and share(best) > least else ""


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
    return sentence[left:right].strip() if right - left <= LONGEST_QUOTE else _whole_words(sentence, start, end)


def _whole_words(sentence: str, start: int, end: int) -> str:
    """Words around the answer, as many as a quote may have; the answer whole, however long."""
    spare = max(0, LONGEST_QUOTE - (end - start)) // 2
    left, right = max(0, start - spare), min(len(sentence), end + spare)
    if left > 0:
        left = next((place + 1 for place in range(left, start) if sentence[place].isspace()), left)
    if right < len(sentence):
        right = next((place for place in range(right, end, -1) if sentence[place - 1].isspace()), right)
    return sentence[left:right].strip()
