"""The runs behind docs/results.md: carried out one after another, written down one by one.

In: runs (benchmarks/results_cells.py), the folder of the data sets, a store. Out: per run one JSON record in the
work folder (`Record`: done or failed, the report's and the release's version, seconds per step) and one log. A run
that is done is not repeated, one that failed is tried again, and neither stops the others.
Not covered: what the reports say (benchmarks/results_page.py).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.conditions import describe_conditions
from benchmarks.results_cells import Run
from cluster.errors import UserError
from cluster.manifest import ArtifactRef
from cluster.progress import describe_seconds, say
from cluster.recipe import load_recipe
from cluster.store import Store
from rayft import Recipe

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "sentence-transformers", "faiss-cpu")
BAD_INPUT = 2
"""Exit status for input that a user must mend: trying again would not help."""
State = Literal["done", "failed"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What became of a run."""

    name: str
    digest: str
    state: State
    reason: str = ""
    report: str = ""
    release: str = ""
    seconds: tuple[tuple[str, float], ...] = ()
    conditions: str = ""


def settings_of(run: Run, data: Path | None, store_uri: str, licence: str = "") -> list[str]:
    """All overrides of a run; `licence` is one that the caller accepts.

    Raises:
        UserError: the run needs a data set that is not there.
    """
    settings = [f"store.uri={store_uri}", *([f"model.accept_licence={licence}"] if licence else [])]
    if run.data:
        if data is None:
            raise UserError(f"needs --data DIR with {run.data}/corpus.jsonl and {run.data}/questions.jsonl")
        folder = data / run.data
        for key in ("corpus", "questions"):
            if not (folder / f"{key}.jsonl").is_file():
                raise UserError(f"--data: {folder / key}.jsonl does not exist")
            settings.append(f"{key}.path={folder / key}.jsonl")
    return [*settings, *run.settings]


def command_of(step: str, recipe: str, settings: Sequence[str]) -> list[str]:
    """A step as a command line: `train lora --force` becomes `train lora RECIPE --set … --force`; options that the
    step states come last, so that they win."""
    words = shlex.split(step)
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    sets = [word for setting in settings for word in ("--set", setting)]
    return [*words[:first], recipe, *sets, *words[first:]]


Call = Callable[[list[str], Path], int]


def call_rayft(words: list[str], log: Path) -> int:
    """Runs `rayft WORDS…` in a process of its own, its output appended to `log`; the exit status."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ rayft {shlex.join(words)}\n")
        file.flush()
        done = subprocess.run([sys.executable, "-m", "rayft", *words], stdout=file, stderr=file, check=False)
    return done.returncode


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where runs are carried out and written down."""

    work: Path
    """Folder of records and logs."""
    store: Store
    data: Path | None = None
    licence: str = ""
    call: Call = call_rayft

    def record(self, run: Run) -> Record | None:
        """What became of `run`, as the cells file states it now; none if it was not carried out."""
        path = self.work / f"{run.name}.json"
        if not path.is_file():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**{**row, "seconds": tuple(tuple(pair) for pair in row["seconds"])})
        return record if record.digest == run.digest() else None

    def write(self, record: Record) -> Record:
        """Writes a record down."""
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / f".{record.name}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.work / f"{record.name}.json")
        return record

    def log(self, run: Run) -> Path:
        """Where the output of a run's commands goes."""
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work / f"{run.name}.log"


def carry_out_next(place: Workplace, run: Run, report_format: int, label: str) -> Record:
    """Carries out a run unless it is done; one that fails is written down, and raises nothing."""
    known = place.record(run)
    if known and known.state == "done" and _report_format(place.store, known) == report_format:
        say(f"results: {label}: {run.name} is done already")
        return known
    began = time.monotonic()
    say(f"results: {label}: {run.name} begins; its log is {place.log(run)}")
    record = place.write(carry_out(place, run, known))
    told = "is done" if record.state == "done" else f"failed: {record.reason}"
    say(f"results: {run.name} {told} ({describe_seconds(time.monotonic() - began)})")
    return record


def carry_out(place: Workplace, run: Run, known: Record | None = None) -> Record:
    """One run from its first command to its report. Where only the report is out of date, only that is made anew."""
    record = Record(run.name, run.digest(), "failed")
    try:
        settings = settings_of(run, place.data, place.store.uri, place.licence)
        recipe = load_recipe(run.recipe, settings, Recipe)
    except UserError as error:
        return dataclasses.replace(record, reason=str(error))
    steps = run.steps
    seconds: tuple[tuple[str, float], ...] = ()
    if known and known.state == "done" and place.store.exists(ArtifactRef("release", recipe.name, known.release)):
        steps, seconds = (f"evaluate --release {known.release}",), known.seconds
    conditions = describe_conditions(PACKAGES, recipe.seed)
    for step in steps:
        began = time.monotonic()
        log = place.log(run)
        words = command_of(step, run.recipe, settings)
        status = place.call(words, log)
        if status not in (0, BAD_INPUT):  # once more: a crowded machine may not start Ray in time
            status = place.call(words, log)
        if status != 0:
            return dataclasses.replace(record, reason=f"`rayft {step}` ended with status {status}: {_last_line(log)}")
        seconds = (*seconds, (step, round(time.monotonic() - began, 1)))
    report = place.store.current("report", recipe.name)
    release = place.store.current("release", recipe.name)
    if report is None:
        return dataclasses.replace(record, reason="its commands made no report")
    if steps != run.steps and known:
        release = known.release
    return dataclasses.replace(
        record,
        state="done",
        report=str(ArtifactRef("report", recipe.name, report)),
        release=release or "",
        seconds=seconds,
        conditions=known.conditions if known and steps != run.steps else conditions,
    )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("rayft: ")]
    return (own or lines or ["no output"])[-1][:300]


def _report_format(store: Store, record: Record) -> int:
    """The format of a record's report; 0 where the store has lost it."""
    ref = ArtifactRef.parse(record.report)
    return store.open_ref(ref).manifest.format if store.exists(ref) else 0


def load_report(store: Store, record: Record) -> dict[str, Any] | None:
    """The report of a run that is done, or none."""
    from evaluation.report import read_report

    if record.state != "done" or not store.exists(ref := ArtifactRef.parse(record.report)):
        return None
    return read_report(store.open_ref(ref))
