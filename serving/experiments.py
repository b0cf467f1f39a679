"""A/B tests: which strategy a user gets, the same each time.

In: the test's name, who asks, shares by strategy. Out: one strategy, and the probability with which it was taken.
Weighted rendezvous hashing (Schindelhauer and Schomaker 2005: the smallest of -ln(u) / share): where a strategy is
missing, only its own users move, in proportion to the other shares, and everybody else keeps theirs.
Not covered: whether a rule applies (serving/router.py), comparing the results.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def assign(experiment: str, unit: str, shares: Mapping[str, float]) -> tuple[str, float]:
    """The strategy of `unit` (a user, or a request where none is named) and its propensity.

    Args:
        experiment: Name of the test; another name draws anew.
        unit: Who is drawn for.
        shares: Strategy to share, 0 or more; at least one above 0. They need not add up to 1.
    """
    possible = {strategy: share for strategy, share in shares.items() if share > 0}
    assert possible, f"experiment {experiment} has no strategy to draw"
    strategy = min(possible, key=lambda name: -math.log(_uniform(experiment, unit, name)) / possible[name])
    return strategy, possible[strategy] / math.fsum(possible.values())


def _uniform(*parts: str) -> float:
    """A number in (0, 1), the same for the same parts; lengths are hashed, too, so ("a", "bc") is not ("ab", "c")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return (int.from_bytes(digest.digest(), "little") + 0.5) / 2**64
