"""Metadata filters: what a caller may ask of the documents that a search looks through.

In: JSON (`{"tenant": "acme", "year": {"gte": 2020}}`). Out: a small immutable tree, hashable, so that the rows that it
allows can be remembered. Fields are metadata keys (dots reach into nested objects), and `doc_id`, `uri`, `title` and
`collection`. A list matches when any of its elements does. Types do not mix: "2020" is not 2020, and true is not 1.
Not covered: which rows a filter allows (`attributes.py`). Imports no torch, ray or faiss.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError

Scalar = str | bool | int | float

COMPARISONS = ("gt", "gte", "lt", "lte")
OPERATORS = ("eq", "ne", "in", *COMPARISONS, "exists")
CONNECTIVES = ("and", "or", "not")
MOST_DEPTH = 16
MOST_NODES = 2000
LARGEST_EXACT_INTEGER = 2**53


@dataclass(frozen=True)
class In:
    """Holds where the field has one of `values`; `=` is the case of one."""

    field: str
    values: tuple[Scalar, ...]

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        return {self.field: self.values[0] if len(self.values) == 1 else {"in": list(self.values)}}


@dataclass(frozen=True)
class Range:
    """Holds where the field has a value between the bounds; numbers, or strings in code point order (ISO dates)."""

    field: str
    low: str | float | None
    low_included: bool
    high: str | float | None
    high_included: bool

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        bounds: dict[str, Any] = {}
        if self.low is not None:
            bounds["gte" if self.low_included else "gt"] = self.low
        if self.high is not None:
            bounds["lte" if self.high_included else "lt"] = self.high
        return {self.field: bounds}


@dataclass(frozen=True)
class Exists:
    """Holds where the field has any value; null is none."""

    field: str

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        return {self.field: {"exists": True}}


@dataclass(frozen=True)
class And:
    """Holds where all parts hold; without parts everywhere."""

    parts: tuple[Filter, ...]

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        return {"and": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Or:
    """Holds where some part holds; without parts nowhere."""

    parts: tuple[Filter, ...]

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        return {"or": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Not:
    """Holds where the part does not."""

    part: Filter

    def to_json(self) -> dict[str, Any]:
        """As `parse_filter` reads it."""
        return {"not": self.part.to_json()}


Filter = In | Range | Exists | And | Or | Not


def parse_filter(value: Any, key: str = "filter") -> Filter:
    """The filter that `value`, decoded JSON or its text, describes. Several keys of one object are joined by `and`.

    `{"tenant": "acme"}`, `{"lang": {"in": ["en", "zh"]}}`, `{"year": {"gte": 2020, "lt": 2024}}`,
    `{"draft": {"ne": true}}`, `{"tag": {"exists": false}}`, `{"and": […]}`, `{"or": […]}`, `{"not": {…}}`.

    Raises:
        UserError: in one line that begins with `key`, for anything else, a NaN, or a filter deeper than 16 or of more
            than 2,000 parts.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                f'{key} is not JSON ({error.msg} at column {error.colno}): write it as {{"field": "value"}}'
            ) from error
    return _Parser(key).parse(value, key, 1)


def map_fields(given: Filter, decide: Callable[[In | Range | Exists], Filter]) -> Filter:
    """The same tree with every leaf replaced by what `decide` makes of it."""
    if isinstance(given, And):
        return And(tuple(map_fields(part, decide) for part in given.parts))
    if isinstance(given, Or):
        return Or(tuple(map_fields(part, decide) for part in given.parts))
    if isinstance(given, Not):
        return Not(map_fields(given.part, decide))
    return decide(given)


class _Parser:
    def __init__(self, key: str) -> None:
        self._key = key
        self._nodes = 0

    def parse(self, value: Any, where: str, depth: int) -> Filter:
        if depth > MOST_DEPTH:
            raise UserError(f"{self._key} is nested deeper than {MOST_DEPTH} levels: make it flatter")
        if not isinstance(value, Mapping):
            raise UserError(f'{where} must be an object such as {{"field": "value"}}, got {_shown(value)}')
        if not value:
            raise UserError(f"{where} is an empty object: leave the filter out to search everything")
        parts = [self._entry(str(name), inner, f"{where}.{name}", depth) for name, inner in value.items()]
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _entry(self, name: str, value: Any, where: str, depth: int) -> Filter:
        self._count(1)
        if name in ("and", "or"):
            if not isinstance(value, list) or not value:
                raise UserError(f"{where} must be a list of at least one filter, got {_shown(value)}")
            parts = tuple(self.parse(part, f"{where}[{place}]", depth + 1) for place, part in enumerate(value))
            return And(parts) if name == "and" else Or(parts)
        if name == "not":
            return Not(self.parse(value, where, depth + 1))
        if isinstance(value, Mapping):
            return self._operators(name, value, where)
        if isinstance(value, list):
            raise UserError(f'{where} is a list: write {{"in": [{"…"}]}} to match any of its values')
        return In(name, (self._scalar(value, where),))

    def _operators(self, field: str, value: Mapping[Any, Any], where: str) -> Filter:
        unknown = [str(name) for name in value if name not in OPERATORS]
        if unknown or not value:
            name = unknown[0] if unknown else ""
            near = difflib.get_close_matches(name, [*OPERATORS, *CONNECTIVES], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where}: unknown operator {name!r}{hint}; there are {', '.join(OPERATORS)}")
        parts: list[Filter] = []
        for name, inner in value.items():
            place = f"{where}.{name}"
            self._count(1)
            if name == "eq":
                parts.append(In(field, (self._scalar(inner, place),)))
            elif name == "ne":
                parts.append(Not(In(field, (self._scalar(inner, place),))))
            elif name == "in":
                parts.append(self._in(field, inner, place))
            elif name == "exists":
                if not isinstance(inner, bool):
                    raise UserError(f"{place} must be true or false, got {_shown(inner)}")
                parts.append(Exists(field) if inner else Not(Exists(field)))
        if any(name in value for name in COMPARISONS):
            parts.append(self._range(field, value, where))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _in(self, field: str, values: Any, where: str) -> Filter:
        if not isinstance(values, list):
            raise UserError(f"{where} must be a list of values, got {_shown(values)}")
        self._count(len(values))
        found = [self._scalar(value, f"{where}[{place}]") for place, value in enumerate(values)]
        return In(field, tuple(dict.fromkeys(found))) if found else Or(())

    def _range(self, field: str, value: Mapping[Any, Any], where: str) -> Filter:
        bounds: dict[str, str | float] = {}
        for name in COMPARISONS:
            if name in value:
                bound = self._scalar(value[name], f"{where}.{name}")
                if isinstance(bound, bool):
                    raise UserError(f"{where}.{name} must be a number or a string, got {_shown(bound)}")
                bounds[name] = bound
        for one, other in (("gt", "gte"), ("lt", "lte")):
            if one in bounds and other in bounds:
                raise UserError(f"{where} has both {one} and {other}: keep one")
        if len({isinstance(bound, str) for bound in bounds.values()}) > 1:
            raise UserError(f"{where} compares with a number and with a string: use one type")
        low, high = bounds.get("gt", bounds.get("gte")), bounds.get("lt", bounds.get("lte"))
        return Range(field, low, "gte" in bounds, high, "lte" in bounds)

    def _scalar(self, value: Any, where: str) -> Scalar:
        if isinstance(value, str | bool):
            return value
        if isinstance(value, int) and abs(value) > LARGEST_EXACT_INTEGER:
            raise UserError(f"{where} is beyond 2^53, where numbers are not exact: keep such ids as strings")
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        raise UserError(f"{where} must be a string, a number, true or false, got {_shown(value)}")

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise UserError(f"{self._key} has more than {MOST_NODES} parts: make it smaller")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
