"""From samples to training batches: tokens, which of them carry loss, the order of rows, micro-batches.

In: RAFT or DSF samples, the tokenizer, the prompt format. Out: `TokenRow`s, a deterministic plan of optimiser steps,
each worker's micro-batches of a step, and padded or packed batches with their loss. Loss stands on target tokens only:
never on the prompt, never on padding, and no token sees another sample's.
A step's rows do not depend on the workers, the token budget or packing: those only say who computes what at once.
Not covered: the model and the optimiser (training/worker.py), where rows lie (training/token_rows.py). The plan needs
no torch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from training.format import PromptFormat
from training.records import RaftSample

if TYPE_CHECKING:
    import numpy as np
    import torch

Packing = Literal["none", "best_fit"]

# Rows are shuffled, then sorted by length within this many steps' worth of rows: neighbours of like length pad little,
# and the order of steps is shuffled again.
SORT_WINDOW_STEPS = 16
# Most padding that a micro-batch of padded rows may hold; rows that would need more are computed apart.
PADDING_SHARE = 0.05
FILLER_TOKENS = 2
IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """One sample as token ids; the last `target_tokens` of `input_ids` carry loss."""

    sample_id: str
    input_ids: tuple[int, ...]
    target_tokens: int


def tokenise(samples: Sequence[RaftSample], tokenizer: Any, prompt_format: PromptFormat) -> list[TokenRow]:
    """Each sample's prompt (through the chat template) followed by its target and the end-of-turn token."""
    if not samples:
        return []
    texts = []
    for sample in samples:
        passages = None if sample.objective == "dsf" else sample.passages
        messages = prompt_format.messages(sample.question, passages)
        texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    targets = tokenizer([sample.target for sample in samples], add_special_tokens=False)["input_ids"]
    end_of_turn = [tokenizer.eos_token_id]
    return [
        TokenRow(sample.sample_id, tuple(prompt + target + end_of_turn), len(target) + 1)
        for sample, prompt, target in zip(samples, prompts, targets, strict=True)
    ]


def plan_steps(lengths: Sequence[int] | np.ndarray, batch_rows: int, epochs: int, seed: int) -> list[list[int]]:
    """Row indices of every optimiser step, in order; the same arguments give the same plan on every worker.

    Args:
        lengths: Tokens of each row.
        batch_rows: Rows per step; the last step of an epoch may be smaller.
        epochs: Passes over the rows, each in another order.
        seed: Seed of the orders.

    Returns:
        A list of steps; each row stands in exactly one step of each epoch.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        window = batch_rows * SORT_WINDOW_STEPS
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: lengths[row])
            batches += [rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
        rng.shuffle(batches)
        steps += batches
    return steps


def micro_batches(
    step: Sequence[int],
    lengths: Sequence[int] | np.ndarray,
    rank: int,
    world_size: int,
    budget: int,
    packing: Packing = "none",
) -> list[list[int]]:
    """What one worker computes of a step, cut into what it computes at once.

    Args:
        step: Rows of the step.
        lengths: Tokens of every row.
        rank: This worker's number, from 0.
        world_size: Number of workers.
        budget: Most tokens of a micro-batch, padding included. A row that alone has more is a micro-batch of its own.
        packing: `none`: rows of a micro-batch are padded to one width, with at most 5% of padding; `best_fit`: they
            are laid end to end.

    Returns:
        Rows of each micro-batch: together with the other workers' they are the step's rows. Every worker gets the same
        number, because each forward pass may be a collective operation; `[]` fills up where there are no rows left.
    """
    cut = _pack if packing == "best_fit" else _pad
    cuts = [cut(share, lengths, budget) for share in _shares(step, lengths, world_size)]
    filler: list[list[int]] = [[]] * (max(map(len, cuts)) - len(cuts[rank]))
    return cuts[rank] + filler


def _shares(step: Sequence[int], lengths: Sequence[int] | np.ndarray, world_size: int) -> list[list[int]]:
    """The step's rows, longest first, each given to the worker with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for row in sorted(step, key=lambda row: (-int(lengths[row]), row)):
        lightest = min(range(world_size), key=lambda worker: (tokens[worker], worker))
        shares[lightest].append(row)
        tokens[lightest] += int(lengths[row])
    return shares


def _pad(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Rows, longest first, cut into the fewest micro-batches of little padding, and of those into the least padded."""
    sizes = [int(lengths[row]) for row in rows]
    best = [(0, 0, 0)]  # of the first n rows: micro-batches, tokens computed, where the last micro-batch begins
    for end in range(1, len(rows) + 1):
        options = []
        used = 0
        for start in range(end - 1, -1, -1):
            used += sizes[start]
            padded = sizes[start] * (end - start)
            if end - start > 1 and padded > budget:
                break
            if padded - used <= PADDING_SHARE * padded:
                options.append((best[start][0] + 1, best[start][1] + padded, start))
        best.append(min(options))
    cuts: list[list[int]] = []
    end = len(rows)
    while end:
        start = best[end][2]
        cuts.insert(0, list(rows[start:end]))
        end = start
    return cuts


def _pack(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Best-fit decreasing: each row, longest first, goes where it leaves the least room."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for row in rows:
        size = int(lengths[row])
        fitting = [pack for pack, room in enumerate(rooms) if room >= size]
        if fitting:
            pack = min(fitting, key=lambda pack: (rooms[pack], pack))
            packs[pack].append(row)
            rooms[pack] -= size
        else:
            packs.append([row])
            rooms.append(budget - size)
    return packs


@dataclass(frozen=True)
class Batch:
    """Left-padded rows: targets end at the right edge, so that logits are needed for the last columns only.

    `input_ids`, `attention_mask`, `position_ids`: `(rows, tokens) int64`. `labels`: `(rows, target_columns) int64`,
    the tokens that the last `target_columns` predictions should give, -100 where there is none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens computed, padding included."""
        return int(self.input_ids.numel())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid end to end. Positions restart with every sample: with no attention mask given, transformers takes
    that for the border that attention must not cross, in masks (sdpa, eager, flex) and in varlen kernels (flash) alike.

    `input_ids`, `position_ids`: `(1, tokens) int64`. `predictors`: `(targets,) int64`, the places whose logits are
    needed. `labels`: `(targets,) int64`, the token that each should give; -100 in a filler.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens computed; there is no padding."""
        return int(self.input_ids.numel())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device."""
        return PackedBatch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def make_batch(rows: Sequence[TokenRow], pad_token_id: int, packing: Packing = "none") -> Batch | PackedBatch:
    """The batch of a micro-batch. Of no rows it is a filler of two tokens without a label, whose loss is 0: for a
    worker that must take part in a collective forward and backward pass though it has no row left."""
    return collate_packed(rows, pad_token_id) if packing == "best_fit" else collate(rows, pad_token_id)


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> Batch:
    """Pads rows to one batch; see `Batch` and `make_batch`."""
    import torch

    if not rows:
        ids = torch.full((1, FILLER_TOKENS), pad_token_id)
        return Batch(ids, torch.ones_like(ids), torch.arange(FILLER_TOKENS)[None], torch.tensor([[IGNORED]]))
    width = max(len(row.input_ids) for row in rows)
    columns = max(row.target_tokens for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), columns), IGNORED)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.input_ids)
        input_ids[i, width - len(tokens) :] = tokens
        attention_mask[i, width - len(tokens) :] = 1
        labels[i, columns - row.target_tokens :] = tokens[len(tokens) - row.target_tokens :]
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids, attention_mask, position_ids, labels)


def collate_packed(rows: Sequence[TokenRow], pad_token_id: int) -> PackedBatch:
    """Lays rows end to end; see `PackedBatch` and `make_batch`."""
    import torch

    if not rows:
        ids = torch.full((1, FILLER_TOKENS), pad_token_id)
        return PackedBatch(ids, torch.arange(FILLER_TOKENS)[None], torch.tensor([0]), torch.tensor([IGNORED]))
    tokens = torch.tensor([token for row in rows for token in row.input_ids])
    positions = torch.cat([torch.arange(len(row.input_ids)) for row in rows])
    predictors, end = [], 0
    for row in rows:
        end += len(row.input_ids)
        predictors.append(torch.arange(end - row.target_tokens - 1, end - 1))
    places = torch.cat(predictors)
    return PackedBatch(tokens[None], positions[None], places, tokens[places + 1])


def target_logits(model: Any, batch: Batch | PackedBatch) -> torch.Tensor:
    """What the model predicts where there is a label, and there only (of a padded batch: in the columns that hold
    one): a batch of 4 × 640 tokens would otherwise hold 500 MB of logits.

    Returns:
        (rows, target columns, vocabulary) of a padded batch, (1, targets, vocabulary) of a packed one.
    """
    shared = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if isinstance(batch, PackedBatch):
        packed: torch.Tensor = model(**shared, attention_mask=None, logits_to_keep=batch.predictors).logits
        return packed
    columns = batch.labels.shape[1]
    padded: torch.Tensor = model(**shared, attention_mask=batch.attention_mask, logits_to_keep=columns + 1).logits
    return padded[:, :-1]  # the last column predicts past the end


def summed_loss(model: Any, batch: Batch | PackedBatch) -> torch.Tensor:
    """Sum over target tokens of the cross-entropy, in float32: a scalar tensor, 0 for a filler."""
    import torch

    logits = target_logits(model, batch)
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), batch.labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
