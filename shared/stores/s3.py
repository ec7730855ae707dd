"""A store in an S3 bucket: the same keys as in a folder, and readable by any Zarr tool that reads S3.

Uploads, conditional PUT, LIST, DELETE and signing are obstore's. Bytes come back by presigned URL through http.client, straight
into the reader's memory: 0.77 core-seconds a gigabyte where obstore's GET takes 1.31 and a bare socket 0.64 (docs/stores.md).
Whatever fails in passing (no connection, a cut one, 5xx, a stall) is tried again, with growing pauses, for `PATIENCE`.

An object of a block is made where nothing is, and never changed: of two harvests that differ in a last bit one makes it, and
the other takes over what it finds (`stage`), so whoever writes the ledger entry speaks of the bytes that lie there. What is
found is believed only if its seal (in its metadata: of owner, key and content) is right: it may be of another cache, or torn.

Credentials come from where AWS tools have them, environment and files, and go nowhere: into no file and no message, and neither
do signed URLs. The errors of obstore and of servers are not passed on but put into words of our own.
"""

import configparser
import contextlib
import hashlib
import http.client
import os
import queue
import random
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np

from shared.errors import UserError
from shared.files import UNKNOWN_FREE
from shared.seal import canonical, crc32c
from shared.stop import stopping
from shared.stores.store import Bucket, Staged

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import S3Store
except ImportError:
    raise UserError("s3:// needs the obstore package: pip install obstore") from None

T = TypeVar("T")

PATIENCE = 300.0  # seconds for which something that fails in passing is tried again
FIRST = 4.0  # the same, as long as nobody has answered at all
LONGEST = 5.0  # seconds between two tries
STALL = 30.0  # seconds in which no byte arrives, after which a read is begun again
_UPLOAD = timedelta(minutes=5)  # for one object; obstore's default of 30 seconds is 2 MB/s at 64 MiB
_SIGNED_FOR = timedelta(minutes=15)
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_CREDENTIALS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired")
_FILES = {  # what we read of the files that AWS tools share, and the variables that go before them
    "aws_access_key_id": ("access_key_id", ("AWS_ACCESS_KEY_ID",)),
    "aws_secret_access_key": ("secret_access_key", ("AWS_ACCESS_KEY_ID",)),
    "aws_session_token": ("session_token", ("AWS_ACCESS_KEY_ID",)),
    "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
    "endpoint_url": ("endpoint", ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")),
}


class Answer(Exception):
    """A response that is none of those hoped for."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__(f"status code: {status}: {body.decode(errors='replace')}")


class S3:
    """A store under a prefix of a bucket."""

    def __init__(self, root: Bucket) -> None:
        self.root: Bucket | Path = root
        self._bucket = root.name
        config: Any = {"unsigned_payload": True, **_from_files()}
        self._insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        try:
            self._store = S3Store(
                root.name,
                prefix=root.prefix or None,
                config=config,
                client_options={"allow_http": self._insecure, "timeout": _UPLOAD, "connect_timeout": timedelta(seconds=10)},
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=10)},  # ours is the only one
            )
        except (BaseError, ValueError, TypeError):
            raise UserError(f"{root} cannot be opened: the AWS_* variables or ~/.aws hold something unusable") from None
        self._connections = _Connections()
        self._heard = False

    def prepare(self) -> None:
        """Also that the server heeds conditions: with one that does not, two harvests would spoil each other's blocks."""
        key = f"trial-{uuid.uuid4().hex}"
        self.write(key, b"")
        refused = not self.create(key, b"")
        self.delete(key)
        if not refused:
            raise UserError(
                f"the server of {self.root} ignores conditions (If-None-Match), so that two processes could spoil each other's "
                "work: use one that knows conditional writes"
            )

    def path(self, key: str) -> Bucket:
        assert isinstance(self.root, Bucket)
        return self.root / key

    # --- reading ---

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        asked = {"Range": f"bytes={offset}-{offset + len(out) - 1}"}

        def once() -> int:
            with self._answer(key, asked, (206, 416)) as response:
                if response.status == 416:  # nothing lies so far out
                    response.read()
                    return 0
                return _fill(out, response)

        return self._patiently("read", key, once) if len(out) else 0

    def get(self, key: str) -> bytes:
        return self._fetch(key)[0]

    def _fetch(self, key: str) -> tuple[bytes, dict[str, str]]:
        """All of an object, and its headers by names in small letters."""

        def once() -> tuple[bytes, dict[str, str]]:
            with self._answer(key, {}, (200,)) as response:
                return response.read(), {name.lower(): value for name, value in response.getheaders()}

        return self._patiently("read", key, once)

    @contextlib.contextmanager
    def _answer(self, key: str, headers: dict[str, str], hoped: tuple[int, ...]) -> Iterator[http.client.HTTPResponse]:
        """The response to a GET, whose body must be read to its end within."""
        url = urlsplit(obstore.sign(self._store, "GET", key, _SIGNED_FOR))
        if url.scheme != "https" and not self._insecure:
            raise http.client.HTTPException("BadScheme")  # obstore's word for it
        connection = self._connections.take(url)
        try:
            connection.request("GET", f"{url.path}?{url.query}", headers=headers)
            response = connection.getresponse()
            if response.status not in hoped:
                raise Answer(response.status, response.read(1 << 16))
            yield response
            if not response.isclosed():
                raise http.client.IncompleteRead(b"")
        except BaseException:
            connection.close()
            raise
        self._connections.give(connection)

    def has(self, key: str) -> bool:
        try:
            self._patiently("read", key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        found = self._patiently("list", prefix, lambda: obstore.list_with_delimiter(self._store, prefix or None))
        paths = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return sorted({path.rpartition("/")[2] for path in paths} - {""})  # some servers list the place itself

    def free(self) -> int:
        return UNKNOWN_FREE

    # --- writing ---

    def write(self, key: str, data: bytes | memoryview) -> None:
        if self._put(key, data, "overwrite") is None:
            raise UserError(f"cannot write {self.path(key)}: the server finds no place for it; put that right and run again")

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, data, "create") is not None

    def put_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Write where the object with this e-tag lies, or none; the new one's, or None where it is another's by now."""
        return self._put(key, data, {"e_tag": tag} if tag else "create")

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        try:
            there, headers = self._fetch(key)
        except FileNotFoundError:
            return False
        return there == seen and self.put_if(key, data, headers["etag"]) is not None

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        seal = _seal(owner, key, data)
        mode: Any = "overwrite" if replace else "create"
        while self._put(key, data, mode, seal) is None:
            mode = "create"
            with contextlib.suppress(FileNotFoundError):  # it went away again: the next round makes it
                theirs, headers = self._fetch(key)
                if len(theirs) == len(data) and headers.get("x-amz-meta-seal") == _seal(owner, key, theirs):
                    data[:] = theirs
                    break
                mode = {"e_tag": headers["etag"]}  # it belongs to nothing, and goes if nobody was faster
        return None

    def place(self, staged: dict[str, Staged]) -> None:
        """They are."""

    def drop(self, staged: Iterable[Staged]) -> None:
        """What lies there is right, and taken over by whoever makes that block."""

    def locked(self, key: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._patiently("delete", key, lambda: obstore.delete(self._store, key))

    def delete_all(self, prefix: str) -> None:
        while paths := self._patiently("list", prefix, partial(self._some, prefix)):
            self._patiently("delete", prefix, partial(obstore.delete, self._store, paths))

    def objects(self, prefix: str) -> dict[str, tuple[int, str]]:
        """{key: size and e-tag} of everything under a prefix."""

        def once() -> dict[str, tuple[int, str]]:
            parts = obstore.list(self._store, prefix or None)
            return {each["path"]: (each["size"], each["e_tag"] or "") for part in parts for each in part}

        return self._patiently("list", prefix, once)

    def _some(self, prefix: str) -> Sequence[str]:
        """A thousand keys under a prefix, or all there are."""
        return [each["path"] for each in next(iter(obstore.list(self._store, prefix, chunk_size=1000)), [])]

    def remove_leftovers(self, prefix: str) -> None:
        """A PUT leaves nothing half-written."""

    def _put(self, key: str, data: bytes | memoryview, mode: Any, seal: str = "") -> str | None:
        """The new e-tag; None if what is there is not what `mode` asks for, which after a lost answer may be `data` itself."""
        marks: Any = {"seal": seal} if seal else None
        try:
            made = self._patiently(
                "write",
                key,
                lambda: obstore.put(self._store, key, data, mode=mode, attributes=marks, use_multipart=False),
            )
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None
        return made["e_tag"] or ""

    # --- what fails ---

    def _patiently(self, doing: str, key: str, call: Callable[[], T]) -> T:
        """What `call` gives, tried again while it fails in passing. Raises FileNotFoundError, AlreadyExistsError and
        PreconditionError as they are, for they are answers, and UserError for all else."""
        began, pause = time.monotonic(), 0.0
        while True:
            try:
                result = call()
            except (AlreadyExistsError, PreconditionError):
                self._heard = True
                raise
            except (BaseError, OSError, http.client.HTTPException, Answer) as error:
                why, lasting = self._why(error)
                if not why:
                    self._heard = True
                    raise FileNotFoundError(2, "it is not there") from None
                end = began + (PATIENCE if self._heard else FIRST)
                if lasting or stopping() or time.monotonic() + pause > end:
                    raise UserError(
                        f"cannot {doing} {self.path(key)}: {why}; put that right and run the same command again"
                    ) from None
            else:
                self._heard = True
                return result
            time.sleep(pause * random.uniform(0.5, 1))  # at once first: a connection that was kept may just be too old
            pause = min(2 * pause or 0.1, LONGEST)

    def _why(self, error: Exception) -> tuple[str, bool]:
        """A failure in our words, and whether it lasts; '' for an object that is not there."""
        text = str(error)
        code = (re.findall(r"<Code>(\w+)</Code>", text) or [""])[0]
        status = int((re.findall(r"status code: (\d{3})", text) or ["0"])[0])
        said = code or f"status {status}"
        self._heard |= status > 0
        if code == "NoSuchBucket":
            return f"there is no bucket {self._bucket} at {self._where()}", True
        if status == 404 or (isinstance(error, FileNotFoundError) and not status):
            return "", True
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one of ~/.aws", True
        if "BadScheme" in text:
            return f"{self._where()} is not https, which is taken only where AWS_ALLOW_HTTP=true is set", True
        if code in _REGION or status in (301, 307, 308) or "configured region" in text:
            return f"the bucket is in another region ({said}): set AWS_REGION to its own", True
        if code in _CREDENTIALS or status in (401, 403):
            return (
                f"{self._where()} refuses our credentials ({said}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, and what they may do in this bucket",
                True,
            )
        if status:
            return f"{self._where()} answers with {said}", 400 <= status < 500 and status not in (408, 409, 425, 429)
        return f"no whole answer from {self._where()} (is the endpoint right, and the network up?)", False

    def _where(self) -> str:
        """The endpoint, less whatever else may stand in its URL."""
        try:
            url = urlsplit(obstore.sign(self._store, "GET", "x", _SIGNED_FOR))
        except (BaseError, ValueError):
            return "the endpoint"
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


class _Connections:
    """Open ones that nobody is using; at the end they are closed."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        weakref.finalize(self, _close_all, self._idle)

    def take(self, url: SplitResult) -> http.client.HTTPConnection:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        return kind(url.netloc.rpartition("@")[2], timeout=STALL)

    def give(self, connection: http.client.HTTPConnection) -> None:
        self._idle.put(connection)


def _close_all(idle: "queue.LifoQueue[http.client.HTTPConnection]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            idle.get_nowait().close()


def _fill(out: memoryview, response: http.client.HTTPResponse) -> int:
    """The whole body into `out`; how much it was. Raises HTTPException for one that ends early, or is too long."""
    size = int(response.headers.get("Content-Length", "-1"))
    if not 0 <= size <= len(out):
        raise http.client.HTTPException("a body of another length than was asked for")
    done = 0
    while done < size:
        n = response.readinto(out[done:size])
        if n == 0:
            raise http.client.IncompleteRead(b"", size - done)
        done += n
    return done


def _seal(owner: str, key: str, data: bytes | memoryview) -> str:
    """Of an object's content, its place and whose it is: eight hexadecimal digits."""
    said = canonical([owner, key, crc32c(np.frombuffer(data, np.uint8))])
    return hashlib.sha256(said).hexdigest()[:16]


def _from_files() -> dict[str, str]:
    """Credentials, region and endpoint from ~/.aws, as far as the environment does not say them; obstore reads that alone."""
    profile = os.environ.get("AWS_PROFILE", "default")
    config: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(os.path.expanduser(os.environ.get(variable) or usual), encoding="utf-8")
        found = dict(parser[section]) if parser.has_section(section) else {}
        for name, (field, instead) in _FILES.items():
            if name in found and not any(os.environ.get(each) for each in instead):
                config[field] = found[name]
    return config
