"""docs/results.md, assembled from finished reports.

In: the runs and where they are written down. Out: the page, and the ablation's heat map as PNG beside it
(`images/ablation.png`). What has no report is shown as "not measured". Not covered: where the figures come from
(benchmarks/results_figures.py) and how they are measured (benchmarks/results_runs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results_variants
from benchmarks.results_cells import Run
from benchmarks.results_figures import (
    PAPER,
    PAPER_SETS,
    ROWS,
    Cell,
    bars,
    by_column,
    collect,
    grid,
    matrix,
    mean,
    of_part,
    order_against_paper,
    ranks,
)
from benchmarks.results_runs import Workplace
from benchmarks.results_variants import DISTRACTORS, GOLDEN_FRACTION, IMAGE, NOT_MEASURED, figure, signed, table
from cluster.progress import describe_seconds
from cluster.store import Store
from evaluation.metrics import METRICS
from evaluation.table import SPLIT_TITLES, describe_commonest
from evaluation.tasks import SHOWN

_HEAD = """# Results

Made by `python -m benchmarks.results` from finished runs: edit `benchmarks/results.yaml`, not this page. Brackets are
95% percentile-bootstrap intervals over questions; n is the number of questions; differences are paired, on the same
questions. Every figure is on held-out questions. What was not run is shown as "not measured".
"""


def write_page(out: Path, runs: Sequence[Run], place: Workplace) -> None:
    """Writes the page and its image from what is measured so far."""
    cells = collect(place, runs)
    ablation = of_part(cells, "ablation")
    if any(cell.report for cell in ablation):
        from benchmarks.results_plots import draw_heat_map

        rows, columns, values = matrix(grid(ablation, GOLDEN_FRACTION, DISTRACTORS))
        (out.parent / IMAGE).parent.mkdir(parents=True, exist_ok=True)
        draw_heat_map(out.parent / IMAGE, rows, columns, values)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(assemble(cells, place.store), encoding="utf-8")
    temporary.replace(out)


def assemble(cells: Sequence[Cell], store: Store) -> str:
    """The page's Markdown."""
    columns = by_column(cells)
    sections = [
        _HEAD,
        _paper_table(columns),
        _bars(columns),
        _differences(columns),
        _order(columns),
        _closed_book(columns),
        _details(columns),
        results_variants.variant(
            cells, store, "quotes", "RAFT without quotes (Factbook)", "with quotes", "without quotes"
        ),
        results_variants.variant(
            cells, store, "reasoning", "RAFT without reasoning (PubMedQA)", "with reasoning", "without reasoning"
        ),
        results_variants.retriever(cells, store),
        results_variants.ablation(cells),
        results_variants.passages(cells),
        results_variants.chinese(cells),
        _training(cells),
        _conditions(cells),
    ]
    return "\n".join(section.rstrip("\n") + "\n" for section in sections if section)


def _paper_table(columns: Mapping[str, Sequence[Cell]]) -> str:
    headers = ["", *(_heading(column, cells) for column, cells in columns.items())]
    rows = [[label, *(_seeds(cells, name) for cells in columns.values())] for name, label in ROWS.items()]
    caption = (
        "It is the table of the RAFT paper (arXiv 2403.10131, Table 1) with SmolLM2-135M, a model 50 times smaller. "
        "Two seeds: their mean, then each."
    )
    paper = table(
        ["the paper (LLaMA2-7B, %)", *PAPER_SETS],
        [[ROWS[name].removesuffix(", zero-shot"), *(f"{value:g}" for value in row)] for name, row in PAPER.items()],
    )
    return f"## The paper's table\n\n{caption}\n\n{table(headers, rows)}\n\n{paper}\n"


def _heading(column: str, cells: Sequence[Cell]) -> str:
    measured = [cell for cell in cells if cell.report]
    if not measured:
        return column
    cell = measured[0]
    assert cell.report is not None
    seeds = ", ".join(str(each.seed) for each in measured)
    n = "+".join(str(each.report["questions"][each.report["headline_split"]]) for each in measured if each.report)
    split = SPLIT_TITLES[cell.report["headline_split"]]
    most = describe_commonest(cell.report, cell.report["headline_split"]).strip().lower()
    lines = [f"{column}: {METRICS[cell.main].label}", split, f"n={n}, seed{'s' * (len(measured) > 1)} {seeds}", most]
    return "<br>".join(line for line in lines if line)


def _seeds(cells: Sequence[Cell], strategy: str) -> str:
    found = [(cell.seed, cell.value(strategy)) for cell in cells]
    measured = [(seed, estimate) for seed, estimate in found if estimate is not None]
    if len(measured) < 2:
        return figure(measured[0][1] if measured else None)
    shown = "; ".join(f"{seed}: {figure(estimate)}" for seed, estimate in measured)
    return f"**{mean(cells, strategy):.2f}** ({shown})"


def _bars(columns: Mapping[str, Sequence[Cell]]) -> str:
    words = {True: "met", False: "**not met**", None: NOT_MEASURED}
    rows = [[bar.what, bar.found, words[bar.met]] for bar in bars(columns)]
    return f"## What had to be shown\n\n{table(['bar', 'found', ''], rows)}\n"


def _differences(columns: Mapping[str, Sequence[Cell]]) -> str:
    pairs = (("raft", "rag"), ("raft", "rag_fewshot"), ("raft", "finetuned_rag"), ("raft", "finetuned"))
    rows = []
    for column, cells in columns.items():
        for cell in cells:
            name = f"{column}, seed {cell.seed}" if cell.report else f"{column} ({cell.run.name})"
            rows.append([name, *(signed(cell.difference(*pair)) for pair in pairs)])
    headers = ["", *(f"{ROWS[first]} − {ROWS[second]}" for first, second in pairs)]
    return f"## RAFT against the others, on the same questions\n\n{table(headers, rows)}\n"


def _order(columns: Mapping[str, Sequence[Cell]]) -> str:
    lines = []
    for column, cells in columns.items():
        order = order_against_paper(column, cells)
        if order is None:
            lines.append(f"- {column}: {NOT_MEASURED}.")
            continue
        values = {name: mean(cells, name) for name in PAPER}
        placed = ranks({name: value for name, value in values.items() if value is not None})
        ours = ", ".join(f"{placed[name]}. {ROWS[name]}" for name in sorted(placed, key=lambda name: placed[name]))
        nearest = "" if order.paper_set == column else "its nearest set, "
        line = (
            f"- {column} against {nearest}{order.paper_set}: {order.agree} of {order.pairs} pairs in the paper's order"
        )
        turned = "; ".join(f"{ROWS[better]} over {ROWS[worse]}" for better, worse in order.reversed)
        lines.append(f"{line}. Ours: {ours}." + (f" The other way round in the paper: {turned}." if turned else ""))
    intro = "Pairs of the paper's five rows (base, base + RAG zero-shot, DSF, DSF + RAG, RAFT), by the means above."
    return f"## Where the order agrees with the paper's\n\n{intro}\n\n" + "\n".join(lines) + "\n"


def _closed_book(columns: Mapping[str, Sequence[Cell]]) -> str:
    """Every set where passages make the closed-book adapter worse."""
    below: list[str] = []
    above: list[str] = []
    missing: list[str] = []
    for column, cells in columns.items():
        for cell in cells:
            row = cell.difference("finetuned_rag", "finetuned")
            if row is None:
                missing.append(column if cell.report is None else f"{column} (seed {cell.seed})")
                continue
            text = f"{column} (seed {cell.seed}): {signed(row)}"
            (below if row["value"] < 0 else above).append(text)
    lines = [
        f"- Below: {'; '.join(below)}." if below else "- Below: on none of the sets that are measured.",
        *([f"- Not below: {'; '.join(above)}."] if above else []),
        *([f"- {NOT_MEASURED.capitalize()}: {', '.join(missing)}."] if missing else []),
    ]
    intro = "In the paper, DSF + RAG is below DSF on four of five sets. DSF + RAG − DSF here:"
    return f"## Where DSF + RAG falls below DSF\n\n{intro}\n\n" + "\n".join(lines) + "\n"


def _details(columns: Mapping[str, Sequence[Cell]]) -> str:
    parts = []
    for column, cells in columns.items():
        for cell in cells:
            if cell.report is None:
                continue
            names = [*SHOWN[cell.report["task"]].columns, "quoted_answer", "in_form", "abstained"]
            shown = [name for name in dict.fromkeys(names) if METRICS[name]]
            for split, strategies in cell.report["splits"].items():
                headers = ["", *(METRICS[name].label for name in shown)]
                rows = [
                    [ROWS.get(name, name), *(_or_dash(metrics.get(metric)) for metric in shown)]
                    for name, metrics in strategies.items()
                ]
                n = cell.report["questions"][split]
                title = f"### {column}, seed {cell.seed}: {SPLIT_TITLES[split]} (n={n})"
                parts.append(f"{title}\n\n{table(headers, rows)}\n")
    note = (
        '"answer quoted": answerable questions whose answer carries a verified quote that holds an accepted answer. '
        '"in form" measures style: the answer mark, a quote where one is asked for, no longer than what was taught.'
    )
    return f"## Every measure\n\n{note}\n\n" + ("\n".join(parts) or f"{NOT_MEASURED}\n")


def _or_dash(estimate: Mapping[str, float] | None) -> str:
    return "–" if estimate is None else figure(estimate)


def _training(cells: Sequence[Cell]) -> str:
    rows, seen = [], set()
    for cell in cells:
        for role, facts in cell.trained.items():
            key = (cell.run.column, role, *map(str, facts.values()))
            if key in seen:
                continue
            seen.add(key)
            seconds = facts.get("training_seconds")
            rows.append(
                [
                    f"{cell.run.name}: {ROWS.get('finetuned' if role == 'finetuned' else 'raft', role)}",
                    *(_count(facts, name) for name in ("rows", "tokens", "target_tokens", "steps")),
                    describe_seconds(float(seconds)) if seconds is not None else "–",
                    _count(facts, "tokens_per_second"),
                    str(facts.get("device", "–")),
                ]
            )
    headers = ["adapter", "rows", "tokens", "of them targets", "steps", "training", "tokens/s", "device"]
    return f"## What was trained\n\n{table(headers, rows) if rows else NOT_MEASURED}\n"


def _count(facts: Mapping[str, Any], name: str) -> str:
    return f"{facts[name]:,.0f}" if name in facts else "–"


def _conditions(cells: Sequence[Cell]) -> str:
    rows = []
    machines: dict[str, None] = {}
    for cell in cells:
        record = cell.record
        done = record is not None and record.state == "done" and cell.report is not None
        if done and record is not None:
            machines[_machine(record.conditions)] = None
            total = describe_seconds(sum(seconds for _, seconds in record.seconds))
            steps = ", ".join(f"{step} {describe_seconds(seconds)}" for step, seconds in record.seconds)
            rows.append([cell.run.name, total, steps])
        else:
            rows.append([cell.run.name, NOT_MEASURED, "failed" if record and record.state == "failed" else ""])
    under = "\n".join(f"- {machine}" for machine in machines) or f"- {NOT_MEASURED}"
    return f"## Runs and conditions\n\n{under}\n\n{table(['run', 'seconds', 'commands'], rows)}\n"


def _machine(conditions: str) -> str:
    """Conditions without the load and the seed, which differ from run to run."""
    machine, _, rest = conditions.partition(", load ")
    versions = rest.partition("; ")[2].rpartition("; seed ")[0]
    return f"{machine}; {versions}" if versions else conditions
