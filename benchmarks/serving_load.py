"""What the graph costs over its engine, and what it does when too many ask.

    python -m benchmarks.serving_load RECIPE overhead|throughput|overload [--set KEY=VALUE …]

Needs a promoted release of the recipe. The engine beside the graph is the same class with the same settings, in this
process; sides alternate, and the other one is idle meanwhile.
- overhead: one client, `base`, one new token. Milliseconds that the graph adds to the engine, median over requests and
  paired; and for `rag` what retrieval takes of it.
- throughput: 32 clients, `base`; completion tokens per second of the graph ÷ the engine's own batch over the same
  prompts.
- overload: as many clients as the graph admits, then four times as many. 99th percentiles of accepted requests, and how
  soon the others are refused.
Not covered: other servers (benchmarks/serving_peer.py), Ray's own hops (benchmarks/serving_hops.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.conditions import describe_conditions, describe_ratio
from benchmarks.http_load import Load, Reply, percentile, run_load
from cluster.releases import Release, open_release
from cluster.store import Store
from rayft import Recipe, load
from serving.answering import prepare
from serving.engine import GenerationRequest
from serving.service import running_service
from serving.strategies import STRATEGIES
from serving.transformers_engine import TransformersEngine
from training.base_model import base_model_directory
from training.format import PromptFormat
from training.samples import load_questions

CLIENTS = 32
PACKAGES = ("ray", "torch", "transformers")
RETRY_PAUSE_S = 0.5


def questions_of(recipe: Recipe, store: Store, release: Release, count: int) -> list[str]:
    """`count` questions of the release's samples, over and over where there are fewer."""
    assert release.samples is not None, "the release pins samples"
    texts = [question.text for question in load_questions(store.open_ref(release.samples))]
    return [texts[number % len(texts)] for number in range(count)]


def chat_body(question: str, strategy: str, max_tokens: int) -> dict[str, Any]:
    """A request of the chat API."""
    messages = [{"role": "user", "content": question}]
    return {"model": f"rayft-{strategy}", "messages": messages, "max_tokens": max_tokens, "temperature": 0}


def engine_requests(recipe: Recipe, questions: list[str], max_tokens: int) -> list[GenerationRequest]:
    """The same requests as the graph makes for `base`."""
    prompt_format = PromptFormat.load(recipe.prompt, recipe.language)
    generation = recipe.generation.model_copy(update={"max_new_tokens": max_tokens})
    return [prepare(text, STRATEGIES["base"], (), prompt_format, (), generation).request for text in questions]


def overhead(recipe: Recipe, url: str, questions: list[str], requests: int) -> list[str]:
    """Lines about one client; needs the engine in this process."""
    engine, client = open_engine(recipe), httpx.Client(timeout=120, trust_env=False)
    added, own, direct, searching, rag_added = [], [], [], [], []
    try:
        asked = engine_requests(recipe, questions, 1)
        for number in range(-3, requests):  # three to warm both up
            question, request = questions[number % len(questions)], asked[number % len(asked)]
            began = time.perf_counter()
            engine.generate([request])
            alone = time.perf_counter() - began
            reply, found = (ask_once(client, url, chat_body(question, name, 1)) for name in ("base", "rag"))
            if number < 0:
                continue
            direct.append(alone)
            added.append(reply.seconds - alone)
            own.append(reply.seconds - _engine_seconds(reply.body))
            searching.append(found.body["rayft"]["timings_ms"]["retrieval"] / 1000)
            rag_added.append(found.seconds - _engine_seconds(found.body))
    finally:
        engine.close()
        client.close()
    return [
        f"engine alone: p50 {_ms(direct, 0.5)} a request of one new token",
        f"graph − engine alone, paired: p50 {_ms(added, 0.5)}, p90 {_ms(added, 0.9)} (n={requests})",
        f"graph − the engine's own time in the same request: p50 {_ms(own, 0.5)}, p90 {_ms(own, 0.9)}",
        f"`rag`: retrieval p50 {_ms(searching, 0.5)} of {_ms(rag_added, 0.5)} beside the engine",
    ]


def ask_once(client: httpx.Client, url: str, body: dict[str, Any]) -> Reply:
    """One request over a connection that stays open, as clients keep theirs."""
    began = time.perf_counter()
    response = client.post(url, json=body)
    response.raise_for_status()
    return Reply(response.status_code, time.perf_counter() - began, response.json())


def throughput(recipe: Recipe, url: str, questions: list[str], rounds: int, max_tokens: int) -> list[str]:
    """Lines about many clients."""
    engine = open_engine(recipe)
    bodies = [chat_body(question, "base", max_tokens) for question in questions]
    asked = engine_requests(recipe, questions, max_tokens)
    graph_rates, engine_rates = [], []
    try:
        for number in range(rounds + 1):
            began = time.perf_counter()
            tokens = sum(completion.completion_tokens for completion in engine.generate(asked))
            engine_rate = tokens / (time.perf_counter() - began)
            run = run_load(url, bodies, CLIENTS)
            assert len(run.answered) == len(bodies), Counter(reply.status for reply in run.replies)
            name = f"round {number}" if number else "warm-up"
            print(f"{name}: engine {engine_rate:.0f}, graph {run.tokens_per_second:.0f} tokens/s", flush=True)
            if number:
                graph_rates.append(run.tokens_per_second)
                engine_rates.append(engine_rate)
    finally:
        engine.close()
    return [
        f"{len(bodies)} requests of {max_tokens} tokens, {CLIENTS} clients, batches of {recipe.generation.batch_rows}",
        describe_ratio("graph ÷ engine, tokens/s", graph_rates, engine_rates),
    ]


def overload(recipe: Recipe, url: str, questions: list[str], max_tokens: int) -> list[str]:
    """Lines about four times as many clients as are admitted."""
    admitted = recipe.max_in_flight
    bodies = [chat_body(question, "base", max_tokens) for question in questions]
    run_load(url, bodies[:admitted], admitted)
    at_capacity = run_load(url, bodies, admitted)
    beyond = run_load(url, bodies * 2, 4 * admitted, RETRY_PAUSE_S)
    refused = [reply for reply in beyond.replies if reply.status == 429]
    p99s = [percentile([reply.seconds for reply in run.answered], 0.99) for run in (at_capacity, beyond)]
    others = Counter(reply.status for reply in beyond.replies if reply.status not in (200, 429))
    return [
        f"{admitted} clients (all are admitted): {_describe(at_capacity)}",
        f"{4 * admitted} clients, who wait {RETRY_PAUSE_S:g} s after a refusal: {_describe(beyond)}",
        f"accepted requests, p99 at four times ÷ p99 at capacity: {p99s[1] / p99s[0]:.2f}",
        f"{len(refused)} refused with 429: p50 {_ms([r.seconds for r in refused], 0.5)}, "
        f"p99 {_ms([r.seconds for r in refused], 0.99)}; other statuses: {dict(others) or 'none'}",
    ]


def _describe(run: Load) -> str:
    seconds = [reply.seconds for reply in run.answered]
    return (
        f"{len(run.answered)} answers in {run.seconds:.0f} s, p50 {statistics.median(seconds):.2f} s, "
        f"p99 {percentile(seconds, 0.99):.2f} s"
    )


def _engine_seconds(body: dict[str, Any]) -> float:
    times = body["rayft"]["timings_ms"]
    return float(times["queue"] + times["generation"]) / 1000


def _ms(seconds: list[float], share: float) -> str:
    return f"{percentile(seconds, share) * 1000:.1f} ms"


def open_engine(recipe: Recipe) -> TransformersEngine:
    """The engine that a generator replica has, without adapters."""
    generation = recipe.generation
    return TransformersEngine(
        base_model_directory(recipe.model), {}, recipe.model.precision, generation.batch_rows, generation.threads
    )


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("what", choices=("overhead", "throughput", "overload"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--requests", type=int, default=0, help="requests (of each round)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()
    if given.what == "throughput":
        given.set = [f"generation.batch_rows={CLIENTS}", *given.set]
    recipe = load(given.recipe, given.set)
    store = Store(recipe.store.uri)
    release = open_release(store, recipe.name)
    count = given.requests or {"overhead": 40, "throughput": 3 * CLIENTS, "overload": 96}[given.what]
    questions = questions_of(recipe, store, release, count)
    run: dict[str, Callable[[str], list[str]]] = {
        "overhead": lambda url: overhead(recipe, url, questions, count),
        "throughput": lambda url: throughput(recipe, url, questions, given.rounds, given.max_tokens),
        "overload": lambda url: overload(recipe, url, questions, given.max_tokens),
    }
    with running_service(recipe, store, release) as base_url:
        lines = run[given.what](f"{base_url}/v1/chat/completions")
    for line in [describe_conditions(PACKAGES, recipe.seed), *lines]:
        print(line, flush=True)


if __name__ == "__main__":
    main()
