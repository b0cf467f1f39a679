"""Chat templates for models that bring none: `model.chat_template`.

In: a model directory, `plain` or a Jinja file. Out: a directory in the cache that holds the same model (by links) and
the template, so that training, both engines, vLLM and fingerprints see one model and need not know of the recipe key.
Not covered: what stands in the messages (training/format.py).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.manifest import fingerprint
from cluster.model_source import CONTENT, cache_directory

PLAIN = "plain"
TEMPLATE_FILE = "chat_template.jinja"
_NOTICES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # terms travel with the weights
_PROBE = "rayft?"


def read_template(chat_template: str) -> str:
    """The Jinja text that `model.chat_template` names.

    Raises:
        UserError: The file cannot be read.
    """
    path = Path(__file__).parent / "prompts" / "plain.jinja" if chat_template == PLAIN else Path(chat_template)
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"model.chat_template: cannot read {path}: {error.strerror}; name a Jinja file, or `{PLAIN}`"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"model.chat_template: {path} is not UTF-8 (byte {error.start})") from error


def with_template(directory: Path, chat_template: str) -> Path:
    """A directory in the cache with the model's files and another chat template.

    Args:
        directory: The model.
        chat_template: `plain`, or the path of a Jinja file.

    Raises:
        UserError: The template cannot be read, or does not render a system and a user message.
    """
    template = read_template(chat_template)
    files = model_files(directory)
    key = fingerprint([str(directory.resolve()), sorted(str(file) for file in files), template])
    made = cache_directory() / "models" / f"{directory.name}-{Path(chat_template).stem}-{key[:12]}"
    if (made / TEMPLATE_FILE).is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".template-", dir=made.parent))
    try:
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).symlink_to((directory / file).absolute())
        (partial / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        _refuse_unusable(partial, chat_template)
        try:
            partial.rename(made)
        except OSError:
            if not (made / TEMPLATE_FILE).is_file():  # not merely another process that made the same meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def model_files(directory: Path) -> list[Path]:
    """What makes up a model, relative to its directory: weights, configuration, tokenizer, terms; no chat template."""
    found = {path for pattern in (*CONTENT, *_NOTICES) for path in directory.rglob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in found if path.suffix != ".jinja")


def _refuse_unusable(directory: Path, chat_template: str) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: no tokenizer in {directory}: {str(error).splitlines()[0]}") from error
    messages = [{"role": "system", "content": "system"}, {"role": "user", "content": _PROBE}]
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.chat_template: {chat_template} does not render a system and a user message: {reason}"
        ) from error
    if _PROBE not in shown:
        raise UserError(f"model.chat_template: {chat_template} leaves out what the user says")
