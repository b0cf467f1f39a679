"""Losses row by row, and whether one model's are really higher than another's on the same rows.

In: a model (or what DeepSpeed made of it), token rows, this worker's number. Out: `RowLosses`, the same on every
worker and whatever their number, and `difference` with a paired bootstrap interval.
Used by validation during training (training/validation.py) and by the checks at its end (training/final_checks.py).
Not covered: the training loss (training/batching.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from training.batching import Batch, TokenRow

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class RowLosses:
    """Summed cross-entropy and number of target tokens of each row."""

    sample_ids: tuple[str, ...]
    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean cross-entropy per target token over all rows."""
        return math.fsum(self.sums) / sum(self.tokens)

    def only(self, places: Sequence[int]) -> RowLosses:
        """Those of some rows."""
        return RowLosses(
            tuple(self.sample_ids[i] for i in places),
            tuple(self.sums[i] for i in places),
            tuple(self.tokens[i] for i in places),
        )


@dataclass(frozen=True)
class Difference:
    """How much higher the mean loss per target token is, with its 95% interval and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def figures(self) -> dict[str, float]:
        """For a manifest."""
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4), "n": self.n}


def difference(of: RowLosses, against: RowLosses, seed: int) -> Difference:
    """`of.mean - against.mean` on the same rows, with the percentile interval of a bootstrap over rows.

    The rows are drawn together with their token counts (a ratio of sums), and both sides of a row together (paired).
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13.
    """
    import numpy as np

    same = (of.sample_ids, of.tokens) == (against.sample_ids, against.tokens)
    assert same, "losses of different rows cannot be compared"
    higher = np.subtract(of.sums, against.sums)  # (n,) float64
    tokens = np.asarray(of.tokens, dtype=np.float64)
    n = len(tokens)
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(n, size=n) for _ in range(RESAMPLES))
    means = np.array([higher[rows].sum() / tokens[rows].sum() for rows in drawn])
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(float(higher.sum() / tokens.sum()), float(low), float(high), n)


@contextmanager
def looking_only(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, for the time of the block; modes and random state are as before after it.

    Not `inference_mode`: what ZeRO-3 gathers in it could not be used in a backward pass any more.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, was in modes:
                module.training = was


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows by falling length, cut where padding them to one width would pass `budget` tokens; a longer row is alone.

    The same whatever the number of workers, so that no row's loss depends on it (bfloat16 rounds by batch).
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def measure_rows(
    model: Any, rows: Sequence[TokenRow], pad_token_id: int, budget: int, rank: int, world_size: int
) -> RowLosses:
    """The loss of every row; each worker computes every `world_size`-th batch, and all get all.

    Args:
        model: On its device; under ZeRO-3 every forward is shared, so that all workers compute equally many batches.
        rows: The same on every worker.
        pad_token_id: Of the tokenizer.
        budget: Most tokens of a batch, padding included.
        rank: This worker's number, from 0.
        world_size: Number of workers.
    """
    import torch

    from training.batching import collate

    device = next(model.parameters()).device
    batches = plan_batches([len(row.input_ids) for row in rows], budget)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with looking_only(model):
        for first in range(0, len(batches), world_size):
            mine = first + rank
            # A worker without a batch left computes a filler, because the others wait for it.
            places = batches[mine] if mine < len(batches) else []
            losses = _losses_of_rows(model, collate([rows[i] for i in places], pad_token_id).to(device))
            if places:
                sums[places] = losses.double().cpu()
    if world_size > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)  # every row was computed once: a sum with zeros, and exact
    ids, tokens = tuple(row.sample_id for row in rows), tuple(row.target_tokens for row in rows)
    return RowLosses(ids, tuple(sums.tolist()), tokens)


def _losses_of_rows(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each row, summed over its target tokens: (rows,) float32."""
    import torch

    from training.batching import IGNORED, target_logits

    logits = target_logits(model, batch)
    # Only where there is a label: of 40 short rows that is a tenth of the columns, and of the float32 logits.
    labelled = batch.labels != IGNORED
    losses = torch.zeros(batch.labels.shape, device=batch.labels.device)
    losses[labelled] = torch.nn.functional.cross_entropy(
        logits[labelled].float(), batch.labels[labelled], reduction="none"
    )
    return losses.sum(dim=1)
