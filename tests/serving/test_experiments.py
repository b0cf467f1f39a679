import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.experiments import assign

NAMES = ("base", "rag", "finetuned", "raft", "hybrid")
SHARES = st.dictionaries(st.sampled_from(NAMES), st.floats(0.01, 1), min_size=1)


@given(st.text(), st.text(), SHARES)
def test_assign_is_sticky_and_propensities_add_up(experiment, user, shares):
    strategy, propensity = assign(experiment, user, shares)
    assert (strategy, propensity) == assign(experiment, user, dict(reversed(shares.items())))
    assert math.isclose(propensity, shares[strategy] / sum(shares.values()))


@given(st.text(), st.text(), SHARES, st.sampled_from(NAMES))
def test_assign_without_a_strategy_moves_its_own_users_alone(experiment, user, shares, missing):
    left = {name: share for name, share in shares.items() if name != missing}
    before, _ = assign(experiment, user, shares)
    if left and before != missing:
        assert assign(experiment, user, left)[0] == before


def test_assign_meets_the_shares_over_ten_thousand_users():
    shares = {"rag": 0.5, "raft": 0.3, "hybrid": 0.2, "base": 0.0}
    drawn = Counter(assign("test", f"user{number}", shares)[0] for number in range(10_000))
    assert drawn["base"] == 0
    for name, share in shares.items():
        assert abs(drawn[name] - 10_000 * share) < 4 * math.sqrt(10_000 * share * (1 - share) + 1)


def test_assign_draws_anew_for_another_experiment():
    shares = {"rag": 0.5, "raft": 0.5}
    same = sum(assign("one", f"u{n}", shares)[0] == assign("two", f"u{n}", shares)[0] for n in range(2000))
    assert 900 < same < 1100
    assert assign("a", "bc", dict.fromkeys(NAMES, 0.2)) is not None
    units = [("a", "bc"), ("ab", "c")]
    drawn = [tuple(assign(e + str(n), u, {"rag": 0.5, "raft": 0.5})[0] for n in range(20)) for e, u in units]
    assert drawn[0] != drawn[1]
