"""Asking a running service over HTTP, and showing its answer in a terminal.

In: a base URL and a question. Out: the response, and lines for people: answer, route and why, verified quotes with
their sources. Not covered: streaming; the official `openai` client speaks to the service as it is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError


@dataclass(frozen=True)
class Reply:
    """A response of the chat-completions API. `details` is its `rayft` object."""

    content: str
    details: dict[str, Any]
    usage: dict[str, int]

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
) -> Reply:
    """Asks one question and waits for the answer.

    Raises:
        UserError: The service refused the question or cannot be reached; with its own words.
    """
    import httpx

    body = _body(question, model, metadata)
    try:
        response = httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=timeout_s, trust_env=False)
    except httpx.HTTPError as error:
        raise UserError(f"no answer from {base_url}: {type(error).__name__}; is `rayft serve` running?") from error
    if response.status_code != 200:
        raise UserError(f"{base_url} answered {response.status_code}: {_reason(response.text)}")
    content = response.json()
    return Reply(content["choices"][0]["message"]["content"], content["rayft"], content["usage"])


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


def curl_line(base_url: str, question: str, model: str = "rayft-auto") -> str:
    """A command to paste that asks the same question."""
    body = shlex.quote(json.dumps(_body(question, model, None), ensure_ascii=False))
    return f"curl -s {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d {body}"


def _body(question: str, model: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
    return {**body, "metadata": dict(metadata)} if metadata else body


def _reason(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
