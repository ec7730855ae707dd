"""Files that survive a crash, written whole or not at all; large ones past the page cache, straight from and to memory.

Direct input and output (O_DIRECT) costs 4 % of a core where buffered costs 90 to 140 %, and evicts nothing. On 2 cores it
wrote 2.4 GB/s durably where buffered writes of the same files gave 0.6 to 2.0; the size of a call and the number of threads
made no difference to that, nor did fallocate. Reading wants many calls at a time: sixteen threads at 512 KiB a call reached
1.74 GB/s where eight at 1 MiB reached 1.51 and eight through the page cache 1.76. It wants whole pages in memory and in the
file: `page_aligned` gives such memory, the rest of a file goes the buffered way, and so does everything where the file system
refuses.
"""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cli import UserError

PAGE = mmap.PAGESIZE
_READ_CALL = 512 << 10  # bytes
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 on systems that have no such thing, where everything is buffered

moved: Counter[str] = Counter()  # bytes that this process has read and written, "direct" and "buffered": did it work?
_moved_lock = threading.Lock()


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, and prove that files can be made in it. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
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
    """Write and fsync; the content is durable on return, its directory entry after `sync_dir`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _move_all(fd, memoryview(data).cast("B"), os.write)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: Path, out: memoryview) -> int:
    """Fill `out` from the start of a file; how many bytes there were, fewer than asked for if the file is shorter."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _move_all(fd, out, lambda fd, part: os.readv(fd, [part[:_READ_CALL]]))
    finally:
        os.close(fd)


def _move_all(fd: int, view: memoryview, move: Callable[[int, memoryview], int]) -> int:
    """Move bytes between memory and file until `view` or the file ends; whole pages go past the page cache if they can."""
    done, whole, past_cache = 0, len(view) // PAGE * PAGE, 0
    direct = bool(_DIRECT and whole) and np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0 and _set_direct(fd, True)
    while done < len(view):
        if direct and (done == whole or done % PAGE):
            direct = _set_direct(fd, False)
        try:
            n = move(fd, view[done : whole if direct else None])
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
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path`, durable, when it is whole; after an error nothing is left of it."""
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def publish_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_file(temporary, data)
    os.replace(temporary, path)
    sync_dir(path.parent)


def publish_json(path: Path, value: Any) -> None:
    publish_file(path, (json.dumps(value, indent=1) + "\n").encode())


def free_bytes(path: Path) -> int:
    """Free space for this user at `path`, or at its nearest existing parent."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
