"""The parts of docs/results.md beside the paper's table: variants of RAFT, the 2×2, the heat map, passages, Chinese.

In: cells. Out: Markdown sections, empty where the cells file has no such run. Not covered: the rest of the page
(benchmarks/results_page.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results_figures import ROWS, Cell, grid, matrix, of_part, paired
from cluster.progress import describe_seconds
from cluster.store import Store
from evaluation.intervals import Estimate
from evaluation.metrics import METRICS
from evaluation.tasks import SHOWN

NOT_MEASURED = "not measured"
IMAGE = "images/ablation.png"
GOLDEN_FRACTION, DISTRACTORS = "samples.golden_fraction", "samples.distractors"


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


def _base_of(cells: Sequence[Cell], variant: Cell) -> Cell | None:
    """The table's run that a variant varies: the first of its column."""
    return next((cell for cell in of_part(cells, "table") if cell.run.column == variant.run.column), None)


def variant(cells: Sequence[Cell], store: Store, part: Any, title: str, plain: str, varied: str) -> str:
    """RAFT of the table's run beside that of a run with one setting changed."""
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


def retriever(cells: Sequence[Cell], store: Store) -> str:
    """The 2×2 of plain and tuned retriever and generator."""
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


def ablation(cells: Sequence[Cell]) -> str:
    """The heat map's figures."""
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


def passages(cells: Sequence[Cell]) -> str:
    """RAFT with fewer and more passages than it was trained on."""
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


def chinese(cells: Sequence[Cell]) -> str:
    """RAFT and RAG in Chinese."""
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
