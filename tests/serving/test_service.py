"""The service on a real local Ray: slow, so one test each for what only the real thing shows."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest

from cluster.config import RayConfig
from cluster.errors import ArtifactError, UserError
from cluster.session import ray_session
from serving.client import ask_over_http
from serving.config import DeploymentConfig, ServeConfig
from serving.router_config import RouterConfig
from serving.service import base_url, check_port, running_app
from tests.serving.fakes import FakeRetriever, served_release, wait_until
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


def application(config, load, **generation):
    from serving.graph import Loaders, assemble

    served = served_release(max_new_tokens=24, **generation)
    return assemble(served, RouterConfig(), config, Loaders(load, FakeRetriever))


@pytest.mark.slow
def test_service_answers_streams_and_leaves_nothing_behind(tiny_models, port):
    base, adapters = tiny_models.base, dict(tiny_models.adapters)

    def load():
        from serving.transformers_engine import TransformersEngine

        return TransformersEngine(base, adapters, "float32", batch_rows=4, threads=1)

    config = ServeConfig(port=port, max_queued_requests=8)
    with ray_session(RayConfig(num_cpus=2)):
        with running_app(application(config, load), config) as url:
            assert httpx.get(f"{url}/readyz").status_code == 200
            for strategy in ("base", "rag", "raft", "finetuned", "finetuned_rag", "hybrid", "auto"):
                reply = ask_over_http(url, "What is the capital of Greece?", f"rayft-{strategy}")
                assert reply.details["release"] == "release/test/0123456789abcdef"
                assert reply.details["route"]["reason"] and reply.usage["completion_tokens"] > 0

            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            messages = [{"role": "user", "content": "Greece"}]
            whole = client.chat.completions.create(model="rayft-rag", messages=messages)
            chunks = list(client.chat.completions.create(model="rayft-rag", messages=messages, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == whole.choices[0].message.content
            assert len(chunks) > 4
            with pytest.raises(openai.BadRequestError, match="window of 4096"):
                client.chat.completions.create(model="raft", messages=[{"role": "user", "content": "x" * 2 * WINDOW}])

            statuses = ask_many(url, 24)
            assert set(statuses) == {200, 429} and statuses.count(200) >= 8
            with (
                pytest.raises(UserError, match="Ray Serve is running on this cluster already"),
                running_app(None, config),
            ):
                pass
            assert ask_over_http(url, "still there?", "rayft-base").usage["completion_tokens"] > 0
        assert not listening(port)
        unfit, without_gpu = (
            application(config, cannot_load),
            config.model_copy(update={"generator": DeploymentConfig(gpus=1)}),
        )
        with pytest.raises(UserError, match="the release was made with another base"), running_app(unfit, config):
            pass
        with pytest.raises(UserError, match="claim 1 GPUs, Ray has 0"), running_app(unfit, without_gpu):
            pass
    assert not listening(port)


def cannot_load():
    raise ArtifactError("model.base: the release was made with another base model")


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
        assert models == ["rayft-base", "rayft-rag", "rayft-auto"]
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
