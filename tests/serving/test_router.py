import pydantic
import pytest

from cluster.errors import UserError
from serving.router import RouteQuery, Router
from serving.router_config import PolicyRule, RouterConfig


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
