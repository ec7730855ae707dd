"""The GPU path in one call: is it right, how fast is it, what does the whole job come to.

    python -m bench gpu                # needs one NVIDIA GPU; under ten minutes
    python -m bench gpu --dry          # the same code at tiny sizes on a CPU: does the script run to its end?

Correctness first, timings after, each part guarded: one that fails is marked and the rest goes on. Shapes are the
published job's, weights and activations random. Results are written after every part, to results/<gpu>.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
from train.kernels import TorchKernels, Workspace
from train.step import TrainingSae, pick_kernels

PACKAGES = ("torch", "triton", "transformers", "zarr", "numpy", "datasets", "sae-lens", "eai-sparsify")
MEMORY = Path("/dev/shm")
DENSE_GOAL, LAYER_GOAL, JOB_GOAL = 0.70, 10 / 60, 4.0  # of the matrix rate; hours
PROFILED_STEPS = 3
Part = Callable[[Lab], None]


# ----------------------------------------------------------------------------------------------------------- the machine


def rates(lab: Lab) -> None:
    """What the device itself can do."""
    s, device = lab.sizes, str(lab.device)
    lab.keep("bf16 FLOP/s", limits.matmul_rate(side=s.side, device=device), "FLOP/s", f"square product, side {s.side}")
    five = limits.five_products(tokens=s.tokens, d=s.d, features=s.features, device=device)
    seconds = lab.median(five.run)
    lab.keep("five products, seconds", seconds, "s", "; ".join(f"{p.name} {p.layout}" for p in five.products))
    lab.keep("five products, tokens/s", s.tokens / seconds, "tokens/s")
    share = five.flop / seconds / lab.figures["bf16 FLOP/s"]
    lab.say("five products, share of the matrix rate", share, "")
    for name, copy in limits.copies(size=s.copy_bytes, device=device).items():
        lab.keep(f"{name}, bytes/s", copy.bytes / lab.median(copy.run), "bytes/s")


# ---------------------------------------------------------------------------------------------------------------- harvest


def forward_flop(lab: Lab) -> float:
    """Of one token: the blocks' products, and causal attention over half a context on average."""
    s = lab.sizes
    return s.layers * (24 * s.d**2 + 2 * s.context * s.d)


def new_model(lab: Lab) -> Any:
    from harvest.model import ResidualModel

    config = ours.lm_config(d=lab.sizes.d, layers=lab.sizes.layers, vocab=lab.sizes.vocab)
    return ResidualModel(ours.base_model(config, torch.bfloat16), tuple(range(lab.sizes.layers)), lab.device)


def forward_round(lab: Lab, model: Any) -> ours.Harvest:
    s = lab.sizes
    data = torch.empty(s.layers, s.sequences * s.context, s.d, dtype=torch.float16, device=lab.device)
    return ours.Harvest(model=model, data=data, context=s.context, vocab=s.vocab)


def forward(lab: Lab) -> None:
    """The language model with the harvest's hooks, beside plain transformers; no copy off the device, no writing."""
    s = lab.sizes
    rows = s.sequences * s.context
    model = new_model(lab)
    run = forward_round(lab, model).run
    seconds = lab.median(run, warm=2)
    lab.keep("forward tokens/s", rows / seconds, "tokens/s", "float16 and row order included")
    rate = lab.figures.get("bf16 FLOP/s")
    if rate:
        lab.say("forward, share of the matrix rate", forward_flop(lab) * rows / seconds / rate)
    products = ours.products_of(model.model, rows, lab.device)
    lab.say("its linear layers alone", rows / lab.median(products), "tokens/s")
    config = ours.lm_config(d=s.d, layers=s.layers, vocab=s.vocab)
    base = ours.base_model(config, torch.bfloat16).to(lab.device)
    plain = ours.plain(base, rows, s.context, s.vocab, lab.device)
    lab.keep("transformers tokens/s", rows / lab.median(plain), "tokens/s", "base model, output_hidden_states")
    _profile(lab, "forward", run, steps=1)


def compiled_forward(lab: Lab) -> None:
    """torch.compile on every block (the hooks stay outside). Compiling takes its time, so this part comes late."""
    from torch import _dynamo

    _dynamo.config.cache_size_limit = max(64, 2 * lab.sizes.layers)
    model = new_model(lab)
    blocks = next(m for m in model.model.children() if isinstance(m, nn.ModuleList))
    for block in blocks:
        # On a CPU this only proves that the blocks can be traced; a real compiler would take a minute.
        block.forward = torch.compile(block.forward, backend="eager" if lab.dry else "inductor")
    run = forward_round(lab, model).run
    began = time.perf_counter()
    run()
    lab.say("first compiled pass", time.perf_counter() - began, "s")
    rate = lab.sizes.sequences * lab.sizes.context / lab.median(run, warm=2)
    gain = f"{rate / lab.figures['forward tokens/s']:.2f} x without" if "forward tokens/s" in lab.figures else ""
    lab.keep("compiled forward tokens/s", rate, "tokens/s", gain)


def harvest(lab: Lab) -> None:
    """End to end, as `python -m harvest` runs it: forward, copy, checksums, durable writing, ledger."""
    model = new_model(lab)
    for where, folder in (("disk", lab.scratch), ("memory", lab.memory)):
        _harvest_to(lab, model, where, folder)


def _harvest_to(lab: Lab, model: Any, where: str, folder: Path) -> None:
    from harvest.harvest import HarvestConfig, harvest_blocks
    from harvest.writer import WriterConfig

    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=s.layers, rows=s.blocks * s.sequences * s.context, vocab=s.vocab)
    needed = spec.n_blocks * spec.block_bytes * spec.n_layers
    if not _fits(lab, f"harvest to {where}", folder, needed):
        return
    cache = ours.cache_with_tokens(folder / "harvest", spec)
    config = HarvestConfig(device=lab.device, forward_sequences=s.sequences, writer=WriterConfig(threads=lab.threads))
    try:
        harvest_blocks(cache, model, [0], config)  # also locks the host buffers, which the next call finds ready
        synchronize(lab.device)
        blocks = list(range(1, spec.n_blocks)) or [0]
        start = time.perf_counter()
        shares = harvest_blocks(cache, model, blocks, config)
        seconds = time.perf_counter() - start
        damaged = sum(_damaged(cache, layer, block) for layer in cache.layers for block in range(spec.n_blocks))
    finally:
        shutil.rmtree(folder / "harvest", ignore_errors=True)
    rows, size = len(blocks) * spec.block_rows, len(blocks) * spec.block_bytes * spec.n_layers
    lab.keep(f"harvest to {where}, tokens/s", rows / seconds, "tokens/s", f"{lab.threads} threads, {shares}")
    lab.keep(f"harvest to {where}, bytes/s", size / seconds, "bytes/s")
    lab.require(f"harvest to {where}: every block as its ledger says", damaged == 0, f"{damaged} damaged")


def _damaged(cache: Any, layer: int, block: int) -> bool:
    data = torch.empty(cache.spec.block_rows, cache.spec.d_model, dtype=torch.float16).numpy()
    try:
        cache.read_block(layer, block, data)
        cache.check_block(layer, block, data, cache.stats(layer, block))
    except UserError as damage:
        print(f"{damage}", file=sys.stderr)
        return True
    return False


def _fits(lab: Lab, what: str, folder: Path, needed: int) -> bool:
    from shared.files import free_bytes

    free = free_bytes(folder)
    if free < 1.2 * needed:
        lab.say(what, verdict="skipped", note=f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    return free >= 1.2 * needed


def writing(lab: Lab) -> None:
    """The writer alone against the disk alone, with as many threads."""
    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=s.layers, rows=s.sequences * s.context)
    writes = ours.Writes(folder=lab.scratch / "write", spec=spec, threads=lab.threads)
    if not _fits(lab, "writer", lab.scratch, 2 * writes.payload):
        return
    timings = report.Rounds({"ours": writes.run, "raw": writes.best_raw}).measure(min(3, s.rounds))
    for name, timing in timings.items():
        if not timing.seconds:
            raise RuntimeError(f"{name}: {timing.failure}")
    raw, own = writes.payload / timings["raw"].median, writes.payload / timings["ours"].median
    lab.keep("raw write bytes/s", raw, "bytes/s", f"{lab.threads} threads, fsync")
    lab.keep("write bytes/s", own, "bytes/s", f"{own / raw:.0%} of raw; {writes.note()}")


# ----------------------------------------------------------------------------------------------------------------- loader


def loader(lab: Lab) -> None:
    """Disk to shuffled batches on the device: alone, and behind three sparse SAEs."""
    s = lab.sizes
    spec = ours.cache_spec(d=s.d, n_layers=1, rows=s.layer_blocks * s.sequences * s.context)
    if not _fits(lab, "loader", lab.scratch, spec.n_blocks * spec.block_bytes):
        return
    cache = ours.new_cache(lab.scratch / "layer", spec)
    try:
        ours.write_cache(cache, threads=lab.threads)
        _loader_alone(lab, cache)
        lab.free()
        _loader_with_steps(lab, cache)
    finally:
        shutil.rmtree(lab.scratch / "layer", ignore_errors=True)


def _new_loader(lab: Lab, cache: Any, epochs: int) -> Any:
    from train.loader import ActivationLoader, LoaderConfig

    batch = min(lab.sizes.tokens, cache.spec.block_rows)
    config = LoaderConfig(batch=batch, window_blocks=lab.sizes.window_blocks, threads=lab.threads)
    return ActivationLoader(cache, 0, config, lab.device, last=epochs * cache.spec.train_tokens // batch)


def _loader_alone(lab: Lab, cache: Any) -> None:
    size = cache.spec.n_blocks * cache.spec.block_bytes
    stream = _new_loader(lab, cache, 1)

    def run(*, cold: bool) -> float:
        if cold:
            ours.evict_blocks(cache)
        start = time.perf_counter()
        for _ in stream:
            pass
        synchronize(lab.device)
        return time.perf_counter() - start

    warm = size / lab.median(lambda: run(cold=False), rounds=3)
    lab.keep("loader from page cache, bytes/s", warm, "bytes/s", f"{lab.threads} threads, checksums, device shuffle")
    try:
        lab.keep("read bytes/s", size / lab.median(lambda: run(cold=True), warm=0, rounds=2), "bytes/s", "cold page cache")
    except RuntimeError as refused:
        lab.keep("read bytes/s", warm, "bytes/s", f"NOT cold, the disk is not in it: {refused}")


def _loader_with_steps(lab: Lab, cache: Any) -> None:
    for name, sparse in (("dense", False), ("sparse", True)):
        s = lab.sizes
        saes = new_saes(lab, 3, sparse=sparse)
        workspace = Workspace(s.tokens, s.d, s.features, "bf16", lab.device)
        stream = _new_loader(lab, cache, 2)
        batches = iter(stream)
        first = next(batches)  # the first window has nothing to hide behind; it is once in a layer
        for sae in saes:
            sae.step(first, lr=ours.LR, l1=ours.L1, workspace=workspace)
        synchronize(lab.device)
        waited, start, seen = stream.waited, time.perf_counter(), 0
        for x in batches:
            for sae in saes:
                sae.step(x, lr=ours.LR, l1=ours.L1, workspace=workspace)
            seen += len(x)
        synchronize(lab.device)
        seconds = time.perf_counter() - start
        share = (stream.waited - waited) / seconds
        note = f"{seen * s.d * 2 / seconds / 1e9:.2f} GB/s asked for, page cache warm, after the first batch; goal below 0.02"
        lab.keep(f"wait share, three {name} SAEs", share, "", note)
        del saes, workspace, stream, batches, first, x
        lab.free()


# ------------------------------------------------------------------------------------------------------------------- step


def new_saes(lab: Lab, count: int, *, sparse: bool) -> list[TrainingSae]:
    s = lab.sizes
    saes = [ours.training_sae(d=s.d, features=s.features, device=lab.device, sparse=sparse, seed=i) for i in range(count)]
    for sae in saes:
        sae.kernels = lab.kernels
        if sparse:
            ours.set_l0(sae, s.common_l0)
    return saes


def new_steps(lab: Lab, count: int, *, sparse: bool) -> ours.Steps:
    s = lab.sizes
    workspace = Workspace(s.tokens, s.d, s.features, "bf16", lab.device)
    return ours.Steps(saes=new_saes(lab, count, sparse=sparse), workspace=workspace, tokens=s.tokens)


def dense(lab: Lab) -> None:
    lab.reset_peak()
    steps = new_steps(lab, 1, sparse=False)
    seconds = lab.median(steps.run, warm=3)
    s = lab.sizes
    lab.keep("dense step, seconds", seconds, "s", steps.note())
    lab.keep("dense tokens/s", s.tokens / seconds, "tokens/s")
    if rate := lab.figures.get("bf16 FLOP/s"):
        share = 10 * s.tokens * s.d * s.features / seconds / rate
        lab.say("dense step, share of the matrix rate", share, "", f"goal {DENSE_GOAL:g}")
    if five := lab.figures.get("five products, seconds"):
        lab.say("dense step, share of five products", five / seconds)
    lab.say("peak GPU memory, one SAE dense", lab.peak() / 1e9, "GB")
    _profile(lab, "dense step", steps.run, steps=PROFILED_STEPS)


def sparse(lab: Lab) -> None:
    """Against L0, to find where dense is the faster one; and once as unevenly active as trained SAEs are."""
    steps = new_steps(lab, 1, sparse=True)
    sae, found = steps.saes[0], {}
    five = lab.figures.get("five products, seconds")
    for l0 in lab.sizes.l0s:
        ours.set_l0(sae, l0)
        found[l0] = lab.median(steps.run, warm=3, rounds=min(5, lab.sizes.rounds))
        share = f"{five / found[l0]:.0%} of five products" if five else ""
        lab.keep(f"sparse step at L0 {l0}, seconds", found[l0], "s", f"{share}; {steps.note()}")
    ours.set_skewed_l0(sae, lab.sizes.common_l0)
    uneven = lab.median(steps.run, warm=3, rounds=min(5, lab.sizes.rounds))
    lab.keep(f"sparse step at L0 {lab.sizes.common_l0}, uneven, seconds", uneven, "s", steps.note())
    if at := lab.figures.get("dense step, seconds"):
        lab.say("crossover", _crossover(found, at), "L0", "below it sparse is faster; -1: none up to the largest L0 tried")
    ours.set_l0(sae, lab.sizes.common_l0)
    _profile(lab, "sparse step", steps.run, steps=PROFILED_STEPS)


def _crossover(found: dict[int, float], dense_seconds: float) -> float:
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
    for name, is_sparse in (("dense", False), ("sparse", True)):
        lab.reset_peak()
        steps = new_steps(lab, 3, sparse=is_sparse)
        seconds = lab.median(steps.run, warm=2)
        lab.keep(f"{name} SAE tokens/s", 3 * lab.sizes.tokens / seconds, "tokens/s", f"three at once; {steps.note()}")
        if not is_sparse and "dense step, seconds" in lab.figures:
            lab.say("three dense, over three times one", seconds / 3 / lab.figures["dense step, seconds"], "", "goal 1.02")
        lab.say(f"peak GPU memory, three SAEs {name}", lab.peak() / 1e9, "GB")
        # What training adds on the device: two shuffle windows of the preset's 16 full-size blocks.
        windows = 2 * 16 * lab.sizes.sequences * lab.sizes.context * lab.sizes.d * 2
        peak = max(lab.figures.get("peak GPU bytes", 0.0), lab.peak() + windows)
        lab.figures["peak GPU bytes"] = peak
        del steps
        lab.free()
    lab.say("peak GPU memory with the loader's two windows", lab.figures["peak GPU bytes"] / 1e9, "GB")


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
    lab.say(f"{name}: device busy", total / wall, "", "of the time without the profiler")
    for key, seconds in sorted(found.items(), key=lambda item: -item[1])[:10]:
        lab.say(f"  {_short(key)}", seconds / steps * 1e3, "ms", f"{seconds / total:.0%}")


def _short(kernel: str) -> str:
    name = re.sub(r"<.*|\(.*", "", re.sub(r"^void ", "", kernel)) or kernel
    return name[-50:]


# ------------------------------------------------------------------------------------------------------------------ peers


def peers(lab: Lab) -> None:
    """The step of others in this process, where they can be imported; plain bf16 autograd always."""
    from bench.workers.worker import Job

    s = lab.sizes
    job = Job(
        d=s.d, features=s.features, tokens=s.tokens, threads=torch.get_num_threads(), device=lab.device.type,
        directory=lab.scratch,
    )  # fmt: skip
    for worker, package in (("autograd_bf16", "torch"), ("sae_lens", "sae_lens"), ("sparsify", "sparsify")):
        if importlib.util.find_spec(package) is None:
            lab.say(f"peer {worker}", verdict="absent", note=f"{package} is not installed")
            continue
        try:
            _peer(lab, worker, job)
        except Exception as failure:
            traceback.print_exc()
            lab.say(f"peer {worker}", verdict="FAILED", note=_reason(failure))
        torch.set_float32_matmul_precision("highest")  # peers set it as they like
        lab.free()


def _peer(lab: Lab, worker: str, job: Any) -> None:
    from bench.workers.worker import timed

    prepared = importlib.import_module(f"bench.workers.{worker}").prepare(job)
    seconds = lab.median(lambda: timed(prepared, job)["seconds"], warm=2, rounds=min(5, lab.sizes.rounds))
    found = [
        f"ours {way} {seconds / lab.figures[key]:.2f} x"
        for way, key in (
            ("dense", "dense step, seconds"),
            ("sparse", f"sparse step at L0 {lab.sizes.common_l0}, seconds"),
        )
        if key in lab.figures
    ]
    note = ", ".join([*found, f"{prepared.version}, {prepared.note}"])
    lab.keep(f"peer {worker}, tokens/s", job.tokens / seconds, "tokens/s", note)


# ------------------------------------------------------------------------------------------------------------- projection


def projection(lab: Lab) -> None:
    parts = project.from_figures(lab.figures, machine=_name(lab), date=report.today(), scaled=_scaled(lab))
    whole = project.hours(parts, project.Job())
    layer = project.hours(parts, project.Job(layers=1))
    for line in project.table(parts, project.Job()).splitlines():
        lab.say(line)
    goals = [("one layer x 3 settings", layer, LAYER_GOAL), ("72 SAEs", whole, JOB_GOAL)]
    for name, hours, goal in goals:
        lab.say(f"{name}: training, dense", hours.dense, "h", f"goal {goal:.3g} h")
        lab.say(f"{name}: training, sparse", hours.sparse, "h", f"goal {goal:.3g} h")


def _scaled(lab: Lab) -> float:
    return lab.sizes.d * lab.sizes.features / (project.D * project.FEATURES)


# ------------------------------------------------------------------------------------------------------------- the script

CHECKS: tuple[tuple[str, Part], ...] = (
    ("kernels against the definition", gpu_checks.kernels),
    ("step against float64 autograd", gpu_checks.step),
    ("kill and resume", gpu_checks.resume),
    ("harvested activations against fp32 on the CPU", gpu_checks.activations),
    ("float16 range", gpu_checks.half_range),
)
TIMINGS: tuple[tuple[str, Part], ...] = (
    ("the machine's rates", rates),
    ("dense step", dense),
    ("sparse step", sparse),
    ("three settings at once", three),
    ("language model forward", forward),
    ("writer alone", writing),
    ("harvest end to end", harvest),
    ("loader", loader),
    ("peers", peers),
    ("compiled forward", compiled_forward),
)
LAST: tuple[tuple[str, Part], ...] = (("projection", projection),)


@dataclass(kw_only=True, slots=True)
class Done:
    """A part as it went; `status` is "done", "FAILED" (an exception, or a check that does not hold) or "skipped"."""

    title: str
    status: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


def run_part(lab: Lab, title: str, part: Part) -> Done:
    lab.rows = []
    start = time.perf_counter()
    failed = False
    try:
        part(lab)
    except Exception as failure:
        traceback.print_exc()
        lab.say(title, verdict="FAILED", note=_reason(failure))
    try:
        lab.free()  # after an error on the device even this can fail
    except Exception as failure:
        lab.say("freeing memory", verdict="FAILED", note=_reason(failure))
    failed = any(row.verdict == "FAILED" for row in lab.rows)
    return Done(title=title, status="FAILED" if failed else "done", seconds=time.perf_counter() - start, rows=lab.rows)


def run_parts(lab: Lab, parts: Sequence[tuple[str, Part]], deadline: float, save: Callable[[list[Done]], None]) -> list[Done]:
    """One after the other; what would begin after the deadline is skipped, but for the projection, which takes no time."""
    done: list[Done] = []
    for title, part in parts:
        late = time.monotonic() > deadline and part is not projection
        done.append(Done(title=title, status="skipped") if late else run_part(lab, title, part))
        last = done[-1]
        click.echo(f"\n{title}: {last.status} ({last.seconds:.1f} s)")
        for row in last.rows:
            click.echo(str(row))
        save(done)
    return done


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


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


def _saver(lab: Lab, out: Path) -> Callable[[list[Done]], None]:
    about: dict[str, Any] = {
        "kind": "gpu",
        "dry": lab.dry,
        "date": report.today(),
        "machine": {"gpu": _name(lab)} | asdict(report.machine()) if not lab.cuda else asdict(report.machine()),
        "memory": torch.cuda.get_device_properties(lab.device).total_memory if lab.cuda else 0,
        "versions": _versions(),
        "sizes": asdict(lab.sizes),
        "scaled": _scaled(lab),
    }
    name = re.sub(r"[^a-z0-9]+", "-", _name(lab).lower().replace("nvidia", "")).strip("-")
    path = out / f"{name}.json"

    def save(done: list[Done]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        content = about | {"figures": lab.figures, "parts": [asdict(part) for part in done]}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    return save


@click.command()
@click.option("--dry", is_flag=True, help="Tiny sizes on the CPU: prove that the script runs to its end.")
@click.option("--minutes", default=9.0, show_default=True, help="No part begins after this long.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <gpu>.json [default: bench/results; none if dry].")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder on the disk to be measured [default: build/bench].")
@click.option("--only", multiple=True, help="Parts whose title contains this.")
@click.option("--threads", default=8, show_default=True, help="Reader and writer threads (4 in the commands).")
def command(dry: bool, minutes: float, out: Path | None, scratch: Path | None, only: tuple[str, ...], threads: int) -> int:
    """Check and time everything on one NVIDIA GPU, in one call of under ten minutes."""
    if not dry and not torch.cuda.is_available():
        raise UserError(
            "python -m bench gpu needs an NVIDIA GPU, and there is none here; --dry runs it at tiny sizes on the CPU"
        )
    # cuBLAS reads it when it starts; without it the resume check could not be bit-identical.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dry:
        torch.set_num_threads(1)  # the sizes are too small to share
    deadline = time.monotonic() + 60 * minutes
    began = time.monotonic()
    device = torch.device("cpu" if dry else "cuda")
    disk = scratch or report.RESULTS.parent.parent / "build" / "bench"
    disk.mkdir(parents=True, exist_ok=True)
    memory = MEMORY if MEMORY.is_dir() else disk
    with (
        tempfile.TemporaryDirectory(dir=disk, prefix="gpu-") as on_disk,
        tempfile.TemporaryDirectory(dir=memory, prefix="bench-gpu-") as in_memory,
    ):
        lab = Lab(
            device=device, sizes=DRY if dry else FULL, kernels=_kernels(device), scratch=Path(on_disk),
            memory=Path(in_memory), threads=threads, dry=dry,
        )  # fmt: skip
        folder = out or (None if dry else report.RESULTS)
        save = _saver(lab, folder) if folder else lambda done: None
        about = ", ".join(f"{name} {found}" for name, found in _versions().items())
        click.echo(f"{_name(lab)}, {type(lab.kernels).__name__}, {report.today()}; {about}")
        parts = [*CHECKS, *TIMINGS, *LAST]
        wanted = [part for part in parts if not only or any(word in part[0] for word in only)]
        done = run_parts(lab, wanted, deadline, save)
    counts = {status: sum(part.status == status for part in done) for status in ("done", "FAILED", "skipped")}
    click.echo(
        "\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + f", {time.monotonic() - began:.0f} s"
    )
    return 1 if counts["FAILED"] else 0
