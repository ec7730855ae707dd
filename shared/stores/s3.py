"""A store in an S3 bucket: the same keys as in a folder, and readable by any Zarr tool that reads S3.

Uploads, conditional PUT, LIST, DELETE and signing are obstore's. Downloads go by presigned URL through http.client, straight
into the reader's memory, which takes less of the processor than obstore's GET (docs/stores.md). Transient failures (no
connection, a cut one, 5xx, a stall) are retried for `PATIENCE`, with growing pauses.

The object of a block is created where there is none, and never changed: of two harvests that differ in a last bit one creates
it, and the other copies its bytes (`stage`), so that both ledger entries are true of it. An object is copied only if its seal
(in its metadata: of owner, key and content) is right; one of another cache, or a torn one, is written over.

Credentials are read where AWS tools read them, environment and files. They are written into no file and no message, nor are
signed URLs: errors of obstore and of servers are put into words of our own.
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
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import UNKNOWN_FREE
from residual_saes.shared.seal import canonical, crc32c
from residual_saes.shared.stop import stopping
from residual_saes.shared.stores.location import Bucket
from residual_saes.shared.stores.protocol import Staged

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import S3Store
except ImportError:
    raise UserError("s3:// needs the obstore package: pip install obstore") from None

T = TypeVar("T")

PATIENCE = 300.0  # seconds for which transient failures are retried
FIRST = 4.0  # the same, until the first answer of the server
LONGEST = 5.0  # seconds between two attempts
STALL = 30.0  # seconds without a byte after which a read is begun again
_UPLOAD = timedelta(minutes=5)  # for one object; obstore's default of 30 seconds is 2 MB/s at 64 MiB
_SIGNED_FOR = timedelta(minutes=15)
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_CREDENTIALS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired")
_FILES = {  # keys of the files in ~/.aws, obstore's names for them, and the variables that override them
    "aws_access_key_id": ("access_key_id", ("AWS_ACCESS_KEY_ID",)),
    "aws_secret_access_key": ("secret_access_key", ("AWS_ACCESS_KEY_ID",)),
    "aws_session_token": ("session_token", ("AWS_ACCESS_KEY_ID",)),
    "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
    "endpoint_url": ("endpoint", ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")),
}


class Answer(Exception):
    """A response with an unexpected status."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__(f"status code: {status}: {body.decode(errors='replace')}")


class S3:
    """A store under a prefix of a bucket."""

    def __init__(self, root: Bucket) -> None:
        self.root = root
        self._bucket = root.name
        config: Any = {"unsigned_payload": True, **_from_files()}
        self._insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        try:
            self._store = S3Store(
                root.name,
                prefix=root.prefix or None,
                config=config,
                client_options={"allow_http": self._insecure, "timeout": _UPLOAD, "connect_timeout": timedelta(seconds=10)},
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=10)},  # `_patiently` retries
            )
        except (BaseError, ValueError, TypeError):
            raise UserError(f"{root} cannot be opened: the AWS_* variables or ~/.aws hold something unusable") from None
        self._connections = _Connections()
        self._heard = False

    def prepare(self) -> None:
        """Refuse a server that ignores conditions as well: on it two harvests would spoil each other's blocks."""
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
        return self.root / key

    # --- reading ---

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        headers = {"Range": f"bytes={offset}-{offset + len(out) - 1}"}

        def once() -> int:
            with self._answer(key, headers, (206, 416)) as response:
                if response.status == 416:  # the object ends before `offset`
                    response.read()
                    return 0
                return _fill(out, response)

        return self._patiently("read", key, once) if len(out) else 0

    def get(self, key: str) -> bytes:
        return self._fetch(key)[0]

    def _fetch(self, key: str) -> tuple[bytes, dict[str, str]]:
        """The content of an object, and its headers by lower-case name."""

        def once() -> tuple[bytes, dict[str, str]]:
            with self._answer(key, {}, (200,)) as response:
                return response.read(), {name.lower(): value for name, value in response.getheaders()}

        return self._patiently("read", key, once)

    @contextlib.contextmanager
    def _answer(self, key: str, headers: dict[str, str], expected: tuple[int, ...]) -> Iterator[http.client.HTTPResponse]:
        """The response to a GET; the body must be read to its end within the block."""
        url = urlsplit(obstore.sign(self._store, "GET", key, _SIGNED_FOR))
        if url.scheme != "https" and not self._insecure:
            raise http.client.HTTPException("BadScheme")  # obstore's word for it
        connection = self._connections.take(url)
        try:
            connection.request("GET", f"{url.path}?{url.query}", headers=headers)
            response = connection.getresponse()
            if response.status not in expected:
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
        listing = self._patiently("list", prefix, lambda: obstore.list_with_delimiter(self._store, prefix or None))
        paths = [*listing["common_prefixes"], *(each["path"] for each in listing["objects"])]
        return sorted({path.rpartition("/")[2] for path in paths} - {""})  # some servers list the prefix itself

    def free(self) -> int:
        return UNKNOWN_FREE

    # --- writing ---

    def write(self, key: str, data: bytes | memoryview) -> None:
        if self._put(key, data, "overwrite") is None:
            raise UserError(f"cannot write {self.path(key)}: the server finds no place for it; put that right and run again")

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, data, "create") is not None

    def put_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Write over the object with this e-tag, or where there is none; return the new e-tag, or None where the object has
        changed."""
        return self._put(key, data, {"e_tag": tag} if tag else "create")

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        try:
            content, headers = self._fetch(key)
        except FileNotFoundError:
            return False
        return content == seen and self.put_if(key, data, headers["etag"]) is not None

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        seal = _seal(owner, key, data)
        mode: Any = "overwrite" if replace else "create"
        while self._put(key, data, mode, seal) is None:
            mode = "create"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: the next round creates it
                stored, headers = self._fetch(key)
                if len(stored) == len(data) and headers.get("x-amz-meta-seal") == _seal(owner, key, stored):
                    data[:] = stored
                    break
                mode = {"e_tag": headers["etag"]}  # a foreign or torn object is written over, unless it has changed meanwhile
        return None

    def place(self, staged: dict[str, Staged]) -> None:
        """Staged objects lie in their places."""

    def drop(self, staged: Iterable[Staged]) -> None:
        """A staged object is right, and copied by the next writer of its block."""

    def locked(self, key: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._patiently("delete", key, lambda: obstore.delete(self._store, key))

    def delete_all(self, prefix: str) -> None:
        while paths := self._patiently("list", prefix, partial(self._some, prefix)):
            self._patiently("delete", prefix, partial(obstore.delete, self._store, paths))

    def objects(self, prefix: str) -> dict[str, tuple[int, str]]:
        """{key: (bytes, e-tag)} of all objects under a prefix."""

        def once() -> dict[str, tuple[int, str]]:
            parts = obstore.list(self._store, prefix or None)
            return {each["path"]: (each["size"], each["e_tag"] or "") for part in parts for each in part}

        return self._patiently("list", prefix, once)

    def _some(self, prefix: str) -> Sequence[str]:
        """The first thousand keys under a prefix."""
        return [each["path"] for each in next(iter(obstore.list(self._store, prefix, chunk_size=1000)), [])]

    def remove_leftovers(self, prefix: str) -> None:
        """An interrupted PUT leaves nothing."""

    def _put(self, key: str, data: bytes | memoryview, mode: Any, seal: str = "") -> str | None:
        """The new e-tag; None if the condition in `mode` does not hold, as after a lost answer to a PUT of the same `data`."""
        metadata: Any = {"seal": seal} if seal else None
        try:
            result = self._patiently(
                "write",
                key,
                lambda: obstore.put(self._store, key, data, mode=mode, attributes=metadata, use_multipart=False),
            )
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None
        return result["e_tag"] or ""

    # --- failures ---

    def _patiently(self, doing: str, key: str, call: Callable[[], T]) -> T:
        """The result of `call`, retried after transient failures. Raises FileNotFoundError, AlreadyExistsError and
        PreconditionError, which are answers, and UserError for all else."""
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
                    raise FileNotFoundError(2, "there is no such object") from None
                end = began + (PATIENCE if self._heard else FIRST)
                if lasting or stopping() or time.monotonic() + pause > end:
                    raise UserError(
                        f"cannot {doing} {self.path(key)}: {why}; put that right and run the same command again"
                    ) from None
            else:
                self._heard = True
                return result
            time.sleep(pause * random.uniform(0.5, 1))  # none at first: an idle connection may just have been closed
            pause = min(2 * pause or 0.1, LONGEST)

    def _why(self, error: Exception) -> tuple[str, bool]:
        """A failure in our words, and whether retrying is useless; '' for an object that is not there."""
        text = str(error)
        code = (re.findall(r"<Code>(\w+)</Code>", text) or [""])[0]
        status = int((re.findall(r"status code: (\d{3})", text) or ["0"])[0])
        answer = code or f"status {status}"
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
            return f"the bucket is in another region ({answer}): set AWS_REGION to its own", True
        if code in _CREDENTIALS or status in (401, 403):
            return (
                f"{self._where()} refuses our credentials ({answer}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, and what they may do in this bucket",
                True,
            )
        if status:
            return f"{self._where()} answers with {answer}", 400 <= status < 500 and status not in (408, 409, 425, 429)
        return f"no whole answer from {self._where()} (is the endpoint right, and the network up?)", False

    def _where(self) -> str:
        """The endpoint without credentials, key and signature."""
        try:
            url = urlsplit(obstore.sign(self._store, "GET", "x", _SIGNED_FOR))
        except (BaseError, ValueError):
            return "the endpoint"
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


class _Connections:
    """Idle connections, for the next request; closed with their store."""

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
    """Read a body into `out`; return its bytes. Raises HTTPException for one that ends early, or is too long."""
    size = int(response.headers.get("Content-Length", "-1"))
    if not 0 <= size <= len(out):
        raise http.client.HTTPException("a body of another length than the range")
    done = 0
    while done < size:
        n = response.readinto(out[done:size])
        if n == 0:
            raise http.client.IncompleteRead(b"", size - done)
        done += n
    return done


def _seal(owner: str, key: str, data: bytes | memoryview) -> str:
    """A checksum of an object's content, key and owner, 16 hexadecimal digits."""
    return hashlib.sha256(canonical([owner, key, crc32c(np.frombuffer(data, np.uint8))])).hexdigest()[:16]


def _from_files() -> dict[str, str]:
    """Credentials, region and endpoint from ~/.aws where the environment, which is all that obstore reads, has none."""
    profile = os.environ.get("AWS_PROFILE", "default")
    config: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(os.path.expanduser(os.environ.get(variable) or usual), encoding="utf-8")
        values = dict(parser[section]) if parser.has_section(section) else {}
        for name, (field, variables) in _FILES.items():
            if name in values and not any(os.environ.get(each) for each in variables):
                config[field] = values[name]
    return config
