"""What the retriever is trained on: rows of a question, its golden passage and hard negatives, and their batches.

In: questions with their hits in the index, the index's chunks. Out: `TrainingRow`s, the same whatever the number of
workers, and a plan of batches. Plain Python, no Ray, no torch.

A negative is never a false one: no passage that shares characters with a golden place of the question, holds one of
its accepted answers, or nearly repeats its golden passage; and none that the encoder scores close to or above the
golden passage where `retriever.relative_margin` says so (NV-Retriever's TopK-PercPos, arXiv 2407.15831). Held-out
documents are no negatives either: as mere negatives they would be pushed away from every question, and the measured
recall on new documents would be that of documents trained against.
Not covered: splitting into training and test (training/splits.py), the search, the loss.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.records import Record
from retrieval.chunking import embedding_text
from retrieval.records import Chunk, Hit, Passage, Question
from training.config import RetrieverTraining
from training.format import fold_text
from training.passage_match import golden_chunk, golden_chunks, mentions, nearly_same, same_text, touches


@dataclass(frozen=True)
class TrainingRow(Record):
    """A question, its golden passage, and as many hard negatives as every other row has."""

    question_id: str
    query: str
    positive: str
    """Text of the golden passage, as the encoder reads it (`embedding_text`)."""
    negatives: tuple[str, ...]
    passage_ids: tuple[str, ...]
    """Chunk ids of the golden passage and of the negatives."""
    shunned: tuple[str, ...]
    """Chunk ids that are golden, or false negatives, for this question: they may not stand in its batch."""
    mined: int
    """How many of the negatives the index found; the others were drawn at random."""


def split_validation(
    questions: Sequence[Question], fraction: float, seed: int
) -> tuple[list[Question], list[Question], frozenset[str]]:
    """Training questions apart from those of documents held back for validation: training, validation, documents.

    Documents are drawn from the seed until their questions are about `fraction` of all. A question about documents of
    both sides is left out. A single document leaves nothing for validation.
    """
    by_document = Counter(golden.doc_id for question in questions for golden in question.golden)
    documents = sorted(by_document)
    random.Random(f"{seed}/validation").shuffle(documents)
    held: set[str] = set()
    wanted, held_questions = fraction * sum(by_document.values()), 0
    for document in documents[:-1]:
        if held and held_questions + by_document[document] / 2 > wanted:
            break
        held.add(document)
        held_questions += by_document[document]
    places = [{golden.doc_id for golden in question.golden} for question in questions]
    training = [question for question, named in zip(questions, places, strict=True) if named and not named & held]
    validation = [question for question, named in zip(questions, places, strict=True) if named and named <= held]
    return training, validation, frozenset(held)


@dataclass(frozen=True)
class RowMiner:
    """Makes training rows for one index, recipe and seed."""

    config: RetrieverTraining
    seed: int
    chunks_of: Mapping[str, Sequence[Chunk]]
    """Document id to its chunks in order."""
    held_out: frozenset[str]
    """Documents whose passages may be no negatives."""

    def row(self, question: Question, hits: Sequence[Hit]) -> TrainingRow | str:
        """The row of a question, or the reason why it has none.

        Args:
            question: With golden places.
            hits: What the index finds for it, best first, by cosine similarity where the margin is to apply.
        """
        places = golden_chunks(question, self.chunks_of)
        golden = golden_chunk(question, hits, places)
        if golden is None:
            return "golden passage not in the index"
        false = [hit.passage for hit in hits if is_false_negative(question, golden, hit.passage, self.config)]
        shunned = {passage.chunk_id for passage in false}
        shunned |= {chunk.chunk_id for chunk in places}
        allowed = [
            hit.passage
            for hit in self._within_margin(golden, hits)
            if hit.passage.chunk_id not in shunned and hit.passage.doc_id not in self.held_out
        ]
        mined = _distinct(allowed)[: self.config.hard_negatives]
        chosen = [*mined, *self._drawn(question, golden, mined)]
        if len(chosen) < self.config.hard_negatives:
            return "too few passages that are no false negatives"
        passages = [Passage.of(golden), *chosen]
        texts = [embedding_text(passage.title, passage.heading, passage.text) for passage in passages]
        ids = tuple(passage.chunk_id for passage in passages)
        return TrainingRow(
            question.question_id, question.text, texts[0], tuple(texts[1:]), ids, tuple(sorted(shunned)), len(mined)
        )

    def _within_margin(self, golden: Chunk, hits: Sequence[Hit]) -> Sequence[Hit]:
        """Hits that score at most `relative_margin` times what the golden passage does; all where it was not found."""
        scores = [hit.score for hit in hits if hit.passage.chunk_id == golden.chunk_id]
        if self.config.relative_margin is None or not scores:
            return hits
        highest = scores[0] * self.config.relative_margin
        return [hit for hit in hits if hit.score <= highest]

    def _drawn(self, question: Question, golden: Chunk, mined: Sequence[Passage]) -> list[Passage]:
        """Random passages where the index gave too few, drawn from the seed and the question's id."""
        wanted = self.config.hard_negatives - len(mined)
        documents = sorted(self.chunks_of.keys() - self.held_out) if wanted else []
        rng = random.Random(f"{self.seed}/{question.question_id}/negatives")
        drawn: list[Passage] = []
        for _ in range(50 * wanted if documents else 0):
            chunks = self.chunks_of[documents[rng.randrange(len(documents))]]
            passage = Passage.of(chunks[rng.randrange(len(chunks))])
            fresh = not any(same_text(passage.text, other.text) for other in (*mined, *drawn))
            if fresh and not is_false_negative(question, golden, passage, self.config):
                drawn.append(passage)
            if len(drawn) == wanted:
                break
        return drawn


def is_false_negative(question: Question, golden: Chunk, passage: Passage, config: RetrieverTraining) -> bool:
    """Whether a passage may answer the question, for all that is known: see the module's text."""
    return (
        any(touches(place, passage) for place in question.golden)
        or any(mentions(answer, passage.text) for answer in question.answers)
        or nearly_same(golden.text, passage.text, config.near_duplicate)
    )


def _distinct(passages: Sequence[Passage]) -> list[Passage]:
    """The passages without those whose text an earlier one has."""
    return list({fold_text(passage.text): passage for passage in reversed(passages)}.values())[::-1]


def plan_batches(rows: Sequence[TrainingRow], batch_rows: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of each step: every row once per epoch, in seeded order, without false negatives inside a batch.

    A row joins a batch only when none of its passages is golden or shunned for a row of the batch, nor the other way
    round, and no question stands there twice; otherwise it waits for the next. (sentence-transformers' NO_DUPLICATES
    compares texts alone, and also parts rows that share a hard negative, which does no harm.)
    A last batch below half of the size is dropped where the epoch has another: its few in-batch negatives would make a
    step of another kind.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}/batches").shuffle(order)
        batches: list[list[int]] = []
        while order:
            batch, order = _fill(rows, order, batch_rows)
            batches.append(batch)
        steps += [batch for batch in batches if 2 * len(batch) >= batch_rows] or batches
    return steps


def _fill(rows: Sequence[TrainingRow], order: Sequence[int], batch_rows: int) -> tuple[list[int], list[int]]:
    batch: list[int] = []
    waiting: list[int] = []
    shown: set[str] = set()  # questions, and ids and texts of passages in the batch
    shunned: set[str] = set()
    for place, number in enumerate(order):
        if len(batch) == batch_rows:
            return batch, [*waiting, *order[place:]]
        row = rows[number]
        content = {row.query, row.positive, *row.negatives, *row.passage_ids}
        refused = {row.query, row.positive, *row.shunned}
        if refused & shown or shunned & content:
            waiting.append(number)
        else:
            batch.append(number)
            shown |= content
            shunned |= refused
    return batch, waiting


def by_document(chunks: Iterator[Chunk] | Sequence[Chunk]) -> dict[str, list[Chunk]]:
    """Document id to its chunks, in the index's order."""
    grouped: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        grouped[chunk.doc_id].append(chunk)
    return dict(grouped)
