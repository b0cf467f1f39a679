"""The retriever's fine-tuning stage: questions and the current index become a better encoder.

In: the recipe's questions and `retriever` section, and the index that the encoder as configured builds. Out: an
`encoder` artifact, a sentence-transformers directory in safetensors, published when it ranks held-out questions better
than the encoder that it was tuned from (or when forced). `encoder.tuned: auto` makes the next index build use it.
The index that is mined, and that before and after are told of, is always that of the untuned encoder: else a second
run would depend on the first.
Not covered: mining and batches (training/retriever_rows.py), the loss (training/retriever_step.py), the loop
(training/retriever_worker.py), rebuilding the index.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import NotBetterError, UserError
from cluster.progress import say
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, run_stage
from retrieval.encoder import BASE_INPUT, encoder_digest, encoder_directory
from retrieval.metrics import bootstrap
from retrieval.records import Question
from training.config import QUESTION_FILES, TrainingRecipe
from training.ray_train import fit
from training.retriever_measure import DECIDES, SHOWN, choose_pool
from training.retriever_mining import HELD_OUT, TRAINING, VALIDATION, Mined, mine, open_dense, untuned
from training.retriever_rows import split_validation
from training.retriever_worker import RetrieverJob, RetrieverReport, train
from training.samples import questions_inputs, require_questions
from training.splits import SPLITS, TRAIN, held_out_documents, prepare_questions, spread

if TYPE_CHECKING:
    from cluster.store import Artifact, Attempt, Store
    from retrieval.metrics import Values
    from training.retriever_checkpoint import PerQuestion

ENCODER_FORMAT = 1
RESAMPLES = 2000
RESOURCES = ("cached_texts",)
"""Keys of the `retriever` section that change time and memory, and not the result."""


def encoder_plan(recipe: TrainingRecipe, index: Artifact) -> Plan:
    """What the tuned encoder depends on; not the number of workers, threads or GPUs."""
    config = {
        "retriever": recipe.retriever.model_dump(exclude=set(RESOURCES)),
        "questions": recipe.questions.model_dump(exclude=set(QUESTION_FILES)),
    }
    inputs = {BASE_INPUT: encoder_digest(recipe.encoder), **questions_inputs(recipe)}
    return Plan("encoder", recipe.name, config, inputs, {"index": index.ref}, ENCODER_FORMAT, recipe.seed)


def train_retriever(recipe: TrainingRecipe, store: Store, *, force: bool = False) -> Artifact:
    """The tuned encoder of `recipe`, trained unless the same exists; brings the untuned index up to date before.

    Args:
        recipe: With questions that name golden places.
        store: Where index and encoder are.
        force: Publish it whatever the held-out questions say.

    Raises:
        UserError: No question to train or measure on, several collections, lexical search, an encoder without
            safetensors weights, workers that the cluster cannot hold, a loss that is not finite.
        NotBetterError: The encoder does not win on held-out questions, and `force` is not set. A second run says so
            again without training again, and with `force` publishes what the first has trained.
    """
    require_questions(recipe)
    _refuse_untrainable(recipe)
    divided = divide_questions(recipe)
    index = untuned_index(recipe, store)
    plan = encoder_plan(recipe, index)
    artifact = run_stage(store, plan, functools.partial(_build, recipe, store, index, divided, force))
    for line in describe_gains(artifact.manifest.measured):
        say(line)
    return artifact


def _refuse_untrainable(recipe: TrainingRecipe) -> None:
    if recipe.collections:
        first = next(iter(recipe.collections))
        raise UserError(
            f"collections: an encoder is fine-tuned for one collection; give it a recipe named {recipe.name}-{first} "
            f"with the corpus.path of {first} and its questions: the collection will use what that recipe trains"
        )
    if recipe.search.mode == "lexical":
        raise UserError("search.mode is lexical: BM25 has no encoder to fine-tune; set search.mode to dense or hybrid")
    if not any(encoder_directory(recipe.encoder).rglob("*.safetensors")):
        raise UserError(
            f"encoder.model: {recipe.encoder.model} holds no *.safetensors weights, so that it cannot be fine-tuned "
            "(save it once with SentenceTransformer(…).save(directory))"
        )
    workers, rows = recipe.train.workers, recipe.retriever.batch_questions
    if workers > rows:
        raise UserError(
            f"train.workers is {workers} but retriever.batch_questions is {rows}: each worker needs a question"
        )


@dataclass(frozen=True)
class DividedQuestions:
    """Questions with golden places, by what they are for."""

    training: tuple[Question, ...]
    validation: tuple[Question, ...]
    held_out: tuple[Question, ...]
    """Of the test splits: what decides about publishing."""
    hidden: frozenset[str]
    """Documents of validation and of the new-document splits: no passage of theirs is shown in training."""

    def by_role(self) -> dict[str, tuple[Question, ...]]:
        """As `mine` takes them."""
        return {TRAINING: self.training, VALIDATION: self.validation, HELD_OUT: self.held_out}


def divide_questions(recipe: TrainingRecipe) -> DividedQuestions:
    """The recipe's questions, split as for RAFT; validation is taken from the training questions, by document.

    Raises:
        UserError: naming `questions.path`, where there is nothing to train, validate or measure on.
    """
    split = prepare_questions(recipe).questions
    placed = [question for question in split if question.golden]
    asked = spread([q for q in placed if q.split == TRAIN], recipe.retriever.max_questions, recipe.seed)
    training, validation, documents = split_validation(asked, recipe.retriever.validation_fraction, recipe.seed)
    held_out = tuple(question for question in placed if question.split != TRAIN)
    if len(training) < 2 or not validation:
        raise UserError(
            f"questions.path: {len(asked)} training questions name golden places in "
            f"{len({g.doc_id for q in asked for g in q.golden})} documents; fine-tuning needs questions about two at "
            "least, one of them to validate on"
        )
    if not held_out:
        raise UserError("questions.path: no held-out question names a golden place, so that a gain cannot be measured")
    hidden = documents | held_out_documents(split)
    return DividedQuestions(tuple(training), tuple(validation), held_out, frozenset(hidden))


def untuned_index(recipe: TrainingRecipe, store: Store) -> Artifact:
    """The index of the encoder as configured; one that exists is opened as it is, and does not become current."""
    from retrieval.index import build_index, index_plan

    plain = recipe.model_copy(update={"encoder": untuned(recipe)})
    ref = index_plan(plain, store).ref
    return store.open_ref(ref) if store.exists(ref) else build_index(plain, store)


def _build(
    recipe: TrainingRecipe, store: Store, index: Artifact, divided: DividedQuestions, force: bool, attempt: Attempt
) -> Outcome:
    with ray_session(recipe.ray):
        mined = mine(recipe, index, divided.by_role(), divided.hidden)
        job = _job(recipe, index, divided, mined, attempt, str(store.work_directory(attempt.ref)))
        report = _fit(recipe, job)
    measured = _measured(recipe, divided, report)
    won = measured["gain"]["value"] > 0
    if not (won or force):
        for line in describe_gains(measured):
            say(line)
        raise NotBetterError(
            f"retriever: not published: {DECIDES} on {len(divided.held_out)} held-out questions "
            f"{_describe_points(measured['gain'])}; more questions or another retriever.learning_rate may help, "
            "--force publishes it all the same"
        )
    return Outcome(
        counts={
            "training_questions": len(divided.training),
            "rows": len(mined.rows),
            "mined_negatives": sum(row.mined for row in mined.rows),
            "validation_questions": len(divided.validation),
            "held_out_questions": len(divided.held_out),
            "steps": report.progress.step,
            "measured_passages": len(job.pool.passages),
            "indexed_passages": job.pool.indexed,
        },
        measured={**measured, "dropped": dict(mined.drops), "forced": not won},
    )


def _job(
    recipe: TrainingRecipe,
    index: Artifact,
    divided: DividedQuestions,
    mined: Mined,
    attempt: Attempt,
    checkpoints: str,
) -> RetrieverJob:
    if len(mined.rows) < 2:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(mined.drops.items()))
        raise UserError(f"retriever: {len(divided.training)} questions gave {len(mined.rows)} training rows: {reasons}")
    settings, retriever = recipe.retriever, open_dense(recipe, index)
    pools = [
        choose_pool(retriever.chunks(), questions, found, limit, recipe.seed)
        for questions, found, limit in (
            (divided.validation, mined.found_for_validation, settings.validation_passages),
            (divided.held_out, mined.found_for_held_out, settings.measured_passages),
        )
    ]
    return RetrieverJob(
        recipe=recipe.training_values(),
        rows=mined.rows,
        validation=divided.validation,
        validation_pool=pools[0],
        held_out=divided.held_out,
        pool=pools[1],
        uri=attempt.uri,
        checkpoints=checkpoints,
    )


def _fit(recipe: TrainingRecipe, job: RetrieverJob) -> RetrieverReport:
    """Runs the workers to their end and returns what the first of them reports."""
    report: RetrieverReport = fit(
        train,
        job,
        recipe.train,
        label="train retriever",
        unit="steps",
        storage=job.checkpoints,
    )
    if report.progress.stopped:
        say(f"train retriever: stopped early at step {report.progress.step} of {report.steps}: no gain in validation")
    return report


def _measured(recipe: TrainingRecipe, divided: DividedQuestions, report: RetrieverReport) -> dict[str, Any]:
    """Figures for the manifest: before and after with intervals, per split, and how training went."""
    progress, losses = report.progress, report.progress.losses
    return {
        "splits": {
            split: compare(divided.held_out, split, progress.before, progress.after, recipe.seed)
            for split in SPLITS
            if any(question.split == split for question in divided.held_out)
        },
        "gain": compare(divided.held_out, None, progress.before, progress.after, recipe.seed)["gain"][DECIDES],
        "decided_by": f"mean {DECIDES} over all held-out questions",
        "validations": [[step, round(value, 4)] for step, value in progress.validations],
        "best_step": progress.best_step,
        "stopped_early": progress.stopped,
        "first_loss": round(sum(losses[:5]) / len(losses[:5]), 4),
        "final_loss": round(sum(losses[-5:]) / len(losses[-5:]), 4),
        "training_seconds": round(report.seconds, 1),
        "resumed_at_step": report.resumed_at,
        "workers": recipe.train.workers,
        "device": report.device,
        "embedding_precision": report.precision,
    }


def compare(
    questions: Sequence[Question], split: str | None, before: PerQuestion, after: PerQuestion, seed: int
) -> dict[str, Any]:
    """Before, after and paired gain of each measure on a split (none: all questions), with 95% intervals.

    Returns:
        `{"before": {measure: {value, low, high, n}}, "after": …, "gain": …}`.
    """
    import numpy as np

    places = [place for place, question in enumerate(questions) if split in (None, question.split)]
    columns: dict[str, Values] = {}
    for name in SHOWN:
        old, new = np.array(before[name])[places], np.array(after[name])[places]
        columns |= {f"before {name}": old, f"after {name}": new, f"gain {name}": new - old}
    estimates = bootstrap(columns, RESAMPLES, seed)
    return {
        side: {
            name: {
                "value": round(estimates[f"{side} {name}"].value, 4),
                "low": round(estimates[f"{side} {name}"].low, 4),
                "high": round(estimates[f"{side} {name}"].high, 4),
                "n": estimates[f"{side} {name}"].n,
            }
            for name in SHOWN
        }
        for side in ("before", "after", "gain")
    }


def describe_gains(measured: Mapping[str, Any]) -> list[str]:
    """Before → after on each split, as a person reads it."""
    lines = []
    for split, sides in measured["splits"].items():
        lines.append(f"retriever: {split}, n = {sides['before'][SHOWN[0]]['n']}, 95% intervals:")
        for name in SHOWN:
            old, new = (_describe_share(sides[side][name]) for side in ("before", "after"))
            lines.append(f"  {name:9} {old} → {new}, {_describe_points(sides['gain'][name])}")
    return lines


def _describe_share(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _describe_points(gain: Mapping[str, float]) -> str:
    low, value, high = (100 * gain[name] for name in ("low", "value", "high"))
    unsure = "" if low > 0 or high < 0 else "; may be chance"
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]{unsure}"
