"""`rayft train merge`: one adapter added into the base model's weights, for servers that take no adapters.

In: the recipe's base model and an adapter artifact that was trained on it. Out: a directory that transformers and vLLM
load as any model: safetensors (in shards above 5 GB), configuration, generation settings, tokenizer with chat template,
the terms that came with the base model, and `rayft.json`, which says what it was made of.
Not covered: serving it, quantised base models.
"""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, UserError
from cluster.manifest import package_versions
from cluster.model_source import model_digest
from cluster.progress import describe_bytes, say
from cluster.releases import open_release
from training.base_model import base_model_directory, load_model
from training.chat_template import TEMPLATE_FILE, model_files
from training.lora import ROLES

if TYPE_CHECKING:
    import torch

    from cluster.store import Artifact, Store
    from training.config import TrainingRecipe
    from training.records import Objective

LINEAGE = "rayft.json"
SHARD_SIZE = "5GB"
PROBE_SHAPE = (2, 48)  # rows, tokens
# Written by transformers itself, from the merged model.
_REPLACED = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Agreement:
    """How the merged model's logits compare with those of base and adapter, on random tokens in one precision."""

    max_difference: float
    """Largest absolute difference of a logit."""
    logit_range: float
    """Highest minus lowest logit of base and adapter: what the difference is small or large against."""
    same_best_token: float
    """Share of positions with the same best token."""


def merge(recipe: TrainingRecipe, adapter: Artifact, out: Path) -> Agreement:
    """Writes the merged model to `out`, whole or not at all.

    Args:
        recipe: Its model section; `precision: auto` keeps the precision of the base model's own files.
        adapter: An `adapter` artifact.
        out: A directory that does not exist or is empty.

    Raises:
        UserError: `out` is taken or cannot be written, or the adapter cannot be merged.
        ArtifactError: The adapter was trained on another base model, or is damaged.
    """
    _refuse_taken(out)
    base = base_model_directory(recipe.model)
    digest = model_digest(base)
    trained_on = adapter.manifest.config.get("base_digest")
    if trained_on != digest:
        raise ArtifactError(
            f"{adapter.ref} was trained on the base model {str(trained_on)[:12]}, but model.base {recipe.model.base} "
            f"is {digest[:12]}; name the base model that it was trained on"
        )
    say(f"merge: {adapter.ref} into {recipe.model.base}")
    model, agreement = _merged(base, adapter.directory(), _dtype(recipe, base))
    if agreement.max_difference > 0.05 * agreement.logit_range:
        raise UserError(
            f"merge: the merged model's logits differ by {agreement.max_difference:.3g} (of a range of "
            f"{agreement.logit_range:.3g}) from those of base and adapter; set model.precision to float32"
        )
    lineage = _lineage(recipe, adapter, digest, model, agreement)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _write(partial, base, model, lineage)
            partial.chmod(0o755)
            partial.rename(out)  # onto an empty directory too
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from error
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(
        f"merge: {out} holds {describe_bytes(size)} in {lineage['precision']}; logits differ by at most "
        f"{agreement.max_difference:.2g} of a range of {agreement.logit_range:.3g} from base and adapter's, the best "
        f"token is the same at {agreement.same_best_token:.1%} of places"
    )
    return agreement


def chosen_adapter(recipe: TrainingRecipe, store: Store, objective: Objective, release: str | None) -> Artifact:
    """The adapter of an objective: the one that a release pins, or the current one.

    Raises:
        ArtifactError: There is no such release or adapter.
    """
    role = ROLES[objective]
    if release is None:
        return store.open("adapter", f"{recipe.name}-{role}")
    pinned = open_release(store, recipe.name, release)
    if role not in pinned.adapters:
        raise ArtifactError(f"{pinned.ref} has no {role} adapter; it has {', '.join(pinned.adapters) or 'none'}")
    return store.open_ref(pinned.adapters[role])


def _refuse_taken(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"--out: {out} is not empty; name a new directory")
    elif out.exists():
        raise UserError(f"--out: {out} is a file; name a new directory")


def _dtype(recipe: TrainingRecipe, base: Path) -> torch.dtype:
    import torch
    from transformers import AutoConfig

    if recipe.model.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.model.precision]
    stored = AutoConfig.from_pretrained(str(base)).get_text_config().dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _merged(base: Path, adapter: Path, dtype: torch.dtype) -> tuple[Any, Agreement]:
    import torch
    from peft import PeftModel

    model = load_model(base, dtype)
    _refuse_tied(model, adapter)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, PROBE_SHAPE, generator=generator)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{adapter} does not fit {base.name}: {str(error).strip().splitlines()[0]}") from error
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits.float()
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # weights that are not finite
        raise ArtifactError(f"{adapter} cannot be merged: {str(error).strip().splitlines()[0]}") from error
    with torch.inference_mode():
        found = merged(input_ids=ids).logits.float()
    return merged, Agreement(
        max_difference=float((found - expected).abs().max()),
        logit_range=float(expected.max() - expected.min()),
        same_best_token=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def _refuse_tied(model: Any, adapter: Path) -> None:
    """Merging into the head of a model that shares its weights with the embeddings would change both."""
    from safetensors import SafetensorError, safe_open

    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    try:
        with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as stored:
            names = [name for name in stored.keys() if "lm_head" in name or "embed_tokens" in name]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{adapter} holds no adapter weights: {str(error).splitlines()[0]}") from error
    if names:
        raise UserError(
            f"merge: the adapter changes {names[0].rsplit('.lora', 1)[0]}, which this base model uses both as "
            "embeddings and as head; train with lora.target_modules: all-linear, or serve the adapter beside the base"
        )


def _lineage(
    recipe: TrainingRecipe, adapter: Artifact, digest: str, model: Any, agreement: Agreement
) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "made_by": "rayft train merge",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "adapter": str(adapter.ref),
        "adapter_manifest_sha256": adapter.manifest_sha256,
        "parents": manifest.parents,
        "base": recipe.model.base,
        "base_digest": digest,
        "prompt_format": manifest.config.get("prompt_format"),
        "lora": manifest.config.get("lora"),
        "precision": str(model.dtype).removeprefix("torch."),
        "logits": asdict(agreement),
        "packages": package_versions(),
    }


def _write(directory: Path, base: Path, model: Any, lineage: dict[str, Any]) -> None:
    model.save_pretrained(str(directory), max_shard_size=SHARD_SIZE)
    kept = [
        file
        for file in model_files(base)
        if file.suffix not in (".safetensors", ".gguf") and file.name not in _REPLACED and len(file.parts) == 1
    ]
    for file in [*kept, *([Path(TEMPLATE_FILE)] if (base / TEMPLATE_FILE).is_file() else [])]:
        shutil.copyfile(base / file, directory / file)
    (directory / LINEAGE).write_text(json.dumps(lineage, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
