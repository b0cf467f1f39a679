import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from retrieval.records import Golden, Passage, Question
from tests.training.tiny import chunk
from training.retriever_measure import choose_pool, rank, score

CHUNKS = [chunk(f"passage {n} about {word}", f"d{n}") for n, word in enumerate("abcdefghijkl")]


def asked(*doc_ids: str, number: int = 0) -> Question:
    return Question(f"q{number}", "?", (), tuple(Golden(doc_id) for doc_id in doc_ids), "test_new_documents")


def test_choose_pool_without_a_limit_is_the_whole_index():
    pool = choose_pool(CHUNKS, [asked("d3")], (), 0, 17)
    assert pool.passages == tuple(Passage.of(found) for found in CHUNKS)
    assert pool.indexed == 12
    assert choose_pool(CHUNKS, [asked("d3")], (), 12, 17).passages == pool.passages


@given(
    st.sets(st.integers(0, 11), min_size=1, max_size=4),
    st.sets(st.integers(0, 11), max_size=5),
    st.integers(1, 14),
    st.integers(0, 3),
)
def test_choose_pool_holds_golden_passages_and_hits_and_fills_up_to_the_limit(golden, found, limit, seed):
    ids = {f"d{n}-0" for n in found}
    pool = choose_pool(iter(CHUNKS), [asked(*(f"d{n}" for n in golden))], ids, limit, seed)
    shown = [passage.chunk_id for passage in pool.passages]
    assert {f"d{n}-0" for n in golden} | ids <= set(shown)
    assert len(shown) == min(12, max(limit, len(golden | found)))
    assert shown == [c.chunk_id for c in CHUNKS if c.chunk_id in set(shown)]
    assert pool.indexed == 12


def test_rank_orders_equal_scores_by_chunk_id():
    vectors = np.array([[0.6, 0.8], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    hits = list(rank(np.array([[1, 0]], dtype=np.float32), [Passage.of(c) for c in CHUNKS[:4]][::-1], vectors[::-1]))
    assert [hit.passage.chunk_id for hit in hits[0]] == ["d1-0", "d2-0", "d0-0", "d3-0"]
    assert [hit.rank for hit in hits[0]] == [1, 2, 3, 4]


def test_score_is_what_sentence_transformers_evaluator_gives(encoder_path):
    """One chunk per document, so that both judge the same items."""
    model = SentenceTransformer(str(encoder_path), device="cpu")
    rng = np.random.default_rng(5)
    questions = [asked(*(f"d{n}" for n in rng.choice(12, size=1 + n % 3, replace=False)), number=n) for n in range(9)]
    texts = {q.question_id: f"about {'abcdefghijkl'[n]} {n}" for n, q in enumerate(questions)}
    evaluator = InformationRetrievalEvaluator(
        texts,
        {c.doc_id: c.text for c in CHUNKS},
        {q.question_id: {g.doc_id for g in q.golden} for q in questions},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[1, 5],
    )
    expected = evaluator(model)
    vectors = model.encode([c.text for c in CHUNKS], normalize_embeddings=True)
    queries = model.encode([texts[q.question_id] for q in questions], normalize_embeddings=True)
    found = score(questions, rank(queries, [Passage.of(c) for c in CHUNKS], vectors))
    for name in ("ndcg@10", "mrr@10", "recall@1", "recall@5"):
        ours = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10"}.get(name, name)
        assert found[ours].mean() == pytest.approx(expected[f"cosine_{name}"], abs=1e-6), name
    assert not math.isclose(found["recall@1"].mean(), found["recall@5"].mean())
