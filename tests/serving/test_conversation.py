import asyncio
import contextlib
import dataclasses

import pytest

from cluster.errors import UserError
from retrieval.filters import parse_filter
from retrieval.records import Hit
from serving.answering import readable
from serving.asking import Ask, Doors, GenerationFailedError
from serving.conversation import READ_CHARACTERS, Conversation
from serving.engine import Completion
from serving.follow_up import load_rewrite_prompt
from serving.interfaces import Caller, Found, PartUnavailableError, StreamBrokenError
from serving.records import Answer
from serving.router import Router
from serving.router_config import LearningConfig, PolicyRule, RouterConfig
from serving.strategies import StrategyNotAllowedError
from tests.serving.fakes import CITED, GREECE, SPAIN, served_release

QUESTION = "What is the capital of Greece?"
UNVERIFIED = "##begin_quote##Lisbon##end_quote## <ANSWER>: Lisbon"


class Graph:
    """Says `texts[role]`, a character after `delay_s[role]` seconds each; remembers what it was asked."""

    def __init__(self, texts=None, delay_s=None, broken=()):
        self.texts = {None: "Athens of old", "raft": CITED, "finetuned": "<ANSWER>: Patras", **(texts or {})}
        self.delay_s = delay_s or {}
        self.broken = set(broken)
        self.searches, self.requests, self.cancelled, self.streamed = [], [], [], []
        self.pins = set()

    async def search(self, query, pins):
        self.pins.add(pins.release)
        self.searches.append(query)
        hits = tuple(Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate((GREECE, SPAIN), start=1))
        return Found(hits[: query.k], "the embedding" if query.embed else None)

    async def stream(self, request, pins):
        self.pins.add(pins.release)
        self.requests.append(request)
        role = request.adapter.split("/")[1] if request.adapter else None
        text, ended = self.texts[role], False
        try:
            for char in text:
                await asyncio.sleep(self.delay_s.get(role, 0))
                if role in self.broken:
                    self.broken.discard(role)
                    raise StreamBrokenError("gone")
                self.streamed.append(role)
                yield char
            ended = True
            yield Completion(request.request_id, text, "stop", 11, len(text), 1.0, 2.0, cached_tokens=3)
        except (asyncio.CancelledError, GeneratorExit):
            if not ended:
                self.cancelled.append(role)
            raise

    async def generate(self, request, pins):
        async for event in self.stream(request, pins):
            if isinstance(event, Completion):
                return event


class Tokens:
    window = 10_000

    def __init__(self, window=10_000):
        self.window = window

    def count(self, messages):
        return sum(len(message["content"].split()) for message in messages)


class Feedback:
    def __init__(self, fails=False):
        self.noted, self.fails = [], fails

    def note(self, interaction):
        if self.fails:
            raise RuntimeError("the store is gone")
        self.noted.append(interaction)

    def tallies(self):
        if self.fails:
            raise RuntimeError("the store is gone")
        return ()


class FailingObserver:
    def answer(self, _):
        raise RuntimeError

    def span(self, *_, **__):
        raise RuntimeError


class Observer:
    def __init__(self):
        self.answers, self.spans = [], []

    def answer(self, took):
        self.answers.append(took)

    def span(self, name, parent="", **attributes):
        self.spans.append(name)
        return Span()


class Span:
    traceparent = "00-trace"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set(self, **_):
        pass


class Classifier:
    """An intent classifier that remembers the embedding it was shown."""

    needs_embedding = True

    def __init__(self):
        self.seen = []

    def classify(self, text, embedding):
        from serving.intents import Guess

        self.seen.append(embedding)
        return Guess("", 0.0, "")


def conversation(graph, release=None, *, router=None, classifier=None, tokens=None, feedback=None, observer=None):
    release = release or served_release()
    doors = Doors(graph.search, graph.generate, graph.stream, None, feedback, observer)
    return Conversation(release, Router(router or RouterConfig(), release.available, classifier), doors, tokens=tokens)


def ask(strategy="raft", question=QUESTION, **wishes):
    return Ask("r1", question, strategy, **wishes)


def answered(talk, asked):
    return asyncio.run(talk.answer(asked))


def streamed(talk, asked):
    async def read():
        return [piece async for piece in talk.stream(asked)]

    *pieces, answer = asyncio.run(read())
    assert isinstance(answer, Answer)
    return pieces, answer


@pytest.mark.parametrize("strategy", ["base", "finetuned"])
def test_closed_book_strategy_searches_nothing(strategy):
    graph = Graph()
    made = answered(conversation(graph), ask(strategy))
    assert not graph.searches and not made.hits and made.timings_ms.retrieval == 0


def test_explicit_strategy_searches_once_without_embedding_and_names_the_pinned_adapter():
    graph, release = Graph(), served_release()
    made = answered(conversation(graph, release), ask("raft"))
    assert [(query.text, query.embed) for query in graph.searches] == [(QUESTION, False)]
    assert [request.adapter for request in graph.requests] == [release.pins.adapters["raft"]]
    assert graph.pins == {release.name} and made.release == release.name


def test_auto_searches_once_and_routes_by_the_embedding_and_what_was_found():
    graph, classifier = Graph(), Classifier()
    rules = (PolicyRule(strategy="rag", metadata={"update_frequency": "daily"}, reason="it changes"),)
    release = dataclasses.replace(served_release(), update_frequencies={"": "daily"})
    talk = conversation(graph, release, router=RouterConfig(rules=rules), classifier=classifier)
    made = answered(talk, ask("auto", question="Malta"))
    assert made.strategy == "rag" and len(graph.searches) == 1 and classifier.seen == ["the embedding"]


def test_question_of_any_length_is_searched_and_routed_by_its_beginning_and_answered_whole():
    graph, routed = Graph(), []
    talk = conversation(graph)
    route = talk._router.route
    talk._router.route = lambda query, tallies: routed.append(query) or route(query, tallies)
    question = QUESTION + " x" * 100_000
    answered(talk, ask("auto", question=question))
    assert len(graph.searches[0].text) == READ_CHARACTERS and graph.searches[0].text.startswith(QUESTION)
    assert routed[0].question == graph.searches[0].text
    assert question in "".join(message["content"] for message in graph.requests[0].messages)


def test_auto_counts_the_passages_for_the_rules():
    rules = (PolicyRule(strategy="raft", metadata_above={"context_length": 5}, reason="long"),)
    router = RouterConfig(rules=rules, default="base")
    assert answered(conversation(Graph(), router=router, tokens=Tokens()), ask("auto")).strategy == "raft"
    assert answered(conversation(Graph(), router=router), ask("auto")).strategy == "base", "unknown without a tokenizer"


def test_auto_without_an_index_never_searches():
    graph = Graph()
    release = served_release(adapters=("finetuned",))
    release = dataclasses.replace(
        release, pins=dataclasses.replace(release.pins, index=""), available=("base", "finetuned", "auto")
    )
    assert answered(conversation(graph, release), ask("auto")).strategy == "finetuned"
    assert not graph.searches


def test_caller_may_not_use_a_strategy_and_auto_never_takes_it():
    graph, caller = Graph(), Caller(strategies=("rag", "base"))
    with pytest.raises(StrategyNotAllowedError, match="`raft` is not open to this key; it may use base, rag, auto"):
        answered(conversation(graph), ask("raft", caller=caller))
    assert not graph.searches and not graph.requests
    for question in (QUESTION, "Why?", "Compare Malta and Cyprus", "Malta"):
        assert answered(conversation(Graph()), ask("auto", question, caller=caller)).strategy in caller.strategies


def test_caller_filter_is_narrowed_by_the_request_and_never_replaced():
    graph = Graph()
    caller = Caller(filter=parse_filter({"tenant": "acme"}), groups=frozenset({"staff"}))
    talk = conversation(graph)
    answered(talk, ask(caller=caller, filter=parse_filter({"tenant": "other"})))
    asyncio.run(talk.search("x", 5, caller, parse_filter({"lang": "en"})))
    asked, searched = graph.searches
    assert asked.groups == searched.groups == caller.groups
    acme, other = {"tenant": [("text", "acme")]}, {"tenant": [("text", "other")]}
    assert not asked.filter.matches(acme) and not asked.filter.matches(other)
    assert searched.filter.matches({**acme, "lang": [("text", "en")]}) and not searched.filter.matches(acme)


def test_hybrid_cited_answer_ends_the_closed_book_one_early():
    graph = Graph(delay_s={"finetuned": 0.02, "raft": 0.002})
    made = answered(conversation(graph, tokens=Tokens()), ask("hybrid"))
    assert (made.answer, made.request_id) == ("Athens", "r1") and graph.cancelled == ["finetuned"]
    said = graph.streamed.count("finetuned")
    assert said < len(graph.texts["finetuned"]), "not waited for"
    assert made.usage.completion_tokens == len(CITED) + said
    closed_book = next(request for request in graph.requests if "finetuned" in request.adapter)
    assert made.usage.prompt_tokens == 11 + (Tokens().count(closed_book.messages) if said else 0)


def test_hybrid_cited_answer_is_given_although_the_closed_book_one_failed_before():
    class HalfBroken(Graph):
        async def stream(self, request, pins):
            if "finetuned" in request.adapter:
                raise PartUnavailableError("no replica")
            async with contextlib.aclosing(super().stream(request, pins)) as pieces:
                async for piece in pieces:
                    yield piece

    made = answered(conversation(HalfBroken(delay_s={"raft": 0.001})), ask("hybrid"))
    assert made.answer == "Athens" and made.usage.completion_tokens == len(CITED)


@pytest.mark.parametrize("failing", ["raft", "finetuned"])
def test_hybrid_raises_the_error_of_a_leg_that_the_answer_needs(failing):
    class Failing(Graph):
        async def stream(self, request, pins):
            if failing in request.adapter:
                yield Completion(request.request_id, finish_reason="error", error="out of memory")
                return
            async with contextlib.aclosing(super().stream(request, pins)) as pieces:
                async for piece in pieces:
                    yield piece

    with pytest.raises(GenerationFailedError, match="out of memory"):
        answered(conversation(Failing({"raft": UNVERIFIED})), ask("hybrid"))


def test_hybrid_waits_for_the_closed_book_answer_where_no_quote_verifies():
    graph = Graph({"raft": UNVERIFIED}, delay_s={"finetuned": 0.002})
    made = answered(conversation(graph), ask("hybrid"))
    assert made.answer == "Patras" and not made.citations and made.usage.completion_tokens == len(UNVERIFIED) + 16
    labels = served_release().prompt_format.texts.labels
    assert readable(made, labels) == "Patras (not from the documents)"


def test_hybrid_abstains_where_neither_holds():
    pieces, made = streamed(conversation(Graph({"raft": UNVERIFIED, "finetuned": ""})), ask("hybrid"))
    assert made.abstained and pieces == [served_release().prompt_format.texts.abstention]


def test_hybrid_replica_that_dies_in_the_closed_book_answer_is_asked_again():
    graph = Graph({"raft": UNVERIFIED}, broken={"finetuned"})
    assert answered(conversation(graph), ask("hybrid")).answer == "Patras"


def test_hybrid_requests_have_ids_of_their_own():
    graph = Graph()
    answered(conversation(graph), ask("hybrid"))
    assert {request.request_id for request in graph.requests} == {"r1/raft", "r1/finetuned"}


def test_hybrid_caller_who_goes_away_cancels_both():
    graph = Graph(delay_s={"raft": 1, "finetuned": 1})

    async def leave():
        task = asyncio.create_task(conversation(graph).answer(ask("hybrid")))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert sorted(graph.cancelled) == ["finetuned", "raft"]


def test_question_without_an_answer_has_taken_both_prompts_of_hybrid_and_what_was_heard():
    graph, tokens, asked = Graph(delay_s={"raft": 1, "finetuned": 0.01}), Tokens(), ask("hybrid")
    talk = conversation(graph, tokens=tokens)

    async def leave():
        assert await talk.tokens_taken(asked) == 0
        task = asyncio.create_task(talk.answer(asked))
        while len(graph.streamed) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await talk.tokens_taken(asked)

    taken = asyncio.run(leave())
    prompts = sum(tokens.count(request.messages) for request in graph.requests)
    assert len(graph.requests) == 2 and prompts + 3 <= taken <= prompts + len(graph.streamed)


def test_hybrid_is_not_offered_where_a_part_lacks():
    with pytest.raises(UserError, match="`hybrid` needs a part that this release lacks"):
        answered(conversation(Graph(), served_release(adapters=("raft",))), ask("hybrid"))


@pytest.mark.parametrize("strategy", ["base", "rag", "finetuned", "raft", "hybrid", "auto"])
def test_stream_pieces_joined_are_the_readable_answer(strategy):
    labels = served_release().prompt_format.texts.labels
    pieces, made = streamed(conversation(Graph()), ask(strategy))
    assert "".join(pieces) == readable(made, labels)
    whole = answered(conversation(Graph()), ask(strategy))
    assert (made.answer, made.citations, made.route) == (whole.answer, whole.citations, whole.route)


def test_passages_that_do_not_fit_are_left_out_and_counted():
    made = answered(conversation(Graph(), served_release(max_new_tokens=10), tokens=Tokens(45)), ask("rag"))
    assert made.passages_left_out == 1 and [hit.passage for hit in made.hits] == [GREECE]


def test_question_that_does_not_fit_is_refused_before_generation():
    graph = Graph()
    with pytest.raises(GenerationFailedError) as refused:
        answered(conversation(graph, tokens=Tokens(120)), ask("base", question="why " * 200))
    assert refused.value.completion.error_code == "context_length_exceeded" and not graph.requests


TURNS = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Athens [1]"})


def test_later_turn_is_searched_and_asked_as_its_standalone_question():
    graph = Graph()
    made = answered(conversation(graph), ask("rag", "And of Spain?", history=TURNS))
    assert made.standalone == "What is the capital of Spain?" == graph.searches[0].text
    assert "capital of Spain" in graph.requests[0].messages[-1]["content"]
    assert answered(conversation(graph), ask("rag", history=TURNS)).standalone == "", "it stood alone"


def test_follow_up_off_leaves_the_question():
    graph = Graph()
    release = dataclasses.replace(served_release(), follow_up="off")
    assert answered(conversation(graph, release), ask("rag", "And of Spain?", history=TURNS)).standalone == ""
    assert graph.searches[0].text == "And of Spain?"


@pytest.mark.parametrize(
    ("reply", "standalone"),
    [
        ("What is the capital of Spain, and not of Greece?", "What is the capital of Spain, and not of Greece?"),
        ("I would rather talk about pizza.", "What is the capital of Spain?"),
        ("", "What is the capital of Spain?"),
    ],
)
def test_follow_up_by_the_model_falls_back_to_the_rules(reply, standalone):
    release = dataclasses.replace(served_release(), follow_up="model", rewrite_prompt=load_rewrite_prompt("", "en"))
    graph = Graph({None: reply})
    made = answered(conversation(graph, release), ask("raft", "And of Spain?", history=TURNS))
    assert made.standalone == standalone and graph.requests[0].adapter is None
    assert made.usage.completion_tokens == len(CITED) + len(reply), "the rewriting is counted"


def test_system_message_is_shown_to_the_base_model_below_ours_and_to_no_adapter():
    graph = Graph()
    system = ({"role": "system", "content": "Answer in verse. <|im_end|>"},)
    ours = served_release().prompt_format.texts.system_with_passages
    answered(conversation(graph), ask("rag", history=system))
    answered(conversation(graph), ask("raft", history=system))
    base, adapter = (request.messages[0]["content"] for request in graph.requests)
    assert base.startswith(ours + "\nAnswer in verse.") and "<|im_end|>" not in base
    assert adapter == ours


def test_answer_is_noted_for_its_rating_and_measured():
    feedback, observer, graph = Feedback(), Observer(), Graph()
    caller = Caller(tenant="acme", key_id="k1")
    asked = ask("auto", "Compare Spain and Greece", caller=caller, user="u1")
    made = answered(conversation(graph, feedback=feedback, observer=observer), asked)
    [noted] = feedback.noted
    assert (noted.request_id, noted.question, noted.answer) == ("r1", "Compare Spain and Greece", made.answer)
    assert (noted.tenant, noted.key_id, noted.user) == ("acme", "k1", "u1")
    assert (noted.intent, noted.doc_ids) == ("analysis", ("greece",))
    [took] = observer.answers
    assert (took.strategy, took.verified, took.quotes) == ("hybrid", 1, 1)
    assert observer.spans == ["retrieve", "route", "generate"]
    assert all(request.traceparent == "00-trace" for request in graph.requests)


def test_stream_is_noted_once():
    feedback = Feedback()
    streamed(conversation(Graph(), feedback=feedback), ask())
    assert [noted.answer for noted in feedback.noted] == ["Athens"]


def test_broken_feedback_and_metrics_fail_no_request():
    talk = conversation(Graph(), feedback=Feedback(fails=True), observer=FailingObserver())
    assert answered(talk, ask("auto")).answer and streamed(talk, ask("hybrid"))[1].answer == "Athens"


def test_learned_weights_are_drawn_with_their_probability():
    router = RouterConfig(rules=(), learning=LearningConfig(strategies=("rag", "raft"), exploration=1.0))
    made = answered(conversation(Graph(), router=router, feedback=Feedback()), ask("auto"))
    assert made.strategy in ("rag", "raft") and made.route.propensity < 1


QUOTED = RouterConfig(rules=(PolicyRule(strategy="raft", reason="quoted", require_quote=True),))


def test_required_quote_that_does_not_verify_is_an_abstention_and_nothing_of_the_answer_is_streamed():
    feedback, graph = Feedback(), Graph({"raft": UNVERIFIED})
    talk = conversation(graph, router=QUOTED, feedback=feedback)
    pieces, made = streamed(talk, ask("auto"))
    assert made == dataclasses.replace(answered(talk, ask("auto")), timings_ms=made.timings_ms)
    abstention = talk.release.prompt_format.texts.abstention
    assert (made.abstained, made.answer, pieces) == (True, abstention, [abstention])
    assert made.route.require_quote and "no quote verified" in made.route.reason
    assert [hit.passage.doc_id for hit in made.hits] == ["greece", "spain"] and not made.citations
    assert feedback.noted[0].abstained and feedback.noted[0].answer == abstention


def test_required_quote_that_verifies_is_streamed_in_one_piece_with_its_source():
    talk = conversation(Graph(), router=QUOTED)
    pieces, made = streamed(talk, ask("auto"))
    assert pieces == [readable(made, talk.release.prompt_format.texts.labels)]
    assert made.answer == "Athens" and made.citations[0].verified and "[1] Greece" in pieces[0]


def test_caller_who_asks_for_the_strategy_by_name_is_shown_the_answer_as_unverified():
    pieces, made = streamed(conversation(Graph({"raft": UNVERIFIED}), router=QUOTED), ask("raft"))
    assert not made.abstained and made.answer == "Lisbon" and len(pieces) > 1
