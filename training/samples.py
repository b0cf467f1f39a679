"""The samples stage: questions and an index become RAFT rows, closed-book rows and test questions.

In: the recipe's `questions`, `prompt` and `samples` sections, and an index artifact. Out: a `samples` artifact with
`questions.parquet` (every question with its split), `raft/part-N.parquet`, `dsf.parquet` and `examples.parquet`
(rows used as worked examples in few-shot prompts). Ray Data actors search the index and write the rows.
Not covered: one row's content (training/raft_rows.py), splits (training/splits.py), training.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import say, track
from cluster.session import ray_session
from cluster.stage import Outcome, Plan, digest_path, run_stage
from retrieval.documents import join_path, open_filesystem
from retrieval.questions import read_questions
from retrieval.records import Chunk, Question
from training.config import TrainingRecipe
from training.format import FORMAT_VERSION, PromptFormat, WorkedExample, prompt_path
from training.raft_rows import RowMaker
from training.records import RaftSample
from training.splits import NEW_QUESTIONS, TRAIN, assign_splits, held_out_documents, spread

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.store import Artifact, Attempt, Store
    from retrieval.retriever import Retriever

SAMPLES_FORMAT = 1
BLOCK_ROWS = 64
# Hits searched per question: enough that filtering held-out documents and false negatives leaves distractors.
MINING_DEPTH = 24
EXAMPLES = 4
EXAMPLE_CANDIDATES = 40


def require_questions(recipe: TrainingRecipe) -> None:
    """Refuses a recipe without questions before anything long is begun.

    Raises:
        UserError: naming `questions.path` or `questions.test_path`.
    """
    questions_inputs(recipe)


def questions_inputs(recipe: TrainingRecipe) -> dict[str, str]:
    """Digests of the question files, by their recipe keys.

    Raises:
        UserError: there is no such file, naming the key.
    """
    inputs = {"questions.path": _questions_digest(recipe.questions.path, "questions.path")}
    if recipe.questions.test_path:
        inputs["questions.test_path"] = _questions_digest(recipe.questions.test_path, "questions.test_path")
    return inputs


def samples_plan(recipe: TrainingRecipe, index: Artifact) -> Plan:
    """What the samples depend on."""
    inputs = questions_inputs(recipe)
    inputs["prompt.path"] = digest_path(str(prompt_path(recipe.prompt, recipe.language)), key="prompt.path")
    config = {
        "samples": recipe.samples.model_dump(),
        "prompt": recipe.prompt.model_dump(exclude={"path"}),
        "questions": recipe.questions.model_dump(exclude={"path", "test_path"}),
        "prompt_format": FORMAT_VERSION,
    }
    return Plan("samples", recipe.name, config, inputs, {"index": index.ref}, SAMPLES_FORMAT, recipe.seed)


def _questions_digest(path: str, key: str) -> str:
    if not path:
        raise UserError(f"{key} is empty: set it to a questions.jsonl (--set {key}=…)")
    return digest_path(path, key=key)


def build_samples(recipe: TrainingRecipe, store: Store, index: Artifact) -> Artifact:
    """The samples of `recipe`, built unless the same exist.

    Raises:
        UserError: Questions that cannot be read or split, or of which none can be trained on.
    """
    return run_stage(store, samples_plan(recipe, index), functools.partial(_build, recipe, index))


def _build(recipe: TrainingRecipe, index: Artifact, attempt: Attempt) -> Outcome:
    tests = read_questions(recipe.questions.test_path, "questions.test_path") if recipe.questions.test_path else None
    questions = assign_splits(read_questions(recipe.questions.path), tests, recipe.questions, recipe.seed)
    candidates = spread([q for q in questions if q.split == TRAIN and q.golden], len(questions), recipe.seed)
    held_out = frozenset(held_out_documents(questions))
    drops = _write_raft_rows(recipe, index, attempt, candidates[: recipe.samples.raft_rows], held_out)
    raft = _read_parts(attempt.uri)
    if not raft:
        raise UserError(f"samples: none of {len(candidates)} training questions gave a row: {_describe(drops)}")
    dsf, asked = _dsf_rows(recipe, candidates[: recipe.samples.dsf_rows])
    kept = _keep_questions_about_seen_facts(questions, asked)
    write_table(attempt.directory / "questions.parquet", [q.to_row() for q in kept], Question.schema())
    write_table(attempt.directory / "dsf.parquet", [row.to_row() for row in dsf], RaftSample.schema())
    examples = _choose_examples(raft)
    write_table(attempt.directory / "examples.parquet", [row.to_row() for row in examples], RaftSample.schema())
    if drops:
        say(f"samples: left out {sum(drops.values())} of {recipe.samples.raft_rows} questions: {_describe(drops)}")
    counts = {f"questions_{split}": count for split, count in collections.Counter(q.split for q in kept).items()}
    return Outcome(
        counts={**counts, "raft": len(raft), "dsf": len(dsf), "examples": len(examples)},
        measured={
            "test_documents": sorted(held_out),
            "dropped": dict(drops),
            "golden_share": round(sum(row.golden_present for row in raft) / len(raft), 4),
            "quoted_share": round(sum(bool(row.quotes) for row in raft) / len(raft), 4),
            "questions_about_other_facts": len(questions) - len(kept),
        },
    )


def _describe(drops: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(drops.items())) or "no training question"


def _write_raft_rows(
    recipe: TrainingRecipe, index: Artifact, attempt: Attempt, questions: Sequence[Question], held_out: frozenset[str]
) -> collections.Counter[str]:
    """Writes `raft/part-N.parquet`, a part per block of questions; returns how many gave no row, by reason."""
    import pyarrow as pa

    rows = [question.to_row() for question in questions]
    blocks = [
        pa.Table.from_pylist(rows[start : start + BLOCK_ROWS], schema=Question.schema()).append_column(
            "block", pa.array([start // BLOCK_ROWS] * len(rows[start : start + BLOCK_ROWS]))
        )
        for start in range(0, len(rows), BLOCK_ROWS)
    ]
    if not blocks:
        return collections.Counter()
    prompt_format = PromptFormat.load(recipe.prompt, recipe.language)
    arguments = (recipe.model_dump(), prompt_format, index, attempt.uri, held_out)
    # One block gives workers nothing to share, and starting them takes longer than the work itself.
    alone = len(blocks) == 1 and recipe.ray.address is None and not recipe.search.gpu
    drops: collections.Counter[str] = collections.Counter()
    with (
        contextlib.nullcontext() if alone else ray_session(recipe.ray),
        track("samples", len(rows), "questions") as bar,
    ):
        for row in _write_here(blocks, arguments) if alone else _write_on_workers(blocks, arguments):
            if row["fault"]:
                raise UserError(row["fault"])
            bar.advance(int(row["questions"]))
            drops.update({reason: int(count) for reason, count in zip(row["reasons"], row["drops"], strict=True)})
    return drops


def _write_here(blocks: Sequence[pa.Table], arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    writer = _RaftWriter(*arguments)
    for block in blocks:
        yield from writer(block).to_pylist()


def _write_on_workers(blocks: Sequence[pa.Table], arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    import ray

    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        _RaftWriter,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )
    yield from dataset.iter_rows()


class _RaftWriter:
    """Ray Data actor: makes the rows of a block of questions and writes them as one part."""

    def __init__(
        self,
        recipe: Mapping[str, Any],
        prompt_format: PromptFormat,
        index: Artifact,
        uri: str,
        held_out: frozenset[str],
    ) -> None:
        known = {name: value for name, value in recipe.items() if name in TrainingRecipe.model_fields}
        self.recipe = TrainingRecipe.model_validate(known)
        self.prompt_format = prompt_format
        self.index = index
        self.uri = uri
        self.held_out = held_out

    @functools.cached_property
    def retriever(self) -> Retriever:
        from retrieval.retriever import Retriever

        return Retriever.open(self.index, self.recipe.encoder, self.recipe.search)

    @functools.cached_property
    def maker(self) -> RowMaker:
        chunks_of: dict[str, list[Chunk]] = collections.defaultdict(list)
        for chunk in self.retriever.chunks():
            chunks_of[chunk.doc_id].append(chunk)
        trainable = sorted(set(chunks_of) - self.held_out)
        return RowMaker(self.recipe.samples, self.prompt_format, self.recipe.seed, chunks_of, self.held_out, trainable)

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            questions, drops, fault = *self._write(block), ""
        except UserError as error:  # Ray would wrap it in a traceback: it travels as data
            questions, drops, fault = 0, collections.Counter[str](), str(error)
        return _progress_row(questions, drops, fault)

    def _write(self, block: pa.Table) -> tuple[int, collections.Counter[str]]:
        """Writes the rows of a block; returns its questions, and how many gave no row, by reason."""
        number = block["block"][0].as_py()
        questions = [Question.from_row(row) for row in block.to_pylist()]
        depth = min(MINING_DEPTH, len(self.retriever))
        made = [
            self.maker.raft(question, hits)
            for question, hits in zip(questions, self.retriever.search([q.text for q in questions], depth), strict=True)
        ]
        rows = [row.to_row() for row in made if isinstance(row, RaftSample)]
        write_part(self.uri, f"raft/part-{number:05d}.parquet", rows, RaftSample.schema())
        return len(questions), collections.Counter(reason for reason in made if isinstance(reason, str))


def _progress_row(questions: int, drops: Mapping[str, int], fault: str) -> pa.Table:
    import pyarrow as pa

    names, numbers = pa.list_(pa.string()), pa.list_(pa.int64())
    return pa.table(
        {"questions": [questions], "reasons": [list(drops)], "drops": [list(drops.values())], "fault": [fault]},
        schema=pa.schema([("questions", pa.int64()), ("reasons", names), ("drops", numbers), ("fault", pa.string())]),
    )


def write_part(uri: str, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as a Parquet file below a directory that any worker can reach."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, inner = open_filesystem(join_path(uri, name))
    filesystem.create_dir(inner.rpartition("/")[0], recursive=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), inner, filesystem=filesystem)


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as one local Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _dsf_rows(recipe: TrainingRecipe, questions: Sequence[Question]) -> tuple[list[RaftSample], list[Question]]:
    maker = RowMaker(recipe.samples, PromptFormat.load(recipe.prompt, recipe.language), recipe.seed, {}, frozenset())
    made = [(maker.dsf(question), question) for question in questions]
    rows = [(row, question) for row, question in made if isinstance(row, RaftSample)]
    return [row for row, _ in rows], [question for _, question in rows]


def _keep_questions_about_seen_facts(questions: Sequence[Question], asked: Sequence[Question]) -> list[Question]:
    """Leaves out new questions about facts that no closed-book row teaches, where there are others.

    A closed-book model cannot answer what it was never told: asking it would measure the size of the training set.
    """
    seen = {(question.golden, question.answers) for question in asked}
    about_seen = {q.question_id for q in questions if q.split == NEW_QUESTIONS and (q.golden, q.answers) in seen}
    if not about_seen:
        return list(questions)
    return [q for q in questions if q.split != NEW_QUESTIONS or q.question_id in about_seen]


def _choose_examples(raft: Sequence[RaftSample]) -> list[RaftSample]:
    """Short rows that show the whole format: golden passage present, with its quote where targets carry one."""
    candidates = [row for row in raft[:EXAMPLE_CANDIDATES] if row.golden_present]
    quoted = [row for row in candidates if row.quotes] or candidates
    return sorted(quoted, key=lambda row: (sum(len(p.text) for p in row.passages), row.sample_id))[:EXAMPLES]


def _read_parts(uri: str) -> list[RaftSample]:
    """The RAFT rows below a directory, from where the workers wrote them, in the order of their blocks."""
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

    filesystem, inner = open_filesystem(join_path(uri, "raft"))
    files = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    paths = sorted(file.path for file in files if file.path.endswith(".parquet"))
    return [
        RaftSample.from_row(row) for path in paths for row in pq.read_table(path, filesystem=filesystem).to_pylist()
    ]


def _read_rows(path: Path) -> list[RaftSample]:
    import pyarrow.parquet as pq

    return [RaftSample.from_row(row) for row in pq.read_table(path).to_pylist()]


def load_samples(samples: Artifact, objective: str) -> list[RaftSample]:
    """The rows of an objective (`raft` or `dsf`), in training order before shuffling."""
    return _read_parts(str(samples.directory())) if objective == "raft" else _read_rows(samples.path("dsf.parquet"))


def load_questions(samples: Artifact, split: str | None = None) -> list[Question]:
    """The questions of a split (none: all), in file order."""
    import pyarrow.parquet as pq

    rows = pq.read_table(samples.path("questions.parquet")).to_pylist()
    return [question for question in map(Question.from_row, rows) if split in (None, question.split)]


def load_examples(samples: Artifact) -> tuple[WorkedExample, ...]:
    """Worked examples for few-shot prompts, best first."""
    rows = _read_rows(samples.path("examples.parquet"))
    return tuple(WorkedExample(row.question, row.passages, row.target) for row in rows)
