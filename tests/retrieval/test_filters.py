import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.attributes import attribute_values
from retrieval.filters import EVERYTHING, MAX_CONDITIONS, NOTHING, Exists, Not, OneOf, Range, parse_filter

DOCUMENT = {
    "doc_id": "d1",
    "uri": "https://example.org/d1",
    "title": "Ghana",
    "metadata": {
        "tenant": "acme",
        "year": 2020,
        "share": 0.5,
        "published": "2020-03-01",
        "public": True,
        "tags": ["trade", 7],
        "source": {"site": "archive", "rank": 1},
        "nothing": None,
        "empty": [],
        "title": "not the title",
    },
}


@pytest.mark.parametrize(
    ("written", "matches"),
    [
        ({}, True),
        ({"tenant": "acme"}, True),
        ({"tenant": "Acme"}, False),
        ({"year": 2020.0}, True),
        ({"year": "2020"}, False),
        ({"public": True}, True),
        ({"public": 1}, False),
        ({"source.rank": True}, False),
        ({"tags": "trade"}, True),
        ({"tags": {"in": ["roses", 7]}}, True),
        ({"tags": {"in": []}}, False),
        ({"source.site": "archive"}, True),
        ({"source": "archive"}, False),
        ({"year": {"gte": 2020, "lt": 2021}}, True),
        ({"year": {"gt": 2020}}, False),
        ({"share": {"lte": 1}}, True),
        ({"published": {"gte": "2020-01-01", "lt": "2020-03-01"}}, False),
        ({"published": {"gte": "2020-01-01", "lte": "2020-03-01"}}, True),
        ({"year": {"gt": "2019"}}, False),
        ({"tenant": {"ne": "acme"}}, False),
        ({"tags": {"ne": "trade"}}, False),
        ({"unknown": {"ne": "x"}}, True),
        ({"unknown": "x"}, False),
        ({"nothing": {"exists": True}}, False),
        ({"empty": {"exists": False}}, True),
        ({"source.rank": {"exists": True}}, True),
        ({"title": "Ghana"}, True),
        ({"title": "not the title"}, False),
        ({"metadata.title": "not the title"}, True),
        ({"doc_id": {"in": ["d1", "d2"]}}, True),
        ({"tenant": "acme", "year": 1999}, False),
        ({"and": [{"tenant": "acme"}, {"not": {"year": 1999}}]}, True),
        ({"or": [{"year": 1999}, {"tags": 7}]}, True),
        ({"or": []}, False),
        ({"and": []}, True),
        ({"not": {"tenant": "acme", "year": 1999}}, True),
    ],
)
def test_filter_over_a_document_matches_as_written(written, matches):
    assert parse_filter(written).matches(attribute_values(DOCUMENT)) is matches


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"and": [{"b": {"in": [2]}}, {"a": 1}]}),
        ({"a": {"in": ["y", "x", "y"]}}, {"a": {"in": ["x", "y"]}}),
        ({"a": {"ne": 1}}, {"not": {"a": 1}}),
        ({"not": {"not": {"a": 1}}}, {"a": 1}),
        ({"or": [{"a": 1}, {"or": [{"b": 1}]}]}, {"or": [{"b": 1}, {"a": 1}]}),
        ({"a": {"in": [True, 1]}}, {"or": [{"a": 1}, {"a": True}]}),
    ],
)
def test_filters_that_say_the_same_are_equal_and_hash_alike(one, other):
    assert parse_filter(one) == parse_filter(other)
    assert len({parse_filter(one), parse_filter(other)}) == 1


def test_filter_on_true_is_not_the_filter_on_one():
    assert parse_filter({"a": True}) != parse_filter({"a": 1})


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ([1], ["search.filter:", "object", "list"]),
        ({"year": {"gte": 2020, "below": 3}}, ["year", "'below'"]),
        ({"year": {"$gte": 2020}}, ["year", "did you mean gte?"]),
        ({"a": {"in": "x"}}, ["a.in", "list"]),
        ({"a": ["x"]}, ["at a", '{"in"']),
        ({"any": [{"a": 1}, {"b": 2}]}, ["at any", '{"or": […]}']),
        ({"a": {"eq": 1}}, ["at a", "'eq': operators are in, ne"]),
        ({"a": {"any": [1]}}, ["at a", "'any': operators are in, ne"]),
        ({"a": None}, ["at a", "exists"]),
        ({"a": float("nan")}, ["at a", "nan"]),
        ({"a": 10**5000}, ["at a", "too large"]),
        ({"a": {}}, ["at a", "operator"]),
        ({"a": {"exists": 1}}, ["a.exists", "true or false"]),
        ({"a": {"gt": 1, "gte": 2}}, ["at a", "both gt and gte"]),
        ({"a": {"gt": 1, "lt": "z"}}, ["at a", "range"]),
        ({"a": {"gt": True}}, ["at a", "range"]),
        ({"and": {"a": 1}}, ["at and", "list of filters"]),
        ({"or": [{"a": 1}, {"not": 7}]}, ["or[1].not", "object"]),
        ({"": 1}, ["key"]),
        ({"a\nb": {"gte": None}}, ["a?b.gte"]),
        ({"a": "x" * 5000}, ["at a", "4096"]),
        ({"a": {"in": list(range(10_001))}}, ["10000 values"]),
        ({"or": [{"a": 1}] * (MAX_CONDITIONS + 1)}, [f"{MAX_CONDITIONS} conditions"]),
    ],
)
def test_malformed_filter_gives_one_line_that_names_the_place(written, names):
    with pytest.raises(UserError) as refused:
        parse_filter(written, key="search.filter")
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300
    for name in names:
        assert name in message


def test_filter_nested_too_deep_is_refused_however_deep():
    written: dict[str, object] = {"a": 1}
    for _ in range(900):
        written = {"not": written}
    with pytest.raises(UserError, match="deep"):
        parse_filter(written)


def test_bound_key_leaves_the_rest_of_the_filter():
    written = {"or": [{"collection": "news", "year": 2020}, {"collection": "laws"}]}
    bound = parse_filter(written)
    assert bound.bind("collection", [("text", "news")]) == parse_filter({"year": 2020})
    assert bound.bind("collection", [("text", "laws")]) == EVERYTHING
    assert bound.bind("collection", [("text", "mail")]) == NOTHING
    assert parse_filter({"not": {"collection": "news"}}).bind("collection", [("text", "news")]) == NOTHING


scalars = st.one_of(
    st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4)
)
numbers = st.one_of(st.integers(-5, 5), st.floats(-5, 5))
keys = st.sampled_from(["a", "b", "c.d", "title", "x y"])
bounds = st.one_of(
    st.fixed_dictionaries({}, optional={"gt": numbers, "lte": numbers}),
    st.fixed_dictionaries({}, optional={"gte": st.text(max_size=3), "lt": st.text(max_size=3)}),
).filter(bool)
leaves = st.one_of(
    st.dictionaries(keys, scalars, min_size=1, max_size=2),
    st.dictionaries(keys, bounds, min_size=1, max_size=1),
    st.dictionaries(keys, st.fixed_dictionaries({"in": st.lists(scalars, max_size=3)}), min_size=1, max_size=1),
    st.dictionaries(keys, st.fixed_dictionaries({"exists": st.booleans()}), min_size=1, max_size=1),
)
written_filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"and": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"or": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=6,
)


@given(written_filters)
def test_filter_written_as_json_reads_back_as_itself(written):
    try:
        wanted = parse_filter(written)
    except UserError as error:
        assert "deep" in str(error)
        return
    assert parse_filter(json.loads(json.dumps(wanted.to_json()))) == wanted


@given(st.dictionaries(keys, scalars), written_filters)
def test_a_filter_and_its_negation_share_no_document(metadata, written):
    values = attribute_values({"doc_id": "d", "metadata": metadata})
    try:
        wanted, opposite = parse_filter(written), parse_filter({"not": written})
    except UserError:
        return
    assert wanted.matches(values) is not opposite.matches(values)


def test_parsed_parts_have_their_types():
    assert parse_filter({"a": 1}) == OneOf("a", "number", (1,))
    assert parse_filter({"a": {"gt": "x"}}) == Range("a", "text", "x", True, None, False)
    assert parse_filter({"a": {"exists": False}}) == Not(Exists("a"))
