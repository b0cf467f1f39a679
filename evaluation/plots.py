"""The report's plots, as inline SVG that takes the page's text colour and font.

In: the content of `report.json`. Out: `<svg>` elements without external resources or ids that clash. Drawn with
matplotlib's SVG backend, without pyplot; text stays text. Not covered: the page around them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from evaluation.metrics import METRICS
from evaluation.tasks import SHOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's own text colour; no plot uses it otherwise
_FAINT = "#8c8c8c"
# Okabe and Ito's palette, distinct under colour blindness and on dark and light pages alike.
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_FIRST, _SECOND = "#d55e00", "#56b4e9"
_MAX_KINDS = 40


def quality_plot(report: Mapping[str, Any]) -> str:
    """The task's scores of each strategy with 95% intervals; an empty string without accepted answers."""
    strategies, plotted = report["strategies"], SHOWN[report["task"]].plotted
    shown = [metric for metric in plotted if any(metric in metrics for metrics in strategies.values())]
    if not shown:
        return ""
    figure, axes = _figure(7.2, 0.9 + 0.62 * len(strategies))
    for place, metrics in enumerate(strategies.values()):
        for lane, (metric, colour) in enumerate(zip(shown, _COLOURS, strict=False)):
            if metric not in metrics:
                continue
            estimate = metrics[metric]
            y = place + (lane - (len(shown) - 1) / 2) * 0.22
            axes.plot([estimate["low"], estimate["high"]], [y, y], color=colour, linewidth=2.2, alpha=0.55)
            label = METRICS[metric].label if place == 0 else None
            axes.plot([estimate["value"]], [y], "o", color=colour, markersize=6, label=label)
    axes.set_yticks(range(len(strategies)), list(strategies))
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of questions (F1: mean), line: 95% interval")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(shown), frameon=False, labelcolor=_INK)
    return _svg(figure, "quality", "Quality of each strategy with 95% intervals")


def tradeoff_plot(report: Mapping[str, Any]) -> str:
    """The task's score against the mean latency of a lone request (logarithmic); empty where none was measured."""
    score = SHOWN[report["task"]].against_latency
    points = {
        name: (metrics["total_ms"], metrics[score])
        for name, metrics in report["strategies"].items()
        if "total_ms" in metrics and score in metrics
    }
    if not points:
        return ""
    figure, axes = _figure(7.2, 3.4)
    heights: list[float] = []
    for name, (latency, quality) in sorted(points.items(), key=lambda item: item[1][1]["value"]):
        x, y = latency["value"] / 1000, quality["value"]
        axes.plot([x, x], [quality["low"], quality["high"]], color=_FIRST, linewidth=1.6, alpha=0.5)
        axes.plot([x], [y], "o", color=_FIRST, markersize=7)
        # Labels climb in the order of quality and keep a line's distance, so that near points stay legible.
        heights.append(max(y, heights[-1] + 0.075) if heights else y)
        axes.annotate(
            name, (x, y), xytext=(9, (heights[-1] - y) * 190), textcoords="offset points", color=_INK, fontsize=10
        )
    _scale_seconds(axes, [latency["value"] / 1000 for latency, _ in points.values()])
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("mean latency of a lone request, logarithmic (further left is faster)")
    axes.set_ylabel(f"{METRICS[score].label} (higher is better)")
    return _svg(figure, "tradeoff", f"{METRICS[score].label} against latency")


def _scale_seconds(axes: Axes, seconds: Sequence[float]) -> None:
    """A logarithmic axis with labels at 1, 2 and 5 of each decade, at least a decade wide."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = max(min(seconds), 1e-6), max([*seconds, 1e-6])
    widen = max(1.6, (10 / (high / low)) ** 0.5)
    axes.set_xscale("log")
    axes.set_xlim(low / widen, high * widen)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g} s"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def kinds_plot(report: Mapping[str, Any], first: str = "raft", second: str = "rag") -> str:
    """Per kind of question, the share of answers that contain an accepted answer; empty without kinds or strategies."""
    rows = {kind: row for kind, row in report["kinds"].items() if first in row and second in row}
    if not rows:
        return ""
    ranked = sorted(rows.items(), key=lambda item: (item[1][first] - item[1][second], item[0]))[:_MAX_KINDS]
    figure, axes = _figure(7.2, 0.9 + 0.28 * len(ranked))
    for place, (_, row) in enumerate(ranked):
        axes.plot([row[second], row[first]], [place, place], color=_FAINT, linewidth=1.6, zorder=1)
        axes.plot([row[second]], [place], "o", color=_SECOND, markersize=8, label=second if place == 0 else None)
        axes.plot([row[first]], [place], "o", color=_FIRST, markersize=5, label=first if place == 0 else None)
    axes.set_yticks(range(len(ranked)), [f"{kind.replace('_', ' ')} (n={row['n']})" for kind, row in ranked])
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    right = METRICS[SHOWN[report["task"]].right]
    axes.set_xlabel(f"{right.label}: share of questions")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, labelcolor=_INK)
    return _svg(figure, "kinds", f"{first} and {second} by kind of question")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A transparent figure (inches) with the page's ink and a quiet grid, not registered with pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="x", color=_FAINT, alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> str:
    import matplotlib

    out = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Ids that other plots of the same page have too, such as axes_1.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
