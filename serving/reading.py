"""The readable part of a completion while it is still being generated.

In: pieces of raw text. Out: pieces of the answer as a person reads it: nothing before the answer mark where the model
writes one (quotes are checked and shown as sources at the end), white space as in the finished answer, no markers, no
escapes. Joined, the pieces and the rest that `end` returns are the text of `serving.answering.readable`; a model that
answers twice has its second answer, which counts, on a line of its own. Not covered: transport.
"""

from __future__ import annotations

import re

from serving.answering import readable
from serving.records import Answer
from serving.strategies import Strategy
from training.format import Labels

_ANSWER = re.compile(r"<ANSWER>\s*[:\uff1a]?|##\s*Answer\s*[:\uff1a]", re.I)
# Where streaming ends, in units: what follows a mark is no part of the answer, and what an escape stands for is known
# only from the whole answer (`training.format.unescape`).
_ENDS = (
    "<ANSWER>",
    "##begin_quote##",
    "##end_quote##",
    ("#", "#", " ?", *"Answer", " ?", "[:\uff1a]"),
    ("#", "#", " ?", *"Reason", " ?", "[:\uff1a]"),
    "&lt;",
    "&#91;",
    "&#65308;",
    "# #",
)


def _begun(units: tuple[str, ...] | str) -> str:
    """A pattern for any beginning of the units."""
    pattern = ""
    for unit in reversed(units[:-1]):
        pattern = f"{unit}(?:{pattern})?" if pattern else unit
    return pattern


_END = re.compile("|".join("".join(units) for units in _ENDS), re.I)
_MAY_END = re.compile("(?:" + "|".join(_begun(units) for units in _ENDS) + r")\Z", re.I)


class AnswerReader:
    """Follows one completion."""

    def __init__(self, strategy: Strategy, labels: Labels) -> None:
        """`strategy` tells whether an answer mark is to be waited for."""
        self._waits = strategy.knows_format
        self._labels = labels
        self._raw = ""
        self._shown = ""

    def push(self, piece: str) -> str:
        """Takes raw text; returns what of the answer may be shown now."""
        self._raw += piece
        body = self._raw
        if self._waits:
            mark = _ANSWER.search(body)
            if mark is None:
                return ""
            body = body[mark.end() :]
        return self._show(_certain(" ".join(body.split())))

    def end(self, answer: Answer) -> str:
        """The rest, when the answer is finished.

        A completion that went on after its answer (a second answer mark) has another answer than was shown: it then
        follows whole, on a line of its own.
        """
        final = readable(answer, self._labels)
        if final.startswith(self._shown):
            return final[len(self._shown) :]
        return "\n\n" + final

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


def _certain(text: str) -> str:
    """Text up to the first mark or escape, or up to what may become one."""
    end = _END.search(text) or _MAY_END.search(text)
    return text[: end.start()].rstrip() if end else text
