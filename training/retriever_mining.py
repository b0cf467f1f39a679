"""Searching the index for the retriever's training: rows for training questions, and what it finds for the others.

In: questions, the index of the untuned encoder. Out: `Mined`. Ray Data actors search and choose, block by block (this
process does, where a single actor on this machine would do no more); the rows come back in the order of the questions,
whatever the number of actors.
Not covered: what a row is made of (training/retriever_rows.py).
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.progress import track
from retrieval.config import EncoderConfig
from retrieval.records import Question
from training.config import TrainingRecipe
from training.retriever_rows import RowMiner, TrainingRow, by_document

if TYPE_CHECKING:
    import pyarrow as pa

    from cluster.store import Artifact
    from retrieval.retriever import Retriever

BLOCK_QUESTIONS = 256
POOL_HITS = 20  # hits of a question that always belong to the passages that it is measured in
Role = str
TRAINING, VALIDATION, HELD_OUT = "training", "validation", "held out"


@dataclass(frozen=True)
class Mined:
    """What the index gave."""

    rows: tuple[TrainingRow, ...]
    drops: Mapping[str, int]
    """Reason to how many training questions gave no row."""
    found_for_validation: frozenset[str]
    """Chunk ids of the best hits of all validation questions."""
    found_for_held_out: frozenset[str]


def untuned(recipe: TrainingRecipe) -> EncoderConfig:
    """The recipe's encoder as configured, not as tuned."""
    return recipe.encoder.model_copy(update={"tuned": "never"})


def mine(
    recipe: TrainingRecipe,
    index: Artifact,
    questions: Mapping[Role, Sequence[Question]],
    hidden: frozenset[str],
) -> Mined:
    """Searches the index for all questions with Ray Data; Ray must be initialised.

    Args:
        recipe: Its `retriever`, `encoder` and `search` sections.
        index: Of the untuned encoder.
        questions: By what they are for: `TRAINING`, `VALIDATION`, `HELD_OUT`.
        hidden: Documents whose passages may be no negatives.

    Raises:
        UserError: the index is lexical.
    """
    rows: list[TrainingRow] = []
    drops: collections.Counter[str] = collections.Counter()
    found: dict[Role, set[str]] = {VALIDATION: set(), HELD_OUT: set()}
    blocks = _blocks(questions)
    answers: dict[int, list[dict[str, Any]]] = {}
    with track("mine negatives", sum(map(len, questions.values())), "questions") as bar:
        for reply in _search(recipe, blocks, (recipe.training_values(), index, hidden)):
            if reply["fault"]:
                raise UserError(reply["fault"])
            answers[reply["block"]] = json.loads(reply["answers"])
            bar.advance(len(answers[reply["block"]]))
    for answer in (answer for number in sorted(answers) for answer in answers[number]):
        if answer["role"] != TRAINING:
            found[answer["role"]].update(answer["found"])
        elif answer["reason"]:
            drops[answer["reason"]] += 1
        else:
            rows.append(TrainingRow.from_row(answer["row"]))
    return Mined(tuple(rows), dict(drops), frozenset(found[VALIDATION]), frozenset(found[HELD_OUT]))


def _blocks(questions: Mapping[Role, Sequence[Question]]) -> list[pa.Table]:
    import pyarrow as pa

    blocks: list[pa.Table] = []
    for role, asked in questions.items():
        for start in range(0, len(asked), BLOCK_QUESTIONS):
            part = asked[start : start + BLOCK_QUESTIONS]
            table = pa.Table.from_pylist([question.to_row() for question in part], schema=Question.schema())
            number = pa.array([len(blocks)] * len(part))
            blocks.append(table.append_column("block", number).append_column("role", pa.array([role] * len(part))))
    return blocks


def _search(recipe: TrainingRecipe, blocks: Sequence[pa.Table], arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Each block's answers, in any order; in this process where a single actor on this machine would do no more."""
    import ray

    actors, gpus = recipe.encoder.actors, recipe.encoder.gpus_per_actor
    if actors == 1 and recipe.ray.address is None and not gpus:
        searcher = _Searcher(*arguments)
        for block in blocks:
            yield from searcher(block).to_pylist()
        return
    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        _Searcher,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        num_cpus=0.5,
        num_gpus=gpus or None,
    )
    yield from dataset.iter_rows()


class _Searcher:
    """Ray Data actor: searches for a block of questions."""

    def __init__(self, recipe: Mapping[str, Any], index: Artifact, hidden: frozenset[str]) -> None:
        self.recipe = TrainingRecipe.model_validate(recipe)
        self.index = index
        self.hidden = hidden

    @functools.cached_property
    def retriever(self) -> Retriever:
        return open_dense(self.recipe, self.index)

    @functools.cached_property
    def miner(self) -> RowMiner:
        return RowMiner(self.recipe.retriever, self.recipe.seed, by_document(self.retriever.chunks()), self.hidden)

    def __call__(self, block: pa.Table) -> pa.Table:
        import pyarrow as pa

        try:
            answers, fault = self._answers(block), ""
        except UserError as error:  # Ray would wrap it in a traceback: it travels as data
            answers, fault = [], str(error)
        number = block["block"][0].as_py()
        return pa.table({"block": [number], "answers": [json.dumps(answers)], "fault": [fault]})

    def _answers(self, block: pa.Table) -> list[dict[str, Any]]:
        role = block["role"][0].as_py()
        questions = [Question.from_row(row) for row in block.to_pylist()]
        depth = min(self.recipe.retriever.mining_depth if role == TRAINING else POOL_HITS, len(self.retriever))
        answers: list[dict[str, Any]] = []
        hits = self.retriever.search([question.text for question in questions], depth, mode="dense")
        for question, few in zip(questions, hits, strict=True):
            if role == TRAINING:
                row = self.miner.row(question, few)
                made = row.to_row() if isinstance(row, TrainingRow) else None
                answers.append({"role": role, "row": made, "reason": row if isinstance(row, str) else ""})
            else:
                answers.append({"role": role, "found": [hit.passage.chunk_id for hit in few]})
        return answers


def open_dense(recipe: TrainingRecipe, index: Artifact) -> Retriever:
    """The index of the untuned encoder, to be searched by it alone.

    Raises:
        UserError: the index is lexical, because the encoder does not know the corpus's language.
    """
    from retrieval.retriever import Retriever

    search = recipe.search.model_copy(update={"rerank": "", "mode": "auto"})
    retriever = Retriever.open(index, untuned(recipe), search)
    if retriever.mode == "lexical":
        raise UserError(
            f"encoder.model: {index.ref} is lexical, because {recipe.encoder.model} does not know this corpus's "
            "language: there is nothing to fine-tune; name a multilingual encoder"
        )
    return retriever
