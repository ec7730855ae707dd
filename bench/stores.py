"""How much of a network's rate reaches the loader's memory from S3, and leaves a writer's: our client beside bare ones.

    python -m bench stores

The server (bench/nullstore.c) stores nothing and costs next to nothing. The bare client is a socket for each thread that sends
one prepared request after the other and receives into memory that is there already: no client can do less. obstore's own GET is
what ours replaces. Contenders take turns; the processor time is of the client alone.
"""

from __future__ import annotations

import os
import queue
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from bench import report

_SERVE = "import sys; from pathlib import Path; from shared.native import load; load(Path(sys.argv[1])).serve(int(sys.argv[2]))"
_OBJECT = 64 << 20
_SLICE = 4 << 20


@contextmanager
def null_server() -> Iterator[int]:
    """Its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        command = [sys.executable, "-c", _SERVE, str(Path(__file__).with_name("nullstore.c")), str(listening.fileno())]
        with subprocess.Popen(command, pass_fds=[listening.fileno()]) as server:
            try:
                yield listening.getsockname()[1]
            finally:
                server.kill()


def bare_get(port: int, size: int) -> Callable[[memoryview, int], None]:
    """One request after the other over a connection for each thread."""
    free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def get(out: memoryview, offset: int) -> None:
        connection = socket.create_connection(("127.0.0.1", port)) if free.empty() else free.get()
        connection.sendall(f"GET /b/x HTTP/1.1\r\nHost: x\r\nRange: bytes={offset}-{offset + size - 1}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:  # by the byte: what follows belongs into `out`
            head += connection.recv(1)
        done = 0
        while done < size:
            done += connection.recv_into(out[done:])
        free.put(connection)

    return get


def bare_put(port: int) -> Callable[[memoryview, int], None]:
    free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def put(data: memoryview, offset: int) -> None:
        connection = socket.create_connection(("127.0.0.1", port)) if free.empty() else free.get()
        connection.sendall(f"PUT /b/x HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        connection.sendall(data)
        connection.recv(4096)
        free.put(connection)

    return put


def rate(work: Callable[[memoryview, int], None], size: int, total: int, threads: int) -> tuple[float, float]:
    """(bytes a second, processor seconds of this process a gigabyte)."""
    memory: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(threads):
        memory.put(np.ones(size, np.uint8).data)

    def one(number: int) -> None:
        data = memory.get()
        work(data, number * size % _OBJECT)
        memory.put(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(2 * threads)))
        began, spent = time.perf_counter(), time.process_time()
        list(pool.map(one, range(total // size)))
        return total / (time.perf_counter() - began), (time.process_time() - spent) / (total / 1e9)


@click.command()
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--gigabytes", default=2.0, show_default=True, help="of each contender and round")
def command(threads: int, rounds: int, gigabytes: float) -> None:
    """Our S3 client beside bare ones, through a server that stores nothing."""
    busy = report.busy_share()
    with null_server() as port:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1",
        }  # fmt: skip
        import obstore

        from shared.stores import Bucket
        from shared.stores.s3 import S3

        store = S3(Bucket("bench"))

        def theirs(out: memoryview, offset: int) -> None:
            out[:] = memoryview(obstore.get_range(store._store, "x", start=offset, length=len(out)))

        contenders: dict[str, tuple[int, Callable[[memoryview, int], None]]] = {
            "read slices, bare": (_SLICE, bare_get(port, _SLICE)),
            "read slices, ours": (_SLICE, lambda out, offset: _whole(store.read("x", out, offset), out)),
            "read slices, obstore": (_SLICE, theirs),
            "read blocks, bare": (_OBJECT, bare_get(port, _OBJECT)),
            "read blocks, ours": (_OBJECT, lambda out, offset: _whole(store.read("x", out, offset), out)),
            "write blocks, bare": (_OBJECT, bare_put(port)),
            "write blocks, ours": (_OBJECT, lambda data, offset: store.write("x", data)),
            "write blocks, ours, created": (_OBJECT, lambda data, _: _made(store.stage("x", data, "digest", replace=False))),
        }
        total = max(_OBJECT * threads, int(gigabytes * 1e9) // _OBJECT * _OBJECT)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, (size, work) in contenders.items():
                found[name].append(rate(work, size, total, threads))
        click.echo(f"{report.machine()}; {threads} threads; other work held {busy:.0%} of the processors at the start")
        for name, results in found.items():
            bare = found[name.partition(",")[0] + ", bare"]
            median, cpu = (statistics.median(column) for column in zip(*results, strict=True))
            share = statistics.median(ours / base for (ours, _), (base, _) in zip(results, bare, strict=True))
            click.echo(f"{name:28s} {median / 1e9:6.2f} GB/s  {share:5.0%} of bare  {cpu:.2f} core-s/GB")


def _whole(n: int, out: memoryview) -> None:
    assert n == len(out)


def _made(_: object) -> None: ...
