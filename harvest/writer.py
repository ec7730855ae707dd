"""Blocks in memory → durable, checked, committed blocks on disk, at the disk's own speed.

A block of all layers lies in one host buffer; there is a fixed number of these, so memory is bounded and a full disk
queue makes the forward pass wait rather than memory grow. Writer threads take one layer of a block at a time: checksum,
moments, write, fsync. Whoever finishes a block's last layer publishes its ledger entry.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.cache import BlockStats, Cache, crc32c, merge_moments
from shared.files import sync_dir, write_file

FP16_MAX = 65504.0
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


class BlockWriter:
    """Use as a context manager; leaving it waits for all writes. An error in a thread reaches the next call."""

    def __init__(
        self, cache: Cache, layers: tuple[int, ...], config: WriterConfig, *, pinned: bool, done: Callable[[int], None]
    ) -> None:
        self._cache, self._layers, self._done = cache, layers, done
        shape = (len(layers), cache.spec.block_rows, cache.spec.d_model)
        self._free: queue.Queue[Buffer] = queue.Queue()
        for _ in range(config.buffers):
            data = torch.empty(shape, dtype=torch.float16, pin_memory=pinned)
            self._free.put(Buffer(data=data, nonfinite=torch.zeros(len(layers), dtype=torch.int64, pin_memory=pinned)))
        self._pool = ThreadPoolExecutor(config.threads, "writer")
        self._error: BaseException | None = None

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
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
        """Write a filled buffer; `ready` blocks until its last copy has arrived. The writer gives the buffer back."""
        self._check()
        job = _BlockJob(left=len(self._layers), lock=threading.Lock(), stats={})
        for index in range(len(self._layers)):
            self._pool.submit(self._write_layer, block, buffer, index, job, ready)

    def _write_layer(self, block: int, buffer: Buffer, index: int, job: "_BlockJob", ready: Callable[[], None] | None) -> None:
        try:
            if ready is not None:
                ready()
            layer, data = self._layers[index], buffer.data[index].numpy()
            write_file(self._cache.block_path(layer, block), data.data)
            stats = block_stats(data, int(buffer.nonfinite[index]))
            with job.lock:
                job.stats[layer] = stats
                job.left -= 1
                last = job.left == 0
            if last:
                self._commit(block, job)
                self._free.put(buffer)
                self._done(block)
        except BaseException as error:
            self._error = self._error or error

    def _commit(self, block: int, job: "_BlockJob") -> None:
        for layer in self._layers:
            sync_dir(self._cache.block_path(layer, block).parent)
        self._cache.commit(block, {layer: job.stats[layer] for layer in self._layers})

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(kw_only=True, slots=True)
class _BlockJob:
    left: int
    lock: threading.Lock
    stats: dict[int, BlockStats]


def block_stats(data: NDArray[np.float16], nonfinite: int) -> BlockStats:
    """Checksum, moments and largest row norm of float16 [rows, d_model]."""
    rows, d = data.shape
    moments, max_square = (0, 0.0, 0.0), 0.0
    for piece in torch.split(torch.from_numpy(data), max(1, _STATS_VALUES // d)):
        x = piece.float()
        squares = torch.linalg.vecdot(x, x)
        n, mean = x.numel(), float(x.sum(dtype=torch.float64)) / x.numel()
        m2 = max(0.0, float(squares.sum(dtype=torch.float64)) - n * mean * mean)
        moments = merge_moments(moments, (n, mean, m2))
        max_square = max(max_square, float(squares.max()))
    return BlockStats(
        bytes=data.nbytes,
        crc32c=crc32c(data),
        rows=rows,
        mean=moments[1],
        m2=moments[2],
        max_norm=max_square**0.5,
        nonfinite=nonfinite,
    )


def to_float16(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float16 with nothing infinite in it, how many values did not fit): NaN becomes 0, too large becomes ±65504."""
    half = x.to(torch.float16)
    bad = (~torch.isfinite(half)).sum()
    return half.nan_to_num_(nan=0.0, posinf=FP16_MAX, neginf=-FP16_MAX), bad
