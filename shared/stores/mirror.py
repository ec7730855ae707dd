"""A folder of this machine and a place in a bucket that is to hold the same: runs, while they are trained.

Who works on the files reads and writes the folder. What lies in the bucket is fetched first, and counts where both have a file;
what is written is sent when it is durable here, in the order in which it was written. Every upload asks that the bucket's
object still be the one that was last seen from here (its e-tag): somebody who goes on with a run that another process has taken
over meanwhile, and perhaps finished, is refused with his first file, changes nothing, and stops.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from shared.errors import UserError
from shared.files import replacing
from shared.progress import Progress
from shared.stores.store import Bucket, Location

_LOCAL = Path("data") / "s3"


def local(place: Location) -> Path:
    """The folder that stands for a place: itself, or data/s3/<bucket>/<prefix> below the working folder."""
    return place if isinstance(place, Path) else _LOCAL / place.name / place.prefix


def fetched(place: Location, *, but: str = "/state/") -> Path:
    """The folder that stands for a place, with all that lies there fetched, for whoever only reads; not what `but` names."""
    if isinstance(place, Bucket):
        Mirror(place).pull("", lambda key: but not in f"/{key}")
    return local(place)


class Mirror:
    """Raises UserError, as all its methods do, where the bucket fails."""

    def __init__(self, there: Bucket) -> None:
        from shared.stores.s3 import S3  # here, because its package is an extra

        self.there, self.here = there, local(there)
        self._store = S3(there)
        self._seen: dict[str, str] = {}  # {key: the e-tag of the object that this process has fetched or sent}

    def prepare(self) -> None:
        """Find out, before anything is trained, that something can be sent."""
        self._store.prepare()

    def pull(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> None:
        """Fetch what is wanted and lies under a prefix, where it is not here already. What is here alone stays."""
        found = {key: at for key, at in self._store.objects(prefix).items() if wanted(key)}
        self._seen |= {key: tag for key, (_, tag) in found.items()}
        due = {key: size for key, (size, tag) in found.items() if not _same(self.here / key, size, tag)}
        if not due:
            return
        with Progress(f"fetching {self.there / prefix}", sum(due.values()), "bytes") as progress:
            for key, size in due.items():
                self._fetch(key, size)
                progress.advance(size)

    def _fetch(self, key: str, size: int) -> None:
        data = bytearray(size)
        try:
            if self._store.read(key, memoryview(data)) < size:
                raise FileNotFoundError
        except FileNotFoundError:
            raise UserError(
                f"{self.there / key} changed while it was read: another process writes it; run the same command again"
            ) from None
        (self.here / key).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.here / key) as temporary:
            temporary.write_bytes(data)

    def settle(self, path: Path) -> None:
        """For a file that several may make at once: the one that is in the bucket first is everybody's."""
        key = self._key(path)
        if key not in self._seen and self._store.put_if(key, path.read_bytes(), None) is None:
            self.pull(key.rpartition("/")[0], lambda each: each == key)

    def push(self, path: Path) -> None:
        """Send a file, or take away what is not here any more. Raises UserError if somebody else has been there since."""
        key = self._key(path)
        if not path.exists():
            self._store.delete(key)
            self._seen.pop(key, None)
            return
        data = path.read_bytes()
        tag = self._store.put_if(key, data, self._seen.get(key))
        if tag is None:
            at = self._store.objects(key.rpartition("/")[0]).get(key)
            if at is None or not _same(path, *at):  # it is the same if our own answer was lost
                raise UserError(
                    f"{self.there / key} was written by another process since this one read it, so this one stops and leaves "
                    "all as it is there; run the same command again to go on from that"
                )
            tag = at[1]
        self._seen[key] = tag

    def _key(self, path: Path) -> str:
        return path.relative_to(self.here).as_posix()


def _same(path: Path, size: int, tag: str) -> bool:
    """Whether a file is that object, whose e-tag is the MD5 of its content (if it is not, the file counts as another one)."""
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag.strip('"')
    except OSError:
        return False
