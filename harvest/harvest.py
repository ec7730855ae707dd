"""The harvest: plan it, run it, check it, mend it.

On CUDA three things overlap: the forward pass of one block, the copy of the block before to pinned memory, and the
writing of those before that. On a CPU the hooks put rows straight into the writer's buffer. Tokens and order of the next
block are read meanwhile.
"""

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harvest.model import ResidualModel
from harvest.native import put_rows
from harvest.text import TextSource, TokenLedger, load_tokenizer, write_tokens
from harvest.writer import BlockWriter, Buffer, WriterConfig
from shared.cache import Cache, CacheSpec, crc32c
from shared.cli import UserError, format_bytes, format_layers, format_seconds
from shared.device import announce, new_event, new_stream, send
from shared.files import free_bytes, make_dir, write_file
from shared.lm import load_model
from shared.progress import Progress

LEDGER_BYTES_PER_LAYER = 230  # of one block, as measured; it is 0.0004 % of a full-size block
_PROBE_BYTES = 64 << 20
_CPU_TOKENS = 2048  # of one forward pass on a CPU: more of them only leave its caches


@dataclass(kw_only=True, frozen=True, slots=True)
class HarvestConfig:
    """How to run a harvest; nothing here changes what is written."""

    device: torch.device
    forward_sequences: int = 32
    writer: WriterConfig = field(default_factory=WriterConfig)


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """Bytes and time of a harvest that has not begun."""

    spec: CacheSpec
    layers: tuple[int, ...]
    layer_bytes: int
    total_bytes: int
    free: int
    write_rate: float  # bytes per second, measured

    def __str__(self) -> str:
        s = self.spec
        fits = max(0, int((self.free - s.token_bytes) // self.layer_bytes))
        return "\n".join(
            (
                f"tokens      {s.n_blocks * s.block_rows:,} ({s.train_tokens:,} to train on, the rest held out)",
                f"blocks      {s.n_blocks:,} of {s.block_rows:,} rows, {format_bytes(s.block_bytes)} a layer",
                f"per layer   {format_bytes(self.layer_bytes)} ({self.layer_bytes:,} bytes)",
                f"in all      {format_bytes(self.total_bytes)} ({self.total_bytes:,} bytes) for {len(self.layers)} layers",
                f"free disk   {format_bytes(self.free)}: room for {min(fits, 10**6):,} layers of this size",
                f"write probe {format_bytes(self.write_rate)}/s: writing takes at least "
                f"{format_seconds(self.total_bytes / self.write_rate)}",
            )
        )


def planned_bytes(spec: CacheSpec, layers: tuple[int, ...]) -> int:
    """What a harvest of these layers writes, ledger included."""
    ledger = spec.n_blocks * LEDGER_BYTES_PER_LAYER * len(layers)
    return spec.n_blocks * spec.block_bytes * len(layers) + spec.token_bytes + ledger


def make_plan(path: Path, spec: CacheSpec, layers: tuple[int, ...], threads: int) -> Plan:
    return Plan(
        spec=spec,
        layers=layers,
        layer_bytes=spec.n_blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER),
        total_bytes=planned_bytes(spec, layers),
        free=free_bytes(path),
        write_rate=probe_write(path, threads),
    )


def probe_write(path: Path, threads: int, seconds: float = 2.0) -> float:
    """Bytes per second of durable writes by `threads` threads into `path`, over about two seconds."""
    existed = path.exists()
    make_dir(path)
    data = np.random.default_rng(0).integers(0, 255, _PROBE_BYTES, dtype=np.uint8)
    files = [path / f".probe-{os.getpid()}-{i}" for i in range(threads)]
    began = time.perf_counter()

    def write(file: Path) -> int:
        written = 0
        while time.perf_counter() - began < seconds:
            write_file(file, data.data)
            written += data.nbytes
        return written

    try:
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(write, files))
        return total / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from None
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        if not existed:
            path.rmdir()


def remaining_bytes(cache: Cache, layers: tuple[int, ...]) -> int:
    spec = cache.spec
    blocks = sum(len(group) * len(blocks) for group, blocks in cache.missing(layers).items())
    tokens = 0 if TokenLedger.load(cache).sequences == spec.sequences else spec.token_bytes
    return blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER) + tokens


def require_space(path: Path, needed: int) -> None:
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"the harvest needs {format_bytes(needed)} more at {path}, and {format_bytes(free)} are free: "
            "harvest fewer --layers or --tokens, or choose a larger disk; `python -m harvest plan` says what fits"
        )


def harvest(cache: Cache, layers: tuple[int, ...], source: TextSource, revision: str | None, config: HarvestConfig) -> None:
    """Bring the cache to the state where every block of every wanted layer is committed. Safe to kill and repeat."""
    spec = cache.spec
    if TokenLedger.load(cache).sequences < spec.sequences:
        write_tokens(cache, source, load_tokenizer(spec.model, revision))
    for group, blocks in cache.missing(layers).items():
        model = ResidualModel(load_model(spec.model, revision, spec.precision, head=False), group, config.device)
        if model.d_model != spec.d_model:
            raise UserError(f"{spec.model} is {model.d_model} wide, the cache expects {spec.d_model}: name the right --model")
        announce(config.device)
        harvest_blocks(cache, model, blocks, config)


def harvest_blocks(cache: Cache, model: ResidualModel, blocks: list[int], config: HarvestConfig) -> "Shares":
    """Run `model` over these blocks and commit them; returns where the time went."""
    spec = cache.spec
    shares = Shares()
    title = f"harvesting layers {format_layers(model.layers)}"
    already = spec.n_blocks - len(blocks)
    with Progress(title, spec.n_blocks * spec.block_rows, "tokens", start=already * spec.block_rows) as progress:

        def committed(block: int) -> None:
            progress.advance(spec.block_rows, str(shares))

        cuda = config.device.type == "cuda"
        with (
            BlockWriter(cache, model.layers, config.writer, pinned=cuda, done=committed) as writer,
            ThreadPoolExecutor(1, "inputs") as reader,
        ):
            fill = (_CudaFiller if cuda else _CpuFiller)(cache, model, config, shares)
            began = time.perf_counter()
            for inputs in _read_ahead(cache, blocks, reader):
                fill.fill(inputs, writer.buffer(), writer)
                shares.total = time.perf_counter() - began
        fill.finish()
        shares.total = time.perf_counter() - began
    return shares


@dataclass(kw_only=True, frozen=True, slots=True)
class _Inputs:
    """What the forward pass of a block needs."""

    block: int
    tokens: Tensor  # int64 [block_sequences, context]
    place: Tensor  # int64 [block_rows]: where in the block each activation goes

    @classmethod
    def read(cls, cache: Cache, block: int) -> "_Inputs":
        place = np.argsort(cache.block_order(block), kind="stable")
        return cls(block=block, tokens=torch.from_numpy(cache.block_tokens(block)), place=torch.from_numpy(place))


def _read_ahead(cache: Cache, blocks: list[int], reader: ThreadPoolExecutor) -> Iterator[_Inputs]:
    """The inputs of every block; those of the next one are read while one is used."""
    coming = (reader.submit(_Inputs.read, cache, block) for block in blocks)
    following = next(coming, None)
    while (now := following) is not None:
        following = next(coming, None)
        yield now.result()


@dataclass(kw_only=True, slots=True)
class Shares:
    """Where a harvest's seconds went: in the language model, in rows on their way to the writer's buffer, and the rest.

    On CUDA the first two are the device's own and overlap; `forward` has the float16 and the order in it, `copy` is the
    transfer to the host, and the rest is the time in which the device had nothing to run.
    """

    forward: float = 0.0
    copy: float = 0.0
    total: float = 0.0
    overlap: bool = False

    @property
    def wait(self) -> float:
        return max(0.0, self.total - self.forward - (0.0 if self.overlap else self.copy))

    def __str__(self) -> str:
        total = max(self.total, 1e-9)
        copy = f"copy {self.copy / total:.0%}{' beside it' if self.overlap else ''}"
        return f"forward {self.forward / total:.0%}, {copy}, waiting for the disk {self.wait / total:.0%}"


class _CpuFiller:
    """The forward pass puts every layer's rows at their places in the writer's buffer."""

    def __init__(self, cache: Cache, model: ResidualModel, config: HarvestConfig, shares: Shares) -> None:
        self._cache, self._model, self._shares = cache, model, shares
        self._index = {layer: i for i, layer in enumerate(model.layers)}
        most = max(1, _CPU_TOKENS // cache.spec.context)
        self._step = min(config.forward_sequences, most) if config.device.type == "cpu" else config.forward_sequences

    def fill(self, inputs: _Inputs, buffer: Buffer, writer: BlockWriter) -> None:
        began, copied = time.perf_counter(), self._shares.copy
        self._run(inputs, buffer.data, buffer.nonfinite)
        self._shares.forward += time.perf_counter() - began - (self._shares.copy - copied)
        writer.submit(inputs.block, buffer)

    def finish(self) -> None:
        """Called when every block is written."""

    def _run(self, inputs: _Inputs, data: Tensor, nonfinite: Tensor) -> None:
        """data float16 [layers, block_rows, d_model], nonfinite int64 [layers], both on the model's device."""
        spec, step = self._cache.spec, self._step
        tokens, place = send(inputs.tokens, data.device), send(inputs.place, data.device)
        nonfinite.zero_()
        for first in range(0, spec.block_sequences, step):
            rows = place[first * spec.context : (first + step) * spec.context]

            def store(layer: int, output: Tensor, rows: Tensor = rows) -> None:
                began = time.perf_counter()
                nonfinite[self._index[layer]] += put_rows(output.reshape(-1, spec.d_model), rows, data[self._index[layer]])
                if data.device.type == "cpu":  # elsewhere this only queues it
                    self._shares.copy += time.perf_counter() - began

            self._model.run(tokens[first : first + step], store)


class _CudaFiller(_CpuFiller):
    """Rows are permuted on the device; a block is copied to pinned memory on a stream of its own while the next runs."""

    def __init__(self, cache: Cache, model: ResidualModel, config: HarvestConfig, shares: Shares) -> None:
        super().__init__(cache, model, config, shares)
        shares.overlap = True
        self._device, self._stream = config.device, new_stream(config.device)
        self._slots = [_Slot.empty(cache.spec, len(model.layers), config.device) for _ in range(2)]
        self._turns = itertools.cycle(self._slots)

    def fill(self, inputs: _Inputs, buffer: Buffer, writer: BlockWriter) -> None:
        slot = next(self._turns)
        self._account(slot)
        compute = torch.cuda.current_stream(self._device)
        slot.began.record(compute)
        self._run(inputs, slot.data, slot.nonfinite)
        slot.ran.record(compute)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.ran)
            slot.copying.record(self._stream)
            buffer.data.copy_(slot.data, non_blocking=True)
            buffer.nonfinite.copy_(slot.nonfinite, non_blocking=True)
            slot.copied.record(self._stream)
            arrived = new_event()  # of this block alone: the slot's events are recorded again
            arrived.record(self._stream)
        slot.used = True
        writer.submit(inputs.block, buffer, arrived.synchronize)

    def _account(self, slot: "_Slot") -> None:
        """Waits for the copy that last used the slot (another block is queued behind it) and takes its times."""
        if slot.used:
            slot.copied.synchronize()
            self._shares.forward += slot.began.elapsed_time(slot.ran) / 1e3
            self._shares.copy += slot.copying.elapsed_time(slot.copied) / 1e3
            slot.used = False

    def finish(self) -> None:
        for slot in self._slots:
            self._account(slot)


@dataclass(kw_only=True, slots=True)
class _Slot:
    """A block of all layers on the device, and when it was computed and copied."""

    data: Tensor
    nonfinite: Tensor
    began: torch.cuda.Event
    ran: torch.cuda.Event
    copying: torch.cuda.Event
    copied: torch.cuda.Event
    used: bool = False

    @classmethod
    def empty(cls, spec: CacheSpec, layers: int, device: torch.device) -> "_Slot":
        began, ran, copying, copied = (new_event(timing=True) for _ in range(4))
        return cls(
            data=torch.empty(layers, spec.block_rows, spec.d_model, dtype=torch.float16, device=device),
            nonfinite=torch.zeros(layers, dtype=torch.int64, device=device),
            began=began, ran=ran, copying=copying, copied=copied,
        )  # fmt: skip


def verify(cache: Cache, layers: tuple[int, ...], threads: int) -> tuple[list[tuple[int, int, str]], list[str]]:
    """Read everything committed and compare checksums. Returns (bad blocks as (layer, block, why), other damage)."""
    spec = cache.spec
    work = [(layer, block) for layer in layers for block in sorted(cache.committed(layer))]
    bad: list[tuple[int, int, str]] = []

    def check(item: tuple[int, int]) -> tuple[int, int, str] | None:
        layer, block = item
        data = np.empty((spec.block_rows, spec.d_model), dtype=np.float16)
        try:
            cache.read_block(layer, block, data)
            cache.check_block(layer, block, data, cache.stats(layer, block))
        except UserError as error:
            return layer, block, str(error)
        return None

    with Progress("verifying", len(work) * spec.block_bytes, "bytes") as progress, ThreadPoolExecutor(threads) as pool:
        for result in pool.map(check, work):
            progress.advance(spec.block_bytes, f"{len(bad)} damaged" if bad else "")
            if result is not None:
                bad.append(result)
    return bad, _bad_token_chunks(cache)


def _bad_token_chunks(cache: Cache) -> list[str]:
    damage = []
    for chunk, expected in enumerate(TokenLedger.load(cache).chunks):
        path = cache.token_chunk_path(chunk)
        if not path.exists() or crc32c(np.fromfile(path, dtype=np.uint8)) != expected:
            damage.append(f"token chunk {chunk}")
    return damage


def repair(
    cache: Cache,
    bad: list[tuple[int, int]],
    tokens: bool,
    source: TextSource,
    revision: str | None,
    config: HarvestConfig,
) -> None:
    """Harvest the given (layer, block) pairs again, and the token array first if it is damaged."""
    if tokens:
        cache.token_ledger.unlink()
        write_tokens(cache, source, load_tokenizer(cache.spec.model, revision))
    for layer, block in bad:
        cache.forget(block, (layer,))
    harvest(cache, cache.layers, source, revision, config)
