"""`rsae harvest convert`: the blocks of one cache in another, stored otherwise, a layer after the other."""

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

import click
import torch
from torch import Tensor

from residual_saes.harvest.care import free
from residual_saes.harvest.fill import fill_cache
from residual_saes.harvest.plan import prepare_place
from residual_saes.harvest.run import HarvestConfig
from residual_saes.harvest.source import Sink
from residual_saes.harvest.writer import WriterConfig
from residual_saes.shared.cache import Cache, CacheSpec, Stored
from residual_saes.shared.cli import CACHE, PRESET, THREADS, options
from residual_saes.shared.errors import UserError
from residual_saes.shared.presets import cache_place
from residual_saes.shared.progress import say
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.stores import Location, parse_location


class Converted:
    """A cache of the same tokens: an `Origin` of another cache."""

    def __init__(self, of: Cache) -> None:
        self._of = of

    def require_same_tokens(self, cache: Cache) -> None:
        """The spec settles it."""

    def write_tokens(self, cache: Cache, chunks: Collection[int] | None = None) -> None:
        tokens = self._of.tokens
        for chunk in cache.tokens.missing() if chunks is None else chunks:
            entry = tokens.entry(chunk)
            cache.tokens.commit(chunk, tokens.read_chunk(chunk), entry.source, entry.skip)

    def source(self, spec: CacheSpec, sites: tuple[Site, ...], device: torch.device) -> "_Rows":
        return _Rows(self._of, sites)


class _Rows:
    """The rows of another cache, checked: an `ActivationSource`."""

    def __init__(self, cache: Cache, sites: tuple[Site, ...]) -> None:
        self.sites, self.d_model, self.device = sites, cache.spec.d_model, torch.device("cpu")
        self._layers = {site: cache.layer(site) for site in sites}

    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        """As `ActivationSource.run`. Raises UserError for what is missing or damaged."""
        n, context = tokens.shape
        for site, layer in self._layers.items():
            rows = torch.from_numpy(layer[first * context : (first + n) * context])
            sink(site, rows.view(n, context, self.d_model))


@click.command("convert")
@options(PRESET, CACHE)
@click.option("--out", type=parse_location, metavar="PLACE", required=True, help="The other cache.")
@click.option(
    "--store", type=click.Choice(get_args(Stored)), default="int8", show_default=True, help="As what it stores values."
)
@click.option("--layers", help="Layers, such as 0-5 or 3,7 [default: all there are].")
@click.option("--move", is_flag=True, help="Remove each layer's training blocks here once it is there.")
@click.option("--threads", type=THREADS, default=4, show_default=True, help="Threads for the disk.")
def convert_command(
    preset: str | None, cache: Location | None, out: Location, store: Stored, layers: str | None, move: bool, threads: int
) -> None:
    """Store a cache's blocks in another one in half the bytes, a layer after the other; run it again to continue."""
    of = Cache.open(cache_place(cache, preset))
    if of.spec.store == store:
        raise UserError(f"{of.path} stores {store} already: name another --store")
    if of.spec.store != "float16":
        raise UserError(f"what int8 has rounded off does not come back: harvest again with --store {store}")
    sites = parse_sites(layers, of.spec.n_layers) if layers else of.sites
    if absent := set(sites).difference(of.sites):
        raise UserError(f"layers {format_sites(absent)} are not in {of.path}, which has {format_sites(of.sites)}")
    convert(of, out, replace(of.spec, store=store), sites, move=move, threads=threads)


def convert(of: Cache, place: Location, spec: CacheSpec, sites: tuple[Site, ...], *, move: bool, threads: int) -> None:
    """Fill the cache at `place`, whose spec differs in how values are stored alone. Raises UserError."""
    prepare_place(place, spec, sites[:1] if move else sites)
    if move:
        of.remove_leftovers()
    config = HarvestConfig(device=torch.device("cpu"), writer=WriterConfig(threads=threads))
    for site in sites:
        if site in of.freed() and not _whole(place, site):
            say(f"layer {site} is left out: its training blocks were freed", err=True)
            continue
        fill_cache(place, spec, (site,), Converted(of), config)
        if move and of.freeable(site):
            free(of, (site,))


def _whole(place: Location, site: Site) -> bool:
    """Whether the cache at a place has every block of a site."""
    if not Cache.exists(place):
        return False
    cache = Cache.open(place)
    return site in cache.sites and not cache.missing((site,), freed=True)
