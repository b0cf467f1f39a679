"""Which passages may be shown beside the golden one, and which of them are.

In: a question, its golden chunk, its hits in the index, the corpus's chunks, the row's own random numbers. Out: that
many distractors, and a count of the candidates refused, by reason. Sources (`samples.distractor_source`):
`mined` (the best hits), `random` (any chunk), `mixed` (half and half), `same_heading` (half of what other documents say
under the golden passage's heading, half mined). Where a source gives too few, random passages and then hits fill up; a
row is never padded with repeats. On the Factbook, whose documents share a form, 0.84 of the best two hits beside the
golden passage are of its own document and 0.16 the same field of another country, which tuned models mistake for it:
mining alone shows the mistake too rarely.

A distractor is never a false negative, for all that is known: it shares no character with a golden place, holds no
accepted answer, and repeats neither the golden passage nor another distractor. An answer that many passages hold by
chance (`yes`, `no`, `2`: see `AnswerTells`) refuses nobody. Held-out documents are never shown.
Not covered: the search, the golden passage (training/passage_match.py), the order of passages (training/raft_rows.py).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from retrieval.records import Chunk, Hit, Passage, Question
from training.config import SamplesConfig
from training.passage_match import is_verdict, may_mention, mentions, nearly_same, touches

# Passages whose share of an answer says whether it is common, and the share from which it is.
SAMPLE_PASSAGES = 200
COMMON_SHARE = 0.1
# Fewer passages than this hold a common answer only by the smallness of the corpus.
COMMON_LEAST = 10
# Random candidates tried per distractor wanted: enough to find one where one in ten may be shown.
TRIES = 50


@dataclass(frozen=True)
class AnswerTells:
    """Whether a passage that holds an answer is likely to answer the question.

    It is not where the answer is a mere verdict (`yes`, `no`, `maybe`), or stands in a tenth or more of a fixed sample
    of the corpus's passages: in PubMedQA's abstracts `no` does, and so does `2`. Refusing all of them would
    leave few distractors, and none that discuss an absence.
    """

    sample: Sequence[str]
    """Texts drawn from the corpus."""
    _known: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _all(self) -> str:
        return "\n".join(self.sample)

    def __call__(self, answer: str) -> bool:
        """Whether holding this answer tells that a passage answers."""
        if answer not in self._known:
            if len(self._known) >= 10_000:
                self._known.clear()
            self._known[answer] = not self._is_common(answer)
        return self._known[answer]

    def _is_common(self, answer: str) -> bool:
        if is_verdict(answer):
            return True
        if may_mention(answer, self._all) < COMMON_LEAST:
            return False
        holding = sum(mentions(answer, text) for text in self.sample)
        return holding >= COMMON_LEAST and holding >= COMMON_SHARE * len(self.sample)


@dataclass(frozen=True)
class DistractorPool:
    """Chooses distractors from one corpus for one recipe and seed; every choice is the row's own rng's."""

    config: SamplesConfig
    seed: int
    chunks_of: Mapping[str, Sequence[Chunk]]
    """Document id to its chunks in order."""
    held_out: frozenset[str]
    """Documents that no training row may show."""
    trainable: Sequence[str]
    """Document ids that random distractors are drawn from, in a fixed order."""

    def choose(
        self,
        question: Question,
        golden: Chunk | None,
        hits: Sequence[Hit],
        count: int,
        rng: random.Random,
        tally: Counter[str],
    ) -> list[Passage]:
        """`count` distractors (fewer only where the corpus has no more), hardest first.

        Args:
            question: None of its golden places is shown.
            golden: The golden passage; none where the question has no answer.
            hits: What the index finds for the question, best first.
            count: How many are wanted.
            rng: The row's own.
            tally: Counts `distractor: <reason>` for each candidate refused.
        """
        chosen: list[Passage] = []
        seen: set[str] = set()
        fault = self._judge(question, golden, chosen)

        def take(candidates: Iterator[Passage], most: int) -> None:
            enough = min(count, len(chosen) + most)
            while len(chosen) < enough and (passage := next(candidates, None)):
                if passage.chunk_id in seen:
                    continue
                seen.add(passage.chunk_id)
                if reason := fault(passage):
                    tally[f"distractor: {reason}"] += 1
                else:
                    chosen.append(passage)

        mined = (hit.passage for hit in hits)
        heading = golden.heading if golden else ""
        for source, share in self._shares(count, rng):
            if source == "mined":
                take(mined, share)
            elif source == "same_heading":
                take(self._under(heading, share, rng), share)
            else:
                take(self._drawn(share, rng), share)
        take(self._drawn(count - len(chosen), rng), count)
        take(mined, count)
        return chosen

    def _shares(self, count: int, rng: random.Random) -> list[tuple[str, int]]:
        """Sources in order with how many each gives; of an odd number, either half may be the larger."""
        source = self.config.distractor_source
        if source in ("mined", "random"):
            return [(source, count)]
        half = count // 2 + (rng.random() < 0.5) * (count % 2)
        if source == "mixed":
            return [("mined", half), ("random", count - half)]
        return [("same_heading", half), ("mined", count)]

    def _drawn(self, wanted: int, rng: random.Random) -> Iterator[Passage]:
        """Passages of documents drawn from the seed; the same one may come again."""
        for _ in range(TRIES * wanted if self.trainable else 0):
            chunks = self.chunks_of[self.trainable[rng.randrange(len(self.trainable))]]
            yield Passage.of(chunks[rng.randrange(len(chunks))])

    def _under(self, heading: str, wanted: int, rng: random.Random) -> Iterator[Passage]:
        """Passages under a heading, in an order drawn from the seed."""
        places = self._by_heading.get(heading, []) if heading else []
        for drawn in rng.sample(range(len(places)), min(len(places), TRIES * wanted)):
            document, number = places[drawn]
            yield Passage.of(self.chunks_of[self.trainable[document]][number])

    @cached_property
    def _by_heading(self) -> Mapping[str, list[tuple[int, int]]]:
        """Heading to its chunks, as (number of the document in `trainable`, number of the chunk in it): the texts of
        the whole corpus would not fit."""
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for document, doc_id in enumerate(self.trainable):
            for number, chunk in enumerate(self.chunks_of[doc_id]):
                if chunk.heading:
                    places[chunk.heading].append((document, number))
        return places

    @cached_property
    def tells(self) -> AnswerTells:
        """Which answers tell a false negative in this corpus."""
        rng = random.Random(f"{self.seed}/common answers")
        drawn = {
            passage.chunk_id: passage.text for passage in islice(self._drawn(SAMPLE_PASSAGES, rng), SAMPLE_PASSAGES)
        }
        return AnswerTells(tuple(drawn.values()))

    def _judge(self, question: Question, golden: Chunk | None, chosen: Sequence[Passage]) -> Callable[[Passage], str]:
        """A function that says why a passage may not be shown; "" where it may."""
        telling = [answer for answer in question.answers if self.tells(answer)]
        threshold = self.config.near_duplicate

        def fault(passage: Passage) -> str:
            if passage.doc_id in self.held_out:
                return "held-out document"
            if any(touches(place, passage) for place in question.golden):
                return "golden place"
            if golden is not None and nearly_same(golden.text, passage.text, threshold):
                return "near-duplicate of the golden passage"
            if any(mentions(answer, passage.text) for answer in telling):
                return "holds the answer"
            if any(nearly_same(other.text, passage.text, threshold) for other in chosen):
                return "near-duplicate of a passage shown"
            return ""

        return fault
