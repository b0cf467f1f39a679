"""The base of every recipe section, and the sections that belong to the cluster room: store and Ray session.

Each room adds its own sections by deriving from the recipe of the room to its left
(`BaseRecipe` → `RetrievalRecipe` → `TrainingRecipe` → `ServingRecipe` → `EvaluationRecipe`), so a stage
takes exactly the part of the recipe that it may know about.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen, typed part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StoreConfig(Section):
    """Where artifacts live."""

    uri: str = ".rayft/store"
    """Directory or `s3://` / `gs://` prefix; a relative path is taken from the working directory."""


class RayConfig(Section):
    """How stages reach Ray, and how much they may claim."""

    address: str | None = None
    """Address of a running cluster (`auto`, `ray://…`); none starts a local Ray for the command."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of a local Ray; none uses what the machine has. Ignored on a running cluster."""


class BaseRecipe(Section):
    """What every stage shares."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Name under which this pipeline's artifacts are stored."""
    seed: int = 17
    """Seed of everything random."""
    store: StoreConfig = StoreConfig()
    ray: RayConfig = RayConfig()
