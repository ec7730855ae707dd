"""The activation cache, format 2: where every byte is, when it counts as written, and how it is checked.

    <cache>/cache.json               format, spec, digest of the spec; created last and in one step: a cache exists when it does
    <cache>/activations.zarr/        one Zarr v3 group; any Zarr v3 tool reads it
        tokens                       uint16 or uint32 [sequences, context]
        resid_post/00 ...            float16 [tokens, d_model], one uncompressed chunk file per block
    <cache>/ledger/<layers>/<block>.json     one entry per committed block of the layers harvested together
    <cache>/ledger/tokens/<chunk>.json       one entry per chunk of the token array
    <cache>/ledger/freed/<layer>.json        the layer's training blocks were removed on purpose; written before they are

A block is a fixed run of whole sequences, the same rows in every layer. It is committed for a layer when a ledger entry
names both, and the entry is created only after every chunk it speaks of is durable; "the chunk file exists" means
nothing. Rows are permuted inside a block by `shuffle.block_rows`. A slice is a sixteenth of a block, with a checksum of
its own. The last `holdout_blocks` blocks are for evaluation alone.

Every JSON file here carries a checksum of itself, an entry also the cache's digest, its own number and its layers, and
whoever reads it compares all of that: bytes of the right kind in the wrong place are damage. An uncompressed chunk is
the array's bytes, so chunks are written and read as they are, at the disk's speed and straight into the caller's memory.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.cache.view import Layer
from shared.errors import UserError
from shared.files import page_aligned
from shared.seal import canonical, crc32c, from_bytes, to_bytes
from shared.shuffle import block_rows
from shared.sites import HOOKS, RESID_POST, Site, format_sites, parse_sites
from shared.stores import Location, Staged, Store, open_store
from shared.stores.scratch import Scratch, ScratchConfig

FORMAT = 2
SLICES = 16  # of a block
TOKEN_CHUNK_BLOCKS = 16  # blocks of tokens in one chunk of the token array: the step in which tokenising resumes
ADVICE = ("model", "model_branch", "model_commit", "dataset")  # fields that say where something lay: they fix no byte
_AT_ONCE = 16  # entries of the ledger that are read at a time: each may be a round trip
LEDGER_BYTES_PER_LAYER = 360  # of one block, as measured at most; it is 0.0005 % of a full-size block
_SPEC = "cache.json"
_ZARR = "activations.zarr"

assert sys.byteorder == "little", "the cache stores little-endian values as they lie in memory"


@dataclass(kw_only=True, frozen=True, slots=True)
class CacheSpec:
    """What fixes every value in a cache. Two harvests may share a cache only if these are equal."""

    model: str  # hub id or folder
    model_revision: str  # hash of configuration and weights
    dataset: str
    dataset_revision: str  # the hub's commit, or a hash of local files
    split: str
    text_column: str
    tokenizer_sha256: str
    separator: int  # token put between documents
    context: int
    d_model: int
    n_layers: int
    vocab_size: int
    block_sequences: int
    n_blocks: int
    holdout_blocks: int
    seed: int
    precision: str  # of the model's forward pass: bf16 or fp32
    bos: bool = False  # every context begins with the tokeniser's BOS
    model_branch: str = ""  # the revision of a hub model as it was asked for
    model_commit: str = ""  # and the commit that this was when the harvest began

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that fix the bytes: all but where model and text lay, which is advice."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ADVICE}

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, 64 hexadecimal digits: the same for the same content, wherever it lay."""
        return hashlib.sha256(canonical({"format": FORMAT, **self.identity})).hexdigest()

    def differences(self, other: "CacheSpec") -> list[str]:
        """In which of the fields that fix the bytes `other` differs: the one comparison of identities that there is.

        A split is of a hub dataset alone. Local files are known by their hash; earlier versions chose among them by the split.
        """
        mine, theirs = self.identity, other.identity
        local = self.dataset_revision.startswith("sha256:")
        different = [k for k in mine if mine[k] != theirs[k] and not (k == "split" and local)]
        lines = [f"{k} is {mine[k]!r} there, {theirs[k]!r} here" for k in different]
        if local and "dataset_revision" in different and Path(other.dataset).is_dir():
            lines.append(
                f"a folder is read whole: if it was harvested by file names that say {self.split!r}, put those files into a "
                "folder of their own and name that with --dataset"
            )
        return lines

    @property
    def block_rows(self) -> int:
        return self.block_sequences * self.context

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.block_rows * self.d_model * 2

    @property
    def slice_rows(self) -> int:
        """Rows of a slice; where sixteen do not go into a block evenly, the last slice is shorter, or there are fewer."""
        return -(-self.block_rows // SLICES)

    @property
    def slices(self) -> int:
        """Slices of a block."""
        return -(-self.block_rows // self.slice_rows)

    @property
    def sequences(self) -> int:
        return self.n_blocks * self.block_sequences

    @property
    def train_blocks(self) -> int:
        return self.n_blocks - self.holdout_blocks

    @property
    def train_tokens(self) -> int:
        return self.train_blocks * self.block_rows

    @property
    def holdout_tokens(self) -> int:
        return self.holdout_blocks * self.block_rows

    @property
    def token_dtype(self) -> "np.dtype[Any]":
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def token_chunk(self) -> int:
        """Sequences in one chunk of the token array."""
        return TOKEN_CHUNK_BLOCKS * self.block_sequences

    @property
    def token_chunks(self) -> int:
        return -(-self.sequences // self.token_chunk)

    @property
    def token_bytes(self) -> int:
        """Bytes of the token array on disk; Zarr stores the last chunk whole."""
        return self.token_chunks * self.token_chunk * self.context * self.token_dtype.itemsize


@dataclass(kw_only=True, frozen=True, slots=True)
class BlockStats:
    """What the ledger holds of one block of one layer; mean and M2 are over all its values, in float64."""

    bytes: int
    rows: int
    crc32c: str  # of each slice, eight hexadecimal digits after another
    tokens: str  # CRC-32C of the block's tokens that these are the activations of
    mean: float
    m2: float  # sum of squared deviations from the mean
    max_norm: float  # largest Euclidean norm of a row
    nonfinite: int  # values the model gave that float16 cannot hold: NaN stored as 0, too large as ±65504
    by: str = ""  # what it was made on, as the last bits depend on it (shared.device.maker); "" where that was not recorded


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerTotals:
    """The ledger's record of a layer as a whole."""

    moments: tuple[int, float, float] = (0, 0.0, 0.0)  # count, mean and M2 of all values
    max_norm: float = 0.0
    nonfinite: int = 0
    by: dict[str, int] = dataclasses.field(default_factory=dict)  # {made on: blocks}

    def plus(self, block: BlockStats, d_model: int) -> "LayerTotals":
        return LayerTotals(
            moments=merge_moments(self.moments, (block.rows * d_model, block.mean, block.m2)),
            max_norm=max(self.max_norm, block.max_norm),
            nonfinite=self.nonfinite + block.nonfinite,
            by=self.by | {block.by: self.by.get(block.by, 0) + 1},
        )

    @property
    def mixed(self) -> str:
        """On what the blocks were made, where that was not the same for all; "" where it was."""
        return ", ".join(f"{n:,} on {by or 'unknown'}" for by, n in sorted(self.by.items())) if len(self.by) > 1 else ""

    def __str__(self) -> str:
        n, mean, m2 = self.moments
        text = f"mean {mean:+.3g}, standard deviation {(m2 / max(n, 1)) ** 0.5:.3g}, largest row norm {self.max_norm:.4g}"
        if self.nonfinite:
            text += f"; WARNING: {self.nonfinite:,} values did not fit float16 (stored as 0 or ±65504)"
        return text


def merge_moments(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """(count, mean, M2) of two sets together, by the pairwise update of Chan, Golub & LeVeque (1979)."""
    n = a[0] + b[0]
    if n == 0:
        return 0, 0.0, 0.0
    delta = b[1] - a[1]
    return n, a[1] + delta * b[0] / n, a[2] + b[2] + delta * delta * a[0] * b[0] / n


def slice_checksums(data: NDArray[Any], slice_rows: int) -> str:
    """The CRC-32C of every slice of [rows, d_model], one after another."""
    return "".join(crc32c(data[first : first + slice_rows]) for first in range(0, len(data), slice_rows))


@dataclass(kw_only=True, frozen=True, slots=True)
class TokenChunk:
    """What the ledger holds of one chunk of the token array."""

    crc32c: str
    source: dict[str, Any]  # the text's state before the documents that hold the first token after this chunk
    skip: int  # tokens of those documents that are in this chunk or before it


class Cache:
    """An open cache. Reading needs nothing but the files; writing keeps the commit order described above."""

    def __init__(self, store: Store, spec: CacheSpec, scratch: ScratchConfig | None = None) -> None:
        self._store, self.spec, self.path = store, spec, store.root
        self._groups: dict[Site, list[str]] = {}  # {layer: the names in the ledger that may have its entries}, as last seen
        self._chunk: tuple[int, NDArray[Any]] | None = None  # the token chunk read last
        self._digest = spec.digest
        self._scratch = Scratch(scratch, self._digest) if scratch else None
        self.sites = self._find_sites()

    @property
    def digest(self) -> str:
        """What a run records of its cache, and compares."""
        return self._digest

    @classmethod
    def exists(cls, path: Location) -> bool:
        return open_store(path).has(_SPEC)

    @classmethod
    def open(cls, path: Location, scratch: ScratchConfig | None = None) -> Self:
        """Raises UserError for a missing, foreign, damaged or differently versioned cache.

        Blocks that are read are kept in `scratch`, as long as there is room, and read from there.
        """
        store = open_store(path)
        try:
            data = store.get(_SPEC)
        except OSError:
            _refuse_foreign(store)
            raise UserError(f"no activation cache at {path}: run `make harvest` or `python -m harvest` first") from None
        try:
            value = from_bytes(data)
            if value["format"] != FORMAT:
                raise _other_format(path, value["format"])
            spec = CacheSpec(**value["spec"])
            if value["digest"] != spec.digest:
                raise ValueError("its digest does not match")
        except (ValueError, KeyError, TypeError) as error:
            if not store.has(_ZARR):
                raise UserError(f"{path / _SPEC} is not of an activation cache; choose another folder") from None
            raise UserError(
                f"{path / _SPEC} is damaged ({error}): remove that file and run the `python -m harvest` command that made the "
                "cache again; it writes the file anew and keeps what is committed"
            ) from None
        return cls(store, spec, scratch)

    @classmethod
    def create(cls, path: Location, spec: CacheSpec, sites: tuple[Site, ...]) -> Self:
        """A new cache, or the one that another process has created meanwhile. Raises UserError if that is of another spec."""
        store = open_store(path)
        if not store.has(_SPEC):
            _refuse_foreign(store)
            _drop_foreign_entries(store, spec)
            _write_metadata(store, spec, ())
            store.create(_SPEC, to_bytes({"format": FORMAT, "digest": spec.digest, "spec": dataclasses.asdict(spec)}))
        cache = cls.open(path)
        cache.require_same(spec)
        cache.add_sites(sites)
        return cache

    def add_sites(self, sites: tuple[Site, ...]) -> None:
        """Make the arrays of these layers where they are not yet; puts right metadata that is not as it should be."""
        _write_metadata(self._store, self.spec, (*self.sites, *sites))
        self.sites = self._find_sites()

    def discard(self) -> None:
        """Take away a cache in which no block is committed yet: a text that is too short fixes another spec."""
        for name in self._store.list("ledger"):
            if name != "tokens" and self._store.list(f"ledger/{name}"):
                raise UserError(f"{self.path} has committed blocks and is kept: its text is not what it was made from")
        self._store.delete(_SPEC)
        for folder in ("ledger", _ZARR):
            self._store.delete_all(folder)

    def require_same(self, spec: CacheSpec) -> None:
        """Raises UserError naming every setting in which `spec` differs from this cache."""
        different = self.spec.differences(spec)
        if different:
            raise UserError(
                f"{self.path} was harvested with other settings ({'; '.join(different)}): repeat those settings "
                f"(model {_spelt(self.spec)}, text {self.spec.dataset}) or choose another --cache folder"
            )

    def remove_leftovers(self) -> None:
        """What dead writers of this host left half-written anywhere in the cache."""
        prefixes = ["", "ledger", _ZARR, f"{_ZARR}/tokens", *(f"{_ZARR}/{hook}" for hook in HOOKS)]
        prefixes += [f"ledger/{name}" for name in self._store.list("ledger")]
        prefixes += [f"{_ZARR}/{hook}/{name}" for hook in HOOKS for name in self._store.list(f"{_ZARR}/{hook}")]
        for prefix in prefixes:
            self._store.remove_leftovers(prefix)

    def bad_metadata(self) -> list[str]:
        """The arrays' metadata files that are not as they should be."""
        return [key for key, data in _metadata(self.spec, self.sites).items() if _get(self._store, key) != data]

    def _find_sites(self) -> tuple[Site, ...]:
        names = {hook: set(self._store.list(f"{_ZARR}/{hook}")) for hook in HOOKS}
        sites = (Site(layer, hook) for layer in range(self.spec.n_layers) for hook in sorted(HOOKS))
        return tuple(site for site in sites if site.array.partition("/")[2] in names[site.hook])

    # --- blocks ---

    def block_path(self, site: Site, block: int) -> Path:
        """Of a cache on a disk, as are the other paths."""
        return self._file(_block_key(site, block))

    def _file(self, key: str) -> Path:
        path = self._store.path(key)
        assert isinstance(path, Path)
        return path

    def block_order(self, block: int) -> NDArray[np.int64]:
        """Row j of a stored block is activation `order[j]` of its sequences read one after the other."""
        return block_rows(self.spec.block_rows, seed=self.spec.seed, block=block)

    def stage_block(self, site: Site, block: int, data: NDArray[np.float16], *, replace: bool) -> Staged:
        """Bring a block's bytes to their place or near it, durable, for `commit`. Raises UserError.

        Where a store cannot make room beside another harvest's bytes, `data` is these afterwards: statistics come after this.
        """
        return self._store.stage(_block_key(site, block), memoryview(data.data).cast("B"), self._digest, replace=replace)

    def drop(self, staged: Iterable[Staged]) -> None:
        """Take away what was staged and will not be committed."""
        self._store.drop(staged)

    def read_block(self, site: Site, block: int, out: NDArray[np.float16]) -> None:
        """Fill `out` [block_rows, d_model] from disk. Raises UserError if the file is missing, unreadable or short."""
        self._read(site, block, out, 0)

    def check_block(self, site: Site, block: int, data: NDArray[np.float16], stats: BlockStats) -> None:
        """Raises UserError naming layer and block if `data` is not what was committed."""
        rows = self.spec.slice_rows
        if slice_checksums(data, rows) != stats.crc32c and not (
            self._read_anew(site, block, data, 0) and slice_checksums(data, rows) == stats.crc32c
        ):
            raise self._damaged(site, block, "its checksum does not match")

    def whole_block(self, site: Site, block: int) -> NDArray[np.float16]:
        """[block_rows, d_model], read and checked. Raises UserError naming a block that is not there, or damaged."""
        data = np.empty((self.spec.block_rows, self.spec.d_model), dtype=np.float16)
        self.read_block(site, block, data)
        self.check_block(site, block, data, self.stats(site, block))
        return data

    def read_slice(self, site: Site, block: int, index: int, out: NDArray[np.float16]) -> None:
        """Fill `out` [rows of that slice, d_model] from disk: rows index · slice_rows … of the block. Raises UserError."""
        self._read(site, block, out, index * self.spec.slice_rows * self.spec.d_model * 2)

    def check_slice(self, site: Site, block: int, index: int, data: NDArray[np.float16], stats: BlockStats) -> None:
        """Raises UserError naming layer, block and slice if `data` is not what was committed."""
        wanted, offset = stats.crc32c[8 * index : 8 * index + 8], index * self.spec.slice_rows * self.spec.d_model * 2
        if crc32c(data) != wanted and not (self._read_anew(site, block, data, offset) and crc32c(data) == wanted):
            raise self._damaged(site, block, f"the checksum of slice {index} does not match")

    def _read(self, site: Site, block: int, out: NDArray[np.float16], offset: int) -> None:
        if self._scratch is not None:
            view, size = memoryview(out.data).cast("B"), self.spec.block_bytes
            if self._scratch.read(site, block, view, offset, size, partial(self._fetch, site, block)):
                return
        self._read_there(site, block, out, offset)

    def _fetch(self, site: Site, block: int) -> memoryview:
        """A block from where the cache lies, checked, in memory that direct writes accept."""
        data: NDArray[np.float16] = page_aligned(self.spec.block_rows, self.spec.d_model).numpy()
        self._read_there(site, block, data, 0)
        self.check_block(site, block, data, self.stats(site, block))
        return memoryview(data.data).cast("B")

    def _read_anew(self, site: Site, block: int, out: NDArray[np.float16], offset: int) -> bool:
        """Where the scratch may have given a damaged copy, or an old one: away with it, and the bytes from where they lie."""
        if self._scratch is None:
            return False
        self._scratch.drop(site, block)
        self._read_there(site, block, out, offset)
        return True

    def _read_there(self, site: Site, block: int, out: NDArray[np.float16], offset: int) -> None:
        try:
            n = self._store.read(_block_key(site, block), memoryview(out.data).cast("B"), offset)
        except OSError as error:
            if block not in self.wanted(site):
                raise self.freed_error((site,)) from None
            raise self._damaged(site, block, error.strerror or "unreadable") from None
        if n < out.nbytes:
            raise self._damaged(site, block, f"{out.nbytes - n} bytes short")

    def _damaged(self, site: Site, block: int, why: str) -> UserError:
        return UserError(
            f"layer {site} block {block} of {self.path} is damaged: {why}; "
            f"mend it with `python -m harvest repair --cache {self.path} --blocks {block}`"
        )

    # --- ledger ---

    def entry_path(self, sites: tuple[Site, ...], block: int) -> Path:
        return self._file(_entry_key(format_sites(sites), block))

    def commit(
        self, block: int, stats: dict[Site, BlockStats], staged: dict[Site, Staged] | None = None, *, replace: bool = True
    ) -> None:
        """Put what was staged of a block in its place, and record it once that is durable. Raises UserError.

        Without `replace`, layers that another process has committed meanwhile stay as they are. Bytes and record are changed
        by one process at a time: two harvests of a block may differ in a last bit.
        """
        with self._store.locked(_SPEC):
            kept = set() if replace else self._having(tuple(stats), block)
            staged = staged or {}
            self._store.place({_block_key(site, block): mine for site, mine in staged.items() if site not in kept})
            self._record(block, {site: s for site, s in stats.items() if site not in kept})
            self._store.drop(mine for site, mine in staged.items() if site in kept)

    def _record(self, block: int, stats: dict[Site, BlockStats]) -> None:
        """An entry that is there already keeps its place and is replaced in one step."""
        left, unreadable = dict(stats), []
        for group in self._groups_of(tuple(stats)):
            key, sites = _entry_key(group, block), _group_sites(group)
            data = _get(self._store, key)
            mine = {site: left[site] for site in sites if site in left}
            if data is None or not mine:
                continue
            try:
                there = self._open_entry(group, block, data)
            except ValueError:
                there = mine
            if set(there) != set(sites):  # unreadable, and it says nothing of the other layers either: they are harvested again
                unreadable.append(key)
                continue
            if data != (entry := self._entry(block, there | mine)) and not self._store.replace(key, entry, data):
                return self._record(block, stats)
            left = {site: s for site, s in left.items() if site not in mine}
        if left and not self._store.create(_entry_key(format_sites(left), block), self._entry(block, left)):
            self._record(block, left)  # a file system without locks, and another process was faster
        for key in unreadable:
            self._store.delete(key)

    def _entry(self, block: int, stats: dict[Site, BlockStats]) -> bytes:
        sites = {str(site): dataclasses.asdict(stats[site]) for site in sorted(stats)}
        return to_bytes({"cache": self._digest, "block": block, "layers": sites})

    def _open_entry(self, group: str, block: int, data: bytes) -> dict[Site, BlockStats]:
        """Raises ValueError unless this is the entry of that block and those layers of this cache, undamaged."""
        value = from_bytes(data)
        if value.get("cache") != self._digest:
            raise ValueError("it is of another cache")
        if value.get("block") != block or set(value["layers"]) != {str(site) for site in _group_sites(group)}:
            raise ValueError("it is of another block or other layers")
        try:
            stats = {Site.of(site): BlockStats(**s) for site, s in value["layers"].items()}
        except TypeError as error:
            raise ValueError(str(error)) from None
        size = (self.spec.block_bytes, self.spec.block_rows, 8 * self.spec.slices)
        if any((s.bytes, s.rows, len(s.crc32c)) != size for s in stats.values()):
            raise ValueError("it is of blocks of another size")
        return stats

    def committed(self, site: Site) -> set[int]:
        """The committed blocks of a layer, from the names of the ledger's files."""
        return self._committed((site,))[site]

    def _committed(self, sites: tuple[Site, ...]) -> dict[Site, set[int]]:
        """The same of several; every folder of the ledger is listed once."""
        found: dict[Site, set[int]] = {site: set() for site in sites}
        for group in self._groups_of(sites):
            blocks = set(self._blocks(group))
            for site in set(_group_sites(group)) & set(sites):
                found[site] |= blocks
        return found

    def has_block(self, sites: tuple[Site, ...], block: int) -> bool:
        """Whether every one of these layers has the block, committed and there, by now."""
        return self._having(sites, block) == set(sites)

    def _having(self, sites: tuple[Site, ...], block: int) -> set[Site]:
        groups = [group for group in self._groups_of(sites) if self._store.has(_entry_key(group, block))]
        recorded = {site for group in groups for site in _group_sites(group)} & set(sites)
        return {site for site in recorded if self._store.has(_block_key(site, block))}

    def missing(self, sites: tuple[Site, ...], *, freed: bool = False) -> dict[tuple[Site, ...], list[int]]:
        """What is still to be harvested: {layers that lack the same blocks: those blocks, ascending}.

        A block whose file is gone is missing, though the ledger speaks of it: somebody made room. With `freed` that holds as
        well where it was done through `free`.
        """
        everything, committed = range(self.spec.n_blocks), self._committed(sites)
        lacks = {
            site: set(everything if freed else self.wanted(site)) - (committed[site] & self._stored(site)) for site in sites
        }
        groups: dict[tuple[Site, ...], list[int]] = {}
        for block in everything:
            lacking = tuple(site for site in sites if block in lacks[site])
            if lacking:
                groups.setdefault(lacking, []).append(block)
        return groups

    def stats(self, site: Site, block: int) -> BlockStats:
        """The ledger's record of one block of one layer. Raises UserError if there is none, or it is damaged."""
        group = self._find_entry(site, block)
        if group is None:
            raise UserError(f"layer {site} block {block} of {self.path} is not harvested: run `python -m harvest` again")
        return self._read_entry(group, block, site)[site]

    def _read_entry(self, group: str, block: int, site: Site) -> dict[Site, BlockStats]:
        key = _entry_key(group, block)
        try:
            return self._open_entry(group, block, self._store.get(key))
        except (OSError, ValueError) as error:
            raise self._damaged(site, block, f"its ledger entry {self._store.path(key)} is unreadable ({error})") from None

    def _find_entry(self, site: Site, block: int) -> str | None:
        """By path: a folder holds thousands of entries, and there are few folders."""
        known = self._first(self._groups.get(site, []), block)
        return known if known is not None else self._first(self._find_groups(site), block)

    def _first(self, groups: list[str], block: int) -> str | None:
        return next((group for group in groups if self._store.has(_entry_key(group, block))), None)

    def _find_groups(self, site: Site) -> list[str]:
        self._groups[site] = self._groups_of((site,))
        return self._groups[site]

    def _groups_of(self, sites: tuple[Site, ...]) -> list[str]:
        return [name for name in self._store.list("ledger") if set(_group_sites(name)) & set(sites)]

    def _blocks(self, group: str) -> Iterator[int]:
        for name in self._store.list(f"ledger/{group}"):
            stem = name.removesuffix(".json")
            if stem.isdecimal() and int(stem) < self.spec.n_blocks and name == _entry_key(group, int(stem)).rpartition("/")[2]:
                yield int(stem)

    def _stored(self, site: Site) -> set[int]:
        names = set(self._store.list(f"{_ZARR}/{site.array}"))
        return {block for block in range(self.spec.n_blocks) if f"c.{block}.0" in names}

    # --- room for other layers ---

    def freed(self) -> tuple[Site, ...]:
        """The layers whose training blocks were removed on purpose. Raises UserError for a record that is damaged."""
        names = self._store.list("ledger/freed")
        return tuple(site for site in self.sites if f"{site.key}.json" in names and self._is_freed(site))

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

    def freed_error(self, sites: Iterable[Site]) -> UserError:
        return UserError(
            f"the training blocks of layers {format_sites(sites)} of {self.path} were freed: "
            f"harvest them again with `python -m harvest --layers {format_sites(sites)}`"
        )

    def wanted(self, site: Site) -> range:
        """The blocks that ought to be there: of a layer that was freed the held-out ones alone."""
        return range(self.spec.train_blocks if self._is_freed(site) else 0, self.spec.n_blocks)

    def mark_freed(self, sites: Iterable[Site]) -> None:
        """From now on these layers' training blocks count as removed, which `free_block` does."""
        for site in sites:
            self._store.write(_freed_key(site), to_bytes(self._freed_record(site)))

    def unmark_freed(self, sites: Iterable[Site]) -> None:
        """From now on these layers' training blocks are missing, and are harvested again."""
        for site in sites:
            self._store.delete(_freed_key(site))

    def freeable(self, site: Site) -> list[int]:
        """The training blocks that are there."""
        return sorted(block for block in self._stored(site) if block < self.spec.train_blocks)

    def free_block(self, site: Site, block: int) -> None:
        """Remove a training block of a layer that is marked; its ledger entry stays. Raises UserError."""
        assert block not in self.wanted(site)
        self._store.delete(_block_key(site, block))

    # --- all blocks together ---

    def totals(self) -> "dict[Site, LayerTotals]":
        """Every layer's blocks taken together, from one reading of the ledger. Raises UserError for a damaged entry."""
        totals: dict[Site, LayerTotals] = {}
        seen: set[tuple[Site, int]] = set()
        for group in self._groups_of(self.sites):
            blocks, read = list(self._blocks(group)), partial(self._read_entry, group, site=_group_sites(group)[0])
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for block, entry in zip(blocks, pool.map(read, blocks), strict=True):
                    for site, stats in entry.items():
                        if (site, block) not in seen:
                            seen.add((site, block))
                            totals[site] = totals.get(site, LayerTotals()).plus(stats, self.spec.d_model)
        return dict(sorted(totals.items()))

    def layer(self, layer: int | Site) -> Layer:
        """A layer's rows in the order of the text, for notebooks. Raises UserError if it is not in the cache."""
        return Layer(self, Site(layer) if isinstance(layer, int) else layer)

    # --- tokens ---

    def token_chunk_path(self, chunk: int) -> Path:
        return self._file(_chunk_key(chunk))

    def token_entry_path(self, chunk: int) -> Path:
        return self._file(_token_entry_key(chunk))

    def missing_token_chunks(self) -> list[int]:
        """The chunks that are not written, by the names of entries and files."""
        written = self.written_token_chunks()
        files = set(self._store.list(f"{_ZARR}/tokens"))
        return [k for k in range(self.spec.token_chunks) if k not in written or f"c.{k}.0" not in files]

    def written_token_chunks(self) -> set[int]:
        """The chunks that the ledger speaks of."""
        entries = set(self._store.list("ledger/tokens"))
        return {k for k in range(self.spec.token_chunks) if f"{k:08d}.json" in entries}

    def commit_tokens(self, chunk: int, data: NDArray[Any], source: dict[str, Any], skip: int) -> None:
        """Write a chunk [token_chunk, context], and then its entry. Raises UserError, with nothing touched, for other tokens
        than the ledger has there: activations are of those."""
        made = TokenChunk(crc32c=crc32c(data), source=source, skip=skip)
        try:
            there: TokenChunk | None = self.token_chunk(chunk)
        except UserError:
            there = None  # none, or it is damaged and takes what is made now; blocks know their tokens' checksums
        if there is not None and there.crc32c != made.crc32c:
            raise UserError(
                f"token chunk {chunk} of {self.path} came out otherwise than when it was written, so nothing was changed: "
                "use the versions of tokenizers, transformers and datasets that it was harvested with"
            )
        self._chunk = None
        self._store.write(_chunk_key(chunk), memoryview(data.reshape(-1).view(np.uint8).data))
        if there is None:
            entry = to_bytes({"cache": self._digest, "chunk": chunk, **dataclasses.asdict(made)})
            self._store.write(_token_entry_key(chunk), entry)

    def token_chunk(self, chunk: int) -> TokenChunk:
        """The ledger's record of a chunk. Raises UserError if there is none, or it is damaged."""
        try:
            value = from_bytes(self._store.get(_token_entry_key(chunk)))
            if (value.pop("cache"), value.pop("chunk")) != (self._digest, chunk):
                raise ValueError("it is of another chunk")
            return TokenChunk(**value)
        except FileNotFoundError:
            raise self._damaged_chunk(chunk, "it is not in the ledger") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged_chunk(chunk, f"its ledger entry is unreadable ({error})") from None

    def read_token_chunk(self, chunk: int) -> NDArray[Any]:
        """[token_chunk, context] in the token type, checked. Raises UserError naming the chunk."""
        if self._chunk is not None and self._chunk[0] == chunk:
            return self._chunk[1]
        stats, spec = self.token_chunk(chunk), self.spec
        try:
            data = np.frombuffer(self._store.get(_chunk_key(chunk)), np.uint8)
        except OSError as error:
            raise self._damaged_chunk(chunk, error.strerror or "unreadable") from None
        if data.size != spec.token_chunk * spec.context * spec.token_dtype.itemsize or crc32c(data) != stats.crc32c:
            raise self._damaged_chunk(chunk, "its checksum does not match")
        tokens = data.view(spec.token_dtype).reshape(spec.token_chunk, spec.context)
        self._chunk = chunk, tokens
        return tokens

    def _damaged_chunk(self, chunk: int, why: str) -> UserError:
        return UserError(
            f"token chunk {chunk} of {self.path} is damaged: {why}; mend it with `python -m harvest repair --cache {self.path}`"
        )

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sequences [start, stop) as int64 [stop - start, context], checked. Raises UserError naming a damaged chunk."""
        out = np.empty((stop - start, self.spec.context), dtype=np.int64)
        at, size = start, self.spec.token_chunk
        while at < stop:
            chunk, first = divmod(at, size)
            n = min(stop - at, size - first)
            out[at - start : at - start + n] = self.read_token_chunk(chunk)[first : first + n]
            at += n
        return out

    def block_tokens(self, block: int) -> NDArray[np.int64]:
        """The sequences of one block, int64 [block_sequences, context], checked. Raises UserError naming a damaged chunk."""
        return self.read_tokens(block * self.spec.block_sequences, (block + 1) * self.spec.block_sequences)

    def tokens_checksum(self, tokens: NDArray[np.int64]) -> str:
        """What a block's record holds of the tokens that it was made from."""
        return crc32c(tokens.astype(self.spec.token_dtype))


# --- keys and metadata ---


def _block_key(site: Site, block: int) -> str:
    return f"{_ZARR}/{site.array}/c.{block}.0"  # side by side: no directory (and no fsync of one) for each


def _entry_key(group: str, block: int) -> str:
    return f"ledger/{group}/{block:08d}.json"


def _freed_key(site: Site) -> str:
    return f"ledger/freed/{site.key}.json"


def _chunk_key(chunk: int) -> str:
    return f"{_ZARR}/tokens/c.{chunk}.0"


def _token_entry_key(chunk: int) -> str:
    return f"ledger/tokens/{chunk:08d}.json"


def _group_sites(name: str) -> tuple[Site, ...]:
    """The layers that a folder of the ledger is for; none if it is not one of ours."""
    try:
        sites = parse_sites(name)
    except UserError:
        return ()
    return sites if format_sites(sites) == name else ()


def _get(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except OSError:
        return None


def _spelt(spec: CacheSpec) -> str:
    return f"{spec.model} at commit {spec.model_commit}" if spec.model_commit else spec.model


def _metadata(spec: CacheSpec, sites: tuple[Site, ...]) -> dict[str, bytes]:
    """{key: content} of every metadata file of the Zarr group, a pure function of the spec."""
    attributes = {"format": FORMAT, "digest": spec.digest, "hook_point": RESID_POST, "spec": dataclasses.asdict(spec)}
    files = {
        "": _node("group", attributes=attributes),
        "tokens/": _array((spec.sequences, spec.context), (spec.token_chunk, spec.context), spec.token_dtype.name, 0),
    }
    shape, chunk = (spec.n_blocks * spec.block_rows, spec.d_model), (spec.block_rows, spec.d_model)
    files |= {f"{hook}/": _node("group", attributes={}) for hook in sorted({RESID_POST, *(site.hook for site in sites)})}
    files |= {f"{site.array}/": _array(shape, chunk, "float16", 0.0) for site in sites}
    return {f"{_ZARR}/{folder}zarr.json": (json.dumps(node, indent=1) + "\n").encode() for folder, node in files.items()}


def _node(kind: str, **fields: Any) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": kind, **fields}


def _array(shape: tuple[int, ...], chunk: tuple[int, ...], data_type: str, fill: float) -> dict[str, Any]:
    """Zarr v3 metadata of an array of uncompressed little-endian chunks in files named c.<row>.<column>."""
    return _node(
        "array",
        shape=shape,
        data_type=data_type,
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunk}},
        chunk_key_encoding={"name": "default", "configuration": {"separator": "."}},
        fill_value=fill,
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
        attributes={},
    )


def _write_metadata(store: Store, spec: CacheSpec, sites: tuple[Site, ...]) -> None:
    for key, data in _metadata(spec, sites).items():
        if _get(store, key) != data:
            store.write(key, data)


def _other_format(path: Location, found: object) -> UserError:
    return UserError(
        f"{path} is a cache of format {found}, and this program reads format {FORMAT}; "
        "use the version that wrote it, or harvest again elsewhere"
    )


def _refuse_foreign(store: Store) -> None:
    """Raises UserError for a Zarr group that is not ours, so that nothing is made or written over it."""
    data = _get(store, f"{_ZARR}/zarr.json")
    if data is None:
        return
    try:
        attributes = json.loads(data)["attributes"]
        found = attributes["format"], attributes["spec"]
    except ValueError as error:
        raise UserError(f"{store.root} is not a readable Zarr v3 group ({error}); harvest into another folder") from None
    except (KeyError, TypeError):
        raise UserError(f"{store.root} holds a Zarr group that is not an activation cache; choose another folder") from None
    if found[0] != FORMAT:
        raise _other_format(store.root, found[0])


def _drop_foreign_entries(store: Store, spec: CacheSpec) -> None:
    """Before a cache is created: entries of another one whose arrays are gone count as nothing, and go.

    Raises UserError where the arrays are still there: somebody lost only the cache.json of another cache.
    """
    keys = [f"ledger/{name}/{file}" for name in store.list("ledger") for file in store.list(f"ledger/{name}")]
    foreign = [key for key in keys if _owner(store, key) not in (None, spec.digest)]
    if foreign and store.has(f"{_ZARR}/zarr.json"):
        raise UserError(
            f"{store.root} holds {len(foreign)} ledger entries of a cache with other settings, whose {_SPEC} is gone: "
            "repeat those settings, or choose another --cache folder"
        )
    for key in foreign:
        store.delete(key)


def _owner(store: Store, key: str) -> str | None:
    """The digest of the cache that a ledger entry belongs to; None where it is unreadable."""
    try:
        return str(from_bytes(store.get(key)).get("cache"))
    except (OSError, ValueError):
        return None
