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
from residual_saes.eval.measure.splice import SplicedModel, constant, only, through, zeros
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
from residual_saes.shared.runs.target import Target
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
        ce_tokens=min(max(1, config.ce_tokens // spec.context) * spec.context, spec.holdout_tokens) * spec.has_model,
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
    gone = {site for results, s in missing for site in results.target(s).sites} - set(cache.sites)
    if gone:  # as planned where layers are harvested, trained and deleted in turn
        say(f"layers {format_sites(gone)} are not in {cache.path}: what was measured of them before is kept", err=True)
    missing = [(results, s) for results, s in missing if gone.isdisjoint(results.target(s).sites)]
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


@dataclass(kw_only=True, frozen=True, slots=True)
class Measured:
    """An SAE's sums over tokens at one site that it writes, and its losses there in the language model, where there is one."""

    activations: Activations  # of the site
    measurement: Measurement
    losses: Losses


class _Evaluation:
    """Measures snapshots, a layer after the other: what is held out is read once for all SAEs that fit into memory together."""

    def __init__(self, cache: Cache, config: EvalConfig, skipped: Skipped, missing: list[tuple[Results, Snapshot]]) -> None:
        self._cache, self._config, self._skipped, self._missing = cache, config, skipped, missing
        self._lm = _spliced(cache, config) if cache.spec.has_model else None
        if cache.spec.imported:
            say(f"note: {cache.path} has no language model, so CE and KL are left out", err=True)

    def run(self) -> None:
        announce(self._config.device)
        with Progress("evaluating", len(self._missing), "SAEs") as progress:
            targets = {results.target(s) for results, s in self._missing}
            for target in sorted(targets, key=lambda target: (target.place, target.sites)):
                with self._skipped.leaving_out():
                    self._evaluate(target, progress)

    def _evaluate(self, target: Target, progress: Progress) -> None:
        pairs, device = [(r, s) for r, s in self._missing if r.target(s) == target], self._config.device
        for group in fitting(pairs, lambda pair: pair[1].path.stat().st_size, device):
            opened = []
            for results, snapshot in group:
                with self._skipped.leaving_out():
                    sae = results.run.load(snapshot, self._cache.spec.d_model).to(device)
                    opened.append(_Opened(results=results, snapshot=snapshot, sae=sae))
            progress.advance(len(group) - len(opened))
            for rows in dict.fromkeys(one.sae.rows for one in opened):
                self._measure(target, rows, [one for one in opened if one.sae.rows == rows], progress)

    def _measure(self, target: Target, rows: Rows, opened: list[_Opened], progress: Progress) -> None:
        config, saes = self._config, [one.sae for one in opened]
        steps = -(-config.eval_tokens // self._cache.spec.block_rows) + 1  # blocks, and what comes after them
        measured = heldout(
            self._cache, target, saes, self._lm, config.eval_tokens, rows, config.ablation,
            lambda: progress.advance(len(saes) / steps),
        )  # fmt: skip
        for one, of_outputs in zip(opened, measured, strict=True):
            for site, of_site in zip(target.outputs, of_outputs, strict=True):
                one.results.add(self._result(one, site, of_site))
            progress.advance(1 / steps, f"layer {target} {one.snapshot.label}")

    def _result(self, one: _Opened, site: Site, measured: Measured) -> Result:
        """The result, when the statistics of each feature are written."""
        run, label, stats, measurement = one.results.run, one.snapshot.label, one.sae.stats, measured.measurement
        metrics, features = measurement.finish(measured.activations, self._config.dead_at, self._config.alive_above)
        save_features(features_path(run, site, label), features, tokens=measurement.tokens, file=stats[SEAL])
        numbers = {"l1_weight": stats["lambda"]} | vars(metrics) | vars(measured.losses)
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
    target: Target,
    saes: list[Sae],
    lm: SplicedModel | None,
    tokens: int,
    rows: Rows = ALL,
    ablation: str = "zero",
    after: Callable[[], object] = lambda: None,
) -> list[list[Measured]]:
    """One reading of a target's held-out activations for all of these SAEs: what was measured of each at every site that it
    writes, the others left as they are. Truth is of SAEs of one site. `after` is called after every block."""
    of_one = target == Target.itself(target.place)
    world = world_of(cache.spec, target.place) if cache.spec.world and of_one else None
    blocks = heldout_blocks(cache, target, tokens, rows, world)
    activations, tallies = measure(blocks, saes, cache.spec.context, after, world)
    measured: list[list[Measured]] = [[] for _ in saes]
    for site, of_site, at_site in zip(target.outputs, activations, zip(*tallies, strict=True), strict=True):
        found = [Losses()] * len(saes)
        if lm is not None:
            replacements = [zeros, constant(of_site.all.mean), *(through(tally.sae) for tally in at_site)]
            clean, (zero, mean, *spliced) = lm.losses(site, [only(rows, each) for each in replacements], target.inputs)
            found = [losses(clean, zero, mean, loss, ablation) for loss in spliced]
        for of_sae, tally, loss in zip(measured, at_site, found, strict=True):
            of_sae.append(Measured(activations=of_site, measurement=tally, losses=loss))
    return measured
