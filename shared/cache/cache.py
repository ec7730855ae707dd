"""An open cache: blocks are read and checked, staged and committed. Tokens and ledger are objects of their own."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.cache import int8, zarr
from residual_saes.shared.cache.ledger import BlockStats, LayerTotals, Ledger, damaged_block, slice_checksums
from residual_saes.shared.cache.references import References
from residual_saes.shared.cache.spec import FORMAT, SPEC_FILE, CacheSpec, other_format
from residual_saes.shared.cache.tokens import TokenArray
from residual_saes.shared.cache.view import Layer
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import page_aligned
from residual_saes.shared.seal import crc32c, from_bytes, to_bytes
from residual_saes.shared.shuffle import block_rows
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location, Staged, Store, get_or_none, local_path, open_store
from residual_saes.shared.stores.scratch import Scratch, ScratchConfig
from residual_saes.shared.typed import read

assert sys.byteorder == "little", "the cache stores little-endian values as they lie in memory"


class Cache:
    """An open cache. Reading needs nothing but the files; writing keeps the commit order described in `shared.cache`."""

    def __init__(self, store: Store, spec: CacheSpec, scratch: ScratchConfig | None = None) -> None:
        self._store, self.spec, self.path = store, spec, store.root
        self.digest = spec.digest  # what a run records of its cache, and compares
        self.ledger, self.tokens = Ledger(store, spec), TokenArray(store, spec)
        self.references = References(store, spec)
        self.sites = zarr.stored_sites(store, spec)
        self._scratch = Scratch(scratch, self.digest) if scratch else None

    @classmethod
    def exists(cls, path: Location) -> bool:
        return open_store(path).has(SPEC_FILE)

    @classmethod
    def open(cls, path: Location, scratch: ScratchConfig | None = None) -> Self:
        """Raises UserError for a missing, foreign, damaged or differently versioned cache.

        Blocks that are read are kept in `scratch`, as long as there is room, and read from there.
        """
        store = open_store(path)
        data = get_or_none(store, SPEC_FILE)
        if data is None:
            zarr.refuse_foreign(store)
            raise UserError(f"no activation cache at {path}: run `make harvest` or `rsae harvest` first")
        try:
            value = from_bytes(data)
            if value.get("format", FORMAT) != FORMAT:
                raise other_format(path, value["format"])
            spec = read(CacheSpec, value.get("spec"))
            if value.get("digest") != spec.digest:
                raise ValueError("its digest does not match")
        except ValueError as error:
            if not store.has(zarr.GROUP):
                raise UserError(f"{path / SPEC_FILE} is not of an activation cache; choose another folder") from None
            raise UserError(
                f"{path / SPEC_FILE} is damaged ({error}): remove that file and run the `rsae harvest` command that made "
                "the cache again; it writes the file anew and keeps what is committed"
            ) from None
        return cls(store, spec, scratch)

    @classmethod
    def create(cls, path: Location, spec: CacheSpec, sites: tuple[Site, ...]) -> Self:
        """A new cache, or the one that another process has created meanwhile. Raises UserError if that is of another spec, or
        the spec is of sizes that no cache can have."""
        store, content = open_store(path), spec.to_dict()
        try:
            read(CacheSpec, content)
        except ValueError as error:
            raise UserError(f"no cache can be made at {path}: {error}") from None
        if not store.has(SPEC_FILE):
            zarr.refuse_foreign(store)
            Ledger(store, spec).drop_foreign()
            for key, data in zarr.metadata(spec, ()).items():
                store.write(key, data)
            store.create(SPEC_FILE, to_bytes({"format": FORMAT, "digest": spec.digest, "spec": content}))
        cache = cls.open(path)
        cache.require_same(spec)
        cache.add_sites(sites)
        return cache

    def add_sites(self, sites: tuple[Site, ...]) -> None:
        """Make the arrays of these layers where they are not yet; puts right metadata that is not as it should be."""
        for key, data in self._metadata((*self.sites, *sites)).items():
            if get_or_none(self._store, key) != data:
                self._store.write(key, data)
        self.sites = zarr.stored_sites(self._store, self.spec)

    def _metadata(self, sites: tuple[Site, ...]) -> dict[str, bytes]:
        """{key: content} of all that is there beside blocks, tokens and their entries."""
        return self.references.files(sites) | zarr.metadata(self.spec, sites, self.references.attributes(sites))

    def discard(self) -> None:
        """Take away a cache in which no block is committed yet: a text that is too short fixes another spec."""
        if self.ledger.has_blocks():
            raise UserError(f"{self.path} has committed blocks and is kept: its text is not what it was made from")
        self._store.delete(SPEC_FILE)
        for folder in ("ledger", zarr.GROUP):
            self._store.delete_all(folder)

    def require_same(self, spec: CacheSpec) -> None:
        """Raises UserError naming every setting in which `spec` differs from this cache."""
        different, own = self.spec.differences(spec), self.spec
        if different:
            model = f"{own.model} at commit {own.model_commit}" if own.model_commit else own.model
            of = f"model {model}, text {own.dataset}" if own.has_model else own.dataset or model
            raise UserError(
                f"{self.path} was harvested with other settings ({'; '.join(different)}): repeat those settings "
                f"({of}) or choose another --cache folder"
            )

    def remove_leftovers(self) -> None:
        """Remove what killed writers left half-written anywhere in the cache."""
        for prefix in self._folders():
            self._store.remove_leftovers(prefix)

    def leftovers(self) -> list[int]:
        """The bytes of each file in the cache that is half-written, by a process at work or one that was killed."""
        return [size for prefix in self._folders() for size in self._store.leftovers(prefix)]

    def _folders(self) -> tuple[str, ...]:
        return ("", *self.ledger.folders(), *zarr.folders(self._store))

    def bad_metadata(self) -> list[str]:
        """The arrays' metadata files, and the ledger's references, that are not as they should be."""
        return [key for key, data in self._metadata(self.sites).items() if get_or_none(self._store, key) != data]

    def layer(self, layer: int | Site) -> Layer:
        """A layer's rows in the order of the text, for notebooks. Raises UserError if it is not in the cache."""
        return Layer(self, Site(layer) if isinstance(layer, int) else layer)

    # --- reading blocks ---

    def block_path(self, site: Site, block: int) -> Path:
        """Of a cache on a disk, as are the paths of entries and tokens."""
        return local_path(self._store, zarr.block_key(site, block))

    def block_order(self, block: int) -> NDArray[np.int64]:
        """Row j of a stored block is activation `order[j]` of its sequences read one after the other."""
        return block_rows(self.spec.block_rows, seed=self.spec.seed, block=block)

    def values(self, site: Site, stored: NDArray[Any]) -> NDArray[np.float16]:
        """Activations float16 [n, d_model] of rows as they are stored. Raises UserError."""
        if self.spec.store == "float16":
            return stored
        order, out = torch.arange(len(stored)), torch.empty(len(stored), self.spec.d_model, dtype=torch.float16)
        int8.take(torch.from_numpy(stored), order, self.references.of(site), out)
        return out.numpy()

    def read_block(self, site: Site, block: int, out: NDArray[Any]) -> None:
        """Fill `out` [block_rows, row_items] from disk. Raises UserError if the file is missing, unreadable or short."""
        self._read(site, block, out, 0)

    def check_block(self, site: Site, block: int, data: NDArray[Any], stats: BlockStats) -> None:
        """Raises UserError naming layer and block if `data` is not what was committed."""
        rows = self.spec.slice_rows
        if slice_checksums(data, rows) != stats.crc32c and not (
            self._read_anew(site, block, data, 0) and slice_checksums(data, rows) == stats.crc32c
        ):
            raise self._damaged(site, block, "its checksum does not match")

    def whole_block(self, site: Site, block: int) -> NDArray[np.float16]:
        """[block_rows, d_model], read and checked. Raises UserError naming a block that is not there, or damaged."""
        return self.values(site, self.stored_block(site, block))

    def stored_block(self, site: Site, block: int) -> NDArray[Any]:
        """[block_rows, row_items], read and checked. Raises UserError naming a block that is not there, or damaged."""
        data = self.spec.stored_rows(self.spec.block_rows)
        self.read_block(site, block, data)
        self.check_block(site, block, data, self.stats(site, block))
        return data

    def read_slice(self, site: Site, block: int, index: int, out: NDArray[Any]) -> None:
        """Fill `out` [rows of that slice, row_items] from disk: rows index · slice_rows … of the block. Raises UserError."""
        self._read(site, block, out, index * self.spec.slice_rows * self.spec.row_bytes)

    def check_slice(self, site: Site, block: int, index: int, data: NDArray[Any], stats: BlockStats) -> None:
        """Raises UserError naming layer, block and slice if `data` is not what was committed."""
        wanted, offset = stats.crc32c[8 * index : 8 * index + 8], index * self.spec.slice_rows * self.spec.row_bytes
        if crc32c(data) != wanted and not (self._read_anew(site, block, data, offset) and crc32c(data) == wanted):
            raise self._damaged(site, block, f"the checksum of slice {index} does not match")

    def _read(self, site: Site, block: int, out: NDArray[Any], offset: int) -> None:
        if self._scratch is not None:
            view, size = memoryview(out.data).cast("B"), self.spec.block_bytes
            if self._scratch.read(site, block, view, offset, size, partial(self._fetch, site, block)):
                return
        self._read_store(site, block, out, offset)

    def _fetch(self, site: Site, block: int) -> memoryview:
        """A block from where the cache lies, checked, in memory that direct writes accept."""
        spec = self.spec
        data: NDArray[Any] = page_aligned(spec.block_rows, spec.row_items, dtype=spec.torch_item).numpy()
        self._read_store(site, block, data, 0)
        self.check_block(site, block, data, self.stats(site, block))
        return memoryview(data.data).cast("B")

    def _read_anew(self, site: Site, block: int, out: NDArray[Any], offset: int) -> bool:
        """Where the scratch may have given a damaged copy, or an old one: away with it, and the bytes from where they lie."""
        if self._scratch is None:
            return False
        self._scratch.drop(site, block)
        self._read_store(site, block, out, offset)
        return True

    def _read_store(self, site: Site, block: int, out: NDArray[Any], offset: int) -> None:
        try:
            n = self._store.read(zarr.block_key(site, block), memoryview(out.data).cast("B"), offset)
        except OSError as error:
            if block not in self.wanted(site):
                raise self.ledger.freed_error((site,)) from None
            raise self._damaged(site, block, error.strerror or "unreadable") from None
        if n < out.nbytes:
            raise self._damaged(site, block, f"{out.nbytes - n} bytes short")

    def _damaged(self, site: Site, block: int, why: str) -> UserError:
        return damaged_block(self.path, site, block, why)

    # --- committing blocks ---

    def settle(self, site: Site, block: Tensor) -> None:
        """What the values of a site are stored relative to is settled by its first block, float16 [rows, d_model]. Raises
        UserError."""
        if self.spec.store == "int8" and self.references.settle(site, block, partial(self.committed, site)):
            self.add_sites((site,))

    def stored_form_(self, site: Site, data: Tensor) -> tuple[NDArray[Any], int]:
        """A block float16 [rows, d_model] as it is stored, in the same memory, and how many values it cannot hold."""
        return (data.numpy(), 0) if self.spec.store == "float16" else int8.narrow_(data, self.references.of(site))

    def stage_block(self, site: Site, block: int, data: NDArray[Any], *, replace: bool) -> Staged:
        """Bring a block's bytes to their place or near it, durable, for `commit`. Raises UserError.

        Where a store cannot make room beside another harvest's bytes, `data` is these afterwards: statistics come after this.
        """
        return self._store.stage(zarr.block_key(site, block), memoryview(data.data).cast("B"), self.digest, replace=replace)

    def drop(self, staged: Iterable[Staged]) -> None:
        """Take away what was staged and will not be committed."""
        self._store.drop(staged)

    def commit(
        self, block: int, stats: dict[Site, BlockStats], staged: dict[Site, Staged] | None = None, *, replace: bool = True
    ) -> None:
        """Put what was staged of a block in its place, and record it once that is durable. Raises UserError.

        Without `replace`, layers that another process has committed meanwhile stay as they are. Bytes and entry are changed
        by one process at a time: two harvests of a block may differ in a last bit.
        """
        with self._store.locked(SPEC_FILE):
            kept = set() if replace else self._having(tuple(stats), block)
            staged = staged or {}
            self._store.place({zarr.block_key(site, block): data for site, data in staged.items() if site not in kept})
            self.ledger.record(block, {site: s for site, s in stats.items() if site not in kept})
            self._store.drop(data for site, data in staged.items() if site in kept)

    def stats(self, site: Site, block: int) -> BlockStats:
        """The ledger's record of one block of one layer. Raises UserError if there is none, or it is damaged."""
        return self.ledger.stats(site, block)

    def totals(self) -> dict[Site, LayerTotals]:
        """Every layer's blocks taken together. Raises UserError for a damaged entry."""
        return self.ledger.totals(self.sites)

    def committed(self, site: Site) -> set[int]:
        """The committed blocks of a layer, from the names of the ledger's files."""
        return self.ledger.committed((site,))[site]

    def has_block(self, sites: tuple[Site, ...], block: int) -> bool:
        """Whether every one of these layers has the block, committed and there, by now."""
        return self._having(sites, block) == set(sites)

    def _having(self, sites: tuple[Site, ...], block: int) -> set[Site]:
        recorded = self.ledger.recorded(sites, block)
        return {site for site in recorded if self._store.has(zarr.block_key(site, block))}

    def missing(self, sites: tuple[Site, ...], *, freed: bool = False) -> dict[tuple[Site, ...], list[int]]:
        """What is still to be harvested: {layers that lack the same blocks: those blocks, ascending}.

        A block whose file is gone is missing, though the ledger speaks of it: somebody made room. With `freed` that holds as
        well where it was done through `free`.
        """
        everything, committed = range(self.spec.n_blocks), self.ledger.committed(sites)
        lacks = {
            site: set(everything if freed else self.wanted(site)) - (committed[site] & self._stored(site)) for site in sites
        }
        groups: dict[tuple[Site, ...], list[int]] = {}
        for block in everything:
            lacking = tuple(site for site in sites if block in lacks[site])
            if lacking:
                groups.setdefault(lacking, []).append(block)
        return groups

    def _stored(self, site: Site) -> set[int]:
        return zarr.stored_blocks(self._store, self.spec, site)

    # --- room for other layers ---

    def freed(self) -> tuple[Site, ...]:
        """The layers whose training blocks were removed on purpose. Raises UserError for a record that is damaged."""
        return self.ledger.freed(self.sites)

    def wanted(self, site: Site) -> range:
        """The blocks that ought to be there: of a layer that was freed the held-out ones alone."""
        return self.ledger.wanted(site)

    def freeable(self, site: Site) -> list[int]:
        """The training blocks that are there."""
        return sorted(block for block in self._stored(site) if block < self.spec.train_blocks)

    def free_block(self, site: Site, block: int) -> None:
        """Remove a training block of a layer that is marked; its ledger entry stays. Raises UserError."""
        assert block not in self.wanted(site)
        self._store.delete(zarr.block_key(site, block))

    # --- tokens ---

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sequences [start, stop) as int64 [stop - start, context], checked. Raises UserError naming a damaged chunk."""
        return self.tokens.read(start, stop)

    def block_tokens(self, block: int) -> NDArray[np.int64]:
        """The sequences of one block, int64 [block_sequences, context], checked. Raises UserError naming a damaged chunk."""
        return self.tokens.read(block * self.spec.block_sequences, (block + 1) * self.spec.block_sequences)
