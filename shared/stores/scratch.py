"""Copies of a distant cache's blocks (in a bucket, on a network's disk) on this node's own disk.

    <folder>/used                        bytes of all copies
    <folder>/locks/                      a lock for each block that is being fetched
    <folder>/<cache>/<layer>-<block>     a block as it lies in the cache

A block is fetched whole at its first read, compared with the ledger, and kept. Copies are never evicted: training goes over all
blocks in turn, so that the least recently used block is the next one. Once the folder is full, further blocks are read in the
cache itself. Processes of a node may share a folder: each block is fetched once, by the process that locks it first. Copies are
checked at each read as the cache is; a damaged one is removed, and the block read in the cache.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import locked, make_dir, read_file, refuse_links, write_all
from residual_saes.shared.progress import say
from residual_saes.shared.sites import Site
from residual_saes.shared.stores.location import parse_folder
from residual_saes.shared.temporaries import discard, place, remove_leftovers, temporary
from residual_saes.shared.units import format_bytes, parse_bytes

_CACHE = re.compile("[0-9a-f]{16}")
_LOCKS = 256  # blocks that share one wait for each other, which costs little


@dataclass(kw_only=True, frozen=True, slots=True)
class ScratchConfig:
    """Where copies of blocks are kept, and how much room they may take."""

    folder: Path
    size: int  # bytes of all files in the folder

    @classmethod
    def parse(cls, text: str) -> "ScratchConfig":
        """Read '/nvme/scratch:2TB'. Raises UserError."""
        folder, _, size = text.rpartition(":")
        if not folder:
            raise UserError(f"{text!r} does not say where and how much: write --scratch DIR:SIZE, such as /nvme/scratch:2TB")
        return cls(folder=parse_folder(folder), size=parse_bytes(size))


class Scratch:
    """The copies of one cache's blocks."""

    def __init__(self, config: ScratchConfig, digest: str) -> None:
        """Raises UserError where the folder cannot be written to."""
        self._config, self._folder = config, config.folder / digest[:16]
        self._locks = config.folder / "locks"
        self._full = False
        refuse_links(self._folder, self._locks, config.folder / "used")
        for folder in (self._folder, self._locks):
            make_dir(folder)
        with self._account() as change:
            for each in self._caches():
                remove_leftovers(each)
            change(self._count(), new=True)

    def read(self, site: Site, block: int, out: memoryview, offset: int, size: int, fetch: Callable[[], memoryview]) -> bool:
        """Fill `out` from byte `offset` of a block of `size` bytes; False where there is no copy and no room for one.

        `fetch` reads a block that has no copy yet, whole and checked; its exceptions are passed on.
        """
        path = self._folder / f"{site.key}-{block}"
        if (complete := _read(path, out, offset)) is not None:
            return complete
        if self._full:
            return False
        with locked(self._locks / str(crc32(path.name.encode()) % _LOCKS), make=True):
            if (complete := _read(path, out, offset)) is not None:
                return complete
            reserved = self._reserve(path, size)
            if reserved is None:
                return False
            try:
                data = fetch()
                out[:] = data[offset : offset + len(out)]
                self._write(reserved, data)
                place(reserved, path)
            except BaseException as error:
                self._remove(reserved)
                discard(reserved)
                if not isinstance(error, OSError):
                    raise
                self._stop(f"cannot write: {error.strerror}")  # `out` is filled all the same
        return True

    def drop(self, site: Site, block: int) -> None:
        """Remove the copy of a block, because it is damaged or the block was repaired since."""
        self._remove(self._folder / f"{site.key}-{block}")

    def _reserve(self, path: Path, size: int) -> Path | None:
        """An allocated temporary file of `size` bytes; None where it does not fit."""
        with self._account() as change:
            if not change(size):
                self._stop("full")
                return None
            reserved = None
            try:
                reserved = temporary(path)
                with reserved.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if reserved is not None:
                    discard(reserved)
                change(-size)
                self._stop(f"cannot write: {error.strerror}")
                return None
        return reserved

    def _remove(self, path: Path) -> None:
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

    def _write(self, path: Path, data: memoryview) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _account(self) -> "Iterator[Callable[..., bool]]":
        """Lock the count of used bytes and give a function that changes it, or returns False where it would pass the size."""
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
        """Bytes of the copies of all caches, those that are being written included."""
        return sum(entry.stat().st_size for folder in self._caches() for entry in os.scandir(folder))

    def _caches(self) -> list[Path]:
        """The folders of copies: a disk's root has others, such as lost+found, which are not ours to look into or to count."""
        named = (each for each in self._config.folder.iterdir() if _CACHE.fullmatch(each.name))
        return [each for each in named if each.is_dir() and not each.is_symlink()]


def _read(path: Path, out: memoryview, offset: int) -> bool | None:
    """Whether a copy filled `out`; None where there is no copy."""
    try:
        return read_file(path, out, offset) == len(out)
    except FileNotFoundError:
        return None
    except OSError:
        return False
