"""One question becomes one training row: golden passage, distractors, quote, target.

In: a question, its hits in the index, the chunks of its golden documents. Out: a `RaftSample`, or the reason why
there is none. Plain Python, no Ray: the same question gives the same row whatever the worker or the batch.
Not covered: which questions train (training/splits.py), the search, writing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from retrieval.records import Chunk, Hit, Passage, Question
from training.config import SamplesConfig
from training.format import PromptFormat, find_quote, fold
from training.records import RaftSample

# A line break, or the end of a sentence: a full stop before white space and a capital, a CJK full stop anywhere.
_LINE_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+(?=[\"'“(]?[A-Z])|(?<=[。！？])")
# A number with its sign, thousands separators and decimals: `83,871`, `-0.5`, `2,5`, `1.234.567`. A minus between
# two figures is a range's dash; `1990,2763` and `1,3,5` are lists.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-\u2212])?(?<!\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|(?<!\d,)\d+,\d{1,2}(?![\d,])|\d+)(?:\.\d+)*"
)


@dataclass(frozen=True)
class RowMaker:
    """Makes rows for one corpus, recipe and seed."""

    config: SamplesConfig
    prompt_format: PromptFormat
    seed: int
    chunks_of: Mapping[str, Sequence[Chunk]]
    """Document id to its chunks in order."""
    held_out: frozenset[str]
    """Documents that no training row may show."""
    trainable: Sequence[str] = field(default=())
    """Document ids that random distractors are drawn from, in a fixed order."""

    def raft(self, question: Question, hits: Sequence[Hit]) -> RaftSample | str:
        """A RAFT row, or the reason for none.

        Args:
            question: With at least one golden place.
            hits: What the index finds for it, best first: where distractors are mined, and how the golden chunk is
                chosen when several qualify.
        """
        if not question.answers:
            return "no answer"
        if len(question.answers[0]) > self.config.max_answer_chars:
            return "answer too long"
        golden = self._golden_chunk(question, hits)
        if golden is None:
            return "golden passage not in the index, or held out"
        rng = random.Random(f"{self.seed}/{question.question_id}")
        present = rng.random() < self.config.golden_fraction
        if not present and self.config.without_golden == "drop":
            return "dropped without its golden passage"
        wanted = self.config.distractors + (0 if present else 1)
        distractors = self._distractors(question, Passage.of(golden), hits, wanted, rng)
        shown = [(Passage.of(golden), True)] * present + [(passage, False) for passage in distractors]
        if not shown:
            return "no passage to show"
        rng.shuffle(shown)
        return self._row(question, golden, shown, present)

    def _row(
        self, question: Question, golden: Chunk, shown: Sequence[tuple[Passage, bool]], present: bool
    ) -> RaftSample:
        answer = question.answers[0]
        quote = self.quote(question, golden) if present else ""
        reasoning = str(question.metadata.get("reasoning", "")) if present else ""
        if not present and self.config.without_golden == "abstain":
            answer = self.prompt_format.texts.abstention
        passages = tuple(passage for passage, _ in shown)
        quotes = (quote,) if quote and any(find_quote(quote, p.text) for p in passages) else ()
        return RaftSample(
            sample_id=f"raft-{question.question_id}",
            question_id=question.question_id,
            objective="raft",
            question=question.text,
            passages=passages,
            golden=tuple(is_golden for _, is_golden in shown),
            golden_present=present,
            reasoning=reasoning,
            quotes=quotes,
            answer=answer,
            target=self.prompt_format.target(answer, quotes, reasoning),
            split=question.split,
        )

    def dsf(self, question: Question) -> RaftSample | str:
        """A closed-book row (the paper's DSF): the question and its answer, no passages."""
        if not question.answers:
            return "no answer"
        answer = question.answers[0]
        if len(answer) > self.config.max_answer_chars:
            return "answer too long"
        target = self.prompt_format.target(answer)
        return RaftSample(
            f"dsf-{question.question_id}", question.question_id, "dsf", question.text, (), (), False, "", (), answer,
            target, question.split,
        )  # fmt: skip

    def _golden_chunk(self, question: Question, hits: Sequence[Hit]) -> Chunk | None:
        """The chunk of the golden places that holds the answer; among several, the best ranked, then the first.

        Where no chunk holds the answer verbatim (yes/no, free answers), the best ranked golden chunk.
        """
        ranks = {hit.passage.chunk_id: hit.rank for hit in hits}
        candidates = [
            chunk
            for golden in question.golden
            for chunk in self.chunks_of.get(golden.doc_id, ())
            if golden.matches(chunk) and golden.doc_id not in self.held_out
        ]
        if not candidates:
            return None
        return min(
            candidates,
            key=lambda chunk: (
                not any(mentions(answer, chunk.text) for answer in question.answers[:1]),
                ranks.get(chunk.chunk_id, len(hits) + 1),
                chunk.doc_id,
                chunk.start,
            ),
        )

    def quote(self, question: Question, golden: Chunk) -> str:
        """The shortest sentence of the golden chunk, inside the golden span, that holds the answer; "" if none.

        An answer that a full stop cuts (`St. Petersburg`) is quoted with its whole line.
        """
        spans = [
            (max(g.start, golden.start) - golden.start, min(g.end, golden.end) - golden.start)
            for g in question.golden
            if g.doc_id == golden.doc_id and g.start is not None and g.end is not None and g.matches(golden)
        ] or [(0, len(golden.text))]
        texts = [golden.text[start:end] for start, end in spans]
        for ends in (_SENTENCE_END, _LINE_END):
            pieces = [piece.strip() for text in texts for piece in ends.split(text)]
            holding = [piece for piece in pieces if mentions(question.answers[0], piece)]
            if holding:
                return min(holding, key=len)
        return ""

    def _distractors(
        self, question: Question, golden: Passage, hits: Sequence[Hit], count: int, rng: random.Random
    ) -> list[Passage]:
        mined = self.config.distractor_source != "random"
        pool = [hit.passage for hit in hits] if mined else []
        limit = (count + 1) // 2 if self.config.distractor_source == "mixed" else count
        chosen: list[Passage] = []
        accept = self._acceptable(question, golden, chosen)
        chosen += _take(pool, limit, accept)
        attempts = 0
        while len(chosen) < count and self.trainable and attempts < 50 * count:
            attempts += 1
            chunks = self.chunks_of[self.trainable[rng.randrange(len(self.trainable))]]
            passage = Passage.of(chunks[rng.randrange(len(chunks))])
            if accept(passage):
                chosen.append(passage)
        return chosen

    def _acceptable(self, question: Question, golden: Passage, chosen: list[Passage]) -> Callable[[Passage], bool]:
        """Refuses held-out documents, false negatives (golden, or holding the answer), and texts shown already."""

        def accept(passage: Passage) -> bool:
            return (
                passage.doc_id not in self.held_out
                and not any(place.matches(passage) for place in question.golden)
                and not any(mentions(answer, passage.text) for answer in question.answers)
                and passage.text != golden.text
                and all(passage.text != other.text for other in chosen)
            )

        return accept


def _take(pool: Sequence[Passage], count: int, accept: Callable[[Passage], bool]) -> list[Passage]:
    taken: list[Passage] = []
    for passage in pool:
        if len(taken) == count:
            break
        if accept(passage) and all(passage.text != other.text for other in taken):
            taken.append(passage)
    return taken


def mentions(answer: str, text: str) -> bool:
    """Whether `text` holds `answer` (folded, any case), not as a part of a longer word or number.

    `83` is not in `83,871`, `5.5` not in `15.5%`, `5` neither in `5.5` nor in `-5`; Chinese, Japanese, Korean and Thai
    set no spaces between words, so that there any occurrence counts.
    """
    needle, haystack = fold(answer)[0].casefold(), fold(text)[0].casefold()
    start = haystack.find(needle) if needle else -1
    if start < 0:
        return False
    numbers = [match.span() for match in _NUMBER.finditer(haystack)]
    while start >= 0:
        end = start + len(needle)
        cut = any(low < place < high for low, high in numbers for place in (start, end))
        joined = _joins(haystack[start - 1 : start], needle[0]) or _joins(needle[-1], haystack[end : end + 1])
        if not (cut or joined):
            return True
        start = haystack.find(needle, start + 1)
    return False


def _joins(left: str, right: str) -> bool:
    return _is_word(left) and _is_word(right)


def _is_word(char: str) -> bool:
    """Whether a character is a letter or digit of a script that sets spaces between words."""
    return char.isalnum() and (char < "\u0590" or "\u1e00" <= char < "\u2000")
