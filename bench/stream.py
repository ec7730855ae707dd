"""One stream of activations into SAEs: what a further setting costs, and how long training waits for data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from bench import ours
from bench.peers import Load
from bench.report import Contender
from shared.presets import get_preset
from train.kernels import Workspace
from train.step import TrainingSae

if TYPE_CHECKING:
    from shared.cache import Cache, CacheSpec

WAYS = ("dense", "sparse")
SETTINGS = 3
BATCHES, WINDOW = 16, 2  # of a training round; blocks hold two batches


def new_saes(load: Load, way: str, count: int) -> list[TrainingSae]:
    """Equal ones, so that they cost the same: what the published settings differ in is λ and L0."""
    device = torch.device(load.device)
    saes = [ours.training_sae(d=load.d, features=load.features, device=device, sparse=way == "sparse") for _ in range(count)]
    if way == "sparse":
        ours.set_l0(saes[0], ours.target_l0(load.features))
        for sae in saes[1:]:
            sae.b_enc.copy_(saes[0].b_enc)
    return saes


# -------------------------------------------------------------------------------------------------------- settings


def settings(load: Load) -> list[Contender]:
    """Three SAEs that step one after another on each batch, beside one of them that takes three batches by itself.

    Both do the arithmetic of three steps; what the three can lose is the caches, to one another's weights.
    """
    workspace = Workspace(load.tokens, load.d, load.features, "bf16", torch.device(load.device))
    work = SETTINGS * load.tokens
    contenders = []
    for way in WAYS:
        saes = new_saes(load, way, SETTINGS)
        steps = ours.Steps(saes=saes, workspace=workspace, tokens=load.tokens)
        alone = ours.Steps(saes=saes[:1], workspace=workspace, tokens=load.tokens, batches=SETTINGS)
        contenders += [
            Contender(
                name=f"ours, three {way} SAEs, one batch", key=way, role="ours", work=work, run=steps.run, note=steps.note
            ),
            Contender(name=f"one {way} SAE, three batches", key=way, role="base", work=work, run=alone.run, against=(way,)),
        ]
    return contenders


# --------------------------------------------------------------------------------------------------------- training


@dataclass(kw_only=True, slots=True)
class Training:
    """A round trains one SAE from a cold cache to the cache's end; the loader is made within the round, so its first
    window is waited for within it too."""

    cache: Cache
    sae: TrainingSae
    workspace: Workspace
    batch: int
    idle: list[float] = field(default_factory=list)  # share of a round that was not spent in steps
    waited: list[float] = field(default_factory=list)  # the part of it in which no window was ready
    first: list[float] = field(default_factory=list)  # the part of it before the first batch
    growth: int | None = None  # by how much more the resident set rose than in a step without a loader

    def run(self) -> float:
        from train.loader import ActivationLoader, LoaderConfig

        ours.evict_blocks(self.cache)
        without = self._peak_of_a_step()
        ours.resident(reset=True)
        config = LoaderConfig(batch=self.batch, window_blocks=WINDOW)
        stepping, first = 0.0, 0.0
        start = time.perf_counter()
        loader = ActivationLoader(self.cache, 0, config, self.sae.device, last=BATCHES)
        for x in loader:
            began = time.perf_counter()
            first = first or began - start
            self.sae.step(x.float(), lr=ours.LR, l1=ours.L1, workspace=self.workspace)
            ours.synchronize(self.sae.device)
            stepping += time.perf_counter() - began
        seconds = time.perf_counter() - start
        peak = ours.resident()
        self.growth = None if without is None or peak is None else peak - without
        self.idle.append(1 - stepping / seconds)
        self.waited.append(loader.waited / seconds)
        self.first.append(first / seconds)
        return seconds

    def _peak_of_a_step(self) -> int | None:
        x = torch.randn(self.batch, self.sae.d, device=self.sae.device).half()
        ours.resident(reset=True)
        self.sae.step(x, lr=ours.LR, l1=ours.L1, workspace=self.workspace)
        return ours.resident()

    def figures(self) -> Mapping[str, float]:
        # The first round is the warm-up, as everywhere.
        found = {"idle": self.idle, "waited": self.waited, "first": self.first}
        return {name: statistics.median(shares[1:]) for name, shares in found.items()}

    def note(self) -> str:
        shares = self.figures()
        windows = 2 * WINDOW * self.cache.spec.block_bytes
        memory = f", resident set +{self.growth / 1e6:.0f} MB beside the step's own" if self.growth is not None else ""
        return (
            f"{shares['idle']:.2%} of the time outside steps, all in: {shares['first']:.2%} until the first batch (a "
            f"layer of the full job has that once), {shares['waited']:.2%} with no window ready (the first one's fill "
            f"among it), the rest in gathering rows; the loader's windows hold {windows / 1e6:.0f} MB{memory}"
        )


def stream_spec(load: Load) -> CacheSpec:
    """A layer of `BATCHES` batches in blocks of two."""
    context = min(ours.CONTEXT, load.tokens)
    block_sequences = 2 * load.tokens // context
    n_blocks = -(-BATCHES * load.tokens // (block_sequences * context))
    spec = ours.cache_spec(d=load.d, n_layers=1, rows=context)
    return replace(spec, context=context, block_sequences=block_sequences, n_blocks=n_blocks)


def stream(load: Load) -> list[Contender]:
    """Training as `train` does it, loader and steps, from a cold cache."""
    cache = ours.new_cache(load.directory / "ours-stream", stream_spec(load))
    ours.write_cache(cache, threads=load.threads)
    workspace = Workspace(load.tokens, load.d, load.features, "bf16", torch.device(load.device))
    contenders = []
    for way in WAYS:
        sae = new_saes(load, way, 1)[0]
        training = Training(cache=cache, sae=sae, workspace=workspace, batch=load.tokens)
        contenders.append(
            Contender(
                name=f"ours, one {way} setting",
                key=way,
                role="ours",
                work=BATCHES * load.tokens,
                run=training.run,
                note=training.note,
                figures=training.figures,
            )
        )
    return contenders


def memory_bounds() -> str:
    """Host memory of the full job, in words: what the loader and the writer may hold by their own settings."""
    from harvest.writer import WriterConfig

    job = get_preset("pythia-410m")
    rows, row = job.block_sequences * job.context, job.d_model * 2
    loader = 2 * job.window_blocks * rows * (row + 8) + job.batch * row  # 8: the order its rows are handed out in
    buffers = WriterConfig().buffers
    writer = buffers * job.n_layers * rows * row
    return (
        f"at the full job's shapes the loader holds at most {loader / 1e9:.2f} GB (two windows of {job.window_blocks} blocks "
        f"and a batch of {job.batch:,}; in GPU memory where there is one), the writer {writer / 1e9:.2f} GB ({buffers} blocks "
        f"of {job.n_layers} layers)"
    )
