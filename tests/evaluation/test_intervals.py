import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.intervals import Estimate, difference, macro_f1, percentile, ratio, share, statistic


def slow_bootstrap(numerators, denominators, resamples, seed):
    """The definition, one resample at a time."""
    rows = np.random.default_rng(seed).integers(0, len(numerators), size=(resamples, len(numerators)))
    ratios = sorted(sum(numerators[i] for i in row) / sum(denominators[i] for i in row) for row in rows)

    def quantile(q):
        place = q * (len(ratios) - 1)
        below = int(place)
        above = min(below + 1, len(ratios) - 1)
        return ratios[below] + (ratios[above] - ratios[below]) * (place - below)

    return quantile(0.025), quantile(0.975)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=12), st.integers(0, 99))
def test_share_agrees_with_one_resample_at_a_time(pairs, seed):
    top, bottom = zip(*pairs, strict=True)
    estimate = share(top, bottom, resamples=100, seed=seed)
    assert estimate is not None
    assert estimate.value == pytest.approx(sum(top) / sum(bottom))
    assert (estimate.low, estimate.high) == pytest.approx(slow_bootstrap(top, bottom, 100, seed))


def test_share_counts_only_questions_that_the_metric_applies_to():
    estimate = share([1, 0, 0, 5], [1, 1, 0, 0], resamples=100, seed=1)
    assert estimate is not None
    assert (estimate.value, estimate.n) == (0.5, 2)
    assert share([0, 0], [0, 0], resamples=100, seed=1) is None


def test_intervals_depend_on_the_seed_and_on_nothing_else():
    values = np.arange(30) % 4
    first, again, other = (share(values, np.ones(30), resamples=500, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_interval_narrows_with_the_square_root_of_n_and_holds_the_normal_one():
    small = share([0, 1] * 20, [1] * 40, resamples=4000, seed=3)
    large = share([0, 1] * 320, [1] * 640, resamples=4000, seed=3)
    assert small is not None and large is not None
    assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4, rel=0.15)
    assert large.high - 0.5 == pytest.approx(1.96 * 0.5 / 640**0.5, rel=0.1)


def test_blocks_of_resamples_leave_no_seam(monkeypatch):
    values = np.arange(50) % 3
    whole = share(values, np.ones(50), resamples=400, seed=5)
    monkeypatch.setattr("evaluation.intervals._CELLS_PER_BLOCK", 50 * 7)
    assert share(values, np.ones(50), resamples=400, seed=5) == whole


def as_means(values):
    return np.column_stack([values, np.ones(len(values))])


def test_a_paired_difference_sees_what_unpaired_intervals_hide():
    hard = np.linspace(0, 1, 40)
    better = hard + 0.05
    found = difference(as_means(better), as_means(hard), ratio, resamples=300, seed=2)
    assert found is not None
    assert found.excludes_zero
    assert (found.low, found.high) == pytest.approx((0.05, 0.05))
    swapped = difference(as_means(hard), as_means(better), ratio, resamples=300, seed=2)
    assert swapped is not None and swapped.value == pytest.approx(-found.value)


def test_no_difference_is_not_significant():
    same = difference(as_means([1, 0, 1]), as_means([1, 0, 1]), ratio, resamples=200, seed=2)
    assert same == Estimate(0, 0, 0, 3)
    assert not same.excludes_zero


def test_questions_that_one_side_does_not_apply_to_are_left_out_on_both():
    found = difference([[1, 1], [0, 0], [1, 1], [1, 1]], [[0, 1], [1, 1], [1, 1], [0, 0]], ratio, resamples=100, seed=2)
    assert found is not None and (found.value, found.n) == (0.5, 2)
    assert difference([[0, 0]], [[1, 1]], ratio, resamples=100, seed=2) is None


def by_hand_f1(golden, predicted, labels):
    """Precision and recall, one label at a time."""
    scores = []
    for label in labels:
        right = sum(g == p == label for g, p in zip(golden, predicted, strict=True))
        precision = right / max(1, predicted.count(label))
        recall = right / max(1, golden.count(label))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


@given(st.lists(st.tuples(st.sampled_from("ynm"), st.sampled_from("ynm?")), min_size=1, max_size=30))
def test_macro_f1_agrees_with_precision_and_recall_label_by_label(pairs):
    labels = "mny"
    table = [[*(g == p == x for x in labels), *(p == x for x in labels), *(g == x for x in labels)] for g, p in pairs]
    estimate = statistic(table, macro_f1, resamples=100, seed=1)
    golden, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    assert estimate is not None and estimate.n == len(pairs)
    assert estimate.value == pytest.approx(by_hand_f1(golden, predicted, labels))
    assert 0 <= estimate.low <= estimate.high <= 1


def test_percentile_lies_between_ranks():
    estimate = percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95, resamples=200, seed=1)
    assert estimate is not None
    assert estimate.value == pytest.approx(4.8)
    assert 1 <= estimate.low <= 4.8 <= estimate.high <= 5
