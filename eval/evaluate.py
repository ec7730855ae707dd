"""Every snapshot of every run → numbers in its results/ folder.

A record that stands there already, for the same file and the same amount of held-out text, is not computed again.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.floor import ALIVE_ABOVE
from eval.metrics import DEAD_AT, heldout_blocks, heldout_tokens, loss_metrics, measure, save_features
from eval.splice import SplicedModel, constant, through
from shared.cache import Cache
from shared.cli import UserError
from shared.device import announce
from shared.files import make_dir, publish_file, publish_json
from shared.lm import model_revision, unpin
from shared.progress import Progress
from train.runs import Run, Snapshot
from train.sae import Sae

Record = dict[str, Any]


_SAE_BYTES = 4 << 30  # of weights held at once on a CPU; on a GPU half of what is free


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """How much held-out text the numbers rest on, and which definitions; see eval/metrics.py."""

    device: torch.device
    eval_tokens: int
    ce_tokens: int
    model: str | None = None  # where the language model lies, if not where the cache says
    dead_at: float = DEAD_AT
    alive_above: float = ALIVE_ABOVE
    ablation: str = "zero"  # or "mean"

    def basis(self) -> dict[str, Any]:
        """What a record must have been made with to stand for one made now."""
        return {name: getattr(self, name) for name in ("eval_tokens", "ce_tokens", "dead_at", "alive_above", "ablation")}


def find_runs(folder: Path, cache: Cache) -> list[Run]:
    """The runs in `folder` (or `folder` itself, if it is one) that were trained on this cache. Raises UserError if none was."""
    folders = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not folders:
        raise UserError(f"no runs in {folder}: train one with `make train` or `python -m train`")
    identity = json.loads(json.dumps(dataclasses.asdict(cache.spec)))
    runs = [run for run in map(Run, folders) if run.config()["cache"] == identity]
    if not runs:
        raise UserError(f"no run in {folder} was trained on the cache {cache.path}; name theirs with --cache")
    return runs


def evaluate(cache: Cache, runs: list[Run], config: EvalConfig) -> dict[str, list[Record]]:
    """{run: records}, one record a layer and snapshot, by layer and then by age; written as they are made."""
    if cache.spec.holdout_blocks == 0:
        raise UserError(f"{cache.path} holds out nothing to evaluate on: harvest with --holdout-tokens")
    records = {run.name: _known(run, config) for run in runs}
    todo = [(s.layer, run, s) for run in runs for s in run.snapshots() if _key(s) not in records[run.name]]
    if todo:
        lm = _language_model(cache, config)
        announce(config.device)
        with Progress("evaluating", len(todo), "SAEs") as progress:
            for layer in sorted({layer for layer, _, _ in todo}):
                _evaluate_layer(cache, layer, [(run, s) for at, run, s in todo if at == layer], lm, config, records, progress)
    for run in runs:
        _write(run, records[run.name])
    return {run.name: [records[run.name][_key(s)] for s in run.snapshots()] for run in runs}


def _language_model(cache: Cache, config: EvalConfig) -> SplicedModel:
    spec = cache.spec
    model, revision = config.model or spec.model, unpin(spec.model_revision)
    if model_revision(model, revision) != spec.model_revision:
        raise UserError(f"{model} is not the model the cache was harvested from; name its folder with --model")
    return SplicedModel(model, revision, spec.precision, config.device, heldout_tokens(cache, config.ce_tokens))


def _evaluate_layer(
    cache: Cache,
    layer: int,
    snapshots: list[tuple[Run, Snapshot]],
    lm: SplicedModel,
    config: EvalConfig,
    records: dict[str, dict[str, Record]],
    progress: Progress,
) -> None:
    for group in _groups(snapshots, config.device):
        saes = [Sae.load(snapshot.path, cache.spec.d_model).to(config.device) for _, snapshot in group]
        activations, tallies = measure(heldout_blocks(cache, layer, config.eval_tokens), saes, cache.spec.context)
        ablations = [torch.zeros_like, constant(activations.all.mean)]
        clean, (zero, mean, *spliced) = lm.losses(layer, [*ablations, *map(through, saes)])
        for (run, snapshot), sae, tally, loss in zip(group, saes, tallies, spliced, strict=True):
            metrics, features = tally.finish(activations, config.dead_at, config.alive_above)
            path = features_path(run, layer, snapshot.label)
            save_features(path, features, tokens=tally.tokens, file=fingerprint(snapshot))
            records[run.name][_key(snapshot)] = {
                "layer": layer,
                "snapshot": snapshot.label,
                "trained_tokens": sae.stats.get("tokens"),
                "lambda": sae.stats.get("lambda"),
                **metrics,
                **loss_metrics(clean, zero, mean, loss, config.ablation),
                **config.basis(),
                "file": fingerprint(snapshot),
            }
            progress.advance(1, f"layer {layer} {snapshot.label}")
    for run in {run.name: run for run, _ in snapshots}.values():
        _write(run, records[run.name])


def _groups(snapshots: list[tuple[Run, Snapshot]], device: torch.device) -> Iterator[list[tuple[Run, Snapshot]]]:
    """Snapshots whose weights fit into memory together: each group reads the layer once."""
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _SAE_BYTES
    group: list[tuple[Run, Snapshot]] = []
    used = 0
    for run, snapshot in snapshots:
        size = snapshot.path.stat().st_size
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append((run, snapshot))
        used += size
    if group:
        yield group


def features_path(run: Run, layer: int, label: str) -> Path:
    """Where the statistics of each feature of an SAE are; see eval.metrics.load_features."""
    return run.path / "results" / "features" / f"layer{layer:02d}_{label}.safetensors"


def _key(snapshot: Snapshot) -> str:
    return f"layer{snapshot.layer:02d}_{snapshot.label}"


def fingerprint(snapshot: Snapshot) -> str:
    stat = snapshot.path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _known(run: Run, config: EvalConfig) -> dict[str, Record]:
    """Records of an earlier evaluation that still hold."""
    path = run.path / "results" / "metrics.json"
    if not path.exists():
        return {}
    stored: dict[str, Record] = json.loads(path.read_text())
    now = {_key(s): fingerprint(s) for s in run.snapshots()}
    basis = config.basis()
    same = {k: r for k, r in stored.items() if r["file"] == now.get(k) and {n: r.get(n) for n in basis} == basis}
    return {k: r for k, r in same.items() if features_path(run, r["layer"], r["snapshot"]).exists()}


def _write(run: Run, records: dict[str, Record]) -> None:
    folder = make_dir(run.path / "results")
    ordered = {_key(s): records[_key(s)] for s in run.snapshots() if _key(s) in records}
    publish_json(folder / "metrics.json", ordered)
    columns = [name for name in next(iter(ordered.values()), {}) if name != "file"]
    temporary = folder / ".metrics.csv.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered.values())
    publish_file(folder / "metrics.csv", temporary.read_bytes())
    temporary.unlink()
