"""What a question wants: its intent, recognised by keywords or by a trained classifier.

In: the question, and its embedding where there is one. Out: a `Guess`. Without labelled intents the task tiers of the
recipe's keywords are all there is; a trained classifier (`rayft train router`) takes their place.
Imports no torch, ray or faiss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from training.format import fold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Guess:
    """The likeliest intent; `intent` is empty where it is not known well enough."""

    intent: str
    confidence: float
    label: str = ""
    """The likeliest intent even where it is not known well enough."""
    how: str = ""
    """How it was recognised, for the route's reason."""


UNKNOWN = Guess("", 0.0)


class IntentClassifier(Protocol):
    """Recognises intents; trained by `rayft train router`."""

    intents: tuple[str, ...]
    """The intents that it can tell apart."""
    needs_embedding: bool
    """Whether it reads the query embedding, rather than the text alone."""

    def classify(self, text: str, embedding: npt.NDArray[np.float32] | None) -> Guess:
        """The intent of a question; `embedding` is (dim,) float32, of unit length."""
        ...


class KeywordIntents:
    """The intent whose keywords stand in the question most often."""

    needs_embedding = False

    def __init__(self, intents: Mapping[str, tuple[str, ...]]) -> None:
        """`intents` names the keywords that reveal each."""
        self.intents = tuple(intents)
        self._patterns = {intent: {word: keyword(word) for word in words} for intent, words in intents.items()}

    def classify(self, text: str, embedding: npt.NDArray[np.float32] | None = None) -> Guess:
        """The intent with most matching keywords (of several, the first), and its share of all matches."""
        folded = folded_text(text)
        matches = {
            intent: tuple(word for word, pattern in patterns.items() if pattern.search(folded))
            for intent, patterns in self._patterns.items()
        }
        total = sum(map(len, matches.values()))
        if not total:
            return UNKNOWN
        best = max(matches, key=lambda intent: len(matches[intent]))
        words = ", ".join(f"“{word}”" for word in matches[best])
        return Guess(best, len(matches[best]) / total, best, f"recognised by {words}")


def folded_text(text: str) -> str:
    """Lower case without differences of width or composition, as keywords are compared."""
    return fold(text)[0].casefold()


def keyword(word: str) -> re.Pattern[str]:
    """Whole words where the script has spaces, anywhere in the text where it has none."""
    folded = folded_text(word)
    escaped = re.escape(folded)
    return re.compile(escaped if _CJK.search(folded) else rf"(?<!\w){escaped}(?!\w)")
