"""From measured parts to the whole job: hours for every layer at three settings, and which part binds.

    python -m bench project        # after `python -m bench`, and `python -m bench gpu` where there was a GPU

Nothing is measured here. The parts come from results/<machine>.json and, of machines without results there, from
fleet/rates.json. A training run begins dense and turns sparse as L0 falls, so its hours are given between two bounds: no step
sparse, every step sparse.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from bench import report
from residual_saes.fleet.hours import RATES, Rates, Times, Work, for_this_machine, stored
from residual_saes.shared.errors import UserError
from residual_saes.shared.units import parse_count

PUBLISHED_MINUTES, PUBLISHED_TOKENS = 35.0, 300_000_000  # per layer and setting on an H100, the published practice
D, FEATURES, SETTINGS = 1024, 32_768, 3
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


def all_rates(folder: Path, known: Path = RATES) -> list[Rates]:
    """Of every processor with results in the folder and of its latest GPU, and what `known` has of machines without results
    there. Raises UserError as `from_results` does."""
    machines = report.read(folder)
    gpus = [one for one in machines if one.machine.gpu is not None]
    rates = [from_results(one) for one in (*(one for one in machines if one.machine.gpu is None), *gpus[-1:])]
    measured = {one.machine for one in rates}
    return rates + [one for one in stored(known) if one.machine not in measured and not (gpus and one.cores is None)]


def from_results(results: report.Results) -> Rates:
    """Raises UserError if a part was not measured, or not at the job's shape."""
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
    machine, gpu = results.machine, results.machine.gpu
    return Rates(
        machine=gpu or machine.cpu, cores=None if gpu else machine.cores, date=results.date, d_model=D, features=FEATURES,
        overlap=gpu is not None, **rates,  # a GPU computes while the processors move bytes
    )  # fmt: skip


def shown(rates: Rates, job: Job) -> str:
    """Hours per part, the whole, what binds, and beside it the published practice."""
    times, one = rates.times(job.work), rates.times(replace(job, layers=1).work)
    dense, sparse = times.harvest + times.train_dense, times.harvest + times.train_sparse
    saes, size = job.layers * job.settings, job.work.bytes / 1e12
    published = 60 * PUBLISHED_MINUTES * saes * job.tokens / PUBLISHED_TOKENS
    rows = [
        *((name, getattr(times, part)) for part, name in (COMMON | TRAINING).items()),
        ("whole job, every step dense (upper bound)", dense),
        ("whole job, every step sparse (lower bound)", sparse),
        (f"published practice, H100, {PUBLISHED_MINUTES:g} min x {saes}", published),
    ]
    together = (
        "forward and write run at the same time, so do read and training: the slower of each pair counts"
        if rates.overlap
        else "the parts share the same cores, so their times are added up"
    )
    assumed = [
        f"rates stay as measured over the whole job; {size:.1f} TB of activations go to disk and come back once",
        together,
        f"F = 32 x d = {FEATURES:,}; a real run begins dense and turns sparse as L0 falls, so it lies between the bounds",
        "the published practice runs the language model again for every SAE, so it is compared with the whole job",
        "tokenising, snapshots and evaluation are left out",
    ]
    lines = [
        f"{rates.machine} ({rates.date}): {job.tokens / 1e6:g}M tokens x {job.layers} layers x {job.settings} settings",
        *(f"  {name:<44} {_time(seconds):>12}" for name, seconds in rows),
        f"  of the published practice's time: {dense / published:.2f} x every step dense, {sparse / published:.2f} x sparse",
        f"  binding: {binding(times, 'dense')}; {binding(times, 'sparse')}",
        f"  one layer, {job.settings} settings: training {_time(one.sparse)} (sparse) to {_time(one.dense)} (dense)",
        *(f"  assumed: {line}" for line in assumed),
    ]
    return "\n".join(lines)


def binding(times: Times, steps: str) -> str:
    """The part that takes longest, if all steps are "dense" or "sparse"."""
    parts = COMMON | {steps: TRAINING[steps]}
    return parts[max(parts, key=lambda part: getattr(times, part))]


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
    """What the measured parts come to for the whole job, on this machine and on a GPU."""
    job = Job(tokens=parse_count(tokens), layers=layers, settings=settings)
    rates = for_this_machine(all_rates(results))
    if all(one.cores is None for one in rates):
        click.echo("this machine is not measured: run `python -m bench`\n")
    click.echo("\n\n".join(shown(one, job) for one in rates))


def write_rates(results: Path, path: Path) -> None:
    """The file from which an installed package knows hours."""
    rates = [{k: round(v) if isinstance(v, float) else v for k, v in asdict(one).items()} for one in all_rates(results, path)]
    about = "written by `python -m bench tables` from bench/results: rates of `python -m bench` and `python -m bench gpu`"
    path.write_text(json.dumps({"about": about, "rates": rates}, indent=1) + "\n")
