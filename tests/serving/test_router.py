import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.records import Hit, Passage
from serving.intents import Guess
from serving.records import Tally
from serving.router import RouteQuery, Router, known_facts
from serving.router_config import LearningConfig, PolicyRule, RouterConfig


def route(question, metadata=None, requested="auto", available=None, **config):
    router = Router(RouterConfig(**config)) if available is None else Router(RouterConfig(**config), available)
    return router.route(RouteQuery(question, metadata or {}, requested))


@pytest.mark.parametrize(
    ("question", "intent", "strategy"),
    [
        ("What is the capital of Greece?", "fact_lookup", "rag"),
        ("希腊的首都是什么？", "fact_lookup", "rag"),
        ("Why did the population fall?", "reasoning", "finetuned"),
        ("为什么人口下降", "reasoning", "finetuned"),
        ("What is the difference between Malta and Cyprus?", "analysis", "hybrid"),
        ("比较马耳他和塞浦路斯", "analysis", "hybrid"),
        ("ＷＨＯ leads Malta", "fact_lookup", "rag"),
        ("Malta", "", "hybrid"),
        ("Anywhere the whyte whole", "", "hybrid"),
    ],
)
def test_route_intent_decides(question, intent, strategy):
    found = route(question)
    assert (found.intent, found.strategy) == (intent, strategy)


@pytest.mark.parametrize(
    ("metadata", "strategy"),
    [
        ({"update_frequency": "daily"}, "rag"),
        ({"update_frequency": "Daily", "reasoning_depth": 9}, "rag"),
        ({"reasoning_depth": 4}, "finetuned"),
        ({"reasoning_depth": "4"}, "finetuned"),
        ({"reasoning_depth": 3}, "hybrid"),
        ({"context_length": 2001}, "raft"),
        ({"context_length": 2000}, "hybrid"),
        ({"context_length": "long"}, "hybrid"),
        ({"update_frequency": None}, "hybrid"),
    ],
)
def test_route_metadata_rules_of_the_source_note(metadata, strategy):
    assert route("Malta", metadata).strategy == strategy


def test_route_metadata_comes_before_intent():
    assert route("Why?", {"update_frequency": "daily"}).strategy == "rag"


def test_route_caller_decides_over_every_rule():
    found = route("Why?", {"update_frequency": "daily"}, "raft")
    assert (found.strategy, found.reason) == ("raft", "asked for by the caller")


def test_route_reason_names_the_keyword():
    assert "“why”" in route("Why?").reason


def test_route_rule_without_its_strategy_falls_to_the_next_and_says_so():
    found = route("What is it?", {"context_length": 9000}, available=("base", "rag", "auto"))
    assert found.strategy == "rag"
    assert "raft is passed over, because this release lacks" in found.reason


def test_route_default_without_its_strategy_takes_the_best_there_is():
    found = route("Malta", available=("base", "rag", "auto"))
    assert found.strategy == "rag" and "hybrid" in found.reason
    assert route("Malta", available=("base", "auto")).strategy == "base"


def test_route_missing_strategy_is_refused():
    with pytest.raises(UserError, match="available: base, rag, auto"):
        route("x", requested="raft", available=("base", "rag", "auto"))


def test_route_recipe_rules_replace_the_defaults():
    rules = (
        PolicyRule(strategy="raft", reason="troubles are quoted", keywords=("error code",), metadata={"tier": 2}),
        PolicyRule(strategy="rag", reason="products change", intent="product"),
    )
    config = {"rules": rules, "intents": {"product": ("price",)}, "default": "base"}
    assert route("An error code", {"tier": "2"}, **config).strategy == "raft"
    assert route("An error code", {"tier": 1}, **config).strategy == "base"
    assert route("What is the PRICE?", **config).strategy == "rag"
    assert route("Why?", **config).strategy == "base"
    assert route("What is the PRICE?", rules=(), default="base").strategy == "base"


def test_config_rule_with_an_unknown_intent_is_refused():
    with pytest.raises(pydantic.ValidationError, match="'produkt'; intents has product"):
        RouterConfig(intents={"product": ("price",)}, rules=(PolicyRule(strategy="rag", reason="", intent="produkt"),))


def test_config_auto_cannot_route_to_itself():
    with pytest.raises(pydantic.ValidationError):
        RouterConfig(default="auto")


class Embedded:
    """A classifier that reads the embedding: its first number is the confidence in `balance`."""

    intents = ("balance", "transfer")
    needs_embedding = True

    def classify(self, text, embedding):
        confidence = float(embedding[0])
        return Guess("balance" if confidence >= 0.5 else "", confidence, "balance", f"balance at {confidence:.2f}")


def embedded(confidence):
    return np.array([confidence, 0], dtype=np.float32)


def test_route_classifier_decides_where_there_is_an_embedding_and_keywords_where_there_is_none():
    rules = (PolicyRule(strategy="rag", intent="balance", reason="balances change"),)
    router = Router(RouterConfig(examples="x.jsonl", rules=rules), classifier=Embedded())
    found = router.route(RouteQuery("Why?", embedding=embedded(0.75)))
    assert (found.strategy, found.intent, found.confidence) == ("rag", "balance", 0.75)
    assert found.reason == "balances change (balance at 0.75)"
    unknown = router.route(RouteQuery("Why?", embedding=embedded(0.25)))
    assert (unknown.strategy, unknown.intent, unknown.confidence) == ("hybrid", "", 0.25)
    assert unknown.reason == "the intent is not known (balance at 0.25), so the default is taken"
    assert router.route(RouteQuery("Why?")).intent == "reasoning"


def test_router_refuses_rules_about_intents_that_the_classifier_does_not_know():
    rules = (PolicyRule(strategy="rag", intent="balanse", reason=""),)
    with pytest.raises(
        UserError, match="'balanse', which the trained classifier does not know: did you mean 'balance'"
    ):
        Router(RouterConfig(examples="x.jsonl", rules=rules), classifier=Embedded())
    Router(RouterConfig(examples="x.jsonl"), classifier=Embedded())  # the default rules are about keywords


AB = PolicyRule(split={"rag": 0.5, "raft": 0.5}, experiment="cite", reason="products are tried both ways")


def test_route_split_sticks_to_the_user_and_draws_each_request_without_one():
    router = Router(RouterConfig(rules=(AB,)))
    of_users = {router.route(RouteQuery("x", user="ann", request_id=str(n))).strategy for n in range(50)}
    assert len(of_users) == 1
    routes = [router.route(RouteQuery("x", request_id=str(n))) for n in range(400)]
    assert 150 < sum(one.strategy == "rag" for one in routes) < 250
    assert {(one.propensity, one.experiment) for one in routes} == {(0.5, "cite")}
    assert router.route(RouteQuery("x", request_id="7")) == routes[7]
    assert "the A/B test cite drew" in routes[0].reason


@pytest.mark.parametrize(
    ("query", "available", "why"),
    [
        (RouteQuery("x", user="u"), ("rag", "auto"), "this release lacks a part of it"),
        (RouteQuery("x", user="u", allowed=("rag", "base")), ("rag", "raft", "auto"), "this key may not use it"),
    ],
)
def test_route_split_passes_over_what_cannot_be_taken_and_says_why(query, available, why):
    found = Router(RouterConfig(rules=(AB,)), available).route(query)
    assert (found.strategy, found.propensity) == ("rag", 1.0)
    assert f"raft is passed over, because {why}" in found.reason


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"split": {"rag": 0.5, "raft": 0.4}, "experiment": "e"}, "shares must add up to 1, got 0.9"),
        ({"split": {"rag": 1.5, "raft": -0.5}, "experiment": "e"}, "shares are 0 or more"),
        ({"split": {"rag": 1}}, "needs the name of its `experiment`"),
        ({"strategy": "rag", "experiment": "e"}, "`experiment` needs a `split`"),
        ({"strategy": "rag", "split": {"rag": 1}, "experiment": "e"}, "not both"),
        ({}, "takes a `strategy` or a `split`"),
        ({"strategy": "rag", "keywords": [" "]}, "a keyword is blank"),
    ],
)
def test_config_rules_that_cannot_be_are_refused(rule, problem):
    with pytest.raises(pydantic.ValidationError, match=problem):
        RouterConfig.model_validate({"rules": [{"reason": "r", **rule}]})


LEARNING = LearningConfig(strategies=("rag", "finetuned", "raft"), exploration=0.0)


def test_route_learned_weights_follow_the_ratings_of_the_intent_alone():
    router = Router(RouterConfig(learning=LEARNING))
    tallies = [
        Tally("reasoning", "raft", 90, 10),
        Tally("reasoning", "rag", 10, 90),
        Tally("fact_lookup", "rag", 99, 1),
    ]
    tallies += [Tally("reasoning", "finetuned", 5, 95)]
    found = router.route(RouteQuery("Why?", request_id="1"), tallies)
    assert (found.strategy, found.propensity, found.intent) == ("raft", 1.0, "reasoning")
    assert "rag 10% of 100, finetuned 5% of 100, raft 90% of 100" in found.reason
    assert router.route(RouteQuery("Malta", request_id="1"), tallies).strategy == "hybrid"  # unknown intent
    assert router.route(RouteQuery("Why?", {"reasoning_depth": 9}), tallies).strategy == "finetuned"  # rules first


def test_route_learned_weights_leave_out_what_cannot_be_taken():
    router = Router(RouterConfig(learning=LEARNING), ("base", "rag", "raft", "auto"))
    tallies = [Tally("reasoning", "finetuned", 99, 1)]
    found = [router.route(RouteQuery("Why?", request_id=str(n)), tallies) for n in range(60)]
    assert {one.strategy for one in found} == {"rag", "raft"}
    assert "finetuned is passed over, because this release lacks a part of it" in found[0].reason
    only = router.route(RouteQuery("Why?", request_id="1", allowed=("raft",)), tallies)
    assert (only.strategy, only.propensity) == ("raft", 1.0)


@given(st.text(min_size=1, max_size=8), st.integers(0, 9), st.floats(0, 50), st.floats(0, 50))
def test_route_is_the_same_for_seed_request_and_ratings(request_id, seed, good, bad):
    config = RouterConfig(learning=LearningConfig(strategies=("rag", "raft"), exploration=0.5))
    tallies = [Tally("reasoning", "rag", good, bad)]
    routes = {Router(config, seed=seed).route(RouteQuery("Why?", request_id=request_id), tallies) for _ in range(2)}
    assert len(routes) == 1


def test_route_rules_keep_an_intent_from_being_learned():
    rules = (PolicyRule(strategy="base", intent="reasoning", reason="fixed"),)
    router = Router(RouterConfig(rules=rules, learning=LEARNING))
    assert router.route(RouteQuery("Why?"), [Tally("reasoning", "raft", 99, 1)]).strategy == "base"


def test_route_asked_for_strategy_that_the_key_does_not_open_is_refused():
    with pytest.raises(UserError, match="`raft` is not open to this key; it may use rag"):
        Router(RouterConfig()).route(RouteQuery("x", requested="raft", allowed=("rag",)))


def test_route_key_without_any_served_strategy_is_refused():
    with pytest.raises(UserError, match="this key may use raft, but this release has base, rag"):
        Router(RouterConfig(), ("base", "rag", "auto")).route(RouteQuery("Malta", allowed=("raft",)))


def hit(collection):
    return Hit(Passage("c", "d", "", "", "", "text", 0, 4), 1.0, 1, collection)


def test_known_facts_take_the_most_frequent_update_of_the_hits():
    frequencies = {"news": "daily", "laws": "yearly", "misc": "unknown"}
    assert known_facts([hit("laws"), hit("news")], frequencies, 120) == {
        "update_frequency": "daily",
        "context_length": 120,
    }
    assert known_facts([hit("laws")], frequencies) == {"update_frequency": "yearly"}
    assert known_facts([hit("misc"), hit("gone")], frequencies) == {}


def test_route_what_the_server_knows_counts_over_the_request():
    router = Router(RouterConfig())
    says = {"update_frequency": "static", "context_length": 9000, "reasoning_depth": 1}
    assert router.route(RouteQuery("Malta", says, known={"update_frequency": "hourly"})).strategy == "rag"
    assert router.route(RouteQuery("Malta", says, known={"context_length": 300})).strategy == "hybrid"
    assert router.route(RouteQuery("Malta", says)).strategy == "raft"  # the server does not know


def required(**rule):
    return PolicyRule(reason="quoted", require_quote=True, **rule)


def test_route_says_that_a_quote_is_required_by_the_rule_that_decided():
    rules = (required(strategy="raft", keywords=("guideline",)), PolicyRule(strategy="rag", reason="else"))
    assert route("What does the guideline say?", rules=rules).require_quote
    assert not route("What does the study say?", rules=rules).require_quote
    asked = route("What does the guideline say?", requested="finetuned", rules=rules)
    assert (asked.strategy, asked.require_quote) == ("finetuned", False)


def test_route_requirement_holds_for_what_stands_in_for_a_strategy_that_is_lacking():
    rules = (required(strategy="raft", keywords=("guideline",)), PolicyRule(strategy="rag", reason="else"))
    found = route("What does the guideline say?", available=("base", "rag", "auto"), rules=rules)
    assert (found.strategy, found.require_quote) == ("rag", True)
    alone = route("The guideline?", available=("base", "auto"), rules=rules[:1])
    assert (alone.strategy, alone.require_quote) == ("base", True)


@pytest.mark.parametrize("rule", [{"strategy": "finetuned"}, {"split": {"raft": 0.5, "rag": 0.5}, "experiment": "e"}])
def test_a_rule_cannot_require_quotes_of_a_strategy_that_writes_none(rule):
    with pytest.raises(pydantic.ValidationError, match="`require_quote` needs a strategy that quotes"):
        required(**rule)


def test_a_recipe_without_quotes_cannot_require_them():
    from serving.config import ServingRecipe

    rules = {"rules": [{"strategy": "raft", "reason": "r", "require_quote": True}]}
    with pytest.raises(pydantic.ValidationError, match=r"prompt\.quotes is false"):
        ServingRecipe.model_validate({"name": "a", "prompt": {"quotes": False}, "router": rules})
    ServingRecipe.model_validate({"name": "a", "router": rules})
