import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ArtifactError, UserError
from retrieval.attributes import ARROW_FILE, JSON_FILE, Attributes, attribute_values, write_attributes
from retrieval.filters import parse_filter
from tests.retrieval.test_filters import scalars, written_filters


def _open(directory: Path, rows, **options) -> Attributes:
    write_attributes(directory, iter(rows))
    return Attributes.open(directory, **options)


def _brute(rows, wanted) -> list[int]:
    return [place for place, row in enumerate(rows) if wanted.matches(attribute_values(row))]


metadata = st.dictionaries(
    st.sampled_from(["a", "b", "c", "x y", "title"]),
    st.one_of(
        scalars,
        st.none(),
        st.lists(scalars, max_size=3),
        st.dictionaries(st.sampled_from(["d", "e"]), scalars, max_size=2),
    ),
    max_size=4,
)
documents = st.lists(st.tuples(metadata, st.integers(1, 3), st.booleans()), max_size=8)


@settings(max_examples=150, deadline=None)
@given(documents, st.lists(written_filters, min_size=1, max_size=4))
def test_rows_of_any_filter_are_those_of_a_scan(tmp_path_factory, described, filters):
    rows = [
        {"doc_id": f"d{place}", "uri": "", "title": "t", "metadata": json.dumps(content) if as_text else content}
        for place, (content, count, as_text) in enumerate(described)
        for _ in range(count)
    ]
    attributes = _open(tmp_path_factory.mktemp("attributes"), rows)
    for written in filters:
        try:
            wanted = parse_filter(written)
        except UserError:
            continue
        found = attributes.rows(wanted)
        assert found.dtype == np.int64
        assert found.tolist() == _brute(rows, wanted)


def test_neighbouring_rows_that_differ_in_type_only_are_kept_apart(tmp_path):
    rows = [{"doc_id": "d", "metadata": {"a": value}} for value in (1, True, 1.0, "1", 2**63, float(2**63))]
    attributes = _open(tmp_path, rows)
    assert attributes.rows(parse_filter({"a": 1})).tolist() == [0, 2]
    assert attributes.rows(parse_filter({"a": True})).tolist() == [1]
    assert attributes.rows(parse_filter({"a": "1"})).tolist() == [3]
    assert attributes.rows(parse_filter({"a": 2**63})).tolist() == [4, 5]


def test_whole_numbers_beyond_the_floats_are_told_apart(tmp_path):
    attributes = _open(tmp_path, [{"doc_id": "d", "metadata": {"a": 2**53 + more}} for more in range(3)])
    assert attributes.rows(parse_filter({"a": 2**53 + 1})).tolist() == [1]
    assert attributes.rows(parse_filter({"a": {"gt": float(2**53)}})).tolist() == [1, 2]


def test_document_cannot_pass_for_another_by_its_metadata(tmp_path):
    attributes = _open(tmp_path, [{"doc_id": "d1", "metadata": {}}, {"doc_id": "d2", "metadata": {"doc_id": "d1"}}])
    assert attributes.rows(parse_filter({"doc_id": "d1"})).tolist() == [0]


def test_text_with_a_lone_surrogate_is_kept_and_found(tmp_path):
    attributes = _open(tmp_path, [{"doc_id": "d", "metadata": '{"a": "\\ud800"}'}])
    assert attributes.rows(parse_filter({"a": "\ud800"})).tolist() == [0]


def test_no_rows_at_all_still_open(tmp_path):
    attributes = _open(tmp_path, [])
    assert attributes.rows(parse_filter({"not": {"a": 1}})).tolist() == []


def test_many_rows_flushed_in_parts_are_found_in_order(tmp_path):
    random.seed(5)
    tenants = [random.randrange(50) for _ in range(150_000)]
    attributes = _open(tmp_path, ({"doc_id": str(at), "metadata": {"tenant": t}} for at, t in enumerate(tenants)))
    expected = np.flatnonzero(np.array(tenants) == 7)
    assert np.array_equal(attributes.rows(parse_filter({"tenant": 7})), expected)
    began = time.perf_counter()
    for tenant in range(50):
        attributes.rows(parse_filter({"tenant": tenant, "doc_id": "5"}))
    assert (time.perf_counter() - began) / 50 < 0.02  # a scan of the metadata takes 100 ms


def test_answers_are_remembered_within_the_limit_and_cannot_be_written_to(tmp_path):
    rows = [{"doc_id": str(place), "metadata": {"tenant": place % 4}} for place in range(4000)]
    attributes = _open(tmp_path, rows, cache_bytes=20_000)
    first = attributes.rows(parse_filter({"tenant": 1}))
    assert attributes.rows(parse_filter({"tenant": 1})) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 3
    for tenant in range(4):
        attributes.rows(parse_filter({"tenant": tenant}))
    assert attributes._cached <= 20_000
    again = attributes.rows(parse_filter({"tenant": 1}))
    assert np.array_equal(again, first)


def test_threads_that_ask_at_once_get_the_same_rows(tmp_path):
    rows = [{"doc_id": str(place), "metadata": {"tenant": place % 7}} for place in range(3000)]
    attributes = _open(tmp_path, rows, cache_bytes=12_000)
    wrong = []

    def ask(seed: int) -> None:
        for turn in range(100):
            tenant = (seed + turn) % 7
            if not np.array_equal(attributes.rows(parse_filter({"tenant": tenant})), np.arange(tenant, 3000, 7)):
                wrong.append(tenant)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_too_many_keys_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.attributes.MAX_KEYS", 10)
    with pytest.raises(UserError, match="metadata keys"):
        write_attributes(tmp_path, [{"doc_id": "d", "metadata": {f"key {n}": 1 for n in range(20)}}])


def test_damaged_files_are_refused_and_never_crash(tmp_path):
    rows = [{"doc_id": f"d{at // 2}", "title": "t", "metadata": {"a": at, "b": [at / 2, "x"]}} for at in range(40)]
    write_attributes(tmp_path, rows)
    wanted = parse_filter({"or": [{"a": {"gte": 3}}, {"b": "x"}, {"doc_id": "d3"}]})
    content = (tmp_path / ARROW_FILE).read_bytes()
    generator = random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 6)):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (tmp_path / ARROW_FILE).write_bytes(
            damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])]
        )
        try:
            found = Attributes.open(tmp_path).rows(wanted)
            assert not len(found) or (found[0] >= 0 and found[-1] < 40)
        except ArtifactError:
            refused += 1
    assert refused > 50
    (tmp_path / ARROW_FILE).write_bytes(content)
    (tmp_path / JSON_FILE).write_text('{"rows": 3, "slices": []}')
    with pytest.raises(ArtifactError, match="rebuild"):
        Attributes.open(tmp_path)
