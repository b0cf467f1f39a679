"""The turn that a follow-up question may refer to.

In: an assistant's message as this server writes it. Out: its own words and the titles of its sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SOURCE = re.compile(r"^\[\d+\] (?P<title>.+?): “", re.M)
_MARK = re.compile(r"\s*\[\d+\]")


@dataclass(frozen=True)
class Earlier:
    """One earlier turn: the question as it stands alone, what was answered, the titles of the documents cited."""

    question: str
    answer: str = ""
    titles: tuple[str, ...] = ()


def read_answer(text: str) -> tuple[str, tuple[str, ...]]:
    """The first line of an assistant's message without marks and notes, and the titles among its sources."""
    titles = tuple(dict.fromkeys(match["title"] for match in _SOURCE.finditer(text)))
    first = text.strip().split("\n", 1)[0][:200]
    return re.sub(r"\s*[(（][^()（）]*[)）]$", "", _MARK.sub("", first)).strip(" .。"), titles
