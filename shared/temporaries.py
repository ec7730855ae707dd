"""Files and folders under names of their own, until they are moved to their places; and what a kill leaves of them.

Whoever makes one holds its lock (`flock`), which the system drops with the process, so that any process that shares the file
system, in whatever container or on whatever host, can tell what is at work from what was left.
"""

import contextlib
import fcntl
import functools
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path
from zlib import crc32

_ABANDONED = 3600.0  # seconds
_TEMPORARY = re.compile(
    r"\..+\.(?:([0-9a-f]{8})\.[0-9a-f]{8}|[A-Za-z0-9-]*\.\d+\.\d+\.\d+)\.tmp", re.DOTALL
)  # the latter: once
_held: dict[Path, int] = {}  # {temporary file or folder of this process: its descriptor, which holds the lock}


def temporary(path: Path, *, folder: bool = False) -> Path:
    """Make an empty file or folder beside `path`, under a name that nobody else uses, and hold its lock until `place` or
    `discard`. Raises OSError."""
    while True:
        new = path.with_name(f".{path.name}.{_machine()}.{secrets.token_hex(4)}.tmp")
        if folder:
            new.mkdir()
        fd = os.open(new, os.O_CLOEXEC | (os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL), 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), new.stat()):  # nobody took it for a leftover before it was locked
                _held[new] = fd
                return new
        os.close(fd)


def place(new: Path, path: Path) -> None:
    """Move a temporary file or folder to its place."""
    try:
        os.replace(new, path)
    finally:
        _release(new)


def discard(new: Path) -> None:
    """Remove a temporary file or folder, if it has not been placed."""
    with contextlib.suppress(OSError):
        remove(new)
    _release(new)


def _release(new: Path) -> None:
    if (fd := _held.pop(new, None)) is not None:
        os.close(fd)


@functools.cache
def _machine() -> str:
    """This machine since it was started, eight hexadecimal digits: all containers on it are the same."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        name = socket.gethostname()
    return f"{crc32(name.encode()):08x}"


def leftovers(folder: Path) -> list[Path]:
    """The temporary files and folders in a folder, at work or left by a kill."""
    try:
        return [folder / name for name in os.listdir(folder) if name.endswith(".tmp") and _TEMPORARY.fullmatch(name)]
    except OSError:
        return []


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in a folder that a kill left.

    Nobody holds the lock of such a one, and it was made on this machine or is an hour old: some network file systems have locks
    that are known on one machine alone, or none.
    """
    for path in leftovers(folder):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # another is faster, or it is not ours to remove
            if _lock_is_free(path, stack) or time.time() - path.lstat().st_mtime > _ABANDONED:
                remove(path)


def _lock_is_free(path: Path, stack: contextlib.ExitStack) -> bool:
    """Whether it was made on this machine and nobody held its lock, which `stack` does now. Raises OSError if somebody does."""
    match = _TEMPORARY.fullmatch(path.name)
    try:
        fd = os.open(path, os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return match is not None and match[1] == _machine()


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not what it points at, if it exists."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
