from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import Record

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@dataclass(frozen=True)
class Inner(Record):
    name: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer(Record):
    key: str
    count: int
    good: bool
    one: Inner
    maybe: Inner | None = None
    start: int | None = None
    names: tuple[str, ...] = ()
    inners: tuple[Inner, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


floats = st.floats(allow_nan=False)
inners = st.builds(Inner, texts, floats, st.dictionaries(texts, json_values, max_size=3))
int64 = st.integers(-(2**63), 2**63 - 1)
outers = st.builds(
    Outer,
    texts,
    int64,
    st.booleans(),
    inners,
    st.none() | inners,
    st.none() | int64,
    st.lists(texts, max_size=3).map(tuple),
    st.lists(inners, max_size=3).map(tuple),
    st.dictionaries(texts, json_values, max_size=3),
)


@given(st.lists(outers, max_size=4))
def test_records_survive_arrow(records):
    table = pa.Table.from_pylist([record.to_row() for record in records], schema=Outer.schema())
    assert [Outer.from_row(row) for row in table.to_pylist()] == records


def test_the_schema_has_the_fields_names_and_ignores_foreign_columns():
    assert Outer.schema().names == [
        *("key", "count", "good", "one", "maybe", "start", "names", "inners", "metadata"),
    ]
    row = Inner("a", 1.0, {"b": [1]}).to_row()
    assert Inner.from_row({**row, "later": 3}) == Inner("a", 1.0, {"b": [1]})
    assert Inner.schema().field("metadata").type == pa.string()
