"""The runs behind docs/results.md, as a cells file states them (benchmarks/results.yaml).

In: YAML. Out: runs in order, with everything that one takes from another filled in, and grids spread out.
Not covered: carrying them out (benchmarks/results_runs.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from cluster.config import Section
from cluster.errors import UserError
from cluster.recipe import read_recipe

Part = Literal["table", "quotes", "reasoning", "retriever", "ablation", "passages", "chinese"]


class RunEntry(Section):
    """A run as the cells file states it."""

    name: str
    """Name of the run: its record and its log."""
    part: Part
    """Place of its report in the page."""
    column: str = ""
    """Heading of its data set in the page; empty takes that of the run it is like."""
    like: str = ""
    """A run before it, whose recipe, data, column and settings it takes."""
    recipe: str = ""
    """Recipe file, or name of a packaged one."""
    data: str = ""
    """Folder under --data with corpus.jsonl and questions.jsonl; empty for a recipe that brings its own."""
    settings: tuple[str, ...] = ()
    """`--set` overrides, after those of the run it is like."""
    steps: str = "all"
    """Name of the list of commands."""


class GridEntry(Section):
    """Runs of every combination of some settings."""

    part: Part
    """Place of their reports in the page."""
    like: str
    """The run whose recipe, data, column and settings they take."""
    settings: tuple[str, ...] = ()
    """Further overrides."""
    steps: str
    """Name of the list of commands."""
    axes: dict[str, list[float | int]]
    """Recipe key to its values."""


class Cells(Section):
    """A cells file."""

    steps: dict[str, tuple[str, ...]]
    """Name to rayft commands; each is given the recipe and the settings of the run."""
    runs: tuple[RunEntry, ...]
    """Runs in order."""
    grids: tuple[GridEntry, ...] = ()
    """Grids of runs, after the runs."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, with everything that it takes from others filled in."""

    name: str
    part: Part
    column: str
    recipe: str
    data: str
    settings: tuple[str, ...]
    steps: tuple[str, ...]
    axes: tuple[tuple[str, float], ...] = ()

    def digest(self) -> str:
        """Changes with anything that the cells file, the recipe or its prompt file says about the run."""
        try:
            values = read_recipe(self.recipe, self.settings)
        except UserError:
            values = {}
        prompt = Path(str((values.get("prompt") or {}).get("path") or "."))
        text = prompt.read_text(encoding="utf-8") if prompt.is_file() else ""
        content = json.dumps([values, text, self.data, self.steps], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_cells(path: Path) -> list[Run]:
    """The runs of a cells file, in order.

    Raises:
        UserError: the file cannot be read, a key is unknown, a name is repeated or stands for nothing.
    """
    try:
        cells = Cells.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--cells: cannot read {path}: {error}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"--cells: {path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    runs: dict[str, Run] = {}
    for entry in cells.runs:
        run = _resolve(cells, runs, entry)
        if run.name in runs:
            raise UserError(f"--cells: {path}: two runs are named {run.name}")
        runs[run.name] = run
    for grid in cells.grids:
        for values in itertools.product(*grid.axes.values()):
            run = _grid_run(cells, runs, grid, tuple(zip(grid.axes, values, strict=True)))
            runs[run.name] = run
    return list(runs.values())


def _resolve(cells: Cells, runs: Mapping[str, Run], entry: RunEntry) -> Run:
    if entry.steps not in cells.steps:
        raise UserError(f"--cells: run {entry.name}: no steps are named {entry.steps}")
    base = _like(runs, entry.like, entry.name) if entry.like else None
    recipe = entry.recipe or (base.recipe if base else "")
    if not recipe:
        raise UserError(f"--cells: run {entry.name} names neither a recipe nor a run that it is like")
    return Run(
        name=entry.name,
        part=entry.part,
        column=entry.column or (base.column if base else entry.name),
        recipe=recipe,
        data=entry.data or (base.data if base else ""),
        settings=(*(base.settings if base else ()), *entry.settings),
        steps=cells.steps[entry.steps],
    )


def _grid_run(cells: Cells, runs: Mapping[str, Run], grid: GridEntry, axes: tuple[tuple[str, float], ...]) -> Run:
    short = "-".join(f"{key.rpartition('.')[2]}-{value:g}" for key, value in axes)
    name = f"{grid.like}-{short}".replace("_", "-")
    stated = (*grid.settings, *(f"{key}={value:g}" for key, value in axes))
    entry = RunEntry(name=name, part=grid.part, like=grid.like, settings=stated, steps=grid.steps)
    return dataclasses.replace(_resolve(cells, runs, entry), axes=axes)


def _like(runs: Mapping[str, Run], name: str, of: str) -> Run:
    if name not in runs:
        raise UserError(f"--cells: run {of} is like {name}, which is no run before it")
    return runs[name]
