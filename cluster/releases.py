"""Releases: what was evaluated together is served together.

In: references to an index, samples, adapters and a router, the base model's digest and the prompt-format number. Out: a
`release` artifact whose `release.json` pins them; `promote` makes one current, `rollback` returns to the one before.
Opening checks that every pinned artifact exists and that what must agree agrees.
Not covered: the index's encoder against the query encoder (the retriever checks it when it opens the index).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

from cluster.errors import ArtifactError
from cluster.manifest import ArtifactRef, Manifest
from cluster.stage import Plan
from cluster.store import Store

KIND = "release"
CONTENT = "release.json"
HISTORY = "history.json"
FORMAT = 2
"""2 may lack an index and may pin a router; releases of format 1 are read as before."""


@dataclasses.dataclass(frozen=True)
class Release:
    """What is served together; empty `adapters` make an index-only release, no index a closed-book one."""

    name: str
    version: str
    index: ArtifactRef | None
    samples: ArtifactRef | None = None
    adapters: dict[str, ArtifactRef] = dataclasses.field(default_factory=dict)
    """Adapter's role (`raft`, `finetuned`) to its artifact."""
    base_digest: str = ""
    """Digest of the base model; empty when nothing is generated with it yet."""
    prompt_format: int = 0
    """Number of the prompt format."""
    router: ArtifactRef | None = None
    """The intent classifier; none recognises intents by the recipe's keywords."""

    @property
    def ref(self) -> ArtifactRef:
        """The release's own reference."""
        return ArtifactRef(KIND, self.name, self.version)

    def pins(self) -> dict[str, ArtifactRef]:
        """Role to pinned artifact."""
        parts = {"index": self.index, "samples": self.samples, "router": self.router}
        return {**{role: ref for role, ref in parts.items() if ref is not None}, **self.adapters}


def publish_release(
    store: Store,
    name: str,
    *,
    index: ArtifactRef | None,
    samples: ArtifactRef | None = None,
    adapters: Mapping[str, ArtifactRef] | None = None,
    base_digest: str = "",
    prompt_format: int = 0,
    router: ArtifactRef | None = None,
) -> ArtifactRef:
    """Publish a release of these artifacts, or find the one that pins exactly them; it is not promoted yet.

    Raises:
        ArtifactError: one of them is missing, or they do not belong together (naming both).
    """
    taken = dict(sorted((adapters or {}).items()))
    clash = {"index", "samples", "router"} & taken.keys()
    assert not clash, f"an adapter cannot be called {clash}"
    draft = Release(name, "0" * 16, index, samples, taken, base_digest, prompt_format, router)
    _check(store, draft, f"release of {name}")
    plan = Plan(
        kind=KIND,
        name=name,
        config={"adapters": list(taken), "base_digest": base_digest, "prompt_format": prompt_format},
        parents=draft.pins(),
        format=FORMAT,
    )
    if not store.exists(plan.ref):
        store.check_writable()
        with store.attempt(plan.ref) as attempt:
            (attempt.directory / CONTENT).write_text(json.dumps(_to_json(draft), indent=1) + "\n", encoding="utf-8")
            attempt.publish(plan)
    return plan.ref


def _to_json(release: Release) -> dict[str, Any]:
    return {
        "index": str(release.index) if release.index else None,
        "samples": str(release.samples) if release.samples else None,
        "router": str(release.router) if release.router else None,
        "adapters": {role: str(ref) for role, ref in release.adapters.items()},
        "base_digest": release.base_digest,
        "prompt_format": release.prompt_format,
    }


def open_release(store: Store, name: str, version: str | None = None) -> Release:
    """The release of that version, or the promoted one, with its pins checked.

    Raises:
        ArtifactError: none is promoted, a pinned artifact is gone, or pins disagree (naming both).
    """
    if version is None and store.current(KIND, name) is None:
        published = store.versions(KIND, name)
        remedy = f"run `rayft promote RECIPE {published[0]}`" if published else "run `rayft demo RECIPE` first"
        raise ArtifactError(f"no release of `{name}` is promoted in {store.uri}; {remedy}")
    release = read_release(store, name, version)
    _check(store, release, str(release.ref))
    return release


def read_release(store: Store, name: str, version: str | None = None) -> Release:
    """What a release pins, without looking at the pinned artifacts."""
    artifact = store.open(KIND, name, version)
    if artifact.manifest.format > FORMAT:
        raise ArtifactError(
            f"{artifact.ref} is a release of format {artifact.manifest.format}, this rayft reads up to {FORMAT}: "
            "install the rayft that published it, or release again with this one"
        )
    pins = json.loads(artifact.path(CONTENT).read_text(encoding="utf-8"))
    return Release(
        name=name,
        version=artifact.ref.version,
        index=_optional(pins["index"]),
        samples=_optional(pins["samples"]),
        adapters={role: ArtifactRef.parse(ref) for role, ref in pins["adapters"].items()},
        base_digest=pins["base_digest"],
        prompt_format=pins["prompt_format"],
        router=_optional(pins.get("router")),
    )


def _optional(ref: str | None) -> ArtifactRef | None:
    return ArtifactRef.parse(ref) if ref else None


def _check(store: Store, release: Release, shown: str) -> None:
    for role, ref in release.pins().items():
        if not store.exists(ref):
            raise ArtifactError(f"{shown}: its {role} {ref} is not in {store.uri}; build it again or promote another")
    for role, ref in release.adapters.items():
        manifest = store.open_ref(ref).manifest
        for key, served in (("base_digest", release.base_digest), ("prompt_format", release.prompt_format)):
            trained = _stated(manifest, key)
            if trained is not None and trained != served:
                raise ArtifactError(
                    f"{shown}: adapter {role} ({ref}) was trained with {key} {trained}, the release serves {key} "
                    f"{served}; train it again or release it with what it was trained on"
                )


def _stated(manifest: Manifest, key: str) -> Any:
    return manifest.config.get(key, manifest.inputs.get(key))


def promote(store: Store, name: str, version: str) -> Release:
    """Make a release current, for new openings; its pins are checked first."""
    release = open_release(store, name, version)
    promoted = history(store, name)
    current = store.current(KIND, name)
    if current == version:
        return release
    # What a rollback left behind leads nowhere once something else is promoted.
    kept = promoted[: _last(promoted, current) + 1] if current in promoted else promoted
    # History first: killed in between, current is still found in it, and rollback goes to the one before current.
    _write_history(store, name, [*kept, version])
    store.set_current(release.ref)
    return release


def rollback(store: Store, name: str) -> Release:
    """Make the release current that was promoted before the current one; its pins are checked first.

    Raises:
        ArtifactError: nothing was promoted before.
    """
    current = store.current(KIND, name)
    promoted = history(store, name)
    before = promoted[: _last(promoted, current)] if current in promoted else promoted
    if current is None or not before:
        raise ArtifactError(f"no release of `{name}` was promoted before the current one ({current or 'none'})")
    release = open_release(store, name, before[-1])
    store.set_current(release.ref)
    return release


def history(store: Store, name: str) -> list[str]:
    """Versions in the order of their promotion, oldest first."""
    key = f"{KIND}/{name}/{HISTORY}"
    try:
        entries = json.loads(store.storage.read(key))
        return [ArtifactRef(KIND, name, entry["version"]).version for entry in entries]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:  # JSON and reference errors are ValueErrors
        raise ArtifactError(f"{store.uri}/{key}: damaged ({error}); remove it and promote a release again") from None


def _write_history(store: Store, name: str, versions: list[str]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    key = f"{KIND}/{name}/{HISTORY}"
    try:
        known = {entry["version"]: entry["at"] for entry in json.loads(store.storage.read(key))}
    except FileNotFoundError:
        known = {}
    entries = [{"version": version, "at": known.get(version, now)} for version in versions[:-1]]
    with store.blames_uri():
        store.storage.replace(key, json.dumps([*entries, {"version": versions[-1], "at": now}], indent=1).encode())


def _last(versions: list[str], version: str | None) -> int:
    return max(number for number, found in enumerate(versions) if found == version)
