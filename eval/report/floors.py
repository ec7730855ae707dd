"""The picture of loss floors: predicted from each run's SAEs, measured on students, and how far the one explains the other."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.report.columns import student_widths
from residual_saes.eval.report.figures import COLOURS, LayerColours, RunData, finished, finite, grid, layer_axis, run_style, say
from residual_saes.shared.sites import Site


def loss_floors(runs: list[RunData], measured: Experiment | None) -> Figure:
    """A panel a run of predictions, one of what students measured, and one of how far the one explains the other."""
    panels = len(runs) + (2 if measured else 1)
    columns = min(3 if panels > 4 else 4, panels)
    figure, axes = grid(math.ceil(panels / columns), columns, (4.0, 4.2))
    colours = LayerColours(r.site for data in runs for r in data.results)
    for axis, data in zip(axes, runs, strict=False):
        _predicted(axis, data, colours)
    _measured(axes[len(runs)], measured, student_widths(runs[0].latest))
    if measured:
        _fits(axes[len(runs) + 1], runs, measured)
    for axis in axes[panels:]:
        axis.set_axis_off()
    colours.bar(figure, axes)
    return finished(figure, "Loss floors of narrower students: predicted (unreliable near d*), and measured by distillation")


def _predicted(axis: Axes, data: RunData, colours: LayerColours) -> None:
    positive: list[float] = []
    for r in data.latest:
        widths, floors = finite(sorted(r.floors.items()))
        positive += [floor for floor in floors if floor > 0]
        axis.plot(widths, floors, color=colours[r.site], linestyle="-" if r.final else ":", marker="o", markersize=3)
    if positive:
        axis.set_yscale("symlog", linthresh=min(positive))  # 0 from d* on
        axis.set_yticks(ticks(min(positive), max(positive)))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_ylim(bottom=0)
    axis.set_title(f"predicted, {data.label}")
    axis.set_ylabel("L*(d_S), squared activation units")
    _width_axis(axis, student_widths(data.latest))


def ticks(least: float, most: float) -> list[float]:
    """0, and round numbers of a logarithmic axis from `least` to `most`: a power of ten each, or three where those are few."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    mantissas = (1, 2, 5) if last - first < 3 else (1,)
    step = 1 + (last - first) // 8
    return [0, *(m * 10.0**e for e in range(first, last + 1, step) for m in mantissas if least <= m * 10.0**e <= most)]


def _width_axis(axis: Axes, widths: list[int]) -> None:
    axis.set_xticks(widths, [str(w) for w in widths], rotation=45, fontsize=8)
    axis.set_xlabel("student width d_S, dimensions")


def _measured(axis: Axes, measured: Experiment | None, widths: list[int]) -> None:
    axis.set_title("measured")
    axis.set_ylabel("floor, nats a token")
    if measured is None:
        _width_axis(axis, widths)
        axis.set_yticks([])
        return say(axis, "not measured")
    floors, seeds = measured.floors, measured.students
    axis.plot([f.width for f in floors], [f.floor for f in floors], color=COLOURS[0], marker="o")
    axis.plot([s.width for s in seeds], [s.floor for s in seeds], linestyle="", marker="_", color="black", markersize=9)
    axis.set_ylim(bottom=0)
    _width_axis(axis, [f.width for f in floors])


def _fits(axis: Axes, runs: list[RunData], measured: Experiment) -> None:
    """R² of floor ≈ C · L* + B on widths that the fit has not seen, beside that of the logarithm of the width alone."""
    for number, data in enumerate(runs):
        predictions = [p for p in measured.predictions if p.run == data.run.name]
        for name, fill, label in (("predicted", "full", data.label), ("log_width", "none", None)):
            r2 = finite((Site.of(p.layer).layer, fit.left_out_r2) for p in predictions if (fit := p.fits[name]))
            axis.plot(*r2, **run_style(number) | {"linestyle": ""}, fillstyle=fill, label=label)
    axis.axhline(0, color="0.4")
    axis.set_title("floor ≈ C · L* + B (open: over ln width)")
    axis.set_ylabel("R² of widths left out of the fit")
    layer_axis(axis, most=8)
    axis.set_ylim(max(-1.0, min(-0.05, axis.get_ylim()[0])), 1.05)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
