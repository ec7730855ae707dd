"""Files of sealed records: JSON that is replaced whole under a lock, or lines that are only ever added to.

A record is a frozen dataclass in memory, and in a file a JSON object of its fields with a checksum of itself (shared/seal.py),
which is compared wherever it is read.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import append_line, locked, publish_json, read_if_there
from residual_saes.shared.seal import parse_json, parse_sealed, seal, sealed, unsealed
from residual_saes.shared.sites import Site
from residual_saes.shared.typed import checked, fields


@dataclass(kw_only=True, frozen=True)
class Record:
    """Base of records. A field's key is its name, where its metadata has no "key"; a Site is written as its `json`."""

    stored: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # the JSON that it was read from, if it was

    def values(self) -> dict[str, Any]:
        """The fields as JSON has them, by key."""
        return _values(self)

    def to_dict(self) -> dict[str, Any]:
        """A record that was read is written in the order in which it was stored, with the keys that only another version of
        this program knows, and without those that the other did not know while they are empty."""
        values = self.values()
        if not self.stored:
            return values
        full = {k: v for k, v in values.items() if v not in (None, [], {})}
        return {k: values.get(k, v) for k, v in self.stored.items()} | full

    @classmethod
    def from_dict(cls, stored: dict[str, Any], name: str = "") -> Self:
        """Raises ValueError for values of other types than the fields'. `name` is that of the field that holds the record."""
        return cls(**checked(cls, stored, name), stored=stored)


def _values(of: Any) -> dict[str, Any]:
    return {key: _plain(getattr(of, f.name)) for key, (f, _) in fields(of.__class__).items()}


def _plain(value: Any) -> Any:
    """A value of a field as JSON has it."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Site):
        return value.json
    if dataclasses.is_dataclass(value):
        return _values(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


R = TypeVar("R", bound=Record)


class JsonRecords(Generic[R]):
    """A list of records in one file, or with `names` an object that gives each its name."""

    def __init__(self, path: Path, kind: type[R], names: Callable[[list[R]], list[str]] | None = None) -> None:
        self.path, self._kind, self._names = path, kind, names

    def read(self) -> list[R]:
        """Nothing where there is no file. Raises UserError for one that cannot be read, or is not as it was written."""
        if (stored := read_if_there(self.path)) is None:
            return []
        try:
            content = parse_json(stored)
            records = content if self._names is None else list(content.values())
            if isinstance(records, list) and all(map(sealed, records)):
                return [self._kind.from_dict(unsealed(record)) for record in records]
        except (ValueError, AttributeError):  # no JSON, or JSON of something else
            pass
        raise UserError(f"{self.path} is damaged: restore it, or delete it to measure everything again")

    def update(self, change: Callable[[list[R]], list[R]]) -> list[R]:
        """Replace the records by what `change` makes of those on disk by now: another process may have added its own."""
        with locked(self.path.parent):
            records = change(self.read())
            content = [seal(record.to_dict()) for record in records]
            named = content if self._names is None else dict(zip(self._names(records), content, strict=True))
            publish_json(self.path, named)
        return records


class JsonLines(Generic[R]):
    """A record a line."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self._kind = path, kind

    def append(self, record: R) -> None:
        """Add a line, whole or not at all. Raises UserError where the disk does not take it."""
        append_line(self.path, json.dumps(seal(record.to_dict())).encode())

    def lines(self) -> list[tuple[bytes, R | None]]:
        """Every line and its record, None where it is damaged; not a last line that is being written or that a crash cut.
        Raises UserError for a file that cannot be read."""
        lines = (read_if_there(self.path) or b"").split(b"\n")[:-1]
        return [(line + b"\n", self._parsed(line)) for line in lines]

    def read(self) -> list[R]:
        """Raises UserError if a line is damaged."""
        records = []
        for number, (_, record) in enumerate(self.lines(), 1):
            if record is None:
                raise UserError(f"line {number} of {self.path} is damaged: delete that line to use the others")
            records.append(record)
        return records

    def _parsed(self, line: bytes) -> R | None:
        try:
            record = parse_sealed(line)
            return None if record is None else self._kind.from_dict(unsealed(record))
        except ValueError:
            return None
