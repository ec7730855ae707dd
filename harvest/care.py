"""The care of a cache: verify what is committed, harvest again what is damaged, make room, and say on what it was made."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from residual_saes.harvest.origin import Origin
from residual_saes.harvest.run import HarvestConfig, harvest_blocks
from residual_saes.shared.cache import Cache, LayerTotals
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import Progress
from residual_saes.shared.sites import Site, format_sites


def warnings_of_overflow(totals: dict[Site, LayerTotals]) -> list[str]:
    """A line for each layer with values that float16 cannot hold."""
    return [
        f"layer {site!s:>2}: WARNING: {layer.nonfinite:,} values did not fit float16 (stored as 0 or ±65504)"
        for site, layer in totals.items()
        if layer.nonfinite
    ]


def notes_on_mixing(totals: dict[Site, LayerTotals]) -> list[str]:
    """A line for each set of layers whose blocks were made on machines of more than one kind."""
    mixed: dict[str, list[Site]] = {}
    for site, total in totals.items():
        if total.mixed:
            mixed.setdefault(total.mixed, []).append(site)
    return [
        f"note: the blocks of layers {format_sites(sites)} were made on machines of several kinds ({kinds}): all are right, "
        "but their last bits are not those that one machine gives"
        for kinds, sites in mixed.items()
    ]


@dataclass(kw_only=True, slots=True)
class Damage:
    """Damaged blocks and token chunks, each with a line for people, and damaged metadata files."""

    blocks: dict[tuple[Site, int], str] = field(default_factory=dict)
    chunks: dict[int, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [*self.blocks.values(), *self.chunks.values(), *(f"{key} is not as it was written" for key in self.metadata)]


def verify(cache: Cache, sites: tuple[Site, ...], threads: int) -> Damage:
    """Read everything committed and compare it with its checksums, and every block with the tokens that it is of."""
    spec, damage, blocks = cache.spec, Damage(metadata=cache.bad_metadata()), _committed(cache, sites)
    chunks = range(spec.token_chunks) if blocks else sorted(cache.tokens.written())
    damage.chunks = {chunk: why for chunk in chunks if (why := _failure(partial(cache.tokens.read_chunk, chunk)))}

    def check(item: tuple[Site, int]) -> str | None:
        return _failure(partial(cache.stored_block, *item))

    with Progress("verifying", len(blocks) * spec.block_bytes, "bytes") as progress, ThreadPoolExecutor(threads) as pool:
        for item, why in zip(blocks, pool.map(check, blocks), strict=True):
            if why:
                damage.blocks[item] = why
            progress.advance(spec.block_bytes, f"{len(damage.blocks)} damaged" if damage.blocks else "")
    damage.blocks |= _of_other_tokens(cache, [item for item in blocks if item not in damage.blocks], damage.chunks)
    return damage


def _committed(cache: Cache, sites: tuple[Site, ...]) -> list[tuple[Site, int]]:
    """Every block that is committed and wanted, site by site."""
    return [(site, block) for site in sites for block in sorted(cache.committed(site).intersection(cache.wanted(site)))]


def _failure(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def _of_other_tokens(
    cache: Cache, blocks: list[tuple[Site, int]], damaged: Collection[int] = ()
) -> dict[tuple[Site, int], str]:
    """Blocks whose record names other tokens than the cache has; those of damaged token chunks are left out."""
    others, checksums = {}, dict[int, str]()
    per_chunk = cache.spec.token_chunk // cache.spec.block_sequences
    for site, block in sorted(blocks, key=lambda item: item[1]):
        if block // per_chunk in damaged:
            continue
        if block not in checksums:
            checksums[block] = cache.tokens.checksum(cache.block_tokens(block))
        if cache.stats(site, block).tokens != checksums[block]:
            others[site, block] = f"layer {site} block {block} of {cache.path} was made from other tokens than are there"
    return others


def repair(cache: Cache, damage: Damage, origin: Origin, config: HarvestConfig) -> int:
    """Write again what is damaged, and nothing else; returns how many blocks that was, each site's counted.

    Model and text have been compared with the cache's before a byte is touched, and files are replaced, never removed.
    """
    if damage.chunks:
        origin.require_same_tokens(cache)
    cache.add_sites(())
    bad = set(damage.blocks)
    if damage.chunks:
        origin.write_tokens(cache, damage.chunks)
        bad |= set(_of_other_tokens(cache, [item for item in _committed(cache, cache.sites) if item not in bad]))
    groups: dict[tuple[Site, ...], list[int]] = {}
    for block in sorted({block for _, block in bad}):
        groups.setdefault(tuple(sorted(site for site, at in bad if at == block)), []).append(block)
    for sites, blocks in groups.items():
        source = origin.source(cache.spec, sites, config.device)
        harvest_blocks(cache, source, blocks, config, replace=True)
    return len(bad)


def free(cache: Cache, sites: tuple[Site, ...]) -> None:
    """Remove the training blocks of these layers. Safe to kill and repeat: they count as freed before the first one goes."""
    cache.ledger.mark_freed(sites)
    blocks, size = [(site, block) for site in sites for block in cache.freeable(site)], cache.spec.block_bytes
    with Progress("freeing", len(blocks) * size, "bytes") as progress:
        for site, block in blocks:
            cache.free_block(site, block)
            progress.advance(size)
