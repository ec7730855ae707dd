"""How the cost of a step grows with F, d and the number of settings, and that of writing with the number of layers.

    python -m bench growth         # growth.png and results/growth-<machine>.json, minutes on two cores

Every point is measured, dense and sparse beside the five products at the same size, taking turns.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from bench import clock, limits, ours, report
from bench.peers import ROOT

SCRATCH = ROOT / "build" / "bench" / "growth"
PICTURE = Path(__file__).resolve().with_name("growth.png")
DENSE, SPARSE, LIMIT = "dense step", "sparse step, L0 ≤ 150", "five products (limit)"
WRITE, RAW = "harvest write, fsync and checksums", "raw write of the same files (limit)"
STYLES = {DENSE: "o-", SPARSE: "s-", LIMIT: "k--", WRITE: "o-", RAW: "k--"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What varies, and d, F, tokens and rows where they do not."""

    all_features: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536)
    widths: tuple[int, ...] = (256, 512, 1024)
    settings: tuple[int, ...] = (1, 2, 3)
    layers: tuple[int, ...] = (1, 6, 12, 24)
    d: int = 512
    features: int = 16_384
    tokens: int = 2048
    rows: int = 16_384


QUICK = Sizes(all_features=(64, 128), widths=(32, 64), settings=(1, 2), layers=(1, 2), d=32, features=64, tokens=16, rows=32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One panel: median seconds of each line at each x."""

    title: str
    axis: str
    x: tuple[int, ...]
    seconds: Mapping[str, tuple[float, ...]]
    unit: str
    log: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Measures points: median seconds of each line at one size."""

    sizes: Sizes
    rounds: int
    threads: int
    device: str

    def step(self, *, d: int, features: int, settings: int = 1) -> dict[str, float]:
        device, tokens = torch.device(self.device), self.sizes.tokens
        five = limits.five_products(tokens=tokens, d=d, features=features, device=self.device, rounds=0)
        runs: dict[str, clock.Run] = {LIMIT: lambda: sum(five.run() for _ in range(settings))}
        room = ours.workspace(tokens, d, features, device)
        for name, way in ((DENSE, "dense"), (SPARSE, "sparse")):
            saes = ours.new_saes(settings, d=d, features=features, device=device, way=way)
            runs[name] = ours.Steps(saes=saes, workspace=room, tokens=tokens).run
        return self._medians(runs)

    def write(self, layers: int) -> dict[str, float]:
        """A durable write of every layer's rows."""
        spec = ours.cache_spec(d=self.sizes.d, n_layers=layers, rows=self.sizes.rows)
        writes = ours.Writes(cache=ours.new_cache(SCRATCH / "cache", spec), threads=self.threads)
        return self._medians({RAW: writes.best_raw, WRITE: writes.run})

    def _medians(self, runs: Mapping[str, clock.Run]) -> dict[str, float]:
        timings = clock.take_turns(runs, self.rounds)
        gc.collect()
        return {name: timing.median if timing.seconds else float("nan") for name, timing in timings.items()}

    def all(self) -> list[Series]:
        s = self.sizes
        step = f"ms a step of {s.tokens:,} tokens"
        return [
            _series(
                f"one step against F (d = {s.d})", "features F", s.all_features, step,
                lambda f: self.step(d=s.d, features=f), log=True,
            ),
            _series(
                f"one step against d (F = {s.features:,})", "d", s.widths, step,
                lambda width: self.step(d=width, features=s.features), log=True,
            ),
            _series(
                f"settings on one stream (d = {s.d}, F = {s.features:,})", "settings", s.settings, f"{step}, all settings",
                lambda n: self.step(d=s.d, features=s.features, settings=n), log=False,
            ),
            _series(
                f"durable write against layers (d = {s.d})", "layers", s.layers, f"ms for {s.rows:,} rows a layer",
                self.write, log=False,
            ),
        ]  # fmt: skip


def _series(
    title: str, axis: str, values: tuple[int, ...], unit: str, point: Callable[[int], dict[str, float]], *, log: bool
) -> Series:
    points = []
    for value in values:
        began = time.perf_counter()
        points.append(point(value))
        found = ", ".join(f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in points[-1].items())
        click.echo(f"{axis} {value}: {found} ({time.perf_counter() - began:.0f} s)")
    seconds = {name: tuple(p[name] for p in points) for name in points[0]}
    return Series(title=title, axis=axis, x=values, seconds=seconds, unit=unit, log=log)


def draw(series: list[Series], about: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8))
    for axes, one in zip(grid.flat, series, strict=True):
        for name, style in STYLES.items():
            if name in one.seconds:
                axes.plot(one.x, [1e3 * seconds for seconds in one.seconds[name]], style, label=name, markersize=5)
        _scale(axes, one)
        axes.set_xticks(one.x, [f"{x:,}" for x in one.x])
        axes.set_xlabel(one.axis)
        axes.set_ylabel(one.unit)
        axes.set_title(one.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    figure.suptitle(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _scale(axes: Any, one: Series) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not one.log:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    # Less than a decade can lie between the ends, so powers of ten alone would leave the axis without numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--quick", is_flag=True, help="small sizes: does it all still run?")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for picture and JSON [default: bench and bench/results].")
def command(rounds: int, threads: int, device: str, quick: bool, out: Path | None) -> None:
    """Cost of a step against F, d and settings, and of writing against layers, measured, as a plot."""
    if quick and out is None:
        raise click.UsageError("small sizes are not to replace what is measured: name a folder with --out")
    torch.set_num_threads(threads)
    growth = Growth(sizes=QUICK if quick else Sizes(), rounds=rounds, threads=threads, device=device)
    machine, busy = report.machine(), report.busy_share()
    try:
        series = growth.all()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    picture = out / PICTURE.name if out else PICTURE
    about = f"{machine.gpu or machine.cpu}, {threads} threads, torch {machine.torch}: medians of {rounds} interleaved rounds"
    draw(series, about, picture)
    content = {
        "kind": "growth", "date": report.today(), "machine": asdict(machine), "settings": asdict(growth), "busy": busy,
        "series": [asdict(one) for one in series],
    }  # fmt: skip
    path = (out or report.RESULTS) / f"growth-{machine.slug}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    click.echo(f"{picture}\n{path}")
