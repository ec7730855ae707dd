"""Blocks in memory → durable, checked, committed blocks on disk, at the disk's own speed.

A block of all layers lies in one host buffer; there is a fixed number of these, so memory is bounded and a full disk
queue makes the forward pass wait rather than memory grow. One layer of a block is one file: some threads do nothing but
write and fsync files, so that the disk never waits; others take checksums of what is written. Whoever finishes the last of a
block moves its files to their places and publishes its ledger entry.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.cache import BlockStats, Cache
from residual_saes.shared.files import page_aligned
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Staged


@dataclass(kw_only=True, frozen=True, slots=True)
class WriterConfig:
    """How blocks are written."""

    threads: int = 4
    buffers: int = 2  # blocks of all layers in flight; host memory is buffers · layers · block bytes


@dataclass(kw_only=True, slots=True)
class Buffer:
    """One block of all harvested sites."""

    data: Tensor  # float16 [sites, block_rows, d_model]
    nonfinite: Tensor  # int64 [sites]: values that cannot be stored
    tokens: str = ""  # checksum of the tokens that these are the activations of


class BlockWriter:
    """Writes and commits blocks behind the caller's back: a context manager, which waits for all writes when it is left.

    A block that is in the cache already is left alone (another harvest was faster), unless it is to be replaced. An error in a
    thread reaches the next call.
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
        self._jobs: set[_BlockJob] = set()  # those that are not committed yet

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for pool in (self._waiter, self._disk, self._arithmetic):  # the first of them feeds the others
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        self._cache.drop(staged for job in self._jobs for staged in job.staged.values())  # of blocks that did not become whole
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
        job = _BlockJob(block=block, buffer=buffer)
        with self._lock:
            self._jobs.add(job)
        self._waiter.submit(self._guarded, self._begin, job, ready)

    def _begin(self, job: "_BlockJob", ready: Callable[[], None] | None) -> None:
        if ready is not None:
            ready()
        self._check()  # or, where the first block could not settle the scales of a site, the next one would
        for index, site in enumerate(self._sites):
            self._cache.settle(site, job.buffer.data[index])
            self._disk.submit(self._guarded, self._write, job, index)

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._error = self._error or error

    def _write(self, job: "_BlockJob", index: int) -> None:
        site = self._sites[index]
        stored, lost = self._cache.stored_form_(site, job.buffer.data[index])
        job.buffer.nonfinite[index] += lost
        staged = self._cache.stage_block(site, job.block, stored, replace=self._replace)
        with self._lock:
            job.stored[site], job.staged[site] = stored, staged
        self._arithmetic.submit(self._guarded, self._take_stats, job, index)  # now: what lies there may be another harvest's

    def _take_stats(self, job: "_BlockJob", index: int) -> None:
        buffer, rows, site = job.buffer, self._cache.spec.slice_rows, self._sites[index]
        nonfinite = int(buffer.nonfinite[index])
        stats = BlockStats.of(job.stored[site], rows, tokens=buffer.tokens, nonfinite=nonfinite, by=self._by)
        with self._lock:
            job.stats[site] = stats
            last = len(job.stats) == len(self._sites)
        if last:
            self._commit(job)

    def _commit(self, job: "_BlockJob") -> None:
        self._cache.commit(job.block, job.stats, job.staged, replace=self._replace)
        with self._lock:
            self._jobs.remove(job)
        self._free.put(job.buffer)
        self._done(job.block)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(kw_only=True, slots=True, eq=False)
class _BlockJob:
    """A block on its way to the disk, and of which sites it is written and summed up so far."""

    block: int
    buffer: Buffer
    stored: dict[Site, NDArray[Any]] = field(default_factory=dict)  # as it is written, in the buffer's memory
    staged: dict[Site, Staged] = field(default_factory=dict)
    stats: dict[Site, BlockStats] = field(default_factory=dict)
