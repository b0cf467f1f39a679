"""The readable part of a completion while it is still being generated.

In: pieces of raw text. Out: pieces of the answer as a person reads it: nothing before the answer mark where the model
writes one (quotes are checked and shown as sources at the end), white space as in the finished answer, no markers.
Joined, the pieces and the rest that `end` returns are the text of `serving.answering.readable`.
Not covered: transport.
"""

from __future__ import annotations

from serving.answering import readable
from serving.records import Answer
from serving.strategies import Strategy
from training.format import ANSWER_MARK, BEGIN_QUOTE, END_QUOTE, Labels

_MARKERS = (ANSWER_MARK, BEGIN_QUOTE, END_QUOTE, "##Answer", "##Reason")


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
            if ANSWER_MARK not in body:
                return ""
            body = body.split(ANSWER_MARK, 1)[1]
        return self._show(" ".join(_before_markers(body).split()))

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


def _before_markers(text: str) -> str:
    """Text up to the first marker, or up to what may become one."""
    places = [text.find(marker) for marker in _MARKERS]
    end = min((place for place in places if place >= 0), default=len(text))
    text = text[:end]
    for length in range(min(len(text), max(map(len, _MARKERS))), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in _MARKERS):
            return text[:-length]
    return text
