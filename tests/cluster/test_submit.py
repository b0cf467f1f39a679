"""Jobs on a real Ray head of this machine, on ports of its own; and what is sent to it."""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest
import yaml

from cluster.config import BaseRecipe, Section
from cluster.recipe import read_recipe
from cluster.session import PACKAGES, PACKAGES_ROOT
from cluster.store import Store
from cluster.submit import RECIPE_FILE, Job, absolute_paths, entrypoint, stage_project

RECIPE = """\
name: tiny
corpus: {path: docs}
search: {mode: lexical}
"""


class Corpus(Section):
    path: str = ""
    test_path: str = "default"
    model: str = "embedded:x"
    note: str = ""


class Recipe(BaseRecipe):
    corpus: Corpus = Corpus()
    rules: tuple[str, ...] = pydantic.Field(default=())


def test_stated_local_paths_become_absolute_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def paths(**corpus):
        stated = {"name": "here", "corpus": corpus}
        return absolute_paths(Recipe.model_validate(stated), stated, ("corpus.model",))

    store = {"store.uri": f"{tmp_path}/.rayft/store"}
    assert paths() == store
    assert paths(path="docs", note="here") == {**store, "corpus.path": f"{tmp_path}/docs"}
    assert paths(path="/abs", model="here") == {**store, "corpus.path": "/abs", "corpus.model": f"{tmp_path}/here"}
    assert paths(path="s3://b/docs", model="org/model") == store
    assert paths(path="") == store
    derived = Recipe(name="x", corpus=Corpus(path="written/by/the/command"))
    assert absolute_paths(derived, {"name": "x"}) == store


def test_the_jobs_command_quotes_what_a_shell_would_read():
    job = Job("r.yaml", ("corpus.path=a b; rm -rf $HOME",), ("index", "search"), ("it's $x",), "http://gpu:8265")
    words = shlex.split(entrypoint(job, {"store.uri": "/s"}))
    assert words == [
        *("python", "-m", "rayft", "index", "search", RECIPE_FILE, "it's $x", "--set", "corpus.path=a b; rm -rf $HOME"),
        *("--set", "store.uri=/s", "--set", "ray.address=auto"),
    ]
    here = shlex.split(entrypoint(Job("r.yaml", (), ("doctor",)), {}))
    assert here[0] == sys.executable


def test_what_is_shipped_is_the_project_and_the_whole_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ncorpus: {path: a}\n")
    (tmp_path / "over.yaml").write_text("extends: base.yaml\nseed: 3\n")
    project = tmp_path / "project"
    project.mkdir()
    stage_project(project, str(tmp_path / "over.yaml"))
    assert yaml.safe_load((project / RECIPE_FILE).read_text()) == {"name": "base", "corpus": {"path": "a"}, "seed": 3}
    assert {path.name for path in project.iterdir()} == {*PACKAGES, "rayft.py", RECIPE_FILE}
    assert not list(project.rglob("__pycache__"))
    assert list((project / "training" / "prompts").glob("*.yaml"))
    run = [sys.executable, "-P", "-c", "import rayft, cluster; print(rayft.__file__, cluster.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(project)}
    result = subprocess.run(run, cwd="/", env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(project / "rayft.py"), str(project / "cluster" / "__init__.py")]


def test_packaged_files_are_named_where_the_job_has_them(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    stage_project(project, "customer_service")
    staged = yaml.safe_load((project / RECIPE_FILE).read_text())
    assert staged["questions"]["path"] == "recipe:recipes/customer_service/questions.jsonl"
    assert str(PACKAGES_ROOT) not in (project / RECIPE_FILE).read_text()
    there = read_recipe(project / RECIPE_FILE)
    paths = [there["router"]["examples"], *(one["corpus"]["path"] for one in there["collections"].values())]
    for path in paths:
        assert Path(path).is_relative_to(project) and Path(path).is_file()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A running `ray start --head`, and `rayft submit` as a user types it."""

    def __init__(self, address: str, env: dict[str, str]) -> None:
        self.address = address
        self.env = env

    def submit(self, directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rayft", "submit", "r.yaml", "--address", self.address, *words],
            cwd=directory,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = tempfile.mkdtemp(prefix="rh-", dir="/tmp")  # a socket's path may have 107 characters
    port, dashboard, client, agent = (free_port() for _ in range(4))
    ours = ("RAY_", "RAYFT_", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    log = Path(directory, "head.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"),
                *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
                *(f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1", f"--temp-dir={directory}/r"),
                *("--node-ip-address=127.0.0.1", "--disable-usage-stats", "--object-store-memory=100000000"),
            ],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        await_answer(f"{address}/api/version", env["RAY_AUTH_TOKEN"], log)
        yield Head(address, env)
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):  # the group holds this head's processes, and only these
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
        shutil.rmtree(directory, ignore_errors=True)


def await_answer(url: str, token: str, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no Ray head: {log.read_text()[-2000:]}")


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "docs").mkdir()
    for name, text in {"cats": "Cats sleep all day.", "dogs": "Dogs bark at night.", "fish": "Fish swim."}.items():
        (tmp_path / "docs" / f"{name}.txt").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_a_stage_runs_as_a_job_and_its_artifact_is_where_the_recipe_says(head, directory):
    result = head.submit(directory, "--", "index", "build")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "index: published" in result.stdout
    assert "succeeded" in result.stdout.splitlines()[-1]
    artifact = Store(str(directory / ".rayft" / "store")).open("index", "tiny")
    artifact.directory()


@pytest.mark.slow
def test_a_failing_jobs_exit_status_comes_back_with_its_log(head, directory):
    result = head.submit(directory, "--", "rollback", "--set", "name=other")
    assert result.returncode == 2
    assert "no release of `other` was promoted before the current one" in result.stdout
    assert "failed with exit status 2" in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_a_detached_job_is_left_to_itself(head, directory):
    result = head.submit(directory, "--detach", "--", "doctor")
    assert result.returncode == 0
    assert "ray job logs --address" in result.stdout


@pytest.mark.slow
def test_a_wrong_token_is_one_line(head, directory):
    result = head.submit(directory, "--", "doctor", RAY_AUTH_TOKEN="0" * 64)
    assert result.returncode == 2
    assert "demands its token; set RAY_AUTH_TOKEN" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_bad_recipe_is_refused_before_anything_is_sent(head, directory):
    result = head.submit(directory, "--set", "corpus.pth=x", "--", "index", "build")
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean `corpus.path`?" in " ".join(result.stderr.split())
