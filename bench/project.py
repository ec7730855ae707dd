"""From measured parts to the whole job: hours for every layer at three settings, and which part binds.

    python -m bench project        # after `python -m bench`, and `python -m bench gpu` where there was a GPU

Nothing is measured here. The parts come from results/<machine>.json and from the GPU results of the latest date. A training
run begins dense and turns sparse as L0 falls, so its hours are given between two bounds: no step sparse, every step sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click

from bench import report, table
from shared.errors import UserError
from shared.units import parse_count

PUBLISHED_MINUTES, PUBLISHED_TOKENS = 35.0, 300_000_000  # per layer and setting on an H100, the published practice
FORWARD, WRITE, READ = "harvest forward", "harvest write", "read"
DENSE, SPARSE = "training, every step dense (upper bound)", "training, every step sparse (lower bound)"
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
    """Measured rates of one machine, and from them hours. `overlap`: forward and write, read and training, hide behind one
    another."""

    machine: str
    date: str
    forward: float  # tokens a second through the language model
    write: float  # bytes a second
    read: float
    dense: float  # tokens a second of one SAE's training
    sparse: float
    overlap: bool
    gpu_memory: float | None = None

    def hours(self, job: Job) -> dict[str, float]:
        work = (
            (FORWARD, job.tokens / self.forward), (WRITE, job.bytes / self.write), (READ, job.bytes / self.read),
            (DENSE, job.tokens * job.saes / self.dense), (SPARSE, job.tokens * job.saes / self.sparse),
        )  # fmt: skip
        return {name: seconds / 3600 for name, seconds in work}

    def total(self, job: Job, training: str) -> float:
        found = self.hours(job)
        if self.overlap:
            return max(found[FORWARD], found[WRITE]) + max(found[READ], found[training])
        return found[FORWARD] + found[WRITE] + found[READ] + found[training]

    def binds(self, job: Job, training: str) -> str:
        found = self.hours(job)
        return max((FORWARD, WRITE, READ, training), key=found.__getitem__)


def from_results(results: report.Results) -> Parts:
    """Parts of `python -m bench`. Raises UserError if one of them was not measured, or not at the job's shape."""
    shape = {name: results.settings[name] for name in ("d", "features")}
    if shape != {"d": D, "features": FEATURES}:
        raise UserError(f"the results are of another shape, {shape}: run `python -m bench` again")
    wanted = {"forward": "forward", "write": "writing", "read": "reading", "dense": "settings", "sparse": "settings"}
    found = {}
    for part, path in wanted.items():
        key = part if path == "settings" else ""
        comparison = results.path(path)
        entry = comparison.find("ours", key) if comparison is not None else None
        if entry is None or entry.rate is None:
            raise UserError(f"the results lack {f'{path} {key}'.strip()}: run `python -m bench` again, whole")
        found[part] = entry.rate
    about = results.machine
    return Parts(machine=about.gpu or about.cpu, date=results.date, overlap=about.gpu is not None, **found)


def from_figures(figures: Mapping[str, float], *, machine: str, date: str) -> Parts:
    """Parts of `python -m bench gpu`. Raises UserError naming the figures that are missing."""
    if missing := [name for name in FIGURES if name not in figures]:
        raise UserError(f"the GPU results lack {', '.join(missing)}: run `python -m bench gpu` again")
    rates = {name.split()[0]: figures[name] for name in FIGURES}
    return Parts(machine=machine, date=date, overlap=True, gpu_memory=figures.get("peak GPU bytes"), **rates)


def shown(parts: Parts, job: Job) -> str:
    """Hours per part, the whole, what binds, and beside it the published practice."""
    one = parts.hours(replace(job, layers=1))
    dense, sparse = parts.total(job, DENSE), parts.total(job, SPARSE)
    published = PUBLISHED_MINUTES / 60 * job.saes * job.tokens / PUBLISHED_TOKENS
    rows = [
        *parts.hours(job).items(),
        ("whole job, every step dense (upper bound)", dense),
        ("whole job, every step sparse (lower bound)", sparse),
        (f"published practice, H100, {PUBLISHED_MINUTES:g} min x {job.saes}", published),
    ]
    lines = [
        f"{parts.machine} ({parts.date}): {job.tokens / 1e6:g}M tokens x {job.layers} layers x {job.settings} settings",
        *(f"  {name:<44} {_time(value):>12}" for name, value in rows),
        f"  of the published practice's time: {dense / published:.2f} x every step dense, {sparse / published:.2f} x sparse",
        f"  binding: {parts.binds(job, DENSE)}; {parts.binds(job, SPARSE)}",
        f"  one layer, {job.settings} settings: training {_time(one[SPARSE])} (sparse) to {_time(one[DENSE])} (dense)",
    ]
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
        f"F = 32 x d = {FEATURES:,}; a real run begins dense and turns sparse as L0 falls, so it lies between the bounds",
        "the published practice runs the language model again for every SAE, so it is compared with the whole job",
        "tokenising, snapshots and evaluation are left out",
    ]
    return [f"  assumed: {line}" for line in said]


def _time(value: float) -> str:
    if value < 1:
        return f"{value * 60:.1f} min"
    return f"{value:,.1f} h" if value < 48 else f"{value / 24:,.1f} days"


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=report.RESULTS, help="Folder of measured results.")
@click.option("--tokens", default="300M", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True)
@click.option("--settings", type=click.IntRange(1), default=SETTINGS, show_default=True)
def command(results: Path, tokens: str, layers: int, settings: int) -> None:
    """What the measured parts come to for the whole job."""
    job = Job(tokens=parse_count(tokens), layers=layers, settings=settings)
    machines, gpus = table.found(results)
    here = [one for one in machines if one.machine.slug == report.machine().slug]
    if not here and not gpus:
        raise UserError(f"nothing is measured in {results}: run `python -m bench` first, or `python -m bench gpu`")
    click.echo(shown(from_results(here[-1]), job) if here else "this machine is not measured: run `python -m bench`")
    if gpus:
        parts = from_figures(gpus[-1]["figures"], machine=gpus[-1]["machine"]["gpu"], date=gpus[-1]["date"])
        click.echo("\n" + shown(parts, job))
    else:
        click.echo("no GPU is measured: run `python -m bench gpu` on one")
