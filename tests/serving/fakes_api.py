"""The HTTP API over stand-ins: what engine, retriever, keys and feedback do is decided by the test."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import uvicorn
from fastapi.testclient import TestClient

from retrieval.records import Hit
from serving.admission import Limits
from serving.api import ApiParts, make_api
from serving.api_errors import ApiError
from serving.asking import Doors
from serving.conversation import Conversation
from serving.engine import Completion
from serving.interfaces import Embedded, Found, StreamBrokenError, UnknownRequestError
from serving.router import Router
from serving.router_config import RouterConfig
from serving.tracing import NO_SPAN
from tests.serving.fakes import CITED, GREECE, SPAIN, served_release

QUESTION = "What is the capital of Greece?"
USER = [{"role": "user", "content": QUESTION}]
SECRET = "s3kr1t-words-of-the-user"


class FakeGraph:
    """Retriever and generator behind the doors of a conversation. Says `texts[role]` character by character."""

    def __init__(self, texts=None, *, delay_s=0.0, first_s=0.0, error_code="", breaks_after=None, raises=None):
        self.texts = {None: "Athens of old", "raft": CITED, "finetuned": "<ANSWER>: Patras", **(texts or {})}
        self.delay_s, self.first_s = delay_s, first_s
        self.error_code, self.breaks_after, self.raises = error_code, breaks_after, raises
        self.requests, self.searches, self.embedded = [], [], []
        self.cancelled = 0

    async def search(self, query, pins):
        if self.raises:
            raise self.raises
        self.searches.append(query)
        found = [passage for passage in (GREECE, SPAIN) if not query.filter or _matches(query.filter, passage)]
        hits = tuple(Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate(found[: query.k], start=1))
        return Found(hits, np.ones(4, dtype=np.float32) / 2 if query.embed else None)

    async def embed(self, texts, pins):
        self.embedded.append(list(texts))
        vectors = np.arange(len(texts) * 3, dtype=np.float32).reshape(len(texts), 3)
        return Embedded(vectors, tuple(len(text.split()) + 2 for text in texts), max_tokens=16)

    async def stream(self, request, pins):
        self.requests.append(request)
        text = self.texts[request.adapter.split("/")[1] if request.adapter else None]
        try:
            await asyncio.sleep(self.first_s)
            if self.raises:
                raise self.raises
            if self.error_code:
                yield Completion(request.request_id, finish_reason="error", error="no", error_code=self.error_code)
                return
            for place, char in enumerate(text):
                if place == self.breaks_after:
                    raise StreamBrokenError("gone")
                await asyncio.sleep(self.delay_s)
                yield char
            yield Completion(request.request_id, text, "stop", 11, 7, 1.0, 2.0)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def generate(self, request, pins):
        async for event in self.stream(request, pins):
            if isinstance(event, Completion):
                return event


def _matches(wanted, passage):
    return wanted.matches({"doc_id": [("text", passage.doc_id)]})


class FakeObserver:
    def __init__(self):
        self.requests, self.first_tokens, self.events, self.gauge = [], [], [], []

    def request(self, *, strategy, outcome, seconds):
        self.requests.append((strategy, outcome))

    def first_token(self, *, strategy, seconds):
        self.first_tokens.append(strategy)

    def answer(self, took):
        pass

    def in_flight(self, requests):
        self.gauge.append(requests)

    def count(self, event):
        self.events.append(event)

    def span(self, name, parent="", **attributes):
        return NO_SPAN


class FakeFeedback:
    """Knows the answers that were given to each key."""

    def __init__(self, raises=None):
        self.noted, self.ratings, self.raises = {}, [], raises

    def note(self, interaction):
        self.noted[interaction.request_id] = interaction

    async def rate(self, rating, caller):
        if self.raises:
            raise self.raises
        noted = self.noted.get(rating.request_id)
        if noted is None or noted.key_id != caller.key_id:
            raise UnknownRequestError
        self.ratings.append(rating)

    def tallies(self):
        return ()


class FakeKeys:
    required = True

    def __init__(self, callers):
        self.callers = callers

    def caller(self, authorization):
        found = self.callers.get((authorization or "").removeprefix("Bearer "))
        if found is None:
            raise ApiError(401, "there is no such key", code="invalid_api_key")
        return found


class FakeQuotas:
    def __init__(self, requests=1000):
        self.left, self.spent = requests, 0

    async def admit(self, caller, *, takes_tokens=True):
        if not self.left:
            raise ApiError(429, "the quota is used up", code="quota_exceeded", retry_after_s=30)
        self.left -= 1

    def spend(self, caller, tokens):
        self.spent += tokens


class Service:
    """The API over a fake graph, and a client for it."""

    def __init__(
        self,
        graph=None,
        *,
        timeout_s=5.0,
        in_flight=4,
        max_body_bytes=20_000,
        feedback=None,
        release=None,
        tokens=None,
        **parts,
    ):
        self.graph = graph or FakeGraph()
        self.observer, self.feedback, self.quotas = FakeObserver(), feedback or FakeFeedback(), FakeQuotas()
        self.served, self.tokens = release or served_release(), tokens
        self.conversation = self.converse(self.served)
        given = {"feedback": self.feedback, "observer": self.observer, "quotas": self.quotas, **parts}
        limits = Limits(in_flight, timeout_s, max_body_bytes)
        self.parts = ApiParts(current=lambda: self.conversation, limits=limits, **given)
        self.api = make_api(self.parts)
        self.client = TestClient(self.api)

    def converse(self, served):
        doors = Doors(
            self.graph.search, self.graph.generate, self.graph.stream, self.graph.embed, self.feedback, self.observer
        )
        return Conversation(served, Router(RouterConfig(), served.available), doors, self.tokens)

    def post(self, model="rayft-raft", messages=USER, **body):
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **body})

    def send(self, path, body, **headers):
        return self.client.post(path, json=body, headers=headers)

    def events(self, model="rayft-raft", **body):
        return events_of(self.post(model, stream=True, **body))


def events_of(response, done=True):
    """The data of a whole stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert (lines[-1] == "[DONE]") == done, lines[-1]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def content_of(events):
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert SECRET not in response.text
    return error


@contextmanager
def serving(api):
    """Serves an application on loopback; yields its address."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
