"""docs/results.md, assembled from finished reports.

In: the runs and where they are written down. Out: the page, and the ablation's heat map as PNG beside it
(`images/ablation.png`). What has no report is shown as "not measured". Not covered: where the figures come from
(benchmarks/results_figures.py) and how they are measured (benchmarks/results_runs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    paired,
    ranks,
)
from benchmarks.results_runs import Run, Workplace
from cluster.progress import describe_seconds
from cluster.store import Store
from evaluation.intervals import Estimate
from evaluation.metrics import METRICS
from evaluation.table import describe_commonest
from evaluation.tasks import SHOWN

NOT_MEASURED = "not measured"
IMAGE = "images/ablation.png"
GOLDEN_FRACTION, DISTRACTORS = "samples.golden_fraction", "samples.distractors"
SPLIT_WORDS = {
    "test_new_documents": "documents never seen in training",
    "test_new_questions": "new questions about documents seen in training",
    "test_new_kinds": "kinds of question never seen in training",
}
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
        _variant(cells, store, "quotes", "RAFT without quotes (Factbook)", "with quotes", "without quotes"),
        _variant(cells, store, "reasoning", "RAFT without reasoning (PubMedQA)", "with reasoning", "without reasoning"),
        _retriever(cells, store),
        _ablation(cells),
        _passages(cells),
        _chinese(cells),
        _training(cells),
        _conditions(cells),
    ]
    return "\n".join(section.rstrip("\n") + "\n" for section in sections if section)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns after the first at the right."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "|".join(["---", *["---:"] * (len(headers) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(estimate: Mapping[str, float] | None) -> str:
    """`0.65 [0.53, 0.77]`."""
    if estimate is None:
        return NOT_MEASURED
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def signed(estimate: Mapping[str, float] | Estimate | None) -> str:
    """`+0.12 [+0.05, +0.20]`."""
    if estimate is None:
        return NOT_MEASURED
    row = estimate.to_json() if isinstance(estimate, Estimate) else estimate
    text = f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    return text.replace("-", "−")


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
    split = SPLIT_WORDS[cell.report["headline_split"]]
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
                title = f"### {column}, seed {cell.seed}: {SPLIT_WORDS[split]} (n={n})"
                parts.append(f"{title}\n\n{table(headers, rows)}\n")
    note = (
        '"answer quoted": answerable questions whose answer carries a verified quote that holds an accepted answer. '
        '"in form" measures style: the answer mark, a quote where one is asked for, no longer than what was taught.'
    )
    return f"## Every measure\n\n{note}\n\n" + ("\n".join(parts) or f"{NOT_MEASURED}\n")


def _or_dash(estimate: Mapping[str, float] | None) -> str:
    return "–" if estimate is None else figure(estimate)


def _base_of(cells: Sequence[Cell], variant: Cell) -> Cell | None:
    """The table's run that a variant varies: the first of its column."""
    return next((cell for cell in of_part(cells, "table") if cell.run.column == variant.run.column), None)


def _variant(cells: Sequence[Cell], store: Store, part: Any, title: str, plain: str, varied: str) -> str:
    found = of_part(cells, part)
    if not found:
        return ""
    variant, base = found[0], _base_of(cells, found[0])
    sides = [(plain, base), (varied, variant)]
    measured = [cell for _, cell in sides if cell is not None and cell.report is not None]
    if len(measured) < 2 or base is None:
        return f"## {title}\n\n{NOT_MEASURED}\n"
    task = SHOWN[variant.report["task"]] if variant.report else None
    assert task is not None
    names = [*task.told, "in_form", "generation_ms"]
    headers = ["RAFT", *(METRICS[name].label if name in METRICS else "generation of one answer" for name in names)]
    rows = [[label, *(_any(cell.value("raft", name), name) for name in names)] for label, cell in sides if cell]
    told = [f"{METRICS[name].label} {signed(paired(store, base, variant, 'raft', name))}" for name in task.told]
    return f"## {title}\n\n{table(headers, rows)}\n\n{plain.capitalize()} − {varied}: {'; '.join(told)}.\n"


def _any(estimate: Mapping[str, float] | None, name: str) -> str:
    if estimate is None:
        return NOT_MEASURED
    return describe_seconds(estimate["value"] / 1000) if name.endswith("_ms") else figure(estimate)


def _retriever(cells: Sequence[Cell], store: Store) -> str:
    found = of_part(cells, "retriever")
    if not found:
        return ""
    tuned, plain = found[0], _base_of(cells, found[0])
    rows = []
    for label, cell in (("plain retriever", plain), ("tuned retriever", tuned)):
        for strategy, generator in (("rag", "base generator"), ("raft", "tuned generator (RAFT)")):
            names = ("exact_match", "f1", "recall_at_k", "in_form")
            figures = [figure(cell.value(strategy, name) if cell else None) for name in names]
            rows.append([f"{label}, {generator}", *figures])
    headers = ["", "EM", "F1", "recall@k", "style: in form"]
    text = f"## Plain and tuned retriever × base and tuned generator (Factbook)\n\n{table(headers, rows)}\n"
    if plain is None or plain.report is None or tuned.report is None:
        return text
    gains = [
        f"{name}: EM {signed(paired(store, tuned, plain, strategy, 'exact_match'))}"
        for strategy, name in (("rag", "base generator"), ("raft", "tuned generator"))
    ]
    return f"{text}\nTuned − plain retriever, {'; '.join(gains)}. The adapter is the same on both indexes.\n"


def _ablation(cells: Sequence[Cell]) -> str:
    found = of_part(cells, "ablation")
    if not found:
        return ""
    by_axes = grid(found, GOLDEN_FRACTION, DISTRACTORS)
    rows, columns, _ = matrix(by_axes)
    headers = ["P (rows with their golden passage)", *(f"{column:g} distractors" for column in columns)]
    lines = [[f"{row:g}", *(figure(by_axes[row, column].value("raft")) for column in columns)] for row in rows]
    image = f"\n![RAFT by P and training distractors]({IMAGE})\n" if any(cell.report for cell in found) else ""
    title = "## P × distractors in training (Factbook, RAFT, exact match)"
    return f"{title}\n\n{table(headers, lines)}\n{image}"


def _passages(cells: Sequence[Cell]) -> str:
    found = of_part(cells, "passages")
    if not found:
        return ""
    names = ("exact_match", "f1", "recall_at_k", "quoted_answer", "total_ms")
    rows = []
    for cell in found:
        figures = [_any(cell.value("raft", name), name) for name in names]
        rows.append([f"{cell.run.axes[0][1]:g}", *figures])
    headers = ["passages shown", "EM", "F1", "recall@k", "answer quoted", "one request, mean"]
    return f"## Passages at test time (Factbook, RAFT)\n\n{table(headers, rows)}\n"


def _chinese(cells: Sequence[Cell]) -> str:
    found = of_part(cells, "chinese")
    if not found:
        return ""
    rows = []
    for cell in found:
        if cell.report is None:
            rows.append([cell.run.name, *[NOT_MEASURED] * 3])
            continue
        model = cell.report["lineage"]["base model"].partition(" (")[0].removeprefix("embedded:")
        for strategy in cell.report["strategies"]:
            names = ("exact_match", "f1", "contained")
            figures = [figure(cell.value(strategy, name)) for name in names]
            rows.append([f"{model}, {ROWS.get(strategy, strategy)}", *figures])
    told = [
        f"RAFT − {ROWS[rival]} ({cell.run.column}): EM {signed(cell.difference('raft', rival))}."
        for cell in found
        for rival in ("rag", "rag_fewshot")
        if cell.difference("raft", rival)
    ]
    note = (
        "EM and F1 over characters (CMRC 2018). SmolLM2-135M, the default generator, was trained on English and spells "
        "Chinese out in about 1.65 tokens per character: do not use it for Chinese."
    )
    text = f"## Chinese (xquad-zh)\n\n{note}\n\n{table(['', 'EM', 'F1', 'contained'], rows)}\n"
    return "\n".join([text, *told])


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
