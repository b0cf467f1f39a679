"""A tiny sentence-transformers encoder made on the spot, and a small corpus. For the tests of every room."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from retrieval.config import ChunkingConfig, CorpusConfig, EncoderConfig, IndexConfig, RetrievalRecipe

COUNTRIES = ("Austria", "Bulgaria", "Chile", "Denmark", "Estonia", "Finland", "Ghana", "Hungary")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOODS = ("timber", "roses", "copper", "cheese", "software", "paper", "cocoa", "paprika")


def country_text(place: int) -> str:
    """Markdown with headings, in the manner of a reference work."""
    return (
        f"# {COUNTRIES[place]}\n\n## Geography\n\n### Area\n\ntotal: {83 + place},{871 - place} sq km\n\n"
        f"### Climate\n\ntemperate; cold winters and {GOODS[place]} in summer\n\n"
        f"## Economy\n\n### Exports\n\n"
        + " ".join(f"In year {1990 + year} it exported {year} tons of {GOODS[place]}." for year in range(20))
        + "\n"
    )


def write_corpus(path: Path) -> Path:
    """A BEIR corpus.jsonl with a document per country."""
    rows = [
        {"_id": name.lower(), "title": name, "text": country_text(place), "metadata": {"place": place}}
        for place, name in enumerate(COUNTRIES)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_encoder(directory: Path, texts: Sequence[str] = (), max_tokens: int = 128, seed: int = 3) -> Path:
    """Save a random one-layer BERT with the words of `texts` as its vocabulary; 32 dimensions, mean pooling. The same
    bytes each time: a trained WordPiece vocabulary is another one in every process, and so are all hits."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    known = texts or [country_text(place) for place in range(len(COUNTRIES))]
    words = Counter(word for text in known for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in words for letter in word})
    pieces = [
        *SPECIALS,
        *letters,
        *(f"##{letter}" for letter in letters),
        *(word for word, _ in words.most_common(400)),
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformer_directory = directory.with_name(directory.name + "-bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    ).save_pretrained(transformer_directory)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_tokens,
    )
    BertModel(config).save_pretrained(transformer_directory)
    transformer = Transformer(str(transformer_directory), max_seq_length=max_tokens)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(directory))
    return directory


def tiny_recipe(
    folder: Path,
    corpus: Path,
    encoder: Path,
    *,
    chunking: ChunkingConfig | None = None,
    index: IndexConfig | None = None,
    **encoder_options: object,
) -> RetrievalRecipe:
    """A recipe over `corpus` with the tiny encoder, two Ray CPUs and a store under `folder`."""
    return RetrievalRecipe.model_validate(
        {
            "name": "tiny",
            "store": {"uri": str(folder / "store")},
            "ray": {"num_cpus": 2},
            "corpus": CorpusConfig(path=str(corpus)),
            "encoder": EncoderConfig.model_validate({"model": str(encoder), "precision": "float32", **encoder_options}),
            "chunking": chunking or ChunkingConfig(max_tokens=48),
            "index": index or IndexConfig(),
        }
    )
