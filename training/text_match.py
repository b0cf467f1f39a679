"""Comparing an answer with accepted answers, and with the text that should support it.

In: plain strings. Out: exact match, F1, containment; the numbers and names that a text asserts.
Sources: English follows SQuAD 1.1's evaluation script (P. Rajpurkar et al. 2016), which KILT uses too; Chinese
follows CMRC 2018's (Y. Cui et al. 2019): characters, punctuation left out, F1 over the longest common run. Both take
the best over the accepted answers. Differences from CMRC: text is NFKC-folded first, and runs of Latin script are
split at white space instead of by NLTK's word tokeniser.
Not covered: paraphrase; every comparison is of words.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from difflib import SequenceMatcher

from training.format import fold

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_CJK_RUN = re.compile(f"{_CJK.pattern}+")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")

# Words that a sentence may start with (in capitals) without naming anything.
_FUNCTION_WORDS = """
    a about above according after all also although an and answer any are around as at based because before below
    between both but by context document documents during each estimated for from given has have he her here his how
    however i if in is it its less more most no none not of on one only or other our out over per question quote
    roughly she since so some source such text than that the their then there these they this those to total under
    unknown up was we were what when where which while who why with yes you
"""
_NOT_NAMES = frozenset(_FUNCTION_WORDS.split())


def english_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def plain_words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, split at white space; articles stay, because `A` may be an answer's letter."""
    return text.lower().translate(_ASCII_PUNCTUATION).split()


def chinese_units(text: str) -> list[str]:
    """CMRC's mixed segmentation: each Chinese character, and each other word between white space or characters."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(" " if unicodedata.category(char)[0] == "P" or char in "~^`+=|$" else char for char in folded)
    return _CJK.sub(lambda match: f" {match.group()} ", kept).split()


def _units(language: str) -> Callable[[str], list[str]]:
    return chinese_units if language == "zh" else english_words


def exact_match(answer: str, accepted: Sequence[str], language: str) -> float:
    """1.0 when the normalised answer equals a normalised accepted answer, else 0.0."""
    units = _units(language)
    return float(any(units(answer) == units(candidate) for candidate in accepted))


def f1(answer: str, accepted: Sequence[str], language: str) -> float:
    """Best F1 over the accepted answers: over the bag of words in English, over the longest common run in Chinese."""
    units = _units(language)
    overlap = _longest_common_run if language == "zh" else _common_words
    return max((_f1(units(answer), units(candidate), overlap) for candidate in accepted), default=0.0)


def _f1(predicted: list[str], accepted: list[str], overlap: Callable[[list[str], list[str]], int]) -> float:
    common = overlap(predicted, accepted)
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(accepted)
    return 2 * precision * recall / (precision + recall)


def _common_words(first: list[str], second: list[str]) -> int:
    return (Counter(first) & Counter(second)).total()


def _longest_common_run(first: list[str], second: list[str]) -> int:
    return SequenceMatcher(None, first, second, autojunk=False).find_longest_match().size


def contains(text: str, accepted: Sequence[str], language: str) -> float:
    """1.0 when a normalised accepted answer stands, as whole words in order, in the normalised text, else 0.0."""
    units = _units(language)
    haystack = f" {' '.join(units(text))} "
    needles = (" ".join(units(candidate)) for candidate in accepted)
    return float(any(f" {needle} " in haystack for needle in needles if needle))


def numbers(text: str) -> set[str]:
    """The numbers written in digits, without thousands separators and trailing zeros: `1,250.50` is `1250.5`."""
    found = (Decimal(match.replace(",", "")) for match in _NUMBER.findall(fold(text)[0]))
    return {format(number.normalize(), "f") for number in found}


def names(text: str) -> set[str]:
    """Capitalised words in lower case, without words that merely start a sentence (function words, adverbs in -ly)."""
    words = (word for word in _WORD.findall(fold(text)[0]) if word[0].isupper() and len(word) > 1)
    plain = {_without_possessive(word) for word in words}
    return {word for word in plain if word not in _NOT_NAMES and not word.endswith("ly")}


def _without_possessive(word: str) -> str:
    return re.sub(r"['’]s?$", "", word.lower())


def _bigrams(text: str) -> set[str]:
    runs: list[str] = _CJK_RUN.findall(unicodedata.normalize("NFKC", text))
    return {run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))}


def unsupported(text: str, sources: Sequence[str]) -> bool:
    """Whether `text` asserts something that none of `sources` says.

    That is: a number or a name (see `numbers`, `names`) that is in no source; or, in Chinese script, which has no
    capitals, more than half of the pairs of neighbouring characters in no source. A check of words: it takes `four`
    for different from `4`, and a right number in the wrong place for supported.
    """
    joined = "\n".join(sources)
    if numbers(text) - numbers(joined):
        return True
    known = {_without_possessive(word) for word in _WORD.findall(fold(joined)[0])}
    if names(text) - known:
        return True
    pairs = _bigrams(text)
    source_text = unicodedata.normalize("NFKC", joined)
    missing = sum(pair not in source_text for pair in pairs)
    return missing * 2 > len(pairs)
