"""Percentile bootstrap over questions.

In: per-question numerators and denominators (a share is their ratio), or per-question values. Out: a value with its
95% interval; paired differences between two strategies on the same questions. All draws come from the seed, and two
calls with the same seed and number of questions draw the same resamples. Source: B. Efron, R. Tibshirani, "An
Introduction to the Bootstrap" (1993), chapter 13 (percentile intervals).
Not covered: corrections for comparing many strategies at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    top, bottom = top[applies], bottom[applies]
    if top.size == 0:
        return None
    drawn = [top[rows].sum(axis=1) / bottom[rows].sum(axis=1) for rows in _resamples(top.size, resamples, seed)]
    low, high = _interval(np.concatenate(drawn))
    return Estimate(float(top.sum() / bottom.sum()), low, high, int(top.size))


def percentile(values: ArrayLike, q: float, *, resamples: int, seed: int) -> Estimate | None:
    """The q-th percentile (0 to 100, linear between ranks) of (n,) values, with its interval."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return None
    drawn = [np.percentile(data[rows], q, axis=1) for rows in _resamples(data.size, resamples, seed)]
    low, high = _interval(np.concatenate(drawn))
    return Estimate(float(np.percentile(data, q)), low, high, int(data.size))


def paired_difference(first: ArrayLike, second: ArrayLike, *, resamples: int, seed: int) -> Estimate | None:
    """Mean of `first - second` over the same (n,) questions, resampled by question."""
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert left.shape == right.shape, f"paired values differ in number: {left.shape} and {right.shape}"
    return share(left - right, np.ones_like(left), resamples=resamples, seed=seed)
