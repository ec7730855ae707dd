"""What all pictures share: colours, panels, axes, and the one layout in which nothing is cut off.

Layers are shades of one colour map that grows in lightness (cividis), runs are colours, markers and dashes at once (Okabe &
Ito's colours), so nothing rests on telling red from green.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # a notebook's names one that may not be here, and the import reads it
import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from residual_saes.eval.measure.result import Result, latest
from residual_saes.eval.report.columns import Column
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import Site
from residual_saes.shared.units import format_count

matplotlib.rcdefaults()  # the user's own style may not fit
matplotlib.rcParams.update({
    "svg.hashsalt": "residual-saes",  # else names inside an SVG are drawn by chance
    "path.simplify_threshold": 0.5,
    "figure.dpi": 110,
    "figure.titlesize": 12,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.0,
})  # fmt: skip

SHADES = colormaps["cividis"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, _DASHES = "osD^vP*X", ("-", "--", "-.", ":")


@dataclass(kw_only=True, frozen=True, slots=True)
class RunData:
    """A run as the pictures need it."""

    run: Run
    label: str  # short, unlike the others'
    results: list[Result]  # by site and age
    whole: int  # tokens of training
    d_model: int
    kind: str  # the same for runs that differ in nothing but how sparse they are asked to be

    @property
    def inputs(self) -> list[Any]:
        """All that pictures of results show; checksums differ between equal runs."""
        records = [{k: v for k, v in r.to_dict().items() if k != "file"} for r in self.results]
        return [self.run.name, self.label, self.whole, self.d_model, self.kind, records]

    @property
    def latest(self) -> list[Result]:
        return latest(self.results)


def grid(rows: int, columns: int, panel: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels of about this many inches, labels included."""
    figure = Figure(figsize=(columns * panel[0] + 0.7, rows * panel[1] + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def finished(figure: Figure, title: str) -> Figure:
    """The figure under its title, with everything in its place: laid out once, where each of two formats would do it again."""
    figure.suptitle(title)
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


# --- colours of layers and styles of runs ---


class LayerColours:
    """A shade for each layer, and the bar that explains it."""

    def __init__(self, sites: Iterable[Site]) -> None:
        layers = sorted(site.layer for site in sites)
        self._norm = Normalize(layers[0], max(layers[-1], layers[0] + 1))

    def __getitem__(self, site: Site) -> Any:
        return SHADES(self._norm(site.layer))

    def bar(self, figure: Figure, axes: Sequence[Axes]) -> None:
        bar = figure.colorbar(ScalarMappable(self._norm, SHADES), ax=axes, label="layer", aspect=40, pad=0.01)
        bar.locator = MaxNLocator(12, integer=True)
        bar.update_ticks()


def run_style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


# --- numbers ---


def finite(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """Those of two finite numbers, as two lists."""
    numbers = [(a, b) for a, b in pairs if is_number(a) and is_number(b)]
    return [a for a, _ in numbers], [b for _, b in numbers]


def points(results: Iterable[Result], x: str, y: Column) -> tuple[list[float], list[float]]:
    return finite((getattr(r, x), y.value(r)) for r in results)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- axes ---


def say(axis: Axes, words: str) -> None:
    """In the middle of a panel that has nothing to show."""
    axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes, fontsize=14, color="0.35")


def token_axis(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(round(v))))
    axis.set_xlabel("training tokens")


def layer_axis(axis: Axes, label: str = "layer", most: int = 12) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(most, integer=True))
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
