"""The graph against `transformers serve`: the same model, the same prompts, the same clients.

    python -m benchmarks.serving_peer RECIPE [--set KEY=VALUE …] [--rounds 3] [--peer-options="--continuous-batching"]

Needs a promoted release of the recipe. The peer gets the messages that the graph makes for `base`, and serves the same
weights in the same precision; both servers stay up, sides alternate, and the other one is idle meanwhile. Prints
completion tokens per second of each, and ours ÷ the peer's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.conditions import describe_conditions, describe_ratio
from benchmarks.http_load import run_load
from benchmarks.serving_load import CLIENTS, PACKAGES, chat_body, engine_requests, questions_of
from cluster.releases import open_release
from cluster.store import Store
from rayft import load
from serving.service import running_service
from training.base_model import base_model_directory, model_dtype

START_S = 180.0


@contextlib.contextmanager
def peer_server(model: Path, dtype: str, options: Sequence[str], threads: int) -> Iterator[str]:
    """`transformers serve` in a process of its own; yields its chat URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "auto", "--dtype", dtype, *options]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        )
        try:
            began = time.monotonic()
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() - began > START_S:
                    log.seek(0)
                    raise SystemExit(f"transformers serve did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--peer-options", default="", help="more options of `transformers serve`")
    given = parser.parse_args()
    recipe = load(given.recipe, [f"generation.batch_rows={CLIENTS}", *given.set])
    store = Store(recipe.store.uri)
    release = open_release(store, recipe.name)
    questions = questions_of(recipe, store, release, given.requests)
    ours = [chat_body(question, "base", given.max_tokens) for question in questions]
    model = base_model_directory(recipe.model)
    theirs = [
        {"model": str(model), "messages": list(request.messages), "max_tokens": given.max_tokens, "temperature": 0}
        for request in engine_requests(recipe, questions, given.max_tokens)
    ]
    dtype = str(model_dtype(recipe.model.precision)).removeprefix("torch.")
    rates: tuple[list[float], list[float]] = ([], [])
    with (
        running_service(recipe, store, release) as base_url,
        peer_server(model, dtype, shlex.split(given.peer_options), recipe.generation.threads) as peer_url,
    ):
        for number in range(given.rounds + 1):
            sides = [(f"{base_url}/v1/chat/completions", ours), (peer_url, theirs)]
            runs = [run_load(url, bodies if number else bodies[:CLIENTS], CLIENTS) for url, bodies in sides]
            for name, run in zip(("rayft", "transformers serve"), runs, strict=True):
                failed = [reply for reply in run.replies if reply.status != 200]
                if failed:
                    raise SystemExit(f"{name} answered {failed[0].status}: {str(failed[0].body)[:300]}")
            print(
                f"{'warm-up' if number == 0 else f'round {number}'}: rayft {runs[0].tokens_per_second:.0f}, "
                f"transformers serve {runs[1].tokens_per_second:.0f} tokens/s",
                flush=True,
            )
            if number:
                for side, run in zip(rates, runs, strict=True):
                    side.append(run.tokens_per_second)
    print(describe_conditions(PACKAGES, recipe.seed))
    print(f"{given.requests} requests of {given.max_tokens} tokens by {CLIENTS} clients; {dtype}; {given.peer_options}")
    print(describe_ratio("rayft ÷ transformers serve, tokens/s", rates[0], rates[1]))


if __name__ == "__main__":
    main()
