"""Labelled utterances: what `rayft train router` learns from.

In: a .jsonl, .csv or .parquet file with the columns `text` and `intent`. Out: `Utterances`, each text once, and their
division into what is fitted to and what is measured on. Not covered: fitting (training/router_fit.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from retrieval.config import QuestionColumns
from retrieval.question_files import read_asked
from retrieval.rows import column_names
from training.format import fold
from training.router_config import IntentTraining

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KEY = "router.examples"
COLUMN = "intent"
SUFFIXES = (".jsonl", ".csv", ".parquet")
LEAST = 3
"""Utterances of an intent: one to measure on, two to fit to and choose the threshold with."""


@dataclass(frozen=True)
class Utterances:
    """Texts and their intents, in the file's order."""

    texts: tuple[str, ...]
    intents: tuple[str, ...]
    repeated: int = 0
    """Utterances left out because they stand there already, with the same intent."""

    def at(self, rows: npt.NDArray[np.int64]) -> Utterances:
        """Those in `rows`."""
        return Utterances(tuple(self.texts[row] for row in rows), tuple(self.intents[row] for row in rows))


def read_utterances(config: IntentTraining) -> Utterances:
    """The recipe's labelled utterances.

    Raises:
        UserError: naming `router.examples`: no file, another format, a missing column, a row without text or intent,
            an utterance with two intents, fewer than two intents, or an intent with too few utterances.
    """
    if not config.examples:
        raise UserError(f"{KEY} is empty: name a file of labelled utterances with the columns `text` and `intent`")
    shown, file = f"{KEY}: {config.examples}", _local(config.examples)
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{shown} is of no known format: give {', '.join(SUFFIXES)}")
    texts: list[str] = []
    intents: list[str] = []
    seen: dict[str, tuple[str, str]] = {}
    repeated = 0
    for asked in read_asked(file, shown, QuestionColumns(), named=False):
        text = asked.question.text.strip()
        intent = _intent(asked.question.metadata, f"{shown}{asked.place}")
        same = " ".join(fold(text)[0].casefold().split())
        if same not in seen:
            seen[same] = intent, asked.place
            texts.append(text)
            intents.append(intent)
        elif seen[same][0] == intent:
            repeated += 1
        else:
            other, place = seen[same]
            raise UserError(
                f"{shown}{asked.place} has the intent {intent!r}, but the same text{place} has {other!r}: keep one of "
                "them"
            )
    _check_counts(Counter(intents), config.out_of_scope, shown)
    return Utterances(tuple(texts), tuple(intents), repeated)


def _intent(row: dict[str, Any], place: str) -> str:
    if COLUMN not in row:
        raise UserError(f"{place} has no intent in its column {COLUMN!r}; its columns are text, {column_names(row)}")
    intent = row[COLUMN]
    if isinstance(intent, bool) or not isinstance(intent, str | int) or not str(intent).strip():
        raise UserError(f"{place} has an intent that is no text in its column {COLUMN!r}")
    return str(intent).strip()


def _local(path: str) -> Path:
    """A local file, fetched first where it is in an object store."""
    file = Path(path)
    if "://" in path:
        raise UserError(f"{KEY}: {path} is not a local file: copy it first")
    if not file.is_file():
        raise UserError(f"{KEY}: no such file: {path}")
    return file


def _check_counts(counts: Counter[str], out_of_scope: str, shown: str) -> None:
    if not counts:
        raise UserError(f"{shown} has no utterance")
    known = [intent for intent in counts if intent != out_of_scope]
    if len(known) < 2:
        raise UserError(f"{shown} has the intent {', '.join(known) or 'none'}: two at least are needed to tell apart")
    few = {intent: count for intent, count in counts.items() if count < LEAST}
    if few:
        some = ", ".join(f"{intent!r} has {count}" for intent, count in [*few.items()][:3])
        more = f" (and {len(few) - 3} more)" if len(few) > 3 else ""
        raise UserError(f"{shown}: every intent needs at least {LEAST} utterances; {some}{more}")


def divide(intents: tuple[str, ...], share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to fit to and rows to measure on, ascending: `share` of each intent, one at least, and two at least stay."""
    import numpy as np

    rng = np.random.default_rng(seed)
    held_out: list[int] = []
    labels = np.array(intents)
    for intent in sorted(set(intents)):
        rows = rng.permutation(np.flatnonzero(labels == intent))
        held_out.extend(rows[: min(max(1, round(share * len(rows))), len(rows) - 2)].tolist())
    measured = np.array(sorted(held_out), dtype=np.int64)
    return np.setdiff1d(np.arange(len(intents), dtype=np.int64), measured), measured
