import json

import pytest

from cluster.errors import ArtifactError, UserError
from cluster.store import Store
from retrieval.attributes import attribute_values
from retrieval.config import SearchConfig
from retrieval.filters import parse_filter
from retrieval.fusion import by_convex_sum
from retrieval.index import build_index
from retrieval.retriever import Retriever, require_chunks
from tests.retrieval.test_rerank import cross_encoder_path  # noqa: F401
from tests.retrieval.tiny import COUNTRIES, tiny_encoder, tiny_recipe

QUERIES = ["exports of cocoa", "the climate of Finland", "software"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, encoder_path, corpus_path):
    folder = tmp_path_factory.mktemp("built")
    recipe = tiny_recipe(folder, corpus_path, encoder_path)
    recipe = recipe.model_copy(update={"index": recipe.index.model_copy(update={"shard_chunks": 20})})
    return recipe, build_index(recipe, Store(recipe.store.uri))


@pytest.fixture(scope="module")
def retriever(built):
    recipe, artifact = built
    return Retriever.open(artifact, recipe.encoder)


def _found(hits):
    return [(hit.passage.chunk_id, round(hit.score, 6)) for hit in hits]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
@pytest.mark.parametrize(
    "written", [{"place": {"lt": 3}}, {"title": {"in": ["Ghana", "Chile"]}}, {"not": {"place": 2}}, {"place": "2"}]
)
def test_filtered_hits_are_the_allowed_ones_in_order_in_every_mode(retriever, mode, written):
    wanted = parse_filter(written)
    chunks = {chunk.chunk_id: chunk for chunk in retriever.chunks()}
    allowed = {name for name, chunk in chunks.items() if wanted.matches(attribute_values(vars(chunk)))}
    everything = retriever.search(QUERIES, len(retriever), mode=mode)
    for filtered, whole in zip(retriever.search(QUERIES, 6, mode=mode, filter=wanted), everything, strict=True):
        assert len(filtered) == min(6, len(allowed))
        if mode == "hybrid":  # its scores are scaled to the candidates, which a filter changes
            assert {hit.passage.chunk_id for hit in filtered} <= allowed
        else:
            assert _found(filtered) == [item for item in _found(whole) if item[0] in allowed][:6]
        assert [hit.rank for hit in filtered] == list(range(1, len(filtered) + 1))


def test_hybrid_scores_are_the_convex_sum_of_both_rankings(retriever):
    for query in QUERIES:
        sides = {
            mode: [(hit.passage.chunk_id, hit.score) for hit in retriever.search([query], len(retriever), mode=mode)[0]]
            for mode in ("dense", "lexical")
        }
        words = [item for item in sides["lexical"] if item[1] > 0]
        expected = by_convex_sum(sides["dense"], words, 0.6, 5, list)
        (hits,) = retriever.search([query], 5, mode="hybrid")
        assert [hit.passage.chunk_id for hit in hits] == [name for name, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected])


def test_recipe_mode_is_taken_unless_the_search_names_one(built):
    recipe, artifact = built
    lexical = Retriever.open(artifact, recipe.encoder, SearchConfig(mode="lexical"))
    assert lexical.mode == "lexical"
    assert _found(lexical.search(QUERIES, 3)[0]) == _found(lexical.search(QUERIES, 3, mode="lexical")[0])
    assert lexical.search(QUERIES, 3, mode="dense")[0][0].score <= 1.0
    rrf = Retriever.open(artifact, recipe.encoder, SearchConfig(mode="hybrid", fusion="rrf"))
    assert rrf.search(QUERIES, 1)[0][0].score <= 2 / 61


def test_queries_searched_together_find_what_each_finds_alone(retriever):
    together = retriever.search(QUERIES, 5, mode="lexical")
    assert [_found(hits) for hits in together] == [_found(retriever.search([q], 5, mode="lexical")[0]) for q in QUERIES]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_search_and_embed_embeds_once_and_finds_what_search_finds(built, monkeypatch, mode):
    from retrieval.encoder import Encoder

    recipe, artifact = built
    retriever = Retriever.open(artifact, recipe.encoder, SearchConfig(mode=mode))
    wanted = parse_filter({"place": {"lt": 3}})
    expected, vectors = retriever.search(QUERIES, 4, filter=wanted), retriever.encode_queries(QUERIES)
    encoded, encode = [], Encoder.encode_queries

    def counted(self, texts):
        encoded.append(list(texts))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode_queries", counted)
    hits, embeddings = retriever.search_and_embed(QUERIES, 4, filter=wanted)
    assert [_found(each) for each in hits] == [_found(each) for each in expected]
    assert (embeddings == vectors).all() and encoded == [QUERIES]


def test_embed_counts_tokens_before_they_are_cut(retriever):
    long = "cocoa " * 500
    vectors, tokens, most = retriever.embed(["cocoa", long])
    assert vectors.shape == (2, 32) and most == 128
    assert tokens[0] >= 3 and tokens[1] >= 502 > most


def test_lexical_index_refuses_dense_search_by_its_key(tmp_path, encoder_path, corpus_path):
    recipe = tiny_recipe(tmp_path, corpus_path, encoder_path)
    recipe = recipe.model_copy(update={"search": SearchConfig(mode="lexical")})
    retriever = Retriever.open(build_index(recipe, Store(recipe.store.uri)), recipe.encoder, recipe.search)
    assert retriever.mode == "lexical"
    for mode in ("dense", "hybrid"):
        with pytest.raises(UserError, match=r"^search\.mode is "):
            retriever.search(["copper"], 1, mode=mode)
    for embed in (retriever.encode_queries, retriever.embed):
        with pytest.raises(UserError, match="no encoder"):
            embed(["copper"])
    hits, vectors = retriever.search_and_embed(["copper"], 1)
    assert vectors is None and not retriever.embeds and len(hits[0]) == 1


def test_index_of_another_encoder_is_refused_with_both_names(built, tmp_path):
    recipe, artifact = built
    other = tiny_encoder(tmp_path / "other", seed=8)
    with pytest.raises(ArtifactError) as refused:
        Retriever.open(artifact, recipe.encoder.model_copy(update={"model": str(other)}))
    assert recipe.encoder.model in str(refused.value) and str(other) in str(refused.value)


def test_k_beyond_the_index_is_refused_by_the_key_it_came_from(built, retriever):
    _, artifact = built
    for call in (
        lambda: require_chunks(artifact, 10_000, "generation.passages"),
        lambda: retriever.search(["x"], 10_000, key="generation.passages"),
        lambda: retriever.search(["x"], 0, key="generation.passages"),
    ):
        with pytest.raises(UserError, match=r"^generation\.passages is "):
            call()


def test_reranker_orders_the_best_of_the_first_search_anew(built, retriever, cross_encoder_path):  # noqa: F811
    from sentence_transformers import CrossEncoder

    recipe, artifact = built
    config = SearchConfig(rerank=str(cross_encoder_path), rerank_candidates=7)
    found = Retriever.open(artifact, recipe.encoder, config, device="cpu").search(QUERIES, 3)
    model = CrossEncoder(str(cross_encoder_path), device="cpu")
    for query, hits, first in zip(QUERIES, found, retriever.search(QUERIES, 7), strict=True):
        texts = [f"{' | '.join(filter(None, (h.passage.title, h.passage.heading)))}\n{h.passage.text}" for h in first]
        expected = model.rank(query, texts, top_k=3)
        assert [hit.passage.chunk_id for hit in hits] == [first[row["corpus_id"]].passage.chunk_id for row in expected]


def test_hit_that_the_attributes_wrongly_allow_is_refused(built, monkeypatch):
    recipe, artifact = built
    retriever = Retriever.open(artifact, recipe.encoder)
    monkeypatch.setattr(
        "retrieval.attributes.Attributes.rows", lambda self, wanted, **_: __import__("numpy").arange(self.count)
    )
    with pytest.raises(ArtifactError, match="attributes"):
        retriever.search(["x"], 3, filter=parse_filter({"title": "Ghana"}))


def test_documents_and_chunks_come_in_corpus_order(retriever, corpus_path):
    rows = [json.loads(line) for line in corpus_path.read_text().splitlines()]
    assert [(d.doc_id, d.text, d.metadata) for d in retriever.documents()] == [
        (row["_id"], row["text"], row["metadata"]) for row in rows
    ]
    assert list(dict.fromkeys(chunk.title for chunk in retriever.chunks())) == list(COUNTRIES)
