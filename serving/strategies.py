"""The strategies, as data: which adapter, whether passages are retrieved, whether worked examples are shown.

In: what a release holds. Out: the strategies that can be asked for. Online serving and offline evaluation both read
this table. Not covered: how `hybrid` joins its two answers (serving/answering.py) and how `auto` chooses
(serving/router.py). Imports no torch, ray or faiss.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.errors import UserError


@dataclass(frozen=True)
class Strategy:
    """One way to answer with one completion."""

    name: str
    adapter: str | None
    retrieves: bool
    few_shot: bool = False

    @property
    def knows_format(self) -> bool:
        """Whether the model was taught or shown our target format, so that its answer follows an answer mark."""
        return self.adapter is not None or self.few_shot


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("base", adapter=None, retrieves=False),
        Strategy("rag", adapter=None, retrieves=True),
        Strategy("rag_fewshot", adapter=None, retrieves=True, few_shot=True),
        Strategy("finetuned", adapter="finetuned", retrieves=False),
        Strategy("finetuned_rag", adapter="finetuned", retrieves=True),
        Strategy("raft", adapter="raft", retrieves=True),
    )
}

HYBRID = "hybrid"
HYBRID_CITED, HYBRID_CLOSED_BOOK = "raft", "finetuned"
AUTO = "auto"


def available_strategies(adapters: Collection[str], *, has_index: bool, has_examples: bool) -> tuple[str, ...]:
    """Names of the strategies that a release with these parts can serve, `hybrid` and `auto` last."""
    names = [
        strategy.name
        for strategy in STRATEGIES.values()
        if (strategy.adapter is None or strategy.adapter in adapters)
        and (has_index or not strategy.retrieves)
        and (has_examples or not strategy.few_shot)
    ]
    if HYBRID_CITED in names and HYBRID_CLOSED_BOOK in names:
        names.append(HYBRID)
    return (*names, AUTO)


class StrategyNotAllowedError(UserError):
    """The caller's key does not open the strategy."""


def require_strategy(name: str, available: Collection[str], allowed: Collection[str] = ()) -> str:
    """`name`, when it can be served to a caller who may use the strategies `allowed` (none allows all, and `auto` is
    open to everybody: it chooses among what is allowed).

    Raises:
        StrategyNotAllowedError: The caller may not use it.
        UserError: There is no such strategy, or the release lacks an adapter, index or examples that it needs.
    """
    usable = [other for other in available if not allowed or other in allowed or other == AUTO]
    if name in usable:
        return name
    known = name in STRATEGIES or name in (HYBRID, AUTO)
    if known and allowed and name not in allowed:
        raise StrategyNotAllowedError(f"strategy `{name}` is not open to this key; it may use {', '.join(usable)}")
    problem = f"strategy `{name}` needs a part that this release lacks" if known else f"there is no strategy `{name}`"
    raise UserError(f"{problem}; available: {', '.join(usable)}")
