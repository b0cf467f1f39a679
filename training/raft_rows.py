"""One question becomes one training row: golden passage, distractors, reasoning, quotes, target.

In: a question, its hits in the index, the chunks of its golden documents. Out: a `RaftSample`, or the reason why
there is none, and counts of what was refused on the way. Plain Python, no Ray. A row follows from the recipe, the
seed, the corpus and the question alone: it is the same whatever the worker, the block or the order.
Not covered: which questions train (training/splits.py), which passages may be distractors (training/distractors.py),
what may be quoted (training/quote_choice.py, training/quote_gate.py), the search, writing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from retrieval.records import Chunk, Hit, Passage, Question
from training.config import SamplesConfig
from training.distractors import DistractorPool
from training.format import MARKED_QUOTE, PromptFormat
from training.passage_match import golden_chunk, golden_chunks, mentions
from training.quote_choice import choose_quote
from training.quote_gate import NOTHING_QUOTED, Gated, gate_reasoning, pass_gate
from training.records import RaftSample


@dataclass(frozen=True)
class Supported:
    """What a target says, every quote in it having passed the gate."""

    answer: str
    quotes: tuple[str, ...] = ()
    reasoning: str = ""


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

    @cached_property
    def _pool(self) -> DistractorPool:
        return DistractorPool(self.config, self.seed, self.chunks_of, self.held_out, self.trainable)

    def raft(self, question: Question, hits: Sequence[Hit], tally: Counter[str] | None = None) -> RaftSample | str:
        """A RAFT row, or the reason for none.

        Args:
            question: Answerable with a golden place, or known to be unanswerable: then the row shows distractors alone
                and teaches the abstention.
            hits: What the index finds for it, best first: where distractors are mined, and how the golden chunk is
                chosen when several qualify.
            tally: Counts `distractor: <reason>` per candidate refused, `quote: kept|repaired|dropped` per quote,
                `quote: none` and `short of distractors` per row, `reasoning: dropped with its quote`.
        """
        tally = Counter() if tally is None else tally
        golden = None if question.unanswerable else self._golden(question, hits)
        if isinstance(golden, str):
            return golden
        rng = random.Random(f"{self.seed}/{question.question_id}")
        present = rng.random() < self.config.golden_fraction and golden is not None
        if golden is not None and not present and self.config.without_golden == "drop":
            return "dropped without its golden passage"
        # A row without its golden passage shows one distractor more: the number of passages betrays nothing.
        wanted = rng.randint(*self.config.distractor_range) + (not present)
        distractors = self._pool.choose(question, golden, hits, wanted, rng, tally)
        shown = [(Passage.of(golden), True)] if golden is not None and present else []
        shown += [(passage, False) for passage in distractors]
        if not shown:
            return "no passage to show"
        tally["short of distractors"] += len(distractors) < wanted
        rng.shuffle(shown)
        return self._row(question, golden, shown, present, tally)

    def dsf(self, question: Question) -> RaftSample | str:
        """A closed-book row (the paper's DSF): the question and its answer alone.

        It never has quotes or reasoning: there is no passage to reason from, and reasoning written from one would be
        taught as knowledge.
        """
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

    def _golden(self, question: Question, hits: Sequence[Hit]) -> Chunk | str:
        """The golden chunk of a question with answers, or the reason why it gives no row."""
        if not question.answers:
            return "no answer"
        if len(question.answers[0]) > self.config.max_answer_chars:
            return "answer too long"
        if not question.golden:
            return "no golden place"
        places = golden_chunks(question, self.chunks_of)
        allowed = [chunk for chunk in places if chunk.doc_id not in self.held_out]
        chunk = golden_chunk(question, hits, allowed)
        if chunk is None:
            return "golden passage held out" if places else "golden passage not in the index"
        return chunk

    def _row(
        self,
        question: Question,
        golden: Chunk | None,
        shown: Sequence[tuple[Passage, bool]],
        present: bool,
        tally: Counter[str],
    ) -> RaftSample:
        passages = tuple(passage for passage, _ in shown)
        says = self._supported(question, golden, passages, present, tally)
        target = self.prompt_format.target(says.answer, says.quotes, says.reasoning)
        unseen = [c for c in self.prompt_format.parse(target, passages).citations if not c.verified]
        assert not unseen, f"raft-{question.question_id} quotes what none of its passages says"
        return RaftSample(
            sample_id=f"raft-{question.question_id}",
            question_id=question.question_id,
            objective="raft",
            question=question.text,
            passages=passages,
            golden=tuple(is_golden for _, is_golden in shown),
            golden_present=present,
            reasoning=says.reasoning,
            quotes=says.quotes,
            answer=says.answer,
            target=target,
            split=question.split,
        )

    def _supported(
        self,
        question: Question,
        golden: Chunk | None,
        passages: Sequence[Passage],
        present: bool,
        tally: Counter[str],
    ) -> Supported:
        """The answer, with quotes and reasoning where the golden passage is shown and the recipe wants them."""
        if golden is None or (not present and self.config.without_golden == "abstain"):
            return Supported(self.prompt_format.texts.abstention)
        held = (answer for answer in question.answers if mentions(answer, golden.text))
        answer = next(held, question.answers[0])  # as the passage words it, where it words one of the accepted
        if not present:
            return Supported(answer)
        best_first = sorted(passages, key=lambda passage: passage.chunk_id != golden.chunk_id)
        reasoning, inside = self._reasoning(question, best_first)
        supported = any(mentions(answer, quote) for quote in inside.quotes)
        beside = NOTHING_QUOTED if supported else self._quotes(question, answer, golden, best_first)
        repaired = inside.repaired + beside.repaired
        tally["quote: kept"] += len(inside.quotes) + len(beside.quotes) - repaired
        tally["quote: repaired"] += repaired
        tally["quote: dropped"] += inside.dropped + beside.dropped
        tally["quote: none"] += not (inside.quotes or beside.quotes)
        tally["reasoning: dropped with its quote"] += inside.dropped > 0
        return Supported(answer, beside.quotes, reasoning)

    def _reasoning(self, question: Question, passages: Sequence[Passage]) -> tuple[str, Gated]:
        """The question's reasoning, and the quotes inside it; where quotes are off, their words without the marks."""
        given = str(question.metadata.get("reasoning") or "").strip()
        if not (given and self.prompt_format.reasoning):
            return "", NOTHING_QUOTED
        reasoning, gated = gate_reasoning(given, passages, question.answers)
        if self.prompt_format.quotes:
            return reasoning, gated
        return MARKED_QUOTE.sub(r"\1", reasoning), Gated((), 0, gated.dropped)

    def _quotes(self, question: Question, answer: str, golden: Chunk, passages: Sequence[Passage]) -> Gated:
        """The quote that the question brings, or else the sentence that supports the answer."""
        if not self.prompt_format.quotes:
            return NOTHING_QUOTED
        given = str(question.metadata.get("quote") or "").strip()
        gated = pass_gate([given] if given else [], passages, question.answers)
        if gated.quotes:
            return gated
        reasoning = str(question.metadata.get("reasoning") or "")
        chosen = choose_quote(question, answer, reasoning, golden)
        found = pass_gate([chosen] if chosen else [], passages)
        return Gated(found.quotes, found.repaired, found.dropped + gated.dropped)
