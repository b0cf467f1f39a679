"""Is a new adapter worse than the one that people are served?

In: a recipe, the store, the samples that the new adapter learns from. Out: the adapter that the promoted release pins
for the same role, where the two can be compared, and the comparison: both adapters' losses on the new samples'
validation rows, row by row, with a paired bootstrap interval.
Fair to both: validation rows whose question the served adapter was trained on are left out (another seed splits the
questions anew, and a trained-on answer is no test). What only the new one was taught, such as new documents, counts
for it: that is why it was trained.
Not covered: measuring (training/final_checks.py); answers, which the report compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError
from cluster.manifest import ArtifactRef
from cluster.releases import KIND, read_release
from training.format import fold
from training.row_losses import Difference, RowLosses, difference
from training.samples import load_validation, sample_files

if TYPE_CHECKING:
    from cluster.stage import Plan
    from cluster.store import Artifact, Store
    from training.records import Objective

MUST_AGREE = ("base_digest", "prompt_format")
LEAST_ROWS = 8
"""Fewer validation rows decide nothing: an interval from them is a guess."""


@dataclass(frozen=True)
class Comparison:
    """The new adapter against the one it would replace, on the same rows."""

    served_ref: str
    new: float
    """Mean loss per target token."""
    served: float
    difference: Difference
    """New minus served, in nats per token; worse where it lies above 0."""
    left_out: int
    """Validation rows whose question the served adapter was trained on."""

    @property
    def worse(self) -> bool:
        """Whether the new adapter is significantly worse."""
        return self.difference.low > 0

    def describe(self) -> str:
        """Both figures, as a person reads them."""
        gap = self.difference
        return (
            f"validation loss {self.new:.3f} against {self.served:.3f} of the promoted {self.served_ref} on {gap.n} "
            f"rows that neither was trained on ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])"
        )

    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        gap = self.difference
        return {
            "adapter": self.served_ref,
            "validation_loss": round(self.new, 4),
            "its_validation_loss": round(self.served, 4),
            "difference": {
                "value": round(gap.value, 4),
                "low": round(gap.low, 4),
                "high": round(gap.high, 4),
                "n": gap.n,
            },
            "rows_left_out": self.left_out,
        }


def find_served(store: Store, release_name: str, role: str, plan: Plan) -> Artifact | str | None:
    """The adapter that the promoted release pins for a role; a reason where it cannot be compared; none without one.

    Args:
        store: Where releases are.
        release_name: Of the recipe.
        role: Of the adapter in the release.
        plan: Of the new adapter.
    """
    if store.current(KIND, release_name) is None:
        return None
    try:
        ref = read_release(store, release_name).adapters.get(role)
        if ref is None:
            return None
        served = store.open_ref(ref)
    except ArtifactError as error:
        return f"the promoted release cannot be read ({error})"
    for key in MUST_AGREE:
        found, wanted = served.manifest.config.get(key), plan.config[key]
        if found != wanted:
            return f"{ref} has another {key} ({_short(found)}, not {_short(wanted)})"
    if not store.exists(ArtifactRef.parse(served.manifest.parents["samples"])):
        return f"the samples of {ref} are gone, so that nobody can say what it was trained on"
    return served


def _short(value: object) -> str:
    return str(value)[:12]


def compare(
    adapter: Artifact | str | None,
    new: RowLosses | None,
    served: RowLosses | None,
    samples: Artifact,
    objective: Objective,
    seed: int,
) -> Comparison | str | None:
    """Compares both adapters' losses on validation rows that neither was trained on.

    Args:
        adapter: What `find_served` found.
        new: Losses of the new adapter.
        served: Losses of the served adapter, on the same rows.
        samples: What the new one was trained on.
        objective: Of both.
        seed: Of the bootstrap.

    Returns:
        The comparison; a reason where there is none; none where nothing is served.
    """
    if adapter is None or isinstance(adapter, str):
        return adapter
    if new is None or served is None:
        return "there are no validation rows"
    known = _trained_on(adapter)
    questions = {row.sample_id: _normalised(row.question) for row in load_validation(samples, objective)}
    fair = [place for place, sample_id in enumerate(new.sample_ids) if questions[sample_id] not in known]
    left_out = len(new.sample_ids) - len(fair)
    if len(fair) < LEAST_ROWS:
        return (
            f"{adapter.ref} was trained on the questions of {left_out} of {len(new.sample_ids)} validation rows; "
            f"fewer than {LEAST_ROWS} are left"
        )
    ours, theirs = new.only(fair), served.only(fair)
    return Comparison(str(adapter.ref), ours.mean, theirs.mean, difference(ours, theirs, seed), left_out)


def _trained_on(adapter: Artifact) -> frozenset[str]:
    """The questions that an adapter was trained on, normalised; of both objectives where it may have seen both."""
    import pyarrow.parquet as pq

    samples = adapter.store.open_ref(ArtifactRef.parse(adapter.manifest.parents["samples"]))
    config = adapter.manifest.config
    objectives = {config["objective"], *config.get("train", {}).get("mixture", {})}
    files = [path for objective in objectives for path in sample_files(samples, objective)]
    # This column alone: whole rows hold all their passages, 10 KB each in memory.
    columns = (pq.read_table(path, columns=["question"])["question"] for path in files)
    return frozenset(_normalised(question.as_py()) for column in columns for question in column)


def _normalised(question: str) -> str:
    return fold(question)[0].casefold()
