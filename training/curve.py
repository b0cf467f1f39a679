"""The picture of a training run: losses, and the probe's EM and F1, over steps.

In: the rows of `history.jsonl`. Out: `curve.png`, written whole or not at all. Drawn with matplotlib's Agg backend,
without pyplot, so that no display and no global state is needed.
Not covered: live curves (training/trackers.py), the report's plots (evaluation/plots.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, distinct under colour blindness.
_LOSS, _VALIDATION, _EM, _F1 = "#56b4e9", "#0072b2", "#d55e00", "#009e73"
_SMOOTHED_STEPS = 15  # windows in the smoothed line: single steps of four rows jump by half the loss


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draws a run.

    Args:
        history: Rows with `step` and any of `loss`, `validation_loss`, `exact_match`, `f1`; values that are no finite
            numbers are left out.
        path: The PNG to write.
        title: Above the plot.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    probed = [name for name in ("exact_match", "f1") if _series(history, name)[0]]
    figure = Figure(figsize=(8, 5.6 if probed else 4), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2, 1] if probed else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_losses(panels[0], history)
    if probed:
        for name, label, colour in (("exact_match", "exact match", _EM), ("f1", "F1", _F1)):
            steps, values = _series(history, name)
            panels[1].plot(steps, values, "o-", color=colour, label=label, markersize=5)
        panels[1].set_ylim(-0.03, 1.03)
        panels[1].set_ylabel("validation answers")
        panels[1].legend(loc="best", frameon=False)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("optimiser step")
    if title:
        figure.suptitle(title, fontsize=11)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = _series(history, "loss")
    axes.plot(steps, losses, color=_LOSS, linewidth=1, alpha=0.6, label="training loss of each step")
    window = max(1, len(losses) // _SMOOTHED_STEPS)
    if window > 1:
        axes.plot(steps, smoothed(losses, window), color=_LOSS, linewidth=2.4, label=f"mean of {window} steps")
    measured, validation = _series(history, "validation_loss")
    if validation:
        axes.plot(measured, validation, "o-", color=_VALIDATION, linewidth=2, markersize=6, label="validation loss")
        best = min(range(len(validation)), key=validation.__getitem__)
        axes.annotate(
            f"{validation[best]:.3f}",
            (measured[best], validation[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_VALIDATION,
        )
    # A first step far above the rest would flatten the curve: of many steps, the highest 3% may leave the picture.
    kept = sorted(losses)[: max(20, round(len(losses) * 0.97))]
    axes.set_ylim(0, max([*kept, *validation], default=1.0) * 1.1 or 1.0)
    axes.set_ylabel("loss per target token")
    if losses or validation:
        axes.legend(loc="best", frameon=False)


def _series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, by step; of a step that was recorded twice, the later row counts."""
    found = {}
    for row in history:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            found[int(row["step"])] = float(value)
    return sorted(found), [found[step] for step in sorted(found)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
