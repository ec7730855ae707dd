"""Every snapshot of every run → numbers in its results/ folder (store.py).

What cannot be evaluated is left out with a line that says why, and all else is done.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch

from residual_saes.eval.measure.features import features_path, save_features
from residual_saes.eval.measure.heldout import Activations, heldout_blocks, heldout_tokens
from residual_saes.eval.measure.metrics import Measurement, losses, measure
from residual_saes.eval.measure.result import Basis, Losses, Result
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.measure.splice import SplicedModel, constant, only, through
from residual_saes.eval.measure.store import Results
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import option
from residual_saes.shared.device import announce, fitting
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import harvested_model
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.rows import ALL, Rows
from residual_saes.shared.runs.run import FINAL, Run, Snapshot
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import SEAL
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.synthetic.world import world_of


@dataclass(kw_only=True, frozen=True)
class EvalConfig(Basis):
    """How much held-out text the numbers rest on, by which definitions, and where they are computed."""

    device: torch.device
    model: str | None = None  # where the language model lies, if not where the cache says
    snapshots: str = option("Which of each layer's snapshots.", "all", type=click.Choice(["all", FINAL]))


def evaluate(cache: Cache, runs: list[Run], config: EvalConfig, skipped: Skipped) -> dict[str, list[Result]]:
    """{run: results}, one result for each site and snapshot that is or was measured, by site and then by age; written as they
    are made. Where this evaluation could not measure a snapshot, an earlier result stands in with what it was measured on.
    Raises UserError for what no run could be evaluated with. A signal acts at once: what is measured is written by then."""
    spec = cache.spec
    if spec.holdout_blocks == 0:
        raise UserError(f"{cache.path} holds out nothing to evaluate on: harvest with --holdout-tokens")
    config = dataclasses.replace(
        config,
        eval_tokens=min(config.eval_tokens, spec.holdout_tokens),
        ce_tokens=0 if spec.world else min(max(1, config.ce_tokens // spec.context) * spec.context, spec.holdout_tokens),
    )
    stores = {}
    for run in runs:
        run.remove_leftovers()
        with skipped.leaving_out():
            stores[run.name] = Results(run)
    missing = [
        (results, s)
        for results in stores.values()
        for s in results.missing(config, skipped)
        if config.snapshots in ("all", s.label)
    ]
    gone = {s.site for _, s in missing} - set(cache.sites)
    if gone:  # as planned where layers are harvested, trained and deleted in turn
        say(f"layers {format_sites(gone)} are not in {cache.path}: what was measured of them before is kept", err=True)
    missing = [(results, s) for results, s in missing if s.site not in gone]
    if missing:
        _Evaluation(cache, config, skipped, missing).run()
    for results in stores.values():
        results.tabulate()
    return {name: results.view(config) for name, results in stores.items()}


@dataclass(kw_only=True, frozen=True, slots=True)
class _Opened:
    """A checkpoint to be measured, and where its result goes."""

    results: Results
    snapshot: Snapshot
    sae: Sae


class _Evaluation:
    """Measures snapshots, a layer after the other: what is held out is read once for all SAEs that fit into memory together."""

    def __init__(self, cache: Cache, config: EvalConfig, skipped: Skipped, missing: list[tuple[Results, Snapshot]]) -> None:
        self._cache, self._config, self._skipped, self._missing = cache, config, skipped, missing
        self._lm = None if cache.spec.world else _spliced(cache, config)

    def run(self) -> None:
        announce(self._config.device)
        with Progress("evaluating", len(self._missing), "SAEs") as progress:
            for site in sorted({s.site for _, s in self._missing}):
                with self._skipped.leaving_out():
                    self._evaluate(site, progress)

    def _evaluate(self, site: Site, progress: Progress) -> None:
        pairs, device = [pair for pair in self._missing if pair[1].site == site], self._config.device
        for group in fitting(pairs, lambda pair: pair[1].path.stat().st_size, device):
            opened = []
            for results, snapshot in group:
                with self._skipped.leaving_out():
                    belongs = results.run.belongs(site, snapshot.label)
                    sae = Sae.load(snapshot.path, self._cache.spec.d_model, belongs=belongs).to(device)
                    opened.append(_Opened(results=results, snapshot=snapshot, sae=sae))
            progress.advance(len(group) - len(opened))
            for rows in dict.fromkeys(one.sae.rows for one in opened):
                self._measure(site, rows, [one for one in opened if one.sae.rows == rows], progress)

    def _measure(self, site: Site, rows: Rows, opened: list[_Opened], progress: Progress) -> None:
        config, saes = self._config, [one.sae for one in opened]
        steps = -(-config.eval_tokens // self._cache.spec.block_rows) + 1  # blocks, and what comes after them
        activations, measured = heldout(
            self._cache, site, saes, self._lm, config.eval_tokens, rows, config.ablation,
            lambda: progress.advance(len(saes) / steps),
        )  # fmt: skip
        for one, (measurement, of_lm) in zip(opened, measured, strict=True):
            one.results.add(self._result(one, measurement, activations, of_lm))
            progress.advance(1 / steps, f"layer {site} {one.snapshot.label}")

    def _result(self, one: _Opened, measurement: Measurement, activations: Activations, of_lm: Losses) -> Result:
        """The result, when the statistics of each feature are written."""
        run, site, label, stats = one.results.run, one.snapshot.site, one.snapshot.label, one.sae.stats
        metrics, features = measurement.finish(activations, self._config.dead_at, self._config.alive_above)
        save_features(features_path(run, site, label), features, tokens=measurement.tokens, file=stats[SEAL])
        numbers = {"l1_weight": stats["lambda"]} | vars(metrics) | vars(of_lm)
        known: dict[str, Any] = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        basis = {f.name: getattr(self._config, f.name) for f in dataclasses.fields(Basis)}
        return Result(
            run=run.config.digest, site=site, snapshot=label, trained_tokens=stats["tokens"], **known, **basis,
            file=stats[SEAL],
        )  # fmt: skip


def _spliced(cache: Cache, config: EvalConfig) -> SplicedModel:
    """The language model of a cache, on as many held-out tokens as are wanted. Raises UserError."""
    model, tokens = harvested_model(cache, config.model), heldout_tokens(cache, config.ce_tokens)
    return SplicedModel(str(model.folder), None, cache.spec.precision, config.device, tokens)


def heldout(
    cache: Cache,
    site: Site,
    saes: list[Sae],
    lm: SplicedModel | None,
    tokens: int,
    rows: Rows = ALL,
    ablation: str = "zero",
    after: Callable[[], object] = lambda: None,
) -> tuple[Activations, list[tuple[Measurement, Losses]]]:
    """One reading of a layer's held-out activations for all of these SAEs: each one's sums over tokens, and its losses in the
    language model, where there is one. `after` is called after every block."""
    world = world_of(cache.spec, site) if cache.spec.world else None
    blocks = heldout_blocks(cache, site, tokens, rows, world)
    activations, measurements = measure(blocks, saes, cache.spec.context, after, world)
    if lm is None:
        return activations, [(measurement, Losses()) for measurement in measurements]
    ablations = [torch.zeros_like, constant(activations.all.mean)]
    clean, (zero, mean, *spliced) = lm.losses(site, [only(rows, replace) for replace in (*ablations, *map(through, saes))])
    return activations, [
        (measurement, losses(clean, zero, mean, loss, ablation))
        for measurement, loss in zip(measurements, spliced, strict=True)
    ]
