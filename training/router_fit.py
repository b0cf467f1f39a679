"""Fits the intent classifier: logistic regression, calibrated, with a threshold.

In: features of utterances and their intents. Out: an `IntentModel`, and figures on utterances that nothing was fitted
to. Temperature and threshold are chosen on out-of-fold scores: every utterance is scored by a model that has not seen
it. Out-of-scope utterances are one more class, whose probability no intent can claim.
Threshold: the confidence that maximises accuracy in scope plus out-of-scope recall, among those that keep at least
`KEPT` of the rightly recognised questions; without out-of-scope utterances, the one that keeps just that many.
Not covered: reading utterances (training/utterances.py), embedding and publishing (training/router.py).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.intent_model import Best, IntentModel, choose_best, softmax

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

INVERSE_REGULARISATION = 10.0
"""scikit-learn's C, for features of unit length: on clinc150 accuracy was flat from 10 to 100."""
MAX_ITERATIONS = 300
FOLDS = 5
KEPT = 0.97
"""Share of rightly recognised questions that the threshold keeps: on clinc150 it recognised 9 in 10 out of scope."""
BINS = 15
WORST = 5


def fit_intents(features: Any, intents: Sequence[str], template: IntentModel, seed: int) -> tuple[IntentModel, int]:
    """The classifier for `intents`, and the folds that temperature and threshold were chosen with.

    Args:
        features: (n, dim) array or sparse matrix, rows of unit length.
        intents: (n,) with at least two of each.
        template: Everything of the model but what is fitted here.
        seed: Of the folds.
    """
    import numpy as np

    labels = np.array(template.labels)
    wanted = np.searchsorted(labels, np.array(intents))  # (n,) columns
    folds = min(FOLDS, *Counter(intents).values())
    scores = np.empty((len(wanted), len(labels)), dtype=np.float32)
    fold_of = _stratified(wanted, folds, seed)
    for fold in range(folds):
        weights, bias = _regress(features[fold_of != fold], wanted[fold_of != fold])
        scores[fold_of == fold] = features[fold_of == fold] @ weights + bias
    model = dataclasses.replace(template, temperature=choose_temperature(scores, wanted))
    model = dataclasses.replace(model, threshold=choose_threshold(choose_best(model, scores, 0.0), intents, model))
    weights, bias = _regress(features, wanted)
    return dataclasses.replace(model, weights=weights, bias=bias), folds


def _stratified(wanted: npt.NDArray[np.int64], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """(n,) fold of each row; every class is spread evenly."""
    import numpy as np

    rng = np.random.default_rng(seed)
    fold_of = np.empty(len(wanted), dtype=np.int64)
    for column in np.unique(wanted):
        rows = rng.permutation(np.flatnonzero(wanted == column))
        fold_of[rows] = np.arange(len(rows)) % folds
    return fold_of


def _regress(features: Any, wanted: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Weights (dim, labels) and bias (labels,) of a multinomial logistic regression."""
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few steps more change nothing that is measured
        fitted = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=MAX_ITERATIONS).fit(features, wanted)
    weights, bias = fitted.coef_.T.astype(np.float32), fitted.intercept_.astype(np.float32)
    if len(fitted.classes_) == 2:  # scikit-learn gives one score, of the second class against the first
        weights, bias = np.hstack([np.zeros_like(weights), weights]), np.array([0, bias[0]], dtype=np.float32)
    return np.ascontiguousarray(weights), bias


def choose_temperature(scores: Floats, wanted: npt.NDArray[np.int64]) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017, section 4.2), between 1/20 and 20.

    Args:
        scores: (n, labels) of a model that has not seen the rows.
        wanted: (n,) columns of the right labels.
    """
    import numpy as np

    rows = np.arange(len(wanted))

    def loss(exponent: float) -> float:
        shares = softmax(scores / np.float32(math.exp(exponent)))[rows, wanted]
        return float(-np.log(np.maximum(shares, 1e-12)).mean())

    low, high = -math.log(20), math.log(20)
    for _ in range(4):  # the loss has one valley in the logarithm; four rounds narrow it to 6 / 5^4
        grid = np.linspace(low, high, 11)
        best = int(np.argmin([loss(float(exponent)) for exponent in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 10)])
    return math.exp((low + high) / 2)


def choose_threshold(best: Best, intents: Sequence[str], model: IntentModel) -> float:
    """See the module; `best` holds the guesses without a threshold."""
    import numpy as np

    given = np.array(intents)
    inside = given != model.out_of_scope
    right = best.known & (np.array(best.labels) == given)
    if not right.any():
        return 0.0
    shares = np.linspace(0, 1 - KEPT, 31)
    thresholds = np.quantile(best.confidence[right], shares, method="lower")  # (31,) ascending
    if inside.all():
        return float(thresholds[-1])

    def gain(threshold: float) -> float:
        known = best.known & (best.confidence >= threshold)
        return float((right & known)[inside].mean() + (~known)[~inside].mean())

    return float(max(thresholds, key=gain))


def measure(model: IntentModel, best: Best, intents: Sequence[str]) -> dict[str, Any]:
    """Figures on utterances that the model was not fitted to.

    accuracy_in_scope: share of utterances with an intent that got it, with a confidence that reaches the threshold;
    closed_accuracy: the same whatever the confidence; out_of_scope_recall: share of the others that are unknown; ece:
    expected calibration error of the confidence over all (15 equal bins), where a guess out of scope is wrong; each
    accuracy with its 95% interval (Wilson).
    """
    import numpy as np

    given, guessed = np.array(intents), np.array(best.labels)
    inside = given != model.out_of_scope
    right = guessed == given
    inside_count, outside_count = int(inside.sum()), int((~inside).sum())
    figures: dict[str, Any] = {
        "in_scope": inside_count,
        "out_of_scope": outside_count,
        "accuracy_in_scope": share_with_interval(int((right & best.known)[inside].sum()), inside_count),
        "closed_accuracy": share_with_interval(int(right[inside].sum()), inside_count),
        "ece": expected_calibration_error(best.confidence, right),
        "worst": _worst(given[inside], guessed[inside], best.known[inside]),
    }
    if outside_count:
        figures["out_of_scope_recall"] = share_with_interval(int((~best.known)[~inside].sum()), outside_count)
    return figures


def share_with_interval(count: int, total: int) -> dict[str, float]:
    """A share with its 95% interval by Wilson's formula (1927)."""
    if not total:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    z, share = 1.959964, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return {"value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def expected_calibration_error(confidence: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Mean distance of confidence and accuracy over equal bins, weighed by their sizes (Guo et al. 2017)."""
    import numpy as np

    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return float(
        sum(
            abs(float(confidence[bins == place].mean()) - float(right[bins == place].mean())) * (bins == place).mean()
            for place in np.unique(bins)
        )
    )


def _worst(
    given: npt.NDArray[np.str_], guessed: npt.NDArray[np.str_], known: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """The intents that are missed most often, with what they are taken for; "" is unknown."""
    taken = [guess if sure else "" for guess, sure in zip(guessed.tolist(), known.tolist(), strict=True)]
    missed: dict[str, Counter[str]] = {}
    for intent, guess in zip(given.tolist(), taken, strict=True):
        if guess != intent:
            missed.setdefault(intent, Counter())[guess] += 1
    totals = Counter(given.tolist())
    worst = sorted(missed, key=lambda intent: (-missed[intent].total() / totals[intent], intent))[:WORST]
    return [
        {"intent": one, "utterances": totals[one], "missed": missed[one].total(), "taken_for": dict(missed[one])}
        for one in worst
    ]
