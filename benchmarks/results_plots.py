"""The heat map of docs/results.md. In: a matrix of scores. Out: a PNG. Drawn with matplotlib, without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def draw_heat_map(path: Path, rows: Sequence[float], columns: Sequence[float], values: NDArray[np.float64]) -> None:
    """Draws RAFT's score by P (rows) and training distractors (columns); cells without a score stay blank.

    Args:
        path: The PNG.
        rows: Values of P, in order.
        columns: Numbers of distractors, in order.
        values: (rows, columns) float64, NaN where not measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.1 * len(columns), 1.5 + 0.7 * len(rows)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    measured = values[~np.isnan(values)]
    low, high = (float(measured.min()), float(measured.max())) if measured.size else (0.0, 1.0)
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=max(high, low + 0.01), origin="lower")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        text = "not\nmeasured" if np.isnan(value) else f"{value:.2f}"
        dark = not np.isnan(value) and value < (low + high) / 2
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    axes.set_xlabel("distractors per training row")
    axes.set_ylabel("P: rows with their golden passage")
    axes.set_title("RAFT, exact match on new documents", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(path, metadata={"Software": None})
