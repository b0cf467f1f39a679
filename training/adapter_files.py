"""The adapter as files: the directory that plain PEFT loads, and how a worker's files reach the store.

In: adapter weights by parameter name. Out: `adapter_model.safetensors` and `adapter_config.json` where any worker may
write. Not covered: publishing (training/lora.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError

if TYPE_CHECKING:
    import torch


def save_adapter(model: Any, weights: Mapping[str, torch.Tensor], base: str, uri: str) -> None:
    """Writes a PEFT directory.

    Args:
        model: The PEFT model, for its configuration.
        weights: Whole tensors by the parameter's name in `model`.
        base: The base model's name in the recipe.
        uri: Directory, local or in an object store.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), model, state, base)
        copy_directory(folder, uri)


def write_adapter(directory: Path, model: Any, state: Mapping[str, torch.Tensor], base: str) -> None:
    """The two files that plain PEFT loads; the base model goes by its recipe name, not by a path of this machine."""
    from safetensors.torch import save_file

    save_file(dict(state), str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(directory))


def copy_directory(folder: str, uri: str) -> None:
    """Copies a local folder below a directory that any worker can write to.

    Raises:
        UserError: The disk there cannot be written, naming `store.uri`.
    """
    import pyarrow.fs as pafs

    from retrieval.documents import open_filesystem

    filesystem, inner = open_filesystem(uri)
    try:
        filesystem.create_dir(inner, recursive=True)
        pafs.copy_files(folder, inner, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
    except OSError as error:
        if "://" in uri:  # an object store may answer the workers that replace these
            raise
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"store.uri: cannot write {uri}: {reason}; make room, or name another place") from error
