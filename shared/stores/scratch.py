"""Blocks of a cache that lies far away (a bucket, a network's disk), kept on this node's own disk.

    <folder>/used                        bytes that are taken, in all
    <folder>/locks/                      who is fetching what
    <folder>/<cache>/<layer>-<block>     a block as it lies in the cache

A block that is asked for is fetched whole, compared with the ledger, and stays: nothing is ever evicted, for training goes over
all blocks in turn, and then what was used longest ago is what comes next. When the size is reached, the other blocks are read
where they lie. Several processes of a node may share a folder: each block is fetched once, by whoever locks it first. What is
read from here is checked as everything is; a copy that is damaged goes, and the block is read where it lies.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from shared.errors import UserError
from shared.files import locked, make_dir, read_file, remove_leftovers, temporary, write_all
from shared.progress import say
from shared.units import format_bytes, parse_bytes

_LOCKS = 256  # two blocks that share one wait for each other, which costs little


@dataclass(kw_only=True, frozen=True, slots=True)
class ScratchConfig:
    folder: Path
    size: int  # bytes, of all that lies in the folder

    @classmethod
    def parse(cls, text: str) -> "ScratchConfig":
        """'/nvme/scratch:2TB'. Raises UserError."""
        folder, _, size = text.rpartition(":")
        if not folder:
            raise UserError(f"{text!r} does not say where and how much: write --scratch DIR:SIZE, such as /nvme/scratch:2TB")
        return cls(folder=Path(folder), size=parse_bytes(size))


class Scratch:
    """Copies of one cache's blocks."""

    def __init__(self, config: ScratchConfig, digest: str) -> None:
        """Raises UserError where the folder cannot be written to."""
        self._config, self._folder = config, config.folder / digest[:16]
        self._locks = config.folder / "locks"
        self._full = False
        for folder in (self._folder, self._locks):
            make_dir(folder)
        with self._account() as change:
            for each in config.folder.iterdir():
                remove_leftovers(each)
            change(self._count(), new=True)

    def read(self, layer: int, block: int, out: memoryview, offset: int, size: int, fetch: Callable[[], memoryview]) -> bool:
        """Fill `out` from byte `offset` of a block of `size` bytes; False where there is no copy and no room for one.

        `fetch` gives a block that is not here yet, whole and checked; what it raises is passed on.
        """
        path = self._folder / f"{layer:02d}-{block}"
        if (found := _read(path, out, offset)) is not None:
            return found
        if self._full:
            return False
        with locked(self._locks / str(crc32(path.name.encode()) % _LOCKS), make=True):
            if (found := _read(path, out, offset)) is not None:
                return found
            mine = self._reserve(path, size)
            if mine is None:
                return False
            try:
                data = fetch()
                out[:] = data[offset : offset + len(out)]
                self._write(mine, data)
                os.replace(mine, path)
            except BaseException as error:
                self._give_back(mine)
                if not isinstance(error, OSError):
                    raise
                self._stop(f"cannot write: {error.strerror}")  # the block is at hand all the same
        return True

    def drop(self, layer: int, block: int) -> None:
        """Remove a copy that is damaged, or of a block that was repaired since."""
        self._give_back(self._folder / f"{layer:02d}-{block}")

    def _reserve(self, path: Path, size: int) -> Path | None:
        """A file of that size to write into; None where it would be too much."""
        mine = temporary(path)
        with self._account() as change:
            if not change(size):
                self._stop("full")
                return None
            try:
                fd = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    os.posix_fallocate(fd, 0, size)
                finally:
                    os.close(fd)
            except OSError as error:
                mine.unlink(missing_ok=True)
                change(-size)
                self._stop(f"cannot write: {error.strerror}")
                return None
        return mine

    def _give_back(self, path: Path) -> None:
        with self._account() as change, contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            change(-size)

    def _stop(self, why: str) -> None:
        if not self._full:
            self._full = True
            say(
                f"scratch {self._config.folder} ({format_bytes(self._config.size)}): {why}; the rest is read where it lies",
                err=True,
            )

    def _write(self, mine: Path, data: memoryview) -> None:
        fd = os.open(mine, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _account(self) -> "Iterator[Callable[..., bool]]":
        """Alone with the account, a function that changes it: False, and no change, where it would be above the size."""
        path = self._config.folder / "used"

        def change(by: int, *, new: bool = False) -> bool:
            text = os.pread(file.fileno(), 20, 0)
            used = 0 if new else int(text) if text.strip().isdigit() else self._count()
            if not new and by > 0 and used + by > self._config.size:
                return False
            os.pwrite(file.fileno(), f"{max(0, used + by):20d}".encode(), 0)
            return True

        with locked(path, make=True), path.open("r+b") as file:
            yield change

    def _count(self) -> int:
        """Bytes of all blocks here, those that are being written included, of whatever cache."""
        folders = [each for each in self._config.folder.iterdir() if each.is_dir() and each != self._locks]
        return sum(entry.stat().st_size for folder in folders for entry in os.scandir(folder))


def _read(path: Path, out: memoryview, offset: int) -> bool | None:
    """Whether a copy gave all that was asked for; None where there is no copy."""
    try:
        return read_file(path, out, offset) == len(out)
    except FileNotFoundError:
        return None
    except OSError:
        return False
