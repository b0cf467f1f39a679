import pytest

from cluster.errors import UserError
from retrieval.metrics import recall_at_k
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
