"""The ledger of a cache: an entry for every committed block, and a record of every layer whose training blocks were freed.

Layers that are harvested together are a group: they share a folder, named after them, and an entry a block. Which blocks are
committed is told by the names of the entries; what an entry says is compared with its place whenever it is read.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from residual_saes.shared.cache.spec import SPEC_FILE, CacheSpec
from residual_saes.shared.cache.zarr import has_group
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import crc32c, from_bytes, to_bytes
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.stores import Location, Store, get_or_none, local_path
from residual_saes.shared.typed import read

LEDGER_BYTES_PER_LAYER = 360  # of one block, as measured at most; it is 0.0005 % of a full-size block
_AT_ONCE = 16  # entries that are read at a time: each may be a round trip


@dataclass(kw_only=True, frozen=True, slots=True)
class BlockStats:
    """What the ledger holds of one block of one layer. Earlier versions recorded moments and the largest norm as well."""

    bytes: int
    rows: int
    crc32c: str  # of each slice, eight hexadecimal digits after another
    tokens: str  # CRC-32C of the block's tokens that these are the activations of
    nonfinite: int  # values the model gave that float16 cannot hold: NaN stored as 0, too large as ±65504
    by: str = ""  # what it was made on, as the last bits depend on it (shared.device.maker); "" where that was not recorded

    @classmethod
    def of(cls, data: NDArray[Any], slice_rows: int, *, tokens: str = "", nonfinite: int = 0, by: str = "") -> "BlockStats":
        """data float16 [rows, d_model], as the block is stored."""
        checksums = slice_checksums(data, slice_rows)
        return cls(bytes=data.nbytes, rows=len(data), crc32c=checksums, tokens=tokens, nonfinite=nonfinite, by=by)


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerTotals:
    """What the ledger says of a layer as a whole."""

    nonfinite: int = 0
    by: dict[str, int] = dataclasses.field(default_factory=dict)  # {made on: blocks}

    def plus(self, block: BlockStats) -> "LayerTotals":
        by = self.by | {block.by: self.by.get(block.by, 0) + 1}
        return LayerTotals(nonfinite=self.nonfinite + block.nonfinite, by=by)

    @property
    def mixed(self) -> str:
        """On what the blocks were made, where that was not the same for all; "" where it was."""
        return ", ".join(f"{n:,} on {by or 'unknown'}" for by, n in sorted(self.by.items())) if len(self.by) > 1 else ""


def slice_checksums(data: NDArray[Any], slice_rows: int) -> str:
    """The CRC-32C of every slice of [rows, d_model], one after another."""
    return "".join(crc32c(data[first : first + slice_rows]) for first in range(0, len(data), slice_rows))


def damaged_block(cache: Location, site: Site, block: int, why: str) -> UserError:
    return UserError(
        f"layer {site} block {block} of {cache} is damaged: {why}; "
        f"mend it with `rsae harvest repair --cache {cache} --blocks {block}`"
    )


class Ledger:
    """The entries of a cache."""

    def __init__(self, store: Store, spec: CacheSpec) -> None:
        self._store, self._spec, self._digest = store, spec, spec.digest
        self._groups: dict[Site, list[str]] = {}  # {layer: the groups that may have its entries}, as last seen

    def entry_path(self, sites: tuple[Site, ...], block: int) -> Path:
        return local_path(self._store, _entry_key(format_sites(sites), block))

    def folders(self) -> list[str]:
        return ["ledger", *(f"ledger/{name}" for name in self._store.list("ledger"))]

    def has_blocks(self) -> bool:
        """Whether anything but tokens, and what values would be stored relative to, is recorded."""
        groups = set(self._store.list("ledger")).difference(("tokens", "references"))
        return any(self._store.list(f"ledger/{name}") for name in groups)

    def drop_foreign(self) -> None:
        """Remove the entries of another cache, whose arrays are gone. Raises UserError where the arrays are still there:
        somebody lost only the cache.json of that other cache."""
        keys = [f"{folder}/{name}" for folder in self.folders()[1:] for name in self._store.list(folder)]
        foreign = [key for key in keys if self._owner(key) not in (None, self._digest)]
        if foreign and has_group(self._store):
            raise UserError(
                f"{self._store.root} holds {len(foreign)} ledger entries of a cache with other settings, whose {SPEC_FILE} is "
                "gone: repeat those settings, or choose another --cache folder"
            )
        for key in foreign:
            self._store.delete(key)

    def _owner(self, key: str) -> str | None:
        """The digest of the cache that an entry belongs to; None where it is unreadable."""
        try:
            return str(from_bytes(self._store.get(key)).get("cache"))
        except (OSError, ValueError):
            return None

    # --- entries of blocks ---

    def record(self, block: int, stats: dict[Site, BlockStats]) -> None:
        """Write a block's entry. One that is there already keeps its place and is replaced in one step."""
        left, unreadable = dict(stats), []
        for group in self._groups_of(stats):
            key, sites = _entry_key(group, block), _group_sites(group)
            data = get_or_none(self._store, key)
            new = {site: left[site] for site in sites if site in left}
            if data is None or not new:
                continue
            try:
                known = self._parse(group, block, data)
            except ValueError:
                known = new
            if set(known) != set(sites):  # unreadable, and it says nothing of the other layers either: they are harvested again
                unreadable.append(key)
                continue
            if data != (entry := self._entry(block, known | new)) and not self._store.replace(key, entry, data):
                return self.record(block, stats)
            left = {site: s for site, s in left.items() if site not in new}
        if left and not self._store.create(_entry_key(format_sites(left), block), self._entry(block, left)):
            self.record(block, left)  # a file system without locks, and another process was faster
        for key in unreadable:
            self._store.delete(key)

    def _entry(self, block: int, stats: dict[Site, BlockStats]) -> bytes:
        sites = {str(site): dataclasses.asdict(stats[site]) for site in sorted(stats)}
        return to_bytes({"cache": self._digest, "block": block, "layers": sites})

    def _parse(self, group: str, block: int, data: bytes) -> dict[Site, BlockStats]:
        """Raises ValueError unless this is the entry of that block and those layers of this cache, undamaged."""
        value = from_bytes(data)
        if value.get("cache") != self._digest:
            raise ValueError("it is of another cache")
        stats = {Site.of(site): s for site, s in read(dict[str, BlockStats], value.get("layers")).items()}
        if value.get("block") != block or set(stats) != set(_group_sites(group)):
            raise ValueError("it is of another block or other layers")
        size = (self._spec.block_bytes, self._spec.block_rows, 8 * self._spec.slices)
        if any((s.bytes, s.rows, len(s.crc32c)) != size for s in stats.values()):
            raise ValueError("it is of blocks of another size")
        return stats

    def stats(self, site: Site, block: int) -> BlockStats:
        """The record of one block of one layer. Raises UserError if there is none, or it is damaged."""
        group = self._find_group(site, block)
        if group is None:
            raise UserError(f"layer {site} block {block} of {self._store.root} is not harvested: run `rsae harvest` again")
        return self._read(group, block, site)[site]

    def _read(self, group: str, block: int, site: Site) -> dict[Site, BlockStats]:
        key = _entry_key(group, block)
        try:
            return self._parse(group, block, self._store.get(key))
        except (OSError, ValueError) as error:
            why = f"its ledger entry {self._store.path(key)} is unreadable ({error})"
            raise damaged_block(self._store.root, site, block, why) from None

    def _find_group(self, site: Site, block: int) -> str | None:
        """By path: a folder holds thousands of entries, and there are few folders."""
        known = self._first(self._groups.get(site, []), block)
        if known is None:
            self._groups[site] = self._groups_of((site,))
            known = self._first(self._groups[site], block)
        return known

    def _first(self, groups: list[str], block: int) -> str | None:
        return next((group for group in groups if self._has(group, block)), None)

    def _has(self, group: str, block: int) -> bool:
        return self._store.has(_entry_key(group, block))

    def _groups_of(self, sites: Iterable[Site]) -> list[str]:
        wanted = set(sites)
        return [name for name in self._store.list("ledger") if wanted.intersection(_group_sites(name))]

    def _blocks(self, group: str) -> Iterator[int]:
        for name in self._store.list(f"ledger/{group}"):
            stem = name.removesuffix(".json")
            if stem.isdecimal() and int(stem) < self._spec.n_blocks and name == _entry_key(group, int(stem)).rpartition("/")[2]:
                yield int(stem)

    def committed(self, sites: Iterable[Site]) -> dict[Site, set[int]]:
        """The blocks that have an entry, by layer; every folder of the ledger is listed once, and nothing read."""
        committed: dict[Site, set[int]] = {site: set() for site in sites}
        for group in self._groups_of(committed):
            blocks = set(self._blocks(group))
            for site in committed.keys() & set(_group_sites(group)):
                committed[site] |= blocks
        return committed

    def recorded(self, sites: Iterable[Site], block: int) -> set[Site]:
        """Those of the layers that have an entry of the block."""
        wanted = set(sites)
        groups = [group for group in self._groups_of(wanted) if self._has(group, block)]
        return {site for group in groups for site in _group_sites(group)} & wanted

    def totals(self, sites: Iterable[Site]) -> dict[Site, LayerTotals]:
        """Every layer's blocks taken together, from one reading of the ledger. Raises UserError for a damaged entry."""
        totals: dict[Site, LayerTotals] = {}
        seen: set[tuple[Site, int]] = set()
        for group in self._groups_of(sites):
            blocks, read = list(self._blocks(group)), partial(self._read, group, site=_group_sites(group)[0])
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for block, entry in zip(blocks, pool.map(read, blocks), strict=True):
                    for site, stats in entry.items():
                        if (site, block) not in seen:
                            seen.add((site, block))
                            totals[site] = totals.get(site, LayerTotals()).plus(stats)
        return dict(sorted(totals.items()))

    # --- layers whose training blocks were removed on purpose ---

    def freed(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Those of the layers that were freed. Raises UserError for a record that is damaged."""
        names = self._store.list("ledger/freed")
        return tuple(site for site in sites if f"{site.key}.json" in names and self._is_freed(site))

    def _is_freed(self, site: Site) -> bool:
        key = _freed_key(site)
        try:
            if from_bytes(self._store.get(key)) == self._freed_record(site):
                return True
            raise ValueError("it is of another cache or layer")
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._store.path(key)} is unreadable ({error}): delete it, and free layer {site} again if it was freed"
            ) from None

    def _freed_record(self, site: Site) -> dict[str, Any]:
        return {"cache": self._digest, "freed": site.json}

    def wanted(self, site: Site) -> range:
        """The blocks that ought to be there: of a layer that was freed the held-out ones alone."""
        return range(self._spec.train_blocks if self._is_freed(site) else 0, self._spec.n_blocks)

    def mark_freed(self, sites: Iterable[Site]) -> None:
        """From now on these layers' training blocks count as removed, which `Cache.free_block` does."""
        for site in sites:
            self._store.write(_freed_key(site), to_bytes(self._freed_record(site)))

    def unmark_freed(self, sites: Iterable[Site]) -> None:
        """From now on these layers' training blocks are missing, and are harvested again."""
        for site in sites:
            self._store.delete(_freed_key(site))

    def freed_error(self, sites: Iterable[Site]) -> UserError:
        layers = format_sites(sites)
        return UserError(
            f"the training blocks of layers {layers} of {self._store.root} were freed: "
            f"harvest them again with `rsae harvest --layers {layers}`"
        )


def _entry_key(group: str, block: int) -> str:
    return f"ledger/{group}/{block:08d}.json"


def _freed_key(site: Site) -> str:
    return f"ledger/freed/{site.key}.json"


def _group_sites(name: str) -> tuple[Site, ...]:
    """The layers that a folder of the ledger is for; none if it is not one of ours."""
    try:
        sites = parse_sites(name)
    except UserError:
        return ()
    return sites if format_sites(sites) == name else ()
