"""Training rows as token files: written once by the driver with Ray Data, read at random by every worker.

In: a samples artifact, the recipe, the prompt format. Out: `<uri>/<objective>/tokens-NNNNN.arrow` (Arrow IPC, one
record batch: sample_id, input_ids, target_tokens) in the order of the samples, and `<uri>/tokens.json`, written last,
without which there are no token files. Their bytes do not depend on the number of workers. `uri` is a local directory
or an object store that all workers reach; where it is local, files are memory-mapped, so that a worker holds the pages
it reads and not the set. A mixture of objectives is an order over both objectives' rows.
Not covered: the bytes of a file (training/token_files.py), which rows make a step, batches (training/batching.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.manifest import fingerprint
from cluster.model_source import model_digest
from cluster.progress import track
from cluster.session import ray_session
from training.base_model import base_model_directory, load_tokenizer
from training.batching import TokenRow, tokenise
from training.config import TrainingRecipe
from training.format import PromptFormat
from training.records import RaftSample
from training.samples import sample_files
from training.token_files import COMMIT, open_batch, read_commit, render, write_file

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from cluster.store import Artifact

TOKENS_FORMAT = 1
# Rows per file: 1024 RAFT rows of 450 tokens are 1.8 MB, and a second of tokenising.
FILE_ROWS = 1024


@dataclass(frozen=True)
class TokenCounts:
    """What one epoch trains on."""

    rows: int
    too_long: int
    """Rows left out because they have more than `train.max_tokens` tokens."""
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class _Piece:
    """Rows `[start, stop)` of the file of that number."""

    file: int
    start: int
    stop: int


def write_token_rows(
    recipe: TrainingRecipe, samples: Artifact, objective: str, prompt_format: PromptFormat, uri: str
) -> TokenCounts:
    """Tokenises an objective's training rows below `uri`, unless the same rows lie there already.

    Args:
        recipe: Its model, `train.max_tokens` and, for `raft`, `train.mixture`.
        samples: The samples artifact.
        objective: `raft` (with closed-book rows where the recipe mixes them in) or `dsf`.
        prompt_format: The format that the samples were made with.
        uri: A directory of its own, local or in an object store.

    Raises:
        UserError: No row has at most `train.max_tokens` tokens, or a mixture has no closed-book rows to draw from.
    """
    key = _key(recipe, samples, objective, prompt_format)
    committed = read_commit(uri)
    if committed is not None and committed.get("key") == key:
        with contextlib.suppress(UserError):  # a damaged file: all are written again
            return TokenRows.open(uri).counts
    mixture = _mixture(recipe, objective)
    files = {part: _write_objective(recipe, samples, part, prompt_format, uri) for part in mixture}
    _refuse_nothing_left(recipe, files)
    committed = {"key": key, "mixture": mixture, "seed": recipe.seed, "files": files}
    write_file(uri, COMMIT, json.dumps(committed, indent=1).encode())
    return TokenRows.open(uri).counts


def _mixture(recipe: TrainingRecipe, objective: str) -> dict[str, float]:
    if objective == "raft" and recipe.train.mixture.get("dsf"):
        return {part: recipe.train.mixture[part] for part in ("raft", "dsf")}
    return {objective: 1.0}


def _key(recipe: TrainingRecipe, samples: Artifact, objective: str, prompt_format: PromptFormat) -> str:
    """What the files depend on: a directory that holds other rows is written again."""
    texts = {**asdict(prompt_format), "texts": prompt_format.texts.model_dump()}
    return fingerprint(
        [
            TOKENS_FORMAT,
            str(samples.ref),
            _mixture(recipe, objective),
            texts,
            recipe.train.max_tokens,
            recipe.model.chat_template,
            model_digest(base_model_directory(recipe.model)),
            recipe.seed,
        ]
    )


def _refuse_nothing_left(recipe: TrainingRecipe, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for objective, parts in files.items():
        if not sum(part["rows"] for part in parts):
            left_out = sum(part["too_long"] for part in parts)
            if left_out:
                raise UserError(
                    f"train.max_tokens: none of {left_out} {objective} rows has at most {recipe.train.max_tokens} "
                    "tokens; raise it"
                )
            raise UserError(f"samples: there are no {objective} rows to train on; raise samples.{objective}_rows")


def _write_objective(
    recipe: TrainingRecipe, samples: Artifact, objective: str, prompt_format: PromptFormat, uri: str
) -> list[dict[str, Any]]:
    """Writes the objective's files; what each holds, in order."""
    units = _cut(_row_counts(samples, objective))
    arguments = (recipe.training_values(), samples, objective, prompt_format, uri)
    # One file gives workers nothing to share, and starting them takes longer than the work itself.
    if len(units) <= 1 and recipe.ray.address is None:
        written = [_Writer(*arguments).write(number, unit) for number, unit in enumerate(units)]
    else:
        with ray_session(recipe.ray):
            written = _write_on_workers(units, arguments, f"tokenise {objective}")
    return sorted(written, key=lambda file: str(file["name"]))


def _row_counts(samples: Artifact, objective: str) -> list[int]:
    import pyarrow.parquet as pq

    return [pq.read_metadata(path).num_rows for path in sample_files(samples, objective)]


def _cut(row_counts: Sequence[int]) -> list[list[_Piece]]:
    """Consecutive rows of the samples' files, cut into what one token file holds."""
    units: list[list[_Piece]] = []
    room = 0
    for file, rows in enumerate(row_counts):
        start = 0
        while start < rows:
            if room == 0:
                units.append([])
                room = FILE_ROWS
            taken = min(room, rows - start)
            units[-1].append(_Piece(file, start, start + taken))
            start, room = start + taken, room - taken
    return units


def _write_on_workers(units: Sequence[list[_Piece]], arguments: tuple[Any, ...], label: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import ray

    blocks = [
        pa.table({"number": [number], "pieces": [json.dumps([asdict(piece) for piece in unit])]})
        for number, unit in enumerate(units)
    ]
    # Half a CPU each: actors that claim every CPU would leave Ray Data none for its own tasks.
    most = max(1, int(ray.cluster_resources().get("CPU", 1)))
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Writer,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(most, len(units))),
        num_cpus=0.5,
    )
    written = []
    with track(label, len(units), "files") as bar:
        for row in dataset.iter_rows():
            file = json.loads(row["file"])
            if "fault" in file:
                raise UserError(file["fault"])
            written.append(file)
            bar.advance(1)
    return written


class _Writer:
    """Ray Data actor: tokenises the rows of one file and writes it. The tokenizer is loaded once."""

    def __init__(
        self, recipe: Mapping[str, Any], samples: Artifact, objective: str, prompt_format: PromptFormat, uri: str
    ) -> None:
        self.recipe = TrainingRecipe.model_validate(recipe)
        self.samples = samples
        self.objective = objective
        self.prompt_format = prompt_format
        self.uri = uri

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(base_model_directory(self.recipe.model))

    @functools.cached_property
    def paths(self) -> list[Path]:
        return sample_files(self.samples, self.objective)

    def __call__(self, block: pa.Table) -> pa.Table:
        import pyarrow as pa

        (row,) = block.to_pylist()
        try:
            file = self.write(row["number"], [_Piece(**piece) for piece in json.loads(row["pieces"])])
        except UserError as error:  # Ray would wrap it in a traceback: it travels as data
            file = {"fault": str(error)}
        return pa.table({"file": [json.dumps(file)]})

    def write(self, number: int, pieces: Sequence[_Piece]) -> dict[str, Any]:
        """Writes the file of that number; returns its name, digest and counts."""
        tables = [_read_table(self.paths[piece.file]).slice(piece.start, piece.stop - piece.start) for piece in pieces]
        samples = [RaftSample.from_row(row) for table in tables for row in table.to_pylist()]
        rows = tokenise(samples, self.tokenizer, self.prompt_format)
        fitting = [row for row in rows if len(row.input_ids) <= self.recipe.train.max_tokens]
        data = render(fitting)
        name = f"{self.objective}/tokens-{number:05d}.arrow"
        write_file(self.uri, name, data)
        return {
            "name": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "rows": len(fitting),
            "too_long": len(rows) - len(fitting),
        }


@functools.lru_cache(maxsize=1)
def _read_table(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def mixture_order(raft_rows: int, dsf_rows: int, mixture: Mapping[str, float], seed: int) -> np.ndarray:
    """Which rows one epoch of a mixture holds: all RAFT rows, and closed-book rows drawn or repeated to their share.

    Args:
        raft_rows: Number of RAFT rows, numbered from 0.
        dsf_rows: Number of closed-book rows, numbered from `raft_rows`.
        mixture: Weights of `raft` (above 0) and `dsf`.
        seed: Seed of the draw.

    Returns:
        (rows,) int64; RAFT rows first. No closed-book row stands more than once more often than another.
    """
    import numpy as np

    wanted = round(raft_rows * mixture.get("dsf", 0.0) / mixture["raft"])
    whole, rest = divmod(wanted, dsf_rows) if dsf_rows else (0, 0)
    drawn = sorted(random.Random(f"{seed}/mixture").sample(range(dsf_rows), rest))
    repeated = np.tile(np.arange(dsf_rows, dtype=np.int64), whole)
    chosen = np.concatenate([repeated, np.array(drawn, dtype=np.int64)]) + raft_rows
    return np.concatenate([np.arange(raft_rows, dtype=np.int64), chosen])


class TokenRows:
    """The training rows of one epoch, read at random; see `open`.

    `lengths`, `target_tokens`: (rows,) int64, tokens of each row and how many of them carry loss.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], order: np.ndarray, too_long: int) -> None:
        import numpy as np

        self._ids = [batch.column("sample_id") for batch in batches]
        self._tokens = [batch.column("input_ids").values.to_numpy() for batch in batches]
        self._offsets = [batch.column("input_ids").offsets.to_numpy() for batch in batches]
        self._first = np.cumsum([0, *(batch.num_rows for batch in batches)])  # number of each file's first row
        self._order = order
        lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        targets = np.concatenate([batch.column("target_tokens").to_numpy() for batch in batches])
        self.lengths: np.ndarray = lengths[order].astype(np.int64)
        self.target_tokens: np.ndarray = targets[order].astype(np.int64)
        self.counts = TokenCounts(len(order), too_long, int(self.lengths.sum()), int(self.target_tokens.sum()))

    @classmethod
    def open(cls, uri: str) -> TokenRows:
        """The rows that `write_token_rows` left at `uri`.

        Raises:
            UserError: They are not there, or a file is not what was written.
        """
        import numpy as np

        committed = read_commit(uri)
        if committed is None:
            raise UserError(f"{uri}: no {COMMIT} there; run `rayft train lora RECIPE` again, which writes it")
        files = committed["files"]
        parts = [part for objective in files.values() for part in objective]
        rows = {objective: sum(part["rows"] for part in listed) for objective, listed in files.items()}
        mixed = "raft" in rows and "dsf" in rows
        order = (
            mixture_order(rows["raft"], rows["dsf"], committed["mixture"], committed["seed"])
            if mixed
            else np.arange(sum(rows.values()), dtype=np.int64)
        )
        batches = [open_batch(uri, part["name"], part["sha256"]) for part in parts]
        return cls(batches, order, sum(part["too_long"] for part in parts))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> TokenRow:
        """The row at `place` of the epoch's rows, from 0.

        Raises:
            IndexError: There is none.
        """
        if not 0 <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        row = int(self._order[place])
        file = int(self._first.searchsorted(row, side="right")) - 1
        inside = row - int(self._first[file])
        start, stop = self._offsets[file][inside : inside + 2]
        tokens = tuple(self._tokens[file][start:stop].tolist())
        return TokenRow(self._ids[file][inside].as_py(), tokens, int(self.target_tokens[place]))
