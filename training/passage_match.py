"""What a passage has to do with a question: whether it holds an answer, touches a golden place, repeats another one.

In: questions, passages or chunks, plain texts. Out: yes or no, a share, the golden chunk. Training rows of the
generator (training/raft_rows.py) and of the retriever (training/retriever_rows.py) decide by the same rules.
Texts are folded once and kept: a row asks about the same few dozen passages again and again.
Not covered: paraphrase; every comparison is of words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from retrieval.records import Chunk, Golden, Hit, Passage, Question
from training.duplicates import content_words
from training.format import fold, fold_text

# A number with its sign, thousands separators and decimals: `83,871`, `-0.5`, `2,5`, `1.234.567`. A minus between
# two figures is a range's dash; `1990,2763` and `1,3,5` are lists.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-\u2212])?(?<!\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|(?<!\d,)\d+,\d{1,2}(?![\d,])|\d+)(?:\.\d+)*"
)
# Words that answer a question of whatever content, in lower case: no passage answers it by holding one.
_VERDICTS = frozenset(
    {"yes", "no", "maybe", "true", "false", "both", "neither", "none", "unknown"}
    | {"是", "否", "是的", "不是", "对", "不对", "错", "正确", "错误", "有", "没有", "会", "不会", "能", "不能"}
    | {"可以", "不可以", "可能", "也许"}
)
# Texts kept folded: about 10 MB of passages of 1,000 characters.
_KEPT = 4096


@lru_cache(maxsize=_KEPT)
def _plain(text: str) -> str:
    return fold_text(text).casefold()


@lru_cache(maxsize=_KEPT)
def _words(text: str) -> Counter[str]:
    return Counter(content_words(text, ())) or Counter(_plain(text).split())


@lru_cache(maxsize=_KEPT)
def mentions(answer: str, text: str) -> bool:
    """Whether `text` holds `answer` (folded, any case), not as a part of a longer word or number.

    `83` is not in `83,871`, `5.5` not in `15.5%`, `5` neither in `5.5` nor in `-5`; Chinese, Japanese, Korean and Thai
    set no spaces between words, so that there any occurrence counts.
    """
    return next(_places(_plain(answer), _plain(text)), None) is not None


def may_mention(answer: str, text: str) -> int:
    """At most how many places of `text` mention the answer: as fast as a plain search."""
    needle = _plain(answer)
    return _plain(text).count(needle) if needle else 0


def is_verdict(answer: str) -> bool:
    """Whether an answer is `yes`, `no` or the like: words that a passage holds for any reason."""
    return _plain(answer).rstrip(".!。") in _VERDICTS


def find_answer(answer: str, text: str) -> tuple[int, int] | None:
    """Where `text` first `mentions` the answer: character offsets `[start, end)` into `text`, or None."""
    folded, origins = fold(text)
    haystack = "".join(char if len(char.casefold()) != 1 else char.casefold() for char in folded)
    needle = "".join(char if len(char.casefold()) != 1 else char.casefold() for char in fold_text(answer))
    place = next(_places(needle, haystack), None)
    return None if place is None else (origins[place[0]], origins[place[1] - 1] + 1)


def _places(needle: str, haystack: str) -> Iterator[tuple[int, int]]:
    start = haystack.find(needle) if needle else -1
    if start < 0:
        return
    numbers = [match.span() for match in _NUMBER.finditer(haystack)] if any(map(str.isdigit, needle)) else []
    while start >= 0:
        end = start + len(needle)
        cut = any(low < place < high for low, high in numbers for place in (start, end))
        joined = _joins(haystack[start - 1 : start], needle[0]) or _joins(needle[-1], haystack[end : end + 1])
        if not (cut or joined):
            yield start, end
        start = haystack.find(needle, start + 1)


def _joins(left: str, right: str) -> bool:
    return _is_word(left) and _is_word(right)


def _is_word(char: str) -> bool:
    """Whether a character is a letter or digit of a script that sets spaces between words."""
    return char.isalnum() and (char < "\u0590" or "\u1e00" <= char < "\u2000")


def touches(place: Golden, passage: Passage | Chunk) -> bool:
    """Whether a passage shares a character with a golden place (or is of its document, where no span is given)."""
    if passage.doc_id != place.doc_id or place.start is None or place.end is None:
        return passage.doc_id == place.doc_id
    return passage.start < place.end and place.start < passage.end


def similarity(left: str, right: str) -> float:
    """Shared words of two texts over all their words, as multisets (Jaccard's index): 1 for the same words.

    In scripts without spaces each character is a word.
    """
    return _jaccard(_words(left), _words(right))


def nearly_same(left: str, right: str, threshold: float) -> bool:
    """Whether two texts share at least this much of their words (`similarity`); most pairs are told by length alone."""
    first, second = _words(left), _words(right)
    shorter, longer = sorted((first.total(), second.total()))
    return shorter >= threshold * longer and _jaccard(first, second) >= threshold


def _jaccard(first: Counter[str], second: Counter[str]) -> float:
    common = (first & second).total()
    every = first.total() + second.total() - common
    return common / every if every else 1.0


def same_text(left: str, right: str) -> bool:
    """Whether two texts differ in nothing but white space and width forms."""
    return left == right or fold_text(left) == fold_text(right)


def golden_chunks(question: Question, chunks_of: Mapping[str, Sequence[Chunk]]) -> list[Chunk]:
    """The chunks that hold a golden place of the question, in the order of its places."""
    return [chunk for place in question.golden for chunk in chunks_of.get(place.doc_id, ()) if place.matches(chunk)]


def golden_chunk(question: Question, hits: Sequence[Hit], candidates: Sequence[Chunk]) -> Chunk | None:
    """Of the candidates, the one that holds the earliest of the accepted answers; among several, the best ranked hit,
    then the first in the corpus. Where none holds an answer (yes/no, free answers), the best ranked."""
    ranks = {hit.passage.chunk_id: hit.rank for hit in hits}
    telling = [(number, answer) for number, answer in enumerate(question.answers) if not is_verdict(answer)]

    def order(chunk: Chunk) -> tuple[int, int, str, int]:
        held = (number for number, answer in telling if mentions(answer, chunk.text))
        rank = ranks.get(chunk.chunk_id, len(hits) + 1)
        return next(held, len(question.answers)), rank, chunk.doc_id, chunk.start

    return min(candidates, key=order, default=None)
