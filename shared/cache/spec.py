"""What fixes every value in a cache, and the sizes that follow from it."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import canonical
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location
from residual_saes.shared.synthetic.config import WorldConfig
from residual_saes.shared.typed import Bounds, checked

FORMAT = 2
SPEC_FILE = "cache.json"
SLICES = 16  # of a block
TOKEN_CHUNK_BLOCKS = 16  # blocks of tokens in one chunk of the token array: the step in which tokenising resumes
Precision = Literal["bf16", "fp32"]
Stored = Literal["float16", "int8"]  # what values are stored as; see int8.py
Size = Annotated[int, Bounds(1, 1 << 24)]
_MOST_BLOCKS, _LARGEST_BLOCK = 10**7, 1 << 36
ADVICE = ("model", "model_branch", "model_commit", "dataset")  # fields that say where something lay: they fix no byte
# what the fields of a language model and its text are called: caches of a synthetic world have none of them
_MUST_OF_TEXT = (
    "model_revision", "dataset", "dataset_revision", "split", "text_column", "tokenizer_sha256", "separator", "vocab_size",
    "precision",
)  # fmt: skip
_OF_TEXT = (*_MUST_OF_TEXT, "bos", "model_branch", "model_commit")


@dataclass(kw_only=True, frozen=True, slots=True)
class Imported:
    """Activations that another tool left in files."""

    sites: tuple[Site, ...]  # there, whichever of them are in the cache
    rows: Annotated[int, Bounds(1, 10**15)]  # there; the last may fill no block
    positions: bool  # whether sequences are; else a row's position means nothing
    tokens: bool  # whether a row's token is known; else it is 0
    sha256: str  # of the files, site by site, as `hash_files` has it
    tensor: str = ""  # which of a file's, where there are several

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"sites": [site.json for site in self.sites]}


@dataclass(kw_only=True, frozen=True, slots=True)
class CacheSpec:
    """What fixes every value in a cache: of a language model reading a text, with `world` of a synthetic world, or with
    `imported` of another tool's files. Two harvests may share a cache only if these are equal."""

    model: str  # hub id or folder; what a world or imported activations are called
    model_revision: str = ""  # hash of configuration and weights
    dataset: str = ""
    dataset_revision: str = ""  # the hub's commit, or a hash of local files
    split: str = ""
    text_column: str = ""
    tokenizer_sha256: str = ""
    separator: int = 0  # token put between documents
    context: Size  # rows of a sequence
    d_model: Size
    n_layers: Annotated[int, Bounds(1, 10_000)]  # or worlds, which differ in their random numbers
    vocab_size: Annotated[int, Bounds(1, 1 << 32)] = 1
    block_sequences: Size
    n_blocks: Annotated[int, Bounds(1, _MOST_BLOCKS)]
    holdout_blocks: Annotated[int, Bounds(0, _MOST_BLOCKS)]
    seed: Annotated[int, Bounds(0, 1 << 63)]
    precision: Precision = "fp32"  # of the model's forward pass
    bos: bool = False  # every context begins with the tokeniser's BOS
    model_branch: str = ""  # the revision of a hub model as it was asked for
    model_commit: str = ""  # and the commit that this was when the harvest began
    world: WorldConfig | None = None
    imported: Imported | None = None
    store: Stored = "float16"  # as which values lie in blocks

    @classmethod
    def from_dict(cls, stored: dict[str, Any], name: str = "") -> Self:
        """As JSON has it. Raises ValueError for what cannot be a cache's."""
        spec, of = cls(**checked(cls, stored, name)), f" in {name}" if name else ""
        if spec.has_model and (absent := [each for each in _MUST_OF_TEXT if each not in stored]):
            raise ValueError(f"{name}{'.' * bool(name)}{absent[0]} is missing")
        if spec.holdout_blocks > spec.n_blocks:
            raise ValueError(f"holdout_blocks{of} is {spec.holdout_blocks}, and must be at most n_blocks, {spec.n_blocks}")
        if spec.block_bytes > _LARGEST_BLOCK:
            raise ValueError(f"a block{of} is of {spec.block_bytes:,} bytes, and must be of {_LARGEST_BLOCK:,} at most")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the fields that a cache of its kind has."""
        kept = _OF_TEXT if self.has_model else ("world",) if self.imported is None else ("imported", "dataset", "vocab_size")
        others = {*_OF_TEXT, "world", "imported", "store"}.difference(kept, () if self.store == "float16" else ("store",))
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in others}
        return values if self.imported is None else values | {"imported": self.imported.to_dict()}

    @property
    def has_model(self) -> bool:
        """Whether it is of a language model and a text, which can be opened again."""
        return self.world is None and self.imported is None

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that fix the bytes: all but where model and text lay, which is advice."""
        return {k: v for k, v in self.to_dict().items() if k not in ADVICE}

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, 64 hexadecimal digits: the same for the same content, wherever it lay."""
        return hashlib.sha256(canonical({"format": FORMAT, **self.identity})).hexdigest()

    def differences(self, other: "CacheSpec") -> list[str]:
        """In which of the fields that fix the bytes `other` differs: the one comparison of identities that there is.

        A split is of a hub dataset alone. Local files are known by their hash; earlier versions chose among them by the split.
        """
        own, others = self.identity, other.identity
        local = self.dataset_revision.startswith("sha256:")
        different = [k for k in own | others if own.get(k) != others.get(k) and not (k == "split" and local)]
        lines = [f"{k} is {own.get(k)!r} there, {others.get(k)!r} here" for k in different]
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
        return self.block_rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.row_items * self.item.itemsize

    @property
    def row_items(self) -> int:
        """Items of a row as it is stored: its values, and of int8 the two bytes of their scale."""
        return self.d_model + 2 * (self.store == "int8")

    @property
    def item(self) -> "np.dtype[Any]":
        """The type of the items of a block as it is stored."""
        return np.dtype(self.store)

    @property
    def torch_item(self) -> torch.dtype:
        return torch.float16 if self.store == "float16" else torch.int8

    def stored_rows(self, n: int) -> NDArray[Any]:
        """Room for n rows as they are stored, [n, row_items]."""
        return np.empty((n, self.row_items), self.item)

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


def other_format(path: Location, version: object) -> UserError:
    return UserError(
        f"{path} is a cache of format {version}, and this program reads format {FORMAT}; "
        "use the version that wrote it, or harvest again elsewhere"
    )
