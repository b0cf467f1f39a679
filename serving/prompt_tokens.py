"""Chat messages as the token ids that a base model reads: counted before generation, and read by both engines.

In: a model directory, chat messages. Out: token ids by the model's own chat template and tokenizer, the window, the
tokens that end a turn. One class for the engines and for whoever counts beforehand, so that a prompt that was found to
fit does fit. Reads configuration and tokenizer files, never weights. transformers' tokenizers import torch all the
same: a process that has neither grows by 500 MB, most of it pages that processes share, in 8 s on two busy cores.
Counting takes 1.4 ms for 440 tokens.
Not covered: what stands in the messages (training/format.py), which passages are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cluster.errors import UserError
from training.base_model import load_tokenizer
from training.format import Message


class PromptTokens:
    """The tokenizer side of a base model; may be called from several threads."""

    def __init__(self, base_directory: Path) -> None:
        """Reads the tokenizer and the model's configuration.

        Raises:
            UserError: The directory holds no tokenizer with a chat template, or no configuration.
        """
        from transformers import AutoConfig

        self.tokenizer = load_tokenizer(base_directory)
        try:
            config = AutoConfig.from_pretrained(str(base_directory))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model.base: no configuration in {base_directory}: {str(error).splitlines()[0]}"
            ) from error
        self.window = int(config.get_text_config().max_position_embeddings)
        """Most tokens of prompt and completion together."""
        self.end_tokens = _end_tokens(base_directory, config, self.tokenizer)
        """Every token that ends a turn, as model, generation settings and tokenizer name them."""
        self._lock = threading.Lock()  # transformers' tokenizers set their truncation anew at every call

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that these messages make, the opening of the answer's turn included.

        Raises:
            UserError: The chat template refuses the messages.
        """
        return len(self.encode(messages))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids.

        Raises:
            UserError: The chat template refuses the messages.
        """
        try:
            with self._lock:
                text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses these messages: {error.message}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def too_long(prompt_tokens: int, max_new_tokens: int, window: int) -> str:
    """Why a prompt does not fit, in words; empty where it does."""
    room = window - max_new_tokens
    if prompt_tokens <= room:
        return ""
    return (
        f"the prompt has {prompt_tokens} tokens; beside {max_new_tokens} new tokens the model's window of {window} "
        f"leaves room for {max(room, 0)}"
    )


def _end_tokens(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    named = [config.get_text_config().eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(str(directory)).eos_token_id)
    return frozenset(
        int(token)
        for entry in named
        if entry is not None
        for token in (entry if isinstance(entry, list | tuple) else [entry])
    )
