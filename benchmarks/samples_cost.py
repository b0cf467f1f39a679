"""What one RAFT row costs at 100,000 questions over 100,000 chunks, against 1,000 over 1,000.

    python -m benchmarks.samples_cost [--sizes 1000,100000] [--rows 4096] [--rounds 3] [--set samples.distractors=3]

Generated documents of ten chunks, one question per chunk, vectors prepared (a mixture of topics, so that the index
that `index.kind: auto` chooses behaves as on real text): no model embeds anything. Measured is what the stage's actor
does with a block of questions: search, distractors, quote gate, targets, token lengths with the base model's tokenizer,
Parquet. Sizes take turns, block by block, in one process and on one thread; the figure is processor time, which other
programs on the machine do not lengthen. `--rows` limits the rows measured of a size (0: all), never its questions and
chunks. Prints milliseconds a row, their ratio (target at most 1.1), and beside it the rule of the reference
implementation, which lists all other chunks for every question before it draws distractors from them.
Not measured: embedding, starting Ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import retrieval.index
import retrieval.retriever
from benchmarks.conditions import describe_conditions, describe_load
from cluster.store import Store
from rayft import load
from retrieval.index import build_index
from retrieval.records import Golden, Question
from training.config import TrainingRecipe
from training.format import PromptFormat
from training.sample_choice import choose_questions
from training.sample_writer import RAFT, SampleJob, SampleWriter, _cut

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from retrieval.encoder import EncoderSource, Precision

PACKAGES = ("pyarrow", "numpy", "faiss-cpu", "transformers")
DIMENSION = 384
CHUNKS_PER_DOCUMENT = 10
CHUNKS_PER_TOPIC = 50
SPREAD = 0.7
"""Length of a chunk's own direction beside its topic's (benchmarks/vector_search.py measures on the same mixture)."""
WORDS = 12
VOCABULARY = 5000
REFERENCE_ROWS = 200
_ITEM = re.compile(r"item (\d+)")


def direction(name: str) -> npt.NDArray[np.float32]:
    """A random unit vector that follows from a name, (384,) float32."""
    import numpy as np

    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    vector = np.random.Generator(np.random.SFC64(seed)).standard_normal(DIMENSION, dtype=np.float32)
    unit: npt.NDArray[np.float32] = vector / np.linalg.norm(vector)
    return unit


def vector_of(item: int, of: str) -> npt.NDArray[np.float32]:
    """The vector of a chunk or of its question: the topic's direction and one of its own, (384,) float32."""
    import numpy as np

    mixed = direction(f"topic {item // CHUNKS_PER_TOPIC}") + SPREAD * direction(f"item {item}")
    if of == "question":
        mixed = mixed + 0.3 * direction(f"question {item}")
    unit: npt.NDArray[np.float32] = (mixed / np.linalg.norm(mixed)).astype(np.float32)
    return unit


class PreparedVectors:
    """A stand-in for the encoder that takes what the real one takes, and gives vectors that are ready."""

    dimension = DIMENSION
    questions: dict[str, Any] = {}  # noqa: RUF012  # one table for all instances: the retriever makes its own

    def __init__(
        self, source: EncoderSource, precision: Precision = "float32", device: str = "cpu", threads: int | None = None
    ) -> None:
        """Loads nothing."""

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, 384) float32, rows of length 1."""
        import numpy as np

        return np.stack([vector_of(int(_ITEM.search(text)[1]), "chunk") for text in texts])  # type: ignore[index]

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, 384) float32, rows of length 1; looked up."""
        import numpy as np

        return np.stack([self.questions[text] for text in texts])


def write_corpus(path: Path, chunks: int, seed: int) -> list[Question]:
    """A corpus.jsonl whose sections are one chunk each, and a question about each of them."""
    rng = random.Random(seed)
    questions = []
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, chunks, CHUNKS_PER_DOCUMENT):
            doc_id, text = f"doc-{first}", ""
            for item in range(first, min(chunks, first + CHUNKS_PER_DOCUMENT)):
                fact = f"The code of item {item} is C{item * 7 + 1}."
                text += f"## Section {item - first}\n\n"
                golden = (Golden(doc_id, len(text), len(text) + len(fact)),)
                text += f"{fact} {' '.join(f'w{rng.randrange(VOCABULARY)}' for _ in range(WORDS))}.\n\n"
                asked = f"What is the code of item {item}?"
                questions.append(Question(f"q{item}", asked, (f"C{item * 7 + 1}",), golden, "train"))
            file.write(json.dumps({"_id": doc_id, "title": f"Report {first}", "text": text}) + "\n")
    return questions


@dataclass
class Side:
    """One size: its actor, its blocks, and what they cost."""

    chunks: int
    writer: SampleWriter
    blocks: list[pa.Table]
    choice_s: float
    """Choosing among all its questions, processor seconds."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    rows: int = 0

    def run(self, place: int) -> None:
        """Have the actor make one block, and add up what that took."""
        block = self.blocks[place % len(self.blocks)]
        wall, cpu = time.perf_counter(), time.process_time()
        row = self.writer(block).to_pylist()[0]
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall
        assert not row["fault"], row["fault"]
        self.rows += sum(count for key, count in json.loads(row["tally"]) if key == ["rows", RAFT])

    def reset(self) -> None:
        """Start counting anew."""
        self.cpu_s = self.wall_s = 0.0
        self.rows = 0


def open_side(recipe: TrainingRecipe, folder: Path, chunks: int, limit: int) -> Side:
    """Builds the index of one size and opens an actor on it."""
    corpus = folder / "corpus.jsonl"
    questions = write_corpus(corpus, chunks, recipe.seed)
    own = recipe.model_copy(
        update={
            "name": f"cost-{chunks}",
            "corpus": recipe.corpus.model_copy(update={"path": str(corpus)}),
            "store": recipe.store.model_copy(update={"uri": str(folder / "store")}),
            "samples": recipe.samples.model_copy(update={"raft_rows": chunks, "dsf_rows": 1, "validation_rows": 0}),
        }
    )
    index = build_index(own, Store(own.store.uri), make_encoder=PreparedVectors)
    prompt_format = PromptFormat.load(own.prompt, own.language)
    writer = SampleWriter(SampleJob(own, prompt_format, index, str(folder / "parts"), frozenset()))
    cpu = time.process_time()
    chosen = choose_questions(questions, own.samples, own.seed, writer.closed_book_maker.dsf)
    choice_s = time.process_time() - cpu
    taken: list[pa.Table] = []
    for block in _cut(RAFT, chosen.raft):
        taken.append(block)
        if limit and sum(map(len, taken)) >= limit:
            break
    for block in taken:
        for text in block["text"].to_pylist():
            PreparedVectors.questions[text] = vector_of(int(_ITEM.search(text)[1]), "question")  # type: ignore[index]
    return Side(chunks, writer, taken, choice_s)


def reference_cost(chunks: int, distractors: int, seed: int) -> float:
    """Processor seconds a row of the reference's rule: list every other chunk, then draw distractors from the list."""
    rng = random.Random(seed)
    began = time.process_time()
    for _ in range(REFERENCE_ROWS):
        golden = rng.randrange(chunks)
        others = [place for place in range(chunks) if place != golden]
        rng.sample(others, distractors)
    return (time.process_time() - began) / REFERENCE_ROWS


def measure(sides: Sequence[Side], rounds: int) -> list[list[float]]:
    """Milliseconds a row of each side, round by round; blocks take turns by rows, so that both run all the time."""
    for side in sides:
        side.run(0)  # opens the index, loads the tokenizer
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        for side in sides:
            side.reset()
        goal = max(sum(map(len, side.blocks)) for side in sides)
        places = [0] * len(sides)
        while min(side.rows for side in sides) < goal:
            slowest = min(range(len(sides)), key=lambda place: sides[place].rows)
            sides[slowest].run(places[slowest])
            places[slowest] += 1
        for place, side in enumerate(sides):
            found[place].append(1000 * side.cpu_s / side.rows)
            print(
                f"round {number + 1}: {side.chunks:>8,} chunks: {found[place][-1]:.3f} ms a row "
                f"({1000 * side.wall_s / side.rows:.3f} ms on the clock), {side.rows} rows in blocks of "
                f"{len(side.blocks[0])}; load {describe_load()}",
                flush=True,
            )
    return found


def main() -> None:
    """Builds both sizes, measures them in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,100000")
    parser.add_argument("--rows", type=int, default=4096, help="rows measured of each size and round (0: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="own_documents")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(1)
    # Both indexes are built in this process: how is not measured, and actors take minutes to start on a busy machine.
    setattr(retrieval.index, "_may_run_alone", lambda *_: True)  # noqa: B010
    setattr(retrieval.retriever, "load_encoder", lambda source, device=None: PreparedVectors(source))  # noqa: B010
    recipe = load(arguments.recipe, ["search.mode=dense", "index.kind=auto", *arguments.overrides])
    print(describe_conditions(PACKAGES, recipe.seed), flush=True)
    with tempfile.TemporaryDirectory(prefix="samples-cost-") as folder:
        sides = []
        for size in map(int, arguments.sizes.split(",")):
            (place := Path(folder) / str(size)).mkdir()
            sides.append(open_side(recipe, place, size, arguments.rows))
            print(f"{size:>8,} questions: {1e6 * sides[-1].choice_s / size:.1f} µs a question to choose", flush=True)
        found = measure(sides, arguments.rounds)
    _, most = recipe.samples.distractor_range
    theirs = [1000 * reference_cost(side.chunks, most, recipe.seed) for side in sides]
    for side, mine, peer in zip(sides, found, theirs, strict=True):
        print(f"{side.chunks:>8,}: {statistics.median(mine):.3f} ms a row; the reference's rule alone {peer:.3f} ms")
    ratios = [large / small for small, large in zip(found[0], found[-1], strict=True)]
    print(
        f"cost of a row, largest ÷ smallest size: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}; target at most 1.1); of the reference's rule: "
        f"{theirs[-1] / theirs[0]:.1f}"
    )


if __name__ == "__main__":
    main()
