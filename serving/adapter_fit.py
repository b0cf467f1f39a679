"""Whether a LoRA adapter's tensors fit a base model's, told from the files' headers alone.

In: an adapter directory, a base model directory. Out: the adapter's rank, or an error that names the first tensor that
does not fit. Reads no weights and imports no torch: vLLM finds out only in the middle of a batch.
Not covered: DoRA and trained copies of whole modules, which vLLM refuses itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.errors import ArtifactError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def check_adapter(name: str, adapter: Path, base: Path) -> int:
    """The adapter's largest rank.

    Raises:
        ArtifactError: The directory holds no LoRA adapter, or it does not fit the base model.
    """
    config = _config(name, adapter)
    if config.get("peft_type") != "LORA":
        raise ArtifactError(
            f"adapter `{name}` in {adapter} is of PEFT type {config.get('peft_type')}; only LORA is served"
        )
    modules = _shapes(base)
    for tensor, shape in _adapter_shapes(name, adapter).items():
        found = _LORA.fullmatch(tensor)
        if found is None:
            continue
        module = modules.get(f"{found[1]}.weight")
        if module is None and not any(
            key.startswith(f"{found[1]}.") for key in modules
        ):  # quantised ones have no weight
            raise ArtifactError(
                f"adapter `{name}` in {adapter} does not fit this base model: it has no module {found[1]}"
            )
        if module is not None:
            ours, theirs = (shape[1], module[1]) if found[2] == "A" else (shape[0], module[0])
            if ours != theirs:
                raise ArtifactError(
                    f"adapter `{name}` in {adapter} does not fit this base model: {tensor} is for a module of width "
                    f"{ours}, the base model's has {theirs}"
                )
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _config(name: str, adapter: Path) -> dict[str, Any]:
    if not (adapter / ADAPTER_WEIGHTS).is_file():  # without this check an engine may unpickle adapter_model.bin
        raise ArtifactError(f"adapter `{name}`: {adapter} has no {ADAPTER_WEIGHTS}")
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"adapter `{name}` in {adapter} cannot be read: {type(error).__name__}: {error}") from error
    return dict(config)


def _adapter_shapes(name: str, adapter: Path) -> dict[str, list[int]]:
    try:
        return _header(adapter / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"adapter `{name}` in {adapter} cannot be read: {type(error).__name__}: {error}") from error


def _shapes(base: Path) -> dict[str, list[int]]:
    """Every tensor of a model directory and its shape."""
    return {name: shape for file in sorted(base.glob("*.safetensors")) for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, list[int]]:
    with safe_open(str(file), framework="np") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
