import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.intervals import Estimate, paired_difference, percentile, share


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


def test_paired_difference_sees_what_unpaired_intervals_hide():
    hard = np.linspace(0, 1, 40)
    better = hard + 0.05
    difference = paired_difference(better, hard, resamples=300, seed=2)
    assert difference is not None
    assert difference.excludes_zero
    assert (difference.low, difference.high) == pytest.approx((0.05, 0.05))
    swapped = paired_difference(hard, better, resamples=300, seed=2)
    assert swapped is not None and swapped.value == pytest.approx(-difference.value)


def test_no_difference_is_not_significant():
    same = paired_difference([1, 0, 1], [1, 0, 1], resamples=200, seed=2)
    assert same == Estimate(0, 0, 0, 3)
    assert not same.excludes_zero


def test_percentile_lies_between_ranks():
    estimate = percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95, resamples=200, seed=1)
    assert estimate is not None
    assert estimate.value == pytest.approx(4.8)
    assert 1 <= estimate.low <= 4.8 <= estimate.high <= 5
