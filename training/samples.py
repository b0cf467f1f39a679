"""The samples stage: questions and an index become RAFT rows, closed-book rows and test questions.

In: the recipe's `questions`, `prompt` and `samples` sections, and an index artifact. Out: a `samples` artifact:

    questions.parquet              every kept question with its split
    raft/part-N.parquet            RAFT rows that train
    dsf/part-N.parquet             closed-book rows that train
    validation/<objective>-N.parquet   rows of both objectives that validate, never trained on
    examples.parquet               rows used as worked examples in few-shot prompts

and a data card in its manifest (`measured["card"]`). The driver holds the questions, never the rows.
Not covered: one row's content (training/raft_rows.py), writing rows on workers (training/sample_writer.py), splits
(training/splits.py), training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import UserError
from cluster.manifest import fingerprint
from cluster.progress import say
from cluster.stage import Outcome, Plan, digest_path, run_stage
from retrieval.documents import join_path, open_filesystem
from retrieval.question_files import FORMATS
from retrieval.questions import is_beir
from retrieval.records import Question
from training.config import QUESTION_FILES, TrainingRecipe
from training.data_card import count_kinds, make_card
from training.format import FORMAT_VERSION, PromptFormat, WorkedExample, prompt_path
from training.raft_rows import RowMaker
from training.records import RaftSample
from training.sample_choice import choose_questions, keep_questions_about_seen_facts
from training.sample_writer import COVERAGE, DSF, RAFT, VALIDATION, SampleJob, write_samples
from training.splits import held_out_documents, prepare_questions

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.store import Artifact, Attempt, Store

SAMPLES_FORMAT = 2
EXAMPLES = 4
EXAMPLE_CANDIDATES = 40
READ_ROWS = 1024

Objective = Literal["raft", "dsf"]


def require_questions(recipe: TrainingRecipe) -> None:
    """Refuses a recipe without questions before anything long is begun.

    Raises:
        UserError: naming the recipe key.
    """
    questions_inputs(recipe)


def questions_inputs(recipe: TrainingRecipe) -> dict[str, str]:
    """Digests of the question files, by their recipe keys.

    Raises:
        UserError: there is no such file, naming the key.
    """
    paths = {f"questions.{key}": getattr(recipe.questions, key) for key in QUESTION_FILES}
    return {key: _questions_digest(path, key) for key, path in paths.items() if path or key == "questions.path"}


def samples_plan(recipe: TrainingRecipe, index: Artifact) -> Plan:
    """What the samples depend on."""
    inputs = questions_inputs(recipe)
    inputs["prompt.path"] = digest_path(str(prompt_path(recipe.prompt, recipe.language)), key="prompt.path")
    config = {
        "samples": recipe.samples.model_dump(exclude={"workers"}),
        "prompt": recipe.prompt.model_dump(exclude={"path"}),
        "questions": recipe.questions.model_dump(exclude=set(QUESTION_FILES)),
        "prompt_format": FORMAT_VERSION,
    }
    if mined_by := _search_settings(recipe):
        config["search"] = mined_by
    return Plan("samples", recipe.name, config, inputs, {"index": index.ref}, SAMPLES_FORMAT, recipe.seed)


def _search_settings(recipe: TrainingRecipe) -> dict[str, Any]:
    """Settings of the search that mines distractors, where they are not the default; those that the index's own
    version does not tell."""
    settings = recipe.search.model_dump(exclude={"mode", "gpu"}, exclude_defaults=True)
    return {"mode": "hybrid", **settings} if recipe.search.mode == "hybrid" else settings


def _questions_digest(path: str, key: str) -> str:
    if not path:
        raise UserError(f"{key} is empty: set it to your questions: {FORMATS} (--set {key}=…)")
    file = Path(path).expanduser()
    if file.is_file() and is_beir(file):  # judgements lie beside the file and are read with it
        return fingerprint([digest_path(str(part), key=key) for part in (file, file.parent / "qrels")])
    return digest_path(str(file) if path.startswith("~") else path, key=key)


def build_samples(recipe: TrainingRecipe, store: Store, index: Artifact) -> Artifact:
    """The samples of `recipe`, built unless the same exist.

    Raises:
        UserError: Questions that cannot be read or split, or of which none can be trained on.
    """
    return run_stage(store, samples_plan(recipe, index), functools.partial(_build, recipe, index))


def _build(recipe: TrainingRecipe, index: Artifact, attempt: Attempt) -> Outcome:
    config = TrainingRecipe.model_validate(recipe.training_values())  # workers need not know the whole recipe's class
    prompt_format = PromptFormat.load(config.prompt, config.language)
    prepared = prepare_questions(config)
    held_out = frozenset(held_out_documents(prepared.questions))
    closed_book = RowMaker(config.samples, prompt_format, config.seed, {}, held_out).dsf
    chosen = choose_questions(prepared.questions, config.samples, config.seed, closed_book)
    kept = keep_questions_about_seen_facts(prepared.questions, chosen.dsf)
    job = SampleJob(config, prompt_format, index, attempt.uri, held_out)
    written = write_samples(
        job,
        {
            RAFT: chosen.raft,
            DSF: chosen.dsf,
            VALIDATION + RAFT: chosen.validation_raft,
            VALIDATION + DSF: chosen.validation_dsf,
            COVERAGE: kept,
        },
    )
    _remove_unfinished(attempt.directory)
    examples = _choose_examples(_first_rows(attempt.uri, EXAMPLE_CANDIDATES))
    write_table(attempt.directory / "questions.parquet", [q.to_row() for q in kept], Question.schema())
    write_table(attempt.directory / "examples.parquet", [row.to_row() for row in examples], RaftSample.schema())
    held = index.manifest.counts
    elsewhere = {"asks about a fact that no closed-book row teaches": len(prepared.questions) - len(kept)}
    card = make_card(
        written.tally,
        questions=count_kinds(kept),
        dropped={
            "questions": prepared.drops,
            "training questions": chosen.drops,
            "test questions": {reason: count for reason, count in elsewhere.items() if count},
        },
        coverage=written.coverage.summary(int(held["documents"]), int(held["chunks"])),
        held_out_documents=len(held_out),
        tokenizer=written.tokenizer,
    )
    _report_drops(card, len(chosen.raft), chosen.candidates, chosen.drops)
    splits = {f"questions_{split}": sum(kinds.values()) for split, kinds in card["questions"].items()}
    rows = {part.replace("-", "_"): count for part, count in card["rows"].items()}
    return Outcome({**splits, **rows, "examples": len(examples)}, {"card": card})


def _describe(drops: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items()))


def _report_drops(card: Mapping[str, Any], asked: int, candidates: int, dropped: Mapping[str, int]) -> None:
    """Says why questions gave no RAFT row; refuses samples without any."""
    drops = {**dropped, **card["drops"].get(RAFT, {})}
    told = _describe(drops) or _describe(card["drops"].get("questions", {})) or "no training question"
    if not card["rows"].get(RAFT):
        raise UserError(f"samples: none of {candidates} training questions gave a row: {told}")
    if drops:
        say(f"samples: left out {sum(drops.values())} of {asked + sum(dropped.values())} questions: {told}")


def _remove_unfinished(directory: Path) -> None:
    """A worker that was killed while it wrote leaves a part under another name, and its successor writes it anew."""
    for path in directory.rglob("*.unfinished-*"):
        path.unlink()


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as one local Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _choose_examples(raft: Sequence[RaftSample]) -> list[RaftSample]:
    """Short rows that show the whole format: golden passage present, with its quote where targets carry one."""
    candidates = [row for row in raft if row.golden_present]
    quoted = [row for row in candidates if row.quotes] or candidates
    return sorted(quoted, key=lambda row: (sum(len(p.text) for p in row.passages), row.sample_id))[:EXAMPLES]


def _first_rows(uri: str, count: int) -> list[RaftSample]:
    """The first RAFT rows below an address, from where the workers wrote them, in the order of their questions."""
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

    filesystem, inner = open_filesystem(join_path(uri, RAFT))
    files = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    rows: list[RaftSample] = []
    for path in sorted(file.path for file in files if file.path.endswith(".parquet")):
        with filesystem.open_input_file(path) as file:
            rows += map(RaftSample.from_row, pq.read_table(file).slice(0, count - len(rows)).to_pylist())
        if len(rows) >= count:
            break
    return rows


def sample_files(samples: Artifact, objective: str) -> list[Path]:
    """Local, verified Parquet files (`RaftSample` rows) that an objective trains on, in the order of their rows."""
    return _files(samples, f"{objective}/")


def validation_files(samples: Artifact, objective: str) -> list[Path]:
    """Local, verified Parquet files of the rows that validate an objective, in the order of their rows."""
    return _files(samples, f"validation/{objective}-")


def _files(samples: Artifact, prefix: str) -> list[Path]:
    names = sorted(entry.path for entry in samples.manifest.files if entry.path.startswith(prefix))
    directory = samples.directory()
    return [directory / name for name in names]


def iterate_rows(files: Sequence[Path]) -> Iterator[RaftSample]:
    """The rows of Parquet files in order, a thousand at a time."""
    import pyarrow.parquet as pq

    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_ROWS):
                yield from map(RaftSample.from_row, batch.to_pylist())


def load_samples(samples: Artifact, objective: str) -> list[RaftSample]:
    """The rows that an objective (`raft` or `dsf`) trains on, in order before shuffling, all in memory."""
    return list(iterate_rows(sample_files(samples, objective)))


def load_validation(samples: Artifact, objective: str) -> list[RaftSample]:
    """The rows that validate an objective (`raft` or `dsf`), in order; empty where the questions were too few.

    No objective trains on their questions.
    """
    return list(iterate_rows(validation_files(samples, objective)))


def load_questions(samples: Artifact, split: str | None = None) -> list[Question]:
    """The questions of a split (none: all), in file order."""
    import pyarrow.parquet as pq

    rows = pq.read_table(samples.path("questions.parquet")).to_pylist()
    return [question for question in map(Question.from_row, rows) if split in (None, question.split)]


def load_examples(samples: Artifact) -> tuple[WorkedExample, ...]:
    """Worked examples for few-shot prompts, best first."""
    rows = iterate_rows([samples.path("examples.parquet")])
    return tuple(WorkedExample(row.question, row.passages, row.target) for row in rows)
