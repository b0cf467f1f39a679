"""A batch of rows that generate together: its key/value cache, mask and positions, as tensors.

In: token rows, a forward function. Out: logits for the next token of every row; rows can join and leave between
steps. Columns are left-padded, and `mask` says which of them are real, so any row may have holes. Not covered: which
rows run and when they end (serving/transformers_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from transformers.cache_utils import Cache, DynamicLayer

GROWTH_TOKENS = 64

# (input_ids, attention_mask, position_ids, cache, row labels) → logits of the last column, (rows, vocabulary)
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache, Sequence[Any]], torch.Tensor]
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # per layer, (rows, kv_heads, tokens, head_dim) each


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with spare columns: appending one token writes one column, where transformers' own layer copies
    everything (368 MB a step for 32 rows of 500 tokens of SmolLM2-135M)."""

    keys: torch.Tensor
    values: torch.Tensor
    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends columns; both (rows, kv_heads, new_tokens, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            self._room = (
                self._grown(self.keys, key_states, held, end),
                self._grown(self.values, value_states, held, end),
            )
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, held:end] = new
        self.keys, self.values = self._room[0][:, :, :end], self._room[1][:, :, :end]
        return self.keys, self.values

    @staticmethod
    def _grown(held_states: torch.Tensor, new: torch.Tensor, held: int, end: int) -> torch.Tensor:
        rows, heads, _, width = new.shape
        room = new.new_empty((rows, heads, end + GROWTH_TOKENS, width))
        if held:
            room[:, :, :held] = held_states
        return room


def cache_of(key_values: KeyValues | None = None) -> Cache:
    """A cache, empty or starting from these keys and values."""
    if key_values is None:
        return Cache(layer_class_to_replicate=RoomyLayer)
    layers = []
    for keys, values in key_values:
        layer = RoomyLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    return Cache(layers=layers)


def key_values_of(cache: Cache) -> KeyValues:
    """The cache's keys and values per layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


@dataclass
class KVBatch:
    """Rows that have been read up to their last token but one.

    `mask` is (rows, columns) int64, `positions` (rows,) the position that each row's next token takes. `labels` go to
    the forward function: the adapter of each row.
    """

    labels: list[Any]
    cache: Cache
    mask: torch.Tensor
    positions: torch.Tensor

    def step(self, forward: Forward, tokens: torch.Tensor) -> torch.Tensor:
        """Reads one token per row, (rows,) int64; returns the logits of the next, (rows, vocabulary)."""
        mask = functional.pad(self.mask, (0, 1), value=1)
        logits = forward(tokens[:, None], mask, self.positions[:, None], self.cache, self.labels)
        self.mask, self.positions = mask, self.positions + 1
        return logits

    def keep(self, rows: Sequence[int]) -> KVBatch:
        """The batch of these rows only, without the columns that none of them uses."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.any(dim=0).int().argmax())
        kept = [(keys[index, :, first:], values[index, :, first:]) for keys, values in key_values_of(self.cache)]
        return KVBatch([self.labels[row] for row in rows], cache_of(kept), mask[:, first:], self.positions[index])

    def joined(self, other: KVBatch) -> KVBatch:
        """Both batches as one, the shorter one padded on the left."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        key_values = []
        for ours, theirs in zip(key_values_of(self.cache), key_values_of(other.cache), strict=True):
            keys, values = (
                torch.cat([functional.pad(part, (0, 0, columns - part.shape[2], 0)) for part in pair])
                for pair in zip(ours, theirs, strict=True)
            )
            key_values.append((keys, values))
        masks = [functional.pad(batch.mask, (columns - batch.mask.shape[1], 0)) for batch in (self, other)]
        return KVBatch(
            self.labels + other.labels,
            cache_of(key_values),
            torch.cat(masks),
            torch.cat([self.positions, other.positions]),
        )


def prefill(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Any],
    device: torch.device,
    prefix: KeyValues | None = None,
) -> tuple[KVBatch, torch.Tensor]:
    """Reads whole prompts: the batch, and the logits of each row's first new token (rows, vocabulary).

    Args:
        forward: Runs the model.
        prompts: Token ids of each row, what `prefix` holds included.
        labels: One per row, for `forward`.
        device: Where the tensors go.
        prefix: Keys and values of tokens that all prompts begin with, one row per prompt.
    """
    known = prefix[0][0].shape[2] if prefix else 0
    rests = [list(prompt[known:]) for prompt in prompts]
    width = max(map(len, rests))
    ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    real = torch.arange(width, device=device)[None, :] >= width - lengths[:, None]
    mask = functional.pad(real.long(), (known, 0), value=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, known:]
    cache = cache_of(prefix)
    logits = forward(ids, mask, positions, cache, labels)
    return KVBatch(list(labels), cache, mask, lengths + known), logits


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # the two furthest apart in order share what all share
    for place, (left, right) in enumerate(zip(first, last, strict=False)):
        if left != right:
            return place
    return min(len(first), len(last))
