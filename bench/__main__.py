"""Every hot path of ours beside its limit and its peers, in one run, taking turns.

    python -m bench                # measure, write results/<machine>.json, refresh the README's table
    python -m bench --quick        # small sizes, one round: does it all still run?
    python -m bench growth         # cost against F, d, settings and layers, as a plot
    python -m bench project        # what the measured parts come to at 300M tokens x 24 layers x 3 settings
    python -m bench gpu            # the GPU path: checked, timed and projected in one call of under 10 minutes

Peers that fail are shown with the reason. `bench/ours.py` and `bench/stream.py` hold our own paths, `bench/goals.py` what they
are meant to reach.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from bench import gpu, growth, limits, ours, project, report, stream, table
from bench.peers import ROOT, STEPS, WRITERS, Load, Peer, PeerFailed, Worker
from shared.cli import DefaultRun, run
from shared.device import pick_device

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
    load = config.load(tokens=config.tokens)
    with ExitStack() as stack:
        peers, absent = _peers(stack, STEPS, load, config, work=load.tokens, against=("dense", "sparse"))
        return _compare(
            config,
            key="training",
            name=f"SAE step, d={config.d}, F={config.features}, {config.tokens} tokens",
            unit="tokens",
            contenders=[*ours.step(load), _five_products(config), *peers],
            absent=absent,
        )


def _five_products(config: Config) -> report.Contender:
    five = limits.five_products(tokens=config.tokens, d=config.d, features=config.features, device=config.device)
    side = min(4096, config.features)
    square = limits.matmul_rate(side=side, device=config.device) / 1e12
    layouts = ", ".join(f"{each.name} {each.layout}" for each in five.products)
    note = f"a square product of side {side} reaches {square:.2f} TFLOP/s; best layouts: {layouts}"
    return report.Contender(
        name="five products", role="limit", work=config.tokens, run=five.run, note=note, figures=lambda: {"flop": five.flop}
    )


def settings(config: Config) -> report.Comparison:
    """Twice the rounds: what is asked for here is a difference of two percent, which is what one round is off by."""
    return _compare(
        replace(config, rounds=2 * config.rounds),
        key="settings",
        name=f"Three settings, {config.tokens} tokens a batch",
        unit="tokens",
        contenders=stream.settings(config.load(tokens=config.tokens)),
        note=f"medians of {2 * config.rounds} rounds",
    )


def streaming(config: Config) -> report.Comparison:
    load = config.load(tokens=config.tokens)
    spec = stream.stream_spec(load)
    return _compare(
        replace(config, rounds=min(3, config.rounds)),
        key="stream",
        name=f"Training from a cold cache, {stream.BATCHES} batches of {config.tokens}",
        unit="tokens",
        contenders=stream.stream(load),
        note=(
            "one setting is the hardest case: further ones train longer on the same bytes; "
            f"blocks of {spec.block_bytes / 1e6:.1f} MB, windows of {stream.WINDOW}; {stream.memory_bounds()}"
        ),
    )


def writing(config: Config) -> report.Comparison:
    load = config.load(tokens=config.write_tokens)
    payload = load.tokens * load.d * 2
    with ExitStack() as stack:
        peers, absent = _peers(stack, WRITERS, load, config, work=payload)
        return _compare(
            config,
            key="writing",
            name=f"Cache write, {payload / 1e6:.0f} MB of fp16, durable",
            unit="bytes",
            contenders=[*ours.write(load), *peers],
            absent=absent,
        )


def reading(config: Config) -> report.Comparison:
    contenders = ours.read(config.load(tokens=config.write_tokens))
    return _compare(
        config,
        key="reading",
        name=f"Cache read, {contenders[0].work / 1e6:.0f} MB, cold page cache",
        unit="bytes",
        contenders=contenders,
    )


def forward(config: Config) -> report.Comparison:
    """The language model: as the harvest runs it, and as plain transformers does."""
    load = config.load(tokens=config.forward_tokens)
    name = f"Harvest forward, {load.tokens} tokens"
    return _compare(config, key="forward", name=name, unit="tokens", contenders=ours.forward(load))


def copying(config: Config) -> report.Comparison:
    """Limits alone: what moving bytes costs here, for whoever reads the other lines."""
    contenders = [
        report.Contender(name=name, role="limit", work=copy.bytes, run=copy.run)
        for name, copy in limits.copies(device=config.device).items()
    ]
    return _compare(config, key="copying", name="1 GiB copied", unit="bytes", contenders=contenders)


COMPARISONS: dict[str, Callable[[Config], report.Comparison]] = {
    "forward": forward,  # first: in a process as transformers' users have it, and not yet as our commands set theirs up
    "training": training,
    "settings": settings,
    "stream": streaming,
    "writing": writing,
    "reading": reading,
    "copying": copying,
}


def _compare(config: Config, **what: Any) -> report.Comparison:
    return report.compare(rounds=config.rounds, say=click.echo, **what)


def _peers(
    stack: ExitStack, peers: tuple[Peer, ...], load: Load, config: Config, *, work: float, against: tuple[str, ...] = ()
) -> tuple[list[report.Contender], list[report.Entry]]:
    """The peers that start, as contenders; those that do not, as entries that say why."""
    ready, absent = [], []
    for peer in peers:
        try:
            worker = stack.enter_context(Worker(peer, load, torch_index=config.torch_index))
        except PeerFailed as failure:
            click.echo(str(failure), err=True)
            absent.append(report.Entry(name=peer.label, role="peer", key=peer.name, failure=str(failure)))
            continue
        note = f"{worker.about['version']}, {worker.about['note']}"
        ready.append(
            report.Contender(
                name=peer.label, role="peer", key=peer.name, work=work, run=_round_of(worker), against=against, note=note
            )
        )
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
@click.option(
    "--forward-tokens", type=int, help="tokens a forward pass [default: 2048 on a CPU, 32768 on CUDA, as harvest has it]"
)
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
    forward_tokens = forward_tokens or (32_768 if device.startswith("cuda") else 2048)
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
    found = []
    for name in COMPARISONS:
        if name != "forward":
            pick_device(device)  # which also sets up the process, as in every command of the product
        if name in (only or COMPARISONS):
            found.append(COMPARISONS[name](config))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    results = report.Results(machine=report.machine(), settings=asdict(config), comparisons=tuple(found), busy=busy)
    click.echo("\n" + table.markdown(results))
    if quick:
        click.echo("\nThis shows that everything runs. At these sizes no figure and no goal means anything.")
    # A partial run must not replace a whole one.
    if not quick and not only:
        click.echo(f"\n{report.write(results)}")
        if README.exists():
            table.publish(results, README)


if __name__ == "__main__":
    run(main)
