"""From reviewed feedback to a better release, or to none: export → samples → train → compare → promote.

In: a recipe whose release is promoted, and its feedback. Out: a release with adapters that were trained on the
feedback, too, promoted only where it is not worse than the one that is served: both answer the same held-out
questions, and the paired bootstrap difference decides. Index, base model and router stay as they are served, so that
the adapters alone are compared.
Not covered: each step by itself (serving/feedback_cli.py, training/samples.py, training/lora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ArtifactError, NotBetterError, UserError
from cluster.progress import say
from cluster.releases import Release, open_release, promote, publish_release
from cluster.store import Artifact, Store
from evaluation.batch import answer_all, load_predictions
from evaluation.config import EvaluationRecipe
from evaluation.intervals import Estimate, difference
from evaluation.metrics import METRICS, scores
from evaluation.parts import BatchRun, Parts, default_run
from evaluation.records import Prediction
from evaluation.report import choose_questions
from evaluation.rubric import Rubric, rubric_of
from evaluation.tasks import SHOWN
from retrieval.records import Question

LEAST_QUESTIONS = 8
"""Fewer held-out questions decide nothing: an interval from them is a guess."""
MARGIN = 0.02
"""How much lower the candidate's mean may be, by chance, before that alone refuses it."""

RunOf = Callable[[EvaluationRecipe, Store, Parts], BatchRun]


@dataclass(frozen=True)
class Verdict:
    """A candidate against the release that is served, on the same questions."""

    strategy: str
    differences: Mapping[str, Estimate]
    """Metric to candidate minus served, paired by question; the first is the task's main one."""
    margin: float

    @property
    def worse(self) -> tuple[str, ...]:
        """Metrics by which the candidate is worse: the whole interval lies below 0, or the difference below
        -margin."""
        return tuple(name for name, found in self.differences.items() if found.high < 0 or found.value < -self.margin)

    def describe(self) -> str:
        """The differences, as a person reads them."""
        told = [
            f"{METRICS[name].label} {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}], n={found.n}"
            for name, found in self.differences.items()
        ]
        return f"{self.strategy}, candidate minus served: {'; '.join(told)}"

    def rule(self) -> str:
        """The rule that decides."""
        return f"worse is a 95% interval wholly below 0, or a difference below -{self.margin:g}"


def improve(
    recipe: EvaluationRecipe,
    store: Store,
    out: Path,
    *,
    margin: float = MARGIN,
    tenant: str | None = None,
    run_of: RunOf = default_run,
) -> Release:
    """Trains on reviewed feedback, and promotes the result where it is not worse.

    Args:
        recipe: With the feedback's database; its own `questions.train_path` is where the export goes.
        store: With the promoted release.
        out: Where the questions from feedback are written; kept, for later trainings.
        margin: See `Verdict.worse`.
        tenant: Only feedback of this tenant.
        run_of: With what hands questions are answered; needs a connected Ray, unless given.

    Returns:
        The release that is promoted at the end.

    Raises:
        NotBetterError: The candidate is worse, in training or in its answers; the release stays as it is.
        UserError: No feedback is accepted, the release has no adapter or no held-out question, or candidate and
            release do not fit.
    """
    from serving.feedback_cli import export_feedback

    served = open_release(store, recipe.name)
    index = _improvable(recipe, store, served)
    export_feedback(recipe, out, tenant)
    questions = recipe.questions.model_copy(update={"train_path": str(out)})
    recipe = recipe.model_copy(update={"questions": questions})
    candidate = _train_candidate(recipe, store, served, index)
    if candidate.ref == served.ref:
        say(f"improve: {served.ref} is served already: nothing was accepted since it was trained")
        return served
    verdicts = compare_releases(recipe, store, served, candidate, margin=margin, run_of=run_of)
    for verdict in verdicts:
        say(f"improve: {verdict.describe()}")
    _promote_unless_worse(store, served, candidate, verdicts[0])
    say(f"improve: set questions.train_path to {out} in the recipe, so that later trainings keep what users taught")
    return candidate


def _train_candidate(recipe: EvaluationRecipe, store: Store, served: Release, index: Artifact) -> Release:
    """The served release with the adapters that `recipe`'s questions train, published but not promoted."""
    from training.format import FORMAT_VERSION
    from training.lora import ROLES, train_adapters
    from training.samples import build_samples

    samples = build_samples(recipe, store, index)
    objectives = [objective for objective, role in ROLES.items() if role in served.adapters]
    adapters = train_adapters(recipe, store, samples, objectives)
    ref = publish_release(
        store,
        recipe.name,
        index=served.index,
        samples=samples.ref,
        adapters={role: adapter.ref for role, adapter in adapters.items()},
        base_digest=served.base_digest,
        prompt_format=FORMAT_VERSION,
        router=served.router,
    )
    return open_release(store, recipe.name, ref.version)


def _promote_unless_worse(store: Store, served: Release, candidate: Release, decisive: Verdict) -> None:
    """Makes the candidate the release that is served.

    Raises:
        NotBetterError: It is worse.
        UserError: Another release than the one that it was compared with is served by now.
    """
    if decisive.worse:
        names = " and ".join(METRICS[name].label for name in decisive.worse)
        raise NotBetterError(
            f"improve: {candidate.ref} is not promoted, it is worse by {names} ({decisive.describe()}; "
            f"{decisive.rule()}); {served.ref} stays. `rayft promote RECIPE {candidate.version}` promotes it all the "
            "same"
        )
    if store.current(served.ref.kind, served.name) != served.version:
        raise UserError(
            f"improve: another release was promoted meanwhile; {candidate.ref} was compared with {served.ref}"
        )
    promote(store, candidate.name, candidate.version)
    say(f"improve: {candidate.ref} is promoted: not worse than {served.ref} by {decisive.strategy} ({decisive.rule()})")


def _improvable(recipe: EvaluationRecipe, store: Store, served: Release) -> Artifact:
    """The index of a release that feedback can improve."""
    from training.base_model import base_model_directory
    from training.format import FORMAT_VERSION

    if not served.adapters or served.index is None or served.samples is None:
        raise UserError(
            f"improve: {served.ref} has no {'adapter' if not served.adapters else 'index or no samples'}; train and "
            "release first (`rayft train lora`, `rayft release`)"
        )
    if served.prompt_format != FORMAT_VERSION:
        raise UserError(
            f"improve: {served.ref} has prompt format {served.prompt_format}, this program {FORMAT_VERSION}"
        )
    from cluster.model_source import model_digest

    if served.base_digest and served.base_digest != model_digest(base_model_directory(recipe.model)):
        raise ArtifactError(f"model.base: {recipe.model.base} is not the base model of {served.ref}")
    return store.open_ref(served.index)


def compare_releases(
    recipe: EvaluationRecipe,
    store: Store,
    served: Release,
    candidate: Release,
    *,
    margin: float = MARGIN,
    run_of: RunOf = default_run,
) -> list[Verdict]:
    """Both releases on the held-out questions of the served one that the candidate was not trained on either; one
    verdict per strategy that both have an adapter for, the one that cites first.

    Raises:
        UserError: Too few questions are left, or the candidate was trained on documents that the served release
            holds out.
    """
    sides = [_parts(recipe, store, release) for release in (served, candidate)]
    assert sides[0].samples is not None and sides[1].samples is not None, "both were trained"
    questions = fair_questions(recipe, sides[0].samples, sides[1].samples)
    strategies = [name for name in ("raft", "finetuned") if name in served.adapters and name in candidate.adapters]
    answered = [
        answer_all(recipe, store, parts, strategies, questions, run_of(recipe, store, parts), name_suffix="-improve")
        for parts in sides
    ]
    rubric = rubric_of(recipe, sides[0], questions)
    verdicts = []
    for strategy in strategies:
        before, after = (load_predictions(side[strategy]) for side in answered)
        verdicts.append(judge(recipe, strategy, before, after, rubric, margin))
    return verdicts


def _parts(recipe: EvaluationRecipe, store: Store, release: Release) -> Parts:
    assert release.index is not None, "improvable"
    return Parts.of(
        recipe,
        store.open_ref(release.index),
        store.open_ref(release.samples) if release.samples else None,
        {role: store.open_ref(ref) for role, ref in release.adapters.items()},
        release.base_digest,
        store.open_ref(release.router) if release.router else None,
    )


def fair_questions(recipe: EvaluationRecipe, served: Artifact, candidate: Artifact) -> list[Question]:
    """The served samples' test questions that the candidate's samples train neither on the words nor, for held-out
    documents, on a document of.

    Raises:
        UserError: Fewer than `LEAST_QUESTIONS`.
    """
    from training.duplicates import content_words
    from training.samples import load_questions
    from training.splits import NEW_QUESTIONS, TRAIN

    chosen = choose_questions(recipe, served)
    taught = load_questions(candidate, TRAIN)
    words = {frozenset(content_words(question.text, ())) for question in taught}
    documents = {doc_id for question in taught for doc_id in question.documents}
    fair = [
        question
        for question in chosen
        if frozenset(content_words(question.text, ())) not in words
        and (question.split == NEW_QUESTIONS or documents.isdisjoint(question.documents))
    ]
    if lost := len(chosen) - len(fair):
        say(f"improve: {lost} of {len(chosen)} held-out questions test nothing: the candidate was trained on them")
    if len(fair) < LEAST_QUESTIONS:
        raise UserError(
            f"improve: {len(fair)} held-out questions are left to compare with, at least {LEAST_QUESTIONS} are needed: "
            "raise evaluate.new_documents or evaluate.new_questions, or hold more out and release anew"
        )
    return fair


def judge(
    recipe: EvaluationRecipe,
    strategy: str,
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    rubric: Rubric,
    margin: float,
) -> Verdict:
    """The paired differences of two strategies' answers to the same questions, in any order."""
    by_id = {prediction.question.question_id: prediction for prediction in after}
    paired = [by_id[prediction.question.question_id] for prediction in before]
    found: dict[str, Estimate] = {}
    for name in (SHOWN[rubric.task].alarm, "verified_answers"):
        estimate = difference(
            scores(name, paired, rubric),
            scores(name, before, rubric),
            METRICS[name].combine,
            resamples=recipe.evaluate.bootstrap_resamples,
            seed=recipe.seed,
        )
        if estimate is not None:
            found[name] = estimate
    return Verdict(strategy, found, margin)
