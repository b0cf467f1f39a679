"""The intent classifier: one linear layer over a query embedding or over character n-grams, with a temperature.

In: weights that training/router.py fitted, texts and their embeddings. Out: probabilities by intent, and the likeliest
one with its calibrated confidence. Stored as safetensors and JSON; nothing is unpickled. Imports numpy alone, so that
ingress classifies without scikit-learn or torch. Not covered: fitting (training/router_fit.py), routing
(serving/router.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ArtifactError
from training.ngrams import count_ngrams, weigh

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

WEIGHTS, DESCRIPTION = "weights.safetensors", "router.json"
FORMAT = 1

Features = Literal["embedding", "ngrams"]


@dataclass(frozen=True)
class IntentModel:
    """A fitted classifier."""

    labels: tuple[str, ...]
    """Intents in the order of the weights' columns, the out-of-scope one included."""
    out_of_scope: str
    """The label of what belongs to no intent; empty where no such utterance was there to learn from."""
    features: Features
    weights: Floats
    """(features, labels) float32."""
    bias: Floats
    """(labels,) float32."""
    temperature: float = 1.0
    """Divides the scores, so that confidences are frequencies (Guo et al. 2017)."""
    threshold: float = 0.0
    """Confidence below which an intent counts as unknown."""
    hashes: npt.NDArray[np.int64] | None = None
    """N-grams: (features,) int64, ascending."""
    idf: Floats | None = None
    """N-grams: (features,) float32."""
    encoder: str = ""
    """Embeddings: the name of the encoder that they come from."""
    encoder_digest: str = ""
    """Embeddings: its content digest."""

    def scores(self, texts: Sequence[str], embeddings: Floats | None) -> Floats:
        """Scores before the temperature, (n, labels) float32; `embeddings` are (n, dim) float32."""
        import numpy as np

        if self.features == "embedding":
            assert embeddings is not None, "this classifier reads embeddings"
            if embeddings.shape[1:] != self.weights.shape[:1]:
                raise ArtifactError(
                    f"the router reads embeddings of {self.weights.shape[0]} dimensions ({self.encoder}), found "
                    f"{embeddings.shape[-1]}: run `rayft train router RECIPE`"
                )
            return embeddings.astype(np.float32) @ self.weights + self.bias
        assert self.hashes is not None and self.idf is not None, "n-grams need a vocabulary"
        rows = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for row, text in enumerate(texts):
            places, weights = weigh(count_ngrams(text), self.hashes, self.idf)
            rows[row] = weights @ self.weights[places] + self.bias
        return rows

    def best(self, texts: Sequence[str], embeddings: Floats | None = None) -> Best:
        """The likeliest intent of each text, and whether it is known well enough."""
        return choose_best(self, self.scores(texts, embeddings))

    def save(self, directory: Path) -> None:
        """Writes both files."""
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {"weights": self.weights, "bias": self.bias}
        if self.hashes is not None and self.idf is not None:
            arrays |= {"hashes": self.hashes, "idf": self.idf}
        save_file(arrays, str(directory / WEIGHTS))
        plain: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("weights", "bias", "hashes", "idf")
        }
        text = json.dumps({"format": FORMAT, **plain}, ensure_ascii=False, indent=1)
        (directory / DESCRIPTION).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Best:
    """The likeliest intents of n texts."""

    labels: tuple[str, ...]
    """(n,) the likeliest, never the out-of-scope one."""
    confidence: Floats
    """(n,) float32: calibrated probability of that intent."""
    known: npt.NDArray[np.bool_]
    """(n,) whether the confidence reaches the threshold and nothing says that it is out of scope."""


def choose_best(model: IntentModel, scores: Floats, threshold: float | None = None) -> Best:
    """What `scores` (n, labels) say; `threshold` replaces the model's."""
    import numpy as np

    shares = softmax(scores / np.float32(model.temperature))  # (n, labels)
    inside = np.array([label != model.out_of_scope for label in model.labels])
    likeliest = np.where(inside, shares, -1).argmax(axis=1)
    confidence = shares[np.arange(len(shares)), likeliest]
    outside = shares[:, ~inside].sum(axis=1) if not inside.all() else np.zeros(len(shares))
    wanted = model.threshold if threshold is None else threshold
    known = (confidence >= wanted) & (confidence > outside)
    return Best(tuple(model.labels[place] for place in likeliest), confidence, known)


def softmax(scores: Floats) -> Floats:
    """Rows as probabilities."""
    import numpy as np

    raised: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
    raised /= raised.sum(axis=1, keepdims=True)
    return raised


def load_intent_model(directory: Path, shown: str) -> IntentModel:
    """The classifier in a verified directory; `shown` names it in errors.

    Raises:
        ArtifactError: Files are missing, do not fit together, or are of another format.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    again = f"{shown} is no router that this program reads: run `rayft train router RECIPE`"
    try:
        described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        arrays = load_file(str(directory / WEIGHTS))
        if described.pop("format") != FORMAT:
            raise ArtifactError(f"{again} (its format is not {FORMAT})")
        model = IntentModel(**{**described, "labels": tuple(described["labels"])}, **arrays)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{again} ({type(error).__name__})") from error
    fits = model.weights.ndim == 2 and model.weights.shape[1] == len(model.labels) == len(model.bias)
    if model.features == "ngrams":
        sizes = {-1 if part is None else len(part) for part in (model.hashes, model.idf)}
        fits = fits and sizes == {len(model.weights)}
    if not fits or not np.isfinite(model.weights).all() or not model.temperature > 0:
        raise ArtifactError(f"{again} (its weights do not fit its labels)")
    return model
