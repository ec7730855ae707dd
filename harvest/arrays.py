"""Activations that other tools left in files: .npy, .safetensors, Zarr, SAELens' cached activations, saev's shards.

Only numbers are read: nothing in these files is run. A folder holds files and folders named by their site ("12.npy",
"layer3.mlp_out.safetensors", "blocks.3.hook_mlp_out"), or pieces of one site's rows, in the order of their names.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import read_file
from residual_saes.shared.sites import HOOKS, Site, lens_name

TOKENS = ("tokens.npy", "token_ids.npy")
_STORED = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}  # of safetensors' words for them
_KINDS = ("float16", "float32", *_STORED)
_SITE = re.compile(r"(?:layers?[_-]?)?(\d{1,9}(?:\.[a-z_]+)?)")
_LENS = re.compile(r"blocks\.(\d{1,9})\..+")
_DATASET, _SAEV = ("dataset_info.json", "state.json"), ("metadata.json", "shards.json")
_TOKEN_COLUMN = "token_ids"  # SAELens'

Get = Callable[[int, int], "Tensor | NDArray[Any]"]
Pieces = dict[Site | None, list["Piece"]]  # by site, where a name tells it


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """Rows of a site that lie together, in sequences where the form tells: `get(a, b)` are the sequences from a to b."""

    name: str
    sequences: int
    context: int  # rows of a sequence; 1 where there are only rows
    d_model: int
    files: tuple[Path, ...]  # that its bytes are in
    get: Get
    tokens: Get | None = None
    known: bool = True  # whether sequences are, and not rows alone

    @property
    def rows(self) -> int:
        return self.sequences * self.context

    def read(self, first: int, last: int) -> Tensor:
        """Rows [last − first, d_model]. Raises UserError where one has a NaN."""
        x = self._flat(self.get, first, last, self.d_model)
        if bool(x.sum().isnan()) and bool((bad := x.isnan().any(1)).any()):
            raise UserError(
                f"row {first + int(bad.nonzero()[0]):,} of {self.name} has a NaN: leave such rows out and try again"
            )
        return x

    def token_rows(self, first: int, last: int) -> Tensor:
        """Token numbers [last − first]."""
        assert self.tokens is not None
        return self._flat(self.tokens, first, last, 1)[:, 0]

    def _flat(self, get: Get, first: int, last: int, width: int) -> Tensor:
        begin = first // self.context
        rows = torch.as_tensor(np.array(got) if isinstance(got := get(begin, -(-last // self.context)), np.ndarray) else got)
        return rows.reshape(-1, width)[first - begin * self.context : last - begin * self.context]


def open_folder(folder: Path, tensor: str | None = None) -> Pieces:
    """What is there, by site; None is the key of what no name tells the site of. Raises UserError in a line."""
    if not folder.exists():
        raise UserError(f"there is nothing at {folder}: name the file or folder of activations with --from")
    entries = [folder] if folder.is_file() or _form(folder) else sorted(p for p in folder.iterdir() if _readable(p))
    pieces_of: Pieces = {}
    for entry in entries:
        for site, pieces in _entry(entry, tensor).items():
            pieces_of.setdefault(site, []).extend(pieces)
    if not pieces_of:
        raise UserError(
            f"{folder} has no activations: they are .npy or .safetensors files, Zarr arrays, a data set that SAELens cached, "
            "or saev's shards"
        )
    return pieces_of


def token_file(folder: Path) -> Path | None:
    """The token numbers that lie beside activations."""
    return next((path for path in (folder / name for name in TOKENS) if path.is_file()), None) if folder.is_dir() else None


def read_tokens(path: Path) -> NDArray[Any]:
    """Token numbers of all rows, [n]. Raises UserError."""
    tokens: NDArray[Any] = _loaded(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise UserError(
            f"{path} is {tokens.dtype} {list(tokens.shape)}: token numbers are whole numbers, [rows] or [sequences, rows]"
        )
    return tokens.reshape(-1)


def _readable(path: Path) -> bool:
    if path.name.startswith(".") or path.name in TOKENS:
        return False
    return path.is_dir() or path.suffix in (".npy", ".safetensors")


def _form(folder: Path) -> Callable[[Path], Pieces] | None:
    """What reads a folder that is one thing."""
    if all((folder / name).is_file() for name in _DATASET):
        return _dataset
    if (folder / _SAEV[0]).is_file() and ((folder / _SAEV[1]).is_file() or any(folder.glob("acts*.bin"))):
        return _saev
    if (folder / ".zarray").is_file() or _node(folder) == "array":
        return _zarr
    return None


def _entry(path: Path, tensor: str | None) -> Pieces:
    if path.is_file():
        return {_site(path.stem): [_file(path, tensor)]}
    if (read := _form(path)) is not None:
        return read(path)
    files = sorted(p for p in path.iterdir() if p.is_file() and _readable(p))
    return {_site(path.name): [_file(p, tensor) for p in files]} if files else {}


def _site(name: str) -> Site | None:
    """The site that a file, a folder or a column is named by: ours, or TransformerLens'."""
    if (ours := _SITE.fullmatch(name)) is not None:
        try:
            return Site.of(ours[1])
        except ValueError:
            raise UserError(f"{name} names no site: a hook is one of {', '.join(HOOKS)}") from None
    if (lens := _LENS.fullmatch(name)) is not None:
        return next((site for hook in HOOKS if lens_name(site := Site(int(lens[1]), hook)) == name), None)
    return None


def _file(path: Path, tensor: str | None) -> Piece:
    if path.suffix == ".npy":
        data = _loaded(path, mmap_mode="r")
        read = _rows(path, data.dtype, data.shape, data.offset) if data.flags.c_contiguous else lambda a, b: data[a:b]
        return _piece(path, data.shape, str(data.dtype), read, (path,))
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is neither .npy nor .safetensors: name a file or a folder of activations with --from")
    try:
        opened: Any = safe_open(path, framework="pt")
        names = list(opened.keys())
    except Exception as error:  # the library has its own kinds
        raise UserError(f"cannot read {path}: {_line(error)}") from None
    if tensor is None and len(names) != 1:
        raise UserError(f"{path} has {len(names)} tensors ({', '.join(sorted(names)[:3])}): name one with --tensor")
    if tensor is not None and tensor not in names:
        raise UserError(f"{path} has no tensor {tensor}, but {', '.join(sorted(names)[:3])}: name one with --tensor")
    name = names[0] if tensor is None else tensor
    shape, kind = opened.get_slice(name).get_shape(), str(opened.get_slice(name).get_dtype())
    rows = _rows(path, np.dtype(_STORED.get(kind, "u1")), shape, _begin(path, name))
    get: Get = (lambda a, b: torch.from_numpy(rows(a, b)).view(torch.bfloat16)) if kind == "BF16" else rows
    return _piece(path, shape, kind, get, (path,))


def _loaded(path: Path, **how: Any) -> Any:
    try:
        return np.load(path, allow_pickle=False, **how)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {_line(error)}") from None


def _begin(path: Path, tensor: str) -> int:
    """Where a tensor's numbers begin in a file of safetensors that the library has opened."""
    header = _rows(path, np.dtype("u1"), (), 0)
    size = int.from_bytes(header(0, 8).tobytes(), "little")
    return 8 + size + int(json.loads(header(8, 8 + size).tobytes())[tensor]["data_offsets"][0])


def _rows(path: Path, kind: "np.dtype[Any]", shape: Sequence[int], begin: int) -> Callable[[int, int], NDArray[Any]]:
    """What gives rows of an array that begins there. They are read, not mapped: a bad block, or a file that is cut meanwhile,
    would end the process."""

    def rows(first: int, last: int) -> NDArray[Any]:
        out = np.empty((last - first, *shape[1:]), kind)
        try:
            whole = read_file(path, out.data.cast("B"), begin + first * (out.nbytes // len(out))) == out.nbytes
        except OSError as error:
            raise UserError(f"cannot read {path}: {_line(error)}") from None
        if not whole:
            raise UserError(f"{path} ends before row {last:,}, which it had: copy it again")
        return out

    return rows


def _zarr(folder: Path) -> Pieces:
    """A Zarr array, v2 or v3. What no chunk holds would be read as zeros."""
    import zarr

    try:
        array: Any = zarr.open_array(folder, mode="r")
    except Exception as error:  # the library has its own kinds
        raise UserError(f"cannot read {folder}: {_line(error)}") from None
    if array.nchunks_initialized < array.nchunks:
        raise UserError(f"{folder} has {array.nchunks_initialized:,} of its {array.nchunks:,} chunks: copy what is missing")
    files = tuple(sorted(p for p in folder.rglob("*") if p.is_file()))
    read = _piece(folder, array.shape, str(array.dtype), lambda a, b: np.asarray(array[a:b]), files)
    return {_site(folder.name.removesuffix(".zarr")): [read]}


def _dataset(folder: Path) -> Pieces:
    """A data set as SAELens' CacheActivationsRunner leaves it: a column [context, d_model] for each hook, and token numbers."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library has its own kinds
        raise UserError(f"cannot read {folder}: {_line(error)}") from None
    columns = {name: f for name, f in data.features.items() if len(getattr(f, "shape", ())) == 2}
    if not columns:
        raise UserError(f"{folder} has no column of activations, [rows, dimensions]: it has {', '.join(data.features)}")
    files = tuple(sorted(p for p in folder.iterdir() if p.suffix in (".arrow", ".json")))

    def reading(column: str) -> Get:
        part = data.with_format("numpy", columns=[column])
        return lambda a, b: np.asarray(part[a:b][column])

    tokens = reading(_TOKEN_COLUMN) if _TOKEN_COLUMN in data.features else None
    pieces_of: Pieces = {}
    for name, f in columns.items():
        piece = _piece(folder, (len(data), *f.shape), f.dtype, reading(name), files, tokens)
        pieces_of.setdefault(_site(name), []).append(piece)
    return pieces_of


def _saev(folder: Path) -> Pieces:
    """Shards of saev (docs/src/developers/protocol.md there): float32 [examples, layers, tokens, d_model], one file after the
    other. The last is as long as the others, and shards.json says how much of it counts."""
    try:
        about, shards = (json.loads((folder / name).read_bytes()) for name in _SAEV)
        layers, width = [int(n) for n in about["layers"]], int(about["d_model"])
        tokens = int(about.get("content_tokens_per_example", about.get("patches_per_ex"))) + bool(about["cls_token"])
        listed = [(str(shard["name"]), int(shard.get("n_examples", shard.get("n_ex")))) for shard in shards]
        kind, pieces_of = str(about["dtype"]), {Site(n): list[Piece]() for n in layers}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {' and '.join(_SAEV)} of {folder}: {_line(error)}") from None
    if kind != "float32":
        raise UserError(f"{folder} is of {kind}: saev's shards are float32")
    for name, examples in listed:
        path, shape = folder / Path(name).name, (examples, len(layers), tokens, width)
        size = path.stat().st_size if path.is_file() else -1
        if size < int(np.prod(shape)) * 4:
            raise UserError(f"{path} is {'missing' if size < 0 else 'too short'}: shards.json says {examples:,} examples of it")
        rows = _rows(path, np.dtype("<f4"), (examples * len(layers), tokens, width), 0)
        for i, layer in enumerate(layers):
            if examples:
                get = _layer_of(rows, i, len(layers))
                pieces_of[Site(layer)].append(_piece(path, (examples, tokens, width), "float32", get, (path,)))
    return {site: pieces for site, pieces in pieces_of.items() if pieces}


def _layer_of(rows: Callable[[int, int], NDArray[Any]], i: int, n: int) -> Get:
    """Of examples of `n` layers each, those of one layer."""
    return lambda a, b: np.concatenate([rows(k, k + 1) for k in range(a * n + i, b * n + i, n)])


def _piece(path: Path, shape: Iterable[int], kind: str, get: Get, files: tuple[Path, ...], tokens: Get | None = None) -> Piece:
    """Raises UserError for what are no activations."""
    size = tuple(shape)
    if kind not in _KINDS or len(size) not in (2, 3) or 0 in size:
        raise UserError(
            f"{path} is {kind} {list(size)}: activations are float16 or float32, [rows, d_model] or [sequences, rows, d_model]"
        )
    sequences, context, width = (size[0], 1, size[1]) if len(size) == 2 else size
    return Piece(
        name=str(path), sequences=sequences, context=context, d_model=width, files=files, get=get, tokens=tokens,
        known=len(size) == 3,
    )  # fmt: skip


def _node(folder: Path) -> str:
    try:
        return str(json.loads((folder / "zarr.json").read_bytes())["node_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
