"""A tiny base model, a tiny encoder, a small corpus, and what is built from them, made once per session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.config import RayConfig
from cluster.session import ray_session
from cluster.store import Artifact, Store
from retrieval.index import build_index
from tests.serving.tiny import make_base
from tests.training.tiny import training_recipe
from training.config import TrainingRecipe
from training.samples import build_samples


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True)
class Built:
    recipe: TrainingRecipe
    store: Store
    index: Artifact
    samples: Artifact


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """One small local Ray for all tests of the room that need one."""
    with ray_session(RayConfig(num_cpus=2)):
        yield


@pytest.fixture(scope="package")
def built(
    base_path: Path,
    encoder_path: Path,
    corpus_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """An index and samples over the tiny corpus."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        recipe = training_recipe(folder, corpus_path, encoder_path, base_path)
        store = Store(recipe.store.uri)
        index = build_index(recipe, store)
        return Built(recipe, store, index, build_samples(recipe, store, index))
