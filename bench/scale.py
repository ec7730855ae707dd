"""How harvest and training grow with workers: GPUs and store are SIMULATED, all between them is the real code.

    python -m bench scale          # bench/results/scale.json, docs/scale.png and the tables of docs/scale.md; half an hour

Simulated: compute is a sleep of what a block or a step took on the GPU that `python -m bench gpu` measured last, and the store
is a folder in memory behind one pipe of a given bandwidth that all processes share, first come, first served. Real: a process
for each worker, the shards' order of blocks, writer, commits under the lock, ledger, loader, checksums. A block has a
thousandth of a real one's bytes, so what a real worker's processor does with them is in the measured time of a block. Time is
stretched, point by point, so that two cores are enough.

Each point stands beside min(workers x what one computes, bandwidth / bytes a token), which nothing can exceed.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench import report, table
from bench.peers import ROOT
from harvest.language_model import ResidualModel, Sink
from harvest.run import HarvestConfig, harvest_blocks, in_turn
from shared.cache import Cache, CacheSpec
from shared.errors import UserError
from shared.progress import Progress
from shared.sites import Site
from shared.stores import Folder, Staged
from shared.units import Shard
from train.loader import ActivationLoader, LoaderConfig

RESULTS, PICTURE = report.RESULTS / "scale.json", ROOT / "docs" / "scale.png"
LAYERS, TOKENS, ROW = 24, 32_768, 2048  # of the real job: layers; tokens of a block and of a step; bytes of a token and layer
SMALLER = 1024  # is a block here
_PATIENCE = 120.0  # seconds for all processes to be ready
HARVEST, DENSE, SPARSE, FOLLOW = "harvest", "train, dense", "train, sparse", "follow"
FIGURES = {
    HARVEST: "harvest to memory, tokens/s",
    DENSE: "three dense settings, seconds",
    SPARSE: "three sparse settings, seconds",
}
WORKERS = (1, 2, 4, 8)
STORES = {HARVEST: ((2.5, 0.0), (10.0, 0.0), (40.0, 0.0), (40.0, 2e-3), (100.0, 0.0))} | dict.fromkeys(
    (DENSE, SPARSE), ((2.5, 0.0), (10.0, 0.0), (40.0, 0.0))
)  # GB/s, and seconds until a file or a folder is durable
TRAIN_BLOCKS, JOB_BLOCKS = 9_156, 9_218  # of the real job, without and with those held out
NAMES = {HARVEST: "harvest, 24 layers", DENSE: "training, three settings a layer, dense", SPARSE: "the same, sparse at L0 150"}
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """`workers` GPUs on one store. Rates are of tokens through all of them together; of a layer, in training."""

    part: str
    workers: int
    bandwidth: float  # GB/s, of all of them together, both ways
    durable: float = 0.0  # seconds until a file or a folder is
    compute: Mapping[str, float]  # {part: seconds of a block of all layers, or of a step at three settings}
    blocks: int  # to be harvested; in training, of each layer
    tempo: float  # blocks or steps a second here, of all workers together, if nothing is lost

    @property
    def shards(self) -> int:
        return self.workers if self.part in (HARVEST, FOLLOW) else 0

    @property
    def trainers(self) -> int:
        """Each of a layer of its own."""
        return 0 if self.part == HARVEST else self.workers

    @property
    def step(self) -> str:
        return DENSE if self.part == FOLLOW else self.part

    @property
    def bound(self) -> float:
        """Blocks, or steps, a second of all workers together: what no arrangement of the work can exceed."""
        part, layers = (HARVEST, LAYERS) if self.shards else (self.step, 1)
        return min(self.workers / self.compute[part], self.bandwidth * 1e9 / (TOKENS * ROW * layers))

    @property
    def pace(self) -> float:
        """Seconds here that stand for one."""
        return self.bound / self.tempo

    @property
    def shortest(self) -> float:
        """Seconds by the bound. Who follows a harvest can do a sixteenth of the training before it ends: an epoch goes over all
        blocks sixteen times."""
        if self.part != FOLLOW:
            return self.blocks * max(1, self.trainers) / self.bound
        return self.blocks / self.bound + 15 / 16 * replace(self, part=DENSE).shortest

    @property
    def takes(self) -> float:
        """Seconds here."""
        return self.shortest * self.pace

    @property
    def store(self) -> str:
        return f"{self.bandwidth:g} GB/s" + f", {1e3 * self.durable:g} ms" * (self.durable > 0)

    def spec(self) -> CacheSpec:
        """As the real cache in its blocks, slices and layers; a block of a layer is 64 KiB instead of 64 MiB."""
        return CacheSpec(
            model="simulated", model_revision="", dataset="simulated", dataset_revision="", split="", text_column="",
            tokenizer_sha256="", separator=0, context=32, d_model=64, n_layers=LAYERS, vocab_size=256, block_sequences=16,
            n_blocks=self.blocks, holdout_blocks=0, seed=0, precision="bf16",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What came of a point: real seconds, blocks that two shards did, and the share of the processors that others held."""

    point: Point
    seconds: float
    twice: int
    busy: float
    date: str

    @property
    def rate(self) -> float:
        """Tokens a second through all workers together: of blocks, those done twice included; in training, of their layers."""
        return TOKENS * (self.point.blocks + self.twice) * max(1, self.point.trainers) / self.seconds

    @property
    def bound(self) -> float:
        return TOKENS * self.point.bound

    @property
    def hours(self) -> float:
        """Of the full job at that rate, in which the shards do as many blocks twice, at its end."""
        return TOKENS * (JOB_BLOCKS + self.twice if self.point.shards else TRAIN_BLOCKS * LAYERS) / self.rate / 3600


class Pipe:
    """A bandwidth that processes share: who comes later waits until those before have had their bytes."""

    def __init__(self, free_at: Any) -> None:
        self._free_at = free_at  # multiprocessing.Value of a double, in monotonic seconds
        self.rate = 0.0  # bytes a second here

    def carry(self, size: int) -> None:
        with self._free_at.get_lock():
            self._free_at.value = end = max(time.monotonic(), self._free_at.value) + size / self.rate
        time.sleep(max(0.0, end - time.monotonic()))


class Limited(Folder):
    """SIMULATED: a folder whose activations come and go through a pipe, and where it takes time to make a block's files and
    entry durable, which happens under the cache's lock."""

    def __init__(self, root: Path, pipe: Pipe, durable: float = 0.0) -> None:
        super().__init__(root)
        self._pipe, self._durable = pipe, durable

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        self._pipe.carry(len(out))
        return super().read(key, out, offset)

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        self._pipe.carry(len(data))
        return super().stage(key, data, owner, replace=replace)

    def place(self, staged: dict[str, Staged]) -> None:
        time.sleep(self._durable * len({key.rpartition("/")[0] for key in staged}))
        super().place(staged)

    def create(self, key: str, data: bytes) -> bool:
        time.sleep(self._durable * 2)
        return super().create(key, data)


class Sleeping(ResidualModel):
    """SIMULATED: in the place of a language model, the time that it takes."""

    def __init__(self, cache: Cache, seconds: float) -> None:
        self.sites, self.device, self.d_model = cache.sites, CPU, cache.spec.d_model
        self.ran, self._seconds, self._rows = 0, seconds, torch.randn(cache.spec.block_rows, self.d_model)

    def run(self, tokens: torch.Tensor, sink: Sink) -> None:
        end = time.monotonic() + self._seconds
        for layer in self.sites:
            sink(layer, self._rows)
        self.ran += 1
        time.sleep(max(0.0, end - time.monotonic()))


_pipe: Pipe
_start: Any  # multiprocessing.Barrier


def _begin(free_at: Any, start: Any) -> None:
    """In each worker's process, once."""
    global _pipe, _start
    _pipe, _start = Pipe(free_at), start
    sys.stderr = io.StringIO()  # the shards' progress lines
    torch.set_num_threads(1)


def _work(folder: Path, point: Point, number: int) -> tuple[float, float, int]:
    """What one process does, the shards first, then those who train or follow: when it began and ended, and blocks computed."""
    _pipe.rate = point.bandwidth * 1e9 / SMALLER / point.pace
    cache = Cache(Limited(folder, _pipe, point.durable * point.pace), point.spec())
    if number >= point.shards:
        return _trainer(cache, number - point.shards, point)
    model, shard = Sleeping(cache, point.compute[HARVEST] * point.pace), Shard(index=number, count=point.shards)
    _start.wait(_PATIENCE)
    began = time.monotonic()
    blocks = in_turn(cache.spec, cache.missing(cache.sites).get(cache.sites, []), shard)
    harvest_blocks(cache, model, blocks, HarvestConfig(device=CPU))
    return began, time.monotonic(), model.ran


def _trainer(cache: Cache, layer: int, point: Point) -> tuple[float, float, int]:
    """A layer, whose one stream feeds three settings; a batch is handed to the GPU while it is at work on the one before."""
    config, seconds = LoaderConfig(batch=cache.spec.block_rows, window_blocks=2), point.compute[point.step] * point.pace
    asked = (lambda: False) if point.part == FOLLOW else None
    loader = ActivationLoader(cache, Site(layer), config, CPU, last=point.blocks, asked=asked)
    _start.wait(_PATIENCE)
    began = free = time.monotonic()
    for _ in loader:
        begins = max(free, time.monotonic())
        free = begins + seconds  # SIMULATED: a step at three settings
        time.sleep(max(0.0, begins - time.monotonic()))
    time.sleep(max(0.0, free - time.monotonic()))
    return began, time.monotonic(), 0


def simulate(point: Point) -> Found:
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=memory if os.access(memory, os.W_OK) else None) as name:
        cache, processes = _new_cache(Path(name), point), point.shards + point.trainers
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.__main__"])
        shared = context.Value("d", 0.0), context.Barrier(processes)
        with ProcessPoolExecutor(processes, context, _begin, shared) as pool:
            began, ended, computed = zip(*pool.map(partial(_work, Path(name), point), range(processes)), strict=True)
        if cache.missing(cache.sites):
            raise AssertionError("the harvest left something out")
    twice = sum(computed) - point.blocks if point.shards else 0
    seconds = (max(ended) - min(began)) / point.pace
    return Found(point=point, seconds=seconds, twice=twice, busy=report.busy_share(), date=report.today())


def _new_cache(folder: Path, point: Point) -> Cache:
    """With all tokens, and with all blocks of the layers that are trained if nobody is to harvest them."""
    cache = Cache.create(folder, point.spec(), tuple(map(Site, range(LAYERS if point.shards else point.trainers))))
    for number in cache.missing_token_chunks():
        cache.commit_tokens(number, np.zeros((cache.spec.token_chunk, cache.spec.context), cache.spec.token_dtype), {}, 0)
    if not point.shards:
        with contextlib.redirect_stderr(io.StringIO()):
            harvest_blocks(cache, Sleeping(cache, 0.0), list(range(point.blocks)), HarvestConfig(device=CPU))
    return cache


# ------------------------------------------------------------------------------------------------------------- results


def points(figures: Mapping[str, float]) -> list[Point]:
    """All that are to be simulated, from what one GPU was measured to take. Raises UserError naming what was not measured."""
    if missing := [name for name in FIGURES.values() if name not in figures]:
        raise UserError(f"the GPU results lack {', '.join(missing)}: run `python -m bench gpu` again")
    compute = {HARVEST: TOKENS / figures[FIGURES[HARVEST]]} | {way: figures[FIGURES[way]] for way in (DENSE, SPARSE)}
    grid = [
        Point(
            part=part, workers=n, bandwidth=bandwidth, durable=durable, compute=compute,
            blocks=192 if part == HARVEST else 128, tempo=4.0 if part == HARVEST else 5.0 * n,
        )
        for part in NAMES for bandwidth, durable in STORES[part] for n in WORKERS
    ]  # fmt: skip
    return grid + [Point(part=FOLLOW, workers=n, bandwidth=10.0, compute=compute, blocks=128, tempo=1.5) for n in WORKERS]


def read(path: Path) -> list[Found]:
    raws = json.loads(path.read_text())["found"] if path.exists() else []
    return [Found(**raw | {"point": Point(**raw["point"])}) for raw in raws]


def latest(found: Sequence[Found], part: str) -> dict[str, list[Found]]:
    """{store: for each number of workers what was simulated last}."""
    last = {(one.point.store, one.point.workers): one for one in found if one.point.part == part}
    return {store: [last[store, n] for n in WORKERS] for store in dict.fromkeys(store for store, _ in last)}


def tables(raw: Mapping[str, Any], found: Sequence[Found]) -> list[str]:
    """Those of docs/scale.md."""
    about = (
        f"**Simulated** by `python -m bench scale`, {raw['date']}: compute is a sleep of what one {raw['gpu']} was measured to "
        "take, the store a pipe of the given bandwidth; shards, writer, commits, ledger and loader are real. Tokens a second "
        "through all workers together and, in brackets, of min(workers × what one computes, bandwidth / bytes of a token). "
        f"Other work held {sum(one.busy for one in found) / len(found):.0%} of the processors meanwhile."
    )
    return [about, *(_grid(found, part) for part in (HARVEST, DENSE, SPARSE)), _follow(latest(found, FOLLOW))]


def _grid(found: Sequence[Found], part: str) -> str:
    head, rows = (NAMES[part], *(f"{n} worker{'s' * (n > 1)}" for n in WORKERS), "full job, 1 → 8"), []
    for store, mine in latest(found, part).items():
        cells = [f"{one.rate:,.0f} ({one.rate / one.bound:.0%})" for one in mine]
        twice = [", ".join(str(one.twice) for one in mine)] * (part == HARVEST)
        rows.append((store, *cells, f"{mine[0].hours:.2g} → {mine[-1].hours:.2g} h", *twice))
    head += ("blocks done twice",) * (part == HARVEST)
    return table.markdown(head, "-" + "r" * (len(head) - 1), rows)


def _follow(found: Mapping[str, Sequence[Found]]) -> str:
    rows = []
    for one in (one for mine in found.values() for one in mine):
        harvest, training = (replace(one.point, part=part).shortest for part in (HARVEST, DENSE))
        less = one.seconds - harvest * one.twice / one.point.blocks
        shares = [f"{seconds / (harvest + training):.2f}" for seconds in (one.point.shortest, one.seconds, less)]
        rows.append((f"{one.point.workers} + {one.point.workers}, {one.point.store}", *shares, str(one.twice)))
    head = ("shards + trainers beside them", "bound", "simulated", "less blocks done twice", "these blocks")
    return table.markdown(head, "-rrrr", rows)


def draw(found: Sequence[Found], path: Path) -> None:
    """Rates against workers, a line for each store, the bound dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, grid = pyplot.subplots(1, 3, figsize=(12, 4.2))
    for axes, part in zip(grid, (HARVEST, DENSE, SPARSE), strict=True):
        for store, mine in latest(found, part).items():
            (line,) = axes.plot(WORKERS, [one.rate for one in mine], "o-", ms=4, label=store)
            axes.plot(WORKERS, [one.bound for one in mine], "--", color=line.get_color(), lw=1)
        axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="tokens/s, all together", title=NAMES[part])
        axes.set_xticks(WORKERS, [str(n) for n in WORKERS])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=5, title="store (bound dashed)")
    figure.suptitle("SIMULATED: compute sleeps as long as measured on one GPU, the store is a pipe", fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@click.command()
def command() -> None:
    """Harvest and training on 1 to 8 simulated GPUs, beside the bound; goes on where it was stopped."""
    gpus = report.read(report.RESULTS)[1]
    if not gpus:
        raise UserError("no GPU is measured: run `python -m bench gpu` on one")
    found, about = read(RESULTS), {"kind": "scale", "machine": asdict(report.machine()), "gpu": gpus[-1]["machine"]["gpu"]}
    left = [point for point in points(gpus[-1]["figures"]) if point not in [one.point for one in found]]
    with Progress("simulating", round(sum(point.takes for point in left)), "seconds") as progress:
        for point in left:
            found.append(simulate(point))
            content = about | {"date": report.today(), "found": [asdict(one) for one in found]}
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
            progress.advance(round(point.takes), f"{found[-1].rate / found[-1].bound:.0%} of the bound")
    draw(found, PICTURE)
    table.publish()
