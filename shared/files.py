"""Files that survive a crash, written whole or not at all; large ones past the page cache, straight from and to memory.

Direct input and output (O_DIRECT) costs 4 % of a core where buffered costs 90 to 140 %, and evicts nothing. On 2 cores it
wrote 2.4 GB/s durably where buffered writes of the same files gave 0.6 to 2.0; the size of a call and the number of threads
made no difference to that, nor did fallocate. Reading wants many threads at a time: sixteen reached 1.74 GB/s where eight
reached 1.51 and eight through the page cache 1.76. It wants whole pages in memory and in the file: `page_aligned` gives such
memory, the rest of a file goes the buffered way, and so does everything where the file system refuses.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import mmap
import os
import re
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

PAGE = mmap.PAGESIZE
UNKNOWN_FREE = 1 << 62  # bytes: what `free_bytes` says where the file system does not
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 on systems that have no such thing, where everything is buffered
_NO_DIR_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINK = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9-]*)\.(\d+)\.(\d+)\.\d+\.tmp", re.DOTALL)
_numbers = itertools.count()

moved: Counter[str] = Counter()  # bytes that this process has read and written, "direct" and "buffered": did it work?
_moved_lock = threading.Lock()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system met while writing `path`, as one line: a disk that is full is no bug."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; put that right (room, permission) and run the same command again"
        ) from error


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, and prove that files can be made in it; the proof has no name. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder or fix its permissions") from None
    return path


def page_aligned(*shape: int) -> Tensor:
    """Zeros, float16, in host memory that direct reads and writes accept: torch aligns its own to 64 bytes only."""
    # private: Python's default is shared memory, which gets no huge pages on most systems
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer, longer pieces for the disk: 2.4 GB/s instead of 1.5 to 2.2
    return torch.frombuffer(memory, dtype=torch.float16).view(shape)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write and fsync; the content is durable on return, its directory entry after `sync_dir`. Raises UserError."""
    with writing(path):
        _write(path, data)


def _write(path: Path, data: bytes | memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write to an open file and fsync it."""
    view = memoryview(data).cast("B")
    direct = _in_pages(view) and _set_direct(fd, True)
    if _move_all(fd, view, lambda part, done: os.write(fd, part), direct) < len(view):
        raise OSError(errno.EIO, "the file system took no more bytes")
    os.fsync(fd)


def read_file(path: Path, out: memoryview, offset: int = 0) -> int:
    """Fill `out` from byte `offset` of a file on; how many bytes there were, fewer than asked for if the file is shorter.

    Three calls of the system where it goes past the page cache: between any two of them a thread may have to wait for the
    interpreter's lock, and many threads read at a time.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    direct = offset % PAGE == 0 and _in_pages(out)
    try:
        fd = os.open(path, flags | _DIRECT if direct else flags)
    except OSError:  # a file system in a user's program (FUSE) refuses the flag in its own words; any other reason comes again
        if not direct:
            raise
        direct, fd = False, os.open(path, flags)
    try:
        return _move_all(fd, out, lambda part, done: os.preadv(fd, [part], offset + done), direct)
    finally:
        os.close(fd)


def _in_pages(view: memoryview) -> bool:
    """Whether it begins where a page does and has a whole one, which can go past the page cache."""
    return bool(_DIRECT) and len(view) >= PAGE and np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0


def _move_all(fd: int, view: memoryview, move: Callable[[memoryview, int], int], direct: bool) -> int:
    """Move bytes between memory and file until `view` or the file ends: `move` takes what is left, and what is done already.
    With `direct` the page cache is off for this file, and whole pages go past it as long as they can."""
    done, whole, past_cache = 0, len(view) // PAGE * PAGE, 0
    while done < len(view):
        if direct and (done == whole or done % PAGE):
            direct = _set_direct(fd, False)
        try:
            n = move(view[done : whole if direct else None], done)
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            # larger blocks than our pages, a network that takes none, or memory of a device's driver
            direct = _set_direct(fd, False)
            continue
        if n == 0:
            break
        done += n
        past_cache += n if direct else 0
    with _moved_lock:
        moved.update(direct=past_cache, buffered=done - past_cache)
    return done


def _set_direct(fd: int, direct: bool) -> bool:
    """Turn the page cache off or on for an open file; whether it is off now."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if direct else flags)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        return False
    return direct


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable, where the file system knows of such a thing and we may look into the folder."""
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIR_SYNC:  # a network or FUSE file system that refuses has its own order of things
            raise
    finally:
        if fd is not None:
            os.close(fd)


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses, and that says whose it is."""
    pid = os.getpid()
    return path.with_name(f".{path.name}.{_HOST}.{pid}.{_started(pid)}.{next(_numbers)}.tmp")


def _started(pid: int) -> int | None:
    """When a process of this host began, in ticks since the boot; 0 where the system does not say; None if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return 0


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of processes of this host that are gone; what others made, or make, stays."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name) if name.endswith(".tmp") else None
        if match and match[1] == _HOST and _started(int(match[2])) != int(match[3]):
            with contextlib.suppress(OSError):
                remove(folder / name)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path`, durable, when it is whole; after an error nothing is left of it.

    Raises UserError where the system cannot write.
    """
    with _taking_place(path) as mine:
        yield mine
        with mine.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _taking_place(path: Path) -> Iterator[Path]:
    """As `replacing`, for content that whoever writes it makes durable."""
    mine = temporary(path)
    with writing(path):
        try:
            yield mine
            os.replace(mine, path)
        except BaseException:
            mine.unlink(missing_ok=True)
            raise
        sync_dir(path.parent)


def publish_file(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data` atomically and durably: a reader sees the old content or the new, never a part."""
    with _taking_place(path) as mine:
        _write(mine, data)


def stage_file(path: Path, data: bytes | memoryview) -> Path:
    """The first half of `publish_file`: the content, durable, beside the place where `os.replace` brings it."""
    mine = temporary(path)
    with writing(path):
        try:
            _write(mine, data)
        except BaseException:
            mine.unlink(missing_ok=True)
            raise
    return mine


@contextlib.contextmanager
def locked(path: Path, *, make: bool = False) -> Iterator[None]:
    """Alone among all who lock the same folder or file (`make` it if need be); the lock goes with the process.

    Not every file system has such a thing: without it, duplicate work may end as damage that is noticed.
    """
    fd, more = None, os.O_CREAT if make else 0
    try:
        with contextlib.suppress(OSError):
            # a network's file system locks files only for those who may write
            fd = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if path.is_dir() else os.O_RDWR | more), 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if fd is not None:
            os.close(fd)


@contextlib.contextmanager
def owned(path: Path) -> Iterator[str]:
    """Gives "" to the one process that owns this file, which is made for that, and to others at once who that is.

    An owner removes its file before it lets go: then whoever waited at that file finds another in its place, or none. The
    system lets go when a process ends anyhow; on a file system without locks nobody is kept out.
    """
    if (fd := _own(path)) is None:
        owner = ""
        with contextlib.suppress(OSError):
            owner = path.read_text()
        yield owner or "another process"
        return
    try:
        yield ""
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _own(path: Path) -> int | None:
    """The descriptor of the file, locked; None if another process has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the folder has just gone with its last owner
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return fd
        os.close(fd)


def publish_json(path: Path, value: Any) -> None:
    publish_file(path, (json.dumps(value, indent=1) + "\n").encode())


def create_file(path: Path, data: bytes) -> bool:
    """Like `publish_file`, but only where there is no file yet: of several processes at once, one creates it. Who did?"""
    mine = temporary(path)
    with writing(path):
        try:
            _write(mine, data)
            created = _link(mine, path)
        finally:
            mine.unlink(missing_ok=True)
        sync_dir(path.parent)
    return created


def _link(mine: Path, path: Path) -> bool:
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        if path.exists():  # a file system without hard links; what is created at once has the same content in this project
            return False
        os.replace(mine, path)
    return True


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free space for this user at `path`, or at its nearest existing parent; UNKNOWN_FREE where it is not said."""
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else UNKNOWN_FREE
