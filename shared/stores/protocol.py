"""What a cache asks of the place where it lies: operations on keys such as "ledger/0-5/00000003.json".

Everything that a cache does to a disk or a bucket goes through a Store. Data are durable when a method returns, and an object
is there as a whole or not at all.

Large objects are staged first, and placed when all that belong together are staged. In a folder an object is staged under a
temporary name, and placed by a move, under a lock. A bucket has neither moves nor locks, so there an object is created where
there is none and never changed: the second of two writers copies the bytes of the first, and records those.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

from residual_saes.shared.errors import UserError
from residual_saes.shared.stores.location import Location

Staged: TypeAlias = Path | None  # the temporary file of a staged object; None where it lies in its place already


class Store(Protocol):
    """Objects by key. Every method may raise UserError where the place fails."""

    @property
    def root(self) -> Location: ...

    def prepare(self) -> None:
        """Find out, before hours of work, that objects can be written here."""

    def path(self, key: str) -> Location:
        """The location of a key, for messages."""

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        """Fill `out` from byte `offset` of an object; return the bytes read, fewer at its end. Raises FileNotFoundError and
        other OSErrors."""

    def get(self, key: str) -> bytes:
        """Read a small object whole. Raises FileNotFoundError and other OSErrors."""

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, over the one that is there."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object where there is none; False if there is one."""

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        """Write over an object whose content is still `seen`; False if it has changed."""

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        """Write a large object, durable, so that `place` can put it in its place or `drop` can remove it.

        Where objects are only ever created, one that another process of the same `owner` has created is copied into `data`;
        with `replace` it is written over.
        """

    def place(self, staged: dict[str, Staged]) -> None:
        """Put staged objects, by key, in their places."""

    def drop(self, staged: Iterable[Staged]) -> None:
        """Remove staged objects that are not to be placed."""

    def locked(self, key: str) -> AbstractContextManager[None]:
        """Hold the lock of a key, where the place has locks."""

    def list(self, prefix: str) -> list[str]:
        """List the names directly under a prefix, sorted; [] where there is no object."""

    def has(self, key: str) -> bool:
        """Whether there is an object."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def delete_all(self, prefix: str) -> None:
        """Remove all objects under a prefix."""

    def free(self) -> int:
        """Free bytes; UNKNOWN_FREE where the place does not say."""

    def leftovers(self, prefix: str) -> Sequence[int]:
        """The bytes of each object that is half-written under a prefix, by a process at work or one that was killed."""

    def remove_leftovers(self, prefix: str) -> None:
        """Remove what killed processes left half-written under a prefix."""


def get_or_none(store: Store, key: str) -> bytes | None:
    """A small object whole; None where there is none. Raises UserError where it cannot be read."""
    try:
        return store.get(key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {store.path(key)}: {error.strerror}; put that right and run again") from None


def local_path(store: Store, key: str) -> Path:
    """The file of a key in a store that is a folder."""
    path = store.path(key)
    assert isinstance(path, Path)
    return path
