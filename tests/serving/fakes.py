"""Stand-ins for the retriever and the engine: what they say is decided by the test, how they say it is real."""

import threading
import time
from concurrent.futures import Future

from retrieval.records import Hit, Passage
from serving.answering import prepare
from serving.asking import ServedRelease
from serving.config import GenerationConfig
from serving.engine import Completion, Ticket
from serving.interfaces import Pins
from serving.strategies import STRATEGIES, available_strategies
from training.config import PromptConfig
from training.format import PromptFormat

GREECE = Passage(
    "c1", "greece", "Greece", "Government", "https://x.org/gr", "capital: Athens is the capital.", 100, 131
)
SPAIN = Passage("c2", "spain", "Spain", "Government", "", "capital: Madrid", 7, 22)
CITED = "##begin_quote##Athens is the capital.##end_quote##\n<ANSWER>: Athens"


class FakeRetriever:
    def __init__(self, passages=(GREECE, SPAIN)):
        self.passages = passages
        self.batches = []

    def search(self, queries, k):
        assert k <= len(self.passages), "serving must not ask for more than there is"
        self.batches.append(list(queries))
        return [[Hit(p, 1.0 / rank, rank) for rank, p in enumerate(self.passages[:k], start=1)] for _ in queries]


class FakeEngine:
    """Says `texts[adapter]` character by character; records the requests and cancellations."""

    def __init__(self, texts=None, *, delay_s=0.0, error_code="", adapters=("raft", "finetuned")):
        self.texts = {None: "Athens of old", "raft": CITED, "finetuned": "<ANSWER>: Patras", **(texts or {})}
        self.delay_s = delay_s
        self.error_code = error_code
        self.adapters = tuple(adapters)
        self.alive = True
        self.requests = []
        self.cancelled = []

    def submit(self, request, on_text=None):
        self.requests.append(request)
        future = Future()
        future.set_running_or_notify_cancel()
        stopped = threading.Event()

        def cancel():
            if not future.done():
                self.cancelled.append(request.request_id)
                stopped.set()

        def speak():
            text = self.texts[request.adapter]
            for char in text:
                if stopped.wait(self.delay_s) or stopped.is_set():
                    future.set_result(
                        Completion(request.request_id, finish_reason="error", error="gone", error_code="cancelled")
                    )
                    return
                if on_text and not self.error_code:
                    on_text(char)
            if self.error_code:
                completion = Completion(
                    request.request_id, finish_reason="error", error="the engine says no", error_code=self.error_code
                )
            else:
                completion = Completion(request.request_id, text, "stop", 11, 7, 1.0, 2.0)
            future.set_result(completion)

        threading.Thread(target=speak, daemon=True).start()
        return Ticket(future, cancel)

    def generate(self, requests):
        return [self.submit(request).completion.result() for request in requests]

    def close(self):
        self.alive = False


def prompt_format(language="en"):
    return PromptFormat.load(PromptConfig(), language)


def served_release(adapters=("raft", "finetuned"), *, language="en", examples=(), passages=2, **generation):
    return ServedRelease(
        pins=Pins(
            release="release/test/0123456789abcdef",
            index="index/test/0123456789abcdef",
            adapters={role: f"adapter/{role}/0123456789abcdef" for role in adapters},
        ),
        available=available_strategies(adapters, has_index=True, has_examples=bool(examples)),
        prompt_format=prompt_format(language),
        examples=tuple(examples),
        generation=GenerationConfig(**generation),
        seed=17,
        passages=passages,
        embeds=True,
    )


def wait_until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def base_request(question):
    """A closed-book request to the base model."""
    return prepare(question, STRATEGIES["base"], [], prompt_format(), (), GenerationConfig()).request
