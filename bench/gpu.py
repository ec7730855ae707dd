"""The GPU path in one call: is it right, how fast is it, what does the whole job come to.

    python -m bench gpu                # needs one NVIDIA GPU; five minutes and a half at most
    python -m bench gpu --dry          # the same code at tiny sizes on a CPU: does the script run to its end?

Correctness first, then what is worth most. Shapes are the published job's, weights and activations random. Each part is
guarded: one that fails is marked and the rest goes on; one that would take too long is not begun; results are written after
every part, to <gpu>.json; and what hangs is ended with what there is.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from bench import gpu_checks, limits, ours, project, report
from bench.lab import DRY, FULL, Lab, Row
from bench.ours import synchronize
from shared.cli import UserError
from train.kernels import TorchKernels
from train.step import pick_kernels

PACKAGES = ("torch", "triton", "transformers", "zarr", "numpy", "datasets", "sae-lens", "eai-sparsify")
MEMORY = Path("/dev/shm")
DENSE_GOAL, SPARSE_GOAL, SETTINGS_GOAL = 0.75, 0.011, 1.02  # of the matrix rate; seconds at L0 150; times one setting
WAITING_GOAL, LAYER_GOAL, JOB_GOAL = 0.01, 8 / 60, 3.0  # share of the time; hours, every step dense; hours, 72 SAEs
PROFILED_STEPS = 3
WAYS = {"dense": False, "sparse": True}


# ----------------------------------------------------------------------------------------------------------- the machine


def rates(lab: Lab) -> None:
    """What the device itself can do."""
    s, device = lab.sizes, str(lab.device)
    lab.keep("bf16 FLOP/s", limits.matmul_rate(side=s.side, device=device), "FLOP/s", f"square product, side {s.side}")
    five = limits.five_products(tokens=s.tokens, d=s.d, features=s.features, device=device)
    seconds = lab.median(five.run)
    lab.keep("five products, seconds", seconds, "s", "; ".join(f"{p.name} {p.layout}" for p in five.products))
    lab.keep("five products, tokens/s", s.tokens / seconds, "tokens/s")
    lab.keep("five products, share of the matrix rate", five.flop / seconds / lab.figures["bf16 FLOP/s"])
    for name, copy in limits.copies(size=s.copy_bytes, device=device).items():
        lab.keep(f"{name}, bytes/s", copy.bytes / lab.median(copy.run), "bytes/s")


# ------------------------------------------------------------------------------------------------------------------- step


def new_steps(lab: Lab, count: int, *, sparse: bool) -> ours.Steps:
    s = lab.sizes
    saes = [ours.training_sae(d=s.d, features=s.features, device=lab.device, sparse=sparse, seed=i) for i in range(count)]
    for sae in saes:
        sae.kernels = lab.kernels
        if sparse:
            ours.set_l0(sae, s.common_l0)
    return ours.Steps(saes=saes, workspace=ours.workspace(s.tokens, s.d, s.features, lab.device), tokens=s.tokens)


def keep_step(lab: Lab, name: str, seconds: float, note: str, saes: int = 1) -> None:
    """A step as seconds, tokens a second, share of the matrix rate, and the bytes a second that the disk must deliver."""
    s = lab.sizes
    rate = saes * s.tokens / seconds
    lab.keep(f"{name}, seconds", seconds, "s", note)
    lab.keep(f"{name}, tokens/s", rate, "tokens/s")
    if matrix := lab.figures.get("bf16 FLOP/s"):
        share, note = 10 * s.d * s.features * rate / matrix, "of the dense arithmetic"
        if name == "dense step":
            lab.goal(f"{name}, share of the matrix rate", share, "≥", DENSE_GOAL)
        else:
            lab.keep(f"{name}, share of the matrix rate", share, "", note)
    if five := lab.figures.get("five products, seconds"):
        lab.keep(f"{name}, times as fast as five products", saes * five / seconds)
    lab.keep(f"{name}, bytes/s", s.tokens * s.d * 2 / seconds, "bytes/s", "activations used up")


def dense(lab: Lab) -> None:
    lab.reset_peak()
    steps = new_steps(lab, 1, sparse=False)
    seconds = lab.median(steps.run, warm=3)
    keep_step(lab, "dense step", seconds, steps.note())
    lab.keep("peak GPU memory, one SAE dense", lab.peak(), "bytes")


def sparse(lab: Lab) -> None:
    """Against L0, to find where dense is the faster one; and once as unevenly active as trained SAEs are."""
    steps = new_steps(lab, 1, sparse=True)
    sae, found, s = steps.saes[0], {}, lab.sizes
    for l0 in s.l0s:
        ours.set_l0(sae, l0)
        found[l0] = lab.median(steps.run, warm=3, rounds=min(5, s.rounds))
        if l0 == s.common_l0:
            keep_step(lab, "sparse step", found[l0], steps.note())
            lab.goal(f"sparse step at L0 {l0}", found[l0], "≤", SPARSE_GOAL, "s")
        else:
            lab.keep(f"sparse step at L0 {l0}, seconds", found[l0], "s", steps.note())
    ours.set_skewed_l0(sae, s.common_l0)
    keep_step(lab, "sparse step, uneven", lab.median(steps.run, warm=3, rounds=min(5, s.rounds)), steps.note())
    if at := lab.figures.get("dense step, seconds"):
        lab.say("crossover", crossover(found, at), "L0", "below it sparse is faster; -1: none up to the largest L0 tried")


def crossover(found: dict[int, float], dense_seconds: float) -> float:
    """The L0 at which the sparse step takes as long as the dense one, by straight lines between the points."""
    points = sorted(found.items())
    if points[0][1] >= dense_seconds:
        return 0.0
    for (low, fast), (high, slow) in pairwise(points):
        if fast < dense_seconds <= slow:
            return low + (high - low) * (dense_seconds - fast) / (slow - fast)
    return -1.0


def three(lab: Lab) -> None:
    """Three settings on one stream, at the full shape: the published settings differ in λ and L0, not in cost."""
    s = lab.sizes
    # What training adds on the device: two shuffle windows of the preset's 16 full-size blocks.
    windows = 2 * 16 * s.sequences * s.context * s.d * 2
    for way, is_sparse in WAYS.items():
        lab.reset_peak()
        steps = new_steps(lab, 3, sparse=is_sparse)
        seconds = lab.median(steps.run, warm=2)
        keep_step(lab, f"three {way} settings", seconds, steps.note(), saes=3)
        lab.keep(f"{way} SAE tokens/s", 3 * s.tokens / seconds, "tokens/s")
        if one := lab.figures.get(f"{way} step, seconds"):
            lab.goal(f"three {way} settings, over three times one", seconds / 3 / one, "≤", SETTINGS_GOAL)
        peak = lab.peak() + windows
        lab.keep(f"peak GPU memory, three {way} settings and the loader's windows", peak, "bytes")
        lab.figures["peak GPU bytes"] = max(lab.figures.get("peak GPU bytes", 0.0), peak)
        del steps


# ----------------------------------------------------------------------------------------------------------------- loader


def loader(lab: Lab) -> None:
    """Files to shuffled batches on the device: alone, and under three SAEs; from the disk, and from memory."""
    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=1, rows=s.layer_blocks * s.sequences * s.context, context=s.context)
    size = spec.n_blocks * spec.block_bytes
    for where, folder in (("disk", lab.scratch), ("memory", lab.memory)):
        if not fits(lab, f"loader from {where}", folder, size):
            continue
        cache = ours.new_cache(folder / "layer", spec)
        try:
            ours.write_cache(cache, threads=lab.threads)
            seconds = lab.median(partial(_read_once, lab, cache, where == "disk"), rounds=2)
            lab.keep(f"loader from {where}, bytes/s", size / seconds, "bytes/s", f"{lab.threads} threads, checksums, shuffle")
            if where == "disk":
                lab.keep("read bytes/s", size / seconds, "bytes/s")
                raw = lab.median(partial(ours.raw_read, cache, lab.threads, direct=lab.cuda), warm=0, rounds=2)
                lab.keep("raw read bytes/s", size / raw, "bytes/s", f"{lab.threads} threads, cold page cache")
            for way in WAYS:
                _waiting(lab, cache, way, where)
        finally:
            shutil.rmtree(folder / "layer", ignore_errors=True)


def _new_loader(lab: Lab, cache: Any, epochs: int) -> Any:
    from train.loader import ActivationLoader, LoaderConfig

    batch = min(lab.sizes.tokens, cache.spec.block_rows)
    config = LoaderConfig(batch=batch, window_blocks=lab.sizes.window_blocks, threads=lab.threads)
    return ActivationLoader(cache, 0, config, lab.device, last=epochs * cache.spec.train_tokens // batch)


def _read_once(lab: Lab, cache: Any, cold: bool) -> float:
    if cold:
        ours.evict_blocks(cache)
    stream = _new_loader(lab, cache, 1)
    start = time.perf_counter()
    for _ in stream:
        pass
    synchronize(lab.device)
    return time.perf_counter() - start


def _waiting(lab: Lab, cache: Any, way: str, where: str) -> None:
    """The share of the time that is not spent in steps. What a step takes is measured before and after, on a ready batch."""
    s = lab.sizes
    steps = new_steps(lab, 3, sparse=WAYS[way])
    ready = torch.randn(min(s.tokens, cache.spec.block_rows), s.d, device=lab.device).half()

    def alone() -> float:
        synchronize(lab.device)
        start = time.perf_counter()
        for _ in range(s.ready_steps):
            steps.take(ready)
        synchronize(lab.device)
        return (time.perf_counter() - start) / s.ready_steps

    alone()
    before = alone()
    began, seen = time.perf_counter(), 0
    batches = iter(_new_loader(lab, cache, 2))
    steps.take(next(batches))  # the first window has nothing to hide behind; it is once in a layer
    synchronize(lab.device)
    start = time.perf_counter()
    for x in batches:
        steps.take(x)
        seen += 1
    synchronize(lab.device)
    seconds = time.perf_counter() - start
    after = alone()
    share = 1 - seen * (before + after) / 2 / seconds
    note = (
        f"{seen} batches, {seen * ready.numel() * 2 / seconds / 1e9:.2f} GB/s; a step on a ready batch {before:.4f} s before, "
        f"{after:.4f} s after; {start - began:.2f} s until the first batch was done"
    )
    lab.goal(f"waiting, three {way} SAEs fed from {where}", share, "<", WAITING_GOAL, note=note)


# ---------------------------------------------------------------------------------------------------------------- harvest


def forward_flop(lab: Lab) -> float:
    """Of one token: the blocks' products, and causal attention over half a context on average."""
    s = lab.sizes
    return s.layers * (24 * s.d**2 + 2 * s.context * s.d)


def language_model(lab: Lab) -> Any:
    from harvest.model import ResidualModel

    if lab.model is None:
        config = ours.lm_config(d=lab.sizes.d, layers=lab.sizes.layers, vocab=lab.sizes.vocab)
        base = ours.base_model(config, torch.bfloat16, lab.device)
        lab.model = ResidualModel(base, tuple(range(lab.sizes.layers)), lab.device)
    return lab.model


def forward_round(lab: Lab) -> ours.Harvest:
    s = lab.sizes
    data = torch.empty(s.layers, s.sequences * s.context, s.d, dtype=torch.float16, device=lab.device)
    return ours.Harvest(model=language_model(lab), data=data, context=s.context, vocab=s.vocab)


def forward(lab: Lab) -> None:
    """The language model with the harvest's hooks, beside plain transformers; no copy off the device, no writing."""
    s = lab.sizes
    rows = s.sequences * s.context
    run = forward_round(lab)
    seconds = lab.median(run.run, warm=2)
    lab.keep("forward tokens/s", rows / seconds, "tokens/s", "float16 and row order included")
    if rate := lab.figures.get("bf16 FLOP/s"):
        lab.keep("forward, share of the matrix rate", forward_flop(lab) * rows / seconds / rate)
    base = run.model.model
    lab.keep("its linear layers alone", rows / lab.median(ours.products_of(base, rows, lab.device)), "tokens/s")
    config = ours.lm_config(d=s.d, layers=s.layers, vocab=s.vocab)
    plain = ours.plain(ours.base_model(config, torch.bfloat16, lab.device), rows, s.context, s.vocab, lab.device)
    lab.keep("transformers tokens/s", rows / lab.median(plain), "tokens/s", "base model, output_hidden_states")


def compiled_forward(lab: Lab) -> None:
    """torch.compile on every block (the hooks stay outside). Compiling takes its time, so this part comes last."""
    from torch import _dynamo

    _dynamo.config.cache_size_limit = max(64, 2 * lab.sizes.layers)
    run = forward_round(lab)
    for block in next(m for m in run.model.model.children() if isinstance(m, nn.ModuleList)):
        # On a CPU this only proves that the blocks can be traced; a real compiler would take a minute.
        block.forward = torch.compile(block.forward, backend="eager" if lab.dry else "inductor")
    began = time.perf_counter()
    run.run()
    lab.say("first compiled pass", time.perf_counter() - began, "s")
    rate = lab.sizes.sequences * lab.sizes.context / lab.median(run.run, warm=2)
    gain = f"{rate / lab.figures['forward tokens/s']:.2f} x without" if "forward tokens/s" in lab.figures else ""
    lab.keep("compiled forward tokens/s", rate, "tokens/s", gain)
    lab.model = None


def harvest(lab: Lab) -> None:
    """End to end, as `python -m harvest` runs it: forward, copy, checksums, durable writing, ledger."""
    for where, folder in (("disk", lab.scratch), ("memory", lab.memory)):
        _harvest_to(lab, where, folder)


def _harvest_to(lab: Lab, where: str, folder: Path) -> None:
    from harvest.harvest import HarvestConfig, harvest_blocks, verify
    from harvest.writer import WriterConfig

    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=s.layers, rows=s.blocks * s.sequences * s.context, context=s.context, vocab=s.vocab)
    if not fits(lab, f"harvest to {where}", folder, spec.n_blocks * spec.block_bytes * spec.n_layers):
        return
    model, cache = language_model(lab), ours.cache_with_tokens(folder / "harvest", spec)
    config = HarvestConfig(device=lab.device, forward_sequences=s.sequences, writer=WriterConfig(threads=lab.threads))
    try:
        harvest_blocks(cache, model, [0], config)  # also locks the host buffers, which the next call finds ready
        synchronize(lab.device)
        blocks = list(range(1, spec.n_blocks))
        start = time.perf_counter()
        shares = harvest_blocks(cache, model, blocks, config)
        seconds = time.perf_counter() - start
        damaged = verify(cache, cache.layers, lab.threads).lines
    finally:
        shutil.rmtree(folder / "harvest", ignore_errors=True)
    rows, size = len(blocks) * spec.block_rows, len(blocks) * spec.block_bytes * spec.n_layers
    lab.keep(f"harvest to {where}, tokens/s", rows / seconds, "tokens/s", f"{lab.threads} threads, {shares}")
    lab.keep(f"harvest to {where}, bytes/s", size / seconds, "bytes/s")
    lab.require(f"harvest to {where}: every block as its ledger says", not damaged, f"{len(damaged)} damaged")


def fits(lab: Lab, what: str, folder: Path, needed: int) -> bool:
    from shared.files import free_bytes

    free = free_bytes(folder)
    if free < 1.2 * needed:
        lab.say(what, verdict="skipped", note=f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    return free >= 1.2 * needed


def writing(lab: Lab) -> None:
    """The writer alone against the disk alone, with as many threads, taking turns."""
    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=s.layers, rows=s.sequences * s.context, context=s.context)
    writes = ours.Writes(folder=lab.scratch / "write", spec=spec, threads=lab.threads)
    if not fits(lab, "writer", lab.scratch, 2 * writes.payload):
        return
    timings = report.Rounds({"ours": writes.run, "raw": writes.best_raw}).measure(min(2, s.rounds))
    shutil.rmtree(writes.folder)
    for name, timing in timings.items():
        if not timing.seconds:
            raise RuntimeError(f"{name}: {timing.failure}")
    raw, own = writes.payload / timings["raw"].median, writes.payload / timings["ours"].median
    lab.keep("raw write bytes/s", raw, "bytes/s", f"{lab.threads} threads, fsync")
    lab.keep("write bytes/s", own, "bytes/s", f"{own / raw:.0%} of raw; {writes.note()}")


# ---------------------------------------------------------------------------------------------------------------- profile


def profiles(lab: Lab) -> None:
    """Where the device's time goes, and how busy it is: what CUDA graphs could gain at most is the rest."""
    for way, is_sparse in WAYS.items():
        _profile(lab, f"{way} step", new_steps(lab, 1, sparse=is_sparse).run, steps=PROFILED_STEPS)
        lab.free()
    _profile(lab, "forward", forward_round(lab).run, steps=1)


def _profile(lab: Lab, name: str, run: Callable[[], object], *, steps: int) -> None:
    """Where the device's time goes, and how busy it is: what CUDA graphs could gain at most is the rest."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if lab.cuda else [])
    run()
    synchronize(lab.device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize(lab.device)
    wall = time.perf_counter() - start
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        synchronize(lab.device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == lab.cuda:
            took = event.self_device_time_total if lab.cuda else event.self_cpu_time_total
            found[event.key] = found.get(event.key, 0.0) + took / 1e6
    total = sum(found.values())
    lab.keep(f"{name}: device busy", total / wall, "", "of the time without the profiler")
    for key, seconds in sorted(found.items(), key=lambda item: -item[1])[:8]:
        lab.say(f"  {_short(key)}", seconds / steps * 1e3, "ms", f"{seconds / total:.0%}")


def _short(kernel: str) -> str:
    name = re.sub(r"<.*|\(.*", "", re.sub(r"^void ", "", kernel)) or kernel
    return name[-50:]


# ------------------------------------------------------------------------------------------------------------------ peers


def peers(lab: Lab) -> None:
    """The step of others in this process, where they can be imported; plain bf16 autograd always."""
    for worker, package in (("autograd_bf16", "torch"), ("sae_lens", "sae_lens"), ("sparsify", "sparsify")):
        if importlib.util.find_spec(package) is None:
            lab.say(f"peer {worker}", verdict="absent", note=f"{package} is not installed")
            continue
        lab.attempt(f"peer {worker}", partial(_peer, lab, worker))
        torch.set_float32_matmul_precision("highest")  # peers set it as they like
        lab.free()


def _peer(lab: Lab, worker: str) -> None:
    """At our number of tokens a step, or a quarter of it where that does not fit into the memory."""
    from bench.workers.worker import Job, timed

    def timed_step(prepared: Any, job: Job) -> float:
        return timed(prepared, job)["seconds"]

    s = lab.sizes
    for tokens in (s.tokens, s.tokens // 4):
        job = Job(d=s.d, features=s.features, tokens=tokens, threads=1, device=lab.device.type, directory=lab.scratch)
        try:
            prepared = importlib.import_module(f"bench.workers.{worker}").prepare(job)
            seconds = lab.median(partial(timed_step, prepared, job), warm=2, rounds=min(5, s.rounds))
            break
        except torch.OutOfMemoryError:
            prepared = None
            lab.free()
    else:
        raise RuntimeError("not enough memory")
    rate = tokens / seconds
    found = [
        f"ours {way} {lab.figures[f'{way} step, tokens/s'] / rate:.2f} x"
        for way in WAYS
        if f"{way} step, tokens/s" in lab.figures
    ]
    note = ", ".join([*found, f"{tokens} tokens", prepared.version, prepared.note])
    lab.keep(f"peer {worker}, tokens/s", rate, "tokens/s", note)


# ------------------------------------------------------------------------------------------------------------- projection


def projection(lab: Lab) -> None:
    parts = project.from_figures(lab.figures, machine=_name(lab), date=report.today(), scaled=_scaled(lab))
    for line in project.table(parts, project.Job()).splitlines():
        lab.say(line)
    whole, layer = (project.hours(parts, project.Job(layers=layers)) for layers in (project.Job().layers, 1))
    lab.goal("one layer, three settings, 300M tokens, every step dense", 60 * layer.dense, "≤", 60 * LAYER_GOAL, "min")
    lab.goal("72 SAEs once cached, every step dense", whole.dense, "≤", JOB_GOAL, "h")
    lab.keep("one layer, three settings, 300M tokens, every step sparse", 60 * layer.sparse, "min")
    lab.keep("72 SAEs once cached, every step sparse", whole.sparse, "h")


def _scaled(lab: Lab) -> float:
    return lab.sizes.d * lab.sizes.features / (project.D * project.FEATURES)


# ------------------------------------------------------------------------------------------------------------- the script


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    title: str
    run: Callable[[Lab], None]
    seconds: float  # expected on an H100


PARTS = tuple(
    Part(title=title, run=run, seconds=seconds)
    for title, run, seconds in (
        ("direct input and output", gpu_checks.direct_io, 2),
        ("step against its definition", gpu_checks.step, 40),
        ("kill and resume", gpu_checks.resume, 20),
        ("harvested activations against fp32 on the CPU", gpu_checks.activations, 12),
        ("float16 range", gpu_checks.half_range, 1),
        ("the machine's rates", rates, 8),
        ("dense step", dense, 4),
        ("sparse step", sparse, 5),
        ("three settings at once", three, 9),
        ("loader", loader, 50),
        ("language model forward", forward, 6),
        ("harvest end to end", harvest, 35),
        ("writer alone", writing, 25),
        ("projection", projection, 0),
        ("peers", peers, 40),
        ("where the time goes", profiles, 12),
        ("compiled forward", compiled_forward, 60),
    )
)


@dataclass(kw_only=True, slots=True)
class Done:
    """A part as it went; `status` is "done", "FAILED" (an exception, or a check that does not hold), "skipped", "stopped"."""

    title: str
    status: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"\n{self.title}: {self.status} ({self.seconds:.1f} s)", *map(str, self.rows)])


@dataclass(kw_only=True, slots=True)
class Session:
    """Runs the parts, one after the other, and keeps what there is in a file; `end_now` may be called by another thread."""

    lab: Lab
    path: Path | None
    last_begin: float  # seconds after the start: a part begins only if it is expected to end by then
    began: float = field(default_factory=time.monotonic)
    done: list[Done] = field(default_factory=list)
    running: Done | None = None

    def run(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.lab.rows = []
            self.running = Done(title=part.title, status="stopped", rows=self.lab.rows)
            if self.elapsed + part.seconds > self.last_begin:
                self.running.status = "skipped"
            else:
                self._run_part(part, self.running)
            self.done.append(self.running)
            click.echo(str(self.running))
            self.running = None
            self.save()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def _run_part(self, part: Part, done: Done) -> None:
        start = time.perf_counter()
        self.lab.attempt(part.title, lambda: part.run(self.lab))
        self.lab.attempt("freeing memory", self.lab.free)  # after an error on the device even this can fail
        done.seconds = time.perf_counter() - start
        done.status = "FAILED" if any(row.verdict == "FAILED" for row in done.rows) else "done"

    def save(self) -> None:
        if self.path is None:
            return
        lab = self.lab
        about: dict[str, Any] = {
            "kind": "gpu",
            "dry": lab.dry,
            "date": report.today(),
            "seconds": self.elapsed,
            "machine": asdict(report.machine()) | {"gpu": _name(lab)},
            "memory": torch.cuda.get_device_properties(lab.device).total_memory if lab.cuda else 0,
            "versions": _versions(),
            "sizes": asdict(lab.sizes),
            "scaled": _scaled(lab),
            "goals": [asdict(goal) for goal in lab.goals],
            "figures": lab.figures,
            "parts": [asdict(part) for part in self.done],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        counts = [f"{sum(part.status == status for part in self.done)} {status}" for status in ("done", "FAILED", "skipped")]
        return "\n".join(["\ngoals", *map(str, self.lab.goals), f"\n{', '.join(counts)}, {self.elapsed:.0f} s"])

    def end_now(self) -> None:
        """The hard stop: whatever runs, or hangs, is given up, and what was found is shown and kept."""
        if self.running is not None:
            self.done.append(self.running)
            click.echo(str(self.running))
        self.save()
        click.echo(f"{self.summary()}\nstopped at the hard limit")
        for folder in (self.lab.scratch, self.lab.memory):
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        os._exit(3)


def _name(lab: Lab) -> str:
    return torch.cuda.get_device_name(lab.device) if lab.cuda else f"dry run on {platform.machine()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _kernels(device: torch.device) -> TorchKernels:
    if device.type == "cuda":
        return pick_kernels("bf16", device)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from train.triton_kernels import TritonKernels

        return TritonKernels()
    return TorchKernels()


@click.command()
@click.option("--dry", is_flag=True, help="Tiny sizes on the CPU: prove that the script runs to its end.")
@click.option("--minutes", default=5.2, show_default=True, help="No part begins that is not expected to end by then.")
@click.option("--hard-stop", default=5.6, show_default=True, help="Minutes after which everything ends, with what there is.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <gpu>.json [default: bench/results; none if dry].")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder on the disk to be measured [default: build/bench].")
@click.option("--only", multiple=True, help="Parts whose title contains this.")
@click.option("--threads", default=16, show_default=True, help="Reader and writer threads.")
def command(
    dry: bool, minutes: float, hard_stop: float, out: Path | None, scratch: Path | None, only: tuple[str, ...], threads: int
) -> int:
    """Check and time everything on one NVIDIA GPU, in one call of under six minutes."""
    if not dry and not torch.cuda.is_available():
        raise UserError(
            "python -m bench gpu needs an NVIDIA GPU, and there is none here; --dry runs it at tiny sizes on the CPU"
        )
    # cuBLAS reads it when it starts; without it the resume check could not be bit-identical.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}  # for the peers: no network, no tracking
    if dry:
        torch.set_num_threads(1)  # the sizes are too small to share
    device = torch.device("cpu" if dry else "cuda")
    disk = scratch or report.RESULTS.parent.parent / "build" / "bench"
    disk.mkdir(parents=True, exist_ok=True)
    memory = MEMORY if MEMORY.is_dir() else disk
    folder = out or (None if dry else report.RESULTS)
    with (
        tempfile.TemporaryDirectory(dir=disk, prefix="gpu-") as on_disk,
        tempfile.TemporaryDirectory(dir=memory, prefix="bench-gpu-") as in_memory,
    ):
        lab = Lab(
            device=device, sizes=DRY if dry else FULL, kernels=_kernels(device), scratch=Path(on_disk),
            memory=Path(in_memory), threads=threads, dry=dry,
        )  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "-", _name(lab).lower().replace("nvidia", "")).strip("-")
        path = folder / f"{name}.json" if folder else None
        session = Session(lab=lab, path=path, last_begin=60 * minutes)
        about = ", ".join(f"{name} {found}" for name, found in _versions().items())
        click.echo(f"{_name(lab)}, {type(lab.kernels).__name__}, {report.today()}; {about}")
        timer = threading.Timer(60 * hard_stop, session.end_now)
        timer.daemon = True
        timer.start()
        # And where the interpreter itself is held up, so that no thread of its own runs: results were saved part by part.
        faulthandler.dump_traceback_later(60 * hard_stop + 15, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            session.run([part for part in PARTS if not only or any(word in part.title for word in only)])
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
        click.echo(session.summary())
    return 1 if any(part.status == "FAILED" for part in session.done) else 0
