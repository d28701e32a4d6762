"""Charts: labels that can be read, colours that can be told apart."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_diffusion.plots import (
    PALETTE,
    QUIET,
    QualityPoint,
    label_right,
    quality_curves,
    style,
    width_curve,
)

# Viénot, Brettel & Mollon 1999, in linear RGB: how the world looks without long- and without medium-wave cones
DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "all cones": np.eye(3),
}


def lab(linear):
    """CIE L*a*b* of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", DICHROMATS)
def test_colours_are_told_apart_by_all_eyes(eyes):
    """A difference of 10 in L*a*b* is plain side by side, in thin lines too."""
    colours = (*PALETTE, QUIET)
    linear = [np.array(DICHROMATS[eyes]) @ np.array(to_rgb(colour)) ** 2.2 for colour in colours]
    pairs = itertools.combinations(zip(colours, map(lab, linear), strict=True), 2)
    distance = {(a, b): np.linalg.norm(one - other) for (a, one), (b, other) in pairs}
    assert min(distance.values()) > 10, min(distance, key=distance.get)


@pytest.mark.parametrize("ends", [[0.5] * 6, [0, 0, 1, 1, 5, -3], [0.2, 0.21, 0.9]])
def test_labels_stand_beside_the_ends_and_never_overlap(ends):
    figure = Figure(figsize=(4, 3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    with style():
        axes = figure.subplots()
        for number, end in enumerate(ends):
            axes.plot([0, 1, 2], [0.5, end, np.nan], label=f"line {number}")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_right(axes, axes.lines)
    canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    height = {text.get_text(): text.xy[1] for text in axes.texts}
    assert sorted(height, key=height.get) == sorted(
        height, key=lambda name: np.clip(ends[int(name[5:])], 0, 1)
    )
    assert all(0 <= y <= 1 for y in height.values())


def test_ends_that_are_far_apart_are_labelled_where_they_are():
    with style():
        axes = Figure().subplots()
        for end in (0.1, 0.5, 0.8):
            axes.plot([0, 1], [0, end], label=str(end))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_right(axes, axes.lines)
    assert [text.xy[1] for text in axes.texts] == pytest.approx([0.1, 0.5, 0.8])


def test_the_best_width_is_marked():
    figure = width_curve([0.03, 0.1, 0.25], [3.0, 1.0, 2.0], 2.5, "frechet")
    (axes,) = figure.axes
    best = next(line for line in axes.lines if "best" in line.get_label())
    assert (best.get_xdata(), best.get_ydata()) == (0.1, 1.0)


def test_quality_is_drawn_over_evaluations_as_one_curve_per_name_in_order():
    points = [QualityPoint(*point) for point in [("a", 9, 2.0), ("a", 3, 8.0), ("b", 5, 3.0), ("a", 10, 1.5)]]
    figure = quality_curves(points, "title")
    (axes,) = figure.axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn == {"a": [(3, 8.0), (9, 2.0), (10, 1.5)], "b": [(5, 3.0)]}
    assert list(axes.get_xticks()) == [3, 5, 9], "labels that would overlap are left out"
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
