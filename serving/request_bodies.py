"""Request bodies: bytes to checked values, strictly, with errors that name the field and never repeat its value.

In: raw bytes and a schema. Out: an instance of it, or an `ApiError`. JSON is what RFC 8259 says, in UTF-8 (a byte order
mark is passed over); NaN and Infinity, keys given twice, NUL characters and lone surrogates are refused, because
tokenizers, databases and other readers of the same body disagree about them. A parameter that this server does not know
is refused, as OpenAI does: what is asked for and not done must not be passed over in silence.
Not covered: what the fields mean (serving/chat_shapes.py and its neighbours).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import UserError
from retrieval.filters import Filter, parse_filter
from serving.api_errors import ApiError, invalid, without_values

_BAD_CHARACTERS = re.compile("[\\0\\ud800-\\udfff]")
OURS = "Value error, "
"""What pydantic puts before a validator's own words."""
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,40}")

Unsupported = Mapping[str, tuple[Any, ...]]
"""Parameters, each with the values of it that ask for nothing."""


class Body(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unsupported: ClassVar[Unsupported] = {}
    """OpenAI's parameters that would change the answer and that this server cannot honour, with the values that change
    nothing."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """OpenAI's parameters that change nothing about an answer here: accepted, whatever their value."""


Schema = TypeVar("Schema", bound=Body)


def read_body(raw: bytes, schema: type[Schema]) -> Schema:
    """A request body, checked.

    Raises:
        ApiError: 400, naming the field and what is wrong with it; never with the value, which is the user's text.
    """
    content = _parse(raw)
    for name in [name for name in content if name in schema.unsupported]:
        if not _is_one_of(content.pop(name), schema.unsupported[name]):
            raise invalid(name, "this server does not support it", "unsupported_parameter")
    for name in schema.harmless & content.keys():
        del content[name]
    unknown = [name for name in content if name not in schema.model_fields]
    if unknown:
        raise _unknown(unknown[0], schema)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise _first_problem(error, content) from None


def read_filter(value: Mapping[str, Any] | None, param: str = "filter") -> Filter | None:
    """A request's document filter.

    Raises:
        ApiError: 400, naming the place; without the value found there.
    """
    if value is None:
        return None
    try:
        return parse_filter(value, param)
    except UserError as error:
        raise ApiError(400, without_values(str(error)), code="invalid_value", param=param) from None


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if "\\u" in text:  # nothing else can bring in what is looked for
            _check_characters(content)
    except _BodyError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return content


class _BodyError(ValueError):
    """JSON that readers disagree about."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _BodyError("the body gives a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise _BodyError(f"the body holds {name}, which is not JSON")


def _check_characters(content: Any) -> None:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and (bad := _BAD_CHARACTERS.search(value)):
            what = "a NUL character" if bad[0] == "\0" else "half of a surrogate pair"
            raise _BodyError(f"the body holds {what}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether JSON `value` is one of `allowed`; True is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)


def _unknown(name: str, schema: type[Body]) -> ApiError:
    if not _PLAIN_NAME.fullmatch(name):
        return ApiError(400, "the body has a parameter that this server does not know", code="unknown_parameter")
    near = difflib.get_close_matches(name, schema.model_fields, n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ApiError(400, f"{name}: this server does not know it{hint}", code="unknown_parameter", param=name)


def _first_problem(error: ValidationError, content: Any) -> ApiError:
    """The problem that lies deepest: where a field may be several things, that is the one that it nearly was."""
    problems = error.errors(include_input=False, include_url=False)
    places = [_place(content, problem["loc"], problem["type"] == "missing") for problem in problems]
    deepest = max(places, key=len)
    there = [problem for problem, place in zip(problems, places, strict=True) if place == deepest]
    unknown = there[0]["type"] == "extra_forbidden"
    reason = (
        "this server does not know it" if unknown else _either([problem["msg"].removeprefix(OURS) for problem in there])
    )
    shown = [str(part) for part in deepest if isinstance(part, int) or _PLAIN_NAME.fullmatch(part)]
    return invalid(".".join(shown) or "the body", reason)


def _place(content: Any, location: tuple[int | str, ...], missing: bool) -> list[int | str]:
    """Where in `content` a problem is; pydantic's own names for the choices of a union are passed over."""
    place: list[int | str] = []
    for step, part in enumerate(location):
        if isinstance(content, dict) and (part in content or (missing and step == len(location) - 1)):
            place.append(part)
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int):
            place.append(part)
            content = content[part]
    return place


def _either(reasons: list[str]) -> str:
    start = "Input should be "
    if all(reason.startswith(start) for reason in reasons):
        return start + " or ".join(dict.fromkeys(reason.removeprefix(start) for reason in reasons))
    return reasons[0]
