from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.store import Store
from retrieval.config import IndexConfig
from retrieval.index import build_index
from retrieval.records import Golden
from retrieval.retriever import Retriever
from tests.retrieval.tiny import COUNTRIES, country_text, tiny_recipe


@pytest.fixture(scope="module")
def retriever(corpus_path, encoder_path, tmp_path_factory) -> Retriever:
    """Several shards, so that rows of a document must be found among them."""
    folder = tmp_path_factory.mktemp("by-document")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(folder / "cache"))
        recipe = tiny_recipe(folder, corpus_path, encoder_path, index=IndexConfig(shard_chunks=20))
        return Retriever.open(build_index(recipe, Store(recipe.store.uri)), recipe.encoder)


def test_by_document_is_what_a_dict_of_all_chunks_would_be(retriever):
    expected = defaultdict(list)
    for chunk in retriever.chunks():
        expected[chunk.doc_id].append(chunk)
    found = retriever.by_document()
    assert len(retriever._members[0].searcher.table.shards) > 1
    assert list(found) == list(expected) == [name.lower() for name in COUNTRIES]
    for doc_id, chunks in expected.items():
        assert len(found[doc_id]) == len(chunks)
        assert [found[doc_id][place] for place in range(len(chunks))] == chunks  # one by one
        assert list(found[doc_id]) == chunks
        assert found[doc_id][-1] == chunks[-1]
        assert list(found[doc_id][1:3]) == chunks[1:3]
    assert found.get("nowhere") is None
    with pytest.raises(KeyError):
        found["nowhere"]


def test_doc_ids_without_some_keep_their_order(retriever):
    ids = retriever.by_document().doc_ids
    assert list(ids.without({"chile", "nowhere"})) == [name.lower() for name in COUNTRIES if name != "Chile"]
    assert ids[-1] == "hungary"
    assert list(ids[2:4]) == ["chile", "denmark"]
    assert len(ids.without(set(ids))) == 0


@given(place=st.integers(0, len(COUNTRIES) - 1), data=st.data())
def test_places_are_the_chunks_that_a_golden_place_matches(retriever, place, data):
    length = len(country_text(place))
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    doc_id = COUNTRIES[place].lower()
    chunks = list(retriever.chunks())
    first = next(number for number, chunk in enumerate(chunks) if chunk.doc_id == doc_id)
    for golden in (Golden(doc_id, start, end), Golden(doc_id)):
        places = retriever.by_document().places(golden)
        assert places.chunks == [number for number, chunk in enumerate(chunks) if golden.matches(chunk)]
        assert places.document == first
    assert retriever.by_document().places(Golden("nowhere", start, end)) == (None, [])


def test_rows_of_a_deleted_document_are_none(retriever):
    searcher = retriever._members[0].searcher
    shard = searcher._shards[0]
    gone = np.ones(shard.reader.rows, dtype=bool)
    object.__setattr__(shard, "deleted", gone)
    try:
        first = COUNTRIES[0].lower()
        assert len(searcher.rows_of(first)) == 0
        assert first not in list(Retriever.by_document(retriever))
    finally:
        object.__setattr__(shard, "deleted", None)
