"""One Ray Train worker: the encoder, its contrastive steps, validation, early stopping, the best state at the end.

In: a `RetrieverJob`, the same for every worker. Out: a sentence-transformers directory, written by the first worker,
and its `RetrieverReport`. Every worker follows the same plan of batches and takes its share of each; embeddings are
gathered, so that the loss sees the negatives of all workers and the result is that of one (training/retriever_step.py).
After each validation the first worker leaves a checkpoint, from which an interrupted run goes on.
Not covered: mining, what decides about publishing (training/retriever.py).
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from retrieval.encoder import EncoderSource, encoder_directory, resolve_precision
from retrieval.records import Question
from training.adapter_files import copy_directory
from training.config import TrainingRecipe
from training.lora_engine import GRADIENT_CLIP, learning_rate_at
from training.retriever_checkpoint import Progress, load_checkpoint, save_checkpoint
from training.retriever_measure import DECIDES, Pool, rank, score
from training.retriever_rows import TrainingRow, plan_batches
from training.retriever_step import Task, contrastive_step, embed_all

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from sentence_transformers import SentenceTransformer

Tell = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class RetrieverJob:
    """What every worker is told."""

    recipe: dict[str, Any]
    rows: tuple[TrainingRow, ...]
    validation: tuple[Question, ...]
    validation_pool: Pool
    held_out: tuple[Question, ...]
    """Questions that before and after are measured on."""
    pool: Pool
    uri: str
    """Where the encoder is written; any worker can write there."""
    checkpoints: str
    """Directory for checkpoints."""


@dataclass(frozen=True)
class RetrieverReport:
    """What the first worker says of the run."""

    progress: Progress
    steps: int
    """Planned; fewer are taken when training stops early."""
    resumed_at: int
    """Step that an earlier run had reached, 0 for a fresh one."""
    seconds: float
    """Of this run's steps and validations."""
    device: str
    precision: str
    """In which passages were embedded to validate and measure; training itself is in float32, on GPUs under bfloat16
    autocast."""


def train(job: RetrieverJob, rank: int, world_size: int, tell: Tell) -> RetrieverReport:
    """Trains; with several workers, torch.distributed must be initialised.

    Args:
        job: The same on every worker.
        rank: This worker's number, from 0.
        world_size: Number of workers.
        tell: Called after every step with steps done, steps in all, and figures.

    Raises:
        UserError: the loss is not finite.
    """
    import torch

    recipe = TrainingRecipe.model_validate(job.recipe)
    on_gpu = recipe.train.gpus_per_worker > 0
    if not on_gpu:
        torch.set_num_threads(recipe.train.threads_per_worker)
    steps = plan_batches(job.rows, recipe.retriever.batch_questions, recipe.retriever.epochs, recipe.seed)
    run = _Run(job, recipe, rank, world_size, _load_model(recipe, on_gpu))
    resumed_at = run.resume()
    began = time.monotonic()
    run.measure_base()
    for number in range(run.progress.step, len(steps)):
        if run.progress.stopped:
            break
        loss = run.step([job.rows[place] for place in steps[number]], learning_rate(recipe, number, len(steps)))
        figures = {"loss": loss} | ({DECIDES: run.progress.best} if run.progress.validations else {})
        if number + 1 in validation_steps(len(steps), recipe):
            run.validate()
        tell(number + 1, len(steps), figures)
    seconds = time.monotonic() - began
    tell(len(steps), len(steps), {DECIDES: run.progress.best})
    run.finish()
    return RetrieverReport(
        progress=run.progress,
        steps=len(steps),
        resumed_at=resumed_at,
        seconds=seconds,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        precision=run.precision,
    )


def learning_rate(recipe: TrainingRecipe, step: int, steps: int) -> float:
    """Of a step: linear warm-up, then linear decay."""
    return learning_rate_at(step, steps, recipe.retriever.learning_rate, recipe.retriever.warmup_fraction)


def validation_steps(steps: int, recipe: TrainingRecipe) -> set[int]:
    """Numbers of steps taken after which to validate, evenly spread; the last always."""
    wanted = min(steps, recipe.retriever.epochs * recipe.retriever.validations_per_epoch)
    return {round(steps * (part + 1) / wanted) for part in range(wanted)}


def _load_model(recipe: TrainingRecipe, on_gpu: bool) -> SentenceTransformer:
    """The base encoder in float32, without dropout: the gradient is taken in two passes that must agree."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(encoder_directory(recipe.encoder)),
        device="cuda" if on_gpu else "cpu",
        local_files_only=True,
        model_kwargs={"dtype": torch.float32},
    )
    return model.eval()


class _Run:
    """The state of one worker."""

    def __init__(
        self, job: RetrieverJob, recipe: TrainingRecipe, rank: int, world_size: int, model: SentenceTransformer
    ) -> None:
        import torch

        self.job, self.recipe, self.rank, self.world_size, self.model = job, recipe, rank, world_size, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.retriever.learning_rate, weight_decay=0.0)
        self.precision = resolve_precision(EncoderSource(recipe.encoder), model.device.type)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        """Weights of the best validation."""

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; returns its step."""
        found = load_checkpoint(self.job.checkpoints) if self.rank == 0 else None
        if self.world_size > 1:
            import torch

            box = [found]  # only the first worker is sure to see its own disk
            torch.distributed.broadcast_object_list(box, src=0)
            found = box[0]
        if found is None:
            return 0
        self.progress, self.best = found.progress, found.best
        self.model.load_state_dict(found.weights)
        found.restore_moments(self.model, self.optimizer)
        return self.progress.step

    def measure_base(self) -> None:
        """Measure the untouched encoder on the held-out questions, once."""
        if not self.progress.before:
            self.progress = self.progress.with_before(self._measure(self.job.held_out, self.job.pool))

    def step(self, rows: Sequence[TrainingRow], rate: float) -> float:
        """One optimiser step; returns the loss."""
        import torch

        config = self.recipe.retriever
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        texts = [(row.query, (row.positive, *row.negatives)) for row in rows]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.model.device.type == "cuda"):
            loss = contrastive_step(
                self.model, texts, self.rank, self.world_size, config.temperature, config.cached_texts
            )
        if not math.isfinite(loss):
            number = self.progress.step + 1
            raise UserError(f"retriever.learning_rate: the loss became {loss} at step {number}; lower it")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.progress = self.progress.after_step(loss)
        return loss

    def validate(self) -> None:
        """Measure on the validation questions, keep the state if it is the best, leave a checkpoint."""
        value = float(_mean(self._measure(self.job.validation, self.job.validation_pool)[DECIDES]))
        if self.progress.improves(value):
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        self.progress = self.progress.after_validation(value, self.recipe.retriever.patience)
        self._save()

    def finish(self) -> None:
        """Go back to the best state, measure it on the held-out questions, and write the encoder."""
        self.model.load_state_dict(self.best)
        if not self.progress.after:
            self.progress = self.progress.with_after(self._measure(self.job.held_out, self.job.pool))
            self._save()
        if self.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder, create_model_card=False)
                copy_directory(folder, self.job.uri)

    def _save(self) -> None:
        if self.rank == 0:
            save_checkpoint(self.job.checkpoints, self.progress, self.model, self.optimizer, self.best)

    def _measure(self, questions: Sequence[Question], pool: Pool) -> Mapping[str, list[float]]:
        """Measures of each question by name; the same on every worker."""
        import torch

        model = self.model
        if self.precision == "bfloat16":
            model = copy.deepcopy(self.model).to(torch.bfloat16)
        queries = self._embed(model, [question.text for question in questions], "query")
        vectors = self._embed(model, pool.texts(), "document")
        box: list[Mapping[str, list[float]]] = [{}]
        if self.rank == 0:
            measured = score(questions, rank(queries, pool.passages, vectors))
            box = [{name: values.tolist() for name, values in measured.items()}]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _embed(self, model: SentenceTransformer, texts: Sequence[str], task: Task) -> npt.NDArray[np.float32]:
        """Embeds every `world_size`-th text here and the others on the other workers: (n, dim) float32."""
        import torch

        mine = slice(self.rank, len(texts), self.world_size)
        every = torch.zeros(len(texts), model.get_embedding_dimension() or 0, device=model.device)
        with torch.inference_mode():
            every[mine] = embed_all(model, texts[mine], task)
        if self.world_size > 1:
            torch.distributed.all_reduce(every)
        vectors: npt.NDArray[np.float32] = every.cpu().numpy()
        return vectors


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
