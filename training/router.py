"""The router's training stage: labelled utterances become an intent classifier.

In: the recipe's `router.examples` and its encoder. Out: an artifact of kind `router` (safetensors and JSON), which a
release pins and ingress opens. What it reports was measured on utterances that nothing was fitted to; the same
classifier is published. A router that reads embeddings names its encoder, and serves no other.
Not covered: the fit (training/router_fit.py), rules and learned weights (serving/router.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.cache import cache_directory
from cluster.errors import UserError
from cluster.manifest import ArtifactRef
from cluster.progress import say
from cluster.stage import Outcome, Plan, digest_path, run_stage
from retrieval.collections import member_recipe
from retrieval.encoder import (
    BASE_INPUT,
    EncoderSource,
    default_device,
    encoder_digest,
    encoder_source,
    encoder_tokenizer,
    load_encoder,
    resolve_precision,
    unknown_share,
)
from training.config import TrainingRecipe
from training.intent_model import Features, IntentModel
from training.ngrams import count_ngrams, learn_vocabulary, weigh
from training.router_fit import fit_intents, measure
from training.utterances import KEY, Utterances, divide, read_utterances

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cluster.store import Artifact, Attempt, Store

    Floats = npt.NDArray[np.float32]

KIND = "router"
ROUTER_FORMAT = 1

EmbedQueries = Callable[[EncoderSource, Sequence[str]], "Floats"]


@dataclass(frozen=True)
class _Choice:
    """What the classifier reads, and why."""

    features: Features
    reason: str
    source: EncoderSource | None
    """The encoder; none reads n-grams."""
    base_digest: str = ""


def train_router(recipe: TrainingRecipe, store: Store, *, embed: EmbedQueries | None = None) -> Artifact:
    """The intent classifier of `recipe`, trained unless the same exists, and made current.

    Args:
        recipe: With `router.examples`.
        store: Where it is published.
        embed: Embeds utterances; by default the encoder, whose embeddings are kept in the cache.

    Raises:
        UserError: naming `router.examples` or `router.features`: see `read_utterances`; embeddings where the index has
            none.
    """
    utterances = read_utterances(recipe.router)
    choice = _choose_features(recipe, store, utterances.texts)
    plan = _plan(recipe, choice)
    say(f"router: {len(utterances.texts):,} utterances; {choice.reason}")
    build = functools.partial(_build, recipe, utterances, choice, embed or cached_embeddings)
    artifact = run_stage(store, plan, build)
    for line in describe_figures(artifact.manifest.measured):
        say(line)
    return artifact


def _plan(recipe: TrainingRecipe, choice: _Choice) -> Plan:
    config = {
        "router": {
            "features": choice.features,
            "out_of_scope": recipe.router.out_of_scope,
            "held_out": recipe.router.held_out,
        }
    }
    inputs = {KEY: digest_path(recipe.router.examples, key=KEY)}
    parents = {}
    if choice.source is not None:
        inputs[BASE_INPUT] = choice.base_digest
        if choice.source.ref:
            parents["encoder"] = ArtifactRef.parse(choice.source.ref)
    return Plan(KIND, recipe.name, config, inputs, parents, ROUTER_FORMAT, recipe.seed)


def query_encoder(recipe: TrainingRecipe, store: Store) -> EncoderSource:
    """The encoder whose query embedding the router is given: the index's, or the first collection's."""
    first = next(iter(recipe.collections), None)
    return encoder_source(recipe if first is None else member_recipe(recipe, first), store)


def _choose_features(recipe: TrainingRecipe, store: Store, texts: Sequence[str]) -> _Choice:
    wished, key = recipe.router.features, "router.features"
    if wished == "ngrams":
        return _Choice("ngrams", f"character n-grams ({key})", None)
    unindexed = not recipe.corpus.path and not recipe.collections
    if unindexed or recipe.search.mode == "lexical":
        lacking = "there is no corpus, so nothing embeds a question" if unindexed else "search.mode is lexical"
        if wished == "embedding":
            raise UserError(f"{key} is embedding, but {lacking}: set it to ngrams or auto")
        return _Choice("ngrams", f"character n-grams, because {lacking}", None)
    source = query_encoder(recipe, store)
    share = unknown_share(encoder_tokenizer(source.directory()), texts)
    known = f"{share:.1%} of their tokens are unknown to {source.name}"
    if wished == "auto" and share > source.config.max_unknown_share:
        return _Choice("ngrams", f"character n-grams, because {known}", None)
    return _Choice("embedding", f"embeddings by {source.name} ({known})", source, encoder_digest(source.config))


def _build(
    recipe: TrainingRecipe, utterances: Utterances, choice: _Choice, embed: EmbedQueries, attempt: Attempt
) -> Outcome:
    fitted_rows, measured_rows = divide(utterances.intents, recipe.router.held_out, recipe.seed)
    fitted, held_out = utterances.at(fitted_rows), utterances.at(measured_rows)
    template = _template(recipe, choice, utterances)
    if choice.source is not None:
        embeddings = embed(choice.source, utterances.texts)  # (n, dim)
        model, folds = fit_intents(embeddings[fitted_rows], fitted.intents, template, recipe.seed)
        best = model.best(held_out.texts, embeddings[measured_rows])
    else:
        template, features = _with_vocabulary(template, fitted.texts)
        model, folds = fit_intents(features, fitted.intents, template, recipe.seed)
        best = model.best(held_out.texts)
    model.save(attempt.directory)
    counts = {
        "utterances": len(utterances.texts),
        "repeated": utterances.repeated,
        "intents": len(set(utterances.intents) - {recipe.router.out_of_scope}),
        "fitted": len(fitted_rows),
        "held_out": len(measured_rows),
    }
    figures = {**measure(model, best, held_out.intents), "temperature": model.temperature, "folds": folds}
    encoder = {"encoder": model.encoder, "encoder_digest": model.encoder_digest}
    return Outcome(counts, {**figures, "threshold": model.threshold, "features": model.features, **encoder})


def _template(recipe: TrainingRecipe, choice: _Choice, utterances: Utterances) -> IntentModel:
    """The classifier but for what is fitted."""
    import numpy as np

    labels = tuple(sorted(set(utterances.intents)))
    outside = recipe.router.out_of_scope if recipe.router.out_of_scope in labels else ""
    return IntentModel(
        labels,
        outside,
        choice.features,
        weights=np.zeros((0, len(labels)), dtype=np.float32),
        bias=np.zeros(len(labels), dtype=np.float32),
        encoder=choice.source.name if choice.source else "",
        encoder_digest=choice.source.digest() if choice.source else "",
    )


def _with_vocabulary(template: IntentModel, texts: Sequence[str]) -> tuple[IntentModel, Any]:
    """The template with the n-grams of `texts`, and the texts' features: a sparse (n, n-grams) matrix."""
    import numpy as np
    from scipy import sparse

    counted = [count_ngrams(text) for text in texts]
    hashes, idf = learn_vocabulary(counted)
    rows = [weigh(counts, hashes, idf) for counts in counted]
    places, weights = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    ends = np.cumsum([0, *(len(row[0]) for row in rows)])
    matrix = sparse.csr_matrix((weights, places, ends), shape=(len(rows), len(hashes)))
    return dataclasses.replace(template, hashes=hashes, idf=idf), matrix


def cached_embeddings(source: EncoderSource, texts: Sequence[str]) -> Floats:
    """Query embeddings (n, dim) float32, computed once per encoder, precision and texts on this machine."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    precision = resolve_precision(source, default_device())
    content = json.dumps([source.digest(), precision, *texts], ensure_ascii=False).encode("utf-8", "surrogatepass")
    file = cache_directory() / "utterances" / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    try:
        kept: Floats = load_file(str(file))["embeddings"]
        if kept.shape[0] == len(texts) and np.isfinite(kept).all():
            return kept
    except (OSError, KeyError, SafetensorError):
        pass  # not there, or damaged: computed again
    embeddings = load_encoder(source).encode_queries(texts)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    save_file({"embeddings": embeddings}, str(partial))
    partial.replace(file)
    return embeddings


def describe_figures(measured: Mapping[str, Any]) -> Iterator[str]:
    """What training measured, for people."""
    yield (
        f"router: accuracy in scope {_interval(measured['accuracy_in_scope'])} on {measured['in_scope']:,} held-out "
        f"utterances at the threshold {measured['threshold']:.3f} "
        f"({measured['closed_accuracy']['value']:.3f} without a threshold)"
    )
    if "out_of_scope_recall" in measured:
        recall = _interval(measured["out_of_scope_recall"])
        yield f"router: out-of-scope recall {recall} on {measured['out_of_scope']:,} held-out utterances"
    else:
        yield "router: no utterance is out of scope, so its recall is not known (router.out_of_scope names the intent)"
    yield f"router: expected calibration error {measured['ece']:.3f} (temperature {measured['temperature']:.3f})"
    for one in measured["worst"]:
        taken = ", ".join(f"{intent or 'unknown'} ({count})" for intent, count in one["taken_for"].items())
        yield f"router: {one['intent']}: {one['missed']} of {one['utterances']} missed, taken for {taken}"


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
