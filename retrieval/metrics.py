"""Retrieval metrics: what a ranking of passages is worth, per question, and means with bootstrap intervals.

In: questions with golden places, the hits found for each, grades where the judgements are graded. Out: plain numbers
and (n_questions,) arrays. Recall, MRR, nDCG and MAP are trec_eval's, through ir-measures.

What is ranked follows the golden places of the question:
- **whole documents** (BEIR's qrels): documents, each at the rank of its best passage, as BEIR and MTEB do;
- **spans**: passages; one is relevant when `Golden.matches`. A second passage that holds the same span is passed over,
  and spans that one passage holds together count as one, so chunk size and overlap do not move the ceiling.
A span that no passage holds for more than half of its length stays a miss. Not covered: reading qrels (`questions.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import UserError
from retrieval.records import Golden, Hit, Passage, Question

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]  # (n_questions,)

LEVEL = 0.95
MRR_DEPTH = 10  # MS MARCO's depth
NDCG_DEPTH = 10  # BEIR's
_DRAWS_PER_BLOCK = 4_000_000  # cells of the resampling matrix drawn at once: 32 MB


def recall_at_k(questions: Sequence[Question], hits: Sequence[Sequence[Hit]], k: int) -> float:
    """Mean over questions of the share of golden places that the first k hits hold (`Golden.matches`).

    Questions without golden places are left out.

    Raises:
        UserError: no question has a golden place.
    """
    recalls = [
        sum(any(golden.matches(hit.passage) for hit in found[:k]) for golden in question.golden) / len(question.golden)
        for question, found in zip(questions, hits, strict=True)
        if question.golden
    ]
    if not recalls:
        raise UserError("questions.path: no question names a golden document, so recall cannot be measured")
    return sum(recalls) / len(recalls)


@dataclass(frozen=True)
class Ranking:
    """One question's ranked items, best first and each once, and what they are worth."""

    grades: Mapping[str, int]
    """Golden item to its grade, at least 1."""
    items: tuple[str, ...]
    """Documents, golden spans and other passages found, each at its best rank."""
    first_golden: int | None
    """Rank (from 1) of the first passage that holds a golden place; none where no passage found does."""


def rank_items(
    question: Question, found: Mapping[str, Sequence[Hit]], grades: Mapping[str, int] | None = None
) -> dict[str, Ranking]:
    """Each search mode's ranking for one question (see the module's text for what is ranked).

    Args:
        question: With golden places.
        found: Mode to its hits, best first.
        grades: Document to its graded judgement (BEIR qrels); none: every golden place has grade 1. A golden place of
            grade 0 or less is judged and not relevant.
    """
    graded = {place: 1 if grades is None else grades.get(place.doc_id, 1) for place in question.golden}
    golden = [place for place, grade in graded.items() if grade > 0]
    whole_documents = all(place.start is None for place in question.golden)
    passages = {hit.passage.chunk_id: hit.passage for hits in found.values() for hit in hits}
    item_of_place = _group_places(golden, passages.values())
    worth: dict[str, int] = {}
    for place, item in item_of_place.items():
        worth[item] = max(worth.get(item, 0), graded[place])
    item_of_chunk = {
        chunk_id: _item(passage, golden, item_of_place, whole_documents) for chunk_id, passage in passages.items()
    }
    rankings = {}
    for mode, hits in found.items():
        items = [item_of_chunk[hit.passage.chunk_id] for hit in hits]
        first = next((rank for rank, item in enumerate(items, start=1) if item in worth), None)
        rankings[mode] = Ranking(worth, tuple(dict.fromkeys(items)), first)
    return rankings


def _group_places(golden: Sequence[Golden], passages: Iterable[Passage]) -> dict[Golden, str]:
    """Golden place to the name of its item; places that one passage holds together share one."""
    group = {place: place for place in golden}

    def root(place: Golden) -> Golden:
        while group[place] != place:
            place = group[place]
        return place

    for passage in passages:
        held = [place for place in golden if place.matches(passage)]
        for other in held[1:]:
            group[root(other)] = root(held[0])
    return {place: _place_name(root(place)) for place in golden}


def _place_name(place: Golden) -> str:
    return f"document {place.doc_id}" if place.start is None else f"span {place.start} {place.end} {place.doc_id}"


def _item(
    passage: Passage, golden: Sequence[Golden], item_of_place: Mapping[Golden, str], whole_documents: bool
) -> str:
    place = next((place for place in golden if place.matches(passage)), None)
    if place is not None:
        return item_of_place[place]
    return f"document {passage.doc_id}" if whole_documents else f"chunk {passage.chunk_id}"


def measure_names(ks: Sequence[int], depth: int) -> list[str]:
    """The measures in the order in which they are shown; `depth` is the number of passages searched for MAP."""
    recalls = [f"recall@{k}" for k in ks]
    return [*recalls, f"MRR@{MRR_DEPTH}", f"nDCG@{NDCG_DEPTH}", f"MAP@{depth}", *(f"success@{k}" for k in ks)]


def measure(rankings: Sequence[Ranking], ks: Sequence[int], depth: int) -> dict[str, Values]:
    """Every measure of each question, (n_questions,) float64, by the names of `measure_names`.

    `recall@k`, `MRR@10`, `nDCG@10` (gain = grade) and `MAP` rank the items of `Ranking`. `success@k` is 1 where one of
    the first k *passages* holds a golden place: what a prompt of k passages gets, and 1 minus it is the misses at k.
    Questions with fewer hits than k are scored on what they have.
    """
    import ir_measures
    import numpy as np

    qrels = {str(place): dict(ranking.grades) for place, ranking in enumerate(rankings)}
    # trec_eval sorts by score and breaks ties by name: a falling score keeps the ranking as it was found.
    run = {str(place): _scores(ranking.items) for place, ranking in enumerate(rankings)}
    # The provider takes trec_eval's recip_rank, which has no cut-off: the run is cut instead.
    short = {str(place): _scores(ranking.items[:MRR_DEPTH]) for place, ranking in enumerate(rankings)}
    at_full = {f"recall@{k}": ir_measures.R @ k for k in ks}
    at_full |= {f"nDCG@{NDCG_DEPTH}": ir_measures.nDCG @ NDCG_DEPTH, f"MAP@{depth}": ir_measures.AP @ depth}
    values = {name: np.zeros(len(rankings)) for name in measure_names(ks, depth)}
    for scored, measures in ((run, at_full), (short, {f"MRR@{MRR_DEPTH}": ir_measures.RR})):
        names = {wanted: name for name, wanted in measures.items()}
        for found in ir_measures.pytrec_eval.iter_calc(list(names), qrels, scored):
            values[names[found.measure]][int(found.query_id)] = found.value
    first = np.array([ranking.first_golden or np.inf for ranking in rankings], dtype=np.float64)
    return values | {f"success@{k}": (first <= k).astype(np.float64) for k in ks}


def _scores(items: Sequence[str]) -> dict[str, float]:
    return {item: float(len(items) - place) for place, item in enumerate(items)}


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, its 95% interval and the number of questions behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(columns: Mapping[str, Values], resamples: int, seed: int) -> dict[str, Estimate]:
    """Mean and percentile interval of each column of (n_questions,) values; all columns see the same resamples.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. Differences of two modes on the same
    questions, given as a column, are thereby paired.
    """
    import numpy as np

    table = np.column_stack(list(columns.values()))  # (n_questions, n_columns) float64
    n = len(table)
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_PER_BLOCK // n)
    means = [
        generator.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start)) @ table / n
        for start in range(0, resamples, rows)
    ]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    whole = table.mean(axis=0)
    return {
        name: Estimate(float(whole[place]), float(low[place]), float(high[place]), n)
        for place, name in enumerate(columns)
    }
