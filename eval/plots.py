"""Pictures of a run: its training curves, and its metrics over layers and snapshots."""

import io
import math
import os
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # a notebook's names one that may not be here, and the import reads it
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.evaluate import Skipped
from shared.cli import format_count
from shared.files import replacing
from train.runs import Run, alone_in, snapshot_tokens

matplotlib.rcdefaults()  # the user's own style may not fit

Record = dict[str, Any]

_CURVES = (("mse", "MSE", True), ("l0", "L0", True), ("lambda", "λ", False), ("alive", "alive features", False))
_MAPS = (
    ("l0", "L0", "viridis", "{:.0f}"),
    ("fvu", "FVU", "viridis_r", "{:.3f}"),
    ("ce_recovered", "CE recovered", "viridis", "{:.3f}"),
    ("dead_share", "dead share", "viridis_r", "{:.2f}"),
)


def plot_run(run: Run, records: list[Record], skipped: Skipped) -> None:
    """Write both pictures, as far as there is something to show, into the run's plots/ folder."""
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    curves = {}
    for layer in sorted({s.layer for s in run.snapshots()}):
        with skipped.leaving_out():
            curves[layer] = run.metrics(layer)
    with alone_in(folder):
        if curves:
            _training_curves(run, curves, folder / "1_training_curves.png")
        if records:
            _heatmap(run, records, folder / "2_metrics_heatmap.png")


def _training_curves(run: Run, curves: dict[int, list[Record]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, max(2, len(curves))))
    for axis, (key, title, logarithmic) in zip(axes.flat, _CURVES, strict=True):
        for colour, (layer, curve) in zip(colours, curves.items(), strict=False):
            points = [(r["tokens"], r[key]) for r in curve if key in r and math.isfinite(r[key])]
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
    if axes[0, 0].lines:
        axes[0, 0].legend(fontsize=8, ncols=1 + len(curves) // 9)
    figure.suptitle(run.name)
    _save(figure, path)


def _heatmap(run: Run, records: list[Record], path: Path) -> None:
    layers = sorted({r["layer"] for r in records})
    measured = {r["snapshot"] for r in records}
    labels = [label for label in snapshot_tokens(run.config()["train"]["tokens"]) if label in measured]
    height = 1.8 + 0.34 * len(layers)
    figure, axes = plt.subplots(1, len(_MAPS), figsize=(4 * len(_MAPS), height), sharey=True, layout="constrained")
    for axis, (key, title, colours, form) in zip(axes, _MAPS, strict=True):
        grid = np.full((len(layers), len(labels)), np.nan)
        for r in records:
            grid[layers.index(r["layer"]), labels.index(r["snapshot"])] = math.nan if r[key] is None else r[key]
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    plt.close(figure)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
