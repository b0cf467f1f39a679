"""What answers a batch, and with what hands.

In: a recipe and the artifacts of a release. Out: `Parts` (what is asked) and `BatchRun` (who does the work: factories
of the engine and the retriever, and the runner that drives them). Not covered: which questions, where answers go.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.store import Artifact, ArtifactRef, Store
from evaluation.answering import ChoosesRoute, Generates, Searches
from evaluation.config import EvaluationRecipe
from evaluation.pipeline import Runner, Workers, run_on_ray
from serving.context_budget import CountsTokens
from serving.strategies import available_strategies
from training.format import WorkedExample

if TYPE_CHECKING:
    from serving.router import Router


@dataclass(frozen=True)
class Parts:
    """What answers: the parts of a release."""

    index: Artifact
    samples: Artifact | None
    adapters: Mapping[str, Artifact]
    base_digest: str
    """`cluster.model_source.model_digest` of the base model."""
    examples: tuple[WorkedExample, ...] = ()
    router: Artifact | None = None
    """The intent classifier that `auto` routes by; without it, intents by keywords."""

    @classmethod
    def of(
        cls,
        recipe: EvaluationRecipe,
        index: Artifact,
        samples: Artifact | None,
        adapters: Mapping[str, Artifact],
        base_digest: str = "",
        router: Artifact | None = None,
    ) -> Parts:
        """The parts, with the worked examples that the samples hold; the base model is digested unless given."""
        from training.samples import load_examples

        if not base_digest:
            from cluster.model_source import model_digest
            from training.base_model import base_model_directory

            base_digest = model_digest(base_model_directory(recipe.model))
        examples = tuple(load_examples(samples)) if samples else ()
        return cls(index, samples, adapters, base_digest, examples, router)

    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies that these parts can answer with."""
        return available_strategies(self.adapters, has_index=True, has_examples=bool(self.examples))


@dataclass(frozen=True)
class BatchRun:
    """How a batch is carried out; nothing here changes an answer."""

    workers: Workers
    runner: Runner
    router: ChoosesRoute | None = None
    release: str = ""


def open_router(recipe: EvaluationRecipe, parts: Parts) -> Router:
    """The router of `auto` as serving has it, but for the ratings: offline nobody has rated anything.

    Raises:
        ArtifactError: The classifier reads the embeddings of another encoder than the index's.
    """
    from serving.intents import open_classifier
    from serving.router import Router

    threshold = recipe.router.threshold
    classifier = open_classifier(parts.router, parts.index, threshold=threshold) if parts.router else None
    return Router(recipe.router, parts.strategies(), classifier, recipe.seed)


def default_run(recipe: EvaluationRecipe, store: Store, parts: Parts, release: str = "") -> BatchRun:
    """The recipe's own engine and retriever, on Ray Data actor pools; needs a connected Ray."""
    adapters = {name: artifact.ref for name, artifact in parts.adapters.items()}
    workers = Workers(
        functools.partial(_open_engine, recipe, store, adapters),
        functools.partial(_open_retriever, recipe, store, parts.index.ref),
        functools.partial(_open_tokens, recipe),
    )
    return BatchRun(workers, run_on_ray(recipe.evaluate), open_router(recipe, parts), release)


def _open_engine(recipe: EvaluationRecipe, store: Store, adapters: Mapping[str, ArtifactRef]) -> Generates:
    from serving.generator import open_engine
    from training.base_model import base_model_directory

    directories = {name: store.open_ref(ref).directory() for name, ref in adapters.items()}
    return open_engine(base_model_directory(recipe.model), directories, recipe.generation, recipe.model)


def _open_tokens(recipe: EvaluationRecipe) -> CountsTokens:
    from serving.prompt_tokens import PromptTokens
    from training.base_model import base_model_directory

    return PromptTokens(base_model_directory(recipe.model))


def _open_retriever(recipe: EvaluationRecipe, store: Store, index: ArtifactRef) -> Searches:
    from retrieval.retriever import Retriever

    return Retriever.open(store.open_ref(index), recipe.encoder, recipe.search)
