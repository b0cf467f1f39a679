"""LoRA adapters beside one base model, loaded and dropped while it serves.

In: PEFT adapter directories. Out: a model whose rows each name the adapter that they take. Files are read and checked
by `read_adapter` on any thread; `AdapterSlots` changes the model and belongs to the thread that runs it, so loading
costs the running rows only the moment in which modules are wrapped (SmolLM2-135M: 210 of them).
Not covered: which requests use which adapter (serving/transformers_engine.py), vLLM's own adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.errors import ArtifactError

WEIGHTS = "adapter_model.safetensors"
BASE = "__base__"  # PEFT's name for rows without an adapter


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its directory holds it; tensors are on the model's device, floats in its dtype."""

    name: str
    directory: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @property
    def plain(self) -> bool:
        """Whether its rows may share a batch with others': PEFT mixes plain LoRA rows only, and says so at the first
        forward pass, too late."""
        return not (self.config.use_dora or self.config.modules_to_save)


def read_adapter(name: str, directory: Path, device: torch.device, dtype: torch.dtype) -> AdapterFiles:
    """Reads an adapter; safe beside a running model.

    Raises:
        ArtifactError: The directory holds no safetensors LoRA adapter, or a damaged one.
    """
    weights = directory / WEIGHTS
    if not weights.is_file():  # without this check PEFT would unpickle adapter_model.bin
        raise ArtifactError(f"adapter `{name}`: {directory} has no {WEIGHTS}")
    try:
        config = PeftConfig.from_pretrained(str(directory))
        tensors = load_file(str(weights))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"adapter `{name}` in {directory} cannot be read: {first_line(error)}") from error
    if config.peft_type != "LORA":
        raise ArtifactError(
            f"adapter `{name}` in {directory} is of PEFT type {getattr(config.peft_type, 'value', config.peft_type)}; "
            "only LORA is served"
        )
    config.inference_mode = True
    return AdapterFiles(name, directory, config, {key: _placed(found, device, dtype) for key, found in tensors.items()})


def _placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


class AdapterSlots:
    """A base model and the adapters that are loaded beside it. Every load takes a new slot, so that a name that is
    loaded again while rows still use the old one names the new one only."""

    def __init__(self, base: Any) -> None:
        """`base` is a transformers causal LM in evaluation mode."""
        self.model = base
        self._base = base
        self._plain: dict[str, bool] = {}
        self._selected: str | None = None
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Adapters loaded."""
        return len(self._plain)

    def add(self, files: AdapterFiles) -> str:
        """Loads an adapter; returns its slot.

        Raises:
            ArtifactError: It does not fit the base model, which serves on as before.
        """
        slot = f"slot{next(self._numbers)}"  # PEFT's names may not hold dots, nor be parts of its own parameter names
        with torch.inference_mode(False):
            try:
                self._inject(files, slot)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                self._forget(slot)
                raise ArtifactError(
                    f"adapter `{files.name}` in {files.directory} does not fit this base model: {first_line(error)}"
                ) from error
        self._plain[slot] = files.plain
        self._settle()
        return slot

    def _inject(self, files: AdapterFiles, slot: str) -> None:
        if self.model is self._base:
            self.model = PeftModel(self._base, files.config, slot, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        else:
            self.model.add_adapter(slot, files.config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        # On the meta device until here: nothing is initialised that the file's tensors would replace.
        set_peft_model_state_dict(self.model, files.tensors, adapter_name=slot, low_cpu_mem_usage=True)
        differing = set(get_peft_model_state_dict(self.model, adapter_name=slot)) ^ set(files.tensors)
        if differing:
            raise ValueError(f"{len(differing)} tensors differ, such as {min(differing)}")

    def drop(self, slot: str) -> None:
        """Frees an adapter; no row may use it."""
        del self._plain[slot]
        with torch.inference_mode(False):
            self._forget(slot)
        self._settle()

    def _forget(self, slot: str) -> None:
        """Takes a slot out of the model, also one that was injected in part."""
        if not self._plain:  # the last one: the plain base model again
            if self.model is not self._base:
                self.model.unload()
            _unwrap(self._base)
            self.model = self._base
            return
        kept = next(iter(self._plain))
        self.model.base_model.set_adapter(kept, inference_mode=True)  # PEFT warns where the active one goes
        self.model.active_adapter = kept  # PeftModel looks it up at every forward pass
        if slot in self.model.peft_config:
            self.model.delete_adapter(slot)
        for module in self.model.modules():  # PEFT forgets a config that failed, but not the layers made for it
            if isinstance(module, BaseTunerLayer) and slot in module._get_available_adapters():
                module.delete_adapter(slot)
        self._settle()

    def _settle(self) -> None:
        """The state that a change of adapters leaves: none trainable, all layers agreeing that nothing is selected."""
        self._selected = None
        if self._plain:
            self.model.eval()
            self.model.requires_grad_(False)
            self.model.base_model.enable_adapter_layers()

    def may_mix(self, slot: str | None, other: str | None) -> bool:
        """Whether rows of these two adapters may run in one batch; None is the base model."""
        return slot == other or all(self._plain[named] for named in (slot, other) if named is not None)

    def select(self, slots: Sequence[str | None]) -> dict[str, Any]:
        """Makes each row take its adapter; returns the arguments that the forward pass needs for it."""
        if len(set(slots)) > 1:
            if self._selected == BASE:
                self.model.base_model.enable_adapter_layers()
                self._selected = None
            return {"adapter_names": [slot or BASE for slot in slots]}
        slot = slots[0]
        if self._plain and self._selected != (slot or BASE):
            if slot is None:
                self.model.base_model.disable_adapter_layers()
            else:
                self.model.base_model.enable_adapter_layers()
                self.model.base_model.set_adapter(slot, inference_mode=True)
            self._selected = slot or BASE
        return {}


def _unwrap(model: Any) -> None:
    """Puts the original modules back in place of those that PEFT wrapped before it failed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())


def first_line(error: Exception) -> str:
    """An error on one line: the libraries' own fill pages."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
