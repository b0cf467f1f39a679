"""Recipe sections of the retrieval room: corpus, encoder, chunking, index. Imports no torch, ray or faiss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import BaseRecipe, Section

Language = Literal["en", "zh"]


class CorpusConfig(Section):
    """Where the documents come from."""

    path: str = ""
    """A BEIR `corpus.jsonl`, or a folder (or one file) of .txt / .md documents."""


class EncoderConfig(Section):
    """The bi-encoder that embeds chunks and queries."""

    model: str = "embedded:all-MiniLM-L6-v2"
    """`embedded:NAME` (a package's model), a local directory, an `s3://` path, or a hub id."""
    revision: str | None = None
    """Pinned revision of a hub model."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights' precision; `auto` measures both once and takes the faster on CPU, bfloat16 on GPU."""
    batch_tokens: int = Field(default=8192, ge=256)
    """Padded tokens per embedding batch."""
    actors: int = Field(default=1, ge=1)
    """Embedding actors; on GPUs, one per GPU."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that each embedding actor claims."""
    max_unknown_share: float = Field(default=0.05, ge=0, le=1)
    """Share of unknown tokens in the corpus above which `search: auto` falls back to lexical search."""


class ChunkingConfig(Section):
    """How documents are cut."""

    max_tokens: int = Field(default=96, ge=16)
    """Most tokens of a chunk, heading included, in the encoder's own tokenizer."""
    overlap_tokens: int = Field(default=0, ge=0)
    """Tokens that neighbouring chunks of one section share; less than half of `max_tokens`."""
    merge: bool = True
    """Small neighbouring subsections (level 3 and below) of one section share a chunk while the whole fits."""

    @model_validator(mode="after")
    def _check_overlap(self) -> ChunkingConfig:
        if self.overlap_tokens * 2 >= self.max_tokens:
            raise ValueError(
                f"chunking.overlap_tokens must be less than half of max_tokens ({self.max_tokens}), "
                f"got {self.overlap_tokens}"
            )
        return self


class IndexConfig(Section):
    """The index artifact."""

    search: Literal["auto", "dense", "lexical"] = "auto"
    """`auto` is dense, or lexical where the encoder does not know the corpus's language."""
    kind: Literal["flat", "hnsw", "ivf_flat"] = "flat"
    """FAISS index type."""
    gpu: bool = False
    """Search on a GPU (needs faiss-gpu)."""
    recall_sample: int = Field(default=200, ge=1)
    """Chunks used as queries to measure recall@10 against exact search for the manifest."""


class RetrievalRecipe(BaseRecipe):
    """The part of a recipe that the retrieval room may read."""

    language: Language = "en"
    """Language of prompts, abstention text and labels."""
    corpus: CorpusConfig = CorpusConfig()
    encoder: EncoderConfig = EncoderConfig()
    chunking: ChunkingConfig = ChunkingConfig()
    index: IndexConfig = IndexConfig()
