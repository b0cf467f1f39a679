"""Validation during training: the loss on rows that never train, a few questions answered, and when to stop.

In: the validation rows of a samples artifact, the model being trained. Out: `Measured`, the same on every worker: mean
loss per target token, the loss of every row, and EM/F1 of greedy answers to `train.probe_rows` of them. Measuring
leaves the model's mode, its gradients and the random state as they were: a run with validations follows the same
curve as one without.
`EarlyStop` decides which state is kept. Not covered: keeping it (training/worker.py).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.base_model import base_model_directory, load_tokenizer
from training.batching import TokenRow, tokenise
from training.config import TrainingRecipe
from training.format import PromptFormat
from training.records import Objective, RaftSample
from training.row_losses import RowLosses, looking_only, measure_rows
from training.text_match import exact_match, f1

if TYPE_CHECKING:
    from cluster.store import Artifact
    from retrieval.records import Question

PROBE_TOKENS = 128
"""Most new tokens of a probe's answer; less where all targets are shorter."""


def validation_steps(steps: int, epochs: int, per_epoch: int) -> tuple[int, ...]:
    """After which optimiser steps (counted from 1) to validate: evenly spread, and always after the last.

    Args:
        steps: Of the whole run.
        epochs: Equally long parts of it.
        per_epoch: Validations in each; 0 validates once, at the end.
    """
    wanted = epochs * per_epoch or 1
    return tuple(sorted({max(1, round(steps * number / wanted)) for number in range(1, wanted + 1)}))


@dataclass(frozen=True)
class EarlyStop:
    """Which state is kept, and when training ends before its time; of numbers only, so that it goes through JSON."""

    patience: int
    """Validations in a row without a lower loss that end training; 0: none do, and the last state is kept."""
    best_step: int = 0
    """Step whose state is kept; 0: none yet."""
    lowest: float | None = None
    """Validation loss at `best_step`."""
    without_gain: int = 0
    """Validations since then."""

    def after(self, step: int, loss: float) -> EarlyStop:
        """What holds after a validation; its `best_step` is `step` where that state is the one to keep."""
        if not self.patience or self.lowest is None or loss < self.lowest:
            return dataclasses.replace(self, best_step=step, lowest=loss, without_gain=0)
        return dataclasses.replace(self, without_gain=self.without_gain + 1)

    @property
    def stopped(self) -> bool:
        """Whether training ends here."""
        return 0 < self.patience <= self.without_gain


@dataclass(frozen=True)
class Measured:
    """One validation; the same on every worker."""

    rows: RowLosses
    exact_match: float | None
    """Of the probe; none where `train.probe_rows` is 0."""
    f1: float | None
    seconds: float
    """The whole validation."""
    probe_seconds: float
    """Its generation."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy per target token."""
        return self.rows.mean

    def figures(self) -> dict[str, float]:
        """For the history and the tracker."""
        found = {"validation_loss": self.loss, "exact_match": self.exact_match, "f1": self.f1}
        return {name: round(value, 5) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ProbeRow:
    """A question to answer: its prompt as token ids, what was shown, what is accepted."""

    prompt: tuple[int, ...]
    sample: RaftSample
    accepted: tuple[str, ...]
    target_tokens: int


class Validator:
    """Measures a model on validation rows, on all workers in lockstep; see the module's text."""

    def __init__(
        self, recipe: TrainingRecipe, rows: Sequence[TokenRow], probe: Sequence[ProbeRow], prompt_format: PromptFormat
    ) -> None:
        assert rows, "a validator needs rows"
        self.recipe = recipe
        self.rows = tuple(rows)
        self.probe = tuple(probe)
        self.prompt_format = prompt_format
        self.tokenizer = load_tokenizer(base_model_directory(recipe.model))

    @classmethod
    def open(
        cls, recipe: TrainingRecipe, samples: Artifact, objective: Objective, prompt_format: PromptFormat
    ) -> Validator | None:
        """The validator of an objective's rows; none where no row validates it, or none fits `train.max_tokens`."""
        from training.samples import load_validation

        tokenizer = load_tokenizer(base_model_directory(recipe.model))
        validation = load_validation(samples, objective)
        tokenised = zip(tokenise(validation, tokenizer, prompt_format), validation, strict=True)
        kept = [(row, sample) for row, sample in tokenised if len(row.input_ids) <= recipe.train.max_tokens]
        if not kept:
            return None
        questions = _questions_of(samples, [sample for _, sample in kept])
        chosen = choose_probe([sample for _, sample in kept], questions, recipe.train.probe_rows, recipe.seed)
        probe = [_probe_row(*kept[place], questions) for place in chosen]
        return cls(recipe, [row for row, _ in kept], probe, prompt_format)

    def measure(self, engine: Any, rank: int, world_size: int) -> Measured:
        """Validates `engine` (DeepSpeed's, or a plain model); all workers must call it.

        The loss is measured on all rows, shared among the workers. The probe is answered by the first worker alone,
        except under ZeRO-3, where no worker has the weights: there all generate the same answers together.
        """
        model = getattr(engine, "module", engine)
        began = time.monotonic()
        losses = self.losses(model, rank, world_size)
        measured_at = time.monotonic()
        scores = self._answer(model, rank, world_size) if self.probe else None
        now = time.monotonic()
        return Measured(
            rows=losses,
            exact_match=scores and scores[0],
            f1=scores and scores[1],
            seconds=now - began,
            probe_seconds=now - measured_at,
        )

    def losses(self, model: Any, rank: int, world_size: int) -> RowLosses:
        """The loss of every validation row."""
        pad, budget = self.tokenizer.pad_token_id, self.recipe.train.micro_batch_tokens
        return measure_rows(model, self.rows, pad, budget, rank, world_size)

    def _answer(self, model: Any, rank: int, world_size: int) -> tuple[float, float]:
        """Mean EM and F1 of the probe's greedy answers."""
        import torch

        together = self.recipe.train.zero_stage == 3 and world_size > 1
        scores = torch.zeros(2, dtype=torch.float64)
        if rank == 0 or together:
            scores = torch.tensor(self._score(self._generate(model, together)), dtype=torch.float64)
        if world_size > 1:
            scores = scores.to(next(model.parameters()).device)
            torch.distributed.broadcast(scores, src=0)
        exact, overlap = scores.tolist()
        return exact, overlap

    def _score(self, completions: Sequence[str]) -> tuple[float, float]:
        exact = overlap = 0.0
        for row, completion in zip(self.probe, completions, strict=True):
            answer = self.prompt_format.parse(completion, row.sample.passages).answer
            exact += exact_match(answer, row.accepted, self.recipe.language)
            overlap += f1(answer, row.accepted, self.recipe.language)
        return exact / len(self.probe), overlap / len(self.probe)

    def _generate(self, model: Any, together: bool) -> list[str]:
        """Greedy completions of the probe, in batches of the micro-batch's size."""
        import torch
        from transformers import GenerationConfig

        longest = min(PROBE_TOKENS, max(row.target_tokens for row in self.probe) + 8)
        greedy = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        device = next(model.parameters()).device
        width = max(len(row.prompt) for row in self.probe)
        at_once = max(1, self.recipe.train.micro_batch_tokens // (width + longest))
        completions: list[str] = []
        with looking_only(model):
            for start in range(0, len(self.probe), at_once):
                prompts = [row.prompt for row in self.probe[start : start + at_once]]
                ids = torch.tensor([_left_padded(prompt, width, self.tokenizer.pad_token_id) for prompt in prompts])
                mask = torch.tensor([_left_padded([1] * len(prompt), width, 0) for prompt in prompts])
                written = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=greedy,
                    synced_gpus=together,
                )
                completions += self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return completions


def _questions_of(samples: Artifact, rows: Sequence[RaftSample]) -> dict[str, Question]:
    """The questions of some rows by id; no worker holds all those of the set."""
    import pyarrow.parquet as pq

    from retrieval.records import Question

    wanted = {row.question_id for row in rows}
    found = pq.read_table(samples.path("questions.parquet"), filters=[("question_id", "in", wanted)])
    return {question.question_id: question for question in map(Question.from_row, found.to_pylist())}


def _left_padded(ids: Sequence[int], width: int, filling: int) -> list[int]:
    return [filling] * (width - len(ids)) + list(ids)


def _probe_row(row: TokenRow, sample: RaftSample, questions: Mapping[str, Question]) -> ProbeRow:
    question = questions.get(sample.question_id)
    accepted = tuple(question.answers) if question is not None and question.answers else (sample.answer,)
    ids = tuple(int(token) for token in row.input_ids)
    return ProbeRow(ids[: len(ids) - row.target_tokens], sample, accepted, row.target_tokens)


def choose_probe(samples: Sequence[RaftSample], questions: Mapping[str, Question], count: int, seed: int) -> list[int]:
    """Places of the rows to answer, in order: the golden passage is shown (or none is, closed book), kinds alternate.

    Args:
        samples: Validation rows of one objective.
        questions: By id; their `metadata.kind` tells the kind.
        count: Most rows.
        seed: Of the order within a kind.
    """
    answerable = [i for i, row in enumerate(samples) if row.golden_present or row.objective == "dsf"]
    random.Random(f"probe/{seed}").shuffle(answerable)
    seen: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []
    for order, place in enumerate(answerable):
        question = questions.get(samples[place].question_id)
        kind = str(question.metadata.get("kind", "")) if question is not None else ""
        seen[kind] = seen.get(kind, 0) + 1
        turns.append((seen[kind], order, place))
    return sorted(place for _, _, place in sorted(turns)[:count])
