"""Writing the rows of samples: blocks of questions go to workers that search the index and write Parquet parts.

In: a `SampleJob` and the questions of each part. Out: `<part>/NNNNN.parquet` below the job's address, a part file per
block in the order of the questions; a `Tally` and a `Coverage` for the data card. The driver sends blocks of questions
and receives numbers; workers hold the mapped index and one block. What a block gives does not depend on which worker
takes it, nor on how many there are. Ray Data where there is something to share, otherwise in this process.
Not covered: which questions (training/sample_choice.py), one row (training/raft_rows.py), publishing
(training/samples.py).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import say, track
from cluster.session import ray_session
from retrieval.parts import Parts
from retrieval.records import Question
from retrieval.sources import one_line
from training.config import SamplesConfig, TrainingRecipe
from training.data_card import Coverage, Tally
from training.format import PromptFormat
from training.raft_rows import RowMaker
from training.records import RaftSample

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.store import Artifact
    from retrieval.by_document import ChunksByDocument
    from retrieval.retriever import Retriever

RAFT = "raft"
DSF = "dsf"
VALIDATION = "validation-"
COVERAGE = "coverage"
"""Questions whose golden places are looked up, for the card; no rows."""

BLOCK_ROWS = 64
"""Least questions of a block: one search, one part file."""
LARGEST_BLOCK = 1024
BLOCKS = 256
"""Blocks that many questions are cut into, as long as a block has no more than `LARGEST_BLOCK`."""


@dataclass(frozen=True)
class SampleJob:
    """What every worker needs; small, and picklable."""

    recipe: TrainingRecipe
    prompt_format: PromptFormat
    index: Artifact
    uri: str
    """Where parts are written: any address that workers and driver can reach."""
    held_out: frozenset[str]
    """Documents that no row may show."""


@dataclass(frozen=True)
class Written:
    """What the driver learns."""

    tally: Tally
    coverage: Coverage
    tokenizer: str
    """Whose tokens were counted; empty where there is no such tokenizer here."""


def write_samples(job: SampleJob, parts: Mapping[str, Sequence[Question]]) -> Written:
    """Writes the rows of each part: `raft`, `dsf`, `validation-raft`, `validation-dsf`, and counts for `coverage`.

    Raises:
        UserError: what a worker refused, in one line, or a place that cannot be written.
    """
    blocks = [block for part, questions in parts.items() for block in _cut(part, questions)]
    recipe = job.recipe
    # One block of rows gives workers nothing to share, and starting them takes longer than the work itself.
    alone = len(parts.get(RAFT, ())) <= BLOCK_ROWS and recipe.ray.address is None and not recipe.search.gpu
    tally, coverage = Tally(), Coverage()
    missing_tokenizer = ""
    with (
        contextlib.nullcontext() if alone else ray_session(recipe.ray),
        track("samples", sum(len(block) for block in blocks), "questions") as bar,
    ):
        for row in _write_here(blocks, job) if alone else _write_on_workers(blocks, job):
            if row["fault"]:
                raise UserError(row["fault"])
            tally.merge(Tally.from_json(row["tally"]))
            coverage.mark(json.loads(row["touched"]))
            missing_tokenizer = missing_tokenizer or row["no_tokenizer"]
            bar.advance(int(row["questions"]))
    if missing_tokenizer:
        say(f"samples: the data card lacks token lengths: {missing_tokenizer}")
    return Written(tally, coverage, "" if missing_tokenizer else recipe.model.base)


def part_name(part: str, number: int) -> str:
    """File of a block's rows; names of one part sort in the order of its questions."""
    folder, _, objective = part.partition("-")
    return f"{folder}/{objective or 'part'}-{number:05d}.parquet"


def _cut(part: str, questions: Sequence[Question]) -> Iterator[pa.Table]:
    """Blocks of `questions`; their size depends on how many there are, never on who works on them."""
    import pyarrow as pa

    size = max(BLOCK_ROWS, min(LARGEST_BLOCK, len(questions) // BLOCKS))
    for number, start in enumerate(range(0, len(questions), size)):
        rows = [question.to_row() for question in questions[start : start + size]]
        block = pa.Table.from_pylist(rows, schema=Question.schema())
        names, numbers = pa.array([part] * len(rows)), pa.array([number] * len(rows))
        yield block.append_column("part", names).append_column("block", numbers)


def _write_here(blocks: Sequence[pa.Table], job: SampleJob) -> Iterator[dict[str, Any]]:
    writer = SampleWriter(job)
    for block in blocks:
        yield from writer(block).to_pylist()


def _write_on_workers(blocks: Sequence[pa.Table], job: SampleJob) -> Iterator[dict[str, Any]]:
    import ray

    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        SampleWriter,
        fn_constructor_args=(job,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(job.recipe.samples.workers, len(blocks))),
        num_cpus=0.5,
        num_gpus=1 if job.recipe.search.gpu else 0,
    )
    yield from dataset.iter_rows()


class SampleWriter:
    """Ray Data actor: makes the rows of a block of questions and writes them as one part file."""

    def __init__(self, job: SampleJob) -> None:
        self.job = job
        self.config = job.recipe.samples

    @functools.cached_property
    def retriever(self) -> Retriever:
        """Opened at the first block that searches."""
        from retrieval.retriever import Retriever

        return Retriever.open(self.job.index, self.job.recipe.encoder, self.job.recipe.search)

    @functools.cached_property
    def chunks(self) -> ChunksByDocument:
        """Of the index, mapped."""
        return self.retriever.by_document()

    @functools.cached_property
    def maker(self) -> RowMaker:
        """Of rows that train."""
        trainable = self.chunks.doc_ids.without(self.job.held_out)
        job = self.job
        return RowMaker(self.config, job.prompt_format, job.recipe.seed, self.chunks, job.held_out, trainable)

    @functools.cached_property
    def validation_maker(self) -> RowMaker:
        """Of rows that validate: they show the golden passage, as a search in use does.

        A model cannot know an answer that it is neither shown nor taught; only where rows without the golden passage
        teach it to abstain is that something to validate too.
        """
        return dataclasses.replace(self.maker, config=validation_config(self.config))

    @functools.cached_property
    def closed_book_maker(self) -> RowMaker:
        """Of closed-book rows, which need no index."""
        job = self.job
        return RowMaker(self.config, job.prompt_format, job.recipe.seed, {}, job.held_out)

    @functools.cached_property
    def tokenizer(self) -> tuple[Any, str]:
        """The base model's, or none and why: samples may be made for a model that is not here."""
        from training.base_model import base_model_directory, load_tokenizer

        try:
            return load_tokenizer(base_model_directory(self.job.recipe.model)), ""
        except UserError as error:
            return None, str(error)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a block; its row of numbers."""
        import pyarrow as pa

        tally = Tally()
        touched: dict[str, dict[str, list[int]]] = {}
        fault = ""
        try:
            touched = self._work(block, tally)
        except UserError as error:  # Ray would wrap it in a traceback: it travels as data
            fault = str(error)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            fault = f"store.uri: cannot write samples to {self.job.uri}: {reason}"
        return _progress_row(len(block), tally, touched, self.tokenizer[1] if tally.counts and not fault else "", fault)

    def _work(self, block: pa.Table, tally: Tally) -> dict[str, dict[str, list[int]]]:
        part, number = block["part"][0].as_py(), block["block"][0].as_py()
        questions = [Question.from_row(row) for row in block.to_pylist()]
        if part == COVERAGE:
            return self._touched(questions)
        made = self._closed_book(questions) if part.endswith(DSF) else self._with_passages(part, questions, tally)
        rows = [row for row in made if isinstance(row, RaftSample)]
        tally.add_drops(part, collections.Counter(reason for reason in made if isinstance(reason, str)))
        for row, question in zip(made, questions, strict=True):
            if isinstance(row, RaftSample):
                tally.add_row(part, str(question.metadata.get("kind") or ""))
        for tokens in self._lengths(rows):
            tally.add_length(part, tokens)
        write_part(self.job.uri, part_name(part, number), rows)
        return {}

    def _with_passages(self, part: str, questions: Sequence[Question], tally: Tally) -> list[RaftSample | str]:
        trains = part == RAFT
        maker = self.maker if trains else self.validation_maker
        depth = min(self.config.mining_depth, len(self.retriever))
        counts: collections.Counter[str] = collections.Counter()
        made: list[RaftSample | str] = []
        found = self.retriever.search([question.text for question in questions], depth)
        for question, hits in zip(questions, found, strict=True):
            row = maker.raft(question, hits, counts)
            made.append(row)
            if trains and isinstance(row, RaftSample):
                tally.add_passages(row, hits)
        if trains:
            tally.add_maker(counts)
        return made

    def validation_rows(self, questions: Sequence[Question], objective: str) -> list[RaftSample | str]:
        """Rows of the form that validates, or why there is none, without writing or counting them."""
        if objective == DSF:
            return self._closed_book(questions)
        return self._with_passages(VALIDATION + objective, questions, Tally())

    def _closed_book(self, questions: Sequence[Question]) -> list[RaftSample | str]:
        return [self.closed_book_maker.dsf(question) for question in questions]

    def _lengths(self, rows: Sequence[RaftSample]) -> list[int]:
        from training.batching import tokenise

        tokenizer, _ = self.tokenizer
        if tokenizer is None:
            return []
        return [len(row.input_ids) for row in tokenise(rows, tokenizer, self.job.prompt_format)]

    def _touched(self, questions: Sequence[Question]) -> dict[str, dict[str, list[int]]]:
        """Numbers of the documents and chunks that the golden places of questions touch, by split."""
        documents: dict[str, set[int]] = collections.defaultdict(set)
        chunks: dict[str, set[int]] = collections.defaultdict(set)
        for question in questions:
            for golden in question.golden:
                places = self.chunks.places(golden)
                chunks[question.split].update(places.chunks)
                if places.document is not None:
                    documents[question.split].add(places.document)
        return {
            split: {"documents": sorted(documents[split]), "chunks": sorted(chunks[split])}
            for split in sorted({*documents, *chunks})
        }


def validation_config(config: SamplesConfig) -> SamplesConfig:
    """The `samples` section that validation rows are made by."""
    return config if config.without_golden == "abstain" else config.model_copy(update={"golden_fraction": 1.0})


def write_part(uri: str, name: str, rows: Sequence[RaftSample]) -> None:
    """Writes rows as a Parquet file below an address that any worker can reach; it appears whole or not at all."""
    import pyarrow as pa

    Parts(uri).write_table(name, pa.Table.from_pylist([row.to_row() for row in rows], schema=RaftSample.schema()))


def _progress_row(questions: int, tally: Tally, touched: Mapping[str, Any], no_tokenizer: str, fault: str) -> pa.Table:
    import pyarrow as pa

    row = {
        "questions": questions,
        "tally": tally.to_json(),
        "touched": json.dumps(touched),
        "no_tokenizer": no_tokenizer,
        "fault": fault,
    }
    return pa.Table.from_pylist([row])
