import random

import numpy as np
import pytest

from cluster.errors import ArtifactError
from retrieval.attributes import attribute_values
from retrieval.filters import parse_filter
from retrieval.lexical import LexicalIndex
from retrieval.searcher import IndexSearcher
from tests.retrieval.made_index import open_made, unit_vectors

ROWS = 4000
K = 10


def _metadata(seed: int = 4) -> list[dict[str, object]]:
    """A tenant of each share from 50% down to 0.1%, years, and lists of tags."""
    generator = random.Random(seed)
    shares = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01, "thousandth": 0.001}
    rows = []
    for row in range(ROWS):
        tenant = next((name for name, share in shares.items() if generator.random() < share), "rest")
        rows.append({"tenant": tenant, "year": 2000 + row % 25, "tags": generator.sample("abcdef", 2)})
    rows[7]["tenant"] = rows[ROWS - 1]["tenant"] = "thousandth"
    return rows


METADATA = _metadata()
FILTERS = [
    {},
    {"tenant": {"ne": "nobody"}},
    *({"tenant": name} for name in ("half", "tenth", "hundredth", "thousandth", "nobody")),
    {"year": {"gte": 2003, "lt": 2005}},
    {"and": [{"tags": "a"}, {"not": {"tags": "b"}}]},
    {"or": [{"tenant": "thousandth"}, {"year": 2020, "tags": "f"}]},
    {"tenant": "half", "year": {"gt": 2010}},
    {"doc_id": {"in": ["d5", "d3999"]}},
]


def _expected(scores, allowed, names):
    ranked = sorted((row for row in range(len(scores)) if allowed[row]), key=lambda row: (-scores[row], names[row]))
    return ranked[:K]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_pq"])
def test_filtered_search_of_every_kind_is_that_of_brute_force(tmp_path, kind):
    vectors = unit_vectors(ROWS)
    deleted = sorted(random.Random(2).sample(range(ROWS), 300))
    index = open_made(tmp_path, vectors, METADATA, cuts=(1500, 1501), deleted=deleted, kind=kind)
    queries = unit_vectors(6, seed=5)
    exact = queries @ vectors.T
    values = [attribute_values({"doc_id": f"d{row}", "metadata": METADATA[row]}) for row in range(ROWS)]
    gone = set(deleted)
    for written in FILTERS[1:]:
        wanted = parse_filter(written)
        allowed = [row not in gone and wanted.matches(values[row]) for row in range(ROWS)]
        for query, ranking in enumerate(index.dense(queries, K, wanted)):
            rows = [row for row, _ in ranking]
            assert all(allowed[row] for row in rows)
            assert len(rows) == min(K, sum(allowed)), written
            expected = sorted((float(exact[query][row]) for row in range(ROWS) if allowed[row]), reverse=True)[:K]
            assert np.allclose([score for _, score in ranking], expected, atol=1e-5), written


def test_unfiltered_search_leaves_out_deleted_rows_even_where_they_are_nearest(tmp_path):
    vectors = unit_vectors(ROWS)
    query = unit_vectors(1, seed=9)
    nearest = np.argsort(-(query @ vectors.T)[0])
    deleted = sorted(nearest[:200].tolist())
    index = open_made(tmp_path, vectors, METADATA, cuts=(2000,), deleted=deleted)
    assert index.live == ROWS - 200
    assert [row for row, _ in index.dense(query, K, None)[0]] == nearest[200 : 200 + K].tolist()
    assert len(index.dense(query, index.live, None)[0]) == index.live


def test_equal_vectors_come_by_chunk_id_whatever_the_shards(tmp_path):
    vectors = np.repeat(unit_vectors(8), 40, axis=0)  # 40 equal rows each: more than SPARE_HITS
    names = [f"{value:04d}" for value in random.Random(1).sample(range(len(vectors)), len(vectors))]
    metadata = [{"part": row % 2} for row in range(len(vectors))]
    queries = unit_vectors(3, seed=3)
    rankings = []
    for number, cuts in enumerate([(), (13, 100), (160,)]):
        index = open_made(tmp_path / str(number), vectors, metadata, cuts=cuts, names=names)
        rankings.append([index.dense(queries, K, wanted) for wanted in (None, parse_filter({"part": 1}))])
    assert rankings[0] == rankings[1] == rankings[2]
    exact = queries @ np.unique(vectors, axis=0).T
    for query, ranking in enumerate(rankings[0][0]):
        best = exact[query].max()
        tied = sorted(names[row] for row in range(len(vectors)) if abs(queries[query] @ vectors[row] - best) < 1e-6)
        assert [names[row] for row, _ in ranking] == tied[:K]


def test_lexical_search_under_a_filter_ranks_the_allowed_rows_and_fills_with_zeros(tmp_path):
    words = ["copper", "cheese", "roses", "timber"]
    texts = [f"{words[row % 4]} trade {row % 11}" for row in range(600)]
    metadata = [{"year": 2000 + row % 3} for row in range(600)]
    deleted = [0, 8, 599]
    index = open_made(tmp_path, unit_vectors(600), metadata, texts, cuts=(250,), deleted=deleted)
    live = [row for row in range(600) if row not in deleted]
    scores = dict(zip(live, LexicalIndex.build(texts[row] for row in live).scores("copper 4"), strict=True))
    for written, least in (({"year": 2001}, 10), ({"year": 2001, "doc_id": {"in": ["d1", "d4", "d599"]}}, 2)):
        wanted = parse_filter(written)
        allowed = [
            row for row in live if wanted.matches(attribute_values({"doc_id": f"d{row}", "metadata": metadata[row]}))
        ]
        (ranking,) = index.lexical(["copper 4"], K, wanted)
        assert [row for row, _ in ranking] == sorted(allowed, key=lambda row: (-scores[row], row))[:K]
        assert len(ranking) == least
    (unknown,) = index.lexical(["zzz"], 3, None)
    assert unknown == [(1, 0.0), (2, 0.0), (3, 0.0)]


def test_many_equal_scores_are_ordered_as_few_are(tmp_path, monkeypatch):
    texts = ["copper"] * 300
    names = [f"{value:04d}" for value in random.Random(1).sample(range(300), 300)]
    index = open_made(tmp_path, unit_vectors(300), [{}] * 300, texts, cuts=(100,), names=names)
    few = index.lexical(["copper"], K, None)
    monkeypatch.setattr("retrieval.searcher.FEW_TIES", 20)
    assert index.lexical(["copper"], K, None) == few
    assert [names[row] for row, _ in few[0]] == sorted(names)[:K]


def test_chunks_of_rows_in_any_order_are_read_from_their_shards(tmp_path):
    index = open_made(tmp_path, unit_vectors(50), [{"row": row} for row in range(50)], cuts=(10, 11), deleted=[3])
    found = index.chunks_at([49, 10, 0, 10, 11])
    assert {row: chunk.metadata["row"] for row, chunk in found.items()} == {0: 0, 10: 10, 11: 11, 49: 49}
    assert index.chunk_ids([49, 0]) == ["c000049", "c000000"]
    assert [chunk.doc_id for chunk in index.chunks()] == [f"d{row}" for row in range(50) if row != 3]


def test_attributes_of_another_shard_are_refused(tmp_path):
    for name, rows in (("one", 20), ("other", 30)):
        open_made(tmp_path / name, unit_vectors(rows), [{"a": 1}] * rows)
    (one,), (other,) = ((tmp_path / name / "shards").iterdir() for name in ("one", "other"))
    (other / "attributes.json").write_bytes((one / "attributes.json").read_bytes())
    (other / "attributes.arrow").write_bytes((one / "attributes.arrow").read_bytes())
    from types import SimpleNamespace

    artifact = SimpleNamespace(
        ref="index/made", directory=lambda: tmp_path / "other", manifest=SimpleNamespace(counts={"chunks": 30})
    )
    with pytest.raises(ArtifactError, match="attributes"):
        IndexSearcher.open(artifact)


def test_hybrid_search_orders_no_rows_without_a_word_of_the_query(tmp_path, monkeypatch):
    texts = ["copper"] * 3 + ["timber"] * 297
    index = open_made(tmp_path, unit_vectors(300), [{}] * 300, texts, cuts=(2,), deleted=[1])
    monkeypatch.setattr("retrieval.searcher.FEW_TIES", 20)
    monkeypatch.setattr(IndexSearcher, "rank_ids", lambda _: pytest.fail("all chunk ids were ranked"))
    found = index.lexical(["copper", "zzz"], K, None, worded=True)
    assert [[row for row, _ in ranking] for ranking in found] == [[0, 2], []]
    (found,) = index.lexical(["copper"], K, parse_filter({"doc_id": {"in": ["d2", "d9"]}}), worded=True)
    assert [row for row, _ in found] == [2]


def test_shards_share_the_memory_of_filters(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.searcher.FILTERS_BYTES", 3 * 1000)
    index = open_made(tmp_path, unit_vectors(600), [{"a": 1}] * 600, cuts=(200, 400))
    wanted = parse_filter({"a": 1})
    index.dense(unit_vectors(1), 3, wanted)
    assert all(shard.reader.attributes.cache_bytes == 1000 for shard in index._shards)
    assert all(
        shard.reader.attributes.rows(wanted) is not shard.reader.attributes.rows(wanted) for shard in index._shards
    )
