"""Every hot path of ours beside its limit and its peers, in one run, taking turns.

    python -m bench                # measure, write results/<machine>.json, refresh README's table and docs/bench.md
    python -m bench --quick        # small sizes, one round: does it all still run?
    python -m bench growth         # cost against F, d, settings and layers, as a plot
    python -m bench project        # what the measured parts come to at 300M tokens x 24 layers x 3 settings
    python -m bench gpu            # the GPU path: checked, timed and projected in one call of under six minutes
    python -m bench mixing         # FVU against how far rows are mixed, on the demo's cache
    python -m bench stores         # the S3 client beside bare ones, through a server that stores nothing
    python -m bench scale          # harvest and training on 1 to 8 simulated GPUs, against stores of given bandwidths
    python -m bench quality        # FVU at equal L0, beside other libraries that are trained on the same batches
    python -m bench tables         # README's table and docs/bench.md again from the results, measuring nothing

Peers that fail are shown with the reason. `bench/ours.py` holds our own paths, `bench/goals.py` what they are meant to reach.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from bench import gpu, growth, limits, mixing, ours, project, quality, report, scale, stores, table
from bench.peers import ROOT, STEPS, WRITERS, Load, Peer, PeerFailed, Worker
from shared.cli import DefaultRun, run
from shared.device import pick_device

SCRATCH = ROOT / "build" / "bench" / "scratch"


@dataclass(frozen=True, kw_only=True)
class Config:
    threads: int
    device: str
    rounds: int
    torch_index: str | None
    d: int = 1024
    features: int = 32_768
    tokens: int = 4096  # of a training step
    write_tokens: int = 786_432  # tokens x layers of a writing or reading round
    forward_tokens: int = 2048

    def load(self, tokens: int) -> Load:
        sizes = {"d": self.d, "features": self.features, "threads": self.threads}
        return Load(tokens=tokens, device=self.device, directory=SCRATCH, **sizes)

    def compare(self, key: str, name: str, unit: str, contenders: list[report.Contender], **more: Any) -> report.Comparison:
        rounds = more.pop("rounds", self.rounds)
        return report.compare(
            key=key, name=name, unit=unit, contenders=contenders, rounds=rounds, say=click.echo, **more
        )  # fmt: skip


def forward(config: Config) -> report.Comparison:
    """The language model: as the harvest runs it, and as plain transformers does."""
    load = config.load(config.forward_tokens)
    return config.compare("forward", f"Harvest forward, {load.tokens} tokens", "tokens", ours.forward(load))


def training(config: Config) -> report.Comparison:
    load = config.load(config.tokens)
    name = f"SAE step, d={config.d}, F={config.features}, {config.tokens} tokens"
    with ExitStack() as stack:
        peers, absent = start_peers(stack, STEPS, load, config, work=load.tokens, against=ours.WAYS)
        contenders = [*ours.step(load), _five_products(config), *peers]
        return config.compare("training", name, "tokens", contenders, absent=absent)


def _five_products(config: Config) -> report.Contender:
    five = limits.five_products(tokens=config.tokens, d=config.d, features=config.features, device=config.device)
    side = min(4096, config.features)
    square = limits.matmul_rate(side=side, device=config.device) / 1e12
    return report.Contender(
        name="five products", role="limit", work=config.tokens, run=five.run, figures=lambda: {"flop": five.flop},
        note=f"a square product of side {side} reaches {square:.2f} TFLOP/s; best layouts: {five.layouts}",
    )  # fmt: skip


def settings(config: Config) -> report.Comparison:
    """Twice the rounds: what is asked for here is a difference of two percent, which is what one round is off by."""
    rounds = 2 * config.rounds
    name, contenders = f"Three settings, {config.tokens} tokens a batch", ours.settings(config.load(config.tokens))
    return config.compare("settings", name, "tokens", contenders, rounds=rounds, note=f"medians of {rounds} rounds")


def streaming(config: Config) -> report.Comparison:
    name = f"Training from a cold cache, {ours.TRAIN_BATCHES} batches of {config.tokens}"
    note = f"one setting is the hardest case: further ones train longer on the same bytes; {ours.memory_bounds()}"
    contenders = ours.stream(config.load(config.tokens))
    return config.compare("stream", name, "tokens", contenders, rounds=min(3, config.rounds), note=note)


def writing(config: Config) -> report.Comparison:
    load = config.load(config.write_tokens)
    payload = load.tokens * load.d * 2
    with ExitStack() as stack:
        peers, absent = start_peers(stack, WRITERS, load, config, work=payload)
        name = f"Cache write, {payload / 1e6:.0f} MB of fp16, durable"
        return config.compare("writing", name, "bytes", [*ours.write(load), *peers], absent=absent)


def reading(config: Config) -> report.Comparison:
    contenders = ours.read(config.load(config.write_tokens))
    name = f"Cache read, {contenders[0].work / 1e6:.0f} MB, cold page cache"
    return config.compare("reading", name, "bytes", contenders)


def copying(config: Config) -> report.Comparison:
    """Limits alone: what moving bytes costs here, for whoever reads the other lines."""
    contenders = [
        report.Contender(name=name, role="limit", work=1 << 30, run=copy)
        for name, copy in limits.copies(device=config.device).items()
    ]
    return config.compare("copying", "1 GiB copied", "bytes", contenders)


COMPARISONS: dict[str, Callable[[Config], report.Comparison]] = {
    "forward": forward,  # first: in a process as transformers' users have it, and not yet as our commands set theirs up
    "training": training,
    "settings": settings,
    "stream": streaming,
    "writing": writing,
    "reading": reading,
    "copying": copying,
}


def start_peers(
    stack: ExitStack, peers: tuple[Peer, ...], load: Load, config: Config, *, work: float, against: tuple[str, ...] = ()
) -> tuple[list[report.Contender], list[report.Entry]]:
    """The peers that start, as contenders; those that do not, as entries that say why."""
    ready, absent = [], []
    for peer in peers:
        try:
            worker = stack.enter_context(closing(Worker(peer, load, torch_index=config.torch_index)))
        except PeerFailed as failure:
            click.echo(str(failure), err=True)
            absent.append(report.Entry(name=peer.label, role="peer", key=peer.name, failure=str(failure)))
            continue
        note = f"{worker.about['version']}, {worker.about['note']}"
        ready.append(
            report.Contender(
                name=peer.label, role="peer", key=peer.name, work=work, run=worker.seconds, against=against, note=note
            )
        )
    return ready, absent


@click.group(cls=DefaultRun)
def main() -> None:
    """How fast the hot paths are, beside the machine's own limits and beside other tools."""


main.add_command(growth.command, "growth")
main.add_command(project.command, "project")
main.add_command(gpu.command, "gpu")
main.add_command(mixing.command, "mixing")
main.add_command(stores.command, "stores")
main.add_command(scale.command, "scale")
main.add_command(quality.command, "quality")


@main.command("run")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="timed rounds of each, after one warm-up")
@click.option("--only", type=click.Choice(sorted(COMPARISONS)), multiple=True, help="these comparisons alone")
@click.option("--quick", is_flag=True, help="small sizes, one round, nothing written to results or README")
@click.option("--torch-index", help="extra package index that holds the torch installed here")
def run_command(threads: int, device: str, rounds: int, only: tuple[str, ...], quick: bool, torch_index: str | None) -> None:
    """Measure our hot paths beside their limits and peers (the default command)."""
    torch.set_num_threads(threads)
    config = Config(threads=threads, device=device, rounds=rounds, torch_index=torch_index)
    if device.startswith("cuda"):
        config = replace(config, forward_tokens=32_768)  # as the harvest has it there
    if quick:
        config = replace(config, d=128, features=1024, tokens=1024, write_tokens=16_384, forward_tokens=64, rounds=1)
    busy = report.busy_share()
    if busy > 0.1:
        click.echo(f"other work holds {busy:.0%} of the processors: the figures will be too low", err=True)
    found = []
    for name in COMPARISONS:
        if name != "forward":
            pick_device(device)  # which also sets up the process, as in every command of the product
        if name in (only or COMPARISONS):
            found.append(COMPARISONS[name](config))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    results = report.Results(machine=report.machine(), settings=asdict(config), comparisons=tuple(found), busy=busy)
    click.echo("\n" + table.details(results))
    if quick:
        click.echo("\nThis shows that everything runs. At these sizes no figure and no goal means anything.")
    # A partial run must not replace a whole one.
    if not quick and not only:
        click.echo(f"\n{report.write(results)}")
        table.publish()


@main.command("tables")
def tables_command() -> None:
    """README's table and docs/bench.md, written again from the results. Nothing is measured."""
    table.publish()


if __name__ == "__main__":
    run(main)
