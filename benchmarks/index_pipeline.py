"""What the index pipeline adds to embedding, and how it compares with plain sentence-transformers.

    python -m benchmarks.index_pipeline [--chunks 5000] [--rounds 3] [--region europe] [--set encoder.precision=float32]

Three sides take turns over the same chunks of the Factbook, in fresh processes where that is said:
- **pipeline**: `build_index` into an empty store, from the corpus file to the published artifact. Timed: listing,
  reading, chunking, starting the embedding actor (a new process that loads torch and the model), embedding, shards,
  FAISS, BM25, digests. Not timed: starting Ray, and the choice of precision (measured once per machine and kept).
- **encoder**: our `Encoder` over the same texts in one process. Timed: `encode_passages`. Its start is timed beside it.
- **plain**: `SentenceTransformer(directory).encode(texts)` with its defaults (float32, batches of 32), on a seeded
  sample of the texts (`--plain-texts`), because it is slow. Timed: `encode`.
The models of the last two are loaded and warm; the pipeline pays for its actor's start, which is therefore also given
apart. Prints texts per second, the ratios and the pipeline's own parts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.conditions import describe_conditions, describe_load, describe_ratio
from cluster.session import ray_session
from cluster.store import Artifact, Store
from rayft import load
from retrieval.chunking import Chunker, embedding_text
from retrieval.config import RetrievalRecipe
from retrieval.records import Document

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from retrieval.encoder import Encoder

PACKAGES = ("ray", "torch", "sentence-transformers", "transformers", "faiss-cpu", "bm25s")
WARM_TEXTS = 64


@dataclass(frozen=True)
class Work:
    """The same chunks for all sides: a corpus file, and what the encoder reads for each chunk."""

    recipe: RetrievalRecipe
    texts: list[str]
    sample: list[str]
    """Texts that the plain side encodes."""


def prepare(recipe: RetrievalRecipe, chunks: int, sample: int, folder: Path) -> Work:
    """A corpus of the first documents that give about `chunks` chunks; `sample` of them for the plain side."""
    from retrieval.encoder import encoder_source, encoder_tokenizer

    directory = encoder_source(recipe, Store(str(folder / "store"))).directory()
    chunker = Chunker(encoder_tokenizer(directory), recipe.chunking)
    texts: list[str] = []
    lines: list[str] = []
    with Path(recipe.corpus.path).open(encoding="utf-8") as rows:
        for line in rows:
            if len(texts) >= chunks:
                break
            row = json.loads(line)
            cut = chunker.chunk(Document(row["_id"], row["title"], row["text"]))
            texts += [embedding_text(chunk.title, chunk.heading, chunk.text) for chunk in cut]
            lines.append(line)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(lines), encoding="utf-8")
    drawn = random.Random(recipe.seed).sample(texts, min(sample, len(texts)))
    return Work(
        recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"path": str(corpus)})}), texts, drawn
    )


def run_pipeline(work: Work) -> tuple[float, Artifact]:
    """Seconds of a whole build into an empty store."""
    from retrieval.index import build_index

    with tempfile.TemporaryDirectory(prefix="index-pipeline-") as folder:
        began = time.perf_counter()
        artifact = build_index(work.recipe, Store(folder))
        seconds = time.perf_counter() - began
    assert int(artifact.manifest.counts["chunks"]) == len(work.texts), "the sides saw different chunks"
    return seconds, artifact


def run_encoder(work: Work, encoder: Encoder) -> float:
    """Seconds of our encoder over all texts at once."""
    began = time.perf_counter()
    encoder.encode_passages(work.texts)
    return time.perf_counter() - began


def run_plain(work: Work, model: SentenceTransformer) -> float:
    """Seconds of sentence-transformers with its defaults over the sample, by texts for all of them."""
    began = time.perf_counter()
    model.encode(work.sample)
    return (time.perf_counter() - began) * len(work.texts) / len(work.sample)


def alternate(work: Work, encoder: Encoder, model: SentenceTransformer, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round; prints as it goes."""
    for side in (encoder.encode_passages, model.encode):
        side(work.texts[:WARM_TEXTS])
    run_pipeline(work)  # the first build pays for Ray's first workers
    times: dict[str, list[float]] = {"plain": [], "encoder": [], "pipeline": []}
    for number in range(rounds):
        times["plain"].append(run_plain(work, model))
        times["encoder"].append(run_encoder(work, encoder))
        seconds, artifact = run_pipeline(work)
        times["pipeline"].append(seconds)
        rates = ", ".join(
            f"{name} {taken[-1]:.1f} s ({len(work.texts) / taken[-1]:.1f} texts/s)" for name, taken in times.items()
        )
        print(f"round {number + 1}: {rates}; load {describe_load()}")
        parts = {name: value for name, value in artifact.manifest.measured.items() if name.endswith("_s")}
        print(f"  parts of the pipeline: {parts}", flush=True)
    return times


def main() -> None:
    """Alternates the sides and prints texts/s and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="factbook")
    parser.add_argument("--region", default="europe")
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--plain-texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    from retrieval.encoder import Encoder, default_device, encoder_source, resolve_precision

    recipe = load(arguments.recipe, [f"source.region={arguments.region}", *arguments.overrides])
    print(describe_conditions(PACKAGES, recipe.seed), flush=True)
    with tempfile.TemporaryDirectory(prefix="index-pipeline-") as folder, ray_session(recipe.ray):
        work = prepare(recipe, arguments.chunks, arguments.plain_texts, Path(folder))
        source = encoder_source(work.recipe, Store(str(Path(folder) / "store")))
        device = default_device()
        began = time.perf_counter()
        encoder = Encoder(source, resolve_precision(source, device), device)
        started = time.perf_counter() - began
        model = SentenceTransformer(str(source.directory()), device=device)
        print(
            f"{len(work.texts)} texts ({len(set(work.texts))} different), {source.name}; encoder in "
            f"{encoder.precision} on {device}, loaded in {started:.1f} s; plain in {next(model.parameters()).dtype}"
        )
        times = alternate(work, encoder, model, arguments.rounds)
    print(describe_ratio("pipeline texts/s ÷ plain encode texts/s", times["plain"], times["pipeline"]))
    print(describe_ratio("encoder texts/s ÷ plain encode texts/s", times["plain"], times["encoder"]))
    print(describe_ratio("pipeline seconds ÷ encoder seconds", times["pipeline"], times["encoder"]))


if __name__ == "__main__":
    main()
