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

from bench import limits, ours, report
from bench.peers import ROOT
from train.kernels import Workspace

SCRATCH = ROOT / "build" / "bench" / "growth"
PICTURE = Path(__file__).resolve().with_name("growth.png")
DENSE, SPARSE, LIMIT = "dense step", "sparse step, L0 ≤ 150", "five products (limit)"
WRITE, RAW = "harvest write, fsync and checksums", "raw write of the same files (limit)"
STYLES = {DENSE: "o-", SPARSE: "s-", LIMIT: "k--", WRITE: "o-", RAW: "k--"}


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
class Sizes:
    tokens: int
    d: int
    features: int
    rounds: int
    threads: int
    device: str


def step_point(sizes: Sizes, *, d: int, features: int, settings: int = 1) -> dict[str, float]:
    """Median seconds of the dense and sparse step of `settings` SAEs, and of their products, at one size."""
    device = torch.device(sizes.device)
    workspace = Workspace(sizes.tokens, d, features, "bf16", device)
    five = limits.five_products(tokens=sizes.tokens, d=d, features=features, device=sizes.device, rounds=0)
    runs: dict[str, report.Run] = {LIMIT: lambda: sum(five.run() for _ in range(settings))}
    for name, sparse in ((DENSE, False), (SPARSE, True)):
        saes = [ours.training_sae(d=d, features=features, device=device, sparse=sparse, seed=seed) for seed in range(settings)]
        for sae in saes if sparse else []:
            ours.set_l0(sae, ours.target_l0(features))
        runs[name] = ours.Steps(saes=saes, workspace=workspace, tokens=sizes.tokens).run
    return _medians(runs, sizes.rounds)


def write_point(sizes: Sizes, *, layers: int, rows: int) -> dict[str, float]:
    """Median seconds of a durable write of `rows` rows in each of `layers` layers."""
    spec = ours.cache_spec(d=sizes.d, n_layers=layers, rows=rows)
    writes = ours.Writes(folder=SCRATCH / "cache", spec=spec, threads=sizes.threads)
    return _medians({RAW: writes.best_raw, WRITE: writes.run}, sizes.rounds)


def _medians(runs: Mapping[str, report.Run], rounds: int) -> dict[str, float]:
    timings = report.Rounds(runs).measure(rounds)
    gc.collect()
    return {name: timing.median if timing.seconds else float("nan") for name, timing in timings.items()}


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


def _numbers(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 4096,8192") from None


@click.command()
@click.option("--features", "all_features", default="4096,8192,16384,32768,65536", callback=_numbers, show_default=True)
@click.option("--widths", default="256,512,1024", callback=_numbers, show_default=True, help="values of d")
@click.option("--settings", default="1,2,3", callback=_numbers, show_default=True, help="SAEs on one stream")
@click.option("--layers", default="1,6,12,24", callback=_numbers, show_default=True, help="layers written together")
@click.option("--d", default=512, show_default=True, help="d where it does not vary")
@click.option("--at", default=16_384, show_default=True, help="F where it does not vary")
@click.option("--tokens", default=2048, show_default=True, help="tokens a step")
@click.option("--rows", default=16_384, show_default=True, help="rows written in each layer")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), default=PICTURE, help="Where the plot goes.")
@click.option("--results", type=click.Path(path_type=Path), default=report.RESULTS, help="Folder for the JSON.")
def command(
    all_features: tuple[int, ...],
    widths: tuple[int, ...],
    settings: tuple[int, ...],
    layers: tuple[int, ...],
    d: int,
    at: int,
    tokens: int,
    rows: int,
    rounds: int,
    threads: int,
    device: str,
    picture: Path,
    results: Path,
) -> None:
    """Cost of a step against F, d and settings, and of writing against layers, measured, as a plot."""
    torch.set_num_threads(threads)
    sizes = Sizes(tokens=tokens, d=d, features=at, rounds=rounds, threads=threads, device=device)
    machine = report.machine()
    step = f"ms a step of {tokens:,} tokens"
    try:
        series = [
            _series(
                f"one step against F (d = {d})", "features F", all_features, step,
                lambda f: step_point(sizes, d=d, features=f), log=True,
            ),
            _series(
                f"one step against d (F = {at:,})", "d", widths, step,
                lambda width: step_point(sizes, d=width, features=at), log=True,
            ),
            _series(
                f"settings on one stream (d = {d}, F = {at:,})", "settings", settings, f"{step}, all settings",
                lambda n: step_point(sizes, d=d, features=at, settings=n), log=False,
            ),
            _series(
                f"durable write against layers (d = {d})", "layers", layers, f"ms for {rows:,} rows a layer",
                lambda n: write_point(sizes, layers=n, rows=rows), log=False,
            ),
        ]  # fmt: skip
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    busy = report.busy_share()
    about = f"{machine.gpu or machine.cpu}, {threads} threads, torch {machine.torch}: medians of {rounds} interleaved rounds"
    draw(series, about, picture)
    _write(series, machine, sizes, busy, results)
    click.echo(f"{picture}")


def _write(series: list[Series], machine: report.Machine, sizes: Sizes, busy: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "kind": "growth",
        "date": report.today(),
        "machine": asdict(machine),
        "settings": asdict(sizes),
        "busy_after": busy,
        "series": [asdict(one) for one in series],
    }
    path = folder / f"growth-{machine.slug}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    click.echo(f"{path}")
