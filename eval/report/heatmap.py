"""The map of all metrics of each site's latest SAE: what is written is the value, what is coloured is its merit."""

import math
import textwrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from residual_saes.eval.measure.result import Result
from residual_saes.eval.report.columns import columns, written
from residual_saes.eval.report.figures import INK, PAPER, RunData, finished, grid, is_number

MERIT = LinearSegmentedColormap.from_list("merit", ["#f0a868", "#fbe7d3", "#dcebf7", "#7fb6e6"])  # black is legible on it
_SCALE = "Blue is good, orange poor: two decades of the distance to the best that a metric can be. White: neither."


def heatmap(data: RunData) -> Figure:
    rows, shown = data.latest, columns("map", data.latest)
    figure, (axis,) = grid(1, 1, (0.72 * len(shown) + 1.4, 0.27 * len(rows) + 1.5))
    values = np.array([[v if is_number(v := c.value(r)) else math.nan for c in shown] for r in rows], float)
    merits = [[c.merit(v) for c, v in zip(shown, row, strict=True)] for row in values.tolist()]
    axis.imshow(np.array([[math.nan if m is None else m for m in row] for row in merits]), cmap=MERIT, vmin=0, vmax=1,
                aspect="auto", interpolation="nearest")  # fmt: skip
    titles = [textwrap.fill(column.title, 14) for column in shown]
    axis.set_xticks(range(len(shown)), titles, fontsize=8, color=INK)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [_row_name(r) for r in rows], fontsize=8, color=INK)
    for (row, number), value in np.ndenumerate(values):
        text = written(value if math.isfinite(value) else None, shown[number].cell)
        axis.text(number, row, text, ha="center", va="center", fontsize=8)
    axis.grid(False)
    axis.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axis.grid(which="minor", axis="x", color=PAPER, linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(_SCALE, fontsize=8, loc="left")
    return finished(figure, f"{data.run.name} on held-out tokens")


def _row_name(r: Result) -> str:
    return f"layer {r.site}" + ("" if r.final else f"\n{r.snapshot}, unfinished")
