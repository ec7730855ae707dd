"""Sizes and places of every comparison: the published job's shapes, on a CPU, on a GPU, and so small that all of it runs in a
minute and no figure means anything."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.harness import Comparison, Contender
from bench.limits import quick_type
from bench.peers import ROOT
from bench.workers.worker import Job

SCRATCH = ROOT / "build" / "bench" / "scratch"
MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is measured on a CPU, unless fields say otherwise."""

    whole: bool = True  # sizes at which figures mean something
    gpu: bool = False  # whether what matters on a GPU alone is measured, too
    threads: int = os.cpu_count() or 1
    name: str = "cpu"  # of the device
    rounds: int = 5
    folders: tuple[tuple[str, Path], ...] = (("disk", SCRATCH),)  # where caches lie; on a GPU's machine in memory, too
    d: int = 1024
    features: int = 32_768
    tokens: int = 4096  # of a step
    layers: int = 24
    vocab: int = 50_304
    context: int = 1024
    sequences: int = 32  # of a full-size block
    forward_tokens: int = 2048
    harvest_sequences: int = 2  # of a block of a harvesting round: one forward pass
    harvest_blocks: int = 3  # enough for one to be written while the next is computed
    write_blocks: int = 1
    read_blocks: int = 192  # of one layer; long enough for its end to count little, when nothing is read any more
    window_blocks: int = 16
    stream_saes: int = 1  # on one stream: further ones train longer on the same bytes, so one is the hardest case
    stream_blocks: int = 8
    stream_block: int = 8  # contexts: two batches
    stream_window: int = 2
    l0: int = 150  # of sparse steps
    l0s: tuple[int, ...] = (20, 50, 300, 400)  # others, which tell where a dense step is the faster one
    open_l0: int = 1000  # of a trained SAE whose steps are dense: the other dense steps are as active as an SAE at its start
    side: int = 4096  # of the square product
    cross: int = 2  # layers of a crosscoder; its weights take as many times the memory of an SAE's

    @property
    def device(self) -> torch.device:
        return torch.device(self.name)

    @property
    def disk(self) -> Path:
        return dict(self.folders)["disk"]

    def job(self, tokens: int) -> Job:
        """A worker's, of so many tokens a round."""
        sizes = {"d": self.d, "features": self.features, "tokens": tokens, "threads": self.threads}
        bf16 = quick_type(self.name) == torch.bfloat16
        return Job(device=self.name, directory=str(self.disk), bf16=bf16, **sizes)

    def compare(self, key: str, name: str, unit: str, contenders: list[Contender], rounds: int = 0, **more: Any) -> Comparison:
        return harness.compare(key=key, name=name, unit=unit, contenders=contenders, rounds=rounds or self.rounds, **more)

    def figures(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name != "folders"}


def cpu() -> Setup:
    """The published shapes; on a processor that would emulate bfloat16 a quarter of the tokens, which take as long."""
    return Setup() if quick_type("cpu") == torch.bfloat16 else replace(Setup(), tokens=1024, stream_block=2)


Measure = Callable[[Setup], Comparison]
GPU = Setup(
    gpu=True, name="cuda", rounds=7, tokens=32_768, forward_tokens=32_768, harvest_sequences=32, harvest_blocks=5,
    read_blocks=64, stream_saes=3, stream_blocks=64, stream_block=32, stream_window=16, side=8192,
)  # fmt: skip


def small(setup: Setup) -> Setup:
    """Of the same parts."""
    return replace(
        setup, whole=False, rounds=1, d=64, features=256, tokens=64, layers=3, vocab=97, context=16, sequences=4,
        forward_tokens=32, harvest_blocks=2, harvest_sequences=2, read_blocks=4, window_blocks=2,
        stream_blocks=6, stream_block=8, stream_window=2, l0=12, l0s=(3,), open_l0=40, side=64,
    )  # fmt: skip
