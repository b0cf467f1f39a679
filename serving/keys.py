"""API keys: who asks, and what they may see.

In: `serve.keys` (a file of hashed keys), the environment variable RAYFT_API_KEYS (`tenant:sha256hex,…`), the recipe's
`serve.tenants`, and the `Authorization` header of a request. Out: a `Caller`, whose groups, filter and strategies come
from the recipe and never from the request.

A key is 256 random bits, so its SHA-256 is as hard to turn back as the key is to guess: salt and a slow hash protect
secrets that people choose, and would cost 50 ms of every request here. The file is read again when it changes (one
`stat` per request), so a revoked key is refused at the next request. A file that is damaged or gone closes the
server, it never opens it. Plain keys are not read from the environment, where every child process and crash report
has them.
Not covered: quotas (serving/quotas.py), the commands (serving/keys_cli.py). Imports no torch, ray or faiss.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from cluster import locks
from cluster.config import Section
from cluster.errors import UserError
from retrieval.filters import Filter, parse_filter
from serving.api_errors import ApiError
from serving.config import ServeConfig, TenantConfig
from serving.interfaces import ANYBODY, Caller

logger = logging.getLogger(__name__)

VARIABLE = "RAYFT_API_KEYS"
PREFIX = "rk-"
KEY_BYTES = 32
LONGEST_KEY = 200
"""Characters of a key that are hashed at all; ours have 46."""
FILE_MODE = 0o600
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(r"\w[\w.@-]{0,63}")


class ApiKey(Section):
    """A key as it is stored; the key itself is nowhere."""

    tenant: str
    name: str = ""
    """What the key is for, for people."""
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    """When it stops to work; none: never."""
    sha256: str = Field(pattern=f"^{_DIGEST.pattern}$")

    @property
    def id(self) -> str:
        """Names the key without revealing it."""
        return f"k-{self.sha256[:12]}"

    def expired(self, now: datetime) -> bool:
        """Whether it works no more."""
        return self.expires is not None and now >= self.expires


class _KeysFile(Section):
    format: Literal[1]
    keys: tuple[ApiKey, ...]

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("a key stands twice")
        return self


def new_secret() -> str:
    """A key that nobody can guess: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(secret: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def check_tenant(tenant: str) -> str:
    """A tenant's name, which stands in files and in the environment.

    Raises:
        UserError: It holds characters that would not survive there.
    """
    if not _TENANT.fullmatch(tenant):
        raise UserError(
            f"tenant {tenant!r}: letters, digits, `.`, `_`, `@` and `-`, at most 64, a letter or digit first"
        )
    return tenant


class KeyFile:
    """The file of hashed keys: JSON, mode 0600, replaced as a whole."""

    def __init__(self, path: Path | str) -> None:
        """Nothing is read yet."""
        self.path = Path(path).expanduser().absolute()

    def read(self) -> tuple[ApiKey, ...]:
        """The keys in it.

        Raises:
            UserError: It is missing, damaged, or everybody may write to it.
        """
        try:
            if self.path.stat().st_mode & 0o002:
                raise UserError(f"{self.path}: everybody may write to it and so make keys: chmod 600 it")
            return _KeysFile.model_validate_json(self.path.read_bytes()).keys
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{self.path}: not a file of API keys ({place + ': ' if place else ''}{first['msg']})"
            ) from None

    def add(self, key: ApiKey) -> None:
        """Adds a key, durably; the file and its folder are made where they are missing."""
        self._change(lambda keys: (*keys, key))

    def revoke(self, key_id: str) -> ApiKey:
        """Removes a key, durably, and returns it.

        Raises:
            UserError: There is none of that id.
        """
        removed: list[ApiKey] = []

        def without(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
            removed.extend(key for key in keys if key.id == key_id)
            if not removed:
                raise UserError(f"{self.path}: no key {key_id}; it has {', '.join(key.id for key in keys) or 'none'}")
            return tuple(key for key in keys if key.id != key_id)

        self._change(without)
        return removed[0]

    def _change(self, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locks.hold(self.path.with_name(f".{self.path.name}.lock")):
                keys = change(self.read() if self.path.exists() else ())
                self._write(_KeysFile(format=1, keys=keys))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _write(self, content: _KeysFile) -> None:
        draft = self.path.with_name(f".{self.path.name}.new")
        draft.unlink(missing_ok=True)  # a killed command's; the mode below only counts for a new file
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content.model_dump(mode="json"), file, ensure_ascii=False, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_environment(value: str) -> tuple[ApiKey, ...]:
    """The keys in RAYFT_API_KEYS.

    Raises:
        UserError: An entry is none; it is not repeated, for it may hold a secret.
    """
    keys = []
    for number, entry in enumerate(filter(None, (part.strip() for part in value.split(","))), start=1):
        tenant, _, digest = entry.rpartition(":")
        if not tenant or not _DIGEST.fullmatch(digest.lower()):
            raise UserError(
                f"{VARIABLE}: entry {number} is not `tenant:sha256hex` (plain keys are not read from the environment); "
                "`rayft keys new --no-file TENANT` prints one"
            )
        keys.append(ApiKey(tenant=check_tenant(tenant), sha256=digest.lower()))
    return tuple(keys)


@dataclass(frozen=True)
class Tenant:
    """What the holders of a tenant's keys may see and use."""

    groups: frozenset[str]
    filter: Filter | None
    strategies: tuple[str, ...]


def read_tenants(tenants: Mapping[str, TenantConfig]) -> dict[str, Tenant]:
    """`serve.tenants`, parsed.

    Raises:
        UserError: A name or a filter is none; names the recipe key.
    """
    found = {}
    for name, config in tenants.items():
        key = f"serve.tenants.{name}"
        if not _TENANT.fullmatch(name):
            raise UserError(f"{key}: a tenant's name has letters, digits, `.`, `_`, `@` and `-`, at most 64")
        wanted = parse_filter(config.filter, f"{key}.filter") if config.filter else None
        found[name] = Tenant(frozenset(config.groups), wanted, config.strategies)
    return found


class ApiKeys:
    """The server's `KeyRing`. Pickles: made where the graph is started, it reads the file where it is used."""

    def __init__(self, tenants: Mapping[str, Tenant], file: KeyFile | None, fixed: Sequence[ApiKey] = ()) -> None:
        """`fixed` are the keys of the environment. Without a file and without any, everybody may ask."""
        self._tenants = dict(tenants)
        self._file = file
        self._fixed = tuple(fixed)
        self._seen: tuple[int, ...] | None = None
        self._keys: dict[str, ApiKey] | None = None

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._file is not None or bool(self._fixed)

    def caller(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization` header (`Bearer rk-…`).

        Raises:
            ApiError: 401 where this is no key that works, 403 where the recipe does not name its tenant, 503 while
                the file cannot be read.
        """
        if not self.required:
            return ANYBODY
        known = self._known()
        scheme, _, secret = (authorization or "").strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise _unauthorised("this server needs an API key: send it as `Authorization: Bearer rk-…`")
        digest = digest_of(secret) if len(secret) <= LONGEST_KEY else ""
        key = known.get(digest)
        # Looking a hash up takes a time that depends on the hash, which tells nothing about the key that it is of;
        # the comparison that decides takes always the same.
        if key is None or not hmac.compare_digest(key.sha256, digest):
            raise _unauthorised("this is no API key of this server, or it was revoked")
        if key.expired(datetime.now(UTC)):
            raise _unauthorised(f"the API key {key.id} has expired")
        tenant = self._tenants.get(key.tenant)
        if tenant is None:
            raise ApiError(
                403,
                f"the API key {key.id} belongs to a tenant that this server does not serve",
                code="unknown_tenant",
            )
        return Caller(key.tenant, key.id, tenant.groups, tenant.filter, tenant.strategies)

    def all(self) -> tuple[ApiKey, ...]:
        """Every key, as they are now.

        Raises:
            UserError: The file cannot be read.
        """
        return (*self._fixed, *(self._file.read() if self._file else ()))

    def strangers(self) -> tuple[ApiKey, ...]:
        """Keys whose tenant the recipe does not name: they are refused. Raises as `all` does."""
        return tuple(key for key in self.all() if key.tenant not in self._tenants)

    def _known(self) -> dict[str, ApiKey]:
        """The keys by digest, as the file has them now."""
        seen = self._look()
        if self._keys is not None and seen == self._seen:
            return self._keys
        try:
            found = {key.sha256: key for key in self.all()}
        except UserError as error:
            if self._keys is not None or seen != self._seen:  # once, not at every request until it is mended
                logger.error("nobody is let in: %s", error)
            self._seen, self._keys = seen, None
            raise ApiError(
                503, "the server cannot read its API keys", code="keys_unavailable", retry_after_s=5
            ) from None
        logger.info("%d API keys", len(found))
        self._seen, self._keys = seen, found
        return found

    def _look(self) -> tuple[int, ...]:
        """What changes when the file does; empty when it is gone."""
        if self._file is None:
            return ()
        try:
            found = self._file.path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")


def open_keys(config: ServeConfig) -> ApiKeys:
    """The keys that a recipe and the environment name; called where the graph is started.

    Raises:
        UserError: The file is missing or damaged, an entry of the environment is none, a tenant's filter is none,
            tenants are named but no keys, or no key belongs to a tenant that is named.
    """
    tenants = read_tenants(config.tenants)
    fixed = read_environment(os.environ.get(VARIABLE, ""))
    keys = ApiKeys(tenants, KeyFile(config.keys) if config.keys else None, fixed)
    if not keys.required:
        if tenants:
            raise UserError(
                "serve.tenants names tenants, but nobody has a key, so everybody would see every tenant's documents: "
                "`rayft keys new TENANT` makes one, serve.keys names its file"
            )
        return keys
    try:
        strangers = keys.strangers()
    except UserError as error:
        raise UserError(f"serve.keys: {error}; `rayft keys new --file {config.keys} TENANT` makes one") from None
    if strangers and len(strangers) == len(keys.all()):
        raise UserError(f"serve.tenants: {_named(strangers)}; add it (`serve.tenants.{strangers[0].tenant}={{}}`)")
    return keys


def asks_for_keys(config: ServeConfig) -> bool:
    """Whether a server of this recipe, started in this environment, answers only to a key."""
    return bool(config.keys or os.environ.get(VARIABLE, "").strip(", "))


def access_warnings(config: ServeConfig, keys: ApiKeys) -> list[str]:
    """What to tell whoever starts the server: one line each."""
    lines = []
    if config.host not in LOOPBACK:
        where = f"serve: listening on {config.host}, where other machines can reach it"
        lines.append(
            f"{where}; requests need an API key"
            if keys.required
            else f"{where}, WITHOUT API KEYS: everybody may ask and read every public collection; `rayft keys new "
            "TENANT` makes a key, serve.keys names its file"
        )
    if strangers := keys.strangers():
        lines.append(f"serve.tenants: {_named(strangers)}; refused")
    return lines


def _named(strangers: Sequence[ApiKey]) -> str:
    shown = ", ".join(f"{key.id} of {key.tenant!r}" for key in strangers[:5])
    more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
    return f"does not name the tenant of the API keys {shown}{more}"
