"""Layers, one after the other, at every setting: what is refused before anything is written, and where the SAEs go."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from residual_saes.shared.cache import Cache
from residual_saes.shared.device import announce
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import free_bytes
from residual_saes.shared.progress import say
from residual_saes.shared.runs.run import SNAPSHOTS, Run, cache_identity, run_config, snapshot_tokens
from residual_saes.shared.runs.target import Target, dictionaries, named
from residual_saes.shared.sites import format_sites
from residual_saes.shared.stop import finishing
from residual_saes.shared.units import format_bytes
from residual_saes.train.config import PUBLISHED, Plan, RunOptions, TrainConfig
from residual_saes.train.job import machine, summary_writer
from residual_saes.train.kernels.base import TorchKernels
from residual_saes.train.layer import LayerJob
from residual_saes.train.saver import Saver
from residual_saes.train.sparsity.base import Sparsity
from residual_saes.train.step import pick_kernels

_FEW_STEPS = 500  # below this an SAE of any kind is far from what its setting can reach


def train(cache: Cache, name: str, targets: tuple[Target, ...], plans: tuple[Plan, ...], options: RunOptions) -> bool:
    """Train every target by every plan; continue what was begun. Returns whether all of them finished.

    Raises UserError for what cannot be done, before anything is written, and where the disk does not take a file.
    SIGTERM and Ctrl-C are raised when the step in hand is done and its state saved.
    """
    sites = tuple(target.place for target in targets)
    _require_trainable(cache, targets, plans, options)
    runs, config = run_folders(name, plans, options), plans[0].config
    wanted = [(run, _run_config(plan, cache_identity(cache, run.path))) for run, plan in zip(runs, plans, strict=True)]
    if options.mirror is not None:
        options.mirror.prepare()
    for run, stored in wanted:
        run.pull_config()
        run.require_same(stored)
    _require_space(cache, runs, targets, config, options.runs)
    here = machine(options.device)
    try:
        with finishing() as asked, contextlib.ExitStack() as owned:
            for run, stored in wanted:
                owned.enter_context(run.claim(sites))
                run.pull(sites)
                run.create(stored, here)
            announce(options.device)
            _announce_plans(cache, targets, plans)
            _note_other_machine(runs, here)
            kernels = pick_kernels(config.step.precision, options.device)
            return _train_targets(cache, targets, list(zip(runs, plans, strict=True)), options, kernels, asked)
    except OSError as error:
        raise UserError(
            f"cannot write to {options.runs} ({error}): put that right and run the same command again to continue"
        ) from error


def _train_targets(
    cache: Cache,
    targets: tuple[Target, ...],
    runs: list[tuple[Run, Plan]],
    options: RunOptions,
    kernels: TorchKernels,
    asked: Callable[[], bool],
) -> bool:
    whole = True
    with Saver(options.device, most=len(runs)) as saver:
        for target in targets:
            if asked():
                break
            whole &= LayerJob(cache, target, runs, options, kernels, saver, asked).run()
    return whole


def _require_trainable(cache: Cache, targets: tuple[Target, ...], plans: tuple[Plan, ...], options: RunOptions) -> None:
    spec, config = cache.spec, plans[0].config
    sites = tuple(dict.fromkeys(site for target in targets for site in target.sites))
    absent = [site for site in sites if site not in cache.sites]
    if absent:
        raise UserError(
            f"layers {format_sites(absent)} are not in {cache.path}, which has {format_sites(cache.sites)}: "
            f"add them with `rsae harvest --layers {format_sites(absent)}`"
        )
    if config.tokens > spec.train_tokens * options.epochs:
        raise UserError(
            f"{config.tokens:,} tokens are asked for, the cache has {spec.train_tokens:,} to train on: "
            f"lower --tokens, go over it {-(-config.tokens // spec.train_tokens)} times with --epochs, or harvest more"
        )
    if config.steps < SNAPSHOTS:
        raise UserError(f"{config.tokens:,} tokens are fewer than {SNAPSHOTS} batches of {config.batch:,}; lower --batch")
    if config.skip_positions and spec.imported and not spec.imported.positions:
        raise UserError(f"{cache.path} does not know its rows' positions: leave --skip-positions out")
    if config.skip_positions >= spec.context:
        raise UserError(f"contexts have {spec.context} positions: lower --skip-positions, which leaves none of them")
    if config.skip and not targets[0].transcodes:
        raise UserError("--skip is of transcoders: name what they read and write with --target")
    if config.max_norm is not None and len(targets[0].inputs) > 1:
        raise UserError("--max-norm would leave out other rows at each of several layers: use --skip-positions")
    for plan in plans:
        _require_features(plan.sparsity, config.expansion * spec.d_model)
    if options.tensorboard:
        summary_writer()
    if freed := set(sites).intersection(cache.freed()):
        raise cache.ledger.freed_error(freed)
    for site in () if options.follow else sites:
        missing = sum(map(len, cache.missing((site,)).values()))
        if missing:
            raise UserError(f"layer {site} of {cache.path} lacks {missing} blocks: run `rsae harvest` again to finish it")


def _require_features(sparsity: Sparsity, features: int) -> None:
    target, widest = sparsity.target, sparsity.widest
    if target is not None and target > features:
        raise UserError(f"an L0 of {target:g} is more than the {features} features there are: lower it, or raise --expansion")
    if widest >= features > (target or 0):
        raise UserError(f"a prefix of {widest:g} is no part of the {features} features there are: name smaller ones")


def run_folders(name: str, plans: tuple[Plan, ...], options: RunOptions) -> list[Run]:
    """Where the SAEs of these plans go; the folders need not be there."""
    return [Run(options.runs / _folder_name(name, plan), options.mirror) for plan in plans]


def _folder_name(model: str, plan: Plan) -> str:
    config = plan.config
    baseline = "" if config.step.decoder == "trained" else f"-{config.step.decoder}-decoder"
    recipe = "" if plan.recipe == PUBLISHED else f"-{plan.recipe}"
    skip = "-skip" if config.skip else ""
    return f"{model}-{dictionaries(config.target)}-x{config.expansion}-{plan.sparsity.name}{skip}{baseline}{recipe}"


def _run_config(plan: Plan, cache: dict[str, Any]) -> dict[str, Any]:
    about = {} if plan.sparsity.reading is None else {"sparsity": plan.sparsity.reading.fields()}
    return run_config(plan.config.fields() | {"l1": plan.sparsity.fields()}, cache) | about


def _announce_plans(cache: Cache, targets: tuple[Target, ...], plans: tuple[Plan, ...]) -> None:
    """Say in one line what will be trained, so that a default that does not suit is seen before the hours are spent."""
    config = plans[0].config
    settings = ", ".join(plan.sparsity.name + ("" if plan.recipe == PUBLISHED else f" ({plan.recipe})") for plan in plans)
    say(
        f"layers {named(targets)}: {config.expansion * cache.spec.d_model:,} features of "
        f"{targets[0].row_sites * cache.spec.d_model}, "
        f"{config.steps:,} steps of {config.batch:,} tokens, lr {config.lr:g}; {settings}",
        err=True,
    )
    if config.steps < _FEW_STEPS:
        say(f"warning: {config.steps} steps are few: lower --batch, or train on more --tokens or --epochs", err=True)


def _note_other_machine(runs: list[Run], machine: dict[str, Any]) -> None:
    for before in {str(run.config.machine): run.config.machine for run in runs}.values():
        if different := [f"{k} {before[k]} then, {v} now" for k, v in machine.items() if before.get(k) != v]:
            say(f"note: begun elsewhere ({', '.join(different)}): the same training, but not bit for bit", err=True)


def _require_space(cache: Cache, runs: list[Run], targets: tuple[Target, ...], config: TrainConfig, where: Path) -> None:
    """Snapshots of all layers, the resume states of one, and the state that is written before it replaces another."""
    d, sites = cache.spec.d_model, [target.place for target in targets]
    weights = (2 * config.expansion * targets[0].row_sites + config.skip) * d * d * 4
    snapshots = [run.snapshot_path(site, label) for run in runs for site in sites for label in snapshot_tokens(config.tokens)]
    due = sum(not path.exists() for path in snapshots)
    states = [run.state_path(site) for run in runs for site in sites]
    present = min(sum(path.stat().st_size for path in states if path.exists()), len(runs) * 3 * weights)
    needed = due * weights + ((len(runs) + 1) * 3 * weights - present if due else 0)
    free = free_bytes(where)
    if needed > free:
        raise UserError(
            f"{due} snapshots and the resume state need {format_bytes(needed)} at {where}, "
            f"{format_bytes(free)} are free: train fewer --layers or settings, or choose another --runs folder"
        )
