"""Percentile bootstrap over questions.

In: per-question numerators and denominators (a share is their ratio), or per-question values. Out: a value with its
95% interval; paired differences between two strategies on the same questions. All draws come from the seed, and two
calls with the same seed and number of questions draw the same resamples. Source: B. Efron, R. Tibshirani, "An
Introduction to the Bootstrap" (1993), chapter 13 (percentile intervals).
Not covered: corrections for comparing many strategies at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Combine = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Sums over questions, (resamples, columns) float64, to one figure per resample."""

LEVEL = 0.95
_CELLS_PER_BLOCK = 4_000_000  # index cells drawn at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval and the number of questions behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """`{value, low, high, n}`."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero: for a difference, whether it is significant at 5%."""
        return self.low > 0 or self.high < 0


def _resamples(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Blocks of (rows, n) int64 indices, `resamples` rows in all."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CELLS_PER_BLOCK // n)
    for start in range(0, resamples, rows):
        yield generator.integers(0, n, size=(min(rows, resamples - start), n))


def _interval(statistics: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """First column over the second."""
    quotient: NDArray[np.float64] = sums[:, 0] / sums[:, 1]
    return quotient


def macro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unweighted mean over labels of 2·TP / (predicted + golden), 0 for a label that occurs in neither.

    Args:
        sums: (resamples, 3 · labels): right predictions of each label, then predictions, then golden ones.
    """
    right, predicted, golden = np.split(sums, 3, axis=1)
    occurs = predicted + golden
    scores: NDArray[np.float64] = (2 * right / np.where(occurs > 0, occurs, 1)).mean(axis=1)
    return scores


def statistic(table: ArrayLike, combine: Combine, *, resamples: int, seed: int) -> Estimate | None:
    """A figure of sums over questions, with its interval.

    Args:
        table: (n, columns) float; a question whose row is all zeros is one that the figure does not apply to.
        combine: From sums to the figure.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The estimate, its `n` counting the questions that it applies to; None where there is none.
    """
    rows = np.asarray(table, dtype=np.float64)
    rows = rows[rows.any(axis=1)]
    if len(rows) == 0:
        return None
    drawn = [combine(_sums(rows, places)) for places in _resamples(len(rows), resamples, seed)]
    low, high = _interval(np.concatenate(drawn))
    return Estimate(float(combine(rows.sum(axis=0)[None])[0]), low, high, len(rows))


def difference(first: ArrayLike, second: ArrayLike, combine: Combine, *, resamples: int, seed: int) -> Estimate | None:
    """A figure of `first` minus that of `second`, over the same questions, resampled together.

    Args:
        first: (n, columns) float, as for `statistic`.
        second: The same of the other side; questions that a side does not apply to are left out on both.
        combine: From sums to the figure.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert left.shape == right.shape, f"paired tables differ: {left.shape} and {right.shape}"
    both = left.any(axis=1) & right.any(axis=1)
    left, right = left[both], right[both]
    if len(left) == 0:
        return None
    drawn = [
        combine(_sums(left, places)) - combine(_sums(right, places))
        for places in _resamples(len(left), resamples, seed)
    ]
    low, high = _interval(np.concatenate(drawn))
    value = combine(left.sum(axis=0)[None]) - combine(right.sum(axis=0)[None])
    return Estimate(float(value[0]), low, high, len(left))


def _sums(table: NDArray[np.float64], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """(rows, columns): the table's sums over each row of `places`, a column at a time to spare memory."""
    return np.stack([table[:, column][places].sum(axis=1) for column in range(table.shape[1])], axis=1)


def share(numerators: ArrayLike, denominators: ArrayLike, *, resamples: int, seed: int) -> Estimate | None:
    """Ratio of sums over questions, with its interval; a mean is the case of all denominators 1.

    Args:
        numerators: (n,) float, for example verified quotes of each answer.
        denominators: (n,) float, for example quotes of each answer; 0 where the metric does not apply to a question.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The estimate, its `n` counting questions with a denominator; None where no question has one.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    applies = bottom > 0
    return statistic(np.column_stack([top[applies], bottom[applies]]), ratio, resamples=resamples, seed=seed)


def percentile(values: ArrayLike, q: float, *, resamples: int, seed: int) -> Estimate | None:
    """The q-th percentile (0 to 100, linear between ranks) of (n,) values, with its interval."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return None
    drawn = [np.percentile(data[rows], q, axis=1) for rows in _resamples(data.size, resamples, seed)]
    low, high = _interval(np.concatenate(drawn))
    return Estimate(float(np.percentile(data, q)), low, high, int(data.size))
