"""Pictures of runs on held-out tokens, each as PNG (for pages) and SVG (for papers), the same bytes for the same numbers.

Of one run, in its plots/ folder:            Of all runs together, a copy in each run's plots/ folder:
    1_training_curves                            3_sparsity_fidelity
    2_metrics_heatmap                            7_capacity
    4_snapshots                                  8_loss_floor_predictions
    5_feature_density
    6_feature_importance
    9_feature_layers, of a crosscoder

A layer that is not finished is shown by its latest snapshot and marked: an open marker, or the snapshot's name. Drawing takes
longer than the rest of an evaluation that finds nothing new, so a picture of the same numbers that is whole is kept.
"""

import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.measure.features import Features, measured_features
from residual_saes.eval.measure.result import Result
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.report import density, fidelity, floors, training
from residual_saes.eval.report.figures import RunData
from residual_saes.eval.report.heatmap import heatmap
from residual_saes.eval.report.settings import family, kind, setting
from residual_saes.shared.files import locked, publish_file
from residual_saes.shared.runs.run import Run
from residual_saes.shared.seal import canonical, crc32c
from residual_saes.shared.sites import Site

_SUMS = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
_CODE = [*_SUMS, matplotlib.__version__]  # that draws


@dataclass(frozen=True, slots=True)
class _Picture:
    inputs: Any  # JSON of all that is drawn
    draw: Callable[[], Figure]


Pictures = dict[str, _Picture]


def short_labels(names: list[str]) -> list[str]:
    """Run names without what all of them begin with, up to a hyphen: what tells them apart."""
    words = [name.split("-") for name in names]
    same = 0
    while len(names) > 1 and all(len(w) > same + 1 and w[same] == words[0][same] for w in words):
        same += 1
    return ["-".join(w[same:]) for w in words]


def plot_runs(runs: list[Run], results: dict[str, list[Result]], measured: Experiment | None, skipped: Skipped) -> None:
    """Write every picture, as far as there is something to show, into the runs' plots/ folders."""
    shown = []
    for run, label in zip(runs, short_labels([run.name for run in runs]), strict=True):
        shown.append(run_data(run, label, results[run.name]))
        (run.path / "plots").mkdir(exist_ok=True)
    for data in shown:
        write([data], of_one_run(data, skipped))
    evaluated = [data for data in shown if data.results]
    write(evaluated, of_all_runs(evaluated, measured))


def run_data(run: Run, label: str, results: list[Result]) -> RunData:
    train, spec = run.config.stored["train"], run.config.cache.spec
    return RunData(
        run=run, label=label, setting=setting(train), family=family(train), results=results, whole=run.config.train.tokens,
        d_model=spec.d_model, kind=kind(train),
    )  # fmt: skip


def of_one_run(data: RunData, skipped: Skipped) -> Pictures:
    pictures, curves = {}, {}
    for site in sorted({s.site for s in data.run.snapshots()}):
        with skipped.leaving_out():
            curves[site] = data.run.metrics(site)
    if data.whole is not None and curves:
        inputs = [data.run.name, training.drawn(curves)]
        pictures["1_training_curves"] = _Picture(inputs, lambda: training.training_curves(data, curves))
    if data.results:
        pictures["2_metrics_heatmap"] = _Picture(data.inputs, lambda: heatmap(data))
        if data.whole is not None:
            pictures["4_snapshots"] = _Picture(data.inputs, lambda: training.snapshots(data))
    features = _features(data, skipped)
    if features:
        sums = {str(site): [crc32c(of.density.numpy()), crc32c(of.mean_square.numpy())] for site, of in features.items()}
        pictures["5_feature_density"] = _Picture([data.run.name, sums], lambda: density.density(data, features))
        pictures["6_feature_importance"] = _Picture([data.run.name, sums], lambda: density.importance(data, features))
        shares = {site: of.decoder_share for site, of in features.items() if of.decoder_share is not None}
        if shares:
            inputs = [data.run.name, sums, {str(site): crc32c(share.numpy()) for site, share in shares.items()}]
            pictures["9_feature_layers"] = _Picture(inputs, lambda: density.layers(data, features, shares))
    return pictures


def of_all_runs(runs: list[RunData], measured: Experiment | None) -> Pictures:
    if not runs:
        return {}
    inputs = [data.inputs for data in runs]
    experiment = measured and measured.to_dict()
    return {
        "3_sparsity_fidelity": _Picture(inputs, lambda: fidelity.sparsity_fidelity(runs)),
        "7_capacity": _Picture(inputs, lambda: fidelity.capacity(runs)),
        "8_loss_floor_predictions": _Picture([inputs, experiment], lambda: floors.loss_floors(runs, measured)),
    }


def _features(data: RunData, skipped: Skipped) -> dict[Site, Features]:
    """Of each site's latest snapshot, where they are of the checkpoint that the result is of."""
    features = {}
    for r in data.latest:
        with skipped.leaving_out():
            if measured := measured_features(data.run, r.site, r.snapshot, r.file):
                features[r.site] = measured[0]
    return features


# --- files ---


def write(runs: list[RunData], pictures: Pictures) -> None:
    """The same picture into the plots/ folder of each run, unless it is there."""
    for name, picture in pictures.items():
        key = hashlib.sha256(canonical([_CODE, name, picture.inputs])).hexdigest()
        folders = [data.run.path / "plots" for data in runs]
        if all(_is_of(folder / f"{name}{suffix}", key) for folder in folders for suffix in (".png", ".svg")):
            continue
        for suffix, content in rendered(picture.draw(), key).items():
            for folder in folders:
                with locked(folder):
                    publish_file(folder / f"{name}{suffix}", content)


def rendered(figure: Figure, key: str) -> dict[str, bytes]:
    """{suffix: content}, each drawn once, where `savefig` would draw twice."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Source": key})  # type: ignore[no-untyped-call]
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Source": key})  # type: ignore[no-untyped-call]
    return {".png": png.getvalue(), ".svg": _sealed(svg.getvalue())}


def _sealed(svg: bytes) -> bytes:
    """With a checksum of itself, which a PNG has in each of its chunks."""
    return svg + f"<!-- crc32c:{crc32c(np.frombuffer(svg, np.uint8))} -->\n".encode()


_SEAL_BYTES = len(_sealed(b" ")) - 1
_PNG = b"\x89PNG\r\n\x1a\n"


def picture_is_whole(path: Path) -> bool:
    """Whether a picture is there and as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if path.suffix == ".svg":
        return len(content) > _SEAL_BYTES and content == _sealed(content[:-_SEAL_BYTES])
    at = len(_PNG)
    while at < len(content):  # a chunk: its length, its name and as many bytes, and their CRC-32
        size = 8 + int.from_bytes(content[at : at + 4])
        if zlib.crc32(content[at + 4 : at + size]) != int.from_bytes(content[at + size : at + size + 4]):
            return False
        at += size + 4
    return at == len(content) > len(_PNG) and content.startswith(_PNG)


def _is_of(path: Path, key: str) -> bool:
    """Whether a picture is whole and drawn of the same numbers by the same code: both formats say it near their beginning."""
    return picture_is_whole(path) and key.encode() in path.read_bytes()[:4096]
