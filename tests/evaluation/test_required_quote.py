"""A rule that demands a verified quote, offline as online."""

import asyncio

import pytest

from evaluation.answering import AnswerSettings, answer_window
from retrieval.records import Hit, Question
from serving.asking import Ask, Doors
from serving.config import GenerationConfig
from serving.conversation import Conversation
from serving.engine import Completion
from serving.interfaces import Found
from serving.router import Router
from serving.router_config import PolicyRule, RouterConfig
from tests.serving.fakes import CITED, GREECE, SPAIN, prompt_format, served_release

HITS = (Hit(GREECE, 1.0, 1), Hit(SPAIN, 0.5, 2))
UNVERIFIED = "##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon"
TEXT = "What is the capital?"


class Engine:
    """Says `text` where passages are shown, and a closed-book guess otherwise."""

    def __init__(self, text):
        self.text = text

    def generate(self, requests):
        said = [self.text if "capital: Athens" in str(request.messages) else "<ANSWER>: Patras" for request in requests]
        return [Completion(request.request_id, text) for request, text in zip(requests, said, strict=True)]


def online(engine, config):
    async def search(query, pins):
        return Found(HITS, None)

    async def generate(request, pins):
        return engine.generate([request])[0]

    async def stream(request, pins):
        yield engine.generate([request])[0]

    release = served_release()
    talk = Conversation(release, Router(config, release.available), Doors(search, generate, stream))
    return asyncio.run(talk.answer(Ask("q", TEXT)))


def offline(engine, config):
    settings = AnswerSettings(prompt_format(), GenerationConfig(passages=2), router=Router(config))
    return answer_window("auto", [Question("q", TEXT)], [HITS], engine, settings)[0].answer


@pytest.mark.parametrize("strategy", ["raft", "hybrid"])
@pytest.mark.parametrize(("text", "abstained"), [(CITED, False), (UNVERIFIED, True)])
def test_offline_and_online_answers_are_the_same(strategy, text, abstained):
    rules = (PolicyRule(strategy=strategy, reason="quoted", require_quote=True),)
    made = [how(Engine(text), RouterConfig(rules=rules)) for how in (online, offline)]
    assert [one.abstained for one in made] == [abstained, abstained]
    assert made[0].answer == made[1].answer == (prompt_format().texts.abstention if abstained else "Athens")
    assert made[0].route == made[1].route and made[0].citations == made[1].citations
    assert made[0].hits == made[1].hits == HITS
