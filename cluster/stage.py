"""Running a stage: decide by fingerprint whether to build, say why, publish, make current.

In: a `Plan` (everything the result depends on) and a function that writes the files. Out: the published artifact.
Interrupting leaves the old current version; rerunning continues in the same version's work directory.
Not covered: how anything is built; resources, addresses and worker counts, which must stay out of a plan.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef, Manifest, fingerprint, plain
from cluster.progress import describe_seconds, say
from cluster.storage import OBJECT_SCHEMES, LocalStorage, ObjectStorage, storage_at
from cluster.store import Artifact, Attempt, Store

REASONS_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that an artifact's content depends on; its fingerprint is the version."""

    kind: str
    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Result-affecting configuration only: no resources, addresses or worker counts."""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of an external input to the digest of its content."""
    parents: dict[str, ArtifactRef] = dataclasses.field(default_factory=dict)
    """Role to the artifact built from."""
    format: int = 1
    """Raise it when the same inputs should give other files."""
    seed: int = 0

    @functools.cached_property
    def ref(self) -> ArtifactRef:
        """Kind, name, and the fingerprint's first 16 hexadecimal digits."""
        parents = {role: str(parent) for role, parent in self.parents.items()}
        content = [self.kind, self.name, self.config, self.inputs, parents, self.format, self.seed]
        return ArtifactRef(self.kind, self.name, fingerprint(content)[:16])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a build reports for the manifest."""

    counts: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_stage(
    store: Store,
    plan: Plan,
    build: Callable[[Attempt], Outcome],
    *,
    expected: str | EllipsisType | None = ...,
    because: Sequence[str] = (),
) -> Artifact:
    """The artifact of `plan`: the one that exists, or a new one from `build`, made current.

    Args:
        store: Where.
        plan: What.
        build: Writes the files.
        expected: The version that must still be current at the end (none: no version); by default any may be.
        because: Why it is built, to say so; by default what differs from the current version.

    Raises:
        ArtifactError: a parent is missing, the existing artifact's manifest is damaged, or another version than
            `expected` is current at the end.
        UserError: the store cannot be written (naming `store.uri`).
    """
    ref = plan.ref
    if store.exists(ref):
        artifact = store.open_ref(ref)
        again = "" if store.current(ref.kind, ref.name) == ref.version else "; made current again"
        say(f"{ref.kind}: up to date ({ref}): {_sameness(plan)}{again}")
        if again:
            store.set_current(ref, expected=expected)
        return artifact
    for role, parent in plan.parents.items():
        if not store.exists(parent):
            raise ArtifactError(f"{ref.kind}: its {role} {parent} is not in {store.uri}; build that first")
    store.check_writable()
    say(f"{ref.kind}: building {ref}: {'; '.join(because or rebuild_reasons(store, plan))}")
    began = time.monotonic()
    with store.attempt(ref) as attempt:
        outcome = build(attempt)
        seconds = time.monotonic() - began
        measured = {**outcome.measured, "stage_seconds": round(seconds, 3)}
        artifact = attempt.publish(plan, outcome.counts, measured)
        won = artifact.manifest.attempt == attempt.id
    store.set_current(ref, expected=expected)
    told = "published" if won else "another builder of the same version was first; taking"
    say(f"{ref.kind}: {told} {artifact.uri} ({describe_seconds(seconds)})")
    return artifact


def _sameness(plan: Plan) -> str:
    names = [*plan.inputs, *plan.parents, *plan.config]
    return f"same {', '.join(dict.fromkeys(names))}" if names else "nothing it depends on changed"


def rebuild_reasons(store: Store, plan: Plan) -> list[str]:
    """Why `plan` is not the current artifact: the names of what changed."""
    try:
        current = store.current(plan.kind, plan.name)
        if current is None:
            return ["not built yet"]
        manifest = store.open(plan.kind, plan.name, current).manifest
    except ArtifactError:
        return ["the current version is missing or damaged"]
    reasons = [*_changes(manifest, plan)]
    shown = reasons[:REASONS_SHOWN]
    return [*shown, f"and {len(reasons) - REASONS_SHOWN} more changes"] if len(reasons) > REASONS_SHOWN else shown


def _changes(old: Manifest, plan: Plan) -> Iterator[str]:
    for name in _differing(old.inputs, plan.inputs):
        yield f"content of {name} changed"
    for role in _differing(old.parents, {role: str(parent) for role, parent in plan.parents.items()}):
        yield f"{role} is another ({plan.parents.get(role, 'none')})"
    before, after = dict(_flatten(old.config)), dict(_flatten(plain(plan.config)))
    for key in _differing(before, after):
        if key in before and key in after:
            yield f"{key} changed from {_short(before[key])} to {_short(after[key])}"
        else:
            yield f"{key} is new" if key in after else f"{key} is gone"
    if old.seed != plan.seed:
        yield f"seed changed from {old.seed} to {plan.seed}"
    if old.format != plan.format:
        yield f"format {old.format} became {plan.format}"


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*old, *new]) if old.get(key, ...) != new.get(key, ...)]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def digest_path(path: str, suffixes: Sequence[str] = (), key: str = "") -> str:
    """sha256 of a file's bytes, or of a folder's file names and bytes; local, `s3://` or `gs://`.

    Args:
        path: File or folder. Hidden files and folders below it are left out.
        suffixes: With these (`.txt`), only such files of a folder count.
        key: Recipe key to name in the error.

    Raises:
        UserError: there is nothing at `path`.
    """
    missing = UserError(f"{key + ': ' if key else ''}no such file or folder: {path}")
    if path.startswith(OBJECT_SCHEMES):
        scheme, _, rest = path.partition("://")
        bucket, _, name = rest.strip("/").partition("/")
        storage = storage_at(f"{scheme}://{bucket}")
        try:
            return _digest_blocks(storage, name) if name else _digest_folder(storage, "", suffixes, missing)
        except FileNotFoundError:
            return _digest_folder(storage, name, suffixes, missing)
    local = Path(path)
    if local.is_file():
        return _digest_blocks(LocalStorage(local.parent), local.name)
    if not local.is_dir():
        raise missing
    return _digest_folder(LocalStorage(local), "", suffixes, missing)


def _digest_blocks(storage: LocalStorage | ObjectStorage, key: str) -> str:
    digest = hashlib.sha256()
    if isinstance(storage, ObjectStorage):
        for block in storage.stream(key):
            digest.update(block)
        return digest.hexdigest()
    with (storage.root / key).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_folder(
    storage: LocalStorage | ObjectStorage, prefix: str, suffixes: Sequence[str], missing: UserError
) -> str:
    names = [file.path for file in storage.files(prefix)]
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    wanted = [name for name in shown if not suffixes or name.lower().endswith(tuple(suffixes))]
    if not names and isinstance(storage, ObjectStorage):
        raise missing
    return fingerprint([[name, _digest_blocks(storage, f"{prefix}/{name}".lstrip("/"))] for name in wanted])
