"""Pictures over training tokens: the curves of training, and what each snapshot is worth on held-out tokens."""

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from residual_saes.eval.report.columns import columns
from residual_saes.eval.report.figures import (
    LayerColours,
    RunData,
    finished,
    finite,
    grid,
    logarithmic,
    points,
    say,
    token_axis,
)
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.runs.run import snapshot_tokens
from residual_saes.shared.sites import Site

Curves = dict[Site, list[Point]]
_CURVES = (  # field of a point, label, whether its axis is logarithmic
    ("mse", "MSE, squared activation units", True),
    ("l0", "L0, features a token", True),
    ("l1_weight", "λ", False),
    ("alive", "alive features", False),
)


def drawn(curves: Curves) -> dict[str, list[list[Any]]]:
    """All of the curves that the picture shows."""
    return {str(site): [[getattr(p, key) for key, *_ in _CURVES] for p in curve] for site, curve in curves.items()}


def training_curves(data: RunData, curves: Curves) -> Figure:
    figure, axes = grid(2, 2, (5.4, 3.3), sharex=True)
    colours = LayerColours(curves)
    for axis, (key, label, is_logarithmic) in zip(axes, _CURVES, strict=True):
        for site, curve in curves.items():
            axis.plot(*finite((p.tokens, getattr(p, key)) for p in curve), color=colours[site])
        axis.set_ylabel(label)
        if is_logarithmic:
            logarithmic(axis)
    for axis in axes[2:]:  # from 0, so that a constant is a line within the panel
        highest = axis.dataLim.y1
        axis.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1)
        token_axis(axis)
    if axes[2].dataLim.y1 == 0:
        say(axes[2], "no L1")
    axes[2].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    colours.bar(figure, axes)
    return finished(figure, f"{data.run.name}: training curves")


def snapshots(data: RunData) -> Figure:
    figure, axes = grid(2, 3, (4.3, 3.2), sharex=True)
    sites = sorted({r.site for r in data.results})
    colours = LayerColours(sites)
    for axis, column in zip(axes, columns("snapshots"), strict=True):
        for site in sites:
            ages = points([r for r in data.results if r.site == site], "trained_tokens", column)
            axis.plot(*ages, color=colours[site], marker="o", markersize=3)
        axis.set_ylabel(column.label)
        low, high = axis.get_ylim()
        if column.scale == "log":
            logarithmic(axis)
        elif column.scale == "rises":
            axis.set_ylim(top=max(high, 1 + 0.02 * max(0.01, 1 - low)))  # more than 1 where zeros do better than the model
        else:  # at least a tenth, so that noise about nothing does not look like a trend
            axis.set_ylim(0, max(0.1, high))
    for axis in axes[3:]:
        token_axis(axis)
        axis.set_xlim(0, data.whole * 1.03)
        axis.set_xticks(list(snapshot_tokens(data.whole).values()))
        axis.tick_params(axis="x", rotation=45)
    colours.bar(figure, axes)
    return finished(figure, f"{data.run.name}: snapshots, on held-out tokens")
