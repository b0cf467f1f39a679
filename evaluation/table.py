"""The terminal's view of a report: the four dimensions, alarms, quality per split. At most 100 columns wide.

In: the content of `report.json`. Out: text for `cluster.progress.say`. Not covered: the HTML page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from cluster.text_table import WIDTH, render_table
from evaluation.metrics import METRICS
from evaluation.summary import describe_difference
from evaluation.tasks import SHOWN

SPLIT_TITLES = {
    "test_new_documents": "documents never seen in training",
    "test_new_questions": "new questions about documents seen in training",
    "test_new_kinds": "kinds of question never seen in training",
}
ABSENT = "–"


def render_text(report: Mapping[str, Any]) -> str:
    """All tables of the report as plain text."""
    parts, shown = [_dimension_table(report)], SHOWN[report["task"]]
    if report["alarms"]:
        parts.append("\n".join(_wrapped(f"! {describe_alarm(alarm)}") for alarm in report["alarms"]))
    parts += [_quality_table(report, split) for split in report["splits"]]
    headline = [row for row in report["comparisons"] if row["split"] == report["headline_split"]]
    lines = [
        f"  {row['first']} − {row['second']}: {describe_difference(row)}"
        for row in headline
        if row["metric"] in shown.told and row["first"] == "raft"
    ] or [
        f"  {row['first']} − {row['second']}: {describe_difference(row)}"
        for row in headline
        if row["metric"] == shown.alarm
    ]
    if lines:
        parts.append("\n".join([f"Paired differences on {SPLIT_TITLES[report['headline_split']]}:", *lines]))
    return "\n\n".join(part.rstrip("\n") for part in parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def describe_alarm(alarm: Mapping[str, Any]) -> str:
    """The alarm as a sentence."""
    text: str = alarm["text"]
    return f"{text[0].upper()}{text[1:]}."


def _dimension_table(report: Mapping[str, Any]) -> str:
    headers = ("strategy", "to change a fact", "search", "generate", "P95", "1,000 answers", "hallucination")
    rows = [
        (
            name,
            describe_knowledge_change(dimension["knowledge_change"]),
            *(describe_hop(dimension["latency"], hop) for hop in ("retrieval_ms", "generation_ms", "total_p95_ms")),
            describe_cost(dimension["cost"]),
            describe_share(dimension["hallucination"]),
        )
        for name, dimension in report["dimensions"].items()
    ]
    settings, prices = report["settings"], report["settings"]["prices"]
    n = report["questions"][report["headline_split"]]
    caption = (
        f"Latency: {settings['latency_rows']} requests per strategy, one at a time: mean per hop, P95 of the sum. "
        f"Cost: measured batch throughput at ${prices['cpu_core_hour']:g} per core hour and ${prices['gpu_hour']:g} "
        f"per GPU hour; “+” is paid once, for index and training. Hallucination: n={n}, 95% interval in brackets."
    )
    return render_table("Knowledge change, latency, cost, hallucination", headers, rows, caption)


def _quality_table(report: Mapping[str, Any], split: str) -> str:
    metrics, columns = report["splits"][split], SHOWN[report["task"]].columns
    headers = ["strategy", *(METRICS[name].label for name in columns)]
    rows = [[name, *(compact(metrics[name].get(column)) for column in columns)] for name in metrics]
    title = f"Quality on {SPLIT_TITLES[split]} (n={report['questions'][split]})"
    caption = f"Brackets: 95% interval. k={report['settings']['passages']}.{describe_commonest(report, split)}"
    return render_table(title, headers, rows, caption)


def describe_commonest(report: Mapping[str, Any], split: str) -> str:
    """` Always the commonest label: 0.55.`, or nothing where the task has none."""
    share, what = report["commonest"][split], {"labels": "label", "api_calls": "domain"}.get(report["task"])
    return f" Always the commonest {what}: {share:.2f}." if what and share is not None else ""


def compact(estimate: Mapping[str, float] | None) -> str:
    """`0.65 [.53–.77]`: at most 14 characters, so that five fit beside a strategy's name."""
    if estimate is None:
        return ABSENT
    low, high = (f"{estimate[end]:.2f}".removeprefix("0").replace("1.00", "1") for end in ("low", "high"))
    return f"{estimate['value']:.2f} [{low}–{high}]"


def describe_share(estimate: Mapping[str, float] | None) -> str:
    """`12% [5, 20]`."""
    if estimate is None:
        return ABSENT
    return f"{estimate['value']:.0%} [{estimate['low'] * 100:.0f}, {estimate['high'] * 100:.0f}]"


def describe_ms(ms: float) -> str:
    """`0.4 ms`, `12 ms`, `3.1 s`."""
    if ms < 1:
        return "0 ms" if ms == 0 else f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def describe_hop(latency: Mapping[str, Mapping[str, float]], name: str) -> str:
    """One latency figure, or a dash where none was measured."""
    return describe_ms(latency[name]["value"]) if name in latency else ABSENT


def describe_usd(usd: float) -> str:
    """Two significant digits below a dollar, cents above."""
    if usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.2g}" if usd >= 0.0001 or usd == 0 else "<$0.0001"


def describe_cost(cost: Mapping[str, float | None]) -> str:
    """`$0.05 + $0.02`: per 1,000 answers, and what was paid once."""
    per_1000 = cost["per_1000_answers_usd"]
    once = (cost["indexing_once_usd"] or 0.0) + (cost["training_once_usd"] or 0.0)
    first = ABSENT if per_1000 is None else describe_usd(per_1000)
    return f"{first} + {describe_usd(once)}" if once else first


def describe_knowledge_change(change: Mapping[str, Any]) -> str:
    """`re-index: 42 s`."""
    if change["seconds"] is None:
        return str(change["how"])
    from cluster.progress import describe_seconds

    return f"{change['how']}: {describe_seconds(change['seconds'])}"
