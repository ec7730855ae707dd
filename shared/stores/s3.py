"""A store in an S3 bucket: the same keys as in a folder, and readable by any Zarr tool that reads S3.

Requests are obstore's, all of them, so that what is written and what is read goes the same way (proxies, certificates).
Transient failures (no connection, a cut one, 5xx, a stall) are retried for `PATIENCE`, with growing pauses.

The object of a block is created where there is none, and never changed: of two harvests that differ in a last bit one creates
it, and the other copies its bytes (`stage`), so that both ledger entries are true of it. An object is copied only if its seal
(in its metadata: of owner, key and content) is right; one of another cache, or a torn one, is written over.

Credentials (aws.py) are written into no file and no message: errors of obstore and of servers are put into words of our own.
"""

import contextlib
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import UNKNOWN_FREE
from residual_saes.shared.seal import canonical, crc32c
from residual_saes.shared.stop import stopping
from residual_saes.shared.stores.aws import find_access
from residual_saes.shared.stores.location import Bucket
from residual_saes.shared.stores.protocol import Staged

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import S3Store
except ImportError:
    raise UserError("s3:// needs the obstore package: pip install obstore") from None

if TYPE_CHECKING:
    from obstore.store import ClientConfig

T = TypeVar("T")

PATIENCE = 300.0  # seconds for which transient failures are retried
FIRST = 4.0  # the same, until the first answer of the server
LONGEST = 5.0  # seconds between two attempts
STALL = 30.0  # seconds without a byte after which a read is begun again
_UPLOAD = timedelta(minutes=5)  # for one object; obstore's default of 30 seconds is 2 MB/s at 64 MiB
_PIECE = 256 << 10  # bytes that obstore hands over at a time: larger pieces are copied once more
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_CREDENTIALS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired")


class S3:
    """A store under a prefix of a bucket."""

    def __init__(self, root: Bucket) -> None:
        self.root = root
        self._access = access = find_access()
        insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        if access.endpoint.startswith("http:") and not insecure:
            raise UserError(f"{access.endpoint} is not https, which is taken only where AWS_ALLOW_HTTP=true is set")
        options: ClientConfig = {
            "allow_http": insecure,
            "timeout": _UPLOAD,
            "connect_timeout": timedelta(seconds=10),
        }
        open_store = partial(
            S3Store,
            root.name,
            prefix=root.prefix or None,
            config={"unsigned_payload": True, **access.config},
            credential_provider=(lambda: access.credential) if access.credential else None,
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=10)},  # `_patiently` retries
        )
        try:
            self._store = open_store(client_options=options)
            # A stall shows while an answer comes; of an upload it is the time until the answer begins, which may be long.
            self._reading = open_store(client_options=options | {"read_timeout": timedelta(seconds=STALL)})
        except (BaseError, ValueError, TypeError):
            raise UserError(f"{root} cannot be opened: the AWS_* variables or ~/.aws hold something unusable") from None
        self._heard = False

    def prepare(self) -> None:
        """Write, read and delete; refuse a server that ignores conditions as well: on it two harvests would spoil each other's
        blocks."""
        key, data = f"trial-{uuid.uuid4().hex}", b"trial"
        self.write(key, data)
        refused, read = not self.create(key, data), self.get(key)
        self.delete(key)
        if read != data:
            raise UserError(f"the server of {self.root} gives something else than what was written: use another one")
        if not refused:
            raise UserError(
                f"the server of {self.root} ignores conditions (If-None-Match), so that two processes could spoil each other's "
                "work: use one that knows conditional writes"
            )

    def path(self, key: str) -> Bucket:
        return self.root / key

    # --- reading ---

    def read(self, key: str, out: memoryview, offset: int = 0) -> int:
        def once() -> int:
            done = 0
            try:
                for part in obstore.get(self._reading, key, options={"range": (offset, offset + len(out))}).stream(_PIECE):
                    out[done : done + len(part)] = part
                    done += len(part)
            except BaseError as error:
                if _status(error) != 416:  # the object ends before `offset`
                    raise
            return done

        return self._patiently("read", key, once) if len(out) else 0

    def get(self, key: str) -> bytes:
        return self._fetch(key)[0]

    def _fetch(self, key: str) -> tuple[bytes, str, str]:
        """The content of an object, its e-tag, and the seal in its metadata."""

        def once() -> tuple[bytes, str, str]:
            answer = obstore.get(self._reading, key)
            return bytes(answer.bytes()), answer.meta["e_tag"] or "", answer.attributes.get("seal", "")

        return self._patiently("read", key, once)

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
            content, tag, _ = self._fetch(key)
        except FileNotFoundError:
            return False
        return content == seen and self.put_if(key, data, tag) is not None

    def stage(self, key: str, data: memoryview, owner: str, *, replace: bool) -> Staged:
        seal = _seal(owner, key, data)
        mode: Any = "overwrite" if replace else "create"
        while self._put(key, data, mode, seal) is None:
            mode = "create"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: the next round creates it
                stored, tag, its_seal = self._fetch(key)
                if len(stored) == len(data) and its_seal == _seal(owner, key, stored):
                    data[:] = stored
                    break
                mode = {"e_tag": tag}  # a foreign or torn object is written over, unless it has changed meanwhile
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

    def leftovers(self, prefix: str) -> Sequence[int]:
        return ()

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
            except (BaseError, OSError) as error:
                why, lasting = self._why(error)
                if not why:
                    self._heard = True
                    raise FileNotFoundError(2, "there is no such object") from None
                end = began + (PATIENCE if self._heard else FIRST)
                if lasting or stopping() or time.monotonic() + pause > end:
                    raise UserError(
                        f"cannot {doing} {self.path(key)}: {why}; put that right and run the same command again"
                    ) from None
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of Rust, which stands outside Exception
                    raise
                raise UserError(f"cannot {doing} {self.path(key)}: an AWS_* variable holds something unusable") from None
            else:
                self._heard = True
                return result
            time.sleep(pause * random.uniform(0.5, 1))  # none at first: an idle connection may just have been closed
            pause = min(2 * pause or 0.1, LONGEST)

    def _why(self, error: Exception) -> tuple[str, bool]:
        """A failure in our words, and whether retrying is useless; '' for an object that is not there."""
        text, where = str(error), self._access.endpoint
        code = (re.findall(r"<Code>(\w+)</Code>", text) or [""])[0]
        status = _status(error)
        answer = code or f"status {status}"
        self._heard |= status > 0
        if code == "NoSuchBucket":
            return f"there is no bucket {self.root.name} at {where}", True
        if status == 404 or (isinstance(error, FileNotFoundError) and not status):
            return "", True
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one of ~/.aws", True
        if code in _REGION or status in (301, 307, 308) or "configured region" in text:
            return f"the bucket is in another region ({answer}): set AWS_REGION to its own", True
        if code in _CREDENTIALS or status in (401, 403):
            return (
                f"{where} refuses our credentials ({answer}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, and what they may do in this bucket",
                True,
            )
        if status:
            return f"{where} answers with {answer}", 400 <= status < 500 and status not in (408, 409, 425, 429)
        return f"no whole answer from {where} (is the endpoint right, and the network up?)", False


def _status(error: Exception) -> int:
    """The HTTP status that an error of obstore is of; 0 for another kind."""
    return int((re.findall(r"status code: (\d{3})", str(error)) or ["0"])[0])


def _seal(owner: str, key: str, data: bytes | memoryview) -> str:
    """A checksum of an object's content, key and owner, 16 hexadecimal digits."""
    return hashlib.sha256(canonical([owner, key, crc32c(np.frombuffer(data, np.uint8))])).hexdigest()[:16]
