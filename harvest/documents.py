"""Where text comes from: documents of local files or of a hub dataset, in order, each with the place to go on from.

Local files are read here, the column that holds the text and nothing else, so that a path is a path, every failure names its
file and row, and a place is exact: file, position in it, row. Hub datasets are streamed by `datasets`.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shared.errors import UserError
from shared.identity import dataset_commit, hash_files, unreachable

if TYPE_CHECKING:  # imported where text is read: whoever harvests from tokens that are there needs neither
    from datasets import IterableDataset

_PIECE = 4 << 20  # bytes of a document tokenised in one go: a tokeniser needs 150 bytes of memory for each
_NULLS = 256  # rows in a row without text are a column that is not there any more
_ARRAY_BYTES = 256 << 20  # of a JSON array, which has to be read whole
_ROWS = 16  # of a parquet file decoded at once
_KINDS = {"jsonl": "json", "ndjson": "json", "json": "json", "parquet": "parquet", "txt": "txt", "text": "txt"}
_COMPRESSIONS = ("gz", "xz", "zst", "bz2")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_HIDDEN = tuple("._@#$~")  # what file managers, NAS boxes and half-done copies put beside files, and nobody's text
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` writes beside data
_CACHE = ("activations.zarr", "cache.json")


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    place: dict[str, Any]  # where to open the source to begin with this piece again
    text: str
    ends: bool  # the document is complete with it
    where: str  # for people: file and row


@dataclass(kw_only=True, frozen=True, slots=True)
class TextSource:
    """A dataset and the column of it that holds the text."""

    dataset: str
    revision: str | None
    split: str
    column: str

    @property
    def local_files(self) -> list[Path]:
        """The files to read, in order; none for a hub dataset. Raises UserError for a path that holds no text."""
        path = Path(self.dataset)
        if path.exists():
            return text_files(path, self.split)
        if path.is_absolute() or self.dataset.startswith((".", "~")) or kind_of(path):
            raise unreachable(f"the dataset {self.dataset}", FileNotFoundError("there is no such file or folder"))
        return []

    def pinned_revision(self) -> str:
        """The hub's commit, or a hash of local files. Raises UserError if the source cannot be reached."""
        if files := self.local_files:
            return hash_files(files)
        return dataset_commit(self.dataset, self.revision)

    def pieces(self, place: dict[str, Any] | None = None) -> Iterator[Piece]:
        """Every document from a place on, from the first without one. Raises UserError at whatever is no text."""
        files, place = self.local_files, place or {}
        nulls, skip, row = 0, place.get("piece", 0), None
        for row in self._local(files, place) if files else self._hub(place):
            text = self._text(row)
            nulls = nulls + 1 if row.value is None else 0
            if nulls == _NULLS:
                raise UserError(f"{row.where}: column {self.column!r} has been empty for {nulls} rows; leave such rows out")
            for number, (part, last) in enumerate(_parted(text)):
                if number >= skip:
                    ends = row.ends and last
                    yield Piece(place={**row.place, "piece": number}, text=part, ends=ends, where=row.where)
            skip = 0
        if row is None and not place:
            raise UserError(f"the dataset {self.dataset} is empty")

    def _text(self, row: "_Row") -> str:
        if row.value is None:
            return ""
        if not isinstance(row.value, str):
            kind = type(row.value).__name__
            raise UserError(f"{row.where}: column {self.column!r} holds {kind}, not text; name another with --text-column")
        try:
            row.value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{row.where}: its text holds half a surrogate pair, which is no character; mend that row"
            ) from None
        return row.value

    # --- local files ---

    def _local(self, files: list[Path], place: dict[str, Any]) -> Iterator["_Row"]:
        position, row = place.get("position", 0), place.get("row", 0)
        for number in range(place.get("file", 0), len(files)):
            path = files[number]
            read = {"json": _json_rows, "parquet": _parquet_rows, "txt": _txt_rows}[kind_of(path) or ""]
            row_seen = row
            try:
                for at in read(path, self.column, position, row):
                    row_seen = at.place["row"] + 1
                    yield _Row(place={"file": number, **at.place}, value=at.value, where=at.where, ends=at.ends)
            except UserError:
                raise
            except (
                Exception
            ) as error:  # of the system, five compressions and parquet: a cut file is an EOFError, or any of them
                raise UserError(f"{path}, after row {row_seen}: {_reason(error)}; is the file whole? copy it again") from None
            position = row = 0

    # --- the hub ---

    def _hub(self, place: dict[str, Any]) -> Iterator["_Row"]:
        where = f"the dataset {self.dataset}"
        try:
            stream = self._stream()
            if place:
                stream.load_state_dict(place["stream"])
            rows = iter(stream)
        except Exception as error:  # the hub's client, the network, and whatever describes a dataset
            raise unreachable(where, error) from None
        for number in itertools.count(place.get("row", 0)):
            try:
                before = stream.state_dict()
                record = next(rows, None)
            except Exception as error:
                if number == 0:
                    raise unreachable(where, error) from None
                raise UserError(f"{where}, after row {number}: {_reason(error)}; run again to continue there") from None
            if record is None:
                return
            here = f"{where}, row {number + 1}"
            yield _Row(place={"stream": before, "row": number}, value=_column(record, self.column, here), where=here)

    def _stream(self) -> "IterableDataset":
        from datasets import load_dataset

        return load_dataset(self.dataset, revision=self.revision, split=self.split, streaming=True)


@dataclass(kw_only=True, frozen=True, slots=True)
class _Row:
    """What a reader finds: a document, or the next piece of a text file, not looked at yet."""

    place: dict[str, Any]
    value: Any
    where: str
    ends: bool = True


# --- which files are text ---


def kind_of(path: Path) -> str | None:
    """'json', 'parquet' or 'txt' by the file's name; None for what is not text."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSIONS
    kind = _KINDS.get(suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1] if suffixes else "")
    return None if compressed and kind == "parquet" else kind


def text_files(path: Path, split: str) -> list[Path]:
    """The files of text at a path, sorted: the file itself, or those below a folder.

    Below a folder text is what is named *.jsonl, *.json, *.parquet or *.txt, all of one kind; not what is hidden (a name that
    begins with one of ._@#$~), a cache, or a description that `datasets` writes. Folders that are links are followed. A split
    is read from the names of files and folders (train-00000.parquet, test/a.jsonl). Raises UserError where that leaves nothing,
    or leaves it open what is meant.
    """
    if not path.is_dir():
        if not path.is_file() or kind_of(path) is None:
            raise UserError(f"{path} is not a file of text: give one out of {_known()}, or a folder of them")
        return _of_split(path, [path], split)
    files = sorted(_below(path, set()))
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1:
        found = f"it has {_one_of_each(files)}" if files else "it has none"
        raise UserError(f"{path}: expected files of one kind out of {_known()}; {found}: name one file, or put them apart")
    return _of_split(path, files, split)


def _known() -> str:
    return f"{', '.join(_KINDS)} (all but parquet also as .{', .'.join(_COMPRESSIONS)})"


def _one_of_each(files: list[Path]) -> str:
    return " and ".join(sorted(str(f) for f in {kind_of(file): file for file in reversed(files)}.values()))


def _below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files of text below a folder; each real folder once, or links in a circle would have no end."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    names = {entry.name for entry in entries}
    if folder.resolve() in seen or names.intersection(_CACHE):
        return
    seen.add(folder.resolve())
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        raise UserError(f"{folder} was written by save_to_disk: export it with to_parquet and name that file")
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(_HIDDEN) or entry.name in _ABOUT:
            continue
        if entry.is_dir():
            yield from _below(path, seen)
        elif kind_of(path) is not None:
            if not entry.is_file():
                raise UserError(f"{path} is a link to nothing, or no plain file; put the file there or take it away")
            yield path


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    """Those of a split, which names of files or folders say; all of them where no name says anything or split is 'all'."""
    named = {file: _split_named(file.relative_to(path) if file != path else Path(file.name), split) for file in files}
    found = sorted({name for name in named.values() if name is not None})
    wanted = _canonical(split)
    if split == "all" or (not found and wanted == "train") or (files == [path] and wanted == "train"):
        return files
    if None in named.values() and found and files != [path]:
        other = next(file for file, name in named.items() if name is None)
        raise UserError(
            f"{path} has splits ({', '.join(found)}) by its names, but {other} is of none: use --split all or move it"
        )
    chosen = [file for file, name in named.items() if name == wanted]
    if not chosen:
        has = f"its names say {', '.join(found)}" if found else "no name in it says one"
        raise UserError(f"{path} has no split {split!r}: {has}; name another --split, or all")
    return chosen


def _canonical(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split.lower() in words), split.lower())


def _split_named(path: Path, wanted: str) -> str | None:
    """The split that a file's name says, or the nearest folder's; None if none of them does."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            name = _canonical(word)
            if name in _SPLITS or name == wanted.lower():
                return name
    return None


# --- reading them ---


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file's bytes, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":  # pyarrow brings zstandard along
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _skip(file: IO[bytes] | gzip.GzipFile, position: int) -> None:
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(position)
        return
    while position > 0 and (n := len(file.read(min(position, 1 << 20)))):
        position -= n


def _json_rows(path: Path, column: str, position: int, row: int) -> Iterator[_Row]:
    """One object a line; position is the line's first byte. Or one array, whose objects are counted."""
    with _open(path) as file:
        if _begins_with_array(path):
            for i, record in enumerate(_read_array(path, file)[position:], position):
                where = f"{path}, object {i + 1}"
                yield _Row(place={"position": i, "row": i}, value=_column(record, column, where), where=where)
            return
        _skip(file, position)
        while line := file.readline():
            where = f"{path}, line {row + 1}"
            if line.strip():
                yield _Row(
                    place={"position": position, "row": row}, value=_column(_json(line, where), column, where), where=where
                )
            position, row = position + len(line), row + 1


def _begins_with_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array(path: Path, file: IO[bytes] | gzip.GzipFile) -> list[Any]:
    data = file.read(_ARRAY_BYTES + 1)
    if len(data) > _ARRAY_BYTES:
        raise UserError(f"{path} is one JSON array of more than {_ARRAY_BYTES >> 20} MiB: write one object a line instead")
    found = _json(data, str(path))
    assert isinstance(found, list)
    return found


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: it is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: it is not JSON ({error}); put one object on each line, or leave that line out") from None


def _column(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a field {column!r}, found {type(record).__name__}")
    if column not in record:
        has = ", ".join(sorted(map(str, record))) or "none"
        raise UserError(f"{where}: it has no column {column!r}; it has {has}: name one with --text-column")
    return record[column]


def _parquet_rows(path: Path, column: str, position: int, row: int) -> Iterator[_Row]:
    """Position and row are both the row's number in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source, pq.ParquetFile(source, buffer_size=1 << 20) as file:
        schema = file.schema_arrow
        _column(dict.fromkeys(schema.names), column, str(path))
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_string(value)
            or pa.types.is_large_string(value)
            or pa.types.is_null(value)
            or str(value) == "string_view"
        ):
            raise UserError(
                f"{path}: column {column!r} holds {kind}, not text; write it as string, or name another with --text-column"
            )
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > position:
                yield from _group_rows(file, group, column, first, position, path)
            first += rows


def _group_rows(file: Any, group: int, column: str, row: int, position: int, path: Path) -> Iterator[_Row]:
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        for i in range(max(0, position - row), len(values)):
            where = f"{path}, row {row + i + 1}"
            try:
                value = values[i].as_py()
            except UnicodeDecodeError:
                raise UserError(f"{where}: it is not UTF-8; write the column again as strings") from None
            yield _Row(place={"position": row + i, "row": row + i}, value=value, where=where)
        row += len(values)


def _txt_rows(path: Path, column: str, position: int, row: int) -> Iterator[_Row]:
    """The whole file is one document, its line ends as they lie, given piece by piece. Position is a piece's first byte."""
    with _open(path) as file:
        _skip(file, position)
        data = file.read(_PIECE)
        while data:
            whole = len(data) < _PIECE
            piece = data if whole else data[: _cut(data)]
            try:
                text = piece.decode("utf-8" if position else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, byte {position + error.start}: it is not UTF-8; save the file as UTF-8") from None
            yield _Row(place={"position": position, "row": 0}, value=text, where=str(path), ends=whole)
            position += len(piece)
            data = b"" if whole else data[len(piece) :] + file.read(_PIECE - len(data) + len(piece))


def _parted(text: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is the last): a long text in pieces of at most `_PIECE` bytes."""
    if len(text) <= _PIECE // 4 or len(data := text.encode()) <= _PIECE:
        yield text, True
        return
    at = 0
    while len(data) - at > _PIECE:
        cut = at + _cut(data[at : at + _PIECE])
        yield data[at:cut].decode(), False
        at = cut
    yield data[at:].decode(), True


def _cut(data: bytes) -> int:
    """Where to part a long text: before a single space, because tokenisers begin a word with its space.

    There byte-pair tokenisers make of both sides what they make of the whole. Without any such space it is between characters.
    """
    at = len(data) - 1
    while (at := data.rfind(b" ", 1, at)) > 0:
        if not data[at - 1 : at].isspace() and not data[at + 1 : at + 2].isspace():
            return at
    at = len(data) - 1
    while at > 0 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at or len(data)


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return text or type(error).__name__
