import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.fusion import by_convex_sum, by_reciprocal_rank, by_score


def _ids(keys):
    return [str(key) for key in keys]


def test_reciprocal_ranks_are_summed_over_rankings():
    fused = by_reciprocal_rank([[("a", 9.0), ("b", 8.0)], [("b", 0.2), ("c", 0.1)]], 60, 3, _ids)
    assert [key for key, _ in fused] == ["b", "a", "c"]
    assert fused[0][1] == pytest.approx(1 / 62 + 1 / 61)
    weighted = by_reciprocal_rank([[("a", 9.0)], [("b", 0.2)]], 60, 2, _ids, weights=[1, 3])
    assert weighted == [("b", 3 / 61), ("a", 1 / 61)]


def test_convex_sum_scales_each_ranking_to_its_candidates():
    fused = by_convex_sum([("a", 0.9), ("b", 0.7), ("c", 0.5)], [("b", 30.0), ("d", 10.0)], 0.6, 4, _ids)
    assert dict(fused) == pytest.approx({"a": 0.6, "b": 0.6 * 0.5 + 0.4, "c": 0.0, "d": 0.0})
    assert [key for key, _ in fused] == ["b", "a", "c", "d"]


def test_convex_sum_of_one_sided_or_equal_candidates_is_defined():
    assert by_convex_sum([("a", 0.5)], [], 0.6, 2, _ids) == [("a", 0.6)]
    assert by_convex_sum([], [("b", 2.0), ("a", 2.0)], 0.6, 2, _ids) == [("a", 0.4), ("b", 0.4)]
    assert by_convex_sum([], [], 0.6, 2, _ids) == []


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.5, 1.0])), unique_by=lambda item: item[0]),
    st.integers(1, 9),
)
def test_order_by_score_then_id_does_not_depend_on_the_order_given(items, k):
    expected = sorted(items, key=lambda item: (-item[1], str(item[0])))[:k]
    assert by_score(items, k, _ids) == expected
    assert by_score(items[::-1], k, _ids) == expected
