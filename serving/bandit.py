"""Learned weights: Thompson sampling over what users thought of each strategy on an intent.

In: the intent's ratings by strategy. Out: one strategy, and the probability with which it was taken.
Each strategy's satisfaction has the posterior Beta(1 + satisfied, 1 + unsatisfied) (Chapelle and Li 2011). `draws`
samples of all posteriors say how often each is best; with probability `exploration / (1 + ratings / decay)` a strategy
is taken at random instead. The choice is drawn from exactly these probabilities, so the propensity that is logged is
the one that held, and inverse-propensity estimates from the log are unbiased wherever `exploration` is above 0.
Not covered: collecting ratings (serving/feedback.py), which intent (serving/intents.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.records import Tally
from serving.router_config import LearningConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def choose(
    learning: LearningConfig, strategies: Sequence[str], tallies: Sequence[Tally], rng: np.random.Generator
) -> tuple[str, float]:
    """One of `strategies` and its propensity; `tallies` are those of the intent."""
    shares = probabilities(learning, strategies, tallies, rng)  # (strategies,) float64
    chosen = int(rng.choice(len(strategies), p=shares))
    return strategies[chosen], float(shares[chosen])


def probabilities(
    learning: LearningConfig, strategies: Sequence[str], tallies: Sequence[Tally], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Probability of each strategy, (strategies,) float64, adding up to 1."""
    import numpy as np

    good, bad = counts(strategies, tallies)
    satisfaction = rng.beta(1 + good, 1 + bad, size=(learning.draws, len(strategies)))  # (draws, strategies)
    best = np.bincount(satisfaction.argmax(axis=1), minlength=len(strategies)) / learning.draws
    random_share = exploration(learning, float((good + bad).sum()))
    mixed: npt.NDArray[np.float64] = (1 - random_share) * best + random_share / len(strategies)
    mixed /= mixed.sum()
    return mixed


def counts(
    strategies: Sequence[str], tallies: Sequence[Tally]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of satisfied and unsatisfied by strategy, each (strategies,) float64; several tallies of one are added."""
    import numpy as np

    good, bad = dict.fromkeys(strategies, 0.0), dict.fromkeys(strategies, 0.0)
    for tally in tallies:
        if tally.strategy in good:
            good[tally.strategy] += max(tally.satisfied, 0.0)
            bad[tally.strategy] += max(tally.unsatisfied, 0.0)
    return np.array([*good.values()]), np.array([*bad.values()])


def exploration(learning: LearningConfig, ratings: float) -> float:
    """Share of questions that take a strategy at random after so many ratings of the intent."""
    return learning.exploration / (1 + ratings / learning.decay)


def seeded(seed: int, request_id: str) -> np.random.Generator:
    """The same random numbers for the same seed and request, whatever was asked before."""
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{request_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def ratings_in_words(strategies: Sequence[str], tallies: Sequence[Tally]) -> str:
    """`rag 83% of 120, raft 71% of 14` for people."""
    parts = []
    for strategy, good, bad in zip(strategies, *counts(strategies, tallies), strict=True):
        ratings = good + bad
        parts.append(f"{strategy} {good / ratings:.0%} of {ratings:.0f}" if ratings else f"{strategy} not rated yet")
    return ", ".join(parts)
