"""A base model with its adapters, and the prompt prefixes that it has read already.

In: directories. Out: token ids, logits, filled caches. Each row of a forward pass names its adapter's slot: rows of one
adapter take PEFT's usual path, mixed rows its per-row path. Only one thread may call `prefill`, `forward`, `add` and
`drop`.
Not covered: how adapters are loaded (serving/adapters.py), scheduling and sampling (serving/transformers_engine.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers.cache_utils import Cache

from cluster.errors import ArtifactError
from serving.adapters import BASE, AdapterFiles, AdapterSlots, read_adapter
from serving.attention import use_grouped_attention
from serving.kv_batch import KeyValues, KVBatch, common_prefix, key_values_of, prefill
from serving.prompt_tokens import PromptTokens
from training.base_model import load_model, model_dtype
from training.format import Message

Precision = Literal["auto", "float32", "bfloat16"]
MIN_PREFIX_TOKENS = 16
CACHED_PREFIXES = 8


class AdaptedModel:
    """The model side of the engine."""

    def __init__(self, base_directory: Path, precision: Precision, device: str | None = None) -> None:
        """Loads the base model; see `TransformersEngine` for the arguments and errors."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokens = PromptTokens(base_directory)
        base = load_model(base_directory, model_dtype(precision)).to(self.device).eval()
        use_grouped_attention(base)
        config = base.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not layer_types <= {"full_attention", "sliding_attention"}:
            raise ArtifactError(
                f"model.base: {base_directory.name} has layers of type {', '.join(sorted(layer_types))}; "
                "the transformers engine serves models of attention layers only"
            )
        self._dtype = base.dtype
        self._slots = AdapterSlots(base)
        # A sliding window counts columns, holes included, so only models without one may share prefixes.
        self._shares_prefixes = layer_types == {"full_attention"}
        self._prefixes: OrderedDict[tuple[str, tuple[int, ...]], KeyValues] = OrderedDict()
        self._heads: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def tokenise(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt's token ids, and how many of the first do not depend on the last message."""
        ids = self.tokens.encode(messages)
        head = tuple((message["role"], message["content"]) for message in messages[:-1])
        if head not in self._heads:
            if len(self._heads) >= CACHED_PREFIXES:
                self._heads.clear()
            # What stays the same when the last message is another one: two probes, as tokens may join at the border.
            probes = [self.tokens.encode([*messages[:-1], Message(role=messages[-1]["role"], content=c)]) for c in "?A"]
            self._heads[head] = probes[0][: common_prefix(probes)]
        return ids, min(common_prefix([ids, self._heads[head]]), len(ids) - 1)

    def read(self, name: str, directory: Path) -> AdapterFiles:
        """Reads an adapter's files for `add`; on any thread."""
        return read_adapter(name, directory, self.device, self._dtype)

    def add(self, files: AdapterFiles) -> str:
        """Loads an adapter; returns the slot by which rows name it."""
        return self._slots.add(files)

    def drop(self, slot: str) -> None:
        """Frees an adapter that no row uses any more, and what was read with it."""
        self._slots.drop(slot)
        for key in [key for key in self._prefixes if key[0] == slot]:
            del self._prefixes[key]

    def may_mix(self, slot: str | None, other: str | None) -> bool:
        """Whether rows of these two adapters may run in one batch."""
        return self._slots.may_mix(slot, other)

    def prefill(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], shared: int
    ) -> tuple[KVBatch, torch.Tensor]:
        """Reads prompts that have their first `shared` tokens in common; those are read once per adapter, and kept."""
        if not self._shares_prefixes or shared < MIN_PREFIX_TOKENS:
            return prefill(self.forward, prompts, adapters, self.device)
        tokens = tuple(prompts[0][:shared])
        per_row = [self._prefix(adapter, tokens) for adapter in adapters]
        n_layers = len(per_row[0])
        expanded = [
            (torch.cat([row[layer][0] for row in per_row]), torch.cat([row[layer][1] for row in per_row]))
            for layer in range(n_layers)
        ]
        return prefill(self.forward, prompts, adapters, self.device, expanded)

    def _prefix(self, adapter: str | None, tokens: tuple[int, ...]) -> KeyValues:
        key = (adapter or BASE, tokens)
        if key not in self._prefixes:
            batch, _ = prefill(self.forward, [tokens], [adapter], self.device)
            self._prefixes[key] = key_values_of(batch.cache)
            if len(self._prefixes) > CACHED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        adapters: Sequence[str | None],
    ) -> torch.Tensor:
        """Logits of the last column, (rows, vocabulary); appends to `cache`."""
        chosen = self._slots.select(adapters)
        output = self._slots.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **chosen,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
