"""Choosing the next token, and turning tokens into text piece by piece.

In: logits, generated token ids. Out: the next token of each row, and text that may be shown at once: whole
characters, and nothing that may turn out to be part of a stop string. Not covered: running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character whose rest has not come yet


class TextAssembler:
    """The text of one row as its tokens arrive."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], *, incremental: bool) -> None:
        """`incremental` decodes at every token; without it, and without stop strings, only `finish` decodes."""
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._incremental = incremental or bool(self._stop)
        self._emitted = 0
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one token; returns the text that may be shown now, and sets `stopped` when a stop string came."""
        self.tokens.append(token)
        if not self._incremental:
            return ""
        self._update()
        if self.stopped:
            return self._emit(len(self.text))
        return self._emit(len(self.text.rstrip(_INCOMPLETE)) - self._held_back())

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        if not self.stopped:
            self._update()
        return self._emit(len(self.text))

    @property
    def text_tokens(self) -> int:
        """Tokens that the text takes: those of a stop string are not counted, unless one holds the text's end, too."""
        count = len(self.tokens)
        while self.stopped and count and self._decode(self.tokens[: count - 1]).startswith(self.text):
            count -= 1
        return count

    def _update(self) -> None:
        self.text = self._decode(self.tokens)
        found = [place for place in (self.text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        text = self.text.rstrip(_INCOMPLETE)
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _emit(self, end: int) -> str:
        piece = self.text[self._emitted : max(end, self._emitted)]
        self._emitted = max(end, self._emitted)
        return piece


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token from one row of logits (vocabulary,), on CPU so that a seed means the same on every device.

    Nucleus sampling: the smallest set of most likely tokens whose probability reaches `top_p`
    (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
    """
    import torch

    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(0) - ordered >= top_p
        outside[0] = False  # top_p 0 still leaves the most likely token
        kept = ordered.masked_fill(outside, 0.0)
        return int(indices[torch.multinomial(kept, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
