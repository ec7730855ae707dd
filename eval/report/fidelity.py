"""Pictures of all runs together: sparsity against fidelity, and what predicted floors rest on."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from residual_saes.eval.measure.result import Result
from residual_saes.eval.report.columns import Column, columns
from residual_saes.eval.report.figures import (
    MARKERS,
    LayerColours,
    RunData,
    finished,
    finite,
    grid,
    is_number,
    layer_axis,
    logarithmic,
    points,
    run_style,
)
from residual_saes.shared.sites import RESID_POST, Site


def sparsity_fidelity(runs: list[RunData]) -> Figure:
    """Colours are layers, markers are runs; a grey line joins those of a layer's SAEs that were trained alike."""
    figure, axes = grid(2, 2, (6.0, 4.3), sharex=True)
    colours = LayerColours(r.site for data in runs for r in data.results)
    alike: dict[tuple[str, Site], list[Result]] = {}
    for kind, r in sorted(((data.kind, r) for data in runs for r in data.latest), key=lambda one: one[1].l0 or 0):
        same = alike.setdefault((kind, r.site), [])
        if r.final:
            same.append(r)
    for axis, column in zip(axes, columns("fidelity"), strict=True):
        for same in alike.values():
            axis.plot(*points(same, "l0", column), color="0.8", linewidth=0.7, zorder=1)
        for number, data in enumerate(runs):
            for final in (True, False):
                _scatter(axis, [r for r in data.latest if r.final is final], column, number, colours, final)
        axis.set_ylabel(column.label)
        if column.scale == "log":
            logarithmic(axis)
        logarithmic(axis, "x")
    for axis in axes[2:]:
        axis.set_xlabel("L0, features a token")
    figure.legend(handles=_run_legend(axes[0], runs), loc="outside lower center", ncols=min(4, len(runs) + 1))
    colours.bar(figure, axes)
    return finished(figure, "Sparsity and fidelity on held-out tokens")


def _scatter(axis: Axes, results: list[Result], column: Column, number: int, colours: LayerColours, final: bool) -> None:
    edges = [colours[r.site] for r in results if is_number(r.l0) and is_number(column.value(r))]
    fill: dict[str, Any] = {"facecolors": edges if final else "none"}
    axis.scatter(
        *points(results, "l0", column), marker=MARKERS[number % len(MARKERS)], s=34, edgecolors=edges, zorder=2, **fill
    )


def _run_legend(axis: Axes, runs: list[RunData]) -> list[Any]:
    style: dict[str, Any] = {"linestyle": "", "color": "0.3"}
    handles = [axis.plot([], [], marker=MARKERS[n % len(MARKERS)], label=data.label, **style)[0] for n, data in enumerate(runs)]
    if not all(r.final for data in runs for r in data.latest):
        handles += axis.plot([], [], marker="o", fillstyle="none", label="open: unfinished layer", **style)
    return handles


def capacity(runs: list[RunData]) -> Figure:
    figure, axes = grid(2, 2, (6.0, 3.4), sharex=True)
    for axis, column in zip(axes, columns("capacity"), strict=True):
        for number, (label, results) in enumerate(_lines(runs)):
            style = run_style(number)
            done, others = ([(r.site.layer, column.value(r)) for r in results if r.final is final] for final in (True, False))
            axis.plot(*finite(done), **style, markersize=4, label=label)
            axis.plot(*finite(others), **style | {"linestyle": ""}, markersize=6, markerfacecolor="white")
        axis.set_ylabel(column.label)
    for width in sorted({data.d_model for data in runs}):
        axes[3].axhline(width, color="0.4")
        axes[3].annotate(f"d_model {width}", (0.01, width), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    for axis in axes[2:]:
        layer_axis(axis, "layer (open marker: unfinished)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    return finished(figure, "What predicted floors rest on")


def _lines(runs: list[RunData]) -> list[tuple[str, list[Result]]]:
    """Label and results of each run, and of each hook where a run has several."""
    lines: dict[str, list[Result]] = {}
    for data in runs:
        for r in data.latest:
            lines.setdefault(data.label + ("" if r.site.hook == RESID_POST else f", {r.site.hook}"), []).append(r)
    return list(lines.items())
