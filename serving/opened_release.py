"""What ingress needs of a release, read from its artifacts: pins that travel with requests, and what answers are made
with.

In: a recipe, the store, a release. Out: `Pins` and a `ServedRelease`. Not covered: models and indexes, which the
deployments open for themselves. Imports no ray, torch or faiss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import ArtifactError
from cluster.releases import Release
from cluster.store import Store
from serving.config import ServingRecipe
from serving.conversation import ServedRelease
from serving.interfaces import Pins
from serving.strategies import available_strategies
from training.format import FORMAT_VERSION, PromptFormat

if TYPE_CHECKING:
    from cluster.store import Artifact


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
        name=str(release.ref),
        available=available_strategies(release.adapters, has_index=has_index, has_examples=bool(examples)),
        prompt_format=PromptFormat.load(recipe.prompt, recipe.language),
        examples=examples,
        generation=recipe.generation,
        seed=recipe.seed,
        passages=_public_chunks(store.open_ref(release.index)) if release.index else 0,
    )


def _public_chunks(index: Artifact) -> int:
    """Chunks that everybody may see; a catalog counts them apart."""
    counts = index.manifest.counts
    return int(counts.get("public_chunks", counts["chunks"]))
