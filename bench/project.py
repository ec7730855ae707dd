"""From measured parts to the whole job: hours for every layer at three settings, and which part binds.

    python -m bench project        # after `python -m bench`, and `python -m bench gpu` where there was a GPU

Nothing is measured here. The parts come from results/<machine>.json and from the GPU results of the latest date. A training
run begins dense and turns sparse as L0 falls, so its hours are given between two bounds: no step sparse, every step sparse.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from bench import report
from fleet.hours import Rates, Times, Work
from shared.errors import UserError
from shared.units import parse_count

PUBLISHED_MINUTES, PUBLISHED_TOKENS = 35.0, 300_000_000  # per layer and setting on an H100, the published practice
D, FEATURES, SETTINGS = 1024, 32_768, 3
FIGURES = ("forward tokens/s", "write bytes/s", "read bytes/s", "dense SAE tokens/s", "sparse SAE tokens/s")
COMMON = {"forward": "harvest forward", "write": "harvest write", "read": "read"}  # parts of `Times`, and what they are called
TRAINING = {"dense": "training, every step dense (upper bound)", "sparse": "training, every step sparse (lower bound)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    tokens: int = 300_000_000
    layers: int = 24
    settings: int = SETTINGS
    d: int = D

    @property
    def work(self) -> Work:
        """All layers in one window."""
        size = self.tokens * self.layers * self.d * 2
        return Work(forward=self.tokens, bytes=size, training=self.tokens * self.layers * self.settings)


def from_results(results: report.Results) -> Rates:
    """Rates of `python -m bench`. Raises UserError if one of them was not measured, or not at the job's shape."""
    shape = {name: results.settings[name] for name in ("d", "features")}
    if shape != {"d": D, "features": FEATURES}:
        raise UserError(f"the results are of another shape, {shape}: run `python -m bench` again")
    paths = {"forward": "forward", "write": "writing", "read": "reading", "dense": "settings", "sparse": "settings"}
    rates = {}
    for part, path in paths.items():
        key = part if path == "settings" else ""
        comparison = results.path(path)
        entry = comparison.find("ours", key) if comparison is not None else None
        if entry is None or entry.rate is None:
            raise UserError(f"the results lack {f'{path} {key}'.strip()}: run `python -m bench` again, whole")
        rates[part] = entry.rate
    about = results.machine
    return Rates(
        machine=about.gpu or about.cpu, cores=about.cores, date=results.date, overlap=about.gpu is not None, d_model=D,
        features=FEATURES, **rates,
    )  # fmt: skip


def from_figures(figures: Mapping[str, float], *, machine: str, date: str) -> Rates:
    """Rates of `python -m bench gpu`. Raises UserError naming the figures that are missing."""
    if missing := [name for name in FIGURES if name not in figures]:
        raise UserError(f"the GPU results lack {', '.join(missing)}: run `python -m bench gpu` again")
    rates = {name.split()[0]: figures[name] for name in FIGURES}
    return Rates(machine=machine, cores=None, date=date, overlap=True, d_model=D, features=FEATURES, **rates)


def from_gpu(results: Mapping[str, Any]) -> Rates:
    """Rates of a file that `python -m bench gpu` wrote. Raises UserError naming the figures that are missing."""
    return from_figures(results["figures"], machine=results["machine"]["gpu"], date=results["date"])


def shown(rates: Rates, job: Job, gpu_memory: float | None = None) -> str:
    """Hours per part, the whole, what binds, and beside it the published practice."""
    times, one = rates.times(job.work), rates.times(replace(job, layers=1).work)
    dense, sparse = times.harvest + times.train_dense, times.harvest + times.train_sparse
    saes = job.layers * job.settings
    published = 60 * PUBLISHED_MINUTES * saes * job.tokens / PUBLISHED_TOKENS
    rows = [
        *((name, getattr(times, part)) for part, name in (COMMON | TRAINING).items()),
        ("whole job, every step dense (upper bound)", dense),
        ("whole job, every step sparse (lower bound)", sparse),
        (f"published practice, H100, {PUBLISHED_MINUTES:g} min x {saes}", published),
    ]
    lines = [
        f"{rates.machine} ({rates.date}): {job.tokens / 1e6:g}M tokens x {job.layers} layers x {job.settings} settings",
        *(f"  {name:<44} {_time(seconds):>12}" for name, seconds in rows),
        f"  of the published practice's time: {dense / published:.2f} x every step dense, {sparse / published:.2f} x sparse",
        f"  binding: {binding(times, 'dense')}; {binding(times, 'sparse')}",
        f"  one layer, {job.settings} settings: training {_time(one.sparse)} (sparse) to {_time(one.dense)} (dense)",
    ]
    if gpu_memory is not None:
        lines += [f"  GPU memory at its peak: {gpu_memory / 1e9:.1f} GB"]
    return "\n".join([*lines, *_assumptions(rates, job)])


def binding(times: Times, steps: str) -> str:
    """The part that takes longest, if all steps are "dense" or "sparse"."""
    parts = COMMON | {steps: TRAINING[steps]}
    return parts[max(parts, key=lambda part: getattr(times, part))]


def _assumptions(rates: Rates, job: Job) -> list[str]:
    together = (
        "forward and write run at the same time, so do read and training: the slower of each pair counts"
        if rates.overlap
        else "the parts share the same cores, so their times are added up"
    )
    size = job.work.bytes / 1e12
    lines = [
        f"rates stay as measured over the whole job; {size:.1f} TB of activations go to disk and come back once",
        together,
        f"F = 32 x d = {FEATURES:,}; a real run begins dense and turns sparse as L0 falls, so it lies between the bounds",
        "the published practice runs the language model again for every SAE, so it is compared with the whole job",
        "tokenising, snapshots and evaluation are left out",
    ]
    return [f"  assumed: {line}" for line in lines]


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=report.RESULTS, help="Folder of measured results.")
@click.option("--tokens", default="300M", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True)
@click.option("--settings", type=click.IntRange(1), default=SETTINGS, show_default=True)
def command(results: Path, tokens: str, layers: int, settings: int) -> None:
    """What the measured parts come to for the whole job."""
    job = Job(tokens=parse_count(tokens), layers=layers, settings=settings)
    machines, gpus = report.read(results)
    here = [one for one in machines if one.machine.slug == report.machine().slug]
    if not here and not gpus:
        raise UserError(f"nothing is measured in {results}: run `python -m bench` first, or `python -m bench gpu`")
    click.echo(shown(from_results(here[-1]), job) if here else "this machine is not measured: run `python -m bench`")
    if gpus:
        click.echo("\n" + shown(from_gpu(gpus[-1]), job, gpus[-1]["figures"].get("peak GPU bytes")))
    else:
        click.echo("no GPU is measured: run `python -m bench gpu` on one")


def write_rates(machines: Sequence[report.Results], gpus: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The file from which an installed package knows hours: every machine's rates, and those of the latest GPU."""
    rates: list[Rates] = []
    for read in (*(partial(from_results, one) for one in machines), *(partial(from_gpu, one) for one in gpus[-1:])):
        with contextlib.suppress(UserError):  # a part that was not measured
            rates.append(read())
    rounded = [{k: round(v) if isinstance(v, float) else v for k, v in asdict(one).items()} for one in rates]
    about = "written by `python -m bench tables` from bench/results: rates of `python -m bench` and `python -m bench gpu`"
    path.write_text(json.dumps({"about": about, "rates": rounded}, indent=1) + "\n")
