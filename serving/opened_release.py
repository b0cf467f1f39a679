"""What ingress needs of a release, read from its artifacts: pins that travel with requests, and what answers are made
with.

In: a recipe, the store, a release. Out: a `ServedRelease` with its `Pins`. Not covered: models and indexes, which the
deployments open for themselves. Imports no ray, torch or faiss.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ArtifactError
from cluster.releases import Release
from cluster.store import ArtifactRef, Store
from serving.asking import ServedRelease
from serving.config import ServingRecipe
from serving.follow_up import RewritePrompt, load_rewrite_prompt
from serving.intents import query_encoder
from serving.interfaces import Pins
from serving.strategies import available_strategies
from training.format import FORMAT_VERSION, PromptFormat

if TYPE_CHECKING:
    from cluster.store import Artifact
    from serving.context_budget import CountsTokens
    from serving.intents import IntentClassifier


def pins_of(release: Release) -> Pins:
    """What travels with every request."""
    return Pins(
        release=str(release.ref),
        index=str(release.index or ""),
        adapters={role: str(ref) for role, ref in release.adapters.items()},
        base_digest=release.base_digest,
        router=str(release.router or ""),
    )


def served_release(recipe: ServingRecipe, store: Store, release: Release) -> ServedRelease:
    """What ingress needs of a release, read from its artifacts.

    Raises:
        ArtifactError: It was trained with another prompt format, or an artifact is damaged.
    """
    from training.samples import load_examples

    if release.adapters and release.prompt_format != FORMAT_VERSION:
        raise ArtifactError(
            f"{release.ref} was trained with prompt format {release.prompt_format}, this program writes format "
            f"{FORMAT_VERSION}: train again"
        )
    has_index = release.index is not None
    examples = load_examples(store.open_ref(release.samples)) if release.samples and has_index else ()
    return ServedRelease(
        pins=pins_of(release),
        available=available_strategies(release.adapters, has_index=has_index, has_examples=bool(examples)),
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        examples=examples,
        generation=recipe.generation,
        seed=recipe.seed,
        passages=_public_chunks(store.open_ref(release.index)) if release.index else 0,
        embeds=bool(release.index and query_encoder(store.open_ref(release.index))[1]),
        update_frequencies=update_frequencies(store.open_ref(release.index)) if release.index else {},
        follow_up=recipe.serve.follow_up,
        rewrite_prompt=_rewrite_prompt(recipe),
    )


def _rewrite_prompt(recipe: ServingRecipe) -> RewritePrompt | None:
    if recipe.serve.follow_up != "model":
        return None
    return load_rewrite_prompt(recipe.serve.follow_up_prompt, recipe.language)


@dataclass(frozen=True)
class StoreParts:
    """What ingress opens beside the pins (`serving.ingress.ReleaseParts`)."""

    recipe: ServingRecipe

    def classifier(self, pins: Pins) -> IntentClassifier | None:
        """The pinned intent classifier, where one is pinned."""
        if not pins.router:
            return None
        from serving.intents import open_classifier

        store = Store(self.recipe.store.uri)
        index = store.open_ref(ArtifactRef.parse(pins.index)) if pins.index else None
        router = store.open_ref(ArtifactRef.parse(pins.router))
        return open_classifier(router, index, threshold=self.recipe.router.threshold)

    def tokens(self, pins: Pins) -> CountsTokens:
        """The base model's tokenizer; it is the generator that holds the base to its pinned digest."""
        from training.base_model import base_model_directory

        return _prompt_tokens(base_model_directory(self.recipe.model))


@functools.lru_cache(maxsize=1)
def _prompt_tokens(base: Path) -> CountsTokens:
    """Kept: releases of one recipe share it, and opening takes a second."""
    from serving.prompt_tokens import PromptTokens

    return PromptTokens(base)


def _public_chunks(index: Artifact) -> int:
    """Chunks that everybody may see; a catalog counts them apart."""
    counts = index.manifest.counts
    return int(counts.get("public_chunks", counts["chunks"]))


def update_frequencies(index: Artifact) -> Mapping[str, str]:
    """By collection; an index of one corpus declares none."""
    from retrieval.collections import is_catalog, read_catalog

    return {entry.name: entry.update_frequency for entry in read_catalog(index)} if is_catalog(index) else {}
