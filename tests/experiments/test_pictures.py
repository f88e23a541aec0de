"""What is drawn, without looking at it."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from clustax import ClusteredAttention
from clustax.diagnostics import ApproximationError, Tried
from experiments.common.pictures import draw_costs, draw_maps, label_log_axis


@pytest.mark.parametrize("count", [1, 3])
def test_maps(count):
    figure = Figure()
    maps = {f"map {i}": np.full((2, 2), 0.01 * i) for i in range(count)}
    draw_maps(figure, "title", maps, ["one", "two"])
    panels = figure.axes[:count]
    assert [axes.get_title() for axes in panels] == list(maps)
    np.testing.assert_allclose(panels[-1].images[0].get_array(), 0.1 * (count - 1) ** 0.5)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["one", "two"]


def test_costs():
    axes = Figure().subplots()
    errors = [np.array([[0.1, 0.3]]), np.array([[0.5]]), np.array([[0.4]])]
    tried = [
        Tried(ClusteredAttention(topk=topk), cost, ApproximationError(error, error, error))
        for topk, cost, error in zip((32, 0, 32), (20, 10, 30), errors, strict=True)
    ]
    draw_costs(axes, tried, exact_operations=25)
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["k = 0"], [[10, 0.5]])
    np.testing.assert_allclose(lines["k = 32"], [[20, 0.2], [30, 0.4]])
    np.testing.assert_array_equal(lines["exact"][:, 0], [25, 25])


def test_log_axes_have_labels_within_a_decade():
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(15, 70))
    label_log_axis(axes.yaxis, (1, 2, 5))
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [label.get_text() for y, label in ticks if low <= y <= high] == ["20", "50"]
