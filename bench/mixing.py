"""What the shuffle costs: the same SAEs trained on the same rows, mixed more and less, compared on held-out tokens.

    python -m bench mixing --cache data/demo          # docs/mixing.png and bench/results/mixing.json, half an hour on a core

Windows of whole blocks (which the loader had once) and of slices (which it has), and everything shuffled at once. FVU is
compared at equal L0: each SAE's with what the line through the fully shuffled ones, log FVU against log L0, has at its L0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench.peers import ROOT
from bench.report import RESULTS as FOLDER
from bench.report import machine, today
from eval.measure.metrics import heldout_blocks, measure
from shared.cache import Cache
from shared.presets import get_preset
from shared.shuffle import permutation, window_rows
from shared.sites import Site
from train.kernels.base import Workspace
from train.loader import ActivationLoader, LoaderConfig
from train.step import StepConfig, TrainingSae, pick_kernels

CPU = torch.device("cpu")
PICTURE = ROOT / "docs" / "mixing.png"
RESULTS = FOLDER / "mixing.json"
BLOCKS, SLICES, FULL = "whole blocks", "slices", "everything"
ORDERS = ((FULL, 0), (SLICES, 16), (BLOCKS, 16), (SLICES, 4), (BLOCKS, 4), (SLICES, 1), (BLOCKS, 1))
STYLES = {BLOCKS: "s--", SLICES: "o-"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Batches of one epoch over a layer."""

    kind: str
    blocks: int  # as large as a window is

    def contexts(self, cache: Cache) -> int:
        """How many contexts a window has rows of."""
        most = cache.spec.train_blocks
        blocks = {BLOCKS: self.blocks, SLICES: cache.spec.slices * self.blocks, FULL: most}[self.kind]
        return min(most, blocks) * cache.spec.block_sequences

    def batches(self, cache: Cache, layer: int, batch: int, seed: int) -> Iterator[Tensor]:
        spec = cache.spec
        if self.kind == BLOCKS:
            return self._of_blocks(cache, layer, batch, seed)
        blocks = spec.train_blocks if self.kind == FULL else self.blocks
        config = LoaderConfig(batch=batch, window_blocks=blocks, threads=1, seed=seed)
        return iter(ActivationLoader(cache, Site(layer), config, CPU, last=spec.train_tokens // batch))

    def _of_blocks(self, cache: Cache, layer: int, batch: int, seed: int) -> Iterator[Tensor]:
        """As the loader had it: blocks in random order, `blocks` at a time, rows permuted among these."""
        spec, rows = cache.spec, torch.empty(0, cache.spec.d_model, dtype=torch.float16)
        order = permutation(spec.train_blocks, seed, 1, 0)
        for window, first in enumerate(range(0, len(order), self.blocks)):
            some = order[first : first + self.blocks].tolist()
            data = np.empty((len(some), spec.block_rows, spec.d_model), dtype=np.float16)
            for place, block in enumerate(some):
                cache.read_block(Site(layer), block, data[place])
            mixed = torch.from_numpy(data).flatten(0, 1)
            rows = torch.cat([rows, mixed[torch.from_numpy(window_rows(len(mixed), seed=seed, epoch=0, window=window))]])
            while len(rows) >= batch:
                yield rows[:batch]
                rows = rows[batch:]

    def edges(self, cache: Cache, batch: int) -> list[int]:
        """The steps at which windows begin and the last ends; for everything at once, those of windows of 16 blocks."""
        most, size = cache.spec.train_blocks, self.blocks or 16
        count = -(-most // size)
        ends = [most * k / count if self.kind == SLICES else min(most, k * size) for k in range(count + 1)]
        return [round(end * cache.spec.block_rows / batch) for end in ends]


def train(cache: Cache, layer: int, order: Order, lambdas: tuple[float, ...], seed: int) -> list[dict[str, Any]]:
    """The SAEs' metrics on held-out tokens, and how their losses went; the recipe is the demo's."""
    p, spec = get_preset("demo"), cache.spec
    features, kernels = p.expansion * spec.d_model, pick_kernels("bf16", CPU)
    step = StepConfig(sparse_below=0.25)
    saes = [TrainingSae(spec.d_model, features, step, kernels, CPU, seed=seed * 1000 + layer) for _ in lambdas]
    workspace = Workspace(p.batch, spec.d_model, features, "bf16", CPU)
    losses: list[list[float]] = [[] for _ in lambdas]
    squares: list[list[float]] = [[] for _ in lambdas]
    for number, half in enumerate(order.batches(cache, layer, p.batch, seed)):
        x = half.float()
        for sae, l1, loss, square in zip(saes, lambdas, losses, squares, strict=True):
            if number == 0:
                sae.init_centre(x)
            result = sae.step(x, lr=p.lr * min(1, (number + 1) / p.lr_warmup), l1=l1, workspace=workspace)
            loss.append(result.loss)
            square.append(result.mse)
    snapshots = [sae.snapshot({}, {}) for sae in saes]
    activations, tallies = measure(heldout_blocks(cache, Site(layer), p.holdout_tokens), snapshots, spec.context)
    variance = activations.all.variance / activations.all.n / spec.d_model
    return [
        {
            "layer": layer, "seed": seed, "kind": order.kind, "blocks": order.blocks, "contexts": order.contexts(cache),
            "lambda": l1, "l0": tally.sparsity()["l0"], "dead": tally.sparsity()["dead_share"],
            "fvu": tally.reconstruction(activations)["fvu"], "fvu_last_tenth": np.mean(square[-len(square) // 10 :]) / variance,
            "edge": edge(np.array(loss), order.edges(cache, p.batch)),
        }
        for l1, tally, loss, square in zip(lambdas, tallies, losses, squares, strict=True)
    ]  # fmt: skip


def edge(losses: np.ndarray[Any, Any], edges: list[int]) -> float:
    """Mean loss in the first tenths of windows over that in the last tenths, over the second half of the run."""
    firsts, lasts = [], []
    for first, end in pairwise(edges):
        tenth = (end - first) // 10
        if tenth and first >= len(losses) // 2:
            firsts.append(losses[first : first + tenth].mean())
            lasts.append(losses[end - tenth : end].mean())
    return float(np.mean(firsts) / np.mean(lasts)) if firsts else math.nan


def at_equal_l0(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point with `ratio`, its FVU over that of full shuffles of the same layer at its L0."""
    found = []
    for point in points:
        full = [p for p in points if p["kind"] == FULL and p["layer"] == point["layer"]]
        slope, level = np.polyfit(np.log([p["l0"] for p in full]), np.log([p["fvu"] for p in full]), 1)
        found.append(point | {"ratio": point["fvu"] / math.exp(level + slope * math.log(point["l0"]))})
    return found


def draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("held-out FVU over that of a full shuffle, equal L0", lambda p: p["ratio"]),
        ("held-out FVU over that of the last tenth of training", lambda p: p["fvu"] / p["fvu_last_tenth"]),
        ("share of dead features", lambda p: p["dead"]),
    )
    figure, grid = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for axes, (title, value) in zip(grid, panels, strict=True):
        for kind, style in STYLES.items():
            mine = [p for p in points if p["kind"] == kind]
            x = sorted({p["contexts"] for p in mine})
            values = [[value(p) for p in mine if p["contexts"] == contexts] for contexts in x]
            (line,) = axes.plot(x, [np.mean(v) for v in values], style, label=f"windows of {kind}")
            axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color())
        axes.axhline(np.mean([value(p) for p in points if p["kind"] == FULL]), color="k", lw=0.8, label="full shuffle")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("contexts in a window")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    grid[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@click.command()
@click.option("--cache", "path", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True)
@click.option("--layers", default="2,5", show_default=True)
@click.option("--lambdas", default="3e-2,8e-3", show_default=True)
@click.option("--seeds", default=1, show_default=True)
def command(path: Path, layers: str, lambdas: str, seeds: int) -> None:
    """Quality against how far rows are mixed, on a small cache; adds to what was measured before."""
    cache = Cache.open(path)
    points = json.loads(RESULTS.read_text())["points"] if RESULTS.exists() else []
    for seed in range(seeds):
        for layer in map(int, layers.split(",")):
            for kind, blocks in ORDERS:
                if any((p["seed"], p["layer"], p["kind"], p["blocks"]) == (seed, layer, kind, blocks) for p in points):
                    continue
                points += train(cache, layer, Order(kind=kind, blocks=blocks), tuple(map(float, lambdas.split(","))), seed)
                content = {"kind": "mixing", "date": today(), "machine": asdict(machine()), "points": points}
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")
                click.echo(json.dumps(points[-1]))
    draw(at_equal_l0(points), PICTURE)
    click.echo(f"{PICTURE}\n{RESULTS}")
