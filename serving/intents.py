"""What a question wants: its intent, recognised by keywords or by a trained classifier.

In: the question, and its embedding where there is one. Out: a `Guess`. Without labelled intents the task tiers of the
recipe's keywords are all there is; a trained classifier (`rayft train router`) takes their place.
Imports no torch, ray or faiss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.errors import ArtifactError
from training.format import fold
from training.intent_model import IntentModel, choose_best, load_intent_model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cluster.store import Artifact

_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Guess:
    """The likeliest intent; `intent` is empty where it is not known well enough."""

    intent: str
    confidence: float
    label: str = ""
    """The likeliest intent even where it is not known well enough."""
    how: str = ""
    """How it was recognised, for the route's reason."""


UNKNOWN = Guess("", 0.0)


class IntentClassifier(Protocol):
    """Recognises intents; trained by `rayft train router`."""

    intents: tuple[str, ...]
    """The intents that it can tell apart."""
    needs_embedding: bool
    """Whether it reads the query embedding, rather than the text alone."""

    def classify(self, text: str, embedding: npt.NDArray[np.float32] | None) -> Guess:
        """The intent of a question; `embedding` is (dim,) float32, of unit length."""
        ...


class KeywordIntents:
    """The intent whose keywords stand in the question most often."""

    needs_embedding = False

    def __init__(self, intents: Mapping[str, tuple[str, ...]]) -> None:
        """`intents` names the keywords that reveal each."""
        self.intents = tuple(intents)
        self._patterns = {intent: any_keyword(words) for intent, words in intents.items() if words}

    def classify(self, text: str, embedding: npt.NDArray[np.float32] | None = None) -> Guess:
        """The intent with most different keywords (of several, the first), and its share of all; where keywords
        overlap, the longest counts."""
        folded = folded_text(text)
        matches = {
            intent: tuple(dict.fromkeys(found.group() for found in pattern.finditer(folded)))
            for intent, pattern in self._patterns.items()
        }
        total = sum(map(len, matches.values()))
        if not total:
            return UNKNOWN
        best = max(matches, key=lambda intent: len(matches[intent]))
        words = ", ".join(f"“{word}”" for word in matches[best])
        return Guess(best, len(matches[best]) / total, best, f"recognised by {words}")


class TrainedIntents:
    """A classifier that `rayft train router` published. Safe for concurrent calls; a call takes well under a
    millisecond."""

    def __init__(self, model: IntentModel, threshold: float | None = None) -> None:
        """`threshold` (`router.threshold`) replaces the one that training chose."""
        self._model = model
        self.threshold = model.threshold if threshold is None else threshold
        self.intents = tuple(label for label in model.labels if label != model.out_of_scope)
        self.needs_embedding = model.features == "embedding"

    def classify(self, text: str, embedding: npt.NDArray[np.float32] | None = None) -> Guess:
        """The likeliest intent with its calibrated confidence; unknown below the threshold."""
        scores = self._model.scores([text], None if embedding is None else embedding[None, :])
        best = choose_best(self._model, scores, self.threshold)
        [label], confidence = best.labels, float(best.confidence[0])
        if best.known[0]:
            return Guess(label, confidence, label, f"recognised as {label} with confidence {confidence:.2f}")
        how = f"{label} is likeliest with a confidence of only {confidence:.2f}"
        return Guess("", confidence, label, how)


def open_classifier(
    router: Artifact, index: Artifact | None = None, *, threshold: float | None = None
) -> TrainedIntents:
    """The classifier of a `router` artifact, every file verified.

    Args:
        router: Of kind `router`.
        index: The index (or catalog of collections) whose query embeddings it will be given; none: no embeddings.
        threshold: `router.threshold`, which replaces the one that training chose.

    Raises:
        ArtifactError: It is damaged, or reads the embeddings of another encoder (naming both).
    """
    model = load_intent_model(router.directory(), str(router.ref))
    encoder, digest = ("", "") if index is None else query_encoder(index)
    if model.features == "embedding" and model.encoder_digest != digest:
        found = f"{index.ref} embeds with {encoder} ({digest[:12]})" if index and digest else "nothing here embeds"
        raise ArtifactError(
            f"{router.ref} reads embeddings by {model.encoder} ({model.encoder_digest[:12]}), but {found}: run "
            "`rayft train router RECIPE`, or set router.features to ngrams"
        )
    return TrainedIntents(model, threshold)


def query_encoder(index: Artifact) -> tuple[str, str]:
    """Name and digest of the encoder whose query embeddings a search of `index` returns (of a catalog, the first
    collection's that has one); both empty where the search is lexical."""
    from retrieval.collections import is_catalog, read_catalog

    members = [index.manifest.measured]
    if is_catalog(index):
        members = [index.manifest.measured["collections"][entry.name] for entry in read_catalog(index)]
    known = next((one for one in members if one.get("encoder_digest")), {})
    return str(known.get("encoder", "")), str(known.get("encoder_digest", ""))


def folded_text(text: str) -> str:
    """Lower case without differences of width or composition, as keywords are compared."""
    return fold(text)[0].casefold()


def any_keyword(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, the longest first: whole words where the script has spaces, any place where it has none."""
    folded = sorted({folded_text(word) for word in words}, key=lambda word: (-len(word), word))
    return re.compile("|".join(_keyword(word) for word in folded))


def _keyword(folded: str) -> str:
    escaped = re.escape(folded)
    return escaped if _CJK.search(folded) else rf"(?<!\w){escaped}(?!\w)"
