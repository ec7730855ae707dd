"""Documents of local files, in order, each with the byte or row at which it comes again.

The column that holds the text is read and nothing else: a path is a path, every failure names its file and row, and a resume
point is exact.
"""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from residual_saes.harvest.pieces import (
    FilePoint,
    Piece,
    ResumePoint,
    Row,
    StreamPoint,
    column_of,
    reason,
    split_bytes,
    split_rows,
)
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import hash_files, unreachable

_ARRAY_BYTES = 256 << 20  # of a JSON array, which has to be read whole
_PACKED = 4 << 10  # bytes of zstandard unpacked at once: of the emptiest text they make 128 MiB
_ROWS = 16  # of a parquet file decoded at once
_STRINGS = ("string", "large_string", "string_view", "null")  # pyarrow's names of what is text
_KINDS = {"jsonl": "json", "ndjson": "json", "json": "json", "parquet": "parquet", "txt": "txt", "text": "txt"}
_COMPRESSIONS = ("gz", "xz", "zst", "bz2")
_HIDDEN = tuple("._@#$~")  # what file managers, NAS boxes and half-done copies put beside files, and nobody's text
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` writes beside data
_CACHE = ("activations.zarr", "cache.json")


@dataclass(kw_only=True, frozen=True, slots=True)
class LocalText:
    """The files of text at a path: a TextSource."""

    dataset: str  # the path
    column: str

    @property
    def files(self) -> list[Path]:
        """The files to read, in order. Raises UserError for a path that holds no text."""
        path = Path(self.dataset)
        if not path.exists():
            raise unreachable(f"the dataset {self.dataset}", FileNotFoundError("there is no such file or folder"))
        return text_files(path)

    def pinned_revision(self) -> str:
        """'sha256:…' of the files' content. Raises UserError."""
        return hash_files(self.files)

    def pieces(self, start: ResumePoint | None = None) -> Iterator[Piece]:
        """Every document from `start` on. Raises UserError at whatever is no text."""
        assert not isinstance(start, StreamPoint), "a cache of local files is compared with local files alone"
        return split_rows(self._rows(start or FilePoint()), self.dataset, self.column, start)

    def _rows(self, start: FilePoint) -> Iterator[Row]:
        for number, path in enumerate(self.files[start.file :], start.file):
            point = start if number == start.file else FilePoint(file=number)
            done = point.row
            try:
                for row in _READERS[kind_of(path) or ""](path, self.column, point):
                    done = row.point.row + 1
                    yield row
            except UserError:
                raise
            except Exception as error:  # of the system, five compressions and parquet: a cut file gives any of them
                raise UserError(f"{path}, after row {done}: {reason(error)}; is the file whole? copy it again") from None


# --- which files are text ---


def is_local(dataset: str) -> bool:
    """Whether a dataset's name means a path, be it there or not; any other is the hub's."""
    path = Path(dataset)
    return path.exists() or path.is_absolute() or dataset.startswith((".", "~")) or kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """'json', 'parquet' or 'txt' by the file's name; None for what is not text."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSIONS
    kind = _KINDS.get(suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1] if suffixes else "")
    return None if compressed and kind == "parquet" else kind


def text_files(path: Path) -> list[Path]:
    """The files of text at a path, sorted: the file itself, or all those below a folder.

    Below a folder text is what is named *.jsonl, *.json, *.parquet or *.txt, all of one kind; not what is hidden (a name that
    begins with one of ._@#$~), a cache, or a description that `datasets` writes. Folders that are links are followed. Raises
    UserError where that leaves nothing, or leaves it open what is meant.
    """
    if not path.is_dir():
        if not path.is_file() or kind_of(path) is None:
            raise UserError(f"{path} is not a file of text: give one out of {_known()}, or a folder of them")
        return [path]
    files = sorted(_below(path, set()))
    if len({kind_of(file) for file in files}) != 1:
        has = f"it has {_one_of_each(files)}" if files else "it has none"
        raise UserError(f"{path}: expected files of one kind out of {_known()}; {has}: name one file, or put them apart")
    return files


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


# --- reading them ---


class _Zstd(io.RawIOBase):
    """The content of a file of zstandard frames, of any window up to the 2 GiB of `zstd --long=31`."""

    def __init__(self, path: Path) -> None:
        from zstandard import ZstdDecompressor

        self._file = path.open("rb")
        self._decompressor = ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None  # the one that has begun and not ended
        self._packed, self._content = b"", memoryview(b"")  # read and not given yet

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        while not self._content:
            packed = self._packed or self._file.read(_PACKED)
            if not packed and self._frame is not None:
                raise EOFError("its last frame is cut off")
            if not packed:
                return 0
            self._unpack(packed)
        n = min(len(out), len(self._content))
        out[:n], self._content = self._content[:n], self._content[n:]
        return n

    def _unpack(self, packed: bytes) -> None:
        frame = self._frame or self._decompressor.decompressobj()
        self._content = memoryview(frame.decompress(packed))
        self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file's bytes, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return io.BufferedReader(_Zstd(path), 1 << 20)
    return path.open("rb")


def _skip(file: IO[bytes] | gzip.GzipFile, position: int) -> None:
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(position)
        return
    while position > 0 and (n := len(file.read(min(position, 1 << 20)))):
        position -= n


def _json_rows(path: Path, column: str, start: FilePoint) -> Iterator[Row]:
    """One object a line; the position is the line's first byte. Or one array, whose objects are counted."""
    with _open(path) as file:
        if _begins_with_array(path):
            for i, record in enumerate(_read_array(path, file)[start.position :], start.position):
                where = f"{path}, object {i + 1}"
                yield Row(point=_at(start, i, i), value=column_of(record, column, where), where=where)
            return
        position, row = start.position, start.row
        _skip(file, position)
        while line := file.readline():
            where = f"{path}, line {row + 1}"
            if line.strip():
                value = column_of(_json(line, where), column, where)
                yield Row(point=_at(start, position, row), value=value, where=where)
            position, row = position + len(line), row + 1


def _at(start: FilePoint, position: int, row: int) -> FilePoint:
    """A row of the file in which `start` is."""
    return FilePoint(file=start.file, position=position, row=row)


def _begins_with_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array(path: Path, file: IO[bytes] | gzip.GzipFile) -> list[Any]:
    data = file.read(_ARRAY_BYTES + 1)
    if len(data) > _ARRAY_BYTES:
        raise UserError(f"{path} is one JSON array of more than {_ARRAY_BYTES >> 20} MiB: write one object a line instead")
    records = _json(data, str(path))
    assert isinstance(records, list)
    return records


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: it is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: it is not JSON ({error}); put one object on each line, or leave that line out") from None


def _parquet_rows(path: Path, column: str, start: FilePoint) -> Iterator[Row]:
    """The rows of one string column; position and row are both the row's number in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source, pq.ParquetFile(source, buffer_size=1 << 20) as file:
        column_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
        kind = file.schema_arrow.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(value) not in _STRINGS:
            raise UserError(
                f"{path}: column {column!r} holds {kind}, not text; write it as string, or name another with --text-column"
            )
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start.position:
                yield from _group_rows(path, file, group, column, first, start)
            first += rows


def _group_rows(path: Path, file: Any, group: int, column: str, first: int, start: FilePoint) -> Iterator[Row]:
    """The rows of a row group from `start` on; `first` is the number of the group's first row."""
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        for row in range(max(first, start.position), first + len(values)):
            where = f"{path}, row {row + 1}"
            try:
                value = values[row - first].as_py()
            except UnicodeDecodeError:
                raise UserError(f"{where}: it is not UTF-8; write the column again as strings") from None
            yield Row(point=_at(start, row, row), value=value, where=where)
        first += len(values)


def _txt_rows(path: Path, column: str, start: FilePoint) -> Iterator[Row]:
    """The whole file as one document, its line ends as they lie, in parts; the position is a part's first byte."""
    position = start.position
    with _open(path) as file:
        _skip(file, position)
        for part, last in split_bytes(file.read):
            try:
                text = part.decode("utf-8" if position else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, byte {position + error.start}: it is not UTF-8; save the file as UTF-8") from None
            yield Row(point=_at(start, position, 0), value=text, where=str(path), ends=last)
            position += len(part)


_READERS = {"json": _json_rows, "parquet": _parquet_rows, "txt": _txt_rows}
