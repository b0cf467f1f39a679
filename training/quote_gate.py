"""The quote gate: what a target quotes stands verbatim in a passage that its row shows.

In: quotes as a teacher or a file wrote them, the passages shown, accepted answers. Out: the passages' own characters,
or nothing, and how many quotes were kept, repaired and dropped. A quote is kept where it is verbatim after the folding
of training/format.py; else it becomes the passage's span that is nearest in words, where that is near enough and still
holds an accepted answer that the quote held; else it is dropped. Reasoning is passed with the quotes marked inside it.
Not covered: which sentence is quoted where nobody named one (training/quote_choice.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations_with_replacement

from retrieval.records import Passage
from training.format import BEGIN_QUOTE, END_QUOTE, MARKED_QUOTE, escape, find_quote, fold_text, unescape
from training.passage_match import mentions

# Words in common (difflib's ratio: twice the common ones over all) from which a span is what a quote meant. A word
# changed in every eight passes; a paraphrase does not.
NEAR_ENOUGH = 0.8
# Longer quotes are copies of whole passages, and comparing them costs the product of both lengths.
MOST_WORDS = 200
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\w")
_MARK = re.compile(f"{re.escape(BEGIN_QUOTE)}|{re.escape(END_QUOTE)}", re.I)
# What clings to a word's left as a part of it; closing marks and full stops belong to what stands before.
_PREFIXES = "&-\u2212+~<>$€£¥#(\"'“‘「『"


@dataclass(frozen=True)
class Gated:
    """Quotes that passed, and what became of all. `repaired` of `quotes` were not verbatim as given."""

    quotes: tuple[str, ...]
    repaired: int
    dropped: int


NOTHING_QUOTED = Gated((), 0, 0)


def pass_gate(quotes: Sequence[str], passages: Sequence[Passage], answers: Sequence[str] = ()) -> Gated:
    """Each quote as a passage has it, or dropped; a quote that repeats an earlier one is passed once.

    Args:
        quotes: As written.
        passages: The passages that the row shows, best source first.
        answers: Accepted answers; a repair may not lose the one that a quote held.
    """
    passed: dict[str, bool] = {}
    dropped = 0
    for quote in quotes:
        verbatim = _verbatim(quote, passages)
        found = verbatim or _repaired(quote, passages, answers)
        if found:
            passed.setdefault(found, not verbatim)
        else:
            dropped += 1
    return Gated(tuple(passed), sum(passed.values()), dropped)


def gate_reasoning(reasoning: str, passages: Sequence[Passage], answers: Sequence[str] = ()) -> tuple[str, Gated]:
    """Reasoning whose marked quotes have passed the gate; "" where one did not, for it leans on what nobody sees.

    Text beside its quotes loses what would read as a quote's or an answer's mark.
    """
    quotes = MARKED_QUOTE.findall(reasoning)
    each = [pass_gate([quote], passages, answers) for quote in quotes]
    gated = Gated(
        tuple(dict.fromkeys(quote for one in each for quote in one.quotes)),
        sum(one.repaired for one in each),
        sum(one.dropped for one in each),
    )
    if gated.dropped:
        return "", gated
    parts = MARKED_QUOTE.split(reasoning)
    parts[1::2] = [f"{BEGIN_QUOTE}{one.quotes[0]}{END_QUOTE}" for one in each]
    parts[::2] = [_MARK.sub("", part) for part in parts[::2]]
    return "".join(parts).strip(), gated


def _verbatim(quote: str, passages: Sequence[Passage]) -> str:
    if not _WORD.search(quote):
        return ""
    return next(filter(None, (_cut(quote, passage.text) for passage in passages)), "")


def _cut(quote: str, text: str) -> str:
    """The characters of `text` that are the quote, as written or as the prompt escapes them; "" where it has none."""
    for candidate in dict.fromkeys((quote, unescape(quote))):
        span = find_quote(candidate, text)
        found = text[span[0] : span[1]].strip() if span else ""
        # Where a text mixes markup with its escapes (`<s> &lt;s>`), a target cannot say which one it quotes.
        if found and unescape(escape(found)) == found:
            return found
    return ""


def _repaired(quote: str, passages: Sequence[Passage], answers: Sequence[str]) -> str:
    """The span nearest to a quote that is not verbatim, in the passage that has it; "" where none is near enough."""
    wanted = [match.group() for match in _WORD.finditer(fold_text(quote).casefold())]
    if not 0 < len(wanted) <= MOST_WORDS:
        return ""
    best, score = "", 0.0
    for passage in passages:
        span, near = _nearest(wanted, passage.text)
        if near >= NEAR_ENOUGH and near > score:
            best, score = span, near
    held = [answer for answer in answers if mentions(answer, quote)]
    return best if not held or any(mentions(answer, best) for answer in held) else ""


def _nearest(wanted: Sequence[str], text: str) -> tuple[str, float]:
    """The span of `text` whose words are nearest to `wanted`, and how near: from 0 to 1 for the same words."""
    folded = fold_text(text)
    words = [(match.group().casefold(), *match.span()) for match in _WORD.finditer(folded)]
    common = (Counter(wanted) & Counter(word for word, _, _ in words)).total()
    if 2 * common < NEAR_ENOUGH * (common + len(wanted)):
        return "", 0.0
    matcher = SequenceMatcher(None, [word for word, _, _ in words], wanted, autojunk=False)
    blocks = matcher.get_matching_blocks()[:-1]
    best, score = (0, 0), 0.0
    for first, last in combinations_with_replacement(range(len(blocks)), 2):
        start, end = blocks[first].a, blocks[last].a + blocks[last].size
        matched = sum(block.size for block in blocks[first : last + 1])
        ratio = 2 * matched / (end - start + len(wanted))
        if ratio > score:
            best, score = (start, end), ratio
    if not score:
        return "", 0.0
    start, end = words[best[0]][1], words[best[1] - 1][2]
    while start > 0 and folded[start - 1] in _PREFIXES:
        start -= 1
    while end < len(folded) and not folded[end].isspace() and not folded[end].isalnum():
        end += 1
    return _cut(folded[start:end], text), score
