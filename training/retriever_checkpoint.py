"""Checkpoints of a retriever run: weights, optimiser moments, the best state and what was measured so far.

In and out: a directory of this machine (or one that it shares). Written under a name that nobody reads, then renamed;
safetensors and JSON only. Dropout is off and batches follow from the seed, so there is no random state to keep.
Not covered: runs over an object store whose first worker moves to another machine; they begin anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    Tensors = dict[str, torch.Tensor]

FOLDER = "checkpoint"
PROGRESS, WEIGHTS, BEST = "progress.json", "weights.safetensors", "best.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
PerQuestion = Mapping[str, list[float]]


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    losses: tuple[float, ...] = ()
    """Of every step taken."""
    validations: tuple[tuple[int, float], ...] = ()
    """Steps taken, and nDCG@10 on the validation questions then."""
    stopped: bool = False
    """Whether validations stopped improving."""
    before: PerQuestion = dataclasses.field(default_factory=dict)
    """Measures of the base encoder on each held-out question."""
    after: PerQuestion = dataclasses.field(default_factory=dict)
    """Measures of the best state."""

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    @property
    def best(self) -> float:
        """The highest validation so far."""
        return max((value for _, value in self.validations), default=0.0)

    @property
    def best_step(self) -> int:
        """Steps taken at the last of the highest validations: the state that was kept."""
        return max((step for step, value in self.validations if value == self.best), default=0)

    def improves(self, value: float) -> bool:
        """Whether a validation is as good as the best so far.

        Of equals the later counts, which has seen more questions: on the Factbook all validations after half an epoch
        give 1.0, and recall@1 on new documents still rose from 0.950 to 0.967 in the other half.
        """
        return value >= self.best

    def after_step(self, loss: float) -> Progress:
        """One step more."""
        return dataclasses.replace(self, losses=(*self.losses, loss))

    def after_validation(self, value: float, patience: int) -> Progress:
        """One validation more; `patience` of them without a gain stop the run."""
        validations = (*self.validations, (self.step, value))
        best = max(range(len(validations)), key=lambda place: validations[place][1])
        return dataclasses.replace(self, validations=validations, stopped=len(validations) - 1 - best >= patience)

    def with_before(self, measured: PerQuestion) -> Progress:
        """With the base encoder measured."""
        return dataclasses.replace(self, before=measured)

    def with_after(self, measured: PerQuestion) -> Progress:
        """With the best state measured."""
        return dataclasses.replace(self, after=measured)


@dataclass(frozen=True)
class Checkpoint:
    """A run to go on from."""

    progress: Progress
    weights: Tensors
    best: Tensors
    moments: Tensors
    """`<parameter>.exp_avg` and `<parameter>.exp_avg_sq` of each trained parameter."""

    def restore_moments(self, model: SentenceTransformer, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser its moments back."""
        import torch

        for name, parameter in model.named_parameters():
            if f"{name}.{MOMENTS[0]}" in self.moments:
                state: dict[str, Any] = {
                    moment: self.moments[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS
                }
                optimizer.state[parameter] = state | {"step": torch.tensor(float(self.progress.step))}


def save_checkpoint(
    directory: str,
    progress: Progress,
    model: SentenceTransformer,
    optimizer: torch.optim.Optimizer,
    best: Tensors,
) -> None:
    """Replace the checkpoint in `directory` by this one."""
    from safetensors.torch import save_file

    root = Path(directory)
    partial = root / f"{FOLDER}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    moments = {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }
    weights = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({name: _plain(tensor) for name, tensor in (weights | moments).items()}, partial / WEIGHTS)
    save_file({name: _plain(tensor) for name, tensor in best.items()}, partial / BEST)
    (partial / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)))
    old = root / f"{FOLDER}-old"
    shutil.rmtree(old, ignore_errors=True)
    if (root / FOLDER).is_dir():
        (root / FOLDER).rename(old)
    partial.rename(root / FOLDER)
    shutil.rmtree(old, ignore_errors=True)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


def load_checkpoint(directory: str) -> Checkpoint | None:
    """The checkpoint in `directory`; none where there is none. One that was being replaced counts in its old form."""
    from safetensors.torch import load_file

    found = [path for path in (Path(directory) / FOLDER, Path(directory) / f"{FOLDER}-old") if path.is_dir()]
    if not found:
        return None
    stored = json.loads((found[0] / PROGRESS).read_text())
    stored |= {"losses": tuple(stored["losses"]), "validations": tuple(map(tuple, stored["validations"]))}
    tensors = load_file(found[0] / WEIGHTS)
    prefix = "weights."
    return Checkpoint(
        progress=Progress(**stored),
        weights={name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        best=load_file(found[0] / BEST),
        moments={name: value for name, value in tensors.items() if not name.startswith(prefix)},
    )
