"""The picture of loss floors: predicted from each run's SAEs, measured on students, and how far the one explains the other."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.report.columns import student_widths
from residual_saes.eval.report.figures import INK, SOFT, LayerColours, RunData, finished, finite, grid, label_ends, layer_axis


def loss_floors(runs: list[RunData], measured: Experiment | None) -> Figure:
    """A panel a run of predictions, on one scale, one of what students measured, and one of how far the one explains the
    other."""
    panels = len(runs) + (2 if measured else 0)
    columns = min(3, panels)
    figure, axes = grid(math.ceil(panels / columns), columns, (11.1 / columns if panels > 1 else 6.0, 3.4))
    colours = LayerColours(r.site for data in runs for r in data.results)
    _predictions(axes[: len(runs)], runs, colours)
    if measured:
        _measured(axes[len(runs)], measured)
        _fits(axes[len(runs) + 1], runs, measured)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return finished(figure, "Loss floors of narrower students: predicted (unreliable near d*), and measured by distillation")


def _predictions(axes: list[Axes], runs: list[RunData], colours: LayerColours) -> None:
    lines = [{r.site: finite(sorted(r.floors.items())) for r in data.latest} for data in runs]
    positive = [floor for of_run in lines for _, floors in of_run.values() for floor in floors if floor > 0]
    for axis, data, of_run in zip(axes, runs, lines, strict=True):
        for r in data.latest:
            colours.lines(axis, {r.site: of_run[r.site]}, linestyle="-" if r.final else ":", marker="o", markersize=3)
        if positive:
            axis.set_yscale("symlog", linthresh=min(positive))  # 0 from d* on
            axis.set_yticks(ticks(min(positive), max(positive)))
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_ylim(0, 1.3 * max(positive))
        axis.set_title(f"predicted L*(d_S), {data.label}")
        axis.set_ylabel("squared activation units" if axis is axes[0] else "")
        _width_axis(axis, student_widths(data.latest))
        low, high = axis.get_xlim()
        axis.set_xlim(low - (high - low) / 6, high)
        colours.name(axis, of_run, at=0)


def ticks(least: float, most: float) -> list[float]:
    """0, and round numbers of a logarithmic axis from `least` to `most`: a power of ten each, or three where those are few."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    mantissas = (1, 2, 5) if last - first < 3 else (1,)
    step = 1 + (last - first) // 8
    return [0, *(m * 10.0**e for e in range(first, last + 1, step) for m in mantissas if least <= m * 10.0**e <= most)]


def _width_axis(axis: Axes, widths: list[int]) -> None:
    axis.set_xticks(widths, [str(w) for w in widths], rotation=45, fontsize=8)
    axis.set_xlabel("student width d_S, dimensions")


def _measured(axis: Axes, measured: Experiment) -> None:
    axis.set_title("measured floor, nats a token (dashes: seeds)")
    floors, seeds = measured.floors, measured.students
    axis.plot([f.width for f in floors], [f.floor for f in floors], color=INK, marker="o", markersize=4)
    axis.plot([s.width for s in seeds], [s.floor for s in seeds], linestyle="", marker="_", color=SOFT, markersize=9)
    axis.set_ylim(bottom=0)
    _width_axis(axis, [f.width for f in floors])


def _fits(axis: Axes, runs: list[RunData], measured: Experiment) -> None:
    """R² of floor ≈ C · L* + B on widths that the fit has not seen, beside that of the logarithm of the width alone."""
    labels = []
    for data in runs:
        predictions = [p for p in measured.predictions if p.run == data.run.name]
        for name, fill in (("predicted", "full"), ("log_width", "none")):
            x, y = finite((p.layer.layer, fit.left_out_r2) for p in predictions if (fit := getattr(p.fits, name)))
            axis.plot(x, y, **data.style | {"linestyle": ""}, fillstyle=fill, markersize=5)
            labels += [(x[-1], y[-1], data.setting, data.style["color"])] if x and fill == "full" else []
    axis.axhline(0, color=SOFT, linewidth=0.8)
    axis.set_title("R² of floor ≈ C · L* + B (open: of ln width)")
    axis.set_ylabel("widths left out of the fit")
    layer_axis(axis, most=8)
    axis.set_ylim(max(-1.0, min(-0.05, axis.get_ylim()[0])), 1.05)
    label_ends(axis, [each for each in labels if each[1] >= axis.get_ylim()[0]])
