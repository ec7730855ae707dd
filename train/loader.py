"""Blocks on disk → shuffled batches on the device.

Training blocks are visited in a random order, `window_blocks` at a time; the rows of such a window are shuffled and
handed out. While one window is trained on, reader threads fill the next, past the page cache. The order is a pure
function of (seed, epoch, cache), so a run resumes at any batch, and every setting and every later ablation sees the
same batches.

Memory: two windows (on the device), and on CUDA one pinned block for each reader thread besides. A block is read
straight into the window on a CPU, and into pinned memory and from there by a copy on a stream of its own on CUDA.
"""

import itertools
import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.cache import Cache
from shared.files import page_aligned
from shared.shuffle import epoch_blocks, window_rows


@dataclass(kw_only=True, frozen=True, slots=True)
class LoaderConfig:
    """`window_blocks` is how far rows are mixed; host or device memory is 2 · window_blocks · block bytes."""

    batch: int
    window_blocks: int = 16
    threads: int = 16  # each waits for one call of the disk at a time
    seed: int = 0
    check: bool = True  # compare every block with its checksum as it is read


@dataclass(kw_only=True, frozen=True, slots=True)
class _Window:
    """Blocks whose rows are handed out together; whole when the reads are done."""

    start: int  # the row of the stream at which it begins
    slot: int  # whose memory it has
    data: Tensor  # [window_blocks · block_rows, d_model]
    order: Tensor  # int64, as many as the window has rows
    reads: list[Future[None]]


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
        self._cuda = device.type == "cuda"
        self._slots = [
            torch.empty(shape, dtype=torch.float16, device=device) if self._cuda else page_aligned(*shape) for _ in range(2)
        ]
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
                for window in self._stream_windows(pool, at):
                    place = at - window.start
                    while at < end and place < len(window.order):
                        take = min(batch - (0 if left is None else len(left)), len(window.order) - place)
                        part = window.data.index_select(0, window.order[place : place + take])
                        whole = part if left is None else torch.cat([left, part])
                        at, place = at + take, place + take
                        left = whole if len(whole) < batch else None
                        if left is None:
                            yield whole
                    if at >= end:
                        return
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _stream_windows(self, pool: ThreadPoolExecutor, at: int) -> "Iterator[_Window]":
        """From row `at` of the stream on, window after window, each whole and shuffled."""
        wanted = self._wanted(at)
        loading = deque(self._load(pool, slot, *window) for slot, window in enumerate(itertools.islice(wanted, 2)))
        while loading:
            window = loading.popleft()
            began = time.perf_counter()
            for future in window.reads:
                future.result()
            self.waited += time.perf_counter() - began
            yield window
            # Its slot is free now, though the window after it may still be on its way: the disk never waits for a window's end.
            if (following := next(wanted, None)) is not None:
                loading.append(self._load(pool, window.slot, *following))

    def _wanted(self, at: int) -> Iterator[tuple[int, int]]:
        """(epoch, window) of every window from row `at` of the stream to its end."""
        spec, end = self._cache.spec, self._last * self._config.batch
        epoch, row = divmod(at, spec.train_tokens)
        index = row // (self._window_blocks * spec.block_rows)
        while self._start(epoch, index) < end:
            yield epoch, index
            epoch, index = (epoch, index + 1) if index + 1 < self._windows_per_epoch else (epoch + 1, 0)

    def _start(self, epoch: int, index: int) -> int:
        """The row of the stream at which a window begins."""
        return epoch * self._cache.spec.train_tokens + index * self._window_blocks * self._cache.spec.block_rows

    def _load(self, pool: ThreadPoolExecutor, slot: int, epoch: int, index: int) -> "_Window":
        """Begin to fill a window."""
        spec, seed = self._cache.spec, self._config.seed
        first = index * self._window_blocks
        blocks = epoch_blocks(spec.train_blocks, seed=seed, epoch=epoch)[first : first + self._window_blocks]
        n_rows = len(blocks) * spec.block_rows
        data = self._slots[slot]
        free = None
        if self._cuda:
            free = torch.Event(self._device)
            free.record(torch.accelerator.current_stream())  # what still reads the slot's old rows is queued before this
        reads = [
            pool.submit(self._read, int(block), data[i * spec.block_rows : (i + 1) * spec.block_rows], free)
            for i, block in enumerate(blocks)
        ]
        order = torch.from_numpy(window_rows(n_rows, seed=seed, epoch=epoch, window=index)).to(self._device)
        return _Window(start=self._start(epoch, index), slot=slot, data=data, order=order, reads=reads)

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
