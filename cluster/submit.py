"""Running a stage as a Ray job: ship the project, follow the log, return the job's exit status.

In: a recipe with overrides, a stage's words (`index build`) and the address of a cluster's job API. Out: 0 when the job
succeeded, otherwise its own exit status. The job gets a staged copy of our packages and the resolved recipe, whatever
the directory it is submitted from; local paths in the recipe become absolute.
Not covered: starting a cluster; bringing local files to other machines (name `s3://` paths there).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from cluster.errors import UserError
from cluster.progress import describe_seconds, relay, say
from cluster.recipe import BESIDE, PACKAGED, read_recipe
from cluster.session import PACKAGES, PACKAGES_ROOT, bearer_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RECIPE_FILE = "submitted_recipe.yaml"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run and where."""

    recipe_path: str
    overrides: tuple[str, ...]
    command: tuple[str, ...]
    """Words of the command, such as `index build`."""
    arguments: tuple[str, ...] = ()
    """What follows the recipe, such as `--objective raft`."""
    address: str = DEFAULT_ADDRESS
    """HTTP address of the cluster's dashboard."""

    @property
    def on_this_machine(self) -> bool:
        """Whether the cluster's head runs here, with this Python and these paths."""
        return urllib.parse.urlsplit(self.address).hostname in LOOPBACK


def submit(job: Job, recipe: pydantic.BaseModel, path_keys: Sequence[str] = (), *, follow: bool = True) -> int:
    """Submit the job; with `follow`, relay its log until it ends.

    Args:
        job: What to run.
        recipe: The validated recipe, to find its local paths.
        path_keys: Dotted keys that may hold a local path, besides `store.uri`, `path` and `…_path`.
        follow: Wait for the end; otherwise return 0 once it is accepted.

    Returns:
        The exit status: 0, or that of the job's command (1 when it never ran).

    Raises:
        UserError: the job API does not answer or does not accept the job.
    """
    client = _connect(job.address)
    local = _as_staged(absolute_paths(recipe, read_recipe(job.recipe_path, job.overrides), path_keys))
    unshipped = [key for key, path in local.items() if not path.startswith(BESIDE)]
    if unshipped and not job.on_this_machine:
        say(f"submit: paths of this machine, which the cluster sees only if it mounts them: {', '.join(unshipped)}")
    with tempfile.TemporaryDirectory(prefix="rayft-submit-") as temporary:
        project = stage_project(Path(temporary), job.recipe_path)
        try:
            submitted = client.submit_job(
                entrypoint=entrypoint(job, local),
                submission_id=f"rayft-{'-'.join(job.command)}-{uuid.uuid4().hex[:8]}",
                runtime_env={"working_dir": str(project)},
            )
        except RuntimeError as error:
            raise UserError(f"submit: {job.address} refused the job: {_first_line(error)}") from error
    say(f"submit: {submitted} at {job.address}: rayft {shlex.join([*job.command, job.recipe_path, *job.arguments])}")
    if not follow:
        say(f"submit: not waiting; see it with `ray job logs --address {job.address} --follow {submitted}`")
        return 0
    return _follow(client, submitted, job.address)


def entrypoint(job: Job, local: dict[str, str]) -> str:
    """The job's shell command, overrides first as the user gave them, then the paths made absolute."""
    # A virtual environment is not on the path of a job's shell; on another machine its Python is not known here.
    python = sys.executable if job.on_this_machine else "python"
    overrides = [*job.overrides, *(f"{key}={path}" for key, path in local.items()), "ray.address=auto"]
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join([python, "-m", "rayft", *job.command, RECIPE_FILE, *job.arguments, *settings])


def absolute_paths(
    recipe: pydantic.BaseModel, stated: Mapping[str, Any], path_keys: Sequence[str] = ()
) -> dict[str, str]:
    """Dotted key to absolute path for local paths, relative ones taken from the working directory.

    Only `store.uri` and keys that the recipe or an override states: what a command derives, the job derives itself.
    """
    found = {}
    for key, value in _texts(recipe, stated):
        name = key.rpartition(".")[2]
        is_path = key == "store.uri" or name in ("path", "directory") or name.endswith(("_path", "_directory"))
        maybe_path = key in path_keys and (Path(value).expanduser().exists() or value.startswith((".", "~")))
        if value and "://" not in value and (is_path or maybe_path):
            found[key] = str(Path(value).expanduser().absolute())
    return found


def _texts(section: pydantic.BaseModel, stated: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name in type(section).model_fields:
        key, value, given = f"{prefix}{name}", getattr(section, name), stated.get(name)
        if isinstance(value, pydantic.BaseModel):
            yield from _texts(value, given if isinstance(given, Mapping) else {}, f"{key}.")
        elif isinstance(value, str) and (given is not None or key == "store.uri"):
            yield key, value


def stage_project(target: Path, recipe_path: str) -> Path:
    """Copy our packages, the command and the resolved recipe (what it extends merged in) into `target`."""
    for package in PACKAGES:
        shutil.copytree(
            PACKAGES_ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        )
    shutil.copy2(PACKAGES_ROOT / "rayft.py", target / "rayft.py")
    text = yaml.safe_dump(_as_staged(read_recipe(recipe_path)), allow_unicode=True, sort_keys=False)
    (target / RECIPE_FILE).write_text(text, encoding="utf-8")
    return target


def _as_staged(value: Any) -> Any:
    """`value` with files that are staged with our packages named from the folder of the staged recipe, since the
    cluster's machines have them there and nowhere else."""
    if isinstance(value, dict):
        return {key: _as_staged(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_staged(inner) for inner in value]
    if isinstance(value, str) and Path(value).is_relative_to(PACKAGED):
        return f"{BESIDE}{Path(value).relative_to(PACKAGES_ROOT).as_posix()}"
    return value


def _connect(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address: expected the dashboard's http:// address, found {address!r}")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it narrates each upload and each closed connection
    token = bearer_token()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        raise UserError(
            f"--address: the cluster at {address} demands its token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"--address: no job API for us at {address}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _follow(client: JobSubmissionClient, submitted: str, address: str) -> int:
    began = time.monotonic()
    try:
        asyncio.run(_relay_log(client, submitted))
        details = _await_end(client, submitted)
    except KeyboardInterrupt:
        say(f"submit: {submitted} runs on; stop it with `ray job stop --address {address} {submitted}`")
        return 130
    status = str(details.status)
    took = describe_seconds(time.monotonic() - began)
    if status == "SUCCEEDED":
        say(f"submit: {submitted} succeeded ({took})")
        return 0
    code = details.driver_exit_code or 1
    say(f"submit: {submitted} {status.lower()} with exit status {code} ({took})")
    return int(code)


def _await_end(client: JobSubmissionClient, submitted: str) -> Any:
    while True:
        details = client.get_job_info(submitted)
        if details.status.is_terminal():
            return details
        time.sleep(POLL_S)


async def _relay_log(client: JobSubmissionClient, submitted: str) -> None:
    """Relay the log until the job ends; a connection that breaks is made again and what was shown is skipped."""
    import aiohttp

    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(submitted):
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                if fresh:
                    relay(fresh)
                shown = max(shown, seen)
        except (RuntimeError, aiohttp.ClientError):
            if not client.get_job_info(submitted).status.is_terminal():
                await asyncio.sleep(POLL_S)
                continue
        return
