"""Files that survive a crash: written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from shared.cli import UserError


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


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write and fsync; the content is durable on return, its directory entry after `sync_dir`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
