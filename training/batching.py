"""From samples to training batches: tokens, which of them carry loss, and the order of rows.

In: RAFT or DSF samples, the tokenizer, the prompt format. Out: `TokenRow`s, a deterministic plan of optimiser steps,
and padded batches. Loss stands on target tokens only: never on the prompt, never on padding.
Not covered: the model and the optimiser (training/lora.py). `plan_steps` needs no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.format import PromptFormat
from training.records import RaftSample

if TYPE_CHECKING:
    import torch

# Rows are shuffled, then sorted by length within this many steps' worth of rows: neighbours of like length pad little,
# and the order of steps is shuffled again.
SORT_WINDOW_STEPS = 16


@dataclass(frozen=True)
class TokenRow:
    """One sample as token ids; the last `target_tokens` of `input_ids` carry loss."""

    sample_id: str
    input_ids: tuple[int, ...]
    target_tokens: int


def tokenise(samples: Sequence[RaftSample], tokenizer: Any, prompt_format: PromptFormat) -> list[TokenRow]:
    """Each sample's prompt (through the chat template) followed by its target and the end-of-turn token."""
    end_of_turn = [tokenizer.eos_token_id]
    rows = []
    for sample in samples:
        passages = None if sample.objective == "dsf" else sample.passages
        messages = prompt_format.messages(sample.question, passages)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        target = tokenizer(sample.target, add_special_tokens=False)["input_ids"] + end_of_turn
        rows.append(TokenRow(sample.sample_id, tuple(prompt + target), len(target)))
    return rows


def plan_steps(lengths: Sequence[int], batch_rows: int, epochs: int, seed: int) -> list[list[int]]:
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


def share_of_step(step: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The rows of a step that one worker computes: every `world_size`-th, so that lengths stay balanced."""
    return list(step[rank::world_size])


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


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> Batch:
    """Pads rows to one batch; see `Batch`."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    columns = max(row.target_tokens for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), columns), -100)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.input_ids)
        input_ids[i, width - len(tokens) :] = tokens
        attention_mask[i, width - len(tokens) :] = 1
        labels[i, columns - row.target_tokens :] = tokens[len(tokens) - row.target_tokens :]
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids, attention_mask, position_ids, labels)


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over target tokens of the cross-entropy, in float32: a scalar tensor.

    Logits are computed for the target columns only: a batch of 4 × 640 tokens would otherwise hold 500 MB of them.
    """
    import torch

    columns = batch.labels.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=columns + 1,
        use_cache=False,
    ).logits  # (rows, columns + 1, vocabulary); the last column predicts past the end
    predictions = logits[:, :-1, :].float()
    return torch.nn.functional.cross_entropy(
        predictions.reshape(-1, predictions.shape[-1]), batch.labels.reshape(-1), ignore_index=-100, reduction="sum"
    )
