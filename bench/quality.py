"""How good our SAEs are beside other libraries' of the same kind: trained on the very same batches, at each of a few learning
rates, compared at equal L0 on held-out tokens by the best of the rates of each.

    rsae harvest --preset demo --layers 2,5 --tokens 960K --holdout-tokens 64K --cache data/demo-long
    python -m bench quality --cache data/demo-long

Ours are trained by `rsae train`, theirs by their own trainers in their own environments, from a file with the batches
that our loader gives (100 MB), and read back from their own files as `rsae eval --saes` reads them. Everything is float32, so
that no processor's bf16 is part of the comparison. What was measured before is kept: more --kinds, --seeds, --layers or --rates
add to it, and so do trainings of more steps (`--tokens 960K --batch 480`). With --publish that is bench/results/quality.json,
the table in docs/findings/quality.md and docs/images/quality.png; else results and picture are in build/bench/results.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch

from bench.peers import ROOT, STEPS, PeerFailed, environment, variables
from bench.report import RESULTS, UNPUBLISHED, machine, today
from residual_saes.eval.foreign.forms import read_sae
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
from residual_saes.train.sparsity.settings import parse_setting

NAME, PICTURE = "quality.json", ROOT / "docs" / "images" / "quality.png"
SCRATCH = ROOT / "build" / "bench" / "quality"
CPU = torch.device("cpu")
# The demo's model and text, at the batch that all take part at.
DEMO = replace(PRESETS["demo"], tokens=960_000, holdout_tokens=64_000, batch=1024, lr_warmup=100)
Point = dict[str, Any]
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a setting of ours is written, with a place for its level; the levels; and who has the same kind."""

    form: str
    levels: tuple[str, ...]
    peers: tuple[str, ...]


SPARSE = ("8", "20", "32", "50", "95", "115")  # activations a token: no further apart than APART
LAMBDAS = ("0.004", "0.01", "0.025", "0.06", "0.1", "0.15", "0.25")  # the same scale for all
BOTH = ("SAELens", "dictionary_learning")
KINDS = {
    "L1": Kind("{}", LAMBDAS, (*BOTH, "dictionary_learning April")),
    "adaptive/best": Kind("adaptive:5e-2@{}/best", SPARSE, ()),
    "BatchTopK": Kind("batchtopk:{}/best", SPARSE, BOTH),
    "TopK": Kind("topk:{}/best", SPARSE, (*BOTH, "sparsify")),
    "JumpReLU": Kind("jumprelu:{}/best", SPARSE, BOTH),
    "Matryoshka": Kind("matryoshka:{}/best", SPARSE, BOTH),
}
RATES = ("3e-3", "1e-2", "2e-2")
APART = 3  # as a factor of L0
LEVELS = (10, 32, 100)  # of L0 in the table
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")  # Okabe & Ito's, for the colour-blind


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


@dataclass(frozen=True, slots=True)
class At:
    """What somebody's SAEs of one kind and rate are at an L0, between measured points."""

    who: str
    fvu: float
    ce_recovered: float
    dead: float

    @classmethod
    def of(cls, curve: Sequence[Point], l0: float) -> Self | None:
        """`curve` is of one kind, who and rate, by L0; None where it does not reach."""
        if (fvu := fvu_at(curve, l0)) is None:
            return None
        at = np.log([p["l0"] for p in curve])
        others = (float(np.interp(math.log(l0), at, [p[name] for p in curve])) for name in ("ce_recovered", "dead"))
        return cls(curve[0]["who"], fvu, *others)


def _curves(points: Iterable[Point]) -> list[list[Point]]:
    """Points of one kind, apart by who trained at which rate, each by L0."""
    curves: dict[tuple[Any, ...], list[Point]] = {}
    for p in sorted(points, key=lambda p: float(p["l0"])):
        curves.setdefault((p["who"], p["kind"], p["lr"]), []).append(p)
    return list(curves.values())


def best(points: Iterable[Point], l0: float) -> At | None:
    """The least FVU at an L0 of all whose curves reach there: of everybody, at every rate."""
    found = (At.of(curve, l0) for curve in _curves(points))
    return min((at for at in found if at is not None), key=lambda at: at.fvu, default=None)


def pairs(points: Sequence[Point], kind: str, layer: int, l0: float) -> list[tuple[At, At | None]]:
    """(our best, the best of the others') of one kind, for each seed that we have."""
    found = []
    for seed in sorted({p["seed"] for p in points}):
        these = [p for p in points if (p["layer"], p["seed"]) == (layer, seed) and p["kind"] == kind]
        ours, theirs = (best((p for p in these if (p["who"] == OURS) is own), l0) for own in (True, False))
        if ours is not None:
            found.append((ours, theirs))
    return found


HEAD = (
    "steps",
    "layer",
    "L0",
    "kind",
    "FVU",
    "CE recovered",
    "dead",
    "seeds",
    "best other",
    "FVU",
    "CE recovered",
    "dead",
    "ours over it",
)
SIDES = "rrrlrrrrlrrrr"


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Lines of the table under HEAD: means over seeds of our best and of the best other library's of that kind."""
    found = []
    for steps, these in trainings(points).items():
        places = [(layer, l0, kind) for layer in sorted({p["layer"] for p in these}) for l0 in LEVELS for kind in KINDS]
        found += [(steps, *place, pairs(these, place[2], place[0], place[1])) for place in places]
    return [(f"{steps:,}", str(layer), str(l0), kind, *_line(of)) for steps, layer, l0, kind, of in found if of]


def trainings(points: Iterable[Point]) -> dict[int, list[Point]]:
    """{steps: points}, the fewest first: FVU after more of them is another number."""
    found: dict[int, list[Point]] = {}
    for p in sorted(points, key=_steps):
        found.setdefault(_steps(p), []).append(p)
    return found


def _steps(point: Point) -> int:
    return int(point["tokens"] // point["batch"])


def _line(found: list[tuple[At, At | None]]) -> tuple[str, ...]:
    beside = [(ours, theirs) for ours, theirs in found if theirs is not None]
    if not beside:
        return (*_means([ours for ours, _ in found]), str(len(found)), *["–"] * 5)
    who = " or ".join(sorted({theirs.who for _, theirs in beside}))
    over = f"{np.mean([ours.fvu / theirs.fvu for ours, theirs in beside]):.2f}"
    return (*_means([ours for ours, _ in beside]), str(len(beside)), who, *_means([theirs for _, theirs in beside]), over)


def _means(found: Sequence[At]) -> tuple[str, str, str]:
    fvu, ce, dead = (np.mean([getattr(at, name) for at in found]) for name in ("fvu", "ce_recovered", "dead"))
    return f"{fvu:.4f}", f"{ce:.4f}", f"{dead:.1%}"


def about(raw: dict[str, Any]) -> str:
    points = raw["points"]
    tried = {kind: sorted({p["lr"] for p in points if p["kind"] == kind}, key=float) for kind in KINDS}
    rates = "; ".join(f"{kind} {', '.join(of)}" for kind, of in tried.items() if of)
    read = " and ".join(
        f"{these[0]['tokens']:,} tokens in batches of {these[0]['batch']:,} ({steps:,} steps)"
        for steps, these in trainings(points).items()
    )
    return (
        f"SAEs of {raw['features']:,} features on the demo model, {read}, the same for all, float32, {raw['date']}, on "
        f"{points[0]['heldout']:,} held-out tokens: at exactly this L0, between "
        "measured points by parabolas of ln FVU in ln L0 (CE recovered and dead by straight lines). Ours and, of the same "
        f"kind, the best other library's, each at the best of the rates that were tried ({rates}); where it has one, means "
        "over seeds that both have. Made by `python -m bench quality`; all points, with cosine, are in "
        "[bench/results/quality.json](../../bench/results/quality.json)."
    )


def draw(points: Sequence[Point], path: Path) -> None:
    """Our best FVU of each kind (lines) and the best other library's (dashes), by L0, after as many steps as most have, of the
    first seed. Straight between points: parabolas through three of them have steps where the three change."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [p for p in max(trainings(points).values(), key=len) if p["seed"] == 0]
    layers, levels = sorted({p["layer"] for p in points}), np.linspace(math.log(4), math.log(250), 200)
    figure, grid = pyplot.subplots(1, len(layers), figsize=(5 * len(layers), 4), sharex=True, squeeze=False)
    for axes, layer in zip(grid[0], layers, strict=True):
        for colour, kind in zip(COLOURS, KINDS, strict=True):
            for own, dashes in ((True, "-"), (False, "--")):
                curves = _curves(p for p in points if (p["layer"], p["kind"], p["who"] == OURS) == (layer, kind, own))
                if curves:
                    label = kind if own else f"{kind}, best other"
                    axes.plot(np.exp(levels), _least(curves, levels), color=colour, ls=dashes, label=label)
        axes.set(title=f"layer {layer}", xscale="log", yscale="log", xlabel="L0", ylabel="held-out FVU")
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _least(curves: Iterable[Sequence[Point]], levels: np.ndarray) -> np.ndarray:
    """The least FVU of these at each ln L0, NaN where none reaches."""
    logs = (np.log([(p["l0"], p["fvu"]) for p in curve]).T for curve in curves)
    least: np.ndarray = np.fmin.reduce([np.exp(np.interp(levels, x, y, left=math.nan, right=math.nan)) for x, y in logs])
    return least


def dump(cache: Cache, layer: int, seed: int, steps: int, batch: int, path: Path) -> None:
    """The batches that `rsae train --preset demo` has, float16 [steps, batch, d]."""
    config = LoaderConfig(batch=batch, window_blocks=DEMO.window_blocks, threads=2, seed=seed)
    shape = (steps, batch, cache.spec.d_model)
    out = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for step, x in enumerate(ActivationLoader(cache, Site(layer), config, CPU, last=steps)):
        out[step] = x.numpy()
    out.flush()


def train_ours(cache: Cache, wanted: Point, settings: Sequence[str]) -> list[Sae]:
    """SAEs of these settings, all from one read, of the layer, seed, tokens, batch and rate that are wanted."""
    folder, layer = SCRATCH / "runs", wanted["layer"]
    command = [sys.executable, "-m", "train", "--preset", "demo", "--cache", str(cache.path), "--runs", str(folder)]
    command += ["--batch", str(wanted["batch"]), "--lr", wanted["lr"], "--lr-warmup", str(DEMO.lr_warmup)]
    command += ["--layers", str(layer), "--seed", str(wanted["seed"]), "--tokens", str(wanted["tokens"]), "--precision", "fp32"]
    subprocess.run([*command, "--device", "cpu", "--l1", ",".join(settings)], cwd=ROOT, check=True)
    saes = [Sae.load(path) for path in folder.glob(f"*/sae_layer{layer:02d}_final.pt")]
    shutil.rmtree(folder)
    kinds = [json.loads(json.dumps(parse_setting(written.partition("/")[0]).fields())) for written in settings]
    return [next(sae for sae in saes if sae.config["train"]["l1"] == kind) for kind in kinds]


def train_theirs(who: str, kind: str, batches: Path, seed: int, features: int, rate: str, levels: Sequence[str]) -> list[Sae]:
    """SAEs of these levels by another library, by its own trainer and from its own files."""
    tool, out = who.partition(" ")[0], SCRATCH / "theirs"
    package = {"SAELens": "sae_lens"}.get(tool, tool)
    peer = next(peer for peer in STEPS if peer.environment == package)
    job = {"batches": str(batches), "out": str(out), "features": features, "lr": float(rate), "seed": seed}
    job["warmup"] = DEMO.lr_warmup
    command = [str(environment(peer)), "-m", "bench.workers.quality", who, kind, json.dumps(job), *levels]
    subprocess.run(command, cwd=ROOT, env=os.environ | variables(), check=True)
    saes = []
    for level in levels:
        f, scale = read_sae(tool.lower(), out / level).function, float((out / level / "scale").read_text())
        config = {} if f.k is None else {"sparsity": {"k": f.k}}
        saes.append(
            Sae(
                w_enc=f.w_enc * scale, b_enc=f.b_enc, w_dec=f.w_dec / scale, b_pre=f.b_pre / scale, b_dec=f.b_dec / scale,
                threshold=f.threshold, config=config, stats={},
            )
        )  # fmt: skip
    shutil.rmtree(out)
    return saes


def measured(cache: Cache, layer: int, saes: list[Sae], lm: SplicedModel) -> list[Point]:
    tokens = cache.spec.holdout_tokens
    points = []
    for (found,) in heldout(cache, Target.itself(Site(layer)), saes, lm, tokens):
        tally = found.measurement
        metrics = vars(tally.sparsity()) | vars(tally.reconstruction(found.activations)) | vars(found.losses)
        kept = {name: metrics[name] for name in ("l0", "fvu", "cosine", "ce_recovered")}
        points.append({**kept, "dead": metrics["dead_share"], "heldout": tokens})
    return points


@click.command()
@click.option("--cache", "path", type=click.Path(path_type=Path), default=Path("data/demo-long"), show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--levels", default="", help="Of those that each kind has; all of them without.")
@click.option("--layers", default="2,5", show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--rates", default=",".join(RATES), show_default=True, help="Adam's, of everybody.")
@click.option("--tokens", default="400K", show_default=True, help="To train each SAE on.")
@click.option("--batch", default=DEMO.batch, show_default=True)
@click.option("--publish", is_flag=True, help="Add to bench/results, and draw docs/images/quality.png.")
def command(
    path: Path, kinds: str, levels: str, layers: str, seeds: int, rates: str, tokens: str, batch: int, publish: bool
) -> None:
    """FVU at equal L0 beside other libraries, kind by kind; adds to what was measured before."""
    cache, p = Cache.open(path.resolve()), DEMO
    trained, features = parse_count(tokens) // batch * batch, p.expansion * cache.spec.d_model
    results = (RESULTS if publish else UNPUBLISHED) / NAME
    results.parent.mkdir(parents=True, exist_ok=True)
    points = json.loads(results.read_text())["points"] if results.exists() else []
    lm = SplicedModel(str(harvested_model(cache, None).folder), None, "fp32", CPU, heldout_tokens(cache, p.ce_tokens))
    wanted = [kind for kind in KINDS if kind in kinds.split(",")]
    for seed, layer in [(seed, layer) for seed in range(seeds) for layer in map(int, layers.split(","))]:
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir(parents=True)
        place = {"layer": layer, "seed": seed, "tokens": trained, "batch": batch}
        known = [{k: q[k] for k in ("who", "kind", "lr", "level", *place)} for q in points]
        for rate, who, kind in [(r, w, k) for r in rates.split(",") for k in wanted for w in (OURS, *KINDS[k].peers)]:
            these = [
                place | {"who": who, "kind": kind, "lr": rate, "level": level}
                for level in KINDS[kind].levels
                if not levels or level in levels.split(",")
            ]
            if not (these := [one for one in these if one not in known]):
                continue
            try:
                saes = _train(cache, these, features)
            except (PeerFailed, subprocess.CalledProcessError) as failure:
                click.echo(f"{who} is left out: {failure}", err=True)
                continue
            points += [one | point for one, point in zip(these, measured(cache, layer, saes, lm), strict=True)]
            content = {"kind": "quality", "date": today(), "machine": asdict(machine()), "features": features, "points": points}
            results.write_text(json.dumps(content, indent=1) + "\n")
            click.echo("\n".join(map(json.dumps, points[-len(saes) :])))
    shutil.rmtree(SCRATCH, ignore_errors=True)
    picture = PICTURE if publish else results.with_suffix(".png")
    draw(points, picture)
    click.echo(f"{picture}\n{results}" + "\nnow: python -m bench tables" * publish)


def _train(cache: Cache, wanted: Sequence[Point], features: int) -> list[Sae]:
    """SAEs that differ in their level alone."""
    one, levels = wanted[0], [each["level"] for each in wanted]
    if one["who"] == OURS:
        return train_ours(cache, one, [KINDS[one["kind"]].form.format(level) for level in levels])
    batches = SCRATCH / "batches.npy"
    if not batches.exists():
        dump(cache, one["layer"], one["seed"], _steps(one), one["batch"], batches)
    return train_theirs(one["who"], one["kind"], batches, one["seed"], features, one["lr"], levels)
