"""Every snapshot of every run → numbers in its results/ folder.

A record is of one checkpoint's content (its checksum) under one amount of held-out text, and stays for good: activations and
checkpoints it was measured on may be gone. results/metrics.json maps a name to each: `layer00_50M` is of the checkpoint that is
there, on the most text; a record of the same snapshot on other text, or of an earlier file, has both after its name. What
cannot be evaluated is left out with a line that says why, and all else is done.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.measure.metrics import (
    DEAD_AT,
    Activations,
    Features,
    Number,
    Tally,
    heldout_blocks,
    heldout_tokens,
    load_features,
    loss_metrics,
    measure,
    save_features,
)
from eval.measure.predicted import ALIVE_ABOVE
from eval.measure.splice import SplicedModel, constant, only, through
from shared.cache import Cache
from shared.device import announce, fitting
from shared.errors import UserError
from shared.files import locked, remove_leftovers, replacing, sync_dir
from shared.identity import harvested_model
from shared.progress import Progress, say
from shared.runs.rows import ALL, Rows
from shared.runs.run import Run, Snapshot, cache_identity, snapshot_tokens
from shared.runs.sae import Damaged, Sae
from shared.seal import SEAL, seal, sealed
from shared.sites import Site, format_sites
from shared.stop import finishing

Record = dict[str, Any]
_BASIS = ("eval_tokens", "ce_tokens", "dead_at", "alive_above", "ablation")  # what a record rests on


class Skipped:
    """What was left out of an evaluation. `with skipped.leaving_out(): …` says a UserError in one line and goes on."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @property
    def count(self) -> int:
        return len(self.said)

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.said.append(str(error))
            say(f"left out: {error}", err=True)


@dataclass(kw_only=True, frozen=True, slots=True)
class EvalConfig:
    """How much held-out text the numbers rest on, and which definitions; see eval/measure/metrics.py."""

    device: torch.device
    eval_tokens: int
    ce_tokens: int
    model: str | None = None  # where the language model lies, if not where the cache says
    dead_at: float = DEAD_AT
    alive_above: float = ALIVE_ABOVE
    ablation: str = "zero"  # or "mean"

    def basis(self) -> dict[str, Any]:
        """What a record must have been made with to stand for one made now."""
        return {name: getattr(self, name) for name in _BASIS}


def find_runs(folder: Path, cache: Cache, skipped: Skipped) -> list[Run]:
    """The runs in `folder` (or `folder` itself, if it is one) that were trained on this cache. Raises UserError if none was."""
    identity, runs = cache_identity(cache)["digest"], []
    for run in runs_in(folder):
        with skipped.leaving_out():
            if run.config()["cache"]["digest"] == identity:
                runs.append(run)
    if not runs:
        raise UserError(f"no run in {folder} was trained on the cache {cache.path}; name theirs with --cache")
    return runs


def runs_in(folder: Path) -> list[Run]:
    """The runs in `folder` (or `folder` itself, if it is one), none of them opened. Raises UserError if there is none."""
    folders = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not folders:
        raise UserError(f"no runs in {folder}: train one with `make train` or `python -m train`")
    return list(map(Run, folders))


def evaluate(cache: Cache, runs: list[Run], config: EvalConfig, skipped: Skipped) -> dict[str, list[Record]]:
    """{run: records}, one record for each layer and snapshot that is or was measured, by layer and then by age; written as they
    are made. Where this evaluation could not measure a snapshot, an earlier record stands in with what it was measured on.
    Raises UserError for what no run could be evaluated with. SIGTERM and Ctrl-C are raised when the SAEs in hand are done."""
    spec = cache.spec
    if spec.holdout_blocks == 0:
        raise UserError(f"{cache.path} holds out nothing to evaluate on: harvest with --holdout-tokens")
    config = dataclasses.replace(
        config,
        eval_tokens=min(config.eval_tokens, spec.holdout_tokens),
        ce_tokens=min(max(1, config.ce_tokens // spec.context) * spec.context, spec.holdout_tokens),
    )
    stores = {}
    for run in runs:
        for folder in ("", "results", "results/features", "plots"):
            remove_leftovers(run.path / folder)
        with skipped.leaving_out():
            stores[run.name] = _Store(run)
    todo = [(store, s) for store in stores.values() for s in store.missing(config, skipped)]
    gone = {s.site for _, s in todo} - set(cache.sites)
    if gone:  # as planned where layers are harvested, trained and deleted in turn
        say(f"layers {format_sites(gone)} are not in {cache.path}: what was measured of them before is kept", err=True)
    todo = [(store, s) for store, s in todo if s.site not in gone]
    if todo:
        lm = _language_model(cache, config)
        announce(config.device)
        with finishing() as asked, Progress("evaluating", len(todo), "SAEs") as progress:
            for site in sorted({s.site for _, s in todo}):
                with skipped.leaving_out():
                    _evaluate_layer(
                        cache, site, [pair for pair in todo if pair[1].site == site], lm, config, skipped, progress, asked
                    )
    for store in stores.values():
        store.tabulate()
    return {name: store.view(config) for name, store in stores.items()}


def _language_model(cache: Cache, config: EvalConfig) -> SplicedModel:
    spec = cache.spec
    model = harvested_model(cache, config.model)
    return SplicedModel(str(model.folder), None, spec.precision, config.device, heldout_tokens(cache, config.ce_tokens))


def _evaluate_layer(
    cache: Cache,
    site: Site,
    snapshots: list[tuple["_Store", Snapshot]],
    lm: SplicedModel,
    config: EvalConfig,
    skipped: Skipped,
    progress: Progress,
    asked: Callable[[], bool],
) -> None:
    for group in fitting(snapshots, lambda pair: pair[1].path.stat().st_size, config.device):
        if asked():
            return
        opened = []
        for store, snapshot in group:
            with skipped.leaving_out():
                belongs = store.run.belongs(snapshot.site, snapshot.label)
                sae = Sae.load(snapshot.path, cache.spec.d_model, belongs=belongs)
                opened.append((store, snapshot, belongs, sae.to(config.device)))
        progress.advance(len(group) - len(opened))
        for rows in dict.fromkeys(sae.rows for *_, sae in opened):
            _measure_group(cache, site, rows, [one for one in opened if one[-1].rows == rows], lm, config, progress)


def _measure_group(
    cache: Cache,
    site: Site,
    rows: Rows,
    opened: list[tuple["_Store", Snapshot, dict[str, Any], Sae]],
    lm: SplicedModel,
    config: EvalConfig,
    progress: Progress,
) -> None:
    saes = [sae for *_, sae in opened]
    whole = -(-config.eval_tokens // cache.spec.block_rows) + 1  # blocks, and what comes after them
    activations, found = heldout(
        cache, site, saes, lm, config.eval_tokens, rows, config.ablation, lambda: progress.advance(len(saes) / whole)
    )
    for (store, snapshot, belongs, sae), (tally, losses) in zip(opened, found, strict=True):
        metrics, features = tally.finish(activations, config.dead_at, config.alive_above)
        path = features_path(store.run, site, snapshot.label)
        save_features(path, features, tokens=tally.tokens, file=sae.stats[SEAL])
        record = {
            "run": belongs["digest"],
            "layer": site.json,
            "snapshot": snapshot.label,
            "trained_tokens": sae.stats["tokens"],
            "lambda": sae.stats["lambda"],
            **metrics,
            **losses,
            **config.basis(),
            "file": sae.stats[SEAL],
        }
        store.add({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})
        progress.advance(1 / whole, f"layer {site} {snapshot.label}")


def heldout(
    cache: Cache,
    site: Site,
    saes: list[Sae],
    lm: SplicedModel,
    tokens: int,
    rows: Rows = ALL,
    ablation: str = "zero",
    after: Callable[[], object] = lambda: None,
) -> tuple[Activations, list[tuple[Tally, dict[str, Number]]]]:
    """One reading of a layer's held-out activations for all of these SAEs: each one's sums over tokens, and its losses in the
    language model. `after` is called after every block."""
    activations, tallies = measure(heldout_blocks(cache, site, tokens, rows), saes, cache.spec.context, after)
    ablations = [torch.zeros_like, constant(activations.all.mean)]
    clean, (zero, mean, *spliced) = lm.losses(site, [only(rows, replace) for replace in (*ablations, *map(through, saes))])
    losses = [loss_metrics(clean, zero, mean, loss, ablation) for loss in spliced]
    return activations, list(zip(tallies, losses, strict=True))


def features_path(run: Run, site: Site, label: str) -> Path:
    """Where the statistics of each feature of an SAE are; see eval.metrics.load_features."""
    return run.path / "results" / "features" / f"layer{site.key}_{label}.safetensors"


def stored_records(run: Run) -> list[Record]:
    """What has been measured of the checkpoints that are there, one record for each by layer and age: the one on the most text.
    Raises UserError for results or a run that are damaged."""
    store = _Store(run)
    for snapshot in run.snapshots():
        store.files[snapshot.site, snapshot.label] = Sae.checksum(snapshot.path)
    return [r for r in store.view(None) if store.files.get((Site.of(r["layer"]), r["snapshot"])) == r["file"]]


def measured(run: Run) -> dict[Site, set[str]]:
    """{layer: the labels of those of its snapshots that can be opened and were measured, on any text}. Raises UserError for
    results or a run that are damaged."""
    store, found = _Store(run), dict[Site, set[str]]()
    known = {(Site.of(r["layer"]), r["snapshot"], r["file"]) for r in store._records}
    for snapshot in run.snapshots():
        with contextlib.suppress(Damaged):
            if (snapshot.site, snapshot.label, Sae.checksum(snapshot.path)) in known:
                found.setdefault(snapshot.site, set()).add(snapshot.label)
    return found


def measured_features(run: Run, site: Site, label: str, file: str) -> tuple[Features, int] | None:
    """The statistics of each feature of the checkpoint with the checksum `file`, and of how many tokens; None where it was not
    evaluated. Raises UserError where they are damaged."""
    path = features_path(run, site, label)
    if not path.exists():
        return None
    features, facts = load_features(path)
    return (features, int(facts["tokens"])) if facts["file"] == file else None  # else of one that was here before


class _Store:
    """The records of one run: results/metrics.json, and the same as .csv."""

    def __init__(self, run: Run) -> None:
        """Raises UserError for a file that is not as it was written; it is left as it is."""
        self.run, self._path = run, run.path / "results" / "metrics.json"
        config = run.config()
        self._labels, self._digest = list(snapshot_tokens(config["train"]["tokens"])), config["digest"]
        self.files: dict[tuple[Site, str], str] = {}  # {(layer, snapshot): checksum of the checkpoint that is there}
        self._records = self._read()

    def _read(self) -> list[Record]:
        if not self._path.exists():
            return []
        try:
            records = list(json.loads(self._path.read_bytes()).values())
        except (ValueError, AttributeError):
            records = [None]
        if not all(map(sealed, records)):
            raise UserError(f"{self._path} is damaged: restore it, or delete it to measure everything again")
        if any(r["run"] != self._digest for r in records):
            raise UserError(f"{self._path} is of another run: put it back where it belongs, or delete it")
        return records

    def missing(self, config: EvalConfig, skipped: Skipped) -> list[Snapshot]:
        """The checkpoints that are there and have no record under this config."""
        missing = []
        for snapshot in self.run.snapshots():
            key = snapshot.site, snapshot.label
            with skipped.leaving_out():
                self.files[key] = ""  # if it cannot be read
                self.files[key] = Sae.checksum(snapshot.path)
                known = (*key, self.files[key], *config.basis().values()) in map(_identity, self._records)
                if not (known and features_path(self.run, *key).exists()):
                    missing.append(snapshot)
        return missing

    def add(self, record: Record) -> None:
        """Add it to what is on disk by now: another evaluation may have added its own."""
        folder = self._path.parent
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            sync_dir(folder.parent)
        with locked(folder):
            known = {_identity(r): r for r in self._read()}
            self._records = self._ordered([*(known | {_identity(record): seal(record)}).values()])
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self._named(), indent=1) + "\n", encoding="utf-8")

    def tabulate(self) -> None:
        """The records as a .csv, which is theirs whatever became of an earlier one."""
        path = self._path.with_suffix(".csv")
        if not self._path.exists():  # nothing was measured, or could not be written
            return
        with locked(path.parent):
            self._records = self._ordered(self._read())
            text = self._csv().encode()
            if not path.exists() or path.read_bytes() != text:
                with replacing(path) as temporary:
                    temporary.write_bytes(text)

    def _ordered(self, records: list[Record]) -> list[Record]:
        """By layer and age; of one snapshot the record of the file that is there first, and then the one on the most text."""

        def place(r: Record) -> tuple[Any, ...]:
            other = r["file"] != self.files.get((Site.of(r["layer"]), r["snapshot"]), r["file"])
            return (
                Site.of(r["layer"]),
                self._labels.index(r["snapshot"]),
                other,
                -r["eval_tokens"],
                -r["ce_tokens"],
                r["file"],
                _basis(r)[2:],
            )

        return sorted(records, key=place)

    def _named(self) -> dict[str, Record]:
        named: dict[str, Record] = {}
        for r in self._records:
            name = f"layer{Site.of(r['layer']).key}_{r['snapshot']}"
            named[f"{name}@{'+'.join(map(str, _basis(r)))}#{r['file']}" if name in named else name] = r
        return named

    def _csv(self) -> str:
        text = io.StringIO()
        columns = [name for name in self._records[0] if name not in ("run", "file", SEAL)]
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._records)
        return text.getvalue()

    def view(self, config: EvalConfig | None) -> list[Record]:
        """One record for each snapshot: under this config where there is one, else the first of those in order."""
        chosen: dict[tuple[int, str], Record] = {}
        for r in self._ordered(self._records):
            first = chosen.setdefault((r["layer"], r["snapshot"]), r)
            if config and r["file"] == first["file"] and _basis(r) == tuple(config.basis().values()):
                chosen[r["layer"], r["snapshot"]] = r
        return list(chosen.values())


def _identity(record: Record) -> tuple[Any, ...]:
    return Site.of(record["layer"]), record["snapshot"], record["file"], *_basis(record)


def _basis(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in _BASIS)
