"""A Ray session for a command: a quiet local Ray on loopback, or a running cluster.

In: the recipe's `ray` section. Out: an initialised Ray inside the `with` block, shut down after it when this block
started it. Our packages are importable on the workers whatever the working directory.
Not covered: submitting jobs (`submit.py`), Serve's HTTP address, placement.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import site
import socket
import sys
import sysconfig
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import RayConfig
from cluster.errors import UserError

PACKAGES = ("cluster", "retrieval", "training", "serving", "evaluation", "recipes")
LOOPBACK = "127.0.0.1"
RAY_CLIENT_PORT = 10001
PACKAGES_ROOT = Path(__file__).resolve().parent.parent

# Ray sets it for the command of a submitted job.
JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Ray and its libraries read these once, when they are imported or when their processes start.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that claims no GPU sees none
}

# Plans and timings of every data set, and a warning that progress bars are off, which they are on purpose.
_QUIET_LOGGERS = {
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
}


@contextlib.contextmanager
def ray_session(config: RayConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Have Ray initialised inside the block.

    An already initialised Ray is used as it is and left running. Inside a Ray job the job's cluster is joined. With
    `config.address` that cluster is joined and our packages travel there; otherwise a local Ray starts on loopback.
    Workers' output is shown only with `RAYFT_LOG_WORKERS=1`.

    Raises:
        UserError: the cluster at `ray.address` cannot be joined.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for logger, level in _QUIET_LOGGERS.items():
        logging.getLogger(logger).setLevel(level)
    import ray

    if "ray.data" in sys.modules:  # it was imported before it could see the variable
        ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": os.environ.get("RAYFT_LOG_WORKERS") == "1",
    }
    inside_job = JOB_MARK in os.environ
    address = os.environ.get("RAY_ADDRESS") if inside_job else config.address or os.environ.get("RAY_ADDRESS")
    if address or inside_job:
        _join(address or "auto", options, inside_job)
    else:
        _start_local(config, options, dashboard)
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(config: RayConfig, options: dict[str, Any], dashboard: bool) -> None:
    import ray
    from ray._private import ray_constants

    protect_with_token()
    # Ray replaces a loopback address by the machine's own unless clusters are off, as they are on macOS and Windows.
    # It reads the variable when it is imported, which may have been before.
    ray_constants.ENABLE_RAY_CLUSTER = False
    with _environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", PYTHONPATH=_python_path()):
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            include_dashboard=dashboard,
            dashboard_host=LOOPBACK,
            _node_ip_address=LOOPBACK,
            **options,
        )


def check_reachable(address: str) -> None:
    """Try a plain connection first: Ray itself waits for minutes and then ends the process.

    Raises:
        UserError: nothing answers at `ray.address`.
    """
    target = address
    if address == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        if not noted.is_file():
            raise UserError(
                "ray.address: auto, but no Ray cluster runs on this machine; leave it empty for a local Ray"
            )
        target = noted.read_text().strip()
    parts = urllib.parse.urlsplit(target if "://" in target else f"gcs://{target}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or RAY_CLIENT_PORT), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"ray.address: no Ray cluster answers at {target} ({error}); start it, or leave ray.address empty for a "
            "local Ray"
        ) from None


def _join(address: str, options: dict[str, Any], inside_job: bool) -> None:
    import ray

    check_reachable(address)
    if bearer_token() is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not inside_job:  # a job brings the packages as its working directory
        options["runtime_env"] = {"py_modules": shipped_modules()}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"ray.address: cannot join the Ray cluster at {address}: {reason}") from error


def shipped_modules() -> list[str]:
    """Paths of our packages and of the command, for a runtime environment's `py_modules`."""
    return [str(PACKAGES_ROOT / package) for package in PACKAGES] + [str(PACKAGES_ROOT / "rayft.py")]


def _python_path() -> str:
    """A PYTHONPATH with which the processes of a local Ray find our packages.

    Installed packages need none, and `site-packages` must not come before the standard library.
    """
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), sysconfig.get_path("purelib"))}
    ours = "" if PACKAGES_ROOT in installed else str(PACKAGES_ROOT)
    return os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH", ""))))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _token_file() -> Path:
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path.home() / ".ray" / "auth_token"


def protect_with_token() -> None:
    """Let the local Ray demand the user's own token, or one that only this process and its children know.

    Ray turns token authentication on by itself, and would write a new token under the home directory, where two first
    starts race; with a token in the environment it writes nothing.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it announces the mode as a warning
    unspoken = "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ
    if unspoken and not _token_file().is_file():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def bearer_token() -> str | None:
    """The user's token for a running cluster (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`), if any."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    token = os.environ.get("RAY_AUTH_TOKEN")
    if token is None and _token_file().is_file():
        token = _token_file().read_text(encoding="ascii").strip()
    return token or None
