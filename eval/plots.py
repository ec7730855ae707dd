"""Pictures of a run: its training curves, and its metrics over layers and snapshots."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shared.cli import format_count
from train.runs import Run

Record = dict[str, Any]

_CURVES = (("mse", "MSE", True), ("l0", "L0", True), ("lambda", "λ", False), ("alive", "alive features", False))
_MAPS = (
    ("l0", "L0", "viridis", "{:.0f}"),
    ("fvu", "FVU", "viridis_r", "{:.3f}"),
    ("ce_recovered", "CE recovered", "viridis", "{:.3f}"),
    ("dead_share", "dead share", "viridis_r", "{:.2f}"),
)


def plot_run(run: Run, records: list[Record]) -> list[Path]:
    """Write both plots into the run's plots/ folder."""
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    return [_training_curves(run, folder / "1_training_curves.png"), _heatmap(run, records, folder / "2_metrics_heatmap.png")]


def _training_curves(run: Run, path: Path) -> Path:
    layers = sorted({s.layer for s in run.snapshots()})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, max(2, len(layers))))
    for axis, (key, title, logarithmic) in zip(axes.flat, _CURVES, strict=True):
        for colour, layer in zip(colours, layers, strict=False):
            points = [(r["tokens"], r[key]) for r in run.metrics(layer) if key in r and math.isfinite(r[key])]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, label=f"layer {layer}")
        axis.set_title(title)
        axis.grid(alpha=0.25)
        if logarithmic:
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(round(v))))
    for axis in axes[1]:
        axis.set_xlabel("tokens")
    axes[0, 0].legend(fontsize=8, ncols=1 + len(layers) // 9)
    figure.suptitle(run.name)
    return _save(figure, path)


def _heatmap(run: Run, records: list[Record], path: Path) -> Path:
    layers = sorted({r["layer"] for r in records})
    labels = list(dict.fromkeys(r["snapshot"] for r in records))
    height = 1.8 + 0.34 * len(layers)
    figure, axes = plt.subplots(1, len(_MAPS), figsize=(4 * len(_MAPS), height), sharey=True, layout="constrained")
    for axis, (key, title, colours, form) in zip(axes, _MAPS, strict=True):
        grid = np.full((len(layers), len(labels)), np.nan)
        for r in records:
            grid[layers.index(r["layer"]), labels.index(r["snapshot"])] = r[key]
        image = axis.imshow(grid, cmap=colours, aspect="auto")
        axis.set_title(title)
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        for (row, column), value in np.ndenumerate(grid):
            if math.isfinite(value):
                shade = image.cmap(image.norm(value))
                ink = "black" if sum(shade[:3]) > 1.5 else "white"
                axis.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=ink)
    axes[0].set_ylabel("layer")
    figure.suptitle(f"{run.name} on held-out tokens")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
