"""Blocks on disk → shuffled batches on the device.

Training blocks are visited in a random order, `window_blocks` at a time; the rows of such a window are shuffled and
handed out. While one window is trained on, reader threads fill the next. The order is a pure function of (seed, epoch,
cache), so a run resumes at any batch, and every setting and every later ablation sees the same batches.

Memory: two windows (on the device), and on CUDA one pinned block for each reader thread besides. A block is read
straight into the window on a CPU, and into pinned memory and from there by a copy on a stream of its own on CUDA.
"""

import itertools
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.cache import Cache
from shared.shuffle import epoch_blocks, window_rows


@dataclass(kw_only=True, frozen=True, slots=True)
class LoaderConfig:
    """`window_blocks` is how far rows are mixed; host or device memory is 2 · window_blocks · block bytes."""

    batch: int
    window_blocks: int = 16
    threads: int = 4
    seed: int = 0
    check: bool = True  # compare every block with its checksum as it is read


class ActivationLoader:
    """Iterate over batches `first` … `last` − 1, each float16 [batch, d_model] on the device.

    Raises UserError, naming layer and block, if a block is missing or damaged. `waited` counts the seconds for which
    the consumer found no batch ready.
    """

    def __init__(
        self, cache: Cache, layer: int, config: LoaderConfig, device: torch.device, *, first: int = 0, last: int
    ) -> None:
        self._cache, self._layer, self._config, self._device = cache, layer, config, device
        self._first, self._last = first, last
        spec = cache.spec
        self._window_blocks = min(config.window_blocks, spec.train_blocks)
        self._windows_per_epoch = -(-spec.train_blocks // self._window_blocks)
        shape = (self._window_blocks * spec.block_rows, spec.d_model)
        self._windows = [torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)]
        self._cuda = device.type == "cuda"
        self._staging: queue.Queue[Tensor] = queue.Queue()
        if self._cuda:
            self._stream = torch.Stream(device)
            for _ in range(config.threads):
                self._staging.put(torch.empty(spec.block_rows, spec.d_model, dtype=torch.float16, pin_memory=True))
        self.waited = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        batch = self._config.batch
        left: Tensor | None = None
        at = self._first * batch  # the row of the endless stream that comes next
        end = self._last * batch
        with ThreadPoolExecutor(self._config.threads, "reader") as pool:
            try:
                for start, window, rows in self._stream_windows(pool, at):
                    place = at - start
                    while at < end and place < len(rows):
                        take = min(batch - (0 if left is None else len(left)), len(rows) - place)
                        part = window.index_select(0, rows[place : place + take])
                        whole = part if left is None else torch.cat([left, part])
                        at, place = at + take, place + take
                        left = whole if len(whole) < batch else None
                        if left is None:
                            yield whole
                    if at >= end:
                        return
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _stream_windows(self, pool: ThreadPoolExecutor, at: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From row `at` of the stream on: (row at which a window begins, the window, the order its rows are handed out in)."""
        spec = self._cache.spec
        epoch, row = divmod(at, spec.train_tokens)
        index = row // (self._window_blocks * spec.block_rows)
        loading = self._load(pool, epoch, index, 0)
        for number in itertools.count(1):
            current, order, futures = loading
            began = time.perf_counter()
            for future in futures:
                future.result()
            self.waited += time.perf_counter() - began
            start = epoch * spec.train_tokens + index * self._window_blocks * spec.block_rows
            epoch, index = (epoch, index + 1) if index + 1 < self._windows_per_epoch else (epoch + 1, 0)
            if start + len(order) < self._last * self._config.batch:
                loading = self._load(pool, epoch, index, number % 2)
            yield start, current, order

    def _load(self, pool: ThreadPoolExecutor, epoch: int, index: int, slot: int) -> "tuple[Tensor, Tensor, list[Future[None]]]":
        """Begin to fill a window; the futures are done when it is whole."""
        spec, seed = self._cache.spec, self._config.seed
        first = index * self._window_blocks
        blocks = epoch_blocks(spec.train_blocks, seed=seed, epoch=epoch)[first : first + self._window_blocks]
        n_rows = len(blocks) * spec.block_rows
        window = self._windows[slot]
        free = None
        if self._cuda:
            free = torch.Event(self._device)
            free.record(torch.accelerator.current_stream())  # what still reads the slot's old rows is queued before this
        futures = [
            pool.submit(self._read, int(block), window[i * spec.block_rows : (i + 1) * spec.block_rows], free)
            for i, block in enumerate(blocks)
        ]
        order = torch.from_numpy(window_rows(n_rows, seed=seed, epoch=epoch, window=index)).to(self._device)
        return window, order, futures

    def _read(self, block: int, target: Tensor, free: torch.Event | None) -> None:
        if free is None:
            self._read_host(block, target)
            return
        staging = self._staging.get()
        try:
            self._read_host(block, staging)
            with self._stream:
                self._stream.wait_event(free)
                target.copy_(staging, non_blocking=True)
                copied = torch.Event(self._device)
                copied.record()
            copied.synchronize()
        finally:
            self._staging.put(staging)

    def _read_host(self, block: int, target: Tensor) -> None:
        data = target.numpy()
        self._cache.read_block(self._layer, block, data)
        if self._config.check:
            self._cache.check_block(self._layer, block, data, self._cache.stats(self._layer, block))
