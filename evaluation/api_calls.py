"""Scoring API calls: which API of the corpus a generated `torch.hub.load(…)` call names.

In: a completion's answer, and the documents of the index, each an API card. Out: the call's repository and model, and
the card that they match. The rule is that of APIBench's evaluation (S. Patil et al. 2023, arXiv 2305.15334: the AST
sub-tree match of gorilla's `ast_eval_th.py`): a call matches a card when repository and model are equal, it is right
when that card's domain is the golden card's, and hallucinated when it matches none. Python's own parser reads the
call, so that positional and keyword arguments, quotes, spaces and surrounding prose make no difference.
Not covered: other arguments, other libraries' calls.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from retrieval.records import Document

_LOAD = re.compile(r"\bhub\s*\.\s*load\s*\(")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_REPOSITORY_NAMES = ("repo_or_dir", "github", "repo")  # `github` was its name before PyTorch 1.5


@dataclass(frozen=True)
class ApiCall:
    """What a call loads; `model` is empty where it names none."""

    repository: str
    model: str


@dataclass(frozen=True)
class ApiCatalogue:
    """The APIs of a corpus: call to domain, and document id to domain and call."""

    domains: Mapping[ApiCall, frozenset[str]] = field(default_factory=dict)
    """Several cards may describe one call."""
    cards: Mapping[str, tuple[str, ApiCall]] = field(default_factory=dict)
    """Document id to its domain and call."""

    @classmethod
    def of(cls, documents: Iterable[Document]) -> ApiCatalogue:
        """The cards among `documents`: those with a call and a `domain` (in their metadata, or in their JSON text)."""
        domains: dict[ApiCall, set[str]] = {}
        cards: dict[str, tuple[str, ApiCall]] = {}
        for document in documents:
            text, domain = _card(document)
            call = find_call(text)
            if call is not None and domain:
                domains.setdefault(call, set()).add(domain)
                cards[document.doc_id] = (domain, call)
        return cls({call: frozenset(found) for call, found in domains.items()}, cards)


def _card(document: Document) -> tuple[str, str]:
    """The text that holds a card's call, and the card's domain."""
    stated = str(document.metadata.get("domain", ""))
    try:
        card = json.loads(document.text)
    except json.JSONDecodeError:
        return document.text, stated
    if not isinstance(card, dict):
        return document.text, stated
    return str(card.get("api_call", document.text)), stated or str(card.get("domain", ""))


def find_call(text: str) -> ApiCall | None:
    """The first call of `torch.hub.load` in `text` that names a repository; None without one."""
    for match in _LOAD.finditer(text):
        inside = _inside_parentheses(text, match.end())
        call = None if inside is None else _read_arguments(inside)
        if call is not None:
            return call
    return None


def _inside_parentheses(text: str, start: int) -> str | None:
    """What stands before the parenthesis that closes the one before `start`; None where none does."""
    wanted = [")"]
    for place, char in _outside_quotes(text, start):
        if char in _CLOSING:
            wanted.append(_CLOSING[char])
        elif char in ")]}":
            if char != wanted.pop():
                return None
            if not wanted:
                return text[start:place]
    return None


def _outside_quotes(text: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """The places and characters from `start` on that stand in no quotes."""
    quote, place = "", start
    while place < len(text):
        char = text[place]
        if quote:
            if char == "\\":
                place += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        else:
            yield place, char
        place += 1


def _read_arguments(inside: str) -> ApiCall | None:
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in _split_arguments(inside):
        # One at a time: a card may state a positional argument after a keyword one, which is no Python as a whole.
        try:
            call = ast.parse(f"f({argument})", mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
            continue
        assert isinstance(call, ast.Call), argument
        positional += [_text(value) for value in call.args]
        named |= {keyword.arg: _text(keyword.value) for keyword in call.keywords if keyword.arg}
    repository = next((named[name] for name in _REPOSITORY_NAMES if name in named), "")
    if not repository:
        repository = positional.pop(0) if positional else ""
    model = named.get("model") or (positional[0] if positional else "")
    return ApiCall(repository, model) if repository else None


def _split_arguments(inside: str) -> Iterator[str]:
    """The arguments between commas that stand in no bracket and no quotes."""
    depth, start = 0, 0
    for place, char in _outside_quotes(inside):
        if char in _CLOSING:
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            yield inside[start:place].strip()
            start = place + 1
    if inside[start:].strip():
        yield inside[start:].strip()


def _text(value: ast.expr) -> str:
    """A literal text's value; any other expression's source."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value.strip()
    return ast.unparse(value)
