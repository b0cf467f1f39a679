"""Samples for other trainers: chat messages, prompts with completions, and the data format of gorilla's RAFT.

In: a samples artifact, a format, an objective and a split. Out: one `.jsonl` or `.parquet` file, written beside its
name and renamed, row by row. Prompts and targets are those that rayft trains on. Formats:

    messages           {"messages": [{role, content} …]}: system, user, and the target as the assistant's turn
    chat-completion    {"prompt": [{role, content} …], "completion": [{role, content}]}: the same, so that a trainer
                       such as TRL's computes loss on the target alone
    prompt-completion  {"prompt": text, "completion": text}: the same as plain text, system text first
    gorilla            the columns of gorilla's RAFT data sets (raft/raft.py in ShishirPatil/gorilla): id, type,
                       question, context {sentences, title}, oracle_context, cot_answer, instruction

Rows that train and rows that validate come from the artifact. For a test split rows are made now, in the form of
validation rows: the golden passage among distractors. Not covered: reading any of these formats.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cluster.errors import UserError
from cluster.progress import say, track
from training.format import Message, PromptFormat
from training.records import RaftSample
from training.samples import Objective, iterate_rows, load_questions, sample_files, validation_files
from training.splits import SPLITS, TRAIN

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.store import Artifact
    from training.config import TrainingRecipe

Format = Literal["messages", "chat-completion", "prompt-completion", "gorilla"]
FORMATS: tuple[Format, ...] = get_args(Format)
VALIDATION = "validation"
EXPORT_SPLITS = (TRAIN, VALIDATION, *SPLITS[1:])
BATCH_ROWS = 1024
MADE_AT_ONCE = 64

Row = dict[str, Any]


def export_samples(
    recipe: TrainingRecipe,
    samples: Artifact,
    out: Path,
    format: Format,
    split: str = TRAIN,
    objective: Objective = "raft",
) -> int:
    """Write the rows of a split to `out`; returns their number.

    Raises:
        UserError: see `check_export`; or the split has no rows, or `out` cannot be written.
    """
    check_export(out, format, split, objective)
    prompt_format = PromptFormat.load(recipe.prompt, recipe.language)
    rows = _rows_of(recipe, samples, split, objective)
    rendered = (_render(number, sample, format, prompt_format) for number, sample in enumerate(rows))
    write = _write_jsonl if out.suffix == ".jsonl" else _write_parquet
    beside = out.with_name(f".{out.name}.unfinished-{uuid.uuid4().hex[:12]}")
    try:
        with track("export", None, "rows") as bar:
            count = write(beside, _counted(rendered, bar.advance), format)
        if not count:
            raise UserError(f"--split: {samples.ref} has no {objective} rows of the split {split}")
        beside.replace(out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    say(f"samples: exported {count} {objective} rows ({split}) of {samples.ref} to {out}")
    return count


def check_export(out: Path, format: Format, split: str, objective: Objective) -> None:
    """Refuses what `export_samples` cannot write.

    Raises:
        UserError: naming the option.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out: {out} must end in .jsonl or .parquet")
    if split not in EXPORT_SPLITS:
        raise UserError(f"--split: there is no {split}; use one of {', '.join(EXPORT_SPLITS)}")
    if format == "gorilla" and objective != "raft":
        raise UserError("--format gorilla holds passages, which closed-book rows do not have: use --objective raft")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.absolute().parent}")


def _counted(rows: Iterable[Row], advance: Callable[[int], None]) -> Iterator[Row]:
    for row in rows:
        yield row
        advance(1)


def _rows_of(recipe: TrainingRecipe, samples: Artifact, split: str, objective: Objective) -> Iterator[RaftSample]:
    if split == TRAIN:
        return iterate_rows(sample_files(samples, objective))
    if split == VALIDATION:
        return iterate_rows(validation_files(samples, objective))
    return _test_rows(recipe, samples, split, objective)


def _test_rows(recipe: TrainingRecipe, samples: Artifact, split: str, objective: Objective) -> Iterator[RaftSample]:
    """Rows of test questions, which the artifact does not hold: they are never trained on."""
    from cluster.manifest import ArtifactRef
    from training.sample_writer import SampleJob, SampleWriter

    index = samples.store.open_ref(ArtifactRef.parse(samples.manifest.parents["index"]))
    # Nothing is held out here: a test question's own document is what it asks about.
    job = SampleJob(recipe, PromptFormat.load(recipe.prompt, recipe.language), index, "", frozenset())
    writer = SampleWriter(job)
    questions = iter(load_questions(samples, split))
    while block := list(islice(questions, MADE_AT_ONCE)):
        made = writer.validation_rows(block, objective)
        yield from (row for row in made if isinstance(row, RaftSample))


def _render(number: int, sample: RaftSample, format: Format, prompt_format: PromptFormat) -> Row:
    if format == "gorilla":
        return _gorilla_row(number, sample, prompt_format)
    prompt = prompt_messages(sample, prompt_format)
    target: list[Message] = [{"role": "assistant", "content": sample.target}]
    if format == "messages":
        return {"messages": [*prompt, *target]}
    if format == "chat-completion":
        return {"prompt": prompt, "completion": target}
    return {"prompt": "\n\n".join(message["content"] for message in prompt), "completion": sample.target}


def prompt_messages(sample: RaftSample, prompt_format: PromptFormat) -> list[Message]:
    """What the model is shown before it writes the target, in training as in use."""
    return prompt_format.messages(sample.question, None if sample.objective == "dsf" else sample.passages)


def _gorilla_row(number: int, sample: RaftSample, prompt_format: PromptFormat) -> Row:
    """Titles are the passages' own; `oracle_context` is empty where the row does not show its golden passage."""
    texts = [passage.text for passage in sample.passages]
    golden = [text for text, is_golden in zip(texts, sample.golden, strict=True) if is_golden]
    shown = "".join(f"<DOCUMENT>{text}</DOCUMENT>\n" for text in texts)
    return {
        "id": f"seed_task_{number}",
        "type": "general",
        "question": sample.question,
        "context": {"sentences": [texts], "title": [[prompt_format.passage_title(p) for p in sample.passages]]},
        "oracle_context": golden[0] if golden else "",
        "cot_answer": sample.target,
        "instruction": shown + sample.question,
    }


def _schema(format: Format) -> pa.Schema:
    import pyarrow as pa

    text, lists = pa.string(), pa.list_(pa.list_(pa.string()))
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    columns: dict[Format, list[tuple[str, pa.DataType]]] = {
        "messages": [("messages", messages)],
        "chat-completion": [("prompt", messages), ("completion", messages)],
        "prompt-completion": [("prompt", text), ("completion", text)],
        "gorilla": [
            ("id", text), ("type", text), ("question", text),
            ("context", pa.struct([("sentences", lists), ("title", lists)])),
            ("oracle_context", text), ("cot_answer", text), ("instruction", text),
        ],
    }  # fmt: skip
    return pa.schema(columns[format])


def _write_jsonl(path: Path, rows: Iterable[Row], format: Format) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Row], format: Format) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(format)
    count = 0
    stream = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(stream, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count
