"""The manifest: what a published artifact consists of, sealed by a digest of its own bytes.

In: the typed `Manifest`, or the bytes of a `manifest.json`. Out: bytes to publish, or a manifest that is known to be
whole and to name only files inside its attempt. Anything else is an `ArtifactError`: nothing is half-trusted.
A digest proves integrity, not origin. Not covered: where the files live and whether they match (`store.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pydantic

from cluster.config import Section
from cluster.errors import ArtifactError

PART_BYTES = 512_000_000
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 64_000_000

_WORD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[0-9a-f]{16}")
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLANK = "0" * 64

_REPORTED_PACKAGES = (
    *("rayft", "ray", "torch", "transformers", "peft", "deepspeed", "sentence-transformers", "faiss-cpu", "faiss-gpu"),
    *("pyarrow", "safetensors", "numpy", "bm25s", "semantic-text-splitter", "gguf", "obstore", "pydantic"),
)


@dataclasses.dataclass(frozen=True)
class ArtifactRef:
    """Which artifact: `str(ref)` is `index/factbook/1a2b3c4d5e6f7a8b`."""

    kind: str
    name: str
    version: str

    def __post_init__(self) -> None:
        for part in (self.kind, self.name):
            if not _WORD.fullmatch(part):
                raise ArtifactError(f"not an artifact's kind or name: {part!r}")
        if not _VERSION.fullmatch(self.version):
            raise ArtifactError(f"not an artifact's version (16 hexadecimal digits): {self.version!r}")

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}/{self.version}"

    @classmethod
    def parse(cls, text: str) -> ArtifactRef:
        """The inverse of `str`."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ArtifactError(f"not an artifact (kind/name/version): {text!r}")
        return cls(*parts)


class FileEntry(Section):
    """One file of an artifact."""

    path: str
    """Relative POSIX path inside the attempt."""
    size: int = pydantic.Field(ge=0)
    """Bytes."""
    sha256: tuple[str, ...]
    """Digest of each part of `Manifest.part_bytes`; one digest for an empty file."""

    @pydantic.field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        parts = PurePosixPath(path).parts
        inside = parts and not path.startswith("/") and ".." not in parts and "\\" not in path and "\0" not in path
        if not inside or str(PurePosixPath(path)) != path:
            raise ValueError(f"file name leaves the artifact: {path!r}")
        return path

    @pydantic.field_validator("sha256")
    @classmethod
    def _are_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if not digests or not all(_SHA256.fullmatch(digest) for digest in digests):
            raise ValueError("not a sha256 digest")
        return digests


class Manifest(Section):
    """What was built, from what, by what, and which files it is."""

    format: int
    """Number of the artifact's own format, part of its version."""
    kind: str
    name: str
    version: str
    attempt: str
    """Directory beside this manifest that holds the files."""
    created_at: str
    """UTC, ISO 8601."""
    parents: dict[str, str]
    """Role to `kind/name/version`."""
    config: dict[str, Any]
    """Result-affecting configuration, resolved."""
    inputs: dict[str, str]
    """External input to its content digest."""
    packages: dict[str, str]
    """Versions of the packages that built it."""
    seed: int
    counts: dict[str, int | float]
    measured: dict[str, Any]
    files: tuple[FileEntry, ...]
    part_bytes: int = pydantic.Field(default=PART_BYTES, ge=1)
    """Bytes covered by one sha256."""
    purged: tuple[str, ...] = ()
    """sha256 of the ids of documents whose text was purged from the files after this version was published."""
    manifest_format: int = MANIFEST_FORMAT

    @property
    def ref(self) -> ArtifactRef:
        """The artifact that this manifest describes."""
        return ArtifactRef(self.kind, self.name, self.version)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @pydantic.field_validator("attempt")
    @classmethod
    def _is_attempt(cls, attempt: str) -> str:
        if not _ATTEMPT.fullmatch(attempt):
            raise ValueError(f"not an attempt: {attempt!r}")
        return attempt

    @pydantic.model_validator(mode="after")
    def _files_are_distinct(self) -> Manifest:
        paths = {entry.path for entry in self.files}
        if len(paths) != len(self.files) or any(str(p) in paths for path in paths for p in PurePosixPath(path).parents):
            raise ValueError("a file is named twice, or as a folder")
        for entry in self.files:
            if len(entry.sha256) != max(1, math.ceil(entry.size / self.part_bytes)):
                raise ValueError(f"wrong number of digests for {entry.path!r}")
        return self


def is_attempt(name: str) -> bool:
    """Whether a directory of this name holds the files of a build attempt."""
    return _ATTEMPT.fullmatch(name) is not None


def is_version(name: str) -> bool:
    """Whether a directory of this name is a version."""
    return _VERSION.fullmatch(name) is not None


def render_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: indented JSON, first of all the sha256 of these bytes with the digest blanked."""
    body = {"digest": _BLANK, **plain(manifest.model_dump())}
    text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    blank = text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape
    return blank.replace(_BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


_HEAD = re.compile(rb'\{\n "digest": "([0-9a-f]{64})",\n')


def parse_manifest(data: bytes, expected: ArtifactRef, where: str) -> Manifest:
    """The manifest in `data`, refused when a bit of it has changed or it describes another artifact.

    Raises:
        ArtifactError: damaged, of a newer format, or not the manifest of `expected`; `where` names it in the error.
    """
    remedy = f"remove {where} with its folder and run the stage again"
    head = _HEAD.match(data)
    if head is None or len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{where}: damaged manifest; {remedy}")
    blank = data[: head.start(1)] + _BLANK.encode() + data[head.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != head.group(1):
        raise ArtifactError(f"{where}: damaged manifest (its own sha256 does not match); {remedy}")
    body = json.loads(data)
    del body["digest"]
    if body.get("manifest_format") != MANIFEST_FORMAT:
        found = body.get("manifest_format")
        raise ArtifactError(f"{where}: manifest format {found!r}, this rayft reads {MANIFEST_FORMAT}; update rayft")
    try:
        manifest = Manifest.model_validate(body)
        ref = manifest.ref
    except (pydantic.ValidationError, ArtifactError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
        raise ArtifactError(f"{where}: manifest refused: {reason}") from None
    if ref != expected:
        raise ArtifactError(f"{where}: manifest of {ref} found where {expected} belongs; {remedy}")
    return manifest


def plain(value: Any) -> Any:
    """`value` as JSON knows it: tuples as lists, numpy values as numbers, paths as text, NaN as null."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys must be text, got {key!r}")
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, pydantic.BaseModel):
        return plain(value.model_dump())
    raise TypeError(f"a manifest cannot hold {type(value).__name__}")


def fingerprint(value: Any) -> str:
    """sha256 of `value` in canonical JSON: the order of keys does not matter, everything else does."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a result may depend on."""
    return dict(_installed())


def _installed() -> Iterator[tuple[str, str]]:
    for package in _REPORTED_PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def digest_parts(path: Path, part_bytes: int = PART_BYTES) -> tuple[str, ...]:
    """sha256 of each part of a file; one digest for an empty file."""
    return tuple(digest_part(path, start, part_bytes) for start in range(0, max(1, path.stat().st_size), part_bytes))


def digest_part(path: Path, start: int, length: int) -> str:
    """sha256 of up to `length` bytes of a file from `start`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
