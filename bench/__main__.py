"""Every hot path of ours beside its limit and its peers, in one run, taking turns.

    python -m bench                # measure; results go to the terminal and to build/bench/results
    python -m bench --publish      # the same, and they take their place in bench/results and docs/findings
    python -m bench --quick        # small sizes, one round: does it all still run?
    python -m bench gpu            # the same and more on one NVIDIA GPU, in one call of about five minutes
    python -m bench gpu --dry      # the same as that at small sizes on a CPU
    python -m bench project        # what the measured parts come to at 300M tokens x 24 layers x 3 settings
    python -m bench quality        # FVU at equal L0, beside other libraries that are trained on the same batches
    python -m bench tables         # the tables in docs/findings and fleet/rates.json again from the results

What fails is shown with the reason, a peer or a comparison, and the rest goes on. bench/setup.py has the sizes, bench/goals.py
what is to be reached; whether the kernels are right on a GPU is for `pytest -m gpu`. bench/wheels.txt is for a GPU's machine
without a package index.
"""

import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click
import torch

from bench import caches, lm, project, quality, report, steps, table
from bench.harness import Comparison, Entry, free, reason
from bench.setup import GPU, MEMORY, SCRATCH, Measure, Setup, cpu, small
from residual_saes.shared.cli import DefaultRun, options, run
from residual_saes.shared.device import pick_device
from residual_saes.shared.errors import UserError

COMPARISONS: dict[str, Measure] = {
    "forward": lm.forward,  # first: in a process as transformers' users have it, and not yet as our commands set theirs up
    "training": steps.training,
    "settings": steps.settings,
    "kinds": steps.kinds,
    "crosscoder": steps.crosscoder,
    "stream": caches.stream,
    "harvest": lm.harvest,
    "writing": caches.writing,
    "reading": caches.reading,
}


@click.group(cls=DefaultRun)
def main() -> None:
    """How fast the hot paths are, beside the machine's own limits and beside other tools."""


main.add_command(project.command, "project")
main.add_command(quality.command, "quality")

_measuring = options(
    click.option("--only", type=click.Choice(sorted(COMPARISONS)), multiple=True, help="These comparisons alone."),
    click.option("--publish", is_flag=True, help="Put the results into bench/results, and write docs/findings from them."),
    click.option("--out", type=click.Path(path_type=Path), help="Folder for results [default: $OUT, or build/bench/results]."),
    click.option("--scratch", type=click.Path(path_type=Path), default=SCRATCH, help="Folder on the disk to be measured."),
)


@main.command("run")
@_measuring
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of each, after one warm-up.")
@click.option("--quick", is_flag=True, help="Small sizes, one round.")
def run_command(
    only: tuple[str, ...], publish: bool, out: Path | None, scratch: Path, threads: int, device: str, rounds: int, quick: bool
) -> int:  # fmt: skip
    """Measure our hot paths beside their limits and peers (the default command)."""
    setup = replace(GPU, gpu=False) if device.startswith("cuda") else cpu()
    setup = replace(setup, threads=threads, name=device, rounds=rounds)
    return _measure(small(setup) if quick else setup, only, publish and not quick, out, scratch)


@main.command("gpu")
@_measuring
@click.option("--threads", default=16, show_default=True, help="Reader and writer threads.")
@click.option("--minutes", type=float, help="No comparison is begun after so many [default: 5, and with --dry any].")
@click.option("--dry", is_flag=True, help="Small sizes on the CPU: does all of it run to its end?")
def gpu_command(
    only: tuple[str, ...], publish: bool, out: Path | None, scratch: Path, threads: int, minutes: float | None, dry: bool
) -> int:
    """Measure every hot path on one NVIDIA GPU, in one call."""
    if not dry and not torch.cuda.is_available():
        raise UserError(
            "python -m bench gpu needs an NVIDIA GPU, and there is none here; --dry runs it at small sizes on a CPU"
        )
    setup = replace(small(GPU), name="cpu") if dry else GPU
    minutes = (math.inf if dry else 5.0) if minutes is None else minutes  # a dry run is to reach its end on a busy machine, too
    return _measure(replace(setup, threads=threads), only, publish and not dry, out, scratch, time.monotonic() + 60 * minutes)


def _measure(setup: Setup, only: Sequence[str], publish: bool, out: Path | None, scratch: Path, until: float = math.inf) -> int:
    """The comparisons, one after the other; whatever becomes of the next, what there is has been written."""
    if setup.name == "cpu":
        torch.set_num_threads(setup.threads)
    busy, comparisons = report.busy_share(), list[Comparison]()
    if busy > 0.1:
        click.echo(f"other work holds {busy:.0%} of the processors: the figures will be too low", err=True)
    with ExitStack() as stack:
        places = {"disk": scratch} | ({"memory": MEMORY if MEMORY.is_dir() else scratch} if setup.gpu else {})
        scratch.mkdir(parents=True, exist_ok=True)
        folders = [(name, Path(stack.enter_context(tempfile.TemporaryDirectory(dir=at)))) for name, at in places.items()]
        setup = replace(setup, folders=tuple(folders))
        for name in only or COMPARISONS:
            if name != "forward":
                pick_device(setup.name)  # which also sets up the process, as in every command of the product
            comparisons.append(_compared(name, setup, until))
            machine, known = report.machine(), tuple(comparisons)
            results = report.Results(machine=machine, settings=setup.figures(), comparisons=known, busy=busy)
            path = report.write(results, out or Path(os.environ.get("OUT", report.UNPUBLISHED)), whole=setup.whole and not only)
    whole = setup.whole and not only and all(comparison.measured for comparison in comparisons)
    click.echo(f"\n{table.details(results)}\n\n{path}")
    if not setup.whole:
        click.echo("This shows that everything runs. At these sizes no figure and no goal means anything.")
    if publish and whole:
        shutil.copy(path, report.RESULTS)
        table.publish()
    elif publish:
        raise UserError("these results are not whole and take no other's place: see above what is missing, and run it again")
    return 0 if all(comparison.measured for comparison in comparisons) else 1


def _compared(name: str, setup: Setup, until: float) -> Comparison:
    try:
        if time.monotonic() > until:
            raise TimeoutError("the time was over before it was begun")
        return COMPARISONS[name](setup)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        failed = Entry(name="ours", role="ours", failure=reason(error))
        return Comparison(name=name, key=name, unit="", entries=(failed,))
    finally:
        free(setup.name)


@main.command("tables")
def tables_command() -> None:
    """The tables in docs/findings and fleet/rates.json, written again from the results. Nothing is measured."""
    table.publish()


if __name__ == "__main__":
    run(main)
