from pathlib import Path

import pytest

from cluster.errors import UserError
from retrieval.records import Hit, Passage
from retrieval.rerank import Reranker
from tests.retrieval.tiny import COUNTRIES, GOODS, country_text


def tiny_cross_encoder(directory: Path, labels: int = 1) -> Path:
    """A random one-layer BERT that scores pairs."""
    import torch
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(1)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([country_text(place) for place in range(len(COUNTRIES))], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.5,
    )
    source = directory.with_name(directory.name + "-bert")
    BertForSequenceClassification(config).save_pretrained(source)
    fast.save_pretrained(source)
    CrossEncoder(str(source), device="cpu").save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def cross_encoder_path(tmp_path_factory):
    return tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "tiny")


def _hit(place: int) -> Hit:
    text = f"it exported {GOODS[place]}"
    return Hit(Passage(f"c{place}", f"d{place}", COUNTRIES[place], "Exports", "", text, 0, len(text)), 0.5, place + 1)


def test_reranked_order_and_scores_are_the_cross_encoders_own(cross_encoder_path):
    from sentence_transformers import CrossEncoder

    queries = ["Who exported copper?", "roses in summer"]
    hits = [[_hit(place) for place in range(8)], [_hit(place) for place in (5, 2, 7)]]
    found = Reranker(str(cross_encoder_path), "cpu").rerank(queries, hits, 4)
    model = CrossEncoder(str(cross_encoder_path), device="cpu")
    for query, given, reranked in zip(queries, hits, found, strict=True):
        texts = [f"{hit.passage.title} | Exports\n{hit.passage.text}" for hit in given]
        expected = model.rank(query, texts, top_k=4)
        assert [hit.passage.chunk_id for hit in reranked] == [
            given[row["corpus_id"]].passage.chunk_id for row in expected
        ]
        assert [hit.score for hit in reranked] == pytest.approx([float(row["score"]) for row in expected], abs=1e-5)
        assert [hit.rank for hit in reranked] == list(range(1, len(reranked) + 1))


def test_nothing_to_rerank_stays_nothing(cross_encoder_path):
    assert Reranker(str(cross_encoder_path), "cpu").rerank(["a", "b"], [[], []], 3) == [[], []]


def test_what_is_no_reranker_is_refused_by_its_key(tmp_path):
    with pytest.raises(UserError, match=r"^search\.rerank: .* gives 3 scores"):
        Reranker(str(tiny_cross_encoder(tmp_path / "three", labels=3)), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^search\.rerank: "):
        Reranker(str(tmp_path / "empty"), "cpu")
