"""Recipe sections of the retrieval room: corpus, question columns, encoder, chunking, index, search, collections.

Imports no torch, ray or faiss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import BaseRecipe, Section

Language = Literal["en", "zh"]
IndexKind = Literal["auto", "flat", "hnsw", "ivf_flat", "ivf_pq"]
SearchMode = Literal["auto", "dense", "lexical", "hybrid"]
UpdateFrequency = Literal["unknown", "static", "yearly", "monthly", "weekly", "daily", "hourly", "realtime"]


class ColumnsConfig(Section):
    """Which columns of a JSON Lines, CSV or Parquet file hold a document's parts; all others become metadata."""

    id: str = "_id"
    """Document id. Where a file has no such column, a row's id is its file's name and number (`a.csv#7`)."""
    title: str = "title"
    """Title; may be absent."""
    text: str = "text"
    """Text; a row without it is rejected."""
    uri: str = "uri"
    """Address shown with a hit; may be absent."""
    metadata: str = "metadata"
    """An object (or its JSON text) whose keys become metadata; may be absent."""


class CorpusConfig(Section):
    """Where the documents come from."""

    path: str = ""
    """A file, a folder or a glob (`docs/**/*.md`), local or at `s3://` or `gs://`.
    Formats: .txt .md .html .pdf .docx .pptx .jsonl .csv .parquet, and SQuAD's .json where it is named itself."""
    columns: ColumnsConfig = ColumnsConfig()
    """Columns of row formats."""
    strict: bool = False
    """Stop at the first document that cannot be read, instead of listing it in `rejected.parquet`."""
    max_file_mb: float = Field(default=200, gt=0)
    """A .txt, .md, .html, .pdf, .docx, .pptx or .json file above this many megabytes is rejected."""
    convert_timeout_s: float = Field(default=120, gt=0)
    """Seconds after which the conversion of one .html, .pdf, .docx or .pptx file is given up and the file rejected."""


class QuestionColumns(Section):
    """Which columns of a question file hold a question's parts; all others become metadata."""

    id: str = "_id"
    """Question id. Where a file has no such column, a row's id is its file's name and number (`faq.csv#7`)."""
    text: str = "text"
    """The question; a row without it is refused."""
    answers: str = "answers"
    """Accepted answers: a list, one answer, or SQuAD's `{text, answer_start}` (places in the column `context`)."""
    golden: str = "golden"
    """Where the answer stands: document ids or `{doc_id, start, end}`, a list or one."""
    split: str = "split"
    """One of train, test_new_questions, test_new_documents, test_new_kinds, or test (of new documents or questions, as
    training sees theirs or not); may be absent."""
    reasoning: str = "reasoning"
    """Short reasoning that leads to the answer (`prompt.reasoning`); may be absent."""
    quote: str = "quote"
    """A passage's sentence that supports the answer; may be absent: rayft looks for one."""


class EncoderConfig(Section):
    """The bi-encoder that embeds chunks and queries."""

    model: str = "embedded:all-MiniLM-L6-v2"
    """`embedded:NAME` (a package's model), a local directory, an `s3://` path, or a hub id."""
    revision: str | None = None
    """Pinned revision of a hub model."""
    tuned: Literal["auto", "never"] = "auto"
    """`auto` embeds with this recipe's encoder as fine-tuned by `rayft train retriever`, once one is published; a
    collection with that of a recipe named `<recipe>-<collection>`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights' precision; `auto` measures both once and takes the faster on CPU, bfloat16 on GPU."""
    batch_tokens: int = Field(default=8192, ge=256)
    """Padded tokens per embedding batch."""
    actors: int = Field(default=1, ge=1)
    """Embedding actors; on GPUs, one per GPU."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that each embedding actor claims."""
    max_unknown_share: float = Field(default=0.05, ge=0, le=1)
    """Share of unknown tokens in the corpus above which `search.mode: auto` falls back to lexical search."""


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

    kind: IndexKind = "auto"
    """FAISS index type of each shard; `auto` chooses by size."""
    recall_target: float = Field(default=0.95, gt=0, le=1)
    """Recall@`recall_at` against exact search that the search parameters are tuned to reach."""
    recall_at: int = Field(default=10, ge=1)
    """k of that recall."""
    recall_sample: int = Field(default=200, ge=1)
    """Chunks used as queries to tune and measure recall, for the manifest."""
    shard_chunks: int = Field(default=1_000_000, ge=1)
    """Most chunks of a shard; shards are built in parallel."""
    compact_above: float = Field(default=0.2, gt=0, le=1)
    """Share of deleted rows above which an update rebuilds all shards from what is left."""
    max_small_shards: int = Field(default=16, ge=1)
    """Shards filled to less than a tenth above which an update rebuilds them into few."""


class SearchConfig(Section):
    """How the index is searched."""

    mode: SearchMode = "auto"
    """`dense`, `lexical` (BM25), `hybrid` (both, fused), or `auto`: dense, or lexical where the
    encoder does not know the corpus's language. With `lexical`, the index holds no embeddings."""
    candidates: int = Field(default=100, ge=1)
    """Hits of each kind that `hybrid` fuses, and of the first search that a reranker reads; at least k."""
    fusion: Literal["convex", "rrf"] = "convex"
    """How `hybrid` fuses: `convex` adds both scores, each scaled to 0..1 over its candidates (Bruch et al. 2022);
    `rrf` adds reciprocal ranks."""
    dense_weight: float = Field(default=0.6, ge=0, le=1)
    """Share of the dense score in `convex`; the rest is the lexical score's."""
    rrf_constant: float = Field(default=60, ge=0)
    """Constant of reciprocal-rank fusion (Cormack et al. 2009): a hit at rank r counts 1 / (constant + r)."""
    rerank: str = ""
    """Cross-encoder that orders the best candidates anew (local directory, `s3://` path or hub id); empty: none."""
    rerank_candidates: int = Field(default=20, ge=1)
    """Hits that the cross-encoder reads per query; at least k."""
    gpu: bool = False
    """Search on a GPU (needs faiss-gpu)."""


class CollectionConfig(Section):
    """One of several collections, each with its own documents and its own index."""

    corpus: CorpusConfig
    """Its documents."""
    encoder: EncoderConfig | None = None
    """Its encoder; none takes the recipe's."""
    update_frequency: UpdateFrequency = "unknown"
    """How often its documents change; the router reads it."""
    access: tuple[str, ...] = ()
    """Groups whose members may search it; empty: everybody."""


class RetrievalRecipe(BaseRecipe):
    """The part of a recipe that the retrieval room may read."""

    language: Language = "en"
    """Language of prompts, abstention text and labels."""
    corpus: CorpusConfig = CorpusConfig()
    collections: dict[str, CollectionConfig] = Field(default_factory=dict)
    """Collections by name (`[a-z0-9_-]`), instead of `corpus`; a search spans those that the caller may see."""
    encoder: EncoderConfig = EncoderConfig()
    chunking: ChunkingConfig = ChunkingConfig()
    index: IndexConfig = IndexConfig()
    search: SearchConfig = SearchConfig()

    def corpora(self) -> tuple[CorpusConfig, ...]:
        """The documents' places: those of the collections, or the one of `corpus`."""
        return tuple(one.corpus for one in self.collections.values()) or (self.corpus,)
