"""`make crash`, or `python -m tests.crash`: every fault at every file operation of every scenario; exit code 1 if one loses.

With --scenario, --fault and --at, one of them or some; --every 7 takes each seventh.
"""

import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from residual_saes.shared.progress import Progress
from tests.crash.sweep import FAULTS, SCENARIOS, Outcome, Sweep, Trial


@click.command()
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice(SCENARIOS), help="[default: all]")
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), help="[default: all]")
@click.option("--at", multiple=True, type=click.IntRange(1), help="Operations, counted from 1 [default: all].")
@click.option("--every", type=click.IntRange(1), default=1, help="Take each n-th of these.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Commands that run beside each other.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="A new folder to work in, which is kept [default: a temporary one]."
)
def main(
    scenarios: tuple[str, ...], faults: tuple[str, ...], at: tuple[int, ...], every: int, jobs: int, keep: Path | None
) -> None:
    """Disturb every command at every file operation, run it again, and count what is lost."""
    with tempfile.TemporaryDirectory() as folder:
        where = keep or Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        with Sweep(folder=where, jobs=jobs) as sweep, ThreadPoolExecutor(jobs) as pool:
            names, outcomes = scenarios or SCENARIOS, []
            trials = [
                Trial(scenario=name, fault=fault, at=n)
                for name in names
                for fault in faults or FAULTS
                for n in sweep.scenario(name).points(fault)
                if not at or n in at
            ][::every]
            trials.sort(key=lambda trial: zlib.crc32(str(trial).encode()))  # mixed, so that rate and time left hold
            with Progress("disturbing", len(trials), "operations") as progress:
                for outcome in pool.map(sweep.attempt, trials):
                    outcomes.append(outcome)
                    if outcome.lost:
                        click.echo(f"\nlost: {outcome.trial}: {outcome.operation}: {outcome.lost}", err=True)
                    progress.advance(1, f"{outcome.trial.scenario}, lost {sum(bool(o.lost) for o in outcomes)}")
            operations = {name: len(sweep.scenario(name).log) for name in names}
    outcomes.sort(key=lambda o: (names.index(o.trial.scenario), FAULTS.index(o.trial.fault), o.trial.at))
    click.echo(table(operations, outcomes))
    sys.exit(1 if any(o.lost for o in outcomes) else 0)


def table(operations: dict[str, int], outcomes: list[Outcome]) -> str:
    """What was tried and lost, scenario by scenario; every loss with what does it again; the rest of what was met."""
    heads = ("scenario", "operations", "tried", "lost", "leaves files", "traceback")
    counts = []
    for name, count in operations.items():
        mine = [o for o in outcomes if o.trial.scenario == name]
        counts.append([count, len(mine), *(sum(map(bool, column)) for column in _columns(mine))])
    counts.append([sum(column) for column in zip(*counts, strict=True)])
    rows = [[name, *map(str, row)] for name, row in zip([*operations, "all"], counts, strict=True)]
    lines = ["  ".join(f"{cell:>12}" for cell in row) for row in (heads, *rows)]
    for title, reasons in zip(("lost", "leaves files", "traceback"), _columns(outcomes), strict=True):
        met = [(o, reason) for o, reason in zip(outcomes, reasons, strict=True) if reason]
        shown = met if title == "lost" else _one_of_each(met)
        lines += [f"\n{title}:"] * bool(met) + [
            f"  python -m tests.crash {o.trial}\n    {o.operation}\n    {r}" for o, r in shown
        ]
    return "\n".join(lines)


def _columns(outcomes: list[Outcome]) -> tuple[list[str], list[str], list[str]]:
    return [o.lost for o in outcomes], [", ".join(o.left) for o in outcomes], [o.traceback for o in outcomes]


def _one_of_each(met: list[tuple[Outcome, str]]) -> list[tuple[Outcome, str]]:
    """The first of every scenario and fault: these are many, and alike."""
    first: dict[tuple[str, str], tuple[Outcome, str]] = {}
    for outcome, reason in met:
        first.setdefault((outcome.trial.scenario, outcome.trial.fault), (outcome, reason))
    return list(first.values())


if __name__ == "__main__":
    main()
