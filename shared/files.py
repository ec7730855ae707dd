"""Files that survive a crash, written whole or not at all; large ones past the page cache, straight from and to memory.

Direct input and output (O_DIRECT) takes little of the processor, evicts nothing, and is as fast or faster
(docs/findings/disk.md). It needs whole pages in memory and in the file: `page_aligned` gives such memory. What does not fill a
page goes through the page cache, and so does everything where the file system refuses.
"""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
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

from residual_saes.shared.errors import UserError
from residual_saes.shared.temporaries import discard, place, temporary

PAGE = mmap.PAGESIZE
UNKNOWN_FREE = 1 << 62  # bytes: the result of `free_bytes` where the file system does not say
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has no such flag, and everything is buffered
_NO_DIR_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINK = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
moved: Counter[str] = Counter()  # bytes that this process has read and written, "direct" and "buffered"
_moved_lock = threading.Lock()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing `path` into a UserError: a full disk is no bug."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; put that right (room, permission) and run the same command again"
        ) from error


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, and prove with a nameless file that it can be written to. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder or fix its permissions") from None
    return path


def page_aligned(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros in host memory that begins on a page, as direct reads and writes need; torch aligns to 64 bytes only."""
    # private: Python's default is shared memory, which gets no huge pages on most systems
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)  # the disk gets fewer, longer pieces
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write and fsync a file; its content is durable on return, its name after `sync_dir`. Raises UserError, for a link too."""
    refuse_links(path)
    with writing(path):
        _write(path, data)


def _write(path: Path, data: bytes | memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write to an open file and fsync it."""
    view = memoryview(data).cast("B")
    direct = _in_pages(view) and _set_direct(fd, True)
    _put_all(fd, view, direct)
    os.fsync(fd)


def _put_all(fd: int, view: memoryview, direct: bool) -> None:
    if _move_all(fd, view, lambda part, done: os.write(fd, part), direct) < len(view):
        raise OSError(errno.EIO, "the file system took no more bytes")


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, whole or not at all: after an error the file ends where it did. Raises UserError.

    Half a line that a kill left at the end is removed first, lest this one be glued to it.
    """
    with writing(path):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            end = _cut_half_line(fd)
            try:
                _put_all(fd, memoryview(line + b"\n"), False)
            except BaseException:
                os.ftruncate(fd, end)
                raise
        finally:
            os.close(fd)


def _cut_half_line(fd: int) -> int:
    """Cut an open file after its last whole line; gives its size then."""
    size = end = os.fstat(fd).st_size
    while end and os.pread(fd, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(fd, end)
    return end


def read_if_there(path: Path) -> bytes | None:
    """A small file whole, None where there is none. Raises UserError where it cannot be read, which is no sign of that."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put that right and run again") from None


def read_file(path: Path, out: memoryview, offset: int = 0) -> int:
    """Fill `out` from byte `offset` of a file; return the bytes read, fewer where the file ends. Raises OSError.

    A direct read takes three system calls: between any two a thread may have to wait for the interpreter's lock, and many
    threads read at a time.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    direct = offset % PAGE == 0 and _in_pages(out)
    try:
        fd = os.open(path, flags | _DIRECT if direct else flags)
    except OSError:  # a file system in user space (FUSE) has its own error for the flag; any other error comes again
        if not direct:
            raise
        direct, fd = False, os.open(path, flags)
    try:
        return _move_all(fd, out, lambda part, done: os.preadv(fd, [part], offset + done), direct)
    finally:
        os.close(fd)


def _in_pages(view: memoryview) -> bool:
    """Whether memory begins on a page and holds a whole one, which can go past the page cache."""
    return bool(_DIRECT) and len(view) >= PAGE and np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0


def _move_all(fd: int, view: memoryview, move: Callable[[memoryview, int], int], direct: bool) -> int:
    """Move bytes between memory and file until `view` or the file ends; return their number.

    `move` takes the rest of `view` and the bytes moved before, and returns the bytes it moved. With `direct` the page cache is
    off for this file, and whole pages go past it for as long as they can.
    """
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
    """Turn the page cache off or on for an open file; return whether it is off now."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if direct else flags)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        return False
    return direct


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable, where the file system can and we may read the folder."""
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIR_SYNC:  # network and FUSE file systems that refuse keep names durable in their own way
            raise
    finally:
        if fd is not None:
            os.close(fd)


def refuse_links(*paths: Path) -> None:
    """Raises UserError for a link: in a folder from somebody else it may point at any file of ours."""
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is left alone: put the thing itself in its place")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write, which then replaces `path`, durable; after an error it is removed. Raises UserError."""
    with _taking_place(path) as new:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _taking_place(path: Path) -> Iterator[Path]:
    """`replacing` for a writer that makes the content durable."""
    with writing(path):
        new = temporary(path)
        try:
            yield new
            place(new, path)
        finally:
            discard(new)
        sync_dir(path.parent)


def publish_file(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data` atomically and durably: a reader sees the old content or the new, never a part."""
    with _taking_place(path) as new:
        _write(new, data)


def publish_text(path: Path, text: str) -> None:
    """`publish_file` in UTF-8; a byte of a name that is no character is written as its number."""
    publish_file(path, text.encode("utf-8", "backslashreplace"))


def stage_file(path: Path, data: bytes | memoryview) -> Path:
    """Write the temporary file of `publish_file`, durable, for `place` or `discard`."""
    with writing(path):
        new = temporary(path)
        try:
            _write(new, data)
        except BaseException:
            discard(new)
            raise
    return new


@contextlib.contextmanager
def locked(path: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the lock of a folder or file (with `make` created where it is missing); the system drops it with the process.

    On a file system without locks nobody waits, and duplicate work may end as damage that is noticed.
    """
    fd, create = None, os.O_CREAT | os.O_NOFOLLOW if make else 0
    try:
        with contextlib.suppress(OSError):
            # network file systems lock only files that are open for writing
            fd = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if path.is_dir() else os.O_RDWR | create), 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if fd is not None:
            os.close(fd)


@contextlib.contextmanager
def owned(path: Path) -> Iterator[str]:
    """Own a lock file: yields "" to the process that owns it, and at once the owner's name to any other.

    An owner removes the file before it drops the lock, so that a process which opened the same file meanwhile finds another in
    its place, or none. The system drops the lock with the process; on a file system without locks nobody is kept out.
    """
    if (fd := _own(path)) is None:
        owner = ""
        with contextlib.suppress(OSError):
            owner = path.read_text(encoding="utf-8", errors="replace")
        yield owner or "another process"
        return
    try:
        yield ""
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _own(path: Path) -> int | None:
    """The descriptor of the locked file; None if another process holds the lock. Raises UserError for a link."""
    while True:
        refuse_links(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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
    """`publish_file` where there is no file yet; of several processes at once one creates it. Returns whether this one did."""
    new = stage_file(path, data)
    with writing(path):
        try:
            created = _link(new, path)
        finally:
            discard(new)
        sync_dir(path.parent)
    return created


def _link(new: Path, path: Path) -> bool:
    """Give a file the name `path` as well, unless that is taken; return whether it was free."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        if path.exists():  # no hard links: two processes that create at once do so with the same content in this project
            return False
        os.replace(new, path)
    return True


def existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes free for this user at `path`, or at its nearest existing parent; UNKNOWN_FREE where the system does not say."""
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else UNKNOWN_FREE
