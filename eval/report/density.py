"""Pictures of features: how often they fire, how unequal they are, and at which layers a crosscoder's are."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.eval.measure.features import Features
from residual_saes.eval.report.figures import INK, LINE, SOFT, LayerColours, RunData, finished, grid, logarithmic
from residual_saes.shared.sites import Site

_BINS = np.linspace(-6, 0, 49)  # log10 of density
_CLASSES = (  # features with a density above the first and up to the second number
    ("never fired", -1.0, 0.0, LINE),
    ("up to 1e-5", 0.0, 1e-5, SOFT),
    ("to 1 %", 1e-5, 1e-2, "#5b9bd5"),
    ("to 10 %", 1e-2, 1e-1, "#e8a33d"),
    ("denser", 1e-1, 1.0, "#c8500a"),
)
_FADE = LinearSegmentedColormap.from_list("fade", [(0.16, 0.5, 0.77, 0.0), (0.16, 0.5, 0.77, 1.0)])  # on any page


def density(data: RunData, features: dict[Site, Features]) -> Figure:
    """Left which share of features is in which class, right how log density is spread in each layer."""
    sites = sorted(features)
    figure, (classes, spreads) = grid(1, 2, (5.4, 0.24 * len(sites) + 1.1), sharey=True)
    densities = [features[site].density.double().numpy() for site in sites]
    spread = np.array(list(map(_spread, densities)))
    edges = (float(_BINS[0]), float(_BINS[-1]), len(sites) - 0.5, -0.5)
    spreads.imshow(spread, cmap=_FADE, vmin=0, vmax=spread.max() or 1.0, aspect="auto", extent=edges, interpolation="nearest")
    spreads.set_title(f"spread of density (darkest: {spread.max():.0%} of features in ⅛ decade)")
    decades = range(int(_BINS[0]), 1)
    spreads.set_xticks(decades, [f"1e{e}" if e < -3 else f"{100 * 10.0**e:g} %" for e in decades])
    spreads.set_xlabel("density, share of tokens on which a feature fires")
    spreads.set_yticks(range(len(sites)), list(map(str, sites)))
    start = np.zeros(len(sites))
    for name, low, high, colour in _CLASSES:
        share = np.array([((f > low) & (f <= high)).mean() for f in densities])
        classes.barh(range(len(sites)), share, left=start, height=0.8, color=colour, label=name)
        start += share
    classes.set_xlim(0, 1)
    classes.set_xlabel("share of features")
    classes.set_ylabel("layer")
    legend = {"fontsize": 8, "columnspacing": 0.9, "handlelength": 1.0, "handletextpad": 0.4, "labelcolor": INK}
    classes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(_CLASSES), borderpad=0.1, **legend)
    for axis in (classes, spreads):
        axis.grid(False)
    return finished(figure, f"{data.run.name}: how often features fire")


def _spread(density: NDArray[np.float64]) -> NDArray[np.float64]:
    fired = density[density > 0]
    counts = np.histogram(np.log10(fired).clip(_BINS[0], _BINS[-1]), _BINS)[0]
    return counts / max(1, len(density))


def importance(data: RunData, features: dict[Site, Features]) -> Figure:
    """E[z²] by rank, and which part of their sum the features up to a rank hold."""
    figure, (left, right) = grid(1, 2, (5.4, 3.2))
    colours = LayerColours(features)
    by_rank, shares = {}, {}
    for site, of in sorted(features.items()):
        values = np.sort(of.mean_square.double().numpy())[::-1]
        values = values[np.isfinite(values) & (values > 0)]
        if len(values):
            ranks = np.unique(np.geomspace(1, len(values), 200).round().astype(np.int64))
            by_rank[site] = ranks.tolist(), values[ranks - 1].tolist()
            shares[site] = ranks.tolist(), (np.cumsum(values) / values.sum())[ranks - 1].tolist()
    colours.lines(left, by_rank)
    colours.lines(right, shares)
    left.set_title("importance E[z²], squared activation units")
    right.set_title("share of its sum up to this rank")
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.set_xlabel("rank of the feature")
        logarithmic(axis, "x")
    logarithmic(left)
    left.set_xlim(left=0.35)
    colours.name(left, by_rank, at=0)
    return finished(figure, f"{data.run.name}: how unequal features are")


def layers(data: RunData, features: dict[Site, Features], shares: dict[Site, Tensor]) -> Figure:
    """Of the features that fire, by the layer with the largest share: left the mean share of every layer, right over how many
    layers they spread, 1 / Σ share²."""
    sites = sorted(shares)
    n, fires = len(sites), features[sites[0]].density.numpy() > 0
    share = np.stack([shares[site].double().numpy() for site in sites], 1)[fires]
    largest, spread = share.argmax(1), 1 / np.square(share).sum(1)
    figure, (profile, reach) = grid(1, 2, (5.4, 0.24 * n + 1.1), sharey=True)
    of_layer = [largest == number for number in range(n)]
    means = np.array([share[which].mean(0) if which.any() else np.zeros(n) for which in of_layer])
    profile.imshow(means, cmap=_FADE, vmin=0, vmax=means.max() or 1.0, aspect="auto", interpolation="nearest")
    profile.set_title(f"mean share of each layer (darkest: {means.max():.0%})")
    profile.set_xticks(range(n), list(map(str, sites)))
    profile.set_xlabel("layer")
    names = [f"{site}: {which.mean() if len(which) else 0:.1%}" for site, which in zip(sites, of_layer, strict=True)]
    profile.set_yticks(range(n), names)
    profile.set_ylabel("largest at")
    edges = np.linspace(1, n, 33)
    counts = np.array([np.histogram(spread[which].clip(1, n), edges)[0] / max(1, len(spread)) for which in of_layer])
    ends = (1.0, float(n), n - 0.5, -0.5)
    reach.imshow(counts, cmap=_FADE, vmin=0, vmax=counts.max() or 1.0, aspect="auto", extent=ends, interpolation="nearest")
    reach.set_title(f"spread (darkest: {counts.max():.1%} of features)")
    reach.set_xlabel("layers that a feature spans, 1 / Σ share²")
    for axis in (profile, reach):
        axis.grid(False)
    return finished(figure, f"{data.run.name}: where features live")
