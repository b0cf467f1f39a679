"""What is measured of a finished adapter while the model is still in the workers' memory.

In: the engine with the state that is kept, the validator, the adapter that the new one would replace. Out:
`FinalFigures`, the same on every worker: the kept state's validation, general ability with the adapter off and on,
and the other adapter's loss on the same validation rows. All workers go through it in lockstep, so that it works where
no worker has all weights (ZeRO-3).
Not covered: what follows from the figures (training/lora.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.base_model import base_model_directory, load_tokenizer
from training.config import TrainingRecipe
from training.general_check import GeneralLosses, general_rows
from training.row_losses import RowLosses, measure_rows
from training.validation import Measured, Validator

if TYPE_CHECKING:
    from cluster.store import Artifact

TRAINED = "default"
OTHER = "replaced"


@dataclass(frozen=True)
class FinalFigures:
    """What the workers say of the adapter that they leave."""

    validation: Measured | None
    """Of the state that is kept; none where no row validates."""
    general: GeneralLosses
    general_seconds: float
    replaced: RowLosses | None
    """The other adapter's losses on the validation rows; none where there is no other, or no row."""


def final_checks(
    engine: Any,
    validator: Validator | None,
    recipe: TrainingRecipe,
    replaces: Artifact | None,
    rank: int,
    world_size: int,
    measured: Measured | None = None,
) -> FinalFigures:
    """Measures the adapter in `engine`; all workers must call it, after the adapter is saved.

    Args:
        engine: DeepSpeed's, or a plain PEFT model. Which of its parameters are trainable may be another afterwards.
        validator: Of the run.
        recipe: Of the run.
        replaces: An adapter of the same base model.
        rank: This worker's number, from 0.
        world_size: Number of workers.
        measured: The kept state's validation where the run has it in memory (all workers or none): it is not repeated.
    """
    model = getattr(engine, "module", engine)
    if validator is not None and measured is None:
        measured = validator.measure(model, rank, world_size)
    began = time.monotonic()
    general = _general_losses(model, recipe, rank, world_size)
    seconds = time.monotonic() - began
    replaced = None
    if validator is not None and replaces is not None:
        with _other_adapter(model, replaces):
            replaced = validator.losses(model, rank, world_size)
    return FinalFigures(measured, general, seconds, replaced)


def _general_losses(model: Any, recipe: TrainingRecipe, rank: int, world_size: int) -> GeneralLosses:
    tokenizer = load_tokenizer(base_model_directory(recipe.model))
    rows = general_rows(tokenizer, recipe.language)
    shape = (tokenizer.pad_token_id, recipe.train.micro_batch_tokens, rank, world_size)
    tuned = measure_rows(model, rows, *shape)
    with model.disable_adapter():
        return GeneralLosses(measure_rows(model, rows, *shape), tuned)


@contextmanager
def _other_adapter(model: Any, adapter: Artifact) -> Iterator[None]:
    """Puts another adapter in the trained one's place, for the time of the block."""
    # As in training: PEFT would otherwise turn a bfloat16 adapter into float32, which halves the speed on CPU.
    model.load_adapter(str(adapter.directory()), adapter_name=OTHER, is_trainable=False, autocast_adapter_dtype=False)
    model.set_adapter(OTHER)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)
        model.delete_adapter(OTHER)
