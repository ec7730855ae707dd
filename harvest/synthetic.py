"""`rsae harvest synthetic`: fill an activation cache from synthetic worlds, whose features are known."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import click
import torch

from residual_saes.harvest.fill import FILLING, fill_cache
from residual_saes.harvest.origin import Synthetic
from residual_saes.harvest.plan import prepare_place, whole_blocks
from residual_saes.harvest.run import HarvestConfig
from residual_saes.harvest.writer import WriterConfig
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.cache.spec import Stored
from residual_saes.shared.cli import CACHE, PRESET, SEED, Number, filled, options, options_of
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import DATA, WorldPreset, world_preset
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location
from residual_saes.shared.synthetic.config import WorldConfig
from residual_saes.shared.typed import Bounds, read
from residual_saes.shared.units import Shard, parse_layers


def _world_options() -> tuple[Callable[..., Any], ...]:
    """An option for each field of a world, with its bounds."""
    hints = get_type_hints(WorldConfig, include_extras=True)

    def number(of: type, bounds: Bounds) -> click.IntRange | Number:
        return click.IntRange(int(bounds.least), int(bounds.most)) if of is int else Number(bounds.least, bounds.most)

    return tuple(
        click.option(
            f"--{f.name.replace('_', '-')}",
            type=number(*get_args(hints[f.name])),
            help=f"{f.metadata['help']} [default: by preset, or {f.default:,}]",
        )
        for f in fields(WorldConfig)
    )


@click.command("synthetic")
@options(
    PRESET,
    CACHE,
    options_of(WorldPreset),
    click.option("--worlds", type=click.IntRange(1, 10_000), default=1, show_default=True, help="A layer of the cache each."),
    click.option("--layers", help="Worlds to fill now, such as 0-3 or 3,7 [default: all]."),
    *_world_options(),
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of worlds, rows and their order.")
@FILLING
def synthetic_command(**options: Any) -> None:
    """Fill a cache from synthetic worlds; run it again to continue. `rsae eval truth` knows what is in it."""
    fill_synthetic(**options)


def fill_synthetic(
    preset: str | None,
    cache: Location | None,
    worlds: int,
    layers: str | None,
    seed: int,
    store: Stored,
    threads: int,
    shard: Shard,
    **options: Any,
) -> Cache:
    """The cache that the values of all options describe. Raises UserError."""
    base = world_preset(preset)
    world = filled(WorldConfig, options, **{f.name: getattr(base.world, f.name) for f in fields(WorldConfig)})
    chosen = filled(WorldPreset, options, **{f.name: getattr(base, f.name) for f in fields(WorldPreset)} | {"world": world})
    name = base.name if (world, chosen.d_model) == (base.world, base.d_model) else f"synthetic-{world.features}"
    spec = _spec(replace(chosen, name=name), worlds, seed, store)
    place, again = DATA / name if cache is None else cache, layers is not None  # whoever names a layer wants all of it
    sites = tuple(map(Site, parse_layers(f"0-{worlds - 1}" if layers is None else layers, worlds)))
    prepare_place(place, spec, sites)
    config = HarvestConfig(device=torch.device("cpu"), writer=WriterConfig(threads=threads), shard=shard)
    return fill_cache(place, spec, sites, Synthetic(), config, again=again)


def _spec(chosen: WorldPreset, worlds: int, seed: int, store: Stored) -> CacheSpec:
    """Raises UserError for what cannot be a world or a cache."""
    rows = chosen.context * chosen.block_sequences
    n_blocks, holdout_blocks = whole_blocks(chosen.tokens, chosen.holdout_tokens, rows)
    spec = CacheSpec(
        model=chosen.name, context=chosen.context, d_model=chosen.d_model, n_layers=worlds, world=chosen.world, seed=seed,
        block_sequences=chosen.block_sequences, n_blocks=n_blocks, holdout_blocks=holdout_blocks,
        store=store,
    )  # fmt: skip
    try:
        return read(CacheSpec, spec.to_dict())
    except ValueError as error:
        raise UserError(f"there is no such world: {error}") from None
