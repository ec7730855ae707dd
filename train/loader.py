"""Blocks on disk → shuffled batches on the device.

A window is as many slices (sixteenths of blocks, whose rows are a fair sample of the block) as `window_blocks` blocks have,
drawn from all training blocks: it mixes sixteen times the contexts that whole blocks would, in the same memory. Its rows are
shuffled and handed out. While one window is trained on, reader threads fill the next, past the page cache, and draw its
order. The order is a pure function of (seed, epoch, cache), so a run resumes at any batch, and every setting and every
later ablation sees the same batches.

Memory: two windows (on the device), and on CUDA a quarter of one in pinned slices for the reader threads. Slices are read
straight into the window on a CPU, and into pinned memory and from there by a copy on a stream of their own on CUDA.

A reader thread takes a few slices at a time, and few calls for each: every one of them hands the interpreter's lock on, which
the training thread needs as well. (With 22 a slice, not 6, 16 threads read 5 GB/s from memory, and steps waited for the lock.)
For the same reason a window is read no faster than it is used up, unless it is waited for.

On CUDA the training thread queues gathers and never waits for the device here. Two rules keep the streams apart: what goes
up into a slot waits, on the device, for the gathers that were queued from its last window (`free`); and a window is
handed out only when a reader thread has seen its copies arrive, so that whatever is queued after that finds them there.
"""

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.cache import BlockStats, Cache, CacheSpec, int8
from residual_saes.shared.device import new_event, new_stream
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import page_aligned
from residual_saes.shared.progress import say
from residual_saes.shared.runs.rows import ALL, Rows, fill
from residual_saes.shared.shuffle import epoch_slices, window_rows
from residual_saes.shared.sites import Site

_SPREAD = 0.7  # share of a window's time over which the next but one is read
_TURNS = 4  # that a reader thread has in a window, at least: with fewer, the last ones of a window would be waited for
FOLLOW_POLL, _LATE = 0.5, 60.0  # seconds between looks for a block that is being harvested, and until it is said


@dataclass(kw_only=True, frozen=True, slots=True)
class LoaderConfig:
    """`window_blocks` is how much is mixed at a time; host or device memory is 2 · window_blocks · block bytes."""

    batch: int
    window_blocks: int = 16
    threads: int = 16  # each waits for one call of the disk at a time
    seed: int = 0
    check: bool = True  # compare every slice with its checksum as it is read
    rows: Rows = ALL  # those left out have others of their window in their places, see `shared.runs.rows.fill`


@dataclass(kw_only=True, frozen=True, slots=True)
class _Slot:
    """The memory of one window."""

    data: Tensor  # rows of a window as they are stored, [rows, row_items]
    order: Tensor  # int64, as many as there are rows
    drawn: Tensor  # the order on the host: pinned memory on CUDA, `order` itself on a CPU

    @classmethod
    def empty(cls, rows: int, spec: CacheSpec, device: torch.device) -> "_Slot":
        if device.type == "cpu":
            order = torch.empty(rows, dtype=torch.int64)
            return cls(data=page_aligned(rows, spec.row_items, dtype=spec.torch_item), order=order, drawn=order)
        return cls(
            data=torch.empty(rows, spec.row_items, dtype=spec.torch_item, device=device),
            order=torch.empty(rows, dtype=torch.int64, device=device),
            drawn=torch.empty(rows, dtype=torch.int64, pin_memory=True),
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class _Window:
    """Slices whose rows are handed out together."""

    epoch: int
    index: int  # within the epoch
    start: int  # the row of the stream at which it begins
    slices: NDArray[np.int64]  # block · slices of a block + slice
    ends: NDArray[np.int64]  # of each of them, in rows of the window

    @property
    def rows(self) -> int:
        return int(self.ends[-1])


@dataclass(kw_only=True, frozen=True, slots=True)
class _Load:
    """A window on its way into a slot; whole when its work is done."""

    window: _Window
    slot: _Slot
    work: Sequence[Future[Any]]


class ActivationLoader:
    """Iterate over batches `first` … `last` − 1, each float16 [batch, d_model] on the device.

    Raises UserError, naming layer and block, if a block is missing or a slice damaged. With `asked` blocks that are not there
    yet are waited for, until they are harvested or it says to stop, which ends the batches. `waited` counts the seconds for
    which the consumer found no window ready: not read, not on the device, or its order not drawn.
    """

    def __init__(
        self,
        cache: Cache,
        site: Site,
        config: LoaderConfig,
        device: torch.device,
        *,
        first: int = 0,
        last: int,
        asked: Callable[[], bool] | None = None,
        like: "ActivationLoader | None" = None,
    ) -> None:
        """`like` is a loader of another site that is asked for each batch first: the rows that it leaves out are left out here
        as well, and no others."""
        self._like = like
        self._kept: dict[int, Sequence[Future[NDArray[np.bool_]]]] | None = None  # of windows, for the one that is like this
        if like is not None:
            like._kept = {}
        self._cache, self._site, self._config, self._device = cache, site, config, device
        self._first, self._last, self._asked, self._ended = first, last, asked, threading.Event()
        spec = cache.spec
        self._hurry = threading.Event()  # a window is waited for
        self._known: dict[int, BlockStats] = {}  # an entry of the ledger is wanted once for each slice
        self._window_slices = min(config.window_blocks, spec.train_blocks) * spec.slices
        self._at_once = max(1, self._window_slices // (_TURNS * config.threads))  # slices that a thread takes
        rows = self._window_slices * spec.slice_rows
        self._slots = [_Slot.empty(rows, spec, device) for _ in range(2)]
        self._staging: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stream = new_stream(device)
            rows = self._at_once * spec.slice_rows
            for _ in range(config.threads):
                self._staging.put(torch.empty(rows, spec.row_items, dtype=spec.torch_item, pin_memory=True))
        self._reference: int8.Reference | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        at = self._first * self._config.batch  # the row of the endless stream that comes next
        end = self._last * self._config.batch
        x, filled = self._new_batch(), 0
        with ThreadPoolExecutor(self._config.threads, "reader", self._begin_thread) as pool:
            try:
                for load in self._loads(pool, at):
                    place = at - load.window.start
                    while at < end and place < load.window.rows:
                        take = min(len(x) - filled, load.window.rows - place)
                        rows = load.slot.order[place : place + take]
                        self._take(load.slot.data, rows, x[filled : filled + take])
                        at, place, filled = at + take, place + take, filled + take
                        if filled == len(x):
                            yield x
                            x, filled = self._new_batch(), 0
                    if at >= end:
                        return
            finally:
                self._ended.set()
                self._hurry.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, data: Tensor, rows: Tensor, out: Tensor) -> None:
        """Rows of a window to float16 [n, d_model]."""
        if data.dtype == torch.float16:
            torch.index_select(data, 0, rows, out=out)
            return
        if self._reference is None:  # of a harvest that is followed it is there with the first block
            self._reference = self._cache.references.of(self._site).to(self._device)
        int8.take(data, rows, self._reference, out)

    def _begin_thread(self) -> None:
        if self._cuda:
            torch.cuda.set_stream(self._stream)  # of this thread

    def _new_batch(self) -> Tensor:
        return torch.empty(self._config.batch, self._cache.spec.d_model, dtype=torch.float16, device=self._device)

    def _loads(self, pool: ThreadPoolExecutor, at: int) -> "Iterator[_Load]":
        """From row `at` of the stream on, window after window, each whole and shuffled."""
        wanted = self._windows(at)
        loading = deque(self._load(pool, slot, window) for slot, window in zip(self._slots, wanted, strict=False))
        while loading:
            load = loading.popleft()
            began = time.perf_counter()
            if not all(work.done() for work in load.work):
                self._hurry.set()
            if not self._arrived(load):
                return
            self._hurry.clear()
            arrived = time.perf_counter()
            self.waited += arrived - began
            yield load
            # Its slot is free now, though the window after it may still be on its way: the disk never waits for a window's end.
            if (following := next(wanted, None)) is not None:
                loading.append(self._load(pool, load.slot, following, _SPREAD * (time.perf_counter() - arrived)))

    def _arrived(self, load: _Load) -> bool:
        """Wait for a window to be whole; False if it was asked to stop meanwhile, which only who follows a harvest heeds."""
        left, began, waiting = set(load.work), time.perf_counter(), False
        while left:
            done, left = wait(left, None if self._asked is None else FOLLOW_POLL, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if left and self._asked is not None and self._asked():
                return False
            if left and not waiting and time.perf_counter() - began > _LATE:
                waiting = True
                say(f"layer {self._site}: waiting for blocks that are not harvested yet", err=True)
        return True

    def _windows(self, at: int) -> Iterator[_Window]:
        """Every window from row `at` of the stream to its end. Those of an epoch are equally large, to a slice."""
        spec, end = self._cache.spec, self._last * self._config.batch
        total = spec.train_blocks * spec.slices
        count = -(-total // self._window_slices)
        for epoch in range(at // spec.train_tokens, -(-end // spec.train_tokens)):
            slices = epoch_slices(spec.train_blocks, spec.slices, seed=self._config.seed, epoch=epoch)
            last_rows = spec.block_rows - (spec.slices - 1) * spec.slice_rows
            ends = np.where(slices % spec.slices == spec.slices - 1, last_rows, spec.slice_rows).cumsum()
            start = epoch * spec.train_tokens
            for index in range(count):
                part = slice(index * total // count, (index + 1) * total // count)
                before = int(ends[part.start - 1]) if index else 0
                window = _Window(epoch=epoch, index=index, start=start + before, slices=slices[part], ends=ends[part] - before)
                if window.start + window.rows > at and window.start < end:
                    yield window

    def _load(self, pool: ThreadPoolExecutor, slot: _Slot, window: _Window, seconds: float = 0.0) -> _Load:
        """Begin to fill a slot, in no less than so many seconds."""
        free = None
        if self._cuda:
            free = new_event()
            free.record(torch.cuda.current_stream(self._device))
        drawn, reads, first = pool.submit(self._draw, window, slot, free), [], 0
        now = time.perf_counter()
        for at in range(0, len(window.slices), self._at_once):
            slices, ends = window.slices[at : at + self._at_once].tolist(), window.ends[at : at + self._at_once] - first
            due = now + seconds * at / len(window.slices)
            reads.append(pool.submit(self._read, slices, ends.tolist(), slot.data[first : first + ends[-1]], free, due))
            first += int(ends[-1])
        last = []
        if not self._config.rows.all:
            deciding: Sequence[Future[NDArray[np.bool_]]] = reads
            if self._kept is not None:
                self._kept[window.start] = reads
            if self._like is not None and self._like._kept is not None:
                deciding = self._like._kept.pop(window.start)
            last = [pool.submit(self._leave_out, window, slot, free, drawn, deciding)]
        return _Load(window=window, slot=slot, work=[drawn, *reads, *last])

    def _draw(self, window: _Window, slot: _Slot, free: torch.cuda.Event | None) -> None:
        rows = window.rows
        order = window_rows(rows, seed=self._config.seed, epoch=window.epoch, window=window.index)
        slot.drawn[:rows] = torch.from_numpy(order)
        if free is not None:
            self._send(slot.drawn[:rows], slot.order[:rows], free)

    def _leave_out(
        self,
        window: _Window,
        slot: _Slot,
        free: torch.cuda.Event | None,
        drawn: Future[None],
        reads: Sequence[Future[NDArray[np.bool_]]],
    ) -> None:
        """Waits for work that was begun before it, so that one thread is enough for all."""
        drawn.result()
        fill(slot.drawn[: window.rows].numpy(), np.concatenate([read.result() for read in reads]))
        if free is not None:
            self._send(slot.drawn[: window.rows], slot.order[: window.rows], free)

    def _read(
        self, slices: list[int], ends: list[int], target: Tensor, free: torch.cuda.Event | None, due: float
    ) -> NDArray[np.bool_]:
        """Slices that lie one after the other in `target`, to these ends. Which of their rows count; nothing where all do."""
        self._hurry.wait(max(0.0, due - time.perf_counter()))
        if free is None:
            return self._read_host(slices, ends, target)
        staging = self._staging.get()
        try:
            kept = self._read_host(slices, ends, staging[: len(target)])
            self._send(staging[: len(target)], target, free)
            return kept
        finally:
            self._staging.put(staging)

    def _send(self, pinned: Tensor, target: Tensor, free: torch.cuda.Event) -> None:
        """Copy to the device on this thread's stream; returns when it has arrived."""
        arrived = new_event()
        self._stream.wait_event(free)
        target.copy_(pinned, non_blocking=True)
        arrived.record()
        arrived.synchronize()

    def _read_host(self, slices: list[int], ends: list[int], target: Tensor) -> NDArray[np.bool_]:
        kept, first = [], 0
        for number, end in zip(slices, ends, strict=True):
            kept.append(self._read_slice(*divmod(number, self._cache.spec.slices), target[first:end]))
            first = end
        return np.concatenate(kept)

    def _read_slice(self, block: int, index: int, target: Tensor) -> NDArray[np.bool_]:
        data = target.numpy()
        if self._asked is not None and block not in self._known:
            while not self._cache.has_block((self._site,), block):
                if self._ended.wait(FOLLOW_POLL):
                    raise CancelledError
        self._cache.read_slice(self._site, block, index, data)
        if self._config.check:
            self._check(block, index, data)
        if self._config.rows.all or self._like is not None:
            return np.empty(0, np.bool_)
        first = index * self._cache.spec.slice_rows
        places = self._cache.block_order(block)[first : first + len(data)] % self._cache.spec.context
        values = torch.from_numpy(self._cache.values(self._site, data))
        return self._config.rows.kept(values, torch.from_numpy(places)).numpy()

    def _check(self, block: int, index: int, data: NDArray[Any]) -> None:
        if (known := self._known.get(block)) is not None:
            with contextlib.suppress(UserError):  # the block may have been repaired since: its entry as it is now decides
                return self._cache.check_slice(self._site, block, index, data, known)
        known = self._known[block] = self._cache.stats(self._site, block)
        self._cache.check_slice(self._site, block, index, data, known)


class AlignedLoader:
    """Batches of several sites at a time, row by row of the same tokens: orders know no site, so that they are aligned by
    construction. Rows that are left out by their norm are those of the first of two sites."""

    def __init__(
        self,
        cache: Cache,
        sites: Sequence[Site],
        config: LoaderConfig,
        device: torch.device,
        **span: Any,
    ) -> None:
        """`span` is ActivationLoader's first, last and asked."""
        by_norm = config.rows.longest < math.inf
        assert len(sites) <= 2 or not by_norm
        first = ActivationLoader(cache, sites[0], config, device, **span)
        like = first if by_norm else None
        others = {site: ActivationLoader(cache, site, config, device, like=like, **span) for site in sites[1:]}
        self._loaders = {sites[0]: first} | others

    def __iter__(self) -> Iterator[dict[Site, Tensor]]:
        """Yields {site: float16 [batch, d_model]}."""
        for batches in zip(*self._loaders.values(), strict=True):
            yield dict(zip(self._loaders, batches, strict=True))

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the disk."""
        return sum(loader.waited for loader in self._loaders.values())


class Clock:
    """Speed since a little while ago, and the share of all time spent waiting for the loader."""

    def __init__(self, loader: AlignedLoader) -> None:
        self._loader = loader
        self._began = self._mark = time.perf_counter()
        self._mark_step: int | None = None
        self.tokens_per_second = 0.0

    def tick(self, step: int, batch: int) -> None:
        now = time.perf_counter()
        if self._mark_step is None:
            self._mark_step = step
        elif now - self._mark >= 1.0:
            self.tokens_per_second = (step - self._mark_step) * batch / (now - self._mark)
            self._mark, self._mark_step = now, step

    @property
    def wait_share(self) -> float:
        return self._loader.waited / max(time.perf_counter() - self._began, 1e-9)
