"""The base model: where it lies, which precision it runs in, and how it is loaded.

In: the recipe's `model` section. Out: a directory of safetensors that transformers, PEFT and vLLM all read.
Not covered: packages that hold models (training/embedded_model.py), chat templates of models without one
(training/chat_template.py), adapters (training/lora.py), generation (serving/).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from cluster.model_source import local_model_directory
from training.chat_template import PLAIN, with_template
from training.config import ModelConfig
from training.embedded_model import embedded_directory

if TYPE_CHECKING:
    import torch

EMBEDDED_PREFIX = "embedded:"


def base_model_directory(config: ModelConfig) -> Path:
    """A local directory with the base model as safetensors and its chat template, made or fetched the first time.

    Raises:
        UserError: The model cannot be found, its licence is not accepted, or `model.chat_template` does not serve.
    """
    if config.base.startswith(EMBEDDED_PREFIX):
        directory = embedded_directory(config.base.removeprefix(EMBEDDED_PREFIX), config.accept_licence)
    else:
        directory = local_model_directory(config.base, config.revision)
    return with_template(directory, config.chat_template) if config.chat_template else directory


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
        raise UserError(
            f"model.base: {directory} has no chat template; set model.chat_template to `{PLAIN}` or a Jinja file, or "
            "name an instruction-tuned model"
        )
    if tokenizer.eos_token is None:
        raise UserError(f"model.base: the tokenizer in {directory} has no end-of-text token, so no answer would end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
