"""Finding a model's files: a local directory, an object store, or the model hub.

In: what a recipe names (`./models/x`, `s3://bucket/x`, `org/model`), and a revision. Out: a local directory, and a
digest of its content for fingerprints. Hub access uses the hub's usual environment variables (HF_TOKEN, HF_ENDPOINT,
HF_HOME, HF_HUB_OFFLINE). Not covered: `embedded:` models (each room knows its own), loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from cluster import locks
from cluster.cache import cache_directory
from cluster.errors import UserError
from cluster.manifest import fingerprint
from cluster.storage import OBJECT_SCHEMES, ObjectStorage, storage_at

__all__ = ["cache_directory", "local_model_directory", "model_digest"]

# What decides a model's behaviour; optimiser states, training logs, images and duplicate weight formats do not.
CONTENT = ("*.safetensors", "*.gguf", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_model_directory(model: str, revision: str | None, key: str = "model.base") -> Path:
    """The local directory that holds `model`, fetched into a cache where it is remote.

    Args:
        model: Directory, `s3://` or `gs://` prefix, or hub id; not `embedded:`.
        revision: Hub revision; only a hub model may have one.
        key: Recipe key to name in errors.

    Raises:
        UserError: it is not there, or cannot be fetched (and what to set).
    """
    assert not model.startswith("embedded:"), "embedded models are found by the room that knows them"
    if model.startswith(OBJECT_SCHEMES):
        return _fetch_objects(model, key)
    local = Path(model).expanduser()
    if local.is_dir():
        return local.absolute()
    if local.is_file():
        raise UserError(f"{key}: {model} is a file; name the directory that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise UserError(f"{key}: no such model directory: {model!r}")
    return _fetch_hub(model, revision, key)


def _fetch_hub(model: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(CONTENT)))
    except GatedRepoError:
        remedy = "is gated: accept its terms on its page and set HF_TOKEN"
    except RevisionNotFoundError:
        remedy = f"has no revision {revision!r}"
    except RepositoryNotFoundError:
        remedy = "is neither a local directory nor a model that the hub shows you; check the name, or set HF_TOKEN"
    except LocalEntryNotFoundError:
        remedy = "is not in the hub's local cache and the hub cannot be reached; name a local directory or s3:// path"
    except (HfHubHTTPError, OSError) as error:
        remedy = f"cannot be fetched from the hub: {str(error).strip().splitlines()[0]}"
    raise UserError(f"{key}: model `{model}` {remedy}")


def _fetch_objects(model: str, key: str) -> Path:
    storage = storage_at(model)
    assert isinstance(storage, ObjectStorage)
    files = storage.files("")
    if not files:
        raise UserError(f"{key}: nothing under {model}")
    listing = fingerprint([[file.path, file.size, file.modified] for file in files])
    copy = cache_directory() / "models" / listing
    if copy.is_dir():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    # The workers of a node ask for it at once: one fetches, the others wait.
    with locks.hold(copy.with_name(f".{copy.name}.lock")):
        if copy.is_dir():
            return copy
        fetched = Path(tempfile.mkdtemp(dir=copy.parent, prefix=".fetching-"))
        try:
            for file in files:
                if any(Path(file.path).match(pattern) for pattern in CONTENT):
                    storage.download(file.path, fetched / file.path)
            fetched.rename(copy)
        finally:
            shutil.rmtree(fetched, ignore_errors=True)
    return copy


def model_digest(directory: Path) -> str:
    """sha256 over names and content of the weights, configuration and tokenizer files in `directory`.

    Remembered in the cache by size and time stamp of each file, so that gigabytes are read once.

    Raises:
        UserError: the directory holds no model.
    """
    names = sorted({path for pattern in CONTENT for path in directory.rglob(pattern) if path.is_file()})
    if not names:
        raise UserError(f"{directory}: holds no model (no safetensors, GGUF, JSON or tokenizer file)")
    remembered = cache_directory() / "digests" / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()}.json"
    known = _recall(remembered)
    digests: dict[str, list[int | str]] = {}
    for path in names:
        name = path.relative_to(directory).as_posix()
        status = path.stat()
        stamp: list[int | str] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        old = known.get(name)
        if old is not None and old[:3] == stamp:
            digests[name] = old
        else:
            with path.open("rb") as file:
                digests[name] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    if digests != known:
        _remember(remembered, digests)
    return fingerprint({name: entry[3] for name, entry in digests.items()})


def _recall(path: Path) -> dict[str, list[int | str]]:
    try:
        known: dict[str, list[int | str]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known


def _remember(path: Path, digests: dict[str, list[int | str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(digests))
        beside.replace(path)
    except OSError:  # a cache that cannot be written only costs time
        return
