import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training.curve import draw_curve, smoothed

HISTORY = [
    {"step": 1, "epoch": 0, "tokens": 100, "loss": 4.0, "learning_rate": 1e-3, "tokens_per_second": 90.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "validation_loss": 2.5, "exact_match": 0.25, "f1": 0.5},
    {"step": 3, "loss": math.nan},
    {"step": 4, "loss": 1.0},
    {"step": 4, "validation_loss": 1.5, "exact_match": None, "f1": 0.75},
]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    original = Figure.savefig

    def savefig(self, *arguments, **options):
        figures.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def lines(figure):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    }


def test_draw_curve_shows_every_figure_at_its_step(tmp_path, drawn):
    draw_curve(HISTORY, tmp_path / "curve.png", "tiny-raft")
    shown = lines(drawn[0])
    assert shown["training loss of each step"] == ([1, 2, 4], [4.0, 2.0, 1.0])
    assert shown["validation loss"] == ([2, 4], [2.5, 1.5])
    assert shown["exact match"] == ([2], [0.25])
    assert shown["F1"] == ([2, 4], [0.5, 0.75])
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["1.500"]  # the lowest validation loss
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert (width, height) == (960, 672)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_draw_curve_without_a_probe_has_one_panel(tmp_path, drawn):
    draw_curve([{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}], tmp_path / "curve.png")
    assert len(drawn[0].axes) == 1


def test_draw_curve_of_a_step_recorded_twice_takes_the_later(tmp_path, drawn):
    draw_curve([{"step": 1, "loss": 4.0}, {"step": 1, "loss": 3.0}], tmp_path / "curve.png")
    assert lines(drawn[0])["training loss of each step"] == ([1], [3.0])


def test_draw_curve_first_step_far_above_does_not_flatten_the_rest(tmp_path, drawn):
    draw_curve([{"step": 0, "loss": 900.0}, *({"step": s, "loss": 1.0} for s in range(1, 100))], tmp_path / "curve.png")
    assert drawn[0].axes[0].get_ylim()[1] < 200


def test_draw_curve_of_nothing_is_still_a_picture(tmp_path):
    draw_curve([], tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").size


def test_draw_curve_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    draw_curve(HISTORY, tmp_path / "curve.png")
    before = (tmp_path / "curve.png").read_bytes()

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        draw_curve(HISTORY, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_smoothed_is_the_mean_of_what_came_before():
    assert smoothed([4.0, 2.0, 0.0, 1.0], 2) == [4.0, 3.0, 1.0, 0.5]
