"""Pictures of what `clustax.diagnostics` finds: attention maps, and error against cost."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter

from clustax.diagnostics import Tried

BRIGHTEST = 0.2
"""The weight from which on a map is brightest."""


def draw_maps(
    figure: Figure | SubFigure,
    title: str,
    maps: Mapping[str, np.ndarray],
    words: Sequence[str] | None = None,
) -> None:
    """Draws attention maps side by side.

    Args:
        figure: what to draw on.
        title: of all of them.
        maps: the T×S weights of one head by name, as `diagnostics.attention_weights` finds them.
        words: the tokens, where queries and keys are the same few.
    """
    figure.suptitle(f"\n{title}", fontweight="bold")
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, weights) in zip(panels, maps.items(), strict=True):
        # Weights span orders of magnitude: a linear scale would show a few dots on black.
        axes.imshow(np.sqrt(weights), vmin=0, vmax=BRIGHTEST**0.5, cmap="magma")
        axes.set(title=name, xlabel="key")
        if words:
            axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
            axes.set_yticks(range(len(words)), words, fontsize=7)
    panels[0].set_ylabel("query")
    bar = figure.colorbar(panels[0].images[0], ax=panels, extend="max", label="weight")
    levels = (0, 0.01, 0.05, 0.1, BRIGHTEST)
    bar.set_ticks([level**0.5 for level in levels], labels=[str(level) for level in levels])


def draw_costs(axes: Axes, tried: Iterable[Tried], exact_operations: int) -> None:
    """Draws the error of settings against what they cost, one kind of marker for each topk.

    Args:
        axes: what to draw on.
        tried: settings with cost and error, those of `diagnostics.recommend` for example.
        exact_operations: what exact attention costs.
    """
    of_topk: dict[int, list[Tried]] = {}
    for each in tried:
        of_topk.setdefault(each.attention.topk, []).append(each)
    for marker, (topk, group) in zip(
        itertools.cycle("osD^vPX*"), sorted(of_topk.items()), strict=False
    ):
        costs = [each.operations for each in group]
        errors = [each.mean_error for each in group]
        axes.plot(costs, errors, marker, label=f"k = {topk}")
    axes.axvline(exact_operations, color="black", linewidth=1, linestyle=":", label="exact")
    axes.set(xscale="log", xlabel="multiply-adds of a head", ylabel="relative error")
    axes.grid(alpha=0.3)
    axes.legend()


def differences(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The "difference" of rows to exact attention in points, and how far their intervals reach.

    Args:
        rows: of results, with "difference" and "difference_interval".

    Returns:
        (rows,) and (2, rows), as `Axes.errorbar` takes them.
    """
    middle = np.array([100 * row["difference"] for row in rows])
    low, high = 100 * np.array([row["difference_interval"] for row in rows]).T
    # A bootstrap's interval need not hold the value itself.
    return middle, np.maximum(0, [middle - low, high - middle])


def label_log_axis(axis: Axis, digits: Sequence[float]) -> None:
    """Labels a logarithmic axis with plain numbers, also where it is less than a decade long.

    Args:
        axis: of a panel.
        digits: what is labelled, times powers of ten.
    """
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
