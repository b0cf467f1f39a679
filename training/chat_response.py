"""Reading an OpenAI-compatible endpoint's responses: a reply, a complaint, or how long to wait.

In: an httpx response, whatever is in it. Out: typed values; nothing here raises. Not covered: what to do about it.
"""

from __future__ import annotations

import datetime
import email.utils
from dataclasses import dataclass
from typing import Any

import httpx

_STATUSES = frozenset(map(str, range(400, 600)))


@dataclass(frozen=True)
class Reply:
    """What a teacher answered, and what it cost in tokens (0 where the endpoint does not say)."""

    text: str
    finish_reason: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Fault:
    """What an endpoint complains of."""

    status: int
    message: str
    code: str
    parameter: str


def fault_of(response: httpx.Response) -> Fault | None:
    """What the endpoint complains of; some do so in the body of a 200."""
    body = _json_object(response)
    error = body.get("error")
    if response.status_code == 200 and not error:
        return None
    details = error if isinstance(error, dict) else {}
    code = str(details.get("code") or "")
    status = response.status_code
    if status == 200:
        status = int(code) if code in _STATUSES else 500
    message = details.get("message") or (error if isinstance(error, str) else "") or body.get("message") or ""
    return Fault(status, str(message), code or str(details.get("type") or ""), str(details.get("param") or ""))


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):  # an error page, or a body that was cut off
        return {}
    return body if isinstance(body, dict) else {}


def read_reply(response: httpx.Response) -> Reply | None:
    """The reply in a chat completion; none where the body is not one."""
    body = _json_object(response)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    message = choice.get("message") if choice else None
    if choice is None or not isinstance(message, dict):
        return None
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    reason = "refusal" if message.get("refusal") else str(choice.get("finish_reason") or "stop")
    return Reply(
        text=str(content or ""),
        finish_reason=reason,
        tokens_in=_count(counts.get("prompt_tokens")),
        tokens_out=_count(counts.get("completion_tokens")),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, from `Retry-After` (seconds or an HTTP date, RFC 9110 10.2.3) or `retry-after-ms`."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = response.headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            seconds = _seconds_until(value)
        if seconds == seconds and seconds != float("inf"):
            return max(0.0, seconds)
    return None


def _seconds_until(date: str) -> float:
    try:
        moment = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return float("nan")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()
