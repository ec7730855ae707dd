"""Where a cache's bytes lie: keys such as "ledger/0-5/00000003.json" and six things that can be done with them.

Everything that a cache does to a disk goes through here. What is written is durable on return, and whole or not there at
all; a key is created by one process only. Another kind of store has these methods, and nothing else has to change.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from shared.cli import UserError
from shared.files import (
    create_file,
    free_bytes,
    locked,
    publish_file,
    read_file,
    remove_leftovers,
    stage_file,
    sync_dir,
    writing,
)


class Folder:
    """A store in a folder of a file system; keys are paths in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: set[Path] = set()  # folders whose own names are durable

    def path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        """Fill `out` from byte `offset` on; how many bytes there were. Raises OSError."""
        return read_file(self.path(key), out, offset)

    def get(self, key: str) -> bytes:
        """Raises OSError, FileNotFoundError among them."""
        return self.path(key).read_bytes()

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Put `data` in the place of whatever was there. Raises UserError."""
        publish_file(self._ready(key), data)

    def stage(self, key: str, data: bytes | memoryview) -> Path:
        """Bring `data` near its place, durable; `place` or `drop` it then. Raises UserError."""
        return stage_file(self._ready(key), data)

    def place(self, staged: dict[str, Path]) -> None:
        """Put {key: what was staged for it} in place, all of it durable on return. Raises UserError."""
        paths = {self.path(key): mine for key, mine in staged.items()}
        for path, mine in paths.items():
            with writing(path):
                os.replace(mine, path)
        for folder in {path.parent for path in paths}:
            with writing(folder):
                sync_dir(folder)

    def drop(self, staged: Iterable[Path]) -> None:
        for mine in staged:
            with contextlib.suppress(OSError):
                mine.unlink(missing_ok=True)

    def locked(self, key: str) -> AbstractContextManager[None]:
        """Alone among all who lock the same key, where the file system can do that."""
        return locked(self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        """Write only where nothing is; False if something was. Raises UserError."""
        return create_file(self._ready(key), data)

    def list(self, prefix: str) -> list[str]:
        """The names directly under a prefix, sorted; none where nothing is there."""
        try:
            return sorted(name for name in os.listdir(self.path(prefix)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path(prefix)}: {error.strerror}; put that right and run again") from None

    def has(self, key: str) -> bool:
        return os.path.exists(self.path(key))

    def delete(self, key: str) -> None:
        """Durable on return; what is not there is deleted already. Raises UserError."""
        path = self.path(key)
        with writing(path):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_dir(path.parent)

    def delete_all(self, prefix: str) -> None:
        """Everything under a prefix. Raises UserError."""
        path = self.path(prefix)
        if path.exists():
            with writing(path):
                shutil.rmtree(path)
            self._known.clear()

    def free(self) -> int:
        return free_bytes(self.root)

    def remove_leftovers(self, prefix: str) -> None:
        """What writers of this host that are dead left half-written under a prefix."""
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
