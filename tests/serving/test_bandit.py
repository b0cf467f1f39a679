import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from serving.bandit import choose, exploration, probabilities, ratings_in_words, seeded
from serving.records import Tally
from serving.router_config import LearningConfig

NAMES = ("rag", "finetuned", "raft")
COUNTS = st.floats(0, 1000)
TALLIES = st.lists(st.builds(Tally, st.just("x"), st.sampled_from((*NAMES, "base")), COUNTS, COUNTS), max_size=6)


@given(TALLIES, st.integers(0, 99), st.text(max_size=9), st.floats(0, 1))
def test_probabilities_add_up_to_one_and_explore(tallies, seed, request, share):
    learning = LearningConfig(exploration=share, decay=10)
    found = probabilities(learning, NAMES, tallies, seeded(seed, request))
    ratings = sum(tally.satisfied + tally.unsatisfied for tally in tallies if tally.strategy != "base")
    assert math.isclose(found.sum(), 1, abs_tol=1e-9)
    assert found.min() >= share / (1 + ratings / 10) / 3 - 1e-9


@given(TALLIES, st.integers(0, 99), st.text(max_size=9))
def test_choose_is_the_same_for_the_same_seed_and_request(tallies, seed, request):
    first = choose(LearningConfig(), NAMES, tallies, seeded(seed, request))
    assert first == choose(LearningConfig(), NAMES, tallies, seeded(seed, request))
    assert 0 < first[1] <= 1


def test_probabilities_are_those_of_the_posteriors():
    tallies = [Tally("x", "rag", 8, 4), Tally("x", "raft", 3, 2)]
    learning = LearningConfig(exploration=0, draws=100_000)
    found = probabilities(learning, ("rag", "raft"), tallies, seeded(1, "r"))
    one, two = stats.beta(9, 5), stats.beta(4, 3)
    exact, _ = integrate.quad(lambda p: one.pdf(p) * two.cdf(p), 0, 1)
    assert found[0] == pytest.approx(exact, abs=0.006)


def test_choose_takes_each_strategy_as_often_as_its_propensity_says():
    tallies = [Tally("x", "rag", 5, 3), Tally("x", "raft", 4, 4)]
    chosen = [choose(LearningConfig(draws=20), NAMES, tallies, seeded(5, str(number))) for number in range(6000)]
    for name in NAMES:  # the inverses of the propensities count every question once for each strategy
        weights = np.array([(strategy == name) / propensity for strategy, propensity in chosen])
        assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights))


def test_choose_follows_clear_ratings_and_adds_several_tallies_up():
    tallies = [Tally("x", "rag", 200, 10), Tally("x", "rag", 200, 10), Tally("x", "raft", 10, 400)]
    shares = probabilities(LearningConfig(exploration=0), ("rag", "raft"), tallies, seeded(1, "a"))
    assert shares.tolist() == [1, 0]
    assert ratings_in_words(NAMES, tallies) == "rag 95% of 420, finetuned not rated yet, raft 2% of 410"


def test_exploration_decays_with_ratings():
    learning = LearningConfig(exploration=0.2, decay=50)
    assert [exploration(learning, ratings) for ratings in (0, 50, 150)] == pytest.approx([0.2, 0.1, 0.05])
