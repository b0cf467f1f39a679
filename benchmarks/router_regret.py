"""What the router's learned weights cost against always knowing the best strategy of each intent.

    python -m benchmarks.router_regret [--queries 10000] [--seeds 40] [--out docs/images/router_regret.png]

Simulated users: each intent has a probability of satisfaction per strategy; a share of the questions is rated, and
ratings reach the router late and in batches. Everything else is the served `Router`. Regret is the expected
satisfaction lost against the best strategy of the question's intent, added up; its exponent b (regret ~ t^b) is fitted
to the second half, and below 1 the router learns. Uniform random choice and the fixed default, which cannot learn, are
measured beside it. From the log of what was chosen, with its propensities, the satisfaction of strategies that were
*not* followed is estimated (inverse propensity scoring) and compared with the truth: only right propensities agree.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serving.intents import Guess
from serving.records import Tally
from serving.router import RouteQuery, Router
from serving.router_config import LearningConfig, RouterConfig

STRATEGIES = ("rag", "finetuned", "raft", "hybrid")
DEFAULT = "hybrid"
# Probability of satisfaction by intent, in the order of STRATEGIES. Each intent has another best one, and `policy` a
# close second, which is the hard case.
SATISFACTION = {
    "product_info": (0.80, 0.45, 0.68, 0.66),
    "troubleshooting": (0.50, 0.75, 0.58, 0.62),
    "policy": (0.62, 0.40, 0.78, 0.73),
    "small_talk": (0.35, 0.60, 0.40, 0.70),
}
SHARES = (0.4, 0.3, 0.2, 0.1)
RATED = 0.3
"""Share of the answers that are rated."""
POLL = 50
"""Questions between two looks at the ratings."""
HELD = 0.3
"""Exploration that does not decay, for a log whose inverse propensities stay below 14: as served they grow into the
hundreds, and the estimates' distribution is so skewed that most fall below the truth."""
DELAY = 200
"""Most questions that an answer waits for its rating."""

Floats = npt.NDArray[np.float64]
Choose = Callable[[RouteQuery, Sequence[Tally]], tuple[str, float]]


class KnownIntents:
    """A perfect classifier: the question is its intent. What a wrong intent costs, benchmarks/router_clinc.py tells."""

    intents = tuple(SATISFACTION)
    needs_embedding = False

    def classify(self, text: str, embedding: object = None) -> Guess:
        """The intent that the question is."""
        return Guess(text, 1.0, text)


@dataclass(frozen=True)
class Run:
    """One simulated sequence of questions."""

    intents: npt.NDArray[np.int64]
    strategies: npt.NDArray[np.int64]
    propensities: Floats
    rewards: Floats
    """1 or 0 where the answer was rated, NaN where not."""

    def regret(self) -> Floats:
        """Expected satisfaction lost so far, after each question."""
        lost = TRUTH.max(axis=1)[self.intents] - TRUTH[self.intents, self.strategies]
        cumulated: Floats = np.cumsum(lost)
        return cumulated


TRUTH = np.array([*SATISFACTION.values()])  # (intents, strategies)


def simulate(choose: Choose, queries: int, seed: int) -> Run:
    """Asks `queries` questions; the same seed asks the same ones and has the same users."""
    rng = np.random.default_rng(seed)
    intents = rng.choice(len(TRUTH), size=queries, p=SHARES)
    satisfied = rng.random((queries, len(STRATEGIES))) < TRUTH[intents]
    rated, arrival = rng.random(queries) < RATED, np.arange(queries) + rng.integers(1, DELAY, queries)
    order = np.argsort(arrival, kind="stable")
    chosen, propensities = np.zeros(queries, dtype=np.int64), np.zeros(queries)
    counts = np.zeros((len(TRUTH), len(STRATEGIES), 2))
    tallies: list[Tally] = []
    taken = 0
    for number in range(queries):
        if number % POLL == 0:
            while taken < queries and arrival[order[taken]] <= number:
                row = order[taken]
                counts[intents[row], chosen[row], 1 - int(satisfied[row, chosen[row]])] += rated[row]
                taken += 1
            tallies = [
                Tally(intent, strategy, *map(float, counts[i, s]))
                for i, intent in enumerate(SATISFACTION)
                for s, strategy in enumerate(STRATEGIES)
            ]
        question = RouteQuery(KnownIntents.intents[intents[number]], request_id=f"{seed}/{number}")
        strategy, propensities[number] = choose(question, tallies)
        chosen[number] = STRATEGIES.index(strategy)
    rewards = np.where(rated, satisfied[np.arange(queries), chosen].astype(np.float64), np.nan)
    return Run(intents, chosen, propensities, rewards)


def learned(seed: int, learning: LearningConfig | None = None) -> Choose:
    """The served router."""
    config = RouterConfig(default=DEFAULT, rules=(), learning=learning or LearningConfig(strategies=STRATEGIES))
    router = Router(config, (*STRATEGIES, "auto"), KnownIntents(), seed)

    def choose(query: RouteQuery, tallies: Sequence[Tally]) -> tuple[str, float]:
        route = router.route(query, tallies)
        return route.strategy, route.propensity

    return choose


def uniform(seed: int) -> Choose:
    """Any strategy."""
    rng = np.random.default_rng([seed, 1])
    return lambda query, tallies: (STRATEGIES[rng.integers(len(STRATEGIES))], 1 / len(STRATEGIES))


def fixed(seed: int) -> Choose:
    """The default, always."""
    return lambda query, tallies: (DEFAULT, 1.0)


def exponent(regret: Floats) -> float:
    """b of regret ~ t^b over the second half, by least squares of the logarithms."""
    half = len(regret) // 2
    steps = np.arange(half, len(regret)) + 1
    return float(np.polyfit(np.log(steps), np.log(regret[half:]), 1)[0])


def off_policy(run: Run, policy: npt.NDArray[np.int64]) -> float:
    """Satisfaction under `policy` (intents,) of strategies, estimated from a log that followed another (IPS)."""
    rated = ~np.isnan(run.rewards)
    follows = run.strategies[rated] == policy[run.intents[rated]]
    return float((run.rewards[rated] * follows / run.propensities[rated]).mean())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def print_off_policy(log: Sequence[Run]) -> None:
    """Estimates for strategies that were not followed, with standard errors over the runs, and the truth."""
    policies = {f"always {one}": np.full(len(TRUTH), place) for place, one in enumerate(STRATEGIES)}
    for name, policy in {**policies, "best per intent": TRUTH.argmax(axis=1)}.items():
        truth = float(np.dot(SHARES, TRUTH[np.arange(len(TRUTH)), policy]))
        estimate, error = mean_and_error([off_policy(run, policy) for run in log])
        print(f"{name:>18}: {estimate:.3f} ± {error:.3f}, truth {truth:.3f}, {(estimate - truth) / error:+.1f} errors")


def plot(curves: dict[str, Floats], exponents: dict[str, float], out: Path) -> None:
    """Mean regret with its range over the seeds; `curves` are (seeds, queries)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, regrets in curves.items():
        steps = np.arange(1, regrets.shape[1] + 1)
        [line] = axes.plot(steps, regrets.mean(axis=0), label=f"{name} (t^{exponents[name]:.2f} in the second half)")
        axes.fill_between(steps, regrets.min(axis=0), regrets.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="questions", ylabel="satisfied answers lost", title="Regret against the best strategy per intent")
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates, prints the figures, draws the plot."""
    parser = argparse.ArgumentParser(description="Regret of the router's learned weights in simulation.")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("docs/images/router_regret.png"))
    options = parser.parse_args(arguments)
    policies = {"learned": learned, "uniform random": uniform, f"always {DEFAULT}": fixed}
    runs = {
        name: [simulate(make(seed), options.queries, seed) for seed in range(options.seeds)]
        for name, make in policies.items()
    }
    curves = {name: np.stack([run.regret() for run in of_policy]) for name, of_policy in runs.items()}
    exponents = {name: exponent(regrets.mean(axis=0)) for name, regrets in curves.items()}
    for name, regrets in curves.items():
        ends = regrets[:, -1]
        each = [exponent(one) for one in regrets]
        print(
            f"{name:>15}: regret {ends.mean():7.1f} (seeds {ends.min():.1f} to {ends.max():.1f}), "
            f"exponent {exponents[name]:.2f} (seeds {min(each):.2f} to {max(each):.2f})"
        )
    print("off-policy estimates from logs of the router, against the truth:")
    explores = LearningConfig(strategies=STRATEGIES, exploration=HELD, decay=1e12)
    held = [simulate(learned(seed, explores), options.queries, seed) for seed in range(options.seeds)]
    for name, log in {"as served": runs["learned"], f"exploration held at {HELD:g}": held}.items():
        print(f"  {name}:")
        print_off_policy(log)
    plot(curves, exponents, options.out)
    print(f"plot: {options.out}")


if __name__ == "__main__":
    main()
