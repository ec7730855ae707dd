"""From measured parts to the whole job: hours for every layer at three settings, and which part binds.

    python -m bench project        # after `python -m bench`, and `python -m bench gpu` where there was a GPU

Nothing is measured here. The parts come from results/<machine>.json and from the GPU results of the latest date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench import report
from shared.cli import UserError, parse_count

PUBLISHED_MINUTES = 35.0  # per layer and setting on an H100, the published practice
D, FEATURES, SETTINGS = 1024, 32_768, 3
FIGURES = ("forward tokens/s", "write bytes/s", "read bytes/s", "dense SAE tokens/s", "sparse SAE tokens/s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    tokens: int = 300_000_000
    layers: int = 24
    settings: int = SETTINGS
    d: int = D

    @property
    def bytes(self) -> int:
        return self.tokens * self.layers * self.d * 2

    @property
    def saes(self) -> int:
        return self.layers * self.settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Measured rates of one machine. `overlap`: forward and write, read and training, hide behind one another."""

    machine: str
    date: str
    forward: float  # tokens a second through the language model
    write: float  # bytes a second
    read: float
    dense: float  # tokens a second of one SAE's training
    sparse: float
    overlap: bool
    scaled: float = 1.0  # what the measured training rates were multiplied by to stand for d = 1024, F = 32,768
    gpu_memory: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    forward: float
    write: float
    read: float
    dense: float
    sparse: float
    overlap: bool

    @property
    def parts(self) -> dict[str, float]:
        return {
            "harvest forward": self.forward,
            "harvest write": self.write,
            "read": self.read,
            "training, all steps dense": self.dense,
            "training, all steps sparse": self.sparse,
        }

    def total(self, training: float) -> float:
        if self.overlap:
            return max(self.forward, self.write) + max(self.read, training)
        return self.forward + self.write + self.read + training

    def binds(self, training: str) -> str:
        other = {"training, all steps dense", "training, all steps sparse"} - {training}
        parts = {name: hours for name, hours in self.parts.items() if name not in other}
        return max(parts, key=lambda name: parts[name])


def hours(parts: Parts, job: Job) -> Hours:
    steps = job.tokens * job.saes
    return Hours(
        forward=job.tokens / parts.forward / 3600,
        write=job.bytes / parts.write / 3600,
        read=job.bytes / parts.read / 3600,
        dense=steps / parts.dense / 3600,
        sparse=steps / parts.sparse / 3600,
        overlap=parts.overlap,
    )


def from_results(results: report.Results) -> Parts:
    """Parts of `python -m bench`. Raises UserError if one of them was not measured."""
    rates = {comparison.key: comparison.rates("ours") for comparison in results.comparisons}
    shape = results.settings
    scaled = int(str(shape["d"])) * int(str(shape["features"])) / (D * FEATURES)
    try:
        training = rates["training"]
        return Parts(
            machine=results.machine.gpu or results.machine.cpu,
            date=results.date,
            forward=rates["forward"][0],
            write=rates["writing"][0],
            read=rates["reading"][0],
            dense=training[2] * scaled,
            sparse=training[1] * scaled,
            overlap=results.machine.gpu is not None,
            scaled=scaled,
        )
    except (KeyError, IndexError):
        raise UserError("the results lack a part that failed or was left out: run `python -m bench` again, whole") from None


def from_figures(figures: Mapping[str, float], *, machine: str, date: str, scaled: float = 1.0) -> Parts:
    """Parts of `python -m bench gpu`. Raises UserError naming the figures that are missing."""
    if missing := [name for name in FIGURES if name not in figures]:
        raise UserError(f"the GPU results lack {', '.join(missing)}: run `python -m bench gpu` again")
    return Parts(
        machine=machine,
        date=date,
        forward=figures["forward tokens/s"],
        write=figures["write bytes/s"],
        read=figures["read bytes/s"],
        dense=figures["dense SAE tokens/s"] * scaled,
        sparse=figures["sparse SAE tokens/s"] * scaled,
        overlap=True,
        scaled=scaled,
        gpu_memory=figures.get("peak GPU bytes"),
    )


def table(parts: Parts, job: Job) -> str:
    """Hours per part, the whole, what binds, and beside it the published practice."""
    found = hours(parts, job)
    dense, sparse = "training, all steps dense", "training, all steps sparse"
    rows = list(found.parts.items())
    rows += [("whole job, dense", found.total(found.dense)), ("whole job, sparse", found.total(found.sparse))]
    rows += [(f"published practice, {PUBLISHED_MINUTES:g} min x {job.saes}", PUBLISHED_MINUTES * job.saes / 60)]
    lines = [f"{parts.machine} ({parts.date}): {job.tokens / 1e6:g}M tokens x {job.layers} layers x {job.settings} settings"]
    lines += [f"  {name:<40} {_time(value):>12}" for name, value in rows]
    lines += [f"  binding: {found.binds(dense)} with dense steps, {found.binds(sparse)} with sparse ones"]
    layer = Job(tokens=job.tokens, layers=1, settings=job.settings, d=job.d)
    one = hours(parts, layer)
    lines += [f"  one layer, {job.settings} settings: training {_time(one.dense)} dense, {_time(one.sparse)} sparse"]
    if parts.gpu_memory is not None:
        lines += [f"  GPU memory at its peak: {parts.gpu_memory / 1e9:.1f} GB"]
    return "\n".join([*lines, *_assumptions(parts, job)])


def _assumptions(parts: Parts, job: Job) -> list[str]:
    together = (
        "forward and write run at the same time, so do read and training: the slower of each pair counts"
        if parts.overlap
        else "the parts share the same cores, so their times are added up"
    )
    said = [
        f"rates stay as measured over the whole job; {job.bytes / 1e12:.1f} TB of activations go to disk and come back once",
        together,
        f"F = 32 x d = {FEATURES:,}; a real run begins dense and turns sparse as L0 falls, so it lies between the two",
        "tokenising, snapshots and evaluation are left out",
    ]
    if abs(parts.scaled - 1) > 1e-9:
        said.append(f"training was measured at another size and is scaled by d x F ({parts.scaled:.3g})")
    return [f"  assumed: {line}" for line in said]


def _time(value: float) -> str:
    if value < 1:
        return f"{value * 60:.1f} min"
    return f"{value:,.1f} h" if value < 48 else f"{value / 24:,.1f} days"


def latest_gpu(folder: Path) -> dict[str, Any] | None:
    """The GPU results of the latest date, if any."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    gpus = [raw for raw in found if raw.get("kind") == "gpu" and not raw.get("dry")]
    return max(gpus, key=lambda raw: str(raw["date"]), default=None)


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=report.RESULTS, help="Folder of measured results.")
@click.option("--tokens", default="300M", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True)
@click.option("--settings", type=click.IntRange(1), default=SETTINGS, show_default=True)
def command(results: Path, tokens: str, layers: int, settings: int) -> None:
    """What the measured parts come to for the whole job."""
    job = Job(tokens=parse_count(tokens), layers=layers, settings=settings)
    here = results / f"{report.machine().slug}.json"
    gpu = latest_gpu(results) if results.is_dir() else None
    if not here.exists() and gpu is None:
        raise UserError(f"nothing is measured in {results}: run `python -m bench` first, or `python -m bench gpu`")
    if here.exists():
        click.echo(table(from_results(report.read(here)), job))
    else:
        click.echo(f"this machine is not measured: run `python -m bench` for {here.name}")
    if gpu is not None:
        parts = from_figures(gpu["figures"], machine=gpu["machine"]["gpu"], date=gpu["date"], scaled=gpu["scaled"])
        click.echo("\n" + table(parts, job))
    else:
        click.echo("no GPU is measured: run `python -m bench gpu` on one")
