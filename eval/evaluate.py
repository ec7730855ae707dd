"""Every snapshot of every run → numbers in its results/ folder.

A record that stands there already, for the same file and the same amount of held-out text, is not computed again.
"""

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.metrics import heldout_rows, heldout_tokens, reconstruction
from eval.splice import SplicedModel, through
from shared.cache import Cache
from shared.cli import UserError
from shared.device import announce
from shared.files import make_dir, publish_file, publish_json
from shared.lm import harvested_model
from shared.progress import Progress
from train.runs import Run, Snapshot
from train.sae import Sae

Record = dict[str, Any]


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """How much held-out text the numbers rest on."""

    device: torch.device
    eval_tokens: int
    ce_tokens: int
    model: str | None = None  # where the language model lies, if not where the cache says


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
    model = harvested_model(cache, config.model)
    return SplicedModel(str(model.folder), None, spec.precision, config.device, heldout_tokens(cache, config.ce_tokens))


def _evaluate_layer(
    cache: Cache,
    layer: int,
    snapshots: list[tuple[Run, Snapshot]],
    lm: SplicedModel,
    config: EvalConfig,
    records: dict[str, dict[str, Record]],
    progress: Progress,
) -> None:
    x = heldout_rows(cache, layer, config.eval_tokens).to(config.device)
    clean = lm.cross_entropy()
    zero = lm.cross_entropy(layer, torch.zeros_like)
    for run, snapshot in snapshots:
        sae = Sae.load(snapshot.path, cache.spec.d_model).to(config.device)
        spliced = lm.cross_entropy(layer, through(sae))
        records[run.name][_key(snapshot)] = {
            "layer": layer,
            "snapshot": snapshot.label,
            "trained_tokens": sae.stats.get("tokens"),
            "lambda": sae.stats.get("lambda"),
            **dataclasses.asdict(reconstruction(sae, x)),
            "ce": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_recovered": (zero - spliced) / (zero - clean),
            "ce_tokens": config.ce_tokens,
            "eval_tokens": config.eval_tokens,
            "file": _fingerprint(snapshot),
        }
        progress.advance(1, f"layer {layer} {snapshot.label}")
    for run in {run.name: run for run, _ in snapshots}.values():
        _write(run, records[run.name])


def _key(snapshot: Snapshot) -> str:
    return f"layer{snapshot.layer:02d}_{snapshot.label}"


def _fingerprint(snapshot: Snapshot) -> str:
    stat = snapshot.path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _known(run: Run, config: EvalConfig) -> dict[str, Record]:
    """Records of an earlier evaluation that still hold."""
    path = run.path / "results" / "metrics.json"
    if not path.exists():
        return {}
    stored: dict[str, Record] = json.loads(path.read_text())
    now = {_key(s): _fingerprint(s) for s in run.snapshots()}
    same = {"ce_tokens": config.ce_tokens, "eval_tokens": config.eval_tokens}
    return {k: r for k, r in stored.items() if r["file"] == now.get(k) and {n: r[n] for n in same} == same}


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
