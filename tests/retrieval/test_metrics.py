import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster.errors import UserError
from retrieval.metrics import Ranking, bootstrap, measure, measure_names, rank_items, recall_at_k
from retrieval.records import Golden, Hit, Passage, Question


def hit(doc_id: str, start: int = 0, end: int = 10) -> Hit:
    return Hit(Passage(f"{doc_id}{start}", doc_id, "", "", "", "x" * (end - start), start, end), 1.0, 1)


QUESTIONS = [
    Question("q1", "?", golden=(Golden("a"),)),
    Question("q2", "?", golden=(Golden("a", 12, 20), Golden("b"))),
    Question("q3", "?"),
]
HITS = [[hit("b"), hit("a")], [hit("a", 10, 17), hit("c"), hit("b")], [hit("z")]]


@pytest.mark.parametrize(("k", "recall"), [(1, (0 + 0.5) / 2), (2, (1 + 0.5) / 2), (3, (1 + 1) / 2)])
def test_recall_at_k_is_the_mean_share_of_golden_places_found(k: int, recall: float) -> None:
    assert recall_at_k(QUESTIONS, HITS, k) == recall


def test_recall_at_k_without_golden_places_is_refused() -> None:
    with pytest.raises(UserError, match=r"^questions\.path: no question names a golden document"):
        recall_at_k(QUESTIONS[2:], HITS[2:], 1)


def values(question: Question, hits: Sequence[Hit], grades: dict[str, int] | None = None) -> dict[str, float]:
    measured = measure([rank_items(question, {"m": hits}, grades)["m"]], (1, 3), 100)
    assert list(measured) == measure_names((1, 3), 100)
    return {name: float(column[0]) for name, column in measured.items()}


def test_whole_documents_rank_by_their_best_passage_and_success_counts_passages() -> None:
    question = Question("q", "?", golden=(Golden("a"), Golden("b")))
    found = values(question, [hit("x"), hit("x", 10, 20), hit("a"), hit("a", 10, 20), hit("b")])
    # documents: x, a, b; the first golden passage stands third
    assert found["recall@1"] == 0
    assert found["recall@3"] == 1
    assert found["MRR@10"] == 0.5
    assert found["MAP@100"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["nDCG@10"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))
    assert (found["success@1"], found["success@3"]) == (0, 1)


def test_a_document_keeps_its_best_rank_when_it_is_found_again() -> None:
    found = values(Question("q", "?", golden=(Golden("a"),)), [hit("a"), hit("x"), hit("a", 10, 20)])
    assert (found["MRR@10"], found["recall@1"]) == (1, 1)


def test_spans_rank_passages_and_other_passages_of_the_document_do_not_count() -> None:
    question = Question("q", "?", golden=(Golden("a", 40, 50),))
    found = values(question, [hit("a", 0, 30), hit("a", 30, 44), hit("a", 44, 60), hit("b")])
    assert found["MRR@10"] == pytest.approx(1 / 3)  # 44 to 50 is more than half of the span
    assert (found["recall@1"], found["recall@3"]) == (0, 1)
    assert found["nDCG@10"] == pytest.approx(1 / math.log2(4))


def test_a_span_held_by_two_overlapping_passages_counts_once() -> None:
    question = Question("q", "?", golden=(Golden("a", 10, 14), Golden("b", 0, 4)))
    found = values(question, [hit("a", 0, 20), hit("a", 8, 30), hit("b", 0, 20)])
    assert found["MAP@100"] == 1  # the second passage is passed over: b stands second
    assert found["recall@1"] == 0.5


def test_spans_held_by_one_passage_count_as_one() -> None:
    question = Question("q", "?", golden=(Golden("a", 0, 4), Golden("a", 6, 10), Golden("a", 90, 95)))
    assert values(question, [hit("a", 0, 20)])["recall@1"] == 0.5


def test_a_span_that_no_passage_holds_stays_a_miss() -> None:
    question = Question("q", "?", golden=(Golden("a", 5, 35),))
    found = values(question, [hit("a", 0, 10), hit("a", 10, 20), hit("a", 20, 40)])
    assert set(found.values()) == {0.0}


def test_graded_judgements_move_ndcg_alone_and_grade_zero_is_not_relevant() -> None:
    question = Question("q", "?", golden=(Golden("a"), Golden("b"), Golden("c")))
    hits = [hit("c"), hit("a"), hit("b")]
    found = values(question, hits, {"a": 1, "b": 3, "c": 0})
    gain = 1 / math.log2(3) + 3 / math.log2(4)
    assert found["nDCG@10"] == pytest.approx(gain / (3 + 1 / math.log2(3)))
    assert found["MRR@10"] == 0.5
    assert found["recall@3"] == 1
    assert (found["success@1"], found["success@3"]) == (0, 1)


def test_mrr_ends_at_ten_and_map_does_not() -> None:
    question = Question("q", "?", golden=(Golden("z"),))
    found = values(question, [*(hit(f"d{place}") for place in range(10)), hit("z")])
    assert found["MRR@10"] == 0
    assert found["nDCG@10"] == 0
    assert found["MAP@100"] == pytest.approx(1 / 11)


def test_fewer_hits_than_k_and_no_hits_are_scored_on_what_there_is() -> None:
    question = Question("q", "?", golden=(Golden("a"), Golden("b")))
    assert values(question, [hit("a")])["recall@3"] == 0.5
    assert set(values(question, []).values()) == {0.0}


def test_equal_scores_keep_the_order_of_the_hits() -> None:
    question = Question("q", "?", golden=(Golden("b"),))
    for place in range(6):
        others = [hit(f"{letter}") for letter in "acdefg"]  # all scored 1.0, names before and after b
        assert values(question, [*others[:place], hit("b"), *others[place:]])["MRR@10"] == pytest.approx(
            1 / (place + 1)
        )


def reference(ranking: Ranking, k: int, depth: int) -> dict[str, float]:
    """The measures by their textbook definitions."""
    relevant = set(ranking.grades)
    order = sorted(ranking.grades.values(), reverse=True)
    gain = sum(ranking.grades.get(item, 0) / math.log2(rank + 1) for rank, item in enumerate(ranking.items[:10], 1))
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(order[:10], 1))
    ranks = [rank for rank, item in enumerate(ranking.items, 1) if item in relevant]
    precisions = [(place / rank) for place, rank in enumerate(ranks, 1) if rank <= depth]
    return {
        f"recall@{k}": sum(rank <= k for rank in ranks) / len(relevant),
        "MRR@10": next((1 / rank for rank in ranks if rank <= 10), 0.0),
        "nDCG@10": gain / ideal,
        f"MAP@{depth}": sum(precisions) / len(relevant),
    }


rankings = st.builds(
    lambda items, golden: Ranking(golden, tuple(items), None),
    st.lists(st.integers(0, 30).map(str), unique=True, max_size=25),
    st.dictionaries(st.integers(0, 30).map(str), st.integers(1, 3), min_size=1, max_size=6),
)


@given(st.lists(rankings, min_size=1, max_size=4), st.integers(1, 12))
def test_measures_equal_their_textbook_definitions(some: list[Ranking], k: int) -> None:
    measured = measure(some, (k,), 20)
    for place, ranking in enumerate(some):
        for name, expected in reference(ranking, k, 20).items():
            assert measured[name][place] == pytest.approx(expected, abs=1e-9)


def test_bootstrap_interval_agrees_with_scipy_and_repeats() -> None:
    column = np.random.default_rng(5).beta(0.5, 0.4, 300)
    found = bootstrap({"x": column, "none": np.zeros(300)}, 4000, 1)
    theirs = stats.bootstrap((column,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found["x"].value == pytest.approx(column.mean())
    assert found["x"].low == pytest.approx(theirs.low, abs=0.006)
    assert found["x"].high == pytest.approx(theirs.high, abs=0.006)
    assert (found["none"].low, found["none"].high, found["none"].n) == (0, 0, 300)
    assert bootstrap({"x": column, "none": np.zeros(300)}, 4000, 1) == found


def test_bootstrap_of_a_difference_is_paired() -> None:
    first = np.random.default_rng(2).random(100)
    shifted = bootstrap({"difference": first - (first - 0.25)}, 500, 3)["difference"]
    assert shifted.high - shifted.low < 1e-9
