"""A teacher behind an OpenAI-compatible HTTP API.

In: a request, and the endpoint's address and key from the environment. Out: a reply, or why there is none.
Busy, failing and hanging endpoints are asked again a bounded number of times: `Retry-After` is kept to, otherwise the
wait is drawn from an exponentially growing range (full jitter, seeded). A wrong key, address or model ends the job.

httpx and not the `openai` client: retries must be ours, because each one is counted, and because the caller stores a
reply before it sends the next request. Not covered: storing replies, reading them, streaming.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from cluster.errors import UserError
from cluster.progress import say
from training.chat_response import Fault, Reply, fault_of, read_reply, retry_after
from training.teacher_config import TeacherConfig
from training.teacher_prompt import TeacherRequest

_RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
_FATAL = {
    401: "check the key in {key}",
    402: "the account has no credit left",
    403: "the key in {key} may not use it",
    404: "check {url} (with /v1 at the end, where the endpoint has that) and teacher.model",
}
_OUT_OF_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
_UNSUPPORTED = re.compile(r"unsupported|not support|unrecogni|unknown|not permitted|not allowed|extra|unexpected", re.I)
_SHOWN_CHARS = 200


class NoReplyError(Exception):
    """All attempts came to nothing; another run may fare better."""


class RefusedError(Exception):
    """The teacher will not answer this request, however often it is asked."""


class Teacher(Protocol):
    """Answers requests, several at a time."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    @property
    def trouble(self) -> Mapping[str, int]:
        """How often requests were sent again, by reason."""
        ...

    async def ask(self, request: TeacherRequest) -> Reply:
        """One reply.

        Raises:
            NoReplyError: After all attempts.
            RefusedError: For this request only.
            UserError: No request can succeed.
        """
        ...

    async def close(self) -> None:
        """Frees connections or the model."""
        ...


@dataclass(frozen=True)
class Address:
    """Where the endpoint is, and the key to show it."""

    url: str
    key: str

    @classmethod
    def from_environment(cls, config: TeacherConfig) -> Address:
        """Reads the variables that the recipe names.

        Raises:
            UserError: A variable is unset or cannot be an address or key. The key is never shown.
        """
        url = os.environ.get(config.base_url_env, "").strip().rstrip("/").removesuffix("/chat/completions")
        if not url:
            raise UserError(
                f"teacher.base_url_env: the environment variable {config.base_url_env} is not set: export it "
                "with the endpoint's base URL, or set teacher.engine to local"
            )
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"teacher.base_url_env: {config.base_url_env} is not a URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(
                f"teacher.base_url_env: {config.base_url_env} holds {url[:80]!r}: expected http://… or https://…"
            )
        if not config.api_key_env:
            return cls(url, "")
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"teacher.api_key_env: the environment variable {config.api_key_env} is not set: export it with the "
                'key, or set teacher.api_key_env to "" for an endpoint without keys'
            )
        if not key.isascii() or not key.isprintable():
            raise UserError(f"teacher.api_key_env: {config.api_key_env} holds characters that no key has")
        return cls(url, key)


class EndpointTeacher:
    """Asks an endpoint; see the module's docstring."""

    def __init__(self, config: TeacherConfig, address: Address) -> None:
        """Opens no connection yet.

        Raises:
            UserError: `teacher.model` is empty.
        """
        if not config.model:
            raise UserError("teacher.model is empty: name the model at the endpoint (--set teacher.model=…)")
        self._config = config
        self._address = address
        self._trouble: collections.Counter[str] = collections.Counter()
        self._open_at = 0.0
        """Monotonic time before which the endpoint wants no request."""
        self._response_format = config.response_format
        self._left_out: set[str] = set()
        """Parameters that the endpoint has refused."""
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        # httpx's own timeouts count the silence between two bytes; `_send` sets one over the whole request.
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self._config.model

    @property
    def trouble(self) -> Mapping[str, int]:
        """How often requests were sent again, by reason."""
        return self._trouble

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def ask(self, request: TeacherRequest) -> Reply:
        """One reply; see `Teacher.ask`."""
        rng = random.Random(f"{request.seed}/{request.key}")
        reason = ""
        attempt = 0
        while attempt < self._config.attempts:
            await self._wait_for_opening(rng)
            sent = self._body(request)
            asked_wait: float | None = None
            try:
                response = await self._send(sent)
            except TimeoutError:
                reason = f"no answer within {self._config.request_timeout_s:g} s"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {self._safe(str(error))}".rstrip(": ")
            else:
                fault = fault_of(response)
                if fault is None:
                    reply = read_reply(response)
                    if reply is not None:
                        return reply
                    reason = "200, but no chat completion in the body"
                elif fault.status == 400 and self._adapt(fault, sent):
                    continue
                else:
                    reason = self._judge(fault)
                    asked_wait = retry_after(response)
            attempt += 1
            self._trouble[reason] += attempt < self._config.attempts
            if attempt < self._config.attempts:
                await self._back_off(attempt, asked_wait, rng)
        raise NoReplyError(reason)

    async def _send(self, body: dict[str, Any]) -> httpx.Response:
        async with asyncio.timeout(self._config.request_timeout_s):
            return await self._client.post(f"{self._address.url}/chat/completions", json=body)

    def _body(self, request: TeacherRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
        }
        if "max_tokens" in self._left_out:  # newer models of some endpoints know it by another name
            body["max_completion_tokens"] = request.max_tokens
        if self._response_format == "json_schema":
            schema = {"name": "questions", "strict": True, "schema": dict(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self._response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {name: value for name, value in body.items() if name not in self._left_out}

    def _adapt(self, fault: Fault, sent: Mapping[str, Any]) -> bool:
        """Leaves out what the endpoint does not know; whether that makes another request worth while."""
        optional = ("response_format", "seed", "temperature", "max_tokens", "max_completion_tokens")
        told = fault.parameter.partition(".")[0]
        refused = [name for name in optional if name in sent and (name == told or name in fault.message)]
        if not refused or fault.code == "context_length_exceeded":
            return False
        if not told and not _UNSUPPORTED.search(fault.message):
            return False
        name = refused[0]
        if name == "response_format":
            if sent[name]["type"] == self._response_format:  # else another request has adapted meanwhile
                self._response_format = "json_object" if self._response_format == "json_schema" else "none"
                say(f"questions: the endpoint refuses this response_format; going on with {self._response_format}")
        elif name not in self._left_out:
            self._left_out.add(name)
            say(f"questions: the endpoint refuses `{name}`; going on without it")
        return True

    def _judge(self, fault: Fault) -> str:
        """The reason to ask again.

        Raises:
            RefusedError: Asking again is of no use for this request.
            UserError: It is of no use for any.
        """
        message = f"{fault.status} {self._safe(fault.message)}".strip()
        if fault.code in _OUT_OF_CREDIT:
            raise UserError(f"teacher: {self._address.url} says {message}: {_FATAL[402]}")
        if fault.status in _FATAL:
            hint = _FATAL[fault.status].format(
                key=self._config.api_key_env or "(no key is sent: see teacher.api_key_env)",
                url=self._config.base_url_env,
            )
            raise UserError(f"teacher: {self._address.url} answers {message} for `{self.name}`: {hint}")
        if 300 <= fault.status < 400:
            raise UserError(
                f"teacher: {self._address.url} redirects ({fault.status}): set {self._config.base_url_env} to where it "
                "leads, as a key is not sent on"
            )
        if fault.status not in _RETRIED:
            raise RefusedError(f"the endpoint answers {message}")
        return f"{fault.status}"

    async def _wait_for_opening(self, rng: random.Random) -> None:
        """Waits until the endpoint wants requests again: one that is busy is so for all slots."""
        while (wait := self._open_at - time.monotonic()) > 0:
            # Spread over the first back-off, so that the slots do not all return in the same instant.
            await asyncio.sleep(wait + rng.uniform(0, min(self._config.backoff_s, wait)))

    async def _back_off(self, attempt: int, asked_wait: float | None, rng: random.Random) -> None:
        if asked_wait is None:
            reach = min(self._config.longest_wait_s, self._config.backoff_s * 2 ** min(attempt - 1, 30))
            await asyncio.sleep(rng.uniform(0, reach))
            return
        if asked_wait > self._config.longest_wait_s:
            raise UserError(
                f"teacher: {self._address.url} asks to wait {asked_wait:.0f} s, more than teacher.longest_wait_s "
                f"({self._config.longest_wait_s:g}): run the same command again later, what was received is kept"
            )
        self._open_at = max(self._open_at, time.monotonic() + asked_wait)

    def _safe(self, text: str) -> str:
        """An endpoint's words on one line, cut short, without the key (some repeat it)."""
        line = " ".join(text.split())
        if self._address.key:
            line = line.replace(self._address.key, "***")
        return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"
