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
    scaled,
    token_axis,
)
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.sites import Site

Curves = dict[Site, list[Point]]
_CURVES = (  # field of a point, title, whether its axis is logarithmic
    ("mse", "MSE, squared activation units", True),
    ("l0", "L0, features a token", True),
    ("alive", "alive features", False),
    ("l1_weight", "λ", False),
)


def drawn(curves: Curves) -> dict[str, list[list[Any]]]:
    """All of the curves that the picture shows."""
    return {str(site): [[getattr(p, key) for key, *_ in _CURVES] for p in curve] for site, curve in curves.items()}


def training_curves(data: RunData, curves: Curves) -> Figure:
    """On training batches; λ where it moves."""
    moves = any(len({p.l1_weight for p in curve}) > 1 for curve in curves.values())
    shown = _CURVES if moves else _CURVES[:-1]
    figure, axes = grid(1, len(shown), (11.1 / len(shown), 3.0), sharex=True)
    colours = LayerColours(curves)
    for axis, (key, title, is_logarithmic) in zip(axes, shown, strict=True):
        lines = {site: finite((p.tokens, getattr(p, key)) for p in curve) for site, curve in curves.items()}
        colours.lines(axis, lines)
        axis.set_title(title)
        highest = axis.dataLim.y1
        if is_logarithmic:
            logarithmic(axis)
        else:  # from 0, so that a constant is a line within the panel
            axis.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}" if v < 1000 else f"{v:,.0f}"))
        token_axis(axis)
        colours.name(axis, lines)
    return finished(figure, f"{data.run.name}: training")


def snapshots(data: RunData) -> Figure:
    shown = columns("snapshots", data.results)
    figure, axes = grid(1, len(shown), (11.1 / len(shown), 3.0), sharex=True)
    sites = sorted({r.site for r in data.results})
    colours = LayerColours(sites)
    for axis, column in zip(axes, shown, strict=True):
        lines = {site: points([r for r in data.results if r.site == site], "trained_tokens", column) for site in sites}
        colours.lines(axis, lines, marker="o", markersize=3)
        axis.set_title(column.label.partition(", fraction")[0])
        scaled(axis, column)
        token_axis(axis)
        axis.set_xlim(0, (data.whole or 1) * 1.03)
        colours.name(axis, lines)
    return finished(figure, f"{data.run.name}: snapshots, on held-out tokens")
