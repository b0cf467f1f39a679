"""The report as one self-contained HTML page.

In: the content of `report.json`, examples. Out: the page's text; styles and plots are inline, nothing is fetched, and
everything that came from a document, a question or a model is escaped. Not covered: what the figures mean.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.progress import describe_seconds
from evaluation import table
from evaluation.examples import Example
from evaluation.metrics import METRICS
from evaluation.plots import kinds_plot, quality_plot, tradeoff_plot
from evaluation.summary import describe_difference, signed
from evaluation.tasks import SHOWN

_TEMPLATE = "report.html.j2"
_QUALITY = (
    "verified_answers",
    "verified_quotes",
    "quote_contains_answer",
    "quoted_answer",
    "in_form",
    "hallucination",
    "abstained",
    "cut_short",
)


def render_page(report: Mapping[str, Any], main: str, examples: Sequence[Example], ref: str) -> str:
    """The page; `main` is the strategy whose examples are shown, `ref` the report's own name."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": table.describe_share,
        "ms": table.describe_ms,
        "usd": table.describe_usd,
        "seconds": describe_seconds,
        "alarm": table.describe_alarm,
        "difference": describe_difference,
        "commonest": functools.partial(table.describe_commonest, report),
        "signed": signed,
    }
    plots = {
        "Quality of each strategy": quality_plot(report),
        "Quality against latency": tradeoff_plot(report),
        "RAFT and RAG by kind of question": kinds_plot(report),
    }
    return environment.get_template(_TEMPLATE).render(
        report=report,
        ref=ref,
        main=main,
        examples=examples,
        metrics=METRICS,
        quality=[
            name for name in dict.fromkeys((*SHOWN[report["task"]].columns, *_QUALITY)) if _measured(report, name)
        ],
        split_titles=table.SPLIT_TITLES,
        pairs=_pairs(report["comparisons"]),
        compared=list(dict.fromkeys(row["metric"] for row in report["comparisons"])),
        plots={
            title: plot for title, plot in plots.items() if plot
        },  # our own SVG: the one thing that the template does not escape
    )


def _pairs(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per pair of strategies and split, with its metrics side by side."""
    pairs: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in comparisons:
        key = (row["split"], row["first"], row["second"])
        pairs.setdefault(key, {"split": key[0], "first": key[1], "second": key[2]})[row["metric"]] = row
    return list(pairs.values())


def _measured(report: Mapping[str, Any], metric: str) -> bool:
    return any(metric in metrics for split in report["splits"].values() for metrics in split.values())
