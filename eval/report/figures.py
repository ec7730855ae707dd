"""What all pictures share: colours, panels, axes, labels, and the one layout in which nothing is cut off.

Layers are shades of one colour map, labelled at the ends of their lines; every shade of it stands out from a white and from a
dark page. Runs have the colour of their kind of setting and a marker of the setting, whichever runs stand beside them.
"""

import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

os.environ["MPLBACKEND"] = "Agg"  # a notebook's names one that may not be here, and the import reads it
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from residual_saes.eval.measure.result import Result, latest
from residual_saes.eval.report.columns import Column
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import RESID_POST, Site
from residual_saes.shared.units import format_count

# The page gives these its own colours (svg.py), so that a picture follows it from light to dark.
INK, SOFT, LINE, PAPER = "#222222", "#6b6b6b", "#d4d4d4", "#ffffff"
matplotlib.rcdefaults()  # the user's own style may not fit
matplotlib.rcParams.update({
    "svg.hashsalt": "residual-saes",  # else names inside an SVG are drawn by chance
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # of a name with two dollar signs as well
    "path.simplify_threshold": 0.5,
    "figure.dpi": 110,
    "figure.titlesize": 12,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
})  # fmt: skip

SHADES = LinearSegmentedColormap.from_list("layers", ["#3d78c4", "#8a68c8", "#c9558f", "#d9692b"])
COLOURS = {"L1": "#c8640a", "BatchTopK": "#2a7fc4", "TopK": "#a35bb0", "JumpReLU": "#2b8f6a"}  # of kinds of settings
_OTHERS = ("#b8517a", "#5d7d2a", "#5f6fc9")
_MARKERS = "osD^vPX*"
_MOST_LABELS, _LABEL_SIZE = 8, 8.5


@dataclass(kw_only=True, frozen=True, slots=True)
class RunData:
    """A run as the pictures need it."""

    run: Run
    label: str  # short, unlike the others'
    setting: str
    family: str
    results: list[Result]  # by site and age
    whole: int | None  # tokens of training
    d_model: int
    kind: str  # the same for runs that differ in nothing but how sparse they are asked to be

    @property
    def inputs(self) -> list[Any]:
        """All that pictures of results show; checksums differ between equal runs."""
        records = [{k: v for k, v in r.to_dict().items() if k != "file"} for r in self.results]
        return [self.run.name, self.label, self.setting, self.whole, self.d_model, self.kind, records]

    @property
    def latest(self) -> list[Result]:
        return latest(self.results)

    @property
    def style(self) -> dict[str, Any]:
        """Of its setting, not of its place among others."""
        colour = COLOURS.get(self.family) or _pick(_OTHERS, self.family)
        return {"color": colour, "marker": _pick(_MARKERS, self.setting)}


def _pick(choices: Any, name: str) -> Any:
    return choices[zlib.crc32(name.encode(errors="replace")) % len(choices)]


def grid(rows: int, columns: int, panel: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels of about this many inches, labels included."""
    figure = Figure(figsize=(columns * panel[0] + 0.3, rows * panel[1] + 0.5), layout="constrained", facecolor=PAPER)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes:
        axis.set_facecolor("none")
        axis.set_axisbelow(True)
    return figure, axes


def finished(figure: Figure, title: str) -> Figure:
    """The figure under its title, with everything in its place: laid out once, where each of two formats would do it again."""
    figure.suptitle(title, x=0.01, ha="left")
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


# --- layers and runs, by colour and by name ---


class LayerColours:
    """A shade for each layer, whose lines are named where they end."""

    def __init__(self, sites: Iterable[Site]) -> None:
        layers = sorted(site.layer for site in sites)
        self._first, self._span = layers[0], max(1, layers[-1] - layers[0])

    def __getitem__(self, site: Site) -> str:
        return to_hex(SHADES((site.layer - self._first) / self._span))

    def lines(self, axis: Axes, lines: Mapping[Site, tuple[list[float], list[float]]], **style: Any) -> None:
        for site, (x, y) in lines.items():
            axis.plot(x, y, color=self[site], **style)

    def name(self, axis: Axes, lines: Mapping[Site, tuple[list[float], list[float]]], *, at: int = -1) -> None:
        """Name some lines at their ends (or with 0 their beginnings), when the scales of the axis are set."""
        ends = {site: (x[at], y[at]) for site, (x, y) in lines.items() if x and (y[at] > 0 or axis.get_yscale() != "log")}
        every = max(1, math.ceil(len(ends) / _MOST_LABELS))
        some = [site for n, site in enumerate(sorted(ends)) if n % every == 0]
        names = [(*ends[site], _site_name(site, first=n == 0), self[site]) for n, site in enumerate(some)]
        label_ends(axis, names, "left" if at else "right")


def _site_name(site: Site, *, first: bool) -> str:
    return f"layer {site}" if first or site.hook != RESID_POST else str(site)


def label_ends(axis: Axes, labels: list[tuple[float, float, str, str]], ha: Literal["left", "right"] = "left") -> None:
    """Write (x, y, text, colour) beside their points, moved up or down as far as is needed to be told apart."""
    if not labels:
        return
    to_share = axis.transScale + axis.transLimits
    height = axis.get_position().height * axis.figure.get_figure().get_figheight()  # type: ignore[union-attr]
    gap = 1.15 * _LABEL_SIZE / 72 / height
    labels.sort(key=lambda each: to_share.transform((each[0], each[1]))[1])
    shares = np.array([to_share.transform((x, y))[1] for x, y, *_ in labels])
    placed = shares.copy()
    for n in range(1, len(placed)):
        placed[n] = max(placed[n], placed[n - 1] + gap)
    placed -= max(0.0, placed[-1] - max(1.0, shares[-1]))
    for n in range(len(placed) - 2, -1, -1):
        placed[n] = min(placed[n], placed[n + 1] - gap)
    for (x, y, text, colour), share in zip(labels, placed, strict=True):
        at = tuple(to_share.inverted().transform((to_share.transform((x, y))[0], share)).tolist())
        style: dict[str, Any] = {"textcoords": "offset points", "ha": ha, "va": "center", "annotation_clip": False}
        axis.annotate(text, at, (6 if ha == "left" else -6, 0), color=colour, fontsize=_LABEL_SIZE, **style)


# --- numbers ---


def finite(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """Those of two finite numbers, as two lists."""
    numbers = [(a, b) for a, b in pairs if is_number(a) and is_number(b)]
    return [a for a, _ in numbers], [b for _, b in numbers]


def points(results: Iterable[Result], x: str, y: Column) -> tuple[list[float], list[float]]:
    return finite((getattr(r, x), y.value(r)) for r in results)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Over what is a number; None if nothing is."""
    numbers = [v for v in values if v is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def common_sites(runs: Iterable[list[Result]]) -> list[Site]:
    """The sites that all of these runs have finished, of those that have finished any."""
    done = [sites for results in runs if (sites := {r.site for r in latest(results) if r.final})]
    return sorted(set.intersection(*done)) if done else []


# --- axes ---


def token_axis(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(round(v))))
    axis.set_xlabel("training tokens")


def layer_axis(axis: Axes, label: str = "layer", most: int = 12) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    low, high = axis.dataLim.intervalx
    if low == high:  # one layer, and no 2.95 and 3.05 beside it
        axis.set_xlim(low - 1, high + 1)
        axis.set_xticks([low])
    axis.set_xlabel(label)


class _Plain(LogFormatter):
    """Where a logarithmic axis has labels, 0.02 and 300, not 2 · 10⁻² and 3 · 10²."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def logarithmic(axis: Axes, which: str = "y") -> None:
    """A logarithmic axis, if there is anything positive to show on it."""
    lowest, highest = axis.dataLim.intervaly if which == "y" else axis.dataLim.intervalx
    if 0 < lowest <= highest < math.inf:
        getattr(axis, f"set_{which}scale")("log")
        side = axis.yaxis if which == "y" else axis.xaxis
        side.set_major_formatter(_Plain())
        side.set_minor_formatter(_Plain(labelOnlyBase=False, minor_thresholds=(2, 0.4)))


def scaled(axis: Axes, column: Column) -> None:
    """The vertical axis of a metric, as its values are best told apart."""
    low, high = axis.get_ylim()
    if column.scale == "log":
        logarithmic(axis)
    elif column.scale == "rises":
        axis.set_ylim(top=max(high, 1 + 0.02 * max(0.01, 1 - low)))  # more than 1 where zeros do better than the model
    elif column.scale == "rare":  # at least a tenth, so that noise about nothing does not look like a trend
        axis.set_ylim(0, max(0.1, high))
