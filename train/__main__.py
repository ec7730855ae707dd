"""`python -m train`: SAEs from an activation cache."""

import time
from pathlib import Path
from typing import Any

import click

from shared.cache import Cache
from shared.cli import CACHE, DEVICE, PRESET, RUNS, SEED, THREADS, Number, run
from shared.device import pick_device
from shared.errors import UserError
from shared.presets import get_preset
from shared.progress import say
from shared.sites import Site, format_sites, parse_sites
from shared.stores import Bucket, Location
from shared.stores.mirror import Mirror, local
from shared.stores.scratch import ScratchConfig
from shared.units import Shard, parse_count, parse_shard
from train.loader import FOLLOW_POLL
from train.recipes import PUBLISHED, RECIPES
from train.sparsity.settings import parse_settings
from train.step import StepConfig
from train.trainer import RunOptions, TrainConfig, run_folders, train


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
@click.option("--l1", help="Settings with commas: 3e-4, adaptive (5e-4 until L0 is 150), adaptive:INIT@L0, batchtopk:K.")
@click.option("--layers", help="Layers, such as 0-23 or 3,7 [default: all in the cache].")
@click.option("--expansion", type=click.IntRange(1, 1 << 16), help="Features per dimension.")
@click.option("--tokens", help="Tokens to train on, such as 300M [default: the preset's, or the whole cache if it is smaller].")
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="How often the cache may be gone over.")
@click.option("--l1-reduction", type=click.Choice(["sum", "mean"]), default="sum", show_default=True)
@click.option("--batch", type=click.IntRange(1, 1 << 30), help="Tokens in a step.")
@click.option("--lr", type=Number(0, 1, min_open=True), help="Adam's learning rate.")
@click.option("--lr-warmup", type=click.IntRange(0), help="Steps over which lr rises.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=PUBLISHED,
    show_default=True,
    help="Where the defaults of the next three come from.",
)
@click.option("--decoder-norm", type=click.Choice(["unit", "free"]), help="free: of any norm, by which L1 is weighted.")
@click.option("--lr-decay", type=Number(0, 1), help="Share of the run, at its end, over which lr falls to zero.")
@click.option(
    "--hold-l0",
    type=Number(0, 0.5),
    help="Share of the run, at its end, without L1: L0 is held by keeping each batch's largest activations.",
)
@click.option("--window-blocks", type=click.IntRange(1), help="Blocks shuffled together.")
@click.option("--skip-positions", type=click.IntRange(0), default=0, show_default=True, help="Of each context, not trained on.")
@click.option("--max-norm", type=Number(1), help="Rows longer than this many medians are not trained on [default: all are].")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of the products.")
@click.option("--sparse-below", type=Number(0, 1), help="Share of active entries under which a step is sparse.")
@click.option(
    "--decoder",
    type=click.Choice(["trained", "random"]),
    default="trained",
    show_default=True,
    help="random: its directions stay as drawn, a baseline in a run of its own.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@DEVICE
@click.option("--threads", type=THREADS, default=16, show_default=True, help="Reader threads.")
@click.option("--save-minutes", type=Number(0), default=5.0, show_default=True, help="Between resume states.")
@click.option(
    "--shard", type=parse_shard, default="0/1", help="This process is i of n, such as 0/8, and takes every n-th layer."
)
@click.option("--follow", is_flag=True, help="Begin beside the harvest, and wait for what is not there yet.")
@click.option("--list", "listing", is_flag=True, help="Only say which run folders, one a line, this would train into.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard curves as well.")
def main(
    preset: str, cache: Location | None, scratch: ScratchConfig | None, runs: Location, listing: bool, **options: Any
) -> None:
    """Train SAEs; run it again to continue. One read of a layer feeds all settings."""
    p = get_preset(preset)
    settings = parse_settings(options["l1"] or p.l1)
    shard: Shard = options["shard"]
    device = pick_device(options["device"])
    where = cache or Path("data") / p.name
    if options["follow"]:
        _await_tokens(where)
    opened = Cache.open(where, scratch)
    sites = parse_sites(options["layers"]) if options["layers"] else _not_freed(opened)
    sites = sites[shard.index :: shard.count]
    if not sites:
        return say(f"shard {shard} has no layer to train: there are fewer of them than shards", err=True)
    chosen: dict[str, Any] = {k: v if options[k] is None else options[k] for k, v in RECIPES[options["recipe"]].items()}
    changed = {k: options[k] for k in ("expansion", "batch", "lr", "lr_warmup", "window_blocks") if options[k] is not None}
    config = TrainConfig(
        **{"expansion": p.expansion, "batch": p.batch, "lr": p.lr, "lr_warmup": p.lr_warmup, "window_blocks": p.window_blocks}
        | changed,
        tokens=parse_count(options["tokens"]) if options["tokens"] else min(p.tokens, opened.spec.train_tokens),
        lr_decay=chosen["lr_decay"],
        hold_l0=chosen["hold_l0"],
        skip_positions=options["skip_positions"],
        max_norm=options["max_norm"],
        seed=options["seed"],
        step=StepConfig(
            l1_reduction=options["l1_reduction"],
            precision=options["precision"],
            decoder=options["decoder"],
            decoder_norm=chosen["decoder_norm"],
            **({} if options["sparse_below"] is None else {"sparse_below": options["sparse_below"]}),
        ),
    )
    run_options = RunOptions(
        runs=local(runs),
        mirror=Mirror(runs) if isinstance(runs, Bucket) else None,
        device=device,
        threads=options["threads"],
        epochs=options["epochs"],
        save_minutes=options["save_minutes"],
        tensorboard=options["tensorboard"],
        recipe=options["recipe"],
        follow=options["follow"],
    )
    name = Path(opened.spec.model).name
    if listing:
        return say("\n".join(str(run.path) for run in run_folders(name, settings, config, run_options)))
    if not train(opened, name, sites, settings, config, run_options):
        raise UserError("some SAEs stopped early, as said above; the others are complete")
    say(f"trained layers {format_sites(sites)} into {runs}/", err=True)


def _await_tokens(path: Location) -> None:
    """Returns when the cache's harvest has come so far that it is said which layers it is of."""
    if not Cache.exists(path) or Cache.open(path).missing_token_chunks():
        say(f"waiting until a harvest has written the tokens of {path}", err=True)
    while not Cache.exists(path) or Cache.open(path).missing_token_chunks():
        time.sleep(FOLLOW_POLL)


def _not_freed(cache: Cache) -> tuple[Site, ...]:
    """All layers that can be trained. Raises UserError if there is none."""
    freed = cache.freed()
    if freed == cache.sites:
        raise cache.freed_error(freed)
    if freed:
        say(f"note: layers {format_sites(freed)} were freed and are left out", err=True)
    return tuple(site for site in cache.sites if site not in freed)


if __name__ == "__main__":
    run(main)
