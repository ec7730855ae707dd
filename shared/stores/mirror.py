"""A local folder that mirrors runs in a bucket while they are trained.

Training reads and writes the folder. Objects of the bucket are fetched first, and win over a local file of the same name; files
are sent once they are durable here, in the order in which they were written. Every upload is conditional on the e-tag that this
process saw last: a process whose run was taken over by another meanwhile, and perhaps finished, is refused with its first file,
changes nothing, and stops.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import replacing
from residual_saes.shared.progress import Progress
from residual_saes.shared.stores.location import Bucket, Location

_LOCAL = Path("data") / "s3"


def local(place: Location) -> Path:
    """The local folder of a location: itself, or data/s3/<bucket>/<prefix> below the working folder."""
    return place if isinstance(place, Path) else _LOCAL / place.name / place.prefix


def fetched(place: Location) -> Path:
    """The local folder of a location, with all objects but resume points fetched: for commands that only read runs."""
    if isinstance(place, Bucket):
        Mirror(place).pull("", lambda key: "/state/" not in f"/{key}")
    return local(place)


class Mirror:
    """The bucket's side and the folder's. Every method raises UserError where the bucket fails."""

    def __init__(self, bucket: Bucket) -> None:
        from residual_saes.shared.stores.s3 import S3  # here, because its package is an extra

        self.bucket, self.folder = bucket, local(bucket)
        self._store = S3(bucket)
        self._seen: dict[str, str] = {}  # {key: e-tag of the object that this process fetched or sent last}

    def prepare(self) -> None:
        """Find out, before training, that files can be sent."""
        self._store.prepare()

    def pull(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> None:
        """Fetch the wanted objects under a prefix whose files differ. Files without an object stay."""
        objects = {key: facts for key, facts in self._store.objects(prefix).items() if wanted(key)}
        self._seen |= {key: tag for key, (_, tag) in objects.items()}
        due = {key: size for key, (size, tag) in objects.items() if not _same(self.folder / key, size, tag)}
        if not due:
            return
        with Progress(f"fetching {self.bucket / prefix}", sum(due.values()), "bytes") as progress:
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
                f"{self.bucket / key} changed while it was read: another process writes it; run the same command again"
            ) from None
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / key) as temporary:
            temporary.write_bytes(data)

    def settle(self, path: Path) -> None:
        """Send a file that several processes may make at once; all but the first one fetch that one's."""
        key = self._key(path)
        if key not in self._seen and self._store.put_if(key, path.read_bytes(), None) is None:
            self.pull(key.rpartition("/")[0], lambda each: each == key)

    def push(self, path: Path) -> None:
        """Send a file, or delete the object of a file that is gone. Raises UserError if another process has written it."""
        key = self._key(path)
        if not path.exists():
            self._store.delete(key)
            self._seen.pop(key, None)
            return
        data = path.read_bytes()
        tag = self._store.put_if(key, data, self._seen.get(key))
        if tag is None:
            facts = self._store.objects(key.rpartition("/")[0]).get(key)
            if facts is None or not _same(path, *facts):  # it is the same where the answer to an earlier attempt was lost
                raise UserError(
                    f"{self.bucket / key} was written by another process since this one read it, so this one stops and leaves "
                    "all as it is there; run the same command again to go on from that"
                )
            tag = facts[1]
        self._seen[key] = tag

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _same(path: Path, size: int, tag: str) -> bool:
    """Whether a file equals an object, by the e-tag, which is mostly the MD5 of the content; where it is not, they differ."""
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag.strip('"')
    except OSError:
        return False
