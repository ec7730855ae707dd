"""Blocks in memory → durable, checked, committed blocks on disk, at the disk's own speed.

A block of all layers lies in one host buffer; there is a fixed number of these, so memory is bounded and a full disk
queue makes the forward pass wait rather than memory grow. One layer of a block is one file: some threads do nothing but
write and fsync files, so that the disk never waits; others take checksums and moments of what is written. Whoever finishes the
last of a block moves its files to their places and publishes its ledger entry.
"""

import ctypes
import dataclasses
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache import BlockStats, Cache, slice_checksums
from shared.compile import load
from shared.files import page_aligned
from shared.sites import Site
from shared.stores import Staged

_STATS_VALUES = 1 << 18  # values whose float32 copy stays in a core's cache while their moments are taken


@dataclass(kw_only=True, frozen=True, slots=True)
class WriterConfig:
    threads: int = 4
    buffers: int = 2  # blocks of all layers in flight; host memory is buffers · layers · block bytes


@dataclass(kw_only=True, slots=True)
class Buffer:
    """One block of all harvested layers, float16 [layers, block_rows, d_model], and what was met while filling it."""

    data: Tensor
    nonfinite: Tensor  # int64 [layers]
    tokens: str = ""  # checksum of the tokens that these are the activations of


class BlockWriter:
    """Use as a context manager; leaving it waits for all writes. An error in a thread reaches the next call.

    A block that is in the cache already is left alone (another harvest was faster), unless it is to be replaced.
    """

    def __init__(
        self,
        cache: Cache,
        sites: tuple[Site, ...],
        config: WriterConfig,
        *,
        pinned: bool,
        done: Callable[[int], None],
        replace: bool = False,
        by: str = "",
    ) -> None:
        """`by`: what the blocks are made on, for the ledger."""
        self._cache, self._sites, self._done, self._replace, self._by = cache, sites, done, replace, by
        shape = (len(sites), cache.spec.block_rows, cache.spec.d_model)
        self._free: queue.Queue[Buffer] = queue.Queue()
        for _ in range(config.buffers):
            # Pinned memory is page aligned too, as direct writes want it.
            data = torch.empty(shape, dtype=torch.float16, pin_memory=True) if pinned else page_aligned(*shape)
            self._free.put(Buffer(data=data, nonfinite=torch.zeros(len(sites), dtype=torch.int64, pin_memory=pinned)))
        self._waiter = ThreadPoolExecutor(1, "waiter")
        self._disk = ThreadPoolExecutor(config.threads, "disk")
        self._arithmetic = ThreadPoolExecutor(config.threads, "stats")
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._staged: dict[tuple[Site, int], Staged] = {}  # {layer, block: bytes on the disk that are not committed yet}

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for pool in (self._waiter, self._disk, self._arithmetic):  # the first of them feeds the others
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        self._cache.drop(self._staged.values())  # of blocks that did not become whole
        if kind is None:
            self._check()

    def buffer(self) -> Buffer:
        """A free buffer; waits until the disk has caught up."""
        while True:
            self._check()
            try:
                return self._free.get(timeout=0.5)
            except queue.Empty:
                continue

    def submit(self, block: int, buffer: Buffer, ready: Callable[[], None] | None = None) -> None:
        """Write a filled buffer; `ready`, called in a thread, returns when it has arrived. The writer gives the buffer back."""
        self._check()
        job = _BlockJob(block=block, buffer=buffer, left=len(self._sites))
        self._waiter.submit(self._guarded, self._begin, job, ready)

    def _begin(self, job: "_BlockJob", ready: Callable[[], None] | None) -> None:
        if ready is not None:
            ready()
        for index in range(len(self._sites)):
            self._disk.submit(self._guarded, self._write, job, index)

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._error = self._error or error

    def _write(self, job: "_BlockJob", index: int) -> None:
        site = self._sites[index]
        staged = self._cache.stage_block(site, job.block, job.buffer.data[index].numpy(), replace=self._replace)
        with self._lock:
            job.staged[site] = self._staged[site, job.block] = staged
        self._arithmetic.submit(self._guarded, self._take_stats, job, index)  # now: what lies there may be another harvest's

    def _take_stats(self, job: "_BlockJob", index: int) -> None:
        buffer, slice_rows = job.buffer, self._cache.spec.slice_rows
        stats = block_stats(buffer.data[index].numpy(), int(buffer.nonfinite[index]), slice_rows, buffer.tokens)
        with job.lock:
            job.stats[self._sites[index]] = dataclasses.replace(stats, by=self._by)
            job.left -= 1
            last = job.left == 0
        if last:
            self._commit(job)

    def _commit(self, job: "_BlockJob") -> None:
        stats = {site: job.stats[site] for site in self._sites}
        self._cache.commit(job.block, stats, job.staged, replace=self._replace)
        with self._lock:
            for site in self._sites:
                del self._staged[site, job.block]
        self._free.put(job.buffer)
        self._done(job.block)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(kw_only=True, slots=True)
class _BlockJob:
    """A block on its way to the disk: each of its layers is to be written, and to be summed up."""

    block: int
    buffer: Buffer
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    staged: dict[Site, Staged] = field(default_factory=dict)
    stats: dict[Site, BlockStats] = field(default_factory=dict)


def block_stats(data: NDArray[np.float16], nonfinite: int, slice_rows: int, tokens: str = "") -> BlockStats:
    """Checksums, moments and largest row norm of finite float16 [rows, d_model]."""
    total, square_sum, max_square = _sums(data)
    mean = total / data.size
    return BlockStats(
        bytes=data.nbytes,
        rows=len(data),
        crc32c=slice_checksums(data, slice_rows),
        tokens=tokens,
        mean=mean,
        m2=max(0.0, square_sum - data.size * mean * mean),
        max_norm=max_square**0.5,
        nonfinite=nonfinite,
    )


def _sums(data: NDArray[np.float16]) -> tuple[float, float, float]:
    """Σ x, Σ x² and the largest row's Σ x²."""
    library = load(Path(__file__).with_name("moments.c"))
    if library is None:
        return _torch_sums(data)
    total, square_sum, max_square = ctypes.c_double(), ctypes.c_double(), ctypes.c_float()
    results = (ctypes.byref(total), ctypes.byref(square_sum), ctypes.byref(max_square))
    rows, d = data.shape
    library.moments(ctypes.c_void_p(data.ctypes.data), ctypes.c_int64(rows), ctypes.c_int64(d), *results)
    return total.value, square_sum.value, max_square.value


def _torch_sums(data: NDArray[np.float16]) -> tuple[float, float, float]:
    total = square_sum = max_square = 0.0
    for piece in torch.split(torch.from_numpy(data), max(1, _STATS_VALUES // data.shape[1])):
        x = piece.float()
        squares = torch.linalg.vecdot(x, x)
        total += float(x.sum(dtype=torch.float64))
        square_sum += float(squares.sum(dtype=torch.float64))
        max_square = max(max_square, float(squares.max()))
    return total, square_sum, max_square
