"""Brings the graph up on Ray Serve, and takes it down again.

In: a recipe, the store, a release. Out: the address of a ready API inside the `with` block; after it nothing is left
running that was started here. Not covered: what is served (serving/graph.py).
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.progress import describe_seconds, say
from cluster.releases import Release
from cluster.session import ray_session
from cluster.store import Store
from serving.config import ServeConfig, ServingRecipe
from serving.serve_app import APP_NAME

if TYPE_CHECKING:
    from ray.serve import Application

POLL_S = 0.25
SHUTDOWN_S = 30.0
ANSWER_S = 10.0
"""Longest wait for a replica to say how many requests it has."""


@contextlib.contextmanager
def running_service(recipe: ServingRecipe, store: Store, release: Release, *, follow: bool = False) -> Iterator[str]:
    """Serves a release inside the block, with `follow` also those that are promoted meanwhile; yields the API's base
    URL once every deployment answers.

    Raises:
        UserError: The port is taken, the machine is too small, or a deployment cannot load what it serves.
    """
    with ray_session(recipe.ray):
        from serving.graph import build_app
        from serving.keys import access_warnings, open_keys

        app = build_app(recipe, store, release, follow=follow)
        for line in access_warnings(recipe.serve, open_keys(recipe.serve)):
            say(line)
        with running_app(app, recipe.serve) as base_url:
            yield base_url


@contextlib.contextmanager
def running_app(app: Application, config: ServeConfig) -> Iterator[str]:
    """Runs an application on an initialised Ray; yields its base URL."""
    from ray import serve

    _refuse_other_service()
    check_port(config)
    _check_resources(app)
    _quieten()
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run_many([serve.RunTarget(app, name=APP_NAME, route_prefix="/")], wait_for_applications_running=False)
        _wait_until_running()
        try:
            yield base_url(config)
        finally:
            _drain(config.drain_s)
    finally:
        _shut_down()


def base_url(config: ServeConfig) -> str:
    """Where clients on this machine reach the API."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{host}:{config.port}"


def check_port(config: ServeConfig) -> None:
    """Raises a `UserError` that names the key when the address cannot be bound."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"serve.port: cannot listen on {config.host}:{config.port} ({error.strerror}); choose another with "
                "--set serve.port=…"
            ) from error


def _refuse_other_service() -> None:
    """A cluster has one Serve instance; taking ours down must not take somebody else's with it."""
    from ray.serve.context import _get_global_client

    if _get_global_client(raise_if_no_controller_running=False) is not None:
        raise UserError(
            "ray.address: Ray Serve is running on this cluster already; shut it down first (`serve shutdown`), or "
            "serve on another cluster"
        )


def _check_resources(app: Application) -> None:
    import ray

    from serving.graph import claims

    has = ray.cluster_resources()
    for kind, amount in claims(app).items():
        if amount > has.get(kind, 0):
            raise UserError(
                f"serve: the deployments claim {amount:g} {kind}s, Ray has {has.get(kind, 0):g}; lower "
                f"serve.generator.{kind.lower()}s, serve.retriever.{kind.lower()}s or their min_replicas"
            )


def _wait_until_running() -> None:
    from ray import serve

    began = time.monotonic()
    ready: set[str] = set()
    while True:
        app = serve.status().applications.get(APP_NAME)
        deployments = app.deployments if app else {}
        for name in sorted(deployments.keys() - ready):
            if deployments[name].status == "HEALTHY":
                ready.add(name)
                say(f"serve: {name} ready after {describe_seconds(time.monotonic() - began)}")
        if app and app.status == "RUNNING":
            return
        failed = [d for d in deployments.values() if d.status in ("DEPLOY_FAILED", "UNHEALTHY")]
        if app and (app.status in ("DEPLOY_FAILED", "UNHEALTHY") or failed):
            raise _start_error(" ".join([app.message, *(deployment.message for deployment in failed)]))
        time.sleep(POLL_S)


def _start_error(message: str) -> Exception:
    """The replica's own `UserError` where it raised one, without Ray's traceback around it."""
    found = re.findall(r"(?:UserError|ArtifactError)\S*:\s*([^\n]+)", message)
    if found:
        return UserError(found[-1].strip())
    return RuntimeError(f"serve: a deployment did not start: {message[-2000:]}")


def _drain(drain_s: float) -> None:
    """Has every ingress replica refuse new requests, and waits until those under way have ended or their time is up."""
    from ray import serve

    def under_way(*, cut: bool = False) -> int:
        return sum(ingress.broadcast("drain", cut).results(timeout_s=ANSWER_S))

    try:
        ingress = serve.get_app_handle(APP_NAME)
        deadline, left = time.monotonic() + drain_s, under_way()
        if left:
            say(f"serve: {left} requests are under way and have {describe_seconds(drain_s)} to end")
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = under_way()
        if left:
            say(f"serve: {under_way(cut=True)} requests did not end in time and are cut off")
    except Exception as error:  # noqa: BLE001 - a graph that is broken must still be taken down
        say(f"serve: not drained ({type(error).__name__})")


def _shut_down() -> None:
    """`serve.shutdown`, without the line "infinite retries remaining" that Ray prints when the controller ends itself
    in the middle of a call that may be retried."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_S)
    serve.shutdown()


def _quieten() -> None:
    """Serve's own progress lines would stand between ours."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
