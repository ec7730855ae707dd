"""How good our SAEs are beside other libraries': trained on the very same batches, compared at equal L0 on held-out tokens.

    python -m bench quality --cache data/demo     # after `make demo`, or a harvest of these layers alone

Ours are trained by `rsae train`, theirs by their own trainers in their own environments, from a file with the batches
that our loader gives (100 MB). Everything is float32, so that no processor's bf16 is part of the comparison. What was measured
before is kept: more --seeds or --layers add to it. With --publish that is bench/results/quality.json, the table in
docs/findings/quality.md and docs/images/quality.png; else results and picture are in build/bench/results.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.peers import ROOT, STEPS, Peer, PeerFailed, environment, variables
from bench.report import RESULTS, UNPUBLISHED, machine, today
from residual_saes.eval.measure.evaluate import heldout
from residual_saes.eval.measure.heldout import heldout_tokens
from residual_saes.eval.measure.splice import SplicedModel
from residual_saes.shared.cache import Cache
from residual_saes.shared.identity import harvested_model
from residual_saes.shared.presets import PRESETS
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.runs.target import Target
from residual_saes.shared.sites import Site
from residual_saes.shared.units import parse_count
from residual_saes.train.loader import ActivationLoader, LoaderConfig

NAME, PICTURE = "quality.json", ROOT / "docs" / "images" / "quality.png"
SCRATCH = ROOT / "build" / "bench" / "quality"
CPU = torch.device("cpu")
# The demo's model and text, at the batch and rate that all take part at.
DEMO = replace(PRESETS["demo"], tokens=960_000, holdout_tokens=64_000, batch=1024, lr=3e-3, lr_warmup=100)
Point = dict[str, Any]

# Who takes part. Ours with options of `rsae train`, among which --l1 may take the place of the λs; theirs with their names
# in bench/workers/quality.py and in bench/peers.py.
OUR_LEVELS = (4, 10, 27, 75, 210)  # no further apart than APART
OURS = {
    "ours, published recipe": (),
    "ours, best recipe": ("--recipe", "best", "--l1", ",".join(f"adaptive:5e-2@{l0}" for l0 in OUR_LEVELS)),
    "ours, BatchTopK": ("--l1", ",".join(f"batchtopk:{l0}" for l0 in OUR_LEVELS)),
}
THEIRS = {
    "SAELens standard": ("sae_lens", "sae_lens"),
    "dictionary_learning Standard": ("standard", "dictionary_learning"),
    "dictionary_learning AprilUpdate": ("april", "dictionary_learning"),
}
# The published recipe written a second time, in our environment: what ours is to give at every L0.
AUTOGRAD = {"published recipe in plain autograd": ("autograd", None)}
APART = 3  # as a factor of L0
LEVELS = (5, 10, 20, 50, 100, 200)  # of L0 in the table
MARKERS = "osDX^vP"
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")  # Okabe & Ito's, for the colour-blind


def fvu_at(points: Iterable[Point], l0: float) -> float | None:
    """FVU where L0 is this, ln FVU by the parabola in ln L0 through the three nearest points; None beyond all of them, and
    where those around are too far apart. The curve bends: a straight line between L0s of 43 and 122 is up to 9 % too low.
    """
    x = math.log(l0)
    known = sorted((math.log(p["l0"]) - x, math.log(p["fvu"])) for p in points)
    below, above = [a for a, _ in known if a <= 0], [a for a, _ in known if a >= 0]
    if not below or not above or above[0] - below[-1] > math.log(APART):
        return None
    near = np.array(sorted(known, key=lambda point: abs(point[0]))[:3])
    return math.exp(np.polyfit(near[:, 0], near[:, 1], len(near) - 1)[-1])


def best_peer(points: Sequence[Point], layer: int, l0: float) -> dict[int, float]:
    """{seed: FVU of the best of the other libraries at this L0}, where one of them has points around it."""
    best: dict[int, float] = {}
    for name in THEIRS:
        for seed, fvu in by_seed(points, name, layer, l0).items():
            best[seed] = min(fvu, best.get(seed, math.inf))
    return best


def by_seed(points: Sequence[Point], who: str, layer: int, l0: float) -> dict[int, float]:
    own = [p for p in points if (p["who"], p["layer"]) == (who, layer)]
    fvus = {seed: fvu_at([p for p in own if p["seed"] == seed], l0) for seed in sorted({p["seed"] for p in own})}
    return {seed: fvu for seed, fvu in fvus.items() if fvu is not None}


def over_best_peer(points: Sequence[Point], who: str, layer: int, l0: float) -> list[float]:
    """For each seed, FVU over that of the best peer at this L0, where both are known."""
    best = best_peer(points, layer, l0)
    return [fvu / best[seed] for seed, fvu in by_seed(points, who, layer, l0).items() if seed in best]


def longest(points: Sequence[Point]) -> list[Point]:
    """Those of the longest training: FVU after fewer tokens is another number."""
    most = max(p["tokens"] for p in points)
    return [p for p in points if p["tokens"] == most]


def names(points: Sequence[Point]) -> list[str]:
    known = dict.fromkeys(p["who"] for p in points)
    return sorted(known, key=[*THEIRS, *AUTOGRAD, *OURS, *known].index)


def rows(points: Sequence[Point]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of the table: the best peer's FVU, and each one's over it, with the seeds' least and most."""
    who, lines = names(points), []
    for layer in sorted({p["layer"] for p in points}):
        for l0 in LEVELS:
            if best := best_peer(points, layer, l0):
                ratios = [over_best_peer(points, name, layer, l0) for name in who]
                lines.append((str(layer), str(l0), f"{np.mean(list(best.values())):.4f}", *map(_spread, ratios)))
    return ("layer", "L0", "best peer's FVU", *who), lines


def _spread(values: list[float]) -> str:
    span = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{span}" if values else "–"


def about(raw: dict[str, Any]) -> str:
    points = longest(raw["points"])
    seeds = len({p["seed"] for p in points})
    most = max(Counter((p["who"], p["layer"], p["seed"]) for p in points if p["who"] in THEIRS).values())
    tokens, batch, heldout = (points[0][name] for name in ("tokens", "batch", "heldout"))
    return (
        f"SAEs of {raw['features']:,} features on the demo model, {tokens:,} tokens in the same batches of {batch:,} "
        f"({tokens // batch:,} steps), lr 3e-3, up to {most} λs for the others, {seeds} seed{'s' * (seeds > 1)}, float32, "
        f"{raw['date']}: FVU on {heldout:,} held-out tokens over that of the best of the other libraries at the same L0 (in "
        "brackets the seeds' least and most), between measured points by parabolas of ln FVU in ln L0. Made by "
        "`python -m bench quality`; points, with cosine, dead features and CE recovered, are in "
        "[bench/results/quality.json](../../bench/results/quality.json)."
    )


def draw(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = sorted({p["layer"] for p in points})
    figure, grid = pyplot.subplots(2, len(layers), figsize=(5 * len(layers), 6.4), sharex=True, squeeze=False)
    for column, layer in enumerate(layers):
        above, below = grid[:, column]
        for number, name in enumerate(names(points)):
            own = sorted((p for p in points if (p["who"], p["layer"]) == (name, layer)), key=lambda p: p["l0"])
            style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 4, "ls": "--" if name in THEIRS else "-"}
            above.plot([p["l0"] for p in own], [p["fvu"] for p in own], **style | {"ls": ""}, label=name)
            levels = np.geomspace(4, 250, 40)
            ratios = [over_best_peer(points, name, layer, float(level)) for level in levels]
            below.plot(levels, [np.mean(r) if r else math.nan for r in ratios], **style | {"marker": ""})
        above.set(title=f"layer {layer}: held-out FVU", xscale="log", yscale="log")
        below.set(title="over the best other library's at the same L0", xlabel="L0")
        above.grid(alpha=0.3), below.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def dump(cache: Cache, layer: int, seed: int, steps: int, path: Path) -> None:
    """The batches that `rsae train --preset demo` has, float16 [steps, batch, d]."""
    p = DEMO
    config = LoaderConfig(batch=p.batch, window_blocks=p.window_blocks, threads=2, seed=seed)
    shape = (steps, p.batch, cache.spec.d_model)
    out = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for step, x in enumerate(ActivationLoader(cache, Site(layer), config, CPU, last=steps)):
        out[step] = x.numpy()
    out.flush()


def train_ours(cache: Cache, layer: int, seed: int, tokens: int, lambdas: str, options: tuple[str, ...]) -> list[Sae]:
    folder = SCRATCH / "runs"
    command = [sys.executable, "-m", "train", "--preset", "demo", "--cache", str(cache.path), "--runs", str(folder)]
    command += ["--batch", str(DEMO.batch), "--lr", str(DEMO.lr), "--lr-warmup", str(DEMO.lr_warmup)]
    command += ["--layers", str(layer), "--seed", str(seed), "--tokens", str(tokens), "--precision", "fp32", "--device", "cpu"]
    subprocess.run([*command, "--l1", lambdas, *options], cwd=ROOT, check=True)
    saes = [Sae.load(path) for path in sorted(folder.glob(f"*/sae_layer{layer:02d}_final.pt"))]
    shutil.rmtree(folder)
    return saes


def train_theirs(worker: str, peer: Peer, batches: Path, seed: int, features: int, lambdas: str) -> list[Sae]:
    p, out = DEMO, SCRATCH / worker
    out.mkdir()
    job = {"batches": str(batches), "out": str(out), "features": features, "lr": p.lr, "warmup": p.lr_warmup, "seed": seed}
    command = [str(environment(peer)), "-m", "bench.workers.quality", worker, json.dumps(job), *lambdas.split(",")]
    subprocess.run(command, cwd=ROOT, env=os.environ | variables(), check=True)
    saes = []
    for path in sorted(out.glob("*.npz")):
        weights = {name: torch.from_numpy(value).contiguous() for name, value in np.load(path).items()}
        b_dec = torch.zeros_like(weights["b_pre"])
        saes.append(Sae(**weights, b_dec=b_dec, config={}, stats={"lambda": float(path.stem)}))
    return saes


def measured(cache: Cache, layer: int, saes: list[Sae], lm: SplicedModel) -> list[Point]:
    tokens = cache.spec.holdout_tokens
    points = []
    for sae, (found,) in zip(saes, heldout(cache, Target.itself(Site(layer)), saes, lm, tokens), strict=True):
        tally = found.measurement
        metrics = vars(tally.sparsity()) | vars(tally.reconstruction(found.activations)) | vars(found.losses)
        kept = {name: metrics[name] for name in ("l0", "fvu", "cosine", "ce_recovered")}
        points.append({"lambda": sae.stats["lambda"], **kept, "dead": metrics["dead_share"], "heldout": tokens})
    return points


@click.command()
@click.option("--cache", "path", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True)
@click.option("--layers", default="2,5", show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--lambdas", default="4e-3,1e-2,2.5e-2,6e-2,0.1,0.15,0.25", show_default=True, help="The same scale for all.")
@click.option("--tokens", default="400K", show_default=True, help="To train each SAE on.")
@click.option("--publish", is_flag=True, help="Add to bench/results, and draw docs/images/quality.png.")
def command(path: Path, layers: str, seeds: int, lambdas: str, tokens: str, publish: bool) -> None:
    """FVU at equal L0 beside SAELens and dictionary_learning; adds to what was measured before."""
    cache, p = Cache.open(path.resolve()), DEMO
    trained, features = parse_count(tokens) // p.batch * p.batch, p.expansion * cache.spec.d_model
    results = (RESULTS if publish else UNPUBLISHED) / NAME
    results.parent.mkdir(parents=True, exist_ok=True)
    points = json.loads(results.read_text())["points"] if results.exists() else []
    lm = SplicedModel(str(harvested_model(cache, None).folder), None, "fp32", CPU, heldout_tokens(cache, p.ce_tokens))
    for seed, layer in [(seed, layer) for seed in range(seeds) for layer in map(int, layers.split(","))]:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        for who in (*THEIRS, *AUTOGRAD, *OURS):
            these = {"who": who, "layer": layer, "seed": seed, "tokens": trained}
            if any(these.items() <= q.items() for q in points):
                continue
            try:
                saes = _train(who, cache, layer, seed, trained, features, lambdas)
            except (PeerFailed, subprocess.CalledProcessError) as failure:
                click.echo(f"{who} is left out: {failure}", err=True)
                continue
            points += [these | {"batch": p.batch} | point for point in measured(cache, layer, saes, lm)]
            content = {"kind": "quality", "date": today(), "machine": asdict(machine()), "features": features, "points": points}
            results.write_text(json.dumps(content, indent=1) + "\n")
            click.echo("\n".join(map(json.dumps, points[-len(saes) :])))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    picture = PICTURE if publish else results.with_suffix(".png")
    draw(longest(points), picture)
    click.echo(f"{picture}\n{results}" + "\nnow: python -m bench tables" * publish)


def _train(who: str, cache: Cache, layer: int, seed: int, tokens: int, features: int, lambdas: str) -> list[Sae]:
    if who in OURS:
        return train_ours(cache, layer, seed, tokens, lambdas, OURS[who])
    batches = SCRATCH / "batches.npy"
    if not batches.exists():
        dump(cache, layer, seed, tokens // DEMO.batch, batches)
    worker, folder = (THEIRS | AUTOGRAD)[who]
    peer = next(peer for peer in STEPS if peer.environment == folder)
    start = seed * 1000 + layer if who in AUTOGRAD else seed  # as ours is drawn
    return train_theirs(worker, peer, batches, start, features, lambdas)
