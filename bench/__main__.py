"""Every hot path of ours beside its limit and its peers, in one run, taking turns.

    python -m bench                # measure, write results/<machine>.json, refresh the README's table
    python -m bench --quick        # small sizes, one round: does it all still run?
    python -m bench growth         # cost against F, d, settings and layers, as a plot
    python -m bench project        # what the measured parts come to at 300M tokens x 24 layers x 3 settings
    python -m bench gpu            # the GPU path: checked, timed and projected in one call of under 10 minutes

Peers that fail are shown with the reason. `bench/ours.py` holds our own paths, a function per comparison.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec

import click
import torch

from bench import gpu, growth, limits, project, report
from bench.peers import ROOT, STEPS, WRITERS, Load, Peer, PeerFailed, Worker
from shared.cli import DefaultRun, run

README = ROOT / "README.md"
SCRATCH = ROOT / "build" / "bench" / "scratch"


@dataclass(frozen=True, kw_only=True)
class Config:
    d: int
    features: int
    tokens: int
    threads: int
    device: str
    rounds: int
    write_tokens: int
    forward_tokens: int
    torch_index: str | None

    def load(self, *, tokens: int) -> Load:
        return Load(
            d=self.d,
            features=self.features,
            tokens=tokens,
            threads=self.threads,
            device=self.device,
            directory=SCRATCH,
        )


def training(config: Config) -> report.Comparison:
    five = limits.five_products(tokens=config.tokens, d=config.d, features=config.features, device=config.device)
    layouts = ", ".join(f"{each.name} {each.layout}" for each in five.products)
    limit = report.Contender(
        name="five products", role="limit", work=config.tokens, run=five.run, note=f"best layouts: {layouts}"
    )
    load = config.load(tokens=config.tokens)
    with ExitStack() as stack:
        peers, absent = _peers(stack, STEPS, load, config, work=load.tokens)
        return report.compare(
            key="training",
            name=f"SAE step, d={config.d}, F={config.features}, {config.tokens} tokens",
            unit="tokens",
            contenders=[*_ours("step", load), limit, *peers],
            absent=absent,
            rounds=config.rounds,
            say=click.echo,
        )


def writing(config: Config) -> report.Comparison:
    load = config.load(tokens=config.write_tokens)
    payload = load.tokens * load.d * 2
    with ExitStack() as stack:
        peers, absent = _peers(stack, WRITERS, load, config, work=payload)
        return report.compare(
            key="writing",
            name=f"cache write, {payload / 1e6:.0f} MB of fp16, durable",
            unit="bytes",
            contenders=[*_ours("write", load), *peers],
            absent=absent,
            rounds=config.rounds,
            say=click.echo,
        )


def reading(config: Config) -> report.Comparison:
    load = config.load(tokens=config.write_tokens)
    return report.compare(
        key="reading",
        name=f"cache read, {load.tokens * load.d * 2 / 1e6:.0f} MB, cold page cache",
        unit="bytes",
        contenders=_ours("read", load),
        rounds=config.rounds,
        say=click.echo,
    )


def forward(config: Config) -> report.Comparison:
    """The language model: as the harvest runs it, and as plain transformers does."""
    load = config.load(tokens=config.forward_tokens)
    return report.compare(
        key="forward",
        name=f"harvest forward, {load.tokens} tokens",
        unit="tokens",
        contenders=_ours("forward", load),
        rounds=config.rounds,
        say=click.echo,
    )


def copying(config: Config) -> report.Comparison:
    """Limits alone: what moving bytes costs here, for whoever reads the other lines."""
    contenders = [
        report.Contender(name=name, role="limit", work=copy.bytes, run=copy.run)
        for name, copy in limits.copies(device=config.device).items()
    ]
    return report.compare(
        key="copying", name="1 GiB copied", unit="bytes", contenders=contenders, rounds=config.rounds, say=click.echo
    )


COMPARISONS: dict[str, Callable[[Config], report.Comparison]] = {
    "training": training,
    "writing": writing,
    "reading": reading,
    "forward": forward,
    "copying": copying,
}


def _ours(path: str, load: Load) -> list[report.Contender]:
    """Our contenders for one path, from `bench.ours`, where it has them."""
    if find_spec("bench.ours") is None:
        return []
    make = getattr(import_module("bench.ours"), path, None)
    return list(make(load)) if make else []


def _peers(
    stack: ExitStack, peers: tuple[Peer, ...], load: Load, config: Config, *, work: float
) -> tuple[list[report.Contender], list[report.Entry]]:
    """The peers that start, as contenders; those that do not, as entries that say why."""
    ready, absent = [], []
    for peer in peers:
        try:
            worker = stack.enter_context(Worker(peer, load, torch_index=config.torch_index))
        except PeerFailed as failure:
            click.echo(str(failure), err=True)
            absent.append(report.Entry(name=peer.label, role="peer", failure=str(failure)))
            continue
        note = f"{worker.about['version']}, {worker.about['note']}"
        ready.append(report.Contender(name=peer.label, role="peer", work=work, run=_round_of(worker), note=note))
    return ready, absent


def _round_of(worker: Worker) -> Callable[[], float]:
    return lambda: worker.round()["seconds"]


@click.group(cls=DefaultRun)
def main() -> None:
    """How fast the hot paths are, beside the machine's own limits and beside other tools."""


main.add_command(growth.command, "growth")
main.add_command(project.command, "project")
main.add_command(gpu.command, "gpu")


@main.command("run")
@click.option("--d", default=1024, show_default=True)
@click.option("--features", default=32768, show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="tokens a training step")
@click.option("--write-tokens", default=786_432, show_default=True, help="tokens x layers of a writing or reading round")
@click.option("--forward-tokens", type=int, help="tokens a forward pass [default: 1024 on a CPU, 32768 on CUDA]")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="timed rounds of each, after one warm-up")
@click.option("--only", type=click.Choice(sorted(COMPARISONS)), multiple=True, help="these comparisons alone")
@click.option("--quick", is_flag=True, help="small sizes, one round, nothing written to results or README")
@click.option("--torch-index", help="extra package index that holds the torch installed here")
def run_command(
    d: int,
    features: int,
    tokens: int,
    write_tokens: int,
    forward_tokens: int | None,
    threads: int,
    device: str,
    rounds: int,
    only: tuple[str, ...],
    quick: bool,
    torch_index: str | None,
) -> None:
    """Measure our hot paths beside their limits and peers (the default command)."""
    forward_tokens = forward_tokens or (32_768 if device.startswith("cuda") else 1024)
    if quick:
        d, features, tokens, write_tokens, forward_tokens, rounds = 128, 1024, 1024, 16_384, 64, 1
    torch.set_num_threads(threads)
    config = Config(
        d=d, features=features, tokens=tokens, threads=threads, device=device, rounds=rounds,
        write_tokens=write_tokens, forward_tokens=forward_tokens, torch_index=torch_index,
    )  # fmt: skip
    busy = report.busy_share()
    if busy > 0.1:
        click.echo(f"other work holds {busy:.0%} of the processors: the figures will be too low", err=True)
    found = tuple(COMPARISONS[name](config) for name in COMPARISONS if name in (only or COMPARISONS))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    results = report.Results(machine=report.machine(), settings=asdict(config), comparisons=found, busy=busy)
    click.echo("\n" + report.table(results))
    # A partial run must not replace a whole one.
    if not quick and not only:
        click.echo(f"\n{report.write(results)}")
        if README.exists():
            report.publish(results, README)


if __name__ == "__main__":
    run(main)
