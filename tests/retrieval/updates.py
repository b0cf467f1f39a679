"""Corpora that change, and comparing two indexes by what they find. For the tests of updating and purging."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from cluster.store import Artifact, Store
from retrieval.config import RetrievalRecipe
from retrieval.encoder import Encoder
from retrieval.index import build_index
from retrieval.retriever import Retriever
from retrieval.shards import open_shards
from tests.retrieval.tiny import COUNTRIES, GOODS, tiny_recipe

loaded_once = functools.cache(Encoder)
"""`make_encoder` of tests that build often."""
QUERIES = (
    *(f"{goods} of {country}" for goods, country in zip(GOODS[::2], COUNTRIES[::2], strict=True)),
    "cold winters",
)


def row(doc_id: str, words: str, **metadata: object) -> dict:
    """A BEIR row of two or three chunks."""
    sections = "\n\n".join(f"## Part {n}\n\n{words} part {n} " + f"{words} " * 12 for n in range(2))
    return {"_id": doc_id, "title": doc_id, "text": f"# {doc_id}\n\n{sections}", "metadata": metadata}


def some_rows(count: int, year: int = 1990) -> list[dict]:
    return [row(f"d{n}", f"{GOODS[n % 8]} from {COUNTRIES[n * 3 % 8]} in {year + n}", n=n) for n in range(count)]


def write_rows(path: str | Path, rows: Iterable[dict]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(folder: Path, encoder: Path, rows: Sequence[dict], **sections: dict) -> RetrievalRecipe:
    """A recipe over `rows` that never compacts unless `index` says so."""
    corpus = folder / "corpus.jsonl"
    write_rows(corpus, rows)
    return changed(tiny_recipe(folder, corpus, encoder), **{"index": {"compact_above": 1.0}, **sections})


def changed(recipe: RetrievalRecipe, **sections: object) -> RetrievalRecipe:
    data = recipe.model_dump()
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(values, dict) else values
    return RetrievalRecipe.model_validate(data)


def store_of(recipe: RetrievalRecipe) -> Store:
    return Store(recipe.store.uri)


def current(recipe: RetrievalRecipe) -> Artifact:
    return store_of(recipe).open("index", recipe.name)


def documents_of(artifact: Artifact) -> dict[str, str]:
    """Live documents and their texts."""
    return {
        document.doc_id: document.text
        for shard in open_shards(artifact.directory())[1]
        for document in shard.documents()
    }


def found(
    recipe: RetrievalRecipe, artifact: Artifact, k: int = 5, **options: object
) -> list[list[tuple[str, str, float]]]:
    """What the queries find: chunk id, text, score."""
    retriever = Retriever.open(artifact, recipe.encoder, recipe.search, device="cpu")
    hits = retriever.search(QUERIES, min(k, len(retriever)), **options)  # type: ignore[arg-type]
    return [[(hit.passage.chunk_id, hit.passage.text, hit.score) for hit in ranked] for ranked in hits]


def assert_same_results(recipe: RetrievalRecipe, one: Artifact, other: Artifact, k: int = 5, **options: object) -> None:
    """Equal ids and texts in equal order, and scores to 1e-6."""
    for ours, theirs in zip(found(recipe, one, k, **options), found(recipe, other, k, **options), strict=True):
        assert [hit[:2] for hit in ours] == [hit[:2] for hit in theirs]
        assert [hit[2] for hit in ours] == pytest.approx([hit[2] for hit in theirs], abs=1e-6)


def fresh_build(recipe: RetrievalRecipe, rows: Sequence[dict], folder: Path) -> Artifact:
    """An index of `rows` in a store of its own."""
    recipe = changed(recipe, store={"uri": str(folder / "store")})
    recipe = changed(recipe, corpus={"path": write_rows(folder / "corpus.jsonl", rows)})
    return build_index(recipe, store_of(recipe), make_encoder=loaded_once)
