"""Typed records and the Arrow schemas that follow from them.

In: a frozen dataclass deriving from `Record`. Out: rows (plain dicts as Arrow and Ray Data hold them) and back.
`dict` fields travel as one JSON string column, so that free-form metadata never changes a file's schema.
Imports no torch, ray or faiss; pyarrow is imported only when a schema is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of all records: conversion to and from rows, and the Arrow schema."""

    def to_row(self) -> dict[str, Any]:
        """The record as plain values; nested records become dicts, `dict` fields become JSON text."""
        return {name: _to_plain(getattr(self, name), hint) for name, hint in _hints(type(self)).items()}

    @classmethod
    def from_row(cls, row: typing.Mapping[str, Any]) -> Self:
        """The inverse of `to_row`; columns that the record does not have are ignored."""
        return cls(**{name: read(row[name]) for name, read in _readers(cls) if name in row})

    @classmethod
    def schema(cls) -> pa.Schema:
        """The Arrow schema with the same field names."""
        import pyarrow as pa

        return pa.schema([(name, _arrow_type(hint)) for name, hint in _hints(cls).items()])


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _HINTS[cls]


def _strip_optional(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        assert len(inner) == 1, f"records allow only X | None unions, not {hint}"
        return inner[0]
    return hint


def _is_json(hint: Any) -> bool:
    return hint is dict or typing.get_origin(hint) is dict


def _to_plain(value: Any, hint: Any) -> Any:
    hint = _strip_optional(hint)
    if value is None:
        return None
    if _is_json(hint):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    if isinstance(value, Record):
        return value.to_row()
    if typing.get_origin(hint) in (tuple, list):
        inner = typing.get_args(hint)[0]
        return [_to_plain(item, inner) for item in value]
    return value


_READERS: dict[type, tuple[tuple[str, Callable[[Any], Any]], ...]] = {}


def _readers(cls: type) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """Each field with the function that reads it: decided once, because a search reads tens of thousands of rows."""
    if cls not in _READERS:
        _READERS[cls] = tuple((name, _reader(hint)) for name, hint in _hints(cls).items())
    return _READERS[cls]


def _reader(hint: Any) -> Callable[[Any], Any]:
    """The function that turns a plain value into one of the hinted type; None stays None."""
    hint = _strip_optional(hint)
    if _is_json(hint):
        return lambda value: None if value is None else json.loads(value) if isinstance(value, str) else dict(value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return lambda value: None if value is None else hint.from_row(value)
    if typing.get_origin(hint) in (tuple, list):
        inner, collect = _reader(typing.get_args(hint)[0]), typing.get_origin(hint)
        return lambda value: None if value is None else collect(map(inner, value))
    if hint in (int, float, bool, str):
        return lambda value: None if value is None else hint(value)
    return lambda value: value


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa

    hint = _strip_optional(hint)
    if _is_json(hint):
        return pa.string()
    if isinstance(hint, type) and issubclass(hint, Record):
        return pa.struct([(name, _arrow_type(inner)) for name, inner in _hints(hint).items()])
    if typing.get_origin(hint) in (tuple, list):
        return pa.list_(_arrow_type(typing.get_args(hint)[0]))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]
