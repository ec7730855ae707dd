"""`rsae train`: SAEs from an activation cache."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import click

from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import CACHE, DEVICE, PRESET, RUNS, filled, options_of, run
from residual_saes.shared.device import pick_device
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import any_preset, cache_place, short_name, training_defaults
from residual_saes.shared.progress import say
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.target import Target, named
from residual_saes.shared.sites import format_sites
from residual_saes.shared.stores import Bucket, Location
from residual_saes.shared.stores.mirror import Mirror, local
from residual_saes.shared.stores.scratch import ScratchConfig
from residual_saes.shared.units import Shard, parse_shard
from residual_saes.train.config import PUBLISHED, RECIPES, Plan, RunOptions, TrainConfig, parse_plans
from residual_saes.train.loader import FOLLOW_POLL
from residual_saes.train.sparsity.base import Sparsity
from residual_saes.train.sparsity.settings import FORMS
from residual_saes.train.step import StepConfig
from residual_saes.train.targets import added, awaited, parse_targets
from residual_saes.train.trainer import run_folders, train


@click.command()
@PRESET
@CACHE
@click.option(
    "--scratch",
    type=ScratchConfig.parse,
    metavar="DIR:SIZE",
    help="Keep blocks of a cache that is far away on this node's disk, up to a size.",
)
@RUNS
@click.option("--l1", help=f"Settings with commas between them: {FORMS}.")
@click.option("--layers", help="Layers, such as 0-23 or 3,7 [default: all in the cache].")
@options_of(TrainConfig)
@options_of(StepConfig)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=PUBLISHED,
    show_default=True,
    help="Where --decoder-norm, --lr-decay, --hold-l0 and --revive come from, for settings that name no /recipe.",
)
@options_of(RunOptions)
@DEVICE
@click.option(
    "--shard", type=parse_shard, default="0/1", help="This process is i of n, such as 0/8, and takes every n-th layer."
)
@click.option("--list", "listing", is_flag=True, help="Only say which run folders, one a line, this would train into.")
def main(listing: bool, **options: Any) -> None:
    """Train SAEs; run it again to continue. One read of a layer feeds all settings."""
    job = prepare(**options)
    if job is None:
        return say(f"shard {options['shard']} has no layer to train: there are fewer of them than shards", err=True)
    if listing:
        return say("\n".join(str(run.path) for run in job.runs), asked=True)
    job.train()
    say(f"trained layers {named(job.targets)} into {options['runs']}/", err=True)
    following, target = options["follow"] and not options["layers"], options["target"] or ""
    if following and (new := added(target, job.cache, Cache.open(job.cache.path))):
        say(f"note: layers {format_sites(new)} were added meanwhile: run the same command again to train them", err=True)


@dataclass(kw_only=True, frozen=True, slots=True)
class Job:
    """A call of `rsae train` with everything that its options left open."""

    cache: Cache
    name: str  # of the model, with which the runs' names begin
    targets: tuple[Target, ...]
    plans: tuple[Plan, ...]
    options: RunOptions

    @property
    def runs(self) -> list[Run]:
        return run_folders(self.name, self.plans, self.options)

    def train(self) -> None:
        """Raises UserError, too, where an SAE stopped early."""
        if not train(self.cache, self.name, self.targets, self.plans, self.options):
            raise UserError("some SAEs stopped early, as said above; the others are complete")


def prepare(
    preset: str | None, cache: Location | None, scratch: ScratchConfig | None, runs: Location, **options: Any
) -> Job | None:
    """The job that the values of all options describe; None for a shard without a layer. Raises UserError."""
    shard: Shard = options["shard"]
    device = pick_device(options["device"])
    where = cache_place(cache, preset)
    if options["follow"]:
        _await_harvest(where, options["target"] or "", options["layers"])
    opened = Cache.open(where, scratch)
    form, targets = parse_targets(options["target"] or "", options["layers"], opened)
    targets = targets[shard.index :: shard.count]
    if not targets:
        return None
    spec = opened.spec
    most = any_preset(preset).tokens if preset is not None else spec.train_tokens
    tokens = options["tokens"] or min(most, spec.train_tokens)
    defaults = training_defaults(preset, spec.d_model, tokens, spec.holdout_tokens)
    given = {name: getattr(defaults, name) for name in ("expansion", "batch", "lr", "lr_warmup", "window_blocks")}

    def config(recipe: str, kind: Sparsity) -> TrainConfig:
        values = dataclasses.asdict(RECIPES[recipe](kind))
        step = filled(StepConfig, options, decoder_norm=values.pop("decoder_norm"), beta2=kind.BETA2)
        return filled(TrainConfig, options | {"target": form}, **given, **values, tokens=tokens, step=step)

    return Job(
        cache=opened,
        name=short_name(spec.model),
        targets=targets,
        plans=parse_plans(options["l1"] or defaults.l1, options["recipe"], config),
        options=filled(
            RunOptions,
            options | {"device": device},
            runs=local(runs),
            mirror=Mirror(runs) if isinstance(runs, Bucket) else None,
        ),
    )


def _await_harvest(path: Location, target: str, layers: str | None) -> None:
    """Returns when a harvest has written the tokens and begun what is named, or any layer. Raises UserError for what cannot
    be."""
    shown = ""
    while missing := _not_begun(path, target, layers):
        if missing != shown:
            say(f"waiting until a harvest has {missing} of {path}", err=True)
        shown = missing
        time.sleep(FOLLOW_POLL)


def _not_begun(path: Location, target: str, layers: str | None) -> str:
    if not Cache.exists(path) or (cache := Cache.open(path)).tokens.missing():
        return "written the tokens"
    absent = awaited(target, layers, cache)
    return f"begun {absent}" if absent else ""


if __name__ == "__main__":
    run(main)
