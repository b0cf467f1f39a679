"""A base model with its adapters, its tokenizer, and the prompt prefixes that it has read already.

In: directories. Out: token ids, logits, filled caches. Each row of a forward pass names its adapter: rows of one
adapter take PEFT's usual path, mixed rows its per-row path. Only one thread may call `prefill` and `forward`.
Not covered: scheduling and sampling (serving/transformers_engine.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers.cache_utils import Cache

from cluster.errors import ArtifactError
from serving.attention import use_grouped_attention
from serving.kv_batch import KeyValues, KVBatch, common_prefix, key_values_of, prefill
from training.base_model import load_model, load_tokenizer, model_dtype
from training.format import Message

Precision = Literal["auto", "float32", "bfloat16"]
BASE = "__base__"  # PEFT's name for rows without an adapter
MIN_PREFIX_TOKENS = 16
CACHED_PREFIXES = 8


class AdaptedModel:
    """The model side of the engine."""

    def __init__(
        self, base_directory: Path, adapters: Mapping[str, Path], precision: Precision, device: str | None = None
    ) -> None:
        """Loads everything; see `TransformersEngine` for the arguments and errors."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = load_tokenizer(base_directory)
        base = load_model(base_directory, model_dtype(precision)).to(self.device).eval()
        use_grouped_attention(base)
        config = base.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not layer_types <= {"full_attention", "sliding_attention"}:
            raise ArtifactError(
                f"model.base: {base_directory.name} has layers of type {', '.join(sorted(layer_types))}; "
                "the transformers engine serves models of attention layers only"
            )
        self.window = int(config.max_position_embeddings)
        self.end_tokens = _end_tokens(base, self.tokenizer)
        self.adapters = tuple(adapters)
        self._model, self._may_mix = _with_adapters(base, adapters)
        self._selected: str | None = None
        # A sliding window counts columns, holes included, so only models without one may share prefixes.
        self._shares_prefixes = layer_types == {"full_attention"}
        self._prefixes: OrderedDict[tuple[str, tuple[int, ...]], KeyValues] = OrderedDict()
        self._heads: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def tokenise(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt's token ids, and how many of the first do not depend on the last message."""
        ids = self._encode(messages)
        head = tuple((message["role"], message["content"]) for message in messages[:-1])
        if head not in self._heads:
            if len(self._heads) >= CACHED_PREFIXES:
                self._heads.clear()
            # What stays the same when the last message is another one: two probes, as tokens may join at the border.
            probes = [self._encode([*messages[:-1], Message(role=messages[-1]["role"], content=c)]) for c in "?A"]
            self._heads[head] = probes[0][: common_prefix(probes)]
        return ids, min(common_prefix([ids, self._heads[head]]), len(ids) - 1)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def may_mix(self, adapter: str | None, other: str | None) -> bool:
        """Whether rows of these two adapters may run in one batch."""
        return self._may_mix or adapter == other

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
        mixed: dict[str, Any] = {}
        if len(set(adapters)) > 1:
            self._enable(True)
            mixed["adapter_names"] = [adapter or BASE for adapter in adapters]
        else:
            self._select(adapters[0])
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **mixed,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _select(self, adapter: str | None) -> None:
        """Makes one adapter (or none) apply to all rows; only the owning thread may."""
        if not self.adapters or self._selected == (adapter or BASE):
            return
        self._enable(adapter is not None)
        if adapter is not None:
            self._model.base_model.set_adapter(adapter, inference_mode=True)
        self._selected = adapter or BASE

    def _enable(self, enabled: bool) -> None:
        if self._selected == BASE and enabled:
            self._model.base_model.enable_adapter_layers()
            self._selected = None
        elif not enabled:
            self._model.base_model.disable_adapter_layers()


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn, as model, generation settings and tokenizer name them."""
    named = [model.config.eos_token_id, tokenizer.eos_token_id]
    if model.generation_config is not None:
        named.append(model.generation_config.eos_token_id)
    return frozenset(
        int(token)
        for entry in named
        if entry is not None
        for token in (entry if isinstance(entry, list | tuple) else [entry])
    )


def _with_adapters(base: Any, adapters: Mapping[str, Path]) -> tuple[Any, bool]:
    """The model with all adapters loaded side by side, and whether their rows may mix in one batch.

    Raises:
        ArtifactError: A directory holds no safetensors adapter, or its weights are not those its config promises.
    """
    model = base
    may_mix = True
    for name, directory in adapters.items():
        weights = directory / "adapter_model.safetensors"
        if not weights.is_file():  # without this check PEFT would unpickle adapter_model.bin
            raise ArtifactError(f"adapter `{name}`: {directory} has no adapter_model.safetensors")
        try:
            config = PeftConfig.from_pretrained(str(directory))
            # PEFT mixes plain LoRA rows only (and says so at the first forward pass, too late).
            may_mix = may_mix and config.peft_type == "LORA" and not config.use_dora and not config.modules_to_save
            if model is base:
                model = PeftModel.from_pretrained(base, str(directory), adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(str(directory), adapter_name=name, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"adapter `{name}` in {directory} does not fit this base model: {first_line}"
            ) from error
        with safe_open(str(weights), framework="pt") as stored:
            missing = set(get_peft_model_state_dict(model, adapter_name=name)) ^ set(stored.keys())
        if missing:
            raise ArtifactError(
                f"adapter `{name}` in {directory} does not fit this base model: {len(missing)} tensors differ, "
                f"such as {min(missing)}"
            )
    if model is not base:
        model.eval()
        model.requires_grad_(False)
    return model, may_mix
