"""Pictures of runs on held-out tokens, each as PNG (for pages) and SVG (for papers), the same bytes for the same numbers.

Of one run, in its plots/ folder:            Of all runs together, a copy in each run's plots/ folder:
    1_training_curves                            3_sparsity_fidelity
    2_metrics_heatmap                            7_capacity
    4_snapshots                                  8_loss_floor_predictions
    5_feature_density
    6_feature_importance

Layers are shades of one colour map that grows in lightness (cividis), runs are colours, markers and dashes at once (Okabe &
Ito's colours), so nothing rests on telling red from green. Shares are drawn from 0 to 1 whatever their values. A layer that
is not finished is shown by its latest snapshot and marked: an open marker, or the snapshot's name. Drawing takes longer than
the rest of an evaluation that finds nothing new, so a picture that is there already of the same numbers is kept.
"""

import hashlib
import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # a notebook's names one that may not be here, and the import reads it
import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator
from numpy.typing import NDArray

from eval.floors.measured import Experiment
from eval.measure.features import Features, measured_features
from eval.measure.result import Result, latest
from eval.measure.runs import Skipped
from eval.report.columns import Column, columns, student_widths, written
from shared.files import locked, publish_file
from shared.runs.run import Run, snapshot_tokens
from shared.seal import canonical, crc32c
from shared.sites import Site
from shared.units import format_count

matplotlib.rcdefaults()  # the user's own style may not fit
matplotlib.rcParams["svg.hashsalt"] = "residual-saes"  # else names inside an SVG are drawn by chance
matplotlib.rcParams["path.simplify_threshold"] = 0.5

Record = dict[str, Any]

_CODE = [hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), matplotlib.__version__]  # that draws
_DPI = 110
_LAYERS = colormaps["cividis"]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS, _DASHES = "osD^vP*X", ("-", "--", "-.", ":")


@dataclass(kw_only=True, frozen=True, slots=True)
class RunData:
    """A run as the pictures need it."""

    run: Run
    label: str  # short, unlike the others'
    results: list[Result]  # by layer and age
    whole: int  # tokens of training
    d_model: int
    kind: str  # the same for runs that differ in nothing but how sparse they are asked to be

    @property
    def inputs(self) -> list[Any]:
        """All that pictures of records show; checksums differ between equal runs."""
        records = [{k: v for k, v in r.to_dict().items() if k != "file"} for r in self.results]
        return [self.run.name, self.label, self.whole, self.d_model, self.kind, records]

    @property
    def latest(self) -> list[Result]:
        """The last snapshot of each layer."""
        return latest(self.results)


@dataclass(frozen=True, slots=True)
class _Picture:
    inputs: Any  # JSON of all that is drawn
    draw: Callable[[], Figure]


Pictures = dict[str, _Picture]


def short_labels(names: Sequence[str]) -> list[str]:
    """Run names without what all of them begin with, up to a hyphen: what tells them apart."""
    words = [name.split("-") for name in names]
    same = 0
    while len(names) > 1 and all(len(w) > same + 1 and w[same] == words[0][same] for w in words):
        same += 1
    return ["-".join(w[same:]) for w in words]


def plot_runs(runs: list[Run], results: dict[str, list[Result]], measured: Experiment | None, skipped: Skipped) -> None:
    """Write every picture, as far as there is something to show, into the runs' plots/ folders."""
    labels = short_labels([run.name for run in runs])
    found = []
    for run, label in zip(runs, labels, strict=True):
        config = run.config()
        whole, d_model = config["train"]["tokens"], config["cache"]["spec"]["d_model"]
        kind = _kind(config["train"])
        found.append(RunData(run=run, label=label, results=results[run.name], whole=whole, d_model=d_model, kind=kind))
        (run.path / "plots").mkdir(exist_ok=True)
    for data in found:
        _write([data], _of_one_run(data, skipped))
    _write([data for data in found if data.results], _of_all_runs([data for data in found if data.results], measured))


def _kind(train: dict[str, Any]) -> str:
    """How a run was trained but for the numbers in its setting."""
    return canonical(train | {"l1": sorted(train["l1"])}).decode()


def _of_one_run(data: RunData, skipped: Skipped) -> Pictures:
    pictures, curves = {}, {}
    for site in sorted({s.site for s in data.run.snapshots()}):
        with skipped.leaving_out():
            curves[site] = data.run.metrics(site)
    if curves:
        drawn = {str(site): [[r.get(key) for key, *_ in _CURVES] for r in curve] for site, curve in curves.items()}
        pictures["1_training_curves"] = _Picture([data.run.name, drawn], lambda: _training_curves(data, curves))
    if data.results:
        pictures["2_metrics_heatmap"] = _Picture(data.inputs, lambda: _heatmap(data))
        pictures["4_snapshots"] = _Picture(data.inputs, lambda: _snapshots(data))
    features = _features(data, skipped)
    if features:
        sums = {str(site): [crc32c(of.density.numpy()), crc32c(of.mean_square.numpy())] for site, of in features.items()}
        pictures["5_feature_density"] = _Picture([data.run.name, sums], lambda: _density(data, features))
        pictures["6_feature_importance"] = _Picture([data.run.name, sums], lambda: _importance(data, features))
    return pictures


def _of_all_runs(runs: list[RunData], measured: Experiment | None) -> Pictures:
    if not runs:
        return {}
    inputs = [data.inputs for data in runs]
    return {
        "3_sparsity_fidelity": _Picture(inputs, lambda: _sparsity_fidelity(runs)),
        "7_capacity": _Picture(inputs, lambda: _capacity(runs)),
        "8_loss_floor_predictions": _Picture([inputs, measured and measured.stored], lambda: _floors(runs, measured)),
    }


def _features(data: RunData, skipped: Skipped) -> dict[Site, Features]:
    """Of each layer's latest snapshot, where they are of the checkpoint that the record is of."""
    found = {}
    for r in data.latest:
        with skipped.leaving_out():
            measured = measured_features(data.run, r.site, r.snapshot, r.file)
            if measured is not None:
                found[r.site] = measured[0]
    return found


def _write(runs: list[RunData], pictures: Pictures) -> None:
    """The same picture into the plots/ folder of each run, unless it is there."""
    for name, picture in pictures.items():
        key = hashlib.sha256(canonical([_CODE, name, picture.inputs])).hexdigest()
        folders = [data.run.path / "plots" for data in runs]
        if all(_is_of(folder / f"{name}{suffix}", key) for folder in folders for suffix in (".png", ".svg")):
            continue
        for suffix, content in _rendered(picture.draw(), key).items():
            for folder in folders:
                with locked(folder):
                    publish_file(folder / f"{name}{suffix}", content)


def _is_of(path: Path, key: str) -> bool:
    """Whether this picture was drawn of the same numbers by the same code: both formats say it near their beginning."""
    try:
        with path.open("rb") as file:
            return key.encode() in file.read(4096)
    except OSError:
        return False


def _rendered(figure: Figure, key: str) -> dict[str, bytes]:
    """{suffix: content}, each drawn once, where `savefig` would draw twice."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Source": key})  # type: ignore[no-untyped-call]
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Source": key})  # type: ignore[no-untyped-call]
    return {".png": png.getvalue(), ".svg": svg.getvalue()}


# --- parts of pictures ---


@dataclass(kw_only=True, frozen=True, slots=True)
class _Margins:
    """Inches around and between panels. Having matplotlib find them takes a third of the time of a picture."""

    left: float = 0.9
    right: float = 0.95  # room for the layers' colour bar
    top: float = 0.4
    bottom: float = 0.55
    between: tuple[float, float] = (0.85, 0.25)  # columns, rows


_PLAIN = _Margins()


def _grid(
    rows: int, columns: int, panel: tuple[float, float], margins: _Margins = _PLAIN, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels of this many inches."""
    m, (width, height) = margins, panel
    w = m.left + columns * width + (columns - 1) * m.between[0] + m.right
    h = m.bottom + rows * height + (rows - 1) * m.between[1] + m.top
    figure = Figure(figsize=(w, h), dpi=_DPI)
    places = {
        "left": m.left / w, "right": 1 - m.right / w, "bottom": m.bottom / h, "top": 1 - m.top / h,
        "wspace": m.between[0] / width, "hspace": m.between[1] / height,
    }  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=places, **options)
    return figure, list(axes.flat)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, y=1 - 0.08 / figure.get_figheight(), va="top", fontsize=12)


def _layer_norm(sites: Iterable[Site]) -> Normalize:
    found = sorted(site.layer for site in sites)
    return Normalize(found[0], max(found[-1], found[0] + 1))


def _bar_axes(figure: Figure) -> Axes:
    """A strip at the right, as high as the panels."""
    w, boxes = figure.get_figwidth(), [axis.get_position() for axis in figure.axes]
    left, bottom, top = max(b.x1 for b in boxes), min(b.y0 for b in boxes), max(b.y1 for b in boxes)
    return figure.add_axes((left + 0.12 / w, bottom, 0.2 / w, top - bottom))


def _layer_bar(figure: Figure, norm: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _LAYERS), cax=_bar_axes(figure), label="layer")
    bar.locator = MaxNLocator(12, integer=True)
    bar.update_ticks()


def _say(axis: Axes, words: str) -> None:
    """In the middle of a panel that has nothing to show."""
    axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes, fontsize=14, color="0.35")


def _token_axis(axis: Axes, label: str = "training tokens") -> None:
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(round(v))))
    axis.set_xlabel(label)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def _points(results: Iterable[Result], x: str, y: Column) -> tuple[list[float], list[float]]:
    return _finite((getattr(r, x), y.value(r)) for r in results)


def _finite(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """Those of two finite numbers, as two lists."""
    numbers = [(a, b) for a, b in pairs if _is_number(a) and _is_number(b)]
    return [a for a, _ in numbers], [b for _, b in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class _Plain(LogFormatter):
    """Where a logarithmic axis has labels, 0.02 and 300, not 2 · 10⁻² and 3 · 10²."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _logarithmic(axis: Axes, which: str = "y") -> None:
    """A logarithmic axis, if there is anything positive to show on it."""
    lowest, highest = axis.dataLim.intervaly if which == "y" else axis.dataLim.intervalx
    if 0 < lowest <= highest < math.inf:
        getattr(axis, f"set_{which}scale")("log")
        side = axis.yaxis if which == "y" else axis.xaxis
        side.set_major_formatter(_Plain())
        side.set_minor_formatter(_Plain(labelOnlyBase=False, minor_thresholds=(2, 0.4)))


# --- of one run ---

_CURVES = (
    ("mse", "MSE, squared activation units", True),
    ("l0", "L0, features a token", True),
    ("lambda", "λ", False),
    ("alive", "alive features", False),
)


def _training_curves(data: RunData, curves: dict[Site, list[Record]]) -> Figure:
    figure, axes = _grid(2, 2, (4.5, 2.9), sharex=True)
    norm = _layer_norm(curves)
    for axis, (key, title, logarithmic) in zip(axes, _CURVES, strict=True):
        for site, curve in curves.items():
            axis.plot(*_finite((r.get("tokens"), r.get(key)) for r in curve), color=_LAYERS(norm(site.layer)), linewidth=1.0)
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
        if logarithmic:
            _logarithmic(axis)
    for axis in axes[2:]:  # a line that does not move is where it belongs, not among numbers that cannot be
        highest = axis.dataLim.y1
        axis.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1)
    if axes[2].dataLim.y1 == 0:
        _say(axes[2], "no L1")
    axes[2].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    for axis in axes[2:]:
        _token_axis(axis)
    _layer_bar(figure, norm)
    _title(figure, f"{data.run.name}: training curves")
    return figure


def _heatmap(data: RunData) -> Figure:
    rows, shown = data.latest, columns("map")
    margins = _Margins(left=1.35, right=0.8, top=1.45, bottom=0.4)
    figure, (axis,) = _grid(1, 1, (12, max(2.0, 0.29 * len(rows))), margins)
    shades, values = np.full((2, len(rows), len(shown)), np.nan)
    for number, column in enumerate(shown):
        values[:, number] = [v if _is_number(v := column.value(r)) else math.nan for r in rows]
        known = values[:, number][np.isfinite(values[:, number])]
        largest = 1.0 if column.share else max(known, default=0.0)
        shades[:, number] = np.clip(values[:, number] / (largest or 1.0), 0, 1)
    image = axis.imshow(shades, cmap=_LAYERS, vmin=0, vmax=1, aspect="auto")
    titles = [textwrap.fill(column.title, 16) for column in shown]
    axis.set_xticks(range(len(shown)), titles, rotation=45, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [_layer_name(r) for r in rows])
    for (row, number), value in np.ndenumerate(values):
        text = written(value if math.isfinite(value) else None, shown[number].cell)
        ink = "black" if shades[row, number] > 0.55 else "white" if math.isfinite(value) else "black"
        axis.text(number, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    axis.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axis.grid(which="minor", axis="x", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    figure.colorbar(image, cax=_bar_axes(figure))
    axis.set_xlabel(
        "colours: shares and cosines from 0 to 1; λ, L0, MSE and d* from 0 to the largest of their column", fontsize=9
    )
    _title(figure, f"{data.run.name} on held-out tokens")
    return figure


def _layer_name(r: Result) -> str:
    return f"layer {r.site}" + ("" if r.final else f"\n{r.snapshot}, unfinished")


def _snapshots(data: RunData) -> Figure:
    figure, axes = _grid(2, 3, (3.4, 2.7), _Margins(bottom=0.8), sharex=True)
    layers = sorted({r.site for r in data.results})
    norm = _layer_norm(layers)
    for axis, column in zip(axes, columns("snapshots"), strict=True):
        for site in layers:
            points = _points([r for r in data.results if r.site == site], "trained_tokens", column)
            axis.plot(*points, color=_LAYERS(norm(site.layer)), linewidth=1.0, marker="o", markersize=3)
        axis.set_ylabel(column.label)
        axis.grid(alpha=0.25)
        if column.scale == "log":
            _logarithmic(axis)
        elif column.scale == "rises":
            low, high = axis.get_ylim()
            axis.set_ylim(top=max(high, 1 + 0.02 * max(0.01, 1 - low)))  # more than 1 where zeros do better than the model
        else:  # at least a tenth, so that noise about nothing does not look like a trend
            axis.set_ylim(0, max(0.1, axis.get_ylim()[1]))
    for axis in axes[3:]:
        _token_axis(axis)
        axis.set_xlim(0, data.whole * 1.03)
        axis.set_xticks(list(snapshot_tokens(data.whole).values()))
        axis.tick_params(axis="x", rotation=45)
    _layer_bar(figure, norm)
    _title(figure, f"{data.run.name}: snapshots, on held-out tokens")
    return figure


_BINS = np.linspace(-6, 0, 49)  # log10 of density
_CLASSES = (  # features with a density above the first and up to the second number
    ("never fired", -1.0, 0.0, "#000000"),
    ("up to 1e-5", 0.0, 1e-5, "#4d4d4d"),
    ("up to 1 %", 1e-5, 1e-2, "#56B4E9"),
    ("up to 10 %", 1e-2, 1e-1, "#E69F00"),
    ("denser", 1e-1, 1.0, "#D55E00"),
)


def _density(data: RunData, features: dict[Site, Features]) -> Figure:
    """Left which share of features is in which class, right how log density is spread in each layer."""
    layers = sorted(features)
    margins = _Margins(left=0.6, right=1.0, top=0.7)
    figure, (classes, spreads) = _grid(1, 2, (5.0, max(2.0, 0.24 * len(layers))), margins, sharey=True)
    density = {layer: features[layer].density.double().numpy() for layer in layers}
    spread = np.array([_spread(density[layer]) for layer in layers])
    edges = np.arange(len(layers) + 1) - 0.5
    mesh = spreads.pcolormesh(_BINS, edges, spread, cmap=_LAYERS, vmin=0, vmax=0.1)
    figure.colorbar(mesh, cax=_bar_axes(figure), extend="max", label="share of features, in bins of 1/8 decade")
    spreads.set_xlabel("log10 of density (share of tokens on which a feature fires)")
    classes.set_ylabel("layer")
    spreads.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    spreads.invert_yaxis()
    start = np.zeros(len(layers))
    for name, low, high, colour in _CLASSES:
        share = np.array([((density[layer] > low) & (density[layer] <= high)).mean() for layer in layers])
        classes.barh(range(len(layers)), share, left=start, height=0.8, color=colour, label=name)
        start += share
    classes.set_xlim(0, 1)
    classes.set_xlabel("share of features")
    classes.legend(
        ncols=len(_CLASSES),
        fontsize=7.5,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.0,
        handlelength=1.2,
        frameon=False,
    )
    _title(figure, f"{data.run.name}: how often features fire")
    return figure


def _spread(density: NDArray[np.float64]) -> NDArray[np.float64]:
    fired = density[density > 0]
    counts = np.histogram(np.log10(fired).clip(_BINS[0], _BINS[-1]), _BINS)[0]
    return counts / max(1, len(density))


def _importance(data: RunData, features: dict[Site, Features]) -> Figure:
    """E[z²] by rank, and which part of their sum the features up to a rank hold."""
    figure, (left, right) = _grid(1, 2, (5.0, 4.0))
    norm = _layer_norm(features)
    for site, of in sorted(features.items()):
        values = np.sort(of.mean_square.double().numpy())[::-1]
        values = values[np.isfinite(values) & (values > 0)]
        if not len(values):
            continue
        ranks = np.unique(np.geomspace(1, len(values), 200).round().astype(np.int64))
        colour = _LAYERS(norm(site.layer))
        left.plot(ranks, values[ranks - 1], color=colour, linewidth=1.0)
        right.plot(ranks, (np.cumsum(values) / values.sum())[ranks - 1], color=colour, linewidth=1.0)
    left.set_ylabel("importance E[z²], squared activation units")
    right.set_ylabel("share of the sum of importance up to this rank")
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.set_xlabel("rank of the feature")
        axis.grid(alpha=0.25)
        _logarithmic(axis, "x")
    _logarithmic(left)
    _layer_bar(figure, norm)
    _title(figure, f"{data.run.name}: how unequal features are")
    return figure


# --- of all runs ---


def _sparsity_fidelity(runs: list[RunData]) -> Figure:
    """Colours are layers, markers are runs; a grey line joins those of a layer's SAEs that were trained alike."""
    figure, axes = _grid(2, 2, (5.0, 3.8), _Margins(bottom=0.95), sharex=True)
    norm = _layer_norm(r.site for data in runs for r in data.results)
    alike: dict[tuple[str, Site], list[Result]] = {}
    for kind, r in sorted(((data.kind, r) for data in runs for r in data.latest), key=lambda one: one[1].l0 or 0):
        same = alike.setdefault((kind, r.site), [])
        if r.final:
            same.append(r)
    for axis, column in zip(axes, columns("fidelity"), strict=True):
        for same in alike.values():
            axis.plot(*_points(same, "l0", column), color="0.8", linewidth=0.7, zorder=1)
        for number, data in enumerate(runs):
            for finished in (True, False):
                _scatter(axis, [r for r in data.latest if r.final is finished], column, number, norm, finished)
        axis.set_ylabel(column.label)
        axis.grid(alpha=0.25)
        if column.scale == "log":
            _logarithmic(axis)
        _logarithmic(axis, "x")
    for axis in axes[2:]:
        axis.set_xlabel("L0, features a token")
    figure.legend(handles=_run_legend(axes[0], runs), loc="lower center", ncols=min(4, len(runs) + 1))
    _layer_bar(figure, norm)
    _title(figure, "Sparsity and fidelity on held-out tokens")
    return figure


def _scatter(axis: Axes, results: list[Result], column: Column, number: int, norm: Normalize, finished: bool) -> None:
    colours = [_LAYERS(norm(r.site.layer)) for r in results if _is_number(r.l0) and _is_number(column.value(r))]
    x, y = _points(results, "l0", column)
    fill = {"facecolors": colours} if finished else {"facecolors": "none"}
    axis.scatter(x, y, marker=_MARKERS[number % len(_MARKERS)], s=34, edgecolors=colours, zorder=2, **fill)


def _run_legend(axis: Axes, runs: list[RunData]) -> list[Any]:
    handles = [
        axis.plot([], [], marker=_MARKERS[n % len(_MARKERS)], linestyle="", color="0.3", label=data.label)[0]
        for n, data in enumerate(runs)
    ]
    if any(not r.final for data in runs for r in data.latest):
        style: dict[str, Any] = {"marker": "o", "linestyle": "", "color": "0.3", "fillstyle": "none"}
        handles += axis.plot([], [], label="open: unfinished layer", **style)
    return handles


def _capacity(runs: list[RunData]) -> Figure:
    figure, axes = _grid(2, 2, (5.0, 2.8), _Margins(bottom=0.95, right=0.2), sharex=True)
    for axis, column in zip(axes, columns("capacity"), strict=True):
        for number, data in enumerate(runs):
            style = _style(number)
            finished = [r for r in data.latest if r.final]
            others = [r for r in data.latest if not r.final]
            axis.plot(
                *_finite((r.site.layer, column.value(r)) for r in finished),
                **style,
                markersize=4,
                linewidth=1.2,
                label=data.label,
            )
            axis.plot(
                *_finite((r.site.layer, column.value(r)) for r in others),
                **(style | {"linestyle": ""}),
                markersize=6,
                markerfacecolor="white",
            )
        axis.set_ylabel(column.label)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    for width in sorted({data.d_model for data in runs}):
        axes[3].axhline(width, color="0.4", linewidth=1)
        axes[3].annotate(f"d_model {width}", (0.01, width), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    for axis in axes[2:]:
        axis.set_xlabel("layer (open marker: unfinished)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(runs)))
    _title(figure, "What predicted floors rest on")
    return figure


def _floors(runs: list[RunData], measured: Experiment | None) -> Figure:
    """A panel a run of predictions, one of what students measured, and one of how far the one explains the other."""
    panels = len(runs) + (2 if measured else 1)
    columns = min(3 if panels > 4 else 4, panels)
    rows = math.ceil(panels / columns)
    figure, axes = _grid(rows, columns, (3.0, 3.2), _Margins(top=0.65, bottom=0.75, between=(0.95, 1.1)))
    norm = _layer_norm(r.site for data in runs for r in data.results)
    for axis, data in zip(axes, runs, strict=False):
        _predicted_panel(axis, data, norm)
    _measured_panel(axes[len(runs)], measured, student_widths(runs[0].latest))
    if measured:
        _fit_panel(axes[len(runs) + 1], runs, measured)
    for axis in axes[panels:]:
        axis.set_axis_off()
    _layer_bar(figure, norm)
    _title(figure, "Loss floors of narrower students: predicted (unreliable near d*), and measured by distillation")
    return figure


def _predicted_panel(axis: Axes, data: RunData, norm: Normalize) -> None:
    widths, least = student_widths(data.latest), []
    for r in data.latest:
        x, y = _finite(sorted(r.floors.items()))
        least += [v for v in y if v > 0]
        dashes = "-" if r.final else ":"
        axis.plot(x, y, color=_LAYERS(norm(r.site.layer)), linestyle=dashes, linewidth=1.0, marker="o", markersize=3)
    if least:
        axis.set_yscale("symlog", linthresh=min(least))  # 0 from d* on
        axis.set_yticks(_ticks(min(least), max(least)))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_ylim(bottom=0)
    axis.set_title(f"predicted, {data.label}", fontsize=10)
    axis.set_ylabel("L*(d_S), squared activation units")
    _width_axis(axis, widths)


def _ticks(least: float, most: float) -> list[float]:
    """0, and round numbers of a logarithmic axis from `least` to `most`: a power of ten each, or three where those are few."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    mantissas = (1, 2, 5) if last - first < 3 else (1,)
    step = 1 + (last - first) // 8
    return [0, *(m * 10.0**e for e in range(first, last + 1, step) for m in mantissas if least <= m * 10.0**e <= most)]


def _width_axis(axis: Axes, widths: list[int]) -> None:
    axis.set_xticks(widths, [str(w) for w in widths], rotation=45, fontsize=8)
    axis.set_xlabel("student width d_S, dimensions")
    axis.grid(alpha=0.25)


def _measured_panel(axis: Axes, measured: Experiment | None, widths: list[int]) -> None:
    axis.set_title("measured", fontsize=10)
    axis.set_ylabel("floor, nats a token")
    if measured is None:
        _width_axis(axis, widths)
        axis.set_yticks([])
        return _say(axis, "not measured")
    floors, seeds = measured.floors, measured.students
    axis.plot([f.width for f in floors], [f.floor for f in floors], color=_COLOURS[0], marker="o")
    axis.plot([s.width for s in seeds], [s.floor for s in seeds], linestyle="", marker="_", color="black", markersize=9)
    axis.set_ylim(bottom=0)
    _width_axis(axis, [f.width for f in floors])


def _fit_panel(axis: Axes, runs: list[RunData], measured: Experiment) -> None:
    """R² of floor ≈ C · L* + B on widths that the fit has not seen, beside that of the logarithm of the width alone."""
    for number, data in enumerate(runs):
        mine = [p for p in measured.predictions if p.run == data.run.name]
        for name, fill in (("predicted", "full"), ("log_width", "none")):
            fits = [{"layer": p.layer, "r2": fit.left_out_r2 if fit else None} for p in mine for fit in [p.fits[name]]]
            label = data.label if name == "predicted" else None
            axis.plot(*fits, **(_style(number) | {"linestyle": ""}), fillstyle=fill, label=label)
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set_title("floor ≈ C · L* + B (open: over ln width)", fontsize=10)
    axis.set_ylabel("R² of widths left out of the fit")
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_ylim(max(-1.0, min(-0.05, axis.get_ylim()[0])), 1.05)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
