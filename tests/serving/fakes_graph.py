"""Stand-ins for releases, engines and indexes whose answers name the parts that made them, so that mixing is visible.

They travel to replicas: everything here pickles, and state that a test must see or set lies in files.
"""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import ArtifactError
from retrieval.records import Hit, Passage
from serving.api import NoKeys
from serving.asking import ServedRelease
from serving.config import GenerationConfig, ServingRecipe
from serving.engine import Completion, Ticket
from serving.graph import Sources, assemble
from serving.ingress import IngressSettings
from serving.interfaces import Pins
from serving.strategies import available_strategies
from tests.serving.fakes import prompt_format

BROKEN = "broken"


def pins_of(version, *, index=True, base="b" * 64):
    return Pins(
        release=f"release/test/{version}",
        index=f"index/test/{version}" if index else "",
        adapters={role: f"adapter/{role}/{version}" for role in ("raft", "finetuned")},
        base_digest=base,
    )


def release_of(version, *, index=True, base="b" * 64):
    pins = pins_of(version, index=index, base=base)
    return ServedRelease(
        pins=pins,
        available=available_strategies(pins.adapters, has_index=index, has_examples=False),
        prompt_format=prompt_format(),
        examples=(),
        generation=GenerationConfig(passages=1),
        seed=17,
        passages=1 if index else 0,
        embeds=index,
    )


@dataclass(frozen=True)
class FileReleases:
    """The promoted version stands in a file."""

    directory: Path

    def promoted(self):
        file = self.directory / "current"
        return file.read_text() if file.exists() else ""

    def promote(self, version):
        draft = self.directory / "draft"
        draft.write_text(version)
        draft.replace(self.directory / "current")

    def open(self, version):
        return release_of(version)


class NoParts:
    def classifier(self, pins):
        return None

    def tokens(self, pins):
        return None


@dataclass(frozen=True)
class NamingEngines:
    """`load_s` is how long an engine or an adapter takes to load."""

    delay_s: float = 0.0
    load_s: float = 0.0
    log: Path | None = None

    def base(self, pins):
        return pins.base_digest or "none"

    def open(self, pins):
        for ref in pins.adapters.values():
            self.adapter(ref)
        return NamingEngine(self, pins.adapters.values())

    def adapter(self, ref):
        if BROKEN in ref:
            raise ArtifactError(f"{ref} is damaged")
        time.sleep(self.load_s)
        return Path(ref)

    def note(self, line):
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(f"{os.getpid()} {line}\n")


class NamingEngine:
    """Answers `<adapter> over <index>`. A question `die FILE` kills the process that is asked first, `break FILE` in
    the middle of its answer, `long` is answered in 3 s."""

    def __init__(self, source, adapters):
        self._source = source
        self._adapters = set(adapters)
        self.alive = True

    @property
    def adapters(self):
        return tuple(self._adapters)

    def load_adapter(self, name, directory):
        self._adapters.add(name)
        self._source.note(f"load {name}")

    def unload_adapter(self, name):
        self._adapters.discard(name)
        self._source.note(f"unload {name}")

    def close(self):
        self.alive = False
        self._source.note("close")

    def submit(self, request, on_text=None):
        future = Future()
        future.set_running_or_notify_cancel()
        stopped = threading.Event()
        threading.Thread(target=self._speak, args=(request, on_text, future, stopped), daemon=True).start()
        return Ticket(future, stopped.set)

    def _speak(self, request, on_text, future, stopped):
        if request.adapter is not None and request.adapter not in self._adapters:
            future.set_result(
                Completion(request.request_id, finish_reason="error", error="not there", error_code="unknown_adapter")
            )
            return
        prompt = " ".join(message["content"] for message in request.messages)
        index = re.search(r"index/test/\w+", prompt)
        text = f"<ANSWER>: {request.adapter or 'base'} over {index[0] if index else 'nothing'} end"
        if (order := re.search(r"die (\S+)", prompt)) and first(Path(order[1])):
            os.kill(os.getpid(), signal.SIGKILL)
        breaking = (order := re.search(r"break (\S+)", prompt)) and first(Path(order[1]))
        delay_s = 3.0 / len(text) if "long" in prompt else self._source.delay_s
        for place, char in enumerate(text):
            if stopped.wait(delay_s):
                self._source.note(f"cancelled {request.request_id}")
                future.set_result(
                    Completion(request.request_id, finish_reason="error", error="gone", error_code="cancelled")
                )
                return
            if breaking and place == 2 * len(text) // 3:
                time.sleep(0.5)  # what was said is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            if on_text:
                on_text(char)
        future.set_result(Completion(request.request_id, text, "stop", 11, 7, 1.0, 2.0))


def first(marker):
    """Whether nobody was here before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class NamingRetrievers:
    load_s: float = 0.0

    def open(self, index):
        if BROKEN in index:
            raise ArtifactError(f"{index} is damaged")
        time.sleep(self.load_s)
        return NamingRetriever(index)


class NamingRetriever:
    """Holds one passage, which names the index."""

    embeds = True

    def __init__(self, index):
        text = f"This passage stands in {index} alone."
        self._hit = Hit(Passage("c1", "doc", "Greece", "", "", text, 0, len(text)), 1.0, 1)

    def visible(self, groups):
        return 1

    def search(self, queries, k, *, filter=None, groups=None):
        assert k == 1, "nobody may ask for more than there is"
        return [[self._hit] for _ in queries]

    def search_and_embed(self, queries, k, *, filter=None, groups=None):
        return self.search(queries, k), self.encode_queries(queries)

    def encode_queries(self, queries):
        return np.ones((len(queries), 4), np.float32) / 2

    def embed(self, texts):
        return self.encode_queries(texts), [len(text.split()) for text in texts], 128


def recipe_of(**serve):
    return ServingRecipe.model_validate(
        {"name": "test", "feedback": {"url": ""}, "telemetry": {"metrics": False}, "serve": serve}
    )


def app_of(recipe, releases=None, version="v0", engines=None, retrievers=None, *, index=True, desk=None):
    settings = IngressSettings(recipe, release_of(version, index=index), NoParts(), NoKeys(), releases)
    return assemble(
        settings, Sources(engines or NamingEngines(), (retrievers or NamingRetrievers()) if index else None), desk
    )


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
