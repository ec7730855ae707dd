"""A log of file operations (fault.c) → the folder as a power cut between two of them may leave it.

What POSIX promises, and no more: bytes are there after fsync of their file, a name (made, moved, taken away) after fsync of
the folder that it is in. Of the many states that this allows, two ends:

    kept    every name arrived, no byte that was not synced did: new or truncated files are empty
    lost    no name that was not synced arrived, nor any byte: files are missing, or what they were
"""

import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_HEAD = struct.Struct("<7q")
_O_CREAT, _O_TRUNC = 0o100, 0o1000
WRITES = "W"
NEEDS_ROOM = "CWMRLYTS"  # as in fault.c


@dataclass(kw_only=True, frozen=True, slots=True)
class Operation:
    kind: str  # C created or opened so, O opened to write, W, S fsync, T truncate, R rename, L link, Y symlink, U unlink, M, D
    ok: bool
    inode: int
    number: int
    path: str  # relative to the root
    other: str
    data: bytes

    def __str__(self) -> str:
        names = {"C": "create", "O": "open", "W": "write", "S": "fsync", "T": "truncate", "R": "rename", "L": "link",
                 "Y": "symlink", "U": "unlink", "M": "mkdir", "D": "rmdir"}  # fmt: skip
        return f"{names[self.kind]} {self.path or '.'}" + (f" → {self.other}" if self.other else "")


def read_log(path: Path, root: Path) -> list[Operation]:
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw):
        kind, ok, inode, number, *sizes = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        parts = []
        for size in sizes:
            parts.append(raw[at : at + size])
            at += size
        first, second = (part.decode().removeprefix(str(root)).lstrip("/") for part in parts[:2])
        found.append(
            Operation(kind=chr(kind), ok=bool(ok), inode=inode, number=number, path=first, other=second, data=parts[2])
        )
    return found


class _File:
    """What is in it now, and what is on the disk: None before the first fsync."""

    def __init__(self, data: bytes = b"", synced: bytes | None = None) -> None:
        self.data, self.synced = bytearray(data), synced
        self.truncated = synced is None

    def sync(self) -> None:
        self.synced, self.truncated = bytes(self.data), False

    def resize(self, size: int) -> None:
        self.truncated |= size < len(self.data)
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))

    def after(self, variant: str) -> bytes:
        if variant == "all":
            return bytes(self.data)
        return b"" if self.synced is None or (variant == "kept" and self.truncated) else self.synced


_Node = _File | None  # None is a folder
_Move = tuple[str, str, _Node, bool]  # from (may be ""), to (may be ""), what, whether it stays where it was


class Disk:
    """The names and files under a root, and those of them that would survive."""

    def __init__(self, start: Path) -> None:
        self._names: dict[str, _Node] = {}
        for path in sorted(start.rglob("*")):
            data = None if path.is_dir() else path.read_bytes()
            self._names[str(path.relative_to(start))] = None if data is None else _File(data, data)
        self._synced = dict(self._names)
        self._pending: list[_Move] = []
        self._inodes: dict[int, _File] = {}

    def apply(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            if operation.ok and not operation.path.endswith(" (deleted)"):
                self._apply(operation)

    def _apply(self, o: Operation) -> None:
        if o.kind in "WSTR":
            self._notice_rename(o)
        if o.kind in "CO":
            if o.path not in self._names:
                self._move("", o.path, _File())
            file = self._file(o)
            if o.number & _O_TRUNC:
                file.truncated, file.data = True, bytearray()
        elif o.kind == "W":
            file, end = self._file(o), o.number + len(o.data)
            file.resize(max(end, len(file.data)))
            file.data[o.number : end] = o.data
        elif o.kind == "T":
            self._file(o).resize(o.number)
        elif o.kind == "S":
            self._sync(o)
        elif o.kind == "R":
            self._move(o.path, o.other, self._names[o.path])
        elif o.kind == "L":
            self._move(o.path, o.other, self._names[o.path], stays=True)
        elif o.kind == "M":
            self._move("", o.path, None)
        elif o.kind in "UD":
            self._move(o.path, "", self._names[o.path])
        else:
            raise NotImplementedError(str(o))

    def _file(self, o: Operation) -> _File:
        file = self._names[o.path]
        assert file is not None
        self._inodes[o.inode] = file
        return file

    def _notice_rename(self, o: Operation) -> None:
        """A file that is met under a name it was not known by was moved by a call that nobody saw."""
        file = self._inodes.get(o.inode)
        if file is not None and self._names.get(o.path) is not file:
            for name in [name for name, node in self._names.items() if node is file]:  # none: the inode was used again
                self._move(name, o.path, file)

    def _move(self, source: str, target: str, node: _Node, *, stays: bool = False) -> None:
        self._pending.append((source, target, node, stays))
        _move(self._names, self._pending[-1])

    def _sync(self, o: Operation) -> None:
        if o.path and self._names[o.path] is not None:
            self._file(o).sync()
            return
        waiting = []
        for move in self._pending:
            if o.path in [parent(name) for name in move[:2] if name]:
                _move(self._synced, move)
            else:
                waiting.append(move)
        self._pending = waiting

    def after(self, variant: str) -> dict[str, bytes | None]:
        """{path: bytes, or None for a folder}: "kept" or "lost" after a power cut, "all" if there was none."""
        names = self._synced if variant == "lost" else self._names
        there: dict[str, bytes | None] = {}
        for name in sorted(names):
            if not parent(name) or parent(name) in there:
                node = names[name]
                there[name] = None if node is None else node.after(variant)
        return there


def parent(name: str) -> str:
    return name.rpartition("/")[0]


def _move(names: dict[str, _Node], move: _Move) -> None:
    source, target, node, stays = move
    below = [name for name in names if name.startswith(f"{source}/")] if source and target and not stays else []
    inside = {target + name[len(source) :]: names.pop(name) for name in below}
    if source and not stays and names.get(source, False) is node:
        del names[source]
    if target:
        names[target] = node
    names.update(inside)


def write_tree(there: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder hold this; files that do already keep their times."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if path.is_dir():
            if there.get(name, b"") is not None:
                shutil.rmtree(path)
        elif there.get(name) is None:
            path.unlink()
    for name, data in there.items():
        path = folder / name
        if data is None:
            path.mkdir(exist_ok=True)
        elif not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def read_tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}
