"""Pictures of all runs together: sparsity against fidelity, and what predicted floors rest on."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from residual_saes.eval.measure.result import Result
from residual_saes.eval.report.columns import Column, columns
from residual_saes.eval.report.figures import (
    LINE,
    SOFT,
    RunData,
    common_sites,
    finished,
    finite,
    grid,
    is_number,
    label_ends,
    layer_axis,
    logarithmic,
    mean,
    points,
    scaled,
)
from residual_saes.shared.sites import RESID_POST, Site, format_sites


def sparsity_fidelity(runs: list[RunData]) -> Figure:
    """Means over the layers that all runs have finished, a line a kind of setting; each layer's SAE is a small point. Beside
    them FVU by layer."""
    sites = common_sites([data.results for data in runs])
    shown = columns("fidelity", (r for data in runs for r in data.results))
    figure, axes = grid(1, 1 + len(shown), (3.7, 3.6))
    for axis, column in zip(axes, shown, strict=False):
        _against_l0(axis, runs, column, sites)
    _by_layer(axes[-1], runs, shown[0])
    over = f"means over layers {format_sites(sites)}" if sites else "no layer is finished in all runs: single layers"
    return finished(figure, f"Sparsity and fidelity on held-out tokens: {over}; small points are single layers")


def _against_l0(axis: Axes, runs: list[RunData], column: Column, sites: Sequence[Site]) -> None:
    kinds: dict[str, list[tuple[float, float]]] = {}
    labels = []
    for data, name in zip(runs, _names(runs), strict=True):
        colour = data.style["color"]
        for final, fill in ((True, colour), (False, "none")):
            of = [r for r in data.latest if r.final is final]
            axis.scatter(*points(of, "l0", column), s=9, facecolors=fill, edgecolors=colour, alpha=0.5, linewidths=0.7)
        done = [r for r in data.latest if r.final and r.site in sites]
        x, y = mean(r.l0 for r in done), mean(map(column.value, done))
        if is_number(x) and is_number(y):
            kinds.setdefault(data.kind, []).append((x, y))
            axis.plot(x, y, **data.style, linestyle="", markersize=7, zorder=3)
            labels.append((x, y, name, colour))
    for data in runs:
        if line := sorted(kinds.pop(data.kind, [])):
            axis.plot(*zip(*line, strict=True), color=data.style["color"], zorder=2, label="_kind")
    axis.set_title(column.label.partition(", fraction")[0])
    scaled(axis, column)
    logarithmic(axis, "x")
    axis.set_xlabel("L0, features a token")
    label_ends(axis, labels)


def _by_layer(axis: Axes, runs: list[RunData], column: Column) -> None:
    labels = []
    for label, data, results in _lines(runs):
        style = data.style | {"markersize": 4}
        done, others = ([(r.site.layer, column.value(r)) for r in results if r.final is final] for final in (True, False))
        x, y = finite(done)
        axis.plot(x, y, **style)
        axis.plot(*finite(others), **style | {"linestyle": "", "markersize": 5, "markerfacecolor": "none"})
        if x:
            labels.append((x[-1], y[-1], label, data.style["color"]))
    axis.set_title(f"{column.title} by layer")
    scaled(axis, column)
    layer_axis(axis, "layer (open: not finished)" if any(not r.final for data in runs for r in data.latest) else "layer")
    label_ends(axis, labels)


def _lines(runs: list[RunData]) -> list[tuple[str, RunData, list[Result]]]:
    """Label, run and results of each run, and of each hook where a run has several."""
    lines: dict[str, tuple[RunData, list[Result]]] = {}
    for data, label in zip(runs, _names(runs), strict=True):
        for r in data.latest:
            name = label + ("" if r.site.hook == RESID_POST else f", {r.site.hook}")
            lines.setdefault(name, (data, []))[1].append(r)
    return [(label, data, results) for label, (data, results) in lines.items()]


def _names(runs: list[RunData]) -> list[str]:
    """Settings, or where some runs share theirs, labels."""
    return [data.setting if len({d.setting for d in runs}) == len(runs) else data.label for data in runs]


def capacity(runs: list[RunData]) -> Figure:
    figure, axes = grid(1, 2, (5.4, 3.2))
    for axis, column in zip(axes, columns("capacity"), strict=True):
        labels = []
        for label, data, results in _lines(runs):
            style: dict[str, Any] = data.style | {"markersize": 4}
            x, y = finite((r.site.layer, column.value(r)) for r in results)
            axis.plot(x, y, **style)
            if x:
                labels.append((x[-1], y[-1], label, data.style["color"]))
        axis.set_title(column.label)
        layer_axis(axis)
        if column.key == "critical_width":
            for width in sorted({data.d_model for data in runs}):
                axis.axhline(width, color=LINE)
                at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "va": "bottom", "color": SOFT}
                axis.annotate(f"d_model {width}", (0.01, width), **at)
        label_ends(axis, labels)
    return finished(figure, "What predicted floors rest on")
