"""The service on a real local Ray: slow, so one test each for what only the real thing shows."""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import HTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from cluster.config import RayConfig
from cluster.errors import ArtifactError, UserError
from cluster.session import ray_session
from cluster.store import Store
from serving.api import NoKeys
from serving.client import ask_over_http
from serving.config import DeploymentConfig, GenerationConfig, ServeConfig, TelemetryConfig
from serving.serve_app import config_text, serve_config
from serving.service import base_url, check_port, running_app
from tests.serving.closed_book import closed_book_recipe, release_closed_book
from tests.serving.fakes import wait_until
from tests.serving.fakes_graph import NamingEngines, NamingRetrievers, NoParts, app_of, recipe_of, release_of
from tests.serving.test_graph_on_ray import Load
from tests.serving.test_telemetry import Collector
from tests.serving.tiny import WINDOW


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_check_port_taken_names_the_key(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(UserError, match=rf"serve\.port: cannot listen on 127\.0\.0\.1:{port}"):
            check_port(ServeConfig(port=port))
    check_port(ServeConfig(port=port))


def test_base_url_is_one_that_clients_here_can_reach():
    assert base_url(ServeConfig(host="0.0.0.0", port=81)) == "http://127.0.0.1:81"


def application(recipe, engines):
    """The graph with one engine for its two adapters, over the passages of the fakes."""
    from serving.graph import Sources, assemble
    from serving.ingress import IngressSettings

    served = dataclasses.replace(release_of("v0"), generation=GenerationConfig(max_new_tokens=24, passages=2))
    return assemble(IngressSettings(recipe, served, NoParts(), NoKeys()), Sources(engines, NamingRetrievers()))


@dataclass(frozen=True)
class TinyEngines:
    """A real engine over the tiny models."""

    models: object

    def base(self, pins):
        return pins.base_digest

    def open(self, pins):
        from serving.transformers_engine import TransformersEngine

        adapters = {ref: self.models.adapters[role] for role, ref in pins.adapters.items()}
        return TransformersEngine(self.models.base, adapters, "float32", batch_rows=4, threads=1)


class NoEngines:
    def base(self, pins):
        return pins.base_digest

    def open(self, pins):
        raise ArtifactError("model.base: the release was made with another base model")


@pytest.mark.slow
def test_service_answers_streams_drains_and_leaves_nothing_behind(tiny_models, port):
    recipe = recipe_of(port=port, max_queued_requests=8, drain_s=20, host="127.0.0.1")
    with ray_session(RayConfig(num_cpus=2)):
        with running_app(application(recipe, TinyEngines(tiny_models)), recipe.serve) as url:
            ready = httpx.get(f"{url}/readyz", headers={"x-request-id": "mine-1"})
            assert ready.status_code == 200 and ready.headers.get_list("x-request-id") == ["mine-1"]
            assert len(httpx.get(f"{url}/healthz").headers.get_list("x-request-id")) == 1
            for strategy in ("base", "rag", "raft", "finetuned", "finetuned_rag", "hybrid", "auto"):
                reply = ask_over_http(url, "What is the capital of Greece?", f"rayft-{strategy}")
                assert reply.details["release"] == "release/test/v0"
                assert reply.details["route"]["reason"] and reply.usage["completion_tokens"] > 0

            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            messages = [{"role": "user", "content": "Greece"}]
            whole = client.chat.completions.create(model="rayft-rag", messages=messages)
            chunks = list(client.chat.completions.create(model="rayft-rag", messages=messages, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].message.content
            assert len(chunks) > 4
            with pytest.raises(openai.BadRequestError, match=str(WINDOW)):
                client.chat.completions.create(
                    model="rayft-raft", messages=[{"role": "user", "content": "x" * 2 * WINDOW}]
                )

            statuses = ask_many(url, 24)
            assert set(statuses) == {200, 429} and statuses.count(200) >= 8
            with (
                pytest.raises(UserError, match="Ray Serve is running on this cluster already"),
                running_app(None, recipe.serve),
            ):
                pass
            assert ask_over_http(url, "still there?", "rayft-base").usage["completion_tokens"] > 0
        assert not listening(port)
        with_gpu = recipe.model_copy(
            update={"serve": recipe.serve.model_copy(update={"generator": DeploymentConfig(gpus=1)})}
        )
        unfit = application(recipe, NoEngines())
        with pytest.raises(UserError, match="the release was made with another base"), running_app(unfit, recipe.serve):
            pass
        unfit = application(with_gpu, NoEngines())
        with pytest.raises(UserError, match="claim 1 GPUs, Ray has 0"), running_app(unfit, with_gpu.serve):
            pass
    assert not listening(port)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("drain_s", [20, 0.5], ids=["in time", "cut off"])
def test_service_ends_what_is_under_way_and_takes_nothing_new(ray_module, port, drain_s, tmp_path, capsys):
    (tmp_path / "log").touch()
    recipe = recipe_of(port=port, drain_s=drain_s)
    app = app_of(recipe, engines=NamingEngines(log=tmp_path / "log"))
    body = {"model": "rayft-base", "messages": [{"role": "user", "content": "long"}]}  # 3 s
    ended, refused = [], []

    def ask():
        try:
            ended.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code)
        except httpx.HTTPError as error:
            ended.append(type(error).__name__)

    def look():
        while not ended:
            with contextlib.suppress(httpx.HTTPError):
                reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.5)
                ready = httpx.get(f"{url}/readyz", timeout=2)
                refused.append((reply.status_code, reply.headers.get("retry-after"), ready.status_code, ready.text))
            time.sleep(0.05)

    with running_app(app, recipe.serve) as url:
        threads = [threading.Thread(target=ask)]
        threads[0].start()
        time.sleep(1)
        threads.append(threading.Thread(target=look))
        threads[1].start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    said = capsys.readouterr().out
    assert "under way" in said
    status, retry_after, ready, text = refused[0]
    assert (status, ready) == (503, 503) and int(retry_after) > 0 and "drain" in text
    if drain_s > 10:
        assert ended == [200] and "cut off" not in said
    else:
        assert ended != [200] and "cut off" in said
        assert "cancelled" in (tmp_path / "log").read_text(), "its slot is freed"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_spans_of_every_hop_reach_the_collector_although_the_graph_is_taken_down_at_once(ray_module, port, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.got = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    traces = TelemetryConfig(metrics=False, traces=f"http://127.0.0.1:{collector.server_port}")
    recipe = recipe_of(port=port).model_copy(update={"telemetry": traces})
    with running_app(app_of(recipe), recipe.serve) as url:
        body = {"model": "rayft-raft", "messages": [{"role": "user", "content": "Capital?"}]}
        trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=trace, timeout=60).status_code == 200
    collector.shutdown()
    collector.server_close()
    sent = b"".join(body for _, body in collector.got)
    missing = [name for name in (b"request", b"retrieve", b"search", b"generate", b"engine") if name not in sent]
    assert not missing and sent.count(bytes.fromhex("ab" * 16)) == 6


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_replicas_follow_the_load_up_and_down_without_a_failed_request(ray_module, port):
    from ray import serve

    recipe = recipe_of(
        port=port,
        max_queued_requests=64,
        generator={
            **{"min_replicas": 1, "max_replicas": 2, "cpus": 0.1, "target_ongoing_requests": 2},
            **{"upscale_delay_s": 1, "downscale_delay_s": 3},
        },
    )

    def replicas():
        states = serve.status().applications["rayft"].deployments["generator"].replica_states
        return states.get("RUNNING", 0) + states.get("STOPPING", 0)

    with running_app(app_of(recipe, engines=NamingEngines(delay_s=0.02)), recipe.serve) as url:
        assert replicas() == 1
        with Load(url, clients=10) as load:
            assert wait_until(lambda: replicas() == 2, 60), "a second replica comes with the load"
            asked = load.answered
            assert wait_until(lambda: load.answered > asked + 20, 60)
        with Load(url, clients=1) as after:
            assert wait_until(lambda: replicas() == 1, 90), "and goes with it"
    assert not load.faults and not after.faults and after.answered


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_serve_deploy_of_the_written_config_serves_a_closed_book_release(ray_module, tiny_models, tmp_path, port):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    recipe, store = closed_book_recipe(tmp_path, str(tiny_models.base), port), Store(str(tmp_path / "store"))
    release_closed_book(store, str(tiny_models.base), tiny_models.adapters["finetuned"])
    config = ServeDeploySchema.model_validate(yaml.safe_load(config_text(serve_config(recipe), "tiny.yaml")))
    serve.start(proxy_location="HeadOnly", http_options=config.http_options.model_dump(include={"host", "port"}))
    try:
        _get_global_client().deploy_apps(config, _blocking=True)  # what `serve deploy` sends to the cluster
        reply = ask_over_http(f"http://127.0.0.1:{port}", "What does Ghana export?", "rayft-finetuned")
        assert reply.details["release"].startswith("release/tiny/")
        assert set(serve.status().applications["rayft"].deployments) == {"ingress", "generator"}
    finally:
        serve.shutdown()


def test_closed_book_release_is_served_where_faiss_and_encoders_cannot_be_imported(tiny_models, tmp_path):
    command = [sys.executable, "-m", "tests.serving.closed_book", str(tmp_path), str(tiny_models.base)]
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [*command, str(tiny_models.adapters["finetuned"])], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "imported: []" in run.stdout
    said = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    assert said["models"] == ["rayft-base", "rayft-finetuned", "rayft-auto"]
    assert said["reply"]["usage"]["completion_tokens"] > 0 and said["reply"]["choices"][0]["message"]["content"]
    assert said["auto"]["rayft"]["strategy"] in ("base", "finetuned")
    assert (said["refused"], said["search"]) == (400, 400)


def ask_many(url, n):
    """Statuses of n requests sent at once."""
    statuses = []

    def one():
        body = {"model": "raft", "messages": [{"role": "user", "content": "x" * 500}]}
        statuses.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=one) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


@pytest.mark.slow
def test_serve_command_serves_an_index_only_release_until_sigterm(tiny_models, tmp_path, port):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.serving.serve_command", str(tmp_path), str(tiny_models.base), str(port)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=subprocess.STDOUT)
    try:
        assert wait_until(lambda: "Ctrl-C stops it" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        models = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        assert models[:3] == ["rayft-base", "rayft-rag", "rayft-auto"]
        reply = ask_over_http(url, "What does Ghana export?")
        assert reply.details["strategy"] == "rag" and reply.details["release"].startswith("release/tiny/")
        assert len(reply.details["hits"]) == 3 and reply.details["hits"][0]["title"] == "Ghana"
        hits = httpx.post(f"{url}/v1/search", json={"query": "paprika", "k": 2}).json()["data"]
        assert hits[0]["title"] == "Hungary"
        with pytest.raises(UserError, match="lacks a part that rayft-raft needs"):
            ask_over_http(url, "What does Ghana export?", "rayft-raft")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not listening(port)
    text = log.read_text()
    assert f"curl -s {url}/v1/chat/completions" in text and text.rstrip().endswith("serve: stopped")
    assert "Traceback" not in text and "Ghana" not in text
