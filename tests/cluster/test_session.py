import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import RayConfig
from cluster.errors import UserError
from cluster.session import PACKAGES_ROOT, bearer_token, protect_with_token, ray_session, shipped_modules


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_workers_import_our_packages_and_a_session_inside_a_session_is_the_same(ray_module):
    import ray

    @ray.remote(num_cpus=0.1)
    def where() -> str:
        import cluster.store
        import retrieval.records

        return cluster.store.__file__ + retrieval.records.__name__

    with ray_session(RayConfig(num_cpus=1)):
        assert ray.get(where.remote()).startswith(str(PACKAGES_ROOT))
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()
    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from cluster.config import RayConfig
from cluster.session import ray_session
with ray_session(RayConfig(num_cpus=1)):
    import ray
    @ray.remote
    def where():
        print("a worker's chatter")
        import cluster.store
        return cluster.store.__file__
    print(ray.get(where.remote()))
print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_session_from_a_checkout_that_is_not_installed_is_quiet_and_leaves_nothing_at_home(home):
    # A bare copy of the sources, found only through this script's own sys.path, as `python rayft.py` finds it.
    checkout, elsewhere = home / "checkout", home / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(PACKAGES_ROOT / "cluster", checkout / "cluster")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = SCRIPT.format(root=str(checkout))
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.splitlines() == [str(checkout / "cluster" / "store.py"), "False"], result.stderr
    assert result.stderr == ""
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no.such.host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_one_line_at_once(home, address, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(UserError, match=rf"^ray\.address: no Ray cluster answers at {address}"),
        ray_session(RayConfig(address=address)),
    ):
        raise AssertionError("never entered")


def test_a_local_ray_demands_a_token_that_is_written_nowhere(home):
    protect_with_token()
    token = os.environ.pop("RAY_AUTH_TOKEN")
    assert len(token) >= 32
    assert not (home / ".ray").exists()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("of the user\n")
    protect_with_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert bearer_token() == "of the user"


def test_the_token_of_a_running_cluster_comes_from_environment_or_home(home, monkeypatch):
    assert bearer_token() is None
    (home / "elsewhere").write_text("in a file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "elsewhere"))
    assert bearer_token() == "in a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "in the environment")
    assert bearer_token() == "in the environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert bearer_token() is None


def test_everything_that_is_shipped_exists():
    assert all(Path(path).exists() for path in shipped_modules())
