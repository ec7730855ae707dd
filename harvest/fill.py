"""A cache filled from what it is made from: created or compared first, and looked at afterwards."""

from typing import get_args

import click

from residual_saes.harvest.care import notes_on_mixing, warnings_of_overflow
from residual_saes.harvest.origin import Origin
from residual_saes.harvest.plan import remaining_bytes, require_space
from residual_saes.harvest.run import HarvestConfig, harvest
from residual_saes.shared.cache import Cache, CacheSpec, Stored
from residual_saes.shared.cli import THREADS, options
from residual_saes.shared.progress import say
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.stores import Location
from residual_saes.shared.units import ALONE, parse_shard

# options of commands that fill a cache from something else than a text
FILLING = options(
    click.option(
        "--store", type=click.Choice(get_args(Stored)), default="float16", show_default=True, help="As what values are stored."
    ),
    click.option("--threads", type=THREADS, default=4, show_default=True, help="Threads for the disk."),
    click.option(
        "--shard", type=parse_shard, default=ALONE, help="This process is i of n at work on the same cache, such as 0/8."
    ),
)


def fill_cache(
    place: Location, spec: CacheSpec, sites: tuple[Site, ...], origin: Origin, config: HarvestConfig, *, again: bool = False
) -> Cache:
    """Bring the cache to the state where every block of these sites is committed, with `again` those that were freed as well.
    Raises UserError, and where the cache is of another spec changes nothing."""
    if Cache.exists(place):
        cache = Cache.open(place)
        cache.require_same(spec)
        cache.remove_leftovers()
        require_space(place, remaining_bytes(cache, sites, freed=again))
        cache.add_sites(sites)
        if again:
            cache.ledger.unmark_freed(set(sites).intersection(cache.freed()))
    else:
        cache = Cache.create(place, spec, sites)
        cache.remove_leftovers()
    harvest(cache, sites, origin, config)
    cache.remove_leftovers()  # of another machine's harvest that was killed shortly before this one began
    totals = cache.totals()
    for line in (*warnings_of_overflow(totals), *notes_on_mixing(totals)):
        say(line, err=True)
    if freed := cache.freed():
        say(f"note: layers {format_sites(freed)} were freed but for what is held out; --layers brings them back", err=True)
    say(
        f"{place}: layers {format_sites(sites)} complete, {spec.train_tokens:,} tokens to train on and "
        f"{spec.holdout_tokens:,} held out"
    )
    return cache
