"""A store in a folder of a file system."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from residual_saes.shared import files, temporaries
from residual_saes.shared.errors import UserError
from residual_saes.shared.stores.protocol import Staged


class Folder:
    """A store in a folder of a file system; keys are paths in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: set[Path] = set()  # folders whose names are durable

    def prepare(self) -> None:
        files.make_dir(self.root.parent)

    def path(self, key: str) -> Path:
        return self.root / key

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        return files.read_file(self.path(key), out, offset)

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def write(self, key: str, data: bytes | memoryview) -> None:
        files.publish_file(self._ready(key), data)

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        self.write(key, data)  # the caller holds the lock under which it read `seen`
        return True

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        return files.stage_file(self._ready(key), data)

    def place(self, staged: dict[str, Staged]) -> None:
        paths = {self.path(key): temporary for key, temporary in staged.items() if temporary is not None}
        for path, temporary in paths.items():
            with files.writing(path):
                temporaries.place(temporary, path)
        for folder in {path.parent for path in paths}:
            with files.writing(folder):
                files.sync_dir(folder)

    def drop(self, staged: Iterable[Staged]) -> None:
        for temporary in staged:
            if temporary is not None:
                temporaries.discard(temporary)

    def locked(self, key: str) -> AbstractContextManager[None]:
        return files.locked(self.path(key))

    def create(self, key: str, data: bytes) -> bool:
        return files.create_file(self._ready(key), data)

    def list(self, prefix: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path(prefix)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path(prefix)}: {error.strerror}; put that right and run again") from None

    def has(self, key: str) -> bool:
        try:
            self.path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise UserError(f"cannot read {self.path(key)}: {error.strerror}; put that right and run again") from None
        return True

    def delete(self, key: str) -> None:
        path = self.path(key)
        with files.writing(path):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                files.sync_dir(path.parent)

    def delete_all(self, prefix: str) -> None:
        path = self.path(prefix)
        if path.exists():
            with files.writing(path):
                shutil.rmtree(path)
            self._known.clear()

    def free(self) -> int:
        return files.free_bytes(self.root)

    def leftovers(self, prefix: str) -> Sequence[int]:
        sizes = []
        for path in temporaries.leftovers(self.path(prefix)):
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        return sizes

    def remove_leftovers(self, prefix: str) -> None:
        temporaries.remove_leftovers(self.path(prefix))

    def _ready(self, key: str) -> Path:
        """The key's path, in a folder whose own name is durable."""
        path = self.path(key)
        if path.parent.absolute() not in self._known:
            with files.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                for folder in path.absolute().parents:
                    if folder in self._known:
                        break
                    files.sync_dir(folder.parent)
                    self._known.add(folder)
        return path
