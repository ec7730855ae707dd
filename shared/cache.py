"""The activation cache, format 1: where every byte is, when it counts as written, and how it is checked.

    <cache>/activations.zarr/        one Zarr v3 group; any Zarr v3 tool reads it
        zarr.json                    attributes: everything in CacheSpec, and the layers present
        tokens                       uint16 or uint32 [sequences, context]
        resid_post/00 ...            float16 [tokens, d_model], one uncompressed chunk file per block
    <cache>/ledger/<layers>/<block>.json     one entry per committed block of the layers harvested together
    <cache>/ledger/tokens.json               how far the token array is written

A block is a fixed run of whole sequences, the same rows in every layer. It is committed for a layer when a ledger entry
names both, and the entry is published only after every chunk it speaks of is durable; "the chunk file exists" means
nothing. Rows are permuted inside a block by `shuffle.block_rows`. An uncompressed chunk is the array's bytes, so blocks
are written and read as plain files, at the disk's speed and straight into the caller's memory; Zarr itself makes the
metadata. The last `holdout_blocks` blocks are for evaluation alone.
"""

import ctypes
import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from shared.cli import UserError, format_layers, parse_layers
from shared.files import make_dir, publish_json, read_file
from shared.native import load
from shared.shuffle import block_rows
from shared.view import Layer

FORMAT = 1
HOOK = "resid_post"
TOKEN_CHUNK_BLOCKS = 16  # blocks of tokens in one chunk of the token array: the step in which tokenising resumes
_KEYS: dict[str, Any] = {
    "name": "default",
    "separator": ".",
}  # chunk files lie side by side: no directory (and no fsync) for each
_CRC_PIECE = 4 << 20  # google_crc32c holds the interpreter lock, so it gets pieces of about a millisecond

assert sys.byteorder == "little", "the cache stores little-endian values as they lie in memory"


@dataclass(kw_only=True, frozen=True, slots=True)
class CacheSpec:
    """What fixes every value in a cache. Two harvests may share a cache only if these are equal."""

    model: str
    model_revision: str
    dataset: str
    dataset_revision: str
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

    @property
    def block_rows(self) -> int:
        return self.block_sequences * self.context

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.block_rows * self.d_model * 2

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
    def token_dtype(self) -> "np.dtype[Any]":
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def token_chunk(self) -> int:
        """Sequences in one chunk of the token array."""
        return TOKEN_CHUNK_BLOCKS * self.block_sequences

    @property
    def token_bytes(self) -> int:
        """Bytes of the token array on disk; Zarr stores the last chunk whole."""
        chunks = -(-self.sequences // self.token_chunk)
        return chunks * self.token_chunk * self.context * self.token_dtype.itemsize


@dataclass(kw_only=True, frozen=True, slots=True)
class BlockStats:
    """What the ledger holds of one block of one layer; mean and M2 are over all its values, in float64."""

    bytes: int
    crc32c: str
    rows: int
    mean: float
    m2: float  # sum of squared deviations from the mean
    max_norm: float  # largest Euclidean norm of a row
    nonfinite: int  # values the model gave that float16 cannot hold: NaN stored as 0, too large as ±65504


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerTotals:
    """The ledger's record of a layer as a whole."""

    moments: tuple[int, float, float] = (0, 0.0, 0.0)  # count, mean and M2 of all values
    max_norm: float = 0.0
    nonfinite: int = 0

    def plus(self, block: BlockStats, d_model: int) -> "LayerTotals":
        return LayerTotals(
            moments=merge_moments(self.moments, (block.rows * d_model, block.mean, block.m2)),
            max_norm=max(self.max_norm, block.max_norm),
            nonfinite=self.nonfinite + block.nonfinite,
        )

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


def crc32c(data: NDArray[Any]) -> str:
    """CRC-32C of an array's bytes, eight hexadecimal digits."""
    raw = data.reshape(-1).view(np.uint8)
    library = load(Path(__file__).with_name("crc32c.c"))
    if library is None:
        return f"{_google_crc32c(raw):08x}"
    library.crc32c.restype = ctypes.c_uint32
    return f"{library.crc32c(ctypes.c_void_p(raw.ctypes.data), ctypes.c_int64(raw.size)):08x}"


def _google_crc32c(raw: NDArray[np.uint8]) -> int:
    import google_crc32c  # here, because most machines have a compiler and need none of it

    value = 0
    for start in range(0, raw.size, _CRC_PIECE):
        value = google_crc32c.extend(value, raw[start : start + _CRC_PIECE])
    return value


class Cache:
    """An open cache. Reading needs nothing but the files; writing keeps the commit order described above."""

    def __init__(self, path: Path, spec: CacheSpec, layers: tuple[int, ...]) -> None:
        self.path, self.spec, self.layers = path, spec, layers
        self._groups: dict[int, list[Path]] = {}  # {layer: the folders of the ledger that may have its entries}, as last seen

    @property
    def _store(self) -> Path:
        return self.path / "activations.zarr"

    @property
    def _ledger(self) -> Path:
        return self.path / "ledger"

    @classmethod
    def exists(cls, path: Path) -> bool:
        return (path / "activations.zarr" / "zarr.json").exists()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises UserError for a missing, foreign or differently versioned cache."""
        if not cls.exists(path):
            raise UserError(f"no activation cache at {path}: run `make harvest` or `python -m harvest` first")
        try:
            attributes = dict(zarr.open_group(str(path / "activations.zarr"), mode="r").attrs)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{path} is not a readable Zarr v3 group ({error}); harvest into another folder") from None
        if "format" not in attributes or "spec" not in attributes:
            raise UserError(f"{path} holds a Zarr group that is not an activation cache; choose another folder")
        if attributes["format"] != FORMAT:
            raise UserError(
                f"{path} is a cache of format {attributes['format']}, and this program reads format {FORMAT}; "
                "use the version that wrote it, or harvest again elsewhere"
            )
        try:
            spec = CacheSpec(**attributes["spec"])  # type: ignore[arg-type]
            layers = parse_layers(str(attributes["layers"]))
        except (TypeError, KeyError) as error:
            raise UserError(f"the attributes of {path} are damaged ({error}); harvest again elsewhere") from None
        return cls(path, spec, layers)

    @classmethod
    def create(cls, path: Path, spec: CacheSpec, layers: tuple[int, ...]) -> Self:
        make_dir(path)
        group = zarr.create_group(str(path / "activations.zarr"))
        group.create_array(
            "tokens",
            shape=(spec.sequences, spec.context),
            chunks=(spec.token_chunk, spec.context),
            dtype=spec.token_dtype,
            compressors=None,
            fill_value=0,
            chunk_key_encoding=_KEYS,
        )
        group.create_group(HOOK)
        cache = cls(path, spec, ())
        cache.add_layers(layers)
        return cache

    def add_layers(self, layers: tuple[int, ...]) -> None:
        """Create the arrays of layers not yet present. The group's attributes are written last."""
        group = zarr.open_group(str(self._store), mode="r+")
        for layer in sorted(set(layers) - set(self.layers)):
            group.create_array(
                f"{HOOK}/{layer:02d}",
                shape=(self.spec.n_blocks * self.spec.block_rows, self.spec.d_model),
                chunks=(self.spec.block_rows, self.spec.d_model),
                dtype="float16",
                compressors=None,
                fill_value=0.0,
                chunk_key_encoding=_KEYS,
                overwrite=True,
            )
        self.layers = tuple(sorted({*self.layers, *layers}))
        group.update_attributes(
            {
                "format": FORMAT,
                "hook_point": HOOK,
                "dtype": "float16",
                "layers": format_layers(self.layers),
                "spec": dataclasses.asdict(self.spec),
            }
        )
        self._ledger.mkdir(exist_ok=True)

    def require_same(self, spec: CacheSpec) -> None:
        """Raises UserError naming every setting in which `spec` differs from this cache."""
        mine, theirs = dataclasses.asdict(self.spec), dataclasses.asdict(spec)
        # A local folder is known by its content, so it may be spelt or placed differently.
        ignored = {"model"} if self.spec.model_revision.startswith("sha256:") else set()
        ignored |= {"dataset"} if self.spec.dataset_revision.startswith("sha256:") else set()
        different = [f"{k} is {mine[k]!r} there, {theirs[k]!r} here" for k in mine if k not in ignored and mine[k] != theirs[k]]
        if different:
            raise UserError(
                f"{self.path} was harvested with other settings ({'; '.join(different)}): "
                "repeat those settings or choose another --cache folder"
            )

    # --- blocks ---

    def block_path(self, layer: int, block: int) -> Path:
        return self._store / HOOK / f"{layer:02d}" / f"c.{block}.0"

    def block_order(self, block: int) -> NDArray[np.int64]:
        """Row j of a stored block is activation `order[j]` of its sequences read one after the other."""
        return block_rows(self.spec.block_rows, seed=self.spec.seed, block=block)

    def read_block(self, layer: int, block: int, out: NDArray[np.float16]) -> None:
        """Fill `out` [block_rows, d_model] from disk. Raises UserError if the file is missing, unreadable or short."""
        try:
            n = read_file(self.block_path(layer, block), memoryview(out.data).cast("B"))
        except OSError as error:
            raise self._damaged(layer, block, error.strerror or "unreadable") from None
        if n < out.nbytes:
            raise self._damaged(layer, block, f"{out.nbytes - n} bytes short")

    def check_block(self, layer: int, block: int, data: NDArray[np.float16], stats: BlockStats) -> None:
        """Raises UserError naming layer and block if `data` is not what was committed."""
        if crc32c(data) != stats.crc32c:
            raise self._damaged(layer, block, "its checksum does not match")

    def _damaged(self, layer: int, block: int, why: str) -> UserError:
        return UserError(
            f"layer {layer} block {block} of {self.path} is damaged: {why}; "
            f"mend it with `python -m harvest repair --cache {self.path} --blocks {block}`"
        )

    # --- ledger ---

    def entry_path(self, layers: tuple[int, ...], block: int) -> Path:
        return self._ledger / format_layers(layers) / f"{block:08d}.json"

    def commit(self, block: int, stats: dict[int, BlockStats]) -> None:
        """Publish the ledger entry of a block whose chunks are all durable."""
        path = self.entry_path(tuple(stats), block)
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = {str(layer): dataclasses.asdict(s) for layer, s in stats.items()}
        publish_json(path, {"block": block, "layers": layers})

    def committed(self, layer: int) -> set[int]:
        """The committed blocks of a layer, from the names of the ledger's files."""
        return {int(path.stem) for group in self._find_groups(layer) for path in group.glob("*.json") if path.stem.isdigit()}

    def missing(self, layers: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
        """What is still to be harvested: {layers that lack the same blocks: those blocks, ascending}."""
        lacking: dict[int, list[int]] = {}
        committed = {layer: self.committed(layer) for layer in layers}
        groups: dict[tuple[int, ...], list[int]] = {}
        for block in range(self.spec.n_blocks):
            lacking[block] = [layer for layer in layers if block not in committed[layer]]
            if lacking[block]:
                groups.setdefault(tuple(lacking[block]), []).append(block)
        return groups

    def stats(self, layer: int, block: int) -> BlockStats:
        """The ledger's record of one block of one layer. Raises UserError if there is none."""
        path = self._entry(block, self._groups.get(layer, ())) or self._entry(block, self._find_groups(layer))
        if path is None:
            raise UserError(f"layer {layer} block {block} of {self.path} is not harvested: run `python -m harvest` again")
        try:
            return BlockStats(**json.loads(path.read_text())["layers"][str(layer)])
        except (ValueError, KeyError, TypeError):
            raise self._damaged(layer, block, f"its ledger entry {path} is unreadable") from None

    def _entry(self, block: int, groups: Iterable[Path]) -> Path | None:
        """By path: a folder holds thousands of entries, and there are few folders."""
        paths = (group / f"{block:08d}.json" for group in groups)
        return next((path for path in paths if path.exists()), None)

    def _find_groups(self, layer: int) -> list[Path]:
        self._groups[layer] = [g for g in self._ledger.iterdir() if g.is_dir() and layer in parse_layers(g.name)]
        return self._groups[layer]

    def totals(self) -> "dict[int, LayerTotals]":
        """Every layer's blocks taken together, from one reading of the ledger."""
        totals: dict[int, LayerTotals] = {}
        for path in self._ledger.glob("*/*.json"):
            for name, stats in json.loads(path.read_text())["layers"].items():
                layer = int(name)
                totals[layer] = totals.get(layer, LayerTotals()).plus(BlockStats(**stats), self.spec.d_model)
        return dict(sorted(totals.items()))

    def forget(self, block: int, layers: tuple[int, ...]) -> None:
        """Drop a block's ledger entries for these layers, so that the next harvest writes it again."""
        for path in self._ledger.glob(f"*/{block:08d}.json"):
            group = parse_layers(path.parent.name)
            if not set(group) & set(layers):
                continue
            try:
                kept = {int(k): BlockStats(**v) for k, v in json.loads(path.read_text())["layers"].items()}
            except (ValueError, KeyError, TypeError):
                kept = {}
            kept = {layer: stats for layer, stats in kept.items() if layer not in layers}
            if kept:
                self.commit(block, kept)
            path.unlink()

    def layer(self, layer: int) -> Layer:
        """A layer's rows in the order of the text, for notebooks. Raises UserError if it is not in the cache."""
        return Layer(self, layer)

    # --- tokens ---

    @property
    def token_ledger(self) -> Path:
        return self._ledger / "tokens.json"

    def token_chunk_path(self, chunk: int) -> Path:
        return self._store / "tokens" / f"c.{chunk}.0"

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sequences [start, stop) as int64 [stop - start, context]."""
        array = zarr.open_array(str(self._store / "tokens"), mode="r")
        return np.asarray(array[start:stop]).astype(np.int64)

    def block_tokens(self, block: int) -> NDArray[np.int64]:
        """The sequences of one block, int64 [block_sequences, context]."""
        return self.read_tokens(block * self.spec.block_sequences, (block + 1) * self.spec.block_sequences)
