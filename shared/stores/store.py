"""Where a cache's bytes lie: keys such as "ledger/0-5/00000003.json" and what can be done with them.

Everything that a cache does to a disk or a bucket goes through here. What is written is durable on return, and whole or not
there at all; a key is created by one process only. `Folder` is here, S3 in shared/stores/s3.py.

Large objects are staged, and placed when all that belong together are: on a disk under a name of their own and by a move,
under a lock. A bucket has neither moves nor locks, so there an object is made where nothing is and never changed: whoever comes
second takes over what lies there, and records that.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from shared.errors import UserError
from shared.files import (
    create_file,
    free_bytes,
    locked,
    make_dir,
    publish_file,
    read_file,
    remove_leftovers,
    stage_file,
    sync_dir,
    writing,
)

_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=+@-]+)*)/?")


@dataclass(frozen=True, slots=True)
class Bucket:
    """A place in S3, written s3://bucket/prefix; a Path would make one slash of two."""

    name: str
    prefix: str = ""  # without slashes at its ends

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Raises UserError for what is no such place."""
        match = _BUCKET.fullmatch(text)
        if match is None or {".", ".."} & set(match[2].split("/")):
            raise UserError(f"{text!r} is not a place in S3: write s3://bucket/prefix, in letters, digits and _.-")
        return cls(match[1], match[2].strip("/"))

    def __truediv__(self, key: str) -> "Bucket":
        return Bucket(self.name, f"{self.prefix}/{key}".strip("/"))

    def __str__(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")


Location: TypeAlias = Path | Bucket
Staged: TypeAlias = Path | None  # None: in its place already


def parse_location(text: str | Location) -> Location:
    """What a command line says: a folder, or s3://bucket/prefix. Raises UserError."""
    if not isinstance(text, str):  # an option's default
        return text
    return Bucket.parse(text) if text.startswith("s3:") else Path(text)


class Store(Protocol):
    """What a cache asks of the place where it lies. All of it may raise UserError where that place fails."""

    root: Location

    def prepare(self) -> None:
        """Find out, before hours of work, that something can be written here."""

    def path(self, key: str) -> Location:
        """Where a key lies, for people."""

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        """Fill `out` from byte `offset` on; how many bytes there were. Raises OSError, FileNotFoundError among them."""

    def get(self, key: str) -> bytes:
        """All of a small one. Raises OSError, FileNotFoundError among them."""

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Put `data` in the place of whatever was there."""

    def create(self, key: str, data: bytes) -> bool:
        """Write only where nothing is; False if something was."""

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        """Put `data` in the place of `seen`; False where by now something else is there."""

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        """Bring a large object to its place, or near it, durable: `place` or `drop` it then.

        A store that can only make what is not there, and so finds what another process of the same `owner` has put there
        first, leaves that in `data`; with `replace` it writes over it.
        """

    def place(self, staged: dict[str, Staged]) -> None:
        """Put {key: what was staged for it} in place, all of it durable on return."""

    def drop(self, staged: Iterable[Staged]) -> None:
        """Take away what was staged and is not to be placed."""

    def locked(self, key: str) -> AbstractContextManager[None]:
        """Alone among all who lock the same key, where there is such a thing."""

    def list(self, prefix: str) -> list[str]:
        """The names directly under a prefix, sorted; none where nothing is there."""

    def has(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Durable on return; what is not there is deleted already."""

    def delete_all(self, prefix: str) -> None:
        """Everything under a prefix."""

    def free(self) -> int:
        """Bytes; UNKNOWN_FREE where nobody says."""

    def remove_leftovers(self, prefix: str) -> None:
        """What writers of this host that are dead left half-written under a prefix."""


def open_store(location: Location) -> Store:
    """Raises UserError for a place in S3 where the package that this needs is not installed."""
    if isinstance(location, Path):
        return Folder(location)
    from shared.stores.s3 import S3  # here, because its package is an extra

    return S3(location)


class Folder:
    """A store in a folder of a file system; keys are paths in it."""

    def __init__(self, root: Path) -> None:
        self.root: Location = root
        self._root = root
        self._known: set[Path] = set()  # folders whose own names are durable

    def prepare(self) -> None:
        make_dir(self._root.parent)

    def path(self, key: str) -> Path:
        return self._root / key

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        return read_file(self.path(key), out, offset)

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def write(self, key: str, data: bytes | memoryview) -> None:
        publish_file(self._ready(key), data)

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        self.write(key, data)  # under the lock that `seen` was read under
        return True

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        return stage_file(self._ready(key), data)

    def place(self, staged: dict[str, Staged]) -> None:
        paths = {self.path(key): mine for key, mine in staged.items() if mine is not None}
        for path, mine in paths.items():
            with writing(path):
                os.replace(mine, path)
        for folder in {path.parent for path in paths}:
            with writing(folder):
                sync_dir(folder)

    def drop(self, staged: Iterable[Staged]) -> None:
        for mine in staged:
            if mine is not None:
                with contextlib.suppress(OSError):
                    mine.unlink(missing_ok=True)

    def locked(self, key: str) -> AbstractContextManager[None]:
        return locked(self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        return create_file(self._ready(key), data)

    def list(self, prefix: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path(prefix)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path(prefix)}: {error.strerror}; put that right and run again") from None

    def has(self, key: str) -> bool:
        return os.path.exists(self.path(key))

    def delete(self, key: str) -> None:
        path = self.path(key)
        with writing(path):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_dir(path.parent)

    def delete_all(self, prefix: str) -> None:
        path = self.path(prefix)
        if path.exists():
            with writing(path):
                shutil.rmtree(path)
            self._known.clear()

    def free(self) -> int:
        return free_bytes(self._root)

    def remove_leftovers(self, prefix: str) -> None:
        remove_leftovers(self.path(prefix))

    def _ready(self, key: str) -> Path:
        """The key's path, in a folder that is there and stays there after a power cut."""
        path = self.path(key)
        if path.parent.absolute() not in self._known:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                for folder in path.absolute().parents:
                    if folder in self._known:
                        break
                    sync_dir(folder.parent)
                    self._known.add(folder)
        return path
