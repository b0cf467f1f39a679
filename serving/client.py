"""Asking a running service over HTTP, and showing its answer in a terminal.

In: a base URL and a question, or a rating. Out: the response, and lines for people: answer, route and why, verified
quotes with their sources. A key comes from the argument or the environment variable RAYFT_API_KEY.
Not covered: streaming; the official `openai` client speaks to the service as it is.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError

KEY_VARIABLE = "RAYFT_API_KEY"


@dataclass(frozen=True)
class Reply:
    """A response of the chat-completions API. `details` is its `rayft` object."""

    content: str
    details: dict[str, Any]
    usage: dict[str, int]

    @property
    def request_id(self) -> str:
        """Names the answer in `rate_over_http`."""
        return str(self.details["request_id"])

    @property
    def answer(self) -> str:
        """The answer's own words, without source markers."""
        return str(self.details["answer"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Citations whose quote was found in the passages."""
        return [citation for citation in self.details["citations"] if citation["verified"]]


def ask_over_http(
    base_url: str,
    question: str,
    model: str = "rayft-auto",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    timeout_s: float = 130.0,
    api_key: str = "",
) -> Reply:
    """Asks one question and waits for the answer.

    Raises:
        UserError: The service refused the question or cannot be reached; with its own words.
    """
    content = _post(base_url, "/v1/chat/completions", _body(question, model, metadata), timeout_s, api_key)
    return Reply(content["choices"][0]["message"]["content"], content["rayft"], content["usage"])


def rate_over_http(
    base_url: str,
    request_id: str,
    *,
    satisfied: float | None = None,
    correction: str = "",
    comment: str = "",
    timeout_s: float = 30.0,
    api_key: str = "",
) -> None:
    """Rates an answer from 0 to 1, or says what it should have been; returns when that is stored.

    Raises:
        UserError: The service refused the rating or cannot be reached; with its own words.
    """
    said = {"satisfied": satisfied, "correction": correction or None, "comment": comment or None}
    stated = {name: value for name, value in said.items() if value is not None}
    _post(base_url, "/v1/feedback", {"request_id": request_id, **stated}, timeout_s, api_key)


def describe_reply(question: str, reply: Reply) -> str:
    """Question, answer, route with its reason, verified quotes and where they stand, times."""
    route, times = reply.details["route"], reply.details["timings_ms"]
    lines = [
        f"Q: {question}",
        f"A: {reply.answer}" + (" (abstains)" if reply.details["abstained"] else ""),
        f"   route: {route['strategy']}: {route['reason']}",
    ]
    for source in reply.sources:
        place = f"{source['title']}, characters {source['start']} to {source['end']}"
        lines.append(f"   verified quote: “{' '.join(source['quote'].split())}” ({source['uri'] or place})")
    if not reply.sources:
        shown = ", ".join(dict.fromkeys(hit["title"] for hit in reply.details["hits"]))
        lines.append(f"   no verified quote; passages shown were from: {shown}" if shown else "   closed book")
    lines.append(
        f"   {times['total']:.0f} ms: retrieval {times['retrieval']:.0f}, queue {times['queue']:.0f}, "
        f"generation {times['generation']:.0f}"
    )
    return "\n".join(lines)


def curl_line(base_url: str, question: str, model: str = "rayft-auto", *, with_key: bool = False) -> str:
    """A command to paste that asks the same question; `with_key` has the shell fill in RAYFT_API_KEY."""
    body = shlex.quote(json.dumps(_body(question, model, None), ensure_ascii=False))
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if with_key else ""
    return f"curl -s {base_url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {body}"


def _body(question: str, model: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
    return {**body, "metadata": dict(metadata)} if metadata else body


def _post(base_url: str, path: str, body: dict[str, Any], timeout_s: float, api_key: str) -> dict[str, Any]:
    import httpx

    key = api_key or os.environ.get(KEY_VARIABLE, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.post(f"{base_url}{path}", json=body, headers=headers, timeout=timeout_s, trust_env=False)
    except httpx.HTTPError as error:
        raise UserError(f"no answer from {base_url}: {type(error).__name__}; is `rayft serve` running?") from error
    if response.status_code != 200:
        hint = f" (the key is read from {KEY_VARIABLE})" if response.status_code == 401 else ""
        raise UserError(f"{base_url} answered {response.status_code}: {_reason(response.text)}{hint}")
    content: dict[str, Any] = response.json()
    return content


def _reason(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
