"""Pictures of features: how often they fire, and how unequal they are."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from residual_saes.eval.measure.features import Features
from residual_saes.eval.report.figures import SHADES, LayerColours, RunData, finished, grid, logarithmic
from residual_saes.shared.sites import Site

_BINS = np.linspace(-6, 0, 49)  # log10 of density
_CLASSES = (  # features with a density above the first and up to the second number
    ("never fired", -1.0, 0.0, "#000000"),
    ("up to 1e-5", 0.0, 1e-5, "#4d4d4d"),
    ("up to 1 %", 1e-5, 1e-2, "#56B4E9"),
    ("up to 10 %", 1e-2, 1e-1, "#E69F00"),
    ("denser", 1e-1, 1.0, "#D55E00"),
)


def density(data: RunData, features: dict[Site, Features]) -> Figure:
    """Left which share of features is in which class, right how log density is spread in each layer."""
    sites = sorted(features)
    figure, (classes, spreads) = grid(1, 2, (5.8, max(2.0, 0.24 * len(sites)) + 1.1), sharey=True)
    densities = [features[site].density.double().numpy() for site in sites]
    edges = np.arange(len(sites) + 1) - 0.5
    mesh = spreads.pcolormesh(_BINS, edges, np.array(list(map(_spread, densities))), cmap=SHADES, vmin=0, vmax=0.1)
    figure.colorbar(mesh, ax=spreads, extend="max", pad=0.02, label="share of features, in bins of 1/8 decade")
    spreads.set_xlabel("log10 of density (share of tokens on which a feature fires)")
    spreads.set_yticks(range(len(sites)), list(map(str, sites)))
    spreads.invert_yaxis()
    start = np.zeros(len(sites))
    for name, low, high, colour in _CLASSES:
        share = np.array([((f > low) & (f <= high)).mean() for f in densities])
        classes.barh(range(len(sites)), share, left=start, height=0.8, color=colour, label=name)
        start += share
    classes.set_xlim(0, 1)
    classes.set_xlabel("share of features")
    classes.set_ylabel("layer")
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(_CLASSES)}
    classes.legend(fontsize=7.5, columnspacing=1.0, handlelength=1.2, frameon=False, **place)
    for axis in (classes, spreads):
        axis.grid(False)
    return finished(figure, f"{data.run.name}: how often features fire")


def _spread(density: NDArray[np.float64]) -> NDArray[np.float64]:
    fired = density[density > 0]
    counts = np.histogram(np.log10(fired).clip(_BINS[0], _BINS[-1]), _BINS)[0]
    return counts / max(1, len(density))


def importance(data: RunData, features: dict[Site, Features]) -> Figure:
    """E[z²] by rank, and which part of their sum the features up to a rank hold."""
    figure, (left, right) = grid(1, 2, (6.0, 4.5))
    colours = LayerColours(features)
    for site, of in sorted(features.items()):
        values = np.sort(of.mean_square.double().numpy())[::-1]
        values = values[np.isfinite(values) & (values > 0)]
        if not len(values):
            continue
        ranks = np.unique(np.geomspace(1, len(values), 200).round().astype(np.int64))
        left.plot(ranks, values[ranks - 1], color=colours[site])
        right.plot(ranks, (np.cumsum(values) / values.sum())[ranks - 1], color=colours[site])
    left.set_ylabel("importance E[z²], squared activation units")
    right.set_ylabel("share of the sum of importance up to this rank")
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.set_xlabel("rank of the feature")
        logarithmic(axis, "x")
    logarithmic(left)
    colours.bar(figure, (left, right))
    return finished(figure, f"{data.run.name}: how unequal features are")
