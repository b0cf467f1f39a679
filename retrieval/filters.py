"""Filters: which documents a search may return.

In: JSON as a caller writes it. Out: a canonical tree of `OneOf`, `Range`, `Exists`, `All`, `AnyOf` and `Not`, hashable,
that says of a document's values whether they match. Imports no torch, ray or faiss.
    {"tenant": "acme"}                     a value; of a list, any element
    {"lang": {"in": ["en", "zh"]}}         one of several
    {"year": {"gte": 2020, "lt": 2024}}    a range of numbers, or of text by code point (ISO dates)
    {"lang": {"ne": "en"}}, {"lang": {"exists": true}}
    {"and": […]}, {"or": […]}, {"not": {…}}; several keys in one object must all match
Types do not mix: "2020" is not 2020, and true is not 1. A key that no document has matches nothing.
Not covered: finding the rows that match (`attributes.py`).
"""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import UserError

Scalar = str | int | float
"""A value as it is compared; a bool is kept as 0 or 1 beside the kind `bool`."""
Kind = Literal["text", "number", "bool"]
TypedScalar = tuple[Kind, Scalar]
Values = Mapping[str, Sequence[TypedScalar]]
"""A document's values by key."""

MAX_DEPTH = 8
MAX_CONDITIONS = 256
MAX_VALUES = 10_000
MAX_TEXT = 4096
"""Characters of a key or a value. Filters come from HTTP callers."""
INT64 = range(-(2**63), 2**63)
COMPARISONS = ("gt", "gte", "lt", "lte")
OPERATORS = ("in", "ne", "exists", *COMPARISONS)
COMBINATIONS = ("and", "or", "not")


def typed(value: Any) -> TypedScalar | None:
    """`value` with its kind, or none when it is no text, finite number or bool.

    A whole number beyond 64 bits is compared as the nearest float.
    """
    if isinstance(value, bool):
        return "bool", int(value)
    if isinstance(value, str):
        return "text", value
    if isinstance(value, int) and value not in INT64:
        try:
            value = float(value)
        except OverflowError:
            return None
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "number", value
    return None


class Filter(ABC):
    """A condition on a document's values. Two filters that are written differently but canonically equal are equal."""

    def matches(self, values: Values) -> bool:
        """Whether a document with these values may be returned."""
        return self._matches(values)

    def to_json(self) -> dict[str, Any]:
        """The filter as `parse_filter` reads it."""
        return self._to_json()

    def bind(self, key: str, values: Sequence[TypedScalar]) -> Filter:
        """The filter that is left when `key` is known to have `values`."""
        return self._bind(key, values)

    @abstractmethod
    def _matches(self, values: Values) -> bool: ...

    @abstractmethod
    def _to_json(self) -> dict[str, Any]: ...

    @abstractmethod
    def _bind(self, key: str, values: Sequence[TypedScalar]) -> Filter: ...


@dataclass(frozen=True)
class _Condition(Filter):
    """A condition on one key."""

    key: str

    def _bind(self, key: str, values: Sequence[TypedScalar]) -> Filter:
        if key != self.key:
            return self
        return EVERYTHING if self.matches({key: values}) else NOTHING


@dataclass(frozen=True)
class OneOf(_Condition):
    """Any value of the key, of this kind, is one of `values`, sorted and distinct."""

    kind: Kind
    values: tuple[Scalar, ...]

    def _matches(self, values: Values) -> bool:
        return any(kind == self.kind and value in self.values for kind, value in values.get(self.key, ()))

    def _to_json(self) -> dict[str, Any]:
        shown = [_plain(self.kind, value) for value in self.values]
        return {self.key: shown[0] if len(shown) == 1 else {"in": shown}}


@dataclass(frozen=True)
class Range(_Condition):
    """Any value of the key, of this kind, lies between the bounds; none is no bound."""

    kind: Kind
    low: Scalar | None
    low_open: bool
    """The lower bound itself does not match."""
    high: Scalar | None
    high_open: bool

    def _matches(self, values: Values) -> bool:
        return any(kind == self.kind and self._holds(value) for kind, value in values.get(self.key, ()))

    def _holds(self, value: Any) -> bool:
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        return bool(above and (self.high is None or (value < self.high if self.high_open else value <= self.high)))

    def _to_json(self) -> dict[str, Any]:
        bounds = {}
        if self.low is not None:
            bounds["gt" if self.low_open else "gte"] = self.low
        if self.high is not None:
            bounds["lt" if self.high_open else "lte"] = self.high
        return {self.key: bounds}


@dataclass(frozen=True)
class Exists(_Condition):
    """The key has a value; null and an empty list are none."""

    def _matches(self, values: Values) -> bool:
        return bool(values.get(self.key))

    def _to_json(self) -> dict[str, Any]:
        return {self.key: {"exists": True}}


@dataclass(frozen=True)
class All(Filter):
    """Every part matches; without parts, everything does."""

    parts: tuple[Filter, ...]

    def _matches(self, values: Values) -> bool:
        return all(part.matches(values) for part in self.parts)

    def _to_json(self) -> dict[str, Any]:
        return {"and": [part.to_json() for part in self.parts]}

    def _bind(self, key: str, values: Sequence[TypedScalar]) -> Filter:
        return all_of(part.bind(key, values) for part in self.parts)


@dataclass(frozen=True)
class AnyOf(Filter):
    """At least one part matches; without parts, nothing does."""

    parts: tuple[Filter, ...]

    def _matches(self, values: Values) -> bool:
        return any(part.matches(values) for part in self.parts)

    def _to_json(self) -> dict[str, Any]:
        return {"or": [part.to_json() for part in self.parts]}

    def _bind(self, key: str, values: Sequence[TypedScalar]) -> Filter:
        return any_of(part.bind(key, values) for part in self.parts)


@dataclass(frozen=True)
class Not(Filter):
    """The part does not match."""

    part: Filter

    def _matches(self, values: Values) -> bool:
        return not self.part.matches(values)

    def _to_json(self) -> dict[str, Any]:
        return {"not": self.part.to_json()}

    def _bind(self, key: str, values: Sequence[TypedScalar]) -> Filter:
        return none_of(self.part.bind(key, values))


EVERYTHING: Filter = All(())
NOTHING: Filter = AnyOf(())


def all_of(parts: Iterable[Filter]) -> Filter:
    """The canonical `All`: flat, sorted, distinct."""
    found = _distinct(part for outer in parts for part in (outer.parts if isinstance(outer, All) else (outer,)))
    if NOTHING in found:
        return NOTHING
    return found[0] if len(found) == 1 else All(tuple(found))


def any_of(parts: Iterable[Filter]) -> Filter:
    """The canonical `AnyOf`: flat, sorted, distinct."""
    found = _distinct(part for outer in parts for part in (outer.parts if isinstance(outer, AnyOf) else (outer,)))
    if EVERYTHING in found:
        return EVERYTHING
    return found[0] if len(found) == 1 else AnyOf(tuple(found))


def none_of(part: Filter) -> Filter:
    """The canonical `Not`."""
    if part == EVERYTHING:
        return NOTHING
    if part == NOTHING:
        return EVERYTHING
    return part.part if isinstance(part, Not) else Not(part)


def _distinct(parts: Iterable[Filter]) -> list[Filter]:
    return sorted(dict.fromkeys(parts), key=lambda part: json.dumps(part.to_json(), sort_keys=True))


def one_of(key: str, values: Iterable[TypedScalar]) -> Filter:
    """The canonical filter for "`key` has one of `values`", which may be of several kinds."""
    by_kind: dict[Kind, set[Scalar]] = {}
    for kind, value in values:
        by_kind.setdefault(kind, set()).add(value)
    return any_of(OneOf(key, kind, tuple(sorted(found))) for kind, found in by_kind.items())


def _plain(kind: Kind, value: Scalar) -> Any:
    return bool(value) if kind == "bool" else value


def conditions_of(wanted: Filter) -> Iterator[OneOf | Range | Exists]:
    """The conditions on single keys that a filter is made of, in its order."""
    if isinstance(wanted, All | AnyOf):
        for part in wanted.parts:
            yield from conditions_of(part)
    elif isinstance(wanted, Not):
        yield from conditions_of(wanted.part)
    else:
        assert isinstance(wanted, OneOf | Range | Exists), f"unknown filter {type(wanted).__name__}"
        yield wanted


def parse_filter(value: Any, key: str = "filter") -> Filter:
    """The canonical filter that `value`, decoded JSON, says.

    Args:
        value: As in the module's examples.
        key: Where it comes from, to name in the error.

    Raises:
        UserError: not a filter, or beyond the limits; names the place inside it.
    """
    return _Parser(key).parse(value)


class _Parser:
    """Counts conditions and values, so that no caller can send a filter that costs more than a search."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._conditions = 0
        self._values = 0

    def parse(self, value: Any, place: str = "", depth: int = 1) -> Filter:
        if not isinstance(value, Mapping):
            raise self._error(place, f'expected an object such as {{"lang": "en"}}, got {_shown(value)}')
        if depth > MAX_DEPTH:
            raise self._error("", f"nested more than {MAX_DEPTH} deep")
        parts: list[Filter] = []
        for name, wanted in value.items():
            if not isinstance(name, str) or not name or len(name) > MAX_TEXT:
                raise self._error(place, f"a key must be text of 1 to {MAX_TEXT} characters, got {_shown(name)}")
            inner = f"{place}.{name}" if place else name
            if name in COMBINATIONS:
                parts.append(self._combination(name, wanted, inner, depth))
            else:
                parts.extend(self._conditions_on(name, wanted, inner))
        return all_of(parts)

    def _combination(self, name: str, wanted: Any, place: str, depth: int) -> Filter:
        if name == "not":
            return none_of(self.parse(wanted, place, depth + 1))
        if not isinstance(wanted, list | tuple):
            raise self._error(place, f"expected a list of filters, got {_shown(wanted)}")
        self._count_conditions(len(wanted))
        combine: Callable[[Iterable[Filter]], Filter] = all_of if name == "and" else any_of
        return combine([self.parse(part, f"{place}[{at}]", depth + 1) for at, part in enumerate(wanted)])

    def _conditions_on(self, key: str, wanted: Any, place: str) -> list[Filter]:
        if not isinstance(wanted, Mapping):
            self._count_conditions(1)
            return [one_of(key, [self._value(wanted, place)])]
        if not wanted:
            raise self._error(place, f"names no operator: use one of {', '.join(OPERATORS)}")
        self._count_conditions(len(wanted))
        parts = []
        for operator, value in wanted.items():
            if operator not in OPERATORS:
                raise self._error(place, _unknown_operator(operator))
            at = f"{place}.{operator}"
            if operator == "in":
                if not isinstance(value, list | tuple):
                    raise self._error(at, f"expected a list of values, got {_shown(value)}")
                parts.append(one_of(key, [self._value(each, at) for each in value]))
            elif operator == "ne":
                parts.append(none_of(one_of(key, [self._value(value, at)])))
            elif operator == "exists":
                if not isinstance(value, bool):
                    raise self._error(at, f"expected true or false, got {_shown(value)}")
                parts.append(Exists(key) if value else none_of(Exists(key)))
        bounds = {operator: wanted[operator] for operator in COMPARISONS if operator in wanted}
        return [*parts, self._range(key, bounds, place)] if bounds else parts

    def _range(self, key: str, bounds: dict[str, Any], place: str) -> Filter:
        for one, other in (("gt", "gte"), ("lt", "lte")):
            if one in bounds and other in bounds:
                raise self._error(place, f"has both {one} and {other}: keep one")
        found = {operator: self._value(value, f"{place}.{operator}") for operator, value in bounds.items()}
        kinds = {kind for kind, _ in found.values()}
        if kinds not in ({"number"}, {"text"}):
            raise self._error(place, "a range needs numbers, or text such as dates, not both and not true or false")
        low, high = found.get("gt") or found.get("gte"), found.get("lt") or found.get("lte")
        return Range(key, kinds.pop(), low and low[1], "gt" in found, high and high[1], "lt" in found)

    def _value(self, value: Any, place: str) -> TypedScalar:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error("", f"names more than {MAX_VALUES} values")
        if value is None:
            raise self._error(place, 'null is not a value: use {"exists": false}')
        found = typed(value)
        if found is None:
            raise self._error(place, f"expected text, a number, true or false, got {_shown(value)}{_list_hint(value)}")
        if isinstance(found[1], str) and len(found[1]) > MAX_TEXT:
            raise self._error(place, f"a value has at most {MAX_TEXT} characters")
        return found

    def _count_conditions(self, more: int) -> None:
        self._conditions += more
        if self._conditions > MAX_CONDITIONS:
            raise self._error("", f"has more than {MAX_CONDITIONS} conditions")

    def _error(self, place: str, reason: str) -> UserError:
        return UserError(f"{self._key}{' at ' + _one_line(place) if place else ''}: {reason}")


def _list_hint(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return ""
    if any(isinstance(each, Mapping) for each in value):
        return ': filters are joined by {"and": […]} or {"or": […]}'
    return ': use {"in": […]} for one of several'


def _unknown_operator(operator: Any) -> str:
    # Not below 0.6: `eq`, `any` and `and` are nearest to `ne`, which would say the opposite.
    near = difflib.get_close_matches(operator, OPERATORS, n=1, cutoff=0.6) if isinstance(operator, str) else []
    hint = f", did you mean {near[0]}?" if near else ":"
    return f"unknown operator {_shown(operator)}{hint} operators are {', '.join(OPERATORS)}"


def _one_line(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= 120 else shown[:119] + "…"


def _shown(value: Any) -> str:
    """A short name of what was found; a filter may hold personal data, so long values are not repeated."""
    if isinstance(value, str):
        return repr(_one_line(value[:40]))
    if isinstance(value, int) and value not in INT64:
        return "a number that is too large"
    return "null" if value is None else repr(value) if isinstance(value, int | float) else type(value).__name__
