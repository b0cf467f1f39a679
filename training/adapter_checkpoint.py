"""Checkpoints of a LoRA run: adapter, optimiser state, the best state so far, and how far the run has come.

In and out: a work place that every worker reaches, a directory or an object store. A checkpoint is a folder
`checkpoints/<number>/` of safetensors files and, written last, `progress.json` with their digests: without it, or with
a digest that does not fit, there is no checkpoint, and the one before counts. Two are kept.
States are whole, so that a run goes on with any number of workers and under any ZeRO stage. There is no random state in
them: the order of rows follows from the seed, dropout from the seed and the step.
Not covered: gathering the state (training/adapter_state.py), when to write (training/worker.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.storage import LocalStorage, ObjectStorage, storage_at

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]

FOLDER = "checkpoints"
STATE, BEST, PROGRESS = "state.safetensors", "best.safetensors", "progress.json"
CHECKPOINT_FORMAT = 1
KEPT = 2


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    plan: str
    """Fingerprint of the artifact and of its steps: a checkpoint of another plan is never used."""
    step: int = 0
    """Optimiser steps taken."""
    epoch: int = 0
    """Epoch of the last step, from 1."""
    history: tuple[dict[str, Any], ...] = ()
    """Rows of `history.jsonl` so far."""
    early: dict[str, Any] = field(default_factory=dict)
    """Fields of `training.validation.EarlyStop`."""
    seconds: float = 0.0
    """Of steps and validations."""
    tokens: int = 0
    """Tokens trained on, without padding."""
    computed_tokens: int = 0
    """The same with padding."""
    target_tokens: int = 0
    """Tokens that carried loss."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean cross-entropy per target token of every step."""
        return tuple(row["loss"] for row in self.history if "loss" in row)


@dataclass(frozen=True)
class Checkpoint:
    """A run to go on from."""

    progress: Progress
    state: Tensors
    """As `training.adapter_state.optimizer_state` gives it."""
    best: Tensors
    """Adapter weights of the state that is kept; empty before the first validation."""


def save_checkpoint(work: str, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint and removes all but the last two.

    Raises:
        UserError: It cannot be written (a full disk); what was there before is still good.
    """
    from safetensors.torch import save

    storage = storage_at(work)
    numbers = _numbers(storage)
    folder = f"{FOLDER}/{max(numbers, default=0) + 1:06d}"
    try:
        files: dict[str, dict[str, Any]] = {}
        for name, tensors in ((STATE, checkpoint.state), (BEST, checkpoint.best)):
            data = save(dict(tensors))
            storage.replace(f"{folder}/{name}", data)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        # Not `asdict`, which copies every row: 3 s for the history of 250,000 steps, at each checkpoint.
        described = {"format": CHECKPOINT_FORMAT, "files": files, **vars(checkpoint.progress)}
        storage.replace(f"{folder}/{PROGRESS}", json.dumps(described).encode())
    except _medium_errors(storage) as error:
        with contextlib.suppress(*_medium_errors(storage)):
            storage.delete(folder)
        raise UserError(_refused(error, work, checkpoint.progress.step, bool(numbers))) from error
    for number in numbers[: 1 - KEPT]:
        with contextlib.suppress(*_medium_errors(storage)):  # the next checkpoint tries again
            storage.delete(f"{FOLDER}/{number:06d}")


def _refused(error: Exception, work: str, step: int, earlier: bool) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    kept = "the checkpoint before it is kept" if earlier else "there is none before it"
    todo = "free some space there" if full else "make it writable"
    return f"store.uri: cannot write the checkpoint of step {step} to {work}: {reason}; {kept}: {todo} and run again"


def latest_checkpoint(work: str, plan: str, say: Callable[[str], None]) -> int:
    """Number of the newest whole checkpoint of a plan, for `load_checkpoint`; 0 where there is none.

    Args:
        work: The work place.
        plan: `Progress.plan`; checkpoints of another are passed over.
        say: Takes the one line about a checkpoint that is broken.
    """
    storage = storage_at(work)
    for number in reversed(_numbers(storage)):
        try:
            described, _ = _read(storage, number)
        except _BrokenError as error:
            say(f"train: {work}/{FOLDER}/{number:06d} is passed over: {error}")
            continue
        if described["plan"] == plan:
            return number
    return 0


def load_checkpoint(work: str, number: int) -> Checkpoint:
    """A checkpoint that `latest_checkpoint` named.

    Raises:
        UserError: It is gone or broken by now.
    """
    from safetensors.torch import load

    try:
        described, files = _read(storage_at(work), number)
    except _BrokenError as error:
        raise UserError(f"{work}/{FOLDER}/{number:06d}: {error}; run the same command again") from error
    names = [one.name for one in dataclasses.fields(Progress)]
    values = {name: described[name] for name in names} | {"history": tuple(described["history"])}
    return Checkpoint(Progress(**values), load(files[STATE]), load(files[BEST]))


class _BrokenError(Exception):
    """Why a checkpoint cannot be used."""


def _read(storage: LocalStorage | ObjectStorage, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    folder = f"{FOLDER}/{number:06d}"
    try:
        described = json.loads(storage.read(f"{folder}/{PROGRESS}"))
        files = {name: storage.read(f"{folder}/{name}") for name in (STATE, BEST)}
        expected = {name: described["files"][name] for name in files}
    except FileNotFoundError:
        raise _BrokenError("it was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _BrokenError(f"damaged {PROGRESS}") from error
    if described.get("format") != CHECKPOINT_FORMAT:
        raise _BrokenError(f"format {described.get('format')!r}, expected {CHECKPOINT_FORMAT}")
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != expected[name]["sha256"]:
            raise _BrokenError(f"{name} is not what was written")
    return described, files


def _numbers(storage: LocalStorage | ObjectStorage) -> list[int]:
    return sorted(int(name) for name in storage.folders(FOLDER) if name.isdigit())


def _medium_errors(storage: LocalStorage | ObjectStorage) -> tuple[type[Exception], ...]:
    if isinstance(storage, LocalStorage):
        return (OSError,)
    from obstore.exceptions import BaseError

    return (OSError, BaseError)
