"""The map of all metrics of each site's latest SAE."""

import math
import textwrap

import numpy as np
from matplotlib.figure import Figure

from residual_saes.eval.measure.result import Result
from residual_saes.eval.report.columns import columns, written
from residual_saes.eval.report.figures import SHADES, RunData, finished, grid, is_number


def heatmap(data: RunData) -> Figure:
    rows, shown = data.latest, columns("map")
    figure, (axis,) = grid(1, 1, (13.4, max(2.0, 0.29 * len(rows)) + 1.5))
    shades, values = np.full((2, len(rows), len(shown)), np.nan)
    for number, column in enumerate(shown):
        values[:, number] = [v if is_number(v := column.value(r)) else math.nan for r in rows]
        known = values[:, number][np.isfinite(values[:, number])]
        largest = 1.0 if column.share else max(known, default=0.0)
        shades[:, number] = np.clip(values[:, number] / (largest or 1.0), 0, 1)
    image = axis.imshow(shades, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    titles = [textwrap.fill(column.title, 16) for column in shown]
    axis.set_xticks(range(len(shown)), titles, rotation=45, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [_row_name(r) for r in rows])
    for (row, number), value in np.ndenumerate(values):
        text = written(value if math.isfinite(value) else None, shown[number].cell)
        ink = "white" if shades[row, number] <= 0.55 else "black"  # black where there is no shade
        axis.text(number, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    axis.grid(False)
    axis.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axis.grid(which="minor", axis="x", color="white", linewidth=1.5, alpha=1)
    axis.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axis, pad=0.01)
    scales = "colours: shares and cosines from 0 to 1; λ, L0, MSE and d* from 0 to the largest of their column"
    axis.set_xlabel(scales, fontsize=9)
    return finished(figure, f"{data.run.name} on held-out tokens")


def _row_name(r: Result) -> str:
    return f"layer {r.site}" + ("" if r.final else f"\n{r.snapshot}, unfinished")
