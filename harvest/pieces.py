"""A text as tokenising reads it: documents in order, in pieces, each with the resume point at which it comes again."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

from residual_saes.shared.errors import UserError
from residual_saes.shared.typed import Bounds, fields, read

_PIECE = 4 << 20  # bytes of a document tokenised in one go: a tokeniser needs 150 bytes of memory for each
_NULLS = 256  # consecutive rows without text are a column that is not there any more
Place = Annotated[int, Bounds(0, 1 << 62)]


@dataclass(kw_only=True, frozen=True, slots=True)
class FilePoint:
    """Resume point in local files: a byte of a file of lines or of plain text, a row of parquet or of a JSON array."""

    file: Place = 0
    position: Place = 0  # the byte or row
    row: Place = 0  # rows of the file before it
    piece: Place = 0  # pieces of that row's document before it


@dataclass(kw_only=True, frozen=True, slots=True)
class StreamPoint:
    """Resume point in a dataset streamed from the hub."""

    stream: dict[str, Any] = field(default_factory=dict)  # the state of `datasets` before the row
    row: Place = 0
    piece: Place = 0


ResumePoint = FilePoint | StreamPoint


def resume_point(value: Any) -> ResumePoint:
    """The resume point of which `value` is the `asdict`, as a token chunk's ledger entry holds it. Raises UserError."""
    try:
        kind: Any = StreamPoint if "stream" in value else FilePoint
        if later := set(value).difference(fields(kind)):
            raise ValueError(f"{min(later)} is not known here")
        point: ResumePoint = read(kind, value)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a place in a text: {error}; use the version of this program that wrote it") from None
    return point


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    point: ResumePoint
    text: str
    ends: bool  # the document is complete with it
    where: str  # file and row, for messages


class TextSource(Protocol):
    """A dataset, of which one column holds the text."""

    @property
    def dataset(self) -> str: ...

    def pinned_revision(self) -> str:
        """The hub's commit, or 'sha256:…' of local files. Raises UserError if the text cannot be reached."""

    def pieces(self, start: ResumePoint | None = None) -> Iterator[Piece]:
        """Every document from `start` on, a resume point of an earlier piece. Raises UserError at whatever is no text."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """What stands in the text column of a row, or a part of a text file; of any type."""

    point: ResumePoint
    value: Any
    where: str
    ends: bool = True


def split_rows(rows: Iterable[Row], dataset: str, column: str, start: ResumePoint | None) -> Iterator[Piece]:
    """Pieces of at most 4 MiB of the text in `rows`, which begin with that of `start`. Raises UserError for what is no text."""
    row, nulls, skip = None, 0, start.piece if start else 0
    for row in rows:
        text = _text_of(row, column)
        nulls = nulls + 1 if row.value is None else 0
        if nulls == _NULLS:
            raise UserError(f"{row.where}: column {column!r} has been empty for {nulls} rows; leave such rows out")
        for number, (part, last) in enumerate(split_text(text)):
            if number >= skip:
                point = replace(row.point, piece=number)
                yield Piece(point=point, text=part, ends=row.ends and last, where=row.where)
        skip = 0
    if row is None and start is None:
        raise UserError(f"the dataset {dataset} is empty")


def column_of(record: Any, column: str, where: str) -> Any:
    """A record's value in the text column. Raises UserError where it has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with a field {column!r}, found {type(record).__name__}")
    if column not in record:
        has = ", ".join(sorted(map(str, record))) or "none"
        raise UserError(f"{where}: it has no column {column!r}; it has {has}: name one with --text-column")
    return record[column]


def _text_of(row: Row, column: str) -> str:
    if row.value is None:
        return ""
    if not isinstance(row.value, str):
        kind = type(row.value).__name__
        raise UserError(f"{row.where}: column {column!r} holds {kind}, not text; name another with --text-column")
    try:
        row.value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{row.where}: its text holds half a surrogate pair, which is no character; mend that row") from None
    return row.value


def split_text(text: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is the last): a long text in parts of at most 4 MiB in UTF-8."""
    if len(text) <= _PIECE // 4 or len(data := text.encode()) <= _PIECE:
        yield text, True
        return
    at = 0
    while len(data) - at > _PIECE:
        cut = at + _cut(data[at : at + _PIECE])
        yield data[at:cut].decode(), False
        at = cut
    yield data[at:].decode(), True


def split_bytes(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bool]]:
    """(part, whether it is the last) of a file of UTF-8 as long as it may be, from its next byte on."""
    data = read(_PIECE)
    while data:
        last = len(data) < _PIECE
        part = data if last else data[: _cut(data)]
        yield part, last
        data = b"" if last else data[len(part) :] + read(_PIECE - len(data) + len(part))


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


def reason(error: Exception) -> str:
    """The first line of an error's message, as a part of one of ours."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
