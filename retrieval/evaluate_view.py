"""The retrieval report for people: tables for the terminal (at most 100 columns) and one plot.

In: the content of `retrieval.json`. Out: text, and the bytes of a PNG. Not covered: the figures (`evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from cluster.text_table import render_table

MAX_KINDS = 30
# Okabe and Ito's palette, distinct under colour blindness.
_COLOURS = {"dense": "#0072b2", "lexical": "#e69f00", "hybrid": "#009e73", "reranked": "#cc79a7"}


def render_text(report: Mapping[str, Any]) -> str:
    """All tables of the report as plain text."""
    parts = [_measures_table(report)]
    if report["differences"]:
        parts.append(_differences_table(report))
    if report["kinds"]:
        parts.append(_kinds_table(report))
    parts += [f"{mode} is left out: {reason}" for mode, reason in report["left_out"].items()]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def describe_estimate(estimate: Mapping[str, float]) -> str:
    """`0.916 [.897, .933]`."""
    low, high = (f"{estimate[end]:.3f}".removeprefix("0") for end in ("low", "high"))
    return f"{estimate['value']:.3f} [{low}, {high}]"


def describe_difference(estimate: Mapping[str, float]) -> str:
    """`+0.031 [+.012, +.050]`, with a star where the interval excludes 0."""
    low, high = (f"{estimate[end]:+.3f}".replace("0.", ".", 1) for end in ("low", "high"))
    star = " *" if estimate["low"] > 0 or estimate["high"] < 0 else ""
    return f"{estimate['value']:+.3f} [{low}, {high}]{star}"


def _measures_table(report: Mapping[str, Any]) -> str:
    modes, latency = report["modes"], report["latency_ms"]
    names = shown_measures(report)
    rows = [[name, *(describe_estimate(modes[mode][name]) for mode in modes)] for name in names]
    timed = next(iter(latency.values()))
    rows.append(["ms a query", *(f"{latency[mode]['p50']:.1f} (P95 {latency[mode]['p95']:.1f})" for mode in modes)])
    asked, settings = report["questions"], report["settings"]
    splits = ", ".join(f"{n} of {split}" for split, n in asked["splits"].items() if split)
    title = f"Retrieval of {report['index']}: {asked['asked']} questions" + (f" ({splits})" if splits else "")
    caption = (
        f"Ranked: {report['ranked']}, from {settings['depth']} passages a question. success@k: a golden place in the "
        f"first k passages. Brackets: 95% bootstrap interval. ms: {timed['n']} lone queries, k={timed['k']}."
    )
    if asked["golden_missing"]:
        caption += f" Misses because no golden document is in the index: {asked['golden_missing']}."
    if asked["without_golden"]:
        caption += f" Questions left out because they name no golden place: {asked['without_golden']}."
    return render_table(title, ["", *modes], rows, caption)


def _differences_table(report: Mapping[str, Any]) -> str:
    differences, reference = report["differences"], report["reference"]
    names = shown_measures(report)
    rows = [[name, *(describe_difference(differences[mode][name]) for mode in differences)] for name in names]
    headers = ["", *(f"{mode} − {reference}" for mode in differences)]
    return render_table("Paired differences", headers, rows, "*: the 95% interval excludes 0.")


def _kinds_table(report: Mapping[str, Any]) -> str:
    """Kinds of question, the worst first by the first mode."""
    k = shown_k(report)
    name, modes = f"recall@{k}", list(report["modes"])
    ranked = sorted(report["kinds"].items(), key=lambda item: (item[1]["modes"][modes[0]][name]["value"], item[0]))
    rows = [
        [
            kind.replace("_", " ") or "(none)",
            str(row["n"]),
            *(describe_estimate(row["modes"][mode][name]) for mode in modes),
        ]
        for kind, row in ranked[:MAX_KINDS]
    ]
    more = len(ranked) - MAX_KINDS
    return render_table(f"{name} by kind of question", ["", "n", *modes], rows, f"And {more} more." if more > 0 else "")


def shown_measures(report: Mapping[str, Any]) -> list[str]:
    """The report's measures, without `success@k` where it says what `recall@k` says."""
    modes: Mapping[str, Mapping[str, Any]] = report["modes"]
    names = list(next(iter(modes.values())))
    same = all(mode[f"success@{k}"] == mode[f"recall@{k}"] for mode in modes.values() for k in report["settings"]["k"])
    return [name for name in names if not (same and name.startswith("success"))]


def shown_k(report: Mapping[str, Any]) -> int:
    """The k of one-line views: 5 where it was measured, else the largest."""
    ks: list[int] = report["settings"]["k"]
    return 5 if 5 in ks else max(ks)


def retrieval_plot(report: Mapping[str, Any]) -> bytes:
    """A PNG: the ranking measures of each mode with intervals, and recall over k."""
    from matplotlib.figure import Figure

    modes, ks = report["modes"], report["settings"]["k"]
    names = [name for name in next(iter(modes.values())) if not name.startswith(("recall", "success"))]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for lane, mode in enumerate(modes):
        shift = (lane - (len(modes) - 1) / 2) * 0.16
        estimates = [modes[mode][name] for name in names]
        places = [place + shift for place in range(len(names))]
        left.vlines(
            places, [e["low"] for e in estimates], [e["high"] for e in estimates], color=_COLOURS[mode], alpha=0.6
        )
        left.plot(places, [e["value"] for e in estimates], "o", color=_COLOURS[mode], markersize=5, label=mode)
        curve = [modes[mode][f"recall@{k}"] for k in ks]
        right.plot(ks, [e["value"] for e in curve], "o-", color=_COLOURS[mode], markersize=4, label=mode)
        right.fill_between(ks, [e["low"] for e in curve], [e["high"] for e in curve], color=_COLOURS[mode], alpha=0.12)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("mean over questions, line: 95% interval")
    right.set_xticks(ks)
    right.set_xlabel("k")
    right.set_ylabel("recall@k")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(f"{report['index']}: {report['questions']['asked']} questions", fontsize=10)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=144, metadata={"Software": None})
    return out.getvalue()
