"""The graph on a real Ray Serve, with engines and indexes that name themselves in their answers: what happens while
releases change, replicas die and too much is asked. One Ray and one graph for the whole module."""

import contextlib
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from cluster.config import RayConfig
from cluster.session import ray_session
from serving.service import running_app
from tests.serving.fakes import wait_until
from tests.serving.fakes_graph import BROKEN, FileReleases, NamingEngines, app_of, free_port, recipe_of

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    directory = tmp_path_factory.mktemp("graph")
    releases, log = FileReleases(directory), directory / "engines.log"
    recipe = recipe_of(
        port=free_port(),
        max_queued_requests=24,
        follow_releases_s=0.1,
        request_timeout_s=30,
        drain_s=10,
        generator={"min_replicas": 2, "max_replicas": 2, "cpus": 0.1},
    )
    releases.promote("v0")
    log.touch()
    app = app_of(recipe, releases, engines=NamingEngines(delay_s=0.001, log=log))
    with ray_session(RayConfig(num_cpus=2)), running_app(app, recipe.serve) as url:
        yield SimpleNamespace(url=url, releases=releases, directory=directory, log=log)


def ask(url, question="Capital?", model="rayft-raft", **body):
    message = {"role": "user", "content": question}
    return httpx.post(f"{url}/v1/chat/completions", json={"model": model, "messages": [message], **body}, timeout=60)


def stream_lines(url, question, model="rayft-raft"):
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    lines = []
    with (
        contextlib.suppress(httpx.RemoteProtocolError),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response,
    ):
        lines += [line for line in response.iter_lines() if line.startswith("data: ")]
    return lines


def serving_version(url):
    return httpx.get(f"{url}/readyz").json()["release"].rpartition("/")[2]


def promote(graph, version):
    graph.releases.promote(version)
    assert wait_until(lambda: serving_version(graph.url) == version, 30), "the release was not taken up"


class Load:
    """Clients that ask again and again, each answer checked to be of the one release that it names."""

    def __init__(self, url, clients):
        self.versions, self.faults, self.answered = set(), [], 0
        self._url, self._ended = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number):
        models = ("rayft-raft", "rayft-finetuned", "rayft-auto", "rayft-hybrid")
        with httpx.Client(timeout=60) as client:
            while not self._ended.is_set():
                model = models[self.answered % len(models)]
                body = {"model": model, "messages": [{"role": "user", "content": f"Question {number}?"}]}
                try:
                    self._check(client.post(f"{self._url}/v1/chat/completions", json=body))
                except httpx.HTTPError as error:
                    self.faults.append(repr(error))

    def _check(self, reply):
        if reply.status_code != 200:
            self.faults.append(reply.text)
            return
        content, version = reply.json(), reply.json()["rayft"]["release"].rpartition("/")[2]
        text = content["choices"][0]["message"]["content"]
        named = {word.rpartition("/")[2] for word in text.split() if word.startswith(("adapter/", "index/"))}
        if not named <= {version}:
            self.faults.append(f"{version} answered: {text}")
        self.answered += 1
        self.versions.add(version)


def test_ten_swaps_under_load_neither_fail_nor_mix_a_request(graph):
    with Load(graph.url, clients=6) as load:
        for swap in range(10):
            promote(graph, f"v{swap % 3}" if swap % 2 else f"s{swap}")  # forward, and back to what served before
            asked = load.answered
            assert wait_until(lambda: load.answered > asked + 12, 30)  # noqa: B023 - waited for at once
    assert not load.faults, load.faults[:3]
    assert len(load.versions) >= 8 and load.answered > 150


def test_release_that_does_not_load_is_refused_and_the_old_one_goes_on(graph):
    promote(graph, "v1")
    with Load(graph.url, clients=3) as load:
        graph.releases.promote(BROKEN)
        time.sleep(1.5)
    assert not load.faults and load.versions == {"v1"} and load.answered > 10
    promote(graph, "v2")


def test_request_whose_replica_dies_before_it_answers_is_answered_by_another(graph):
    reply = ask(graph.url, f"die {graph.directory / 'one'}")
    assert reply.status_code == 200 and "adapter/raft" in reply.json()["choices"][0]["message"]["content"]
    lines = stream_lines(graph.url, f"die {graph.directory / 'two'}")
    assert lines[-1] == "data: [DONE]" and "adapter" in "".join(lines)
    assert (graph.directory / "one").exists() and (graph.directory / "two").exists(), "nothing was killed"


def test_stream_whose_replica_dies_in_the_middle_ends_in_an_error_event(graph):
    lines = stream_lines(graph.url, f"break {graph.directory / 'three'}")
    assert (graph.directory / "three").exists(), "nothing was killed"
    assert len(lines) > 2 and '"error"' in lines[-1] and "stream_broken" in lines[-1]
    assert "[DONE]" not in "".join(lines)
    assert wait_until(lambda: ask(graph.url).status_code == 200, 30)


def test_more_than_is_admitted_gets_429_at_once_and_the_rest_is_answered(graph):
    replies, waits = [], []

    def one():
        began = time.monotonic()
        replies.append(ask(graph.url, "long").status_code)
        waits.append((replies[-1], time.monotonic() - began))

    threads = [threading.Thread(target=one) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies.count(200) == 24 and replies.count(429) == 16
    refused = max(seconds for status, seconds in waits if status == 429)
    assert refused < min(seconds for status, seconds in waits if status == 200)


def test_client_that_goes_away_frees_its_slot(graph):
    before = graph.log.read_text().count("cancelled")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{graph.url}/v1/chat/completions",
            json={"model": "rayft-base", "messages": [{"role": "user", "content": "long"}]},
            timeout=1,
        )
    assert wait_until(lambda: graph.log.read_text().count("cancelled") == before + 1, 10)
