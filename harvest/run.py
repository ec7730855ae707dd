"""The harvest: a source's activations of every block that the cache lacks, in order, written and committed.

On CUDA three things overlap: the forward pass of one block, the copy of the block before to pinned memory, and the writing of
those before that. On a CPU rows go straight into the writer's buffer. Tokens and order of the next block are read meanwhile.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from residual_saes.harvest.origin import Origin
from residual_saes.harvest.rows import put_rows
from residual_saes.harvest.source import ActivationSource
from residual_saes.harvest.writer import BlockWriter, Buffer, WriterConfig
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.device import maker, new_event, new_stream, send
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.shuffle import block_turns, permutation
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.units import ALONE, Shard, format_seconds

_CPU_TOKENS = 2048  # of one forward pass on a CPU: more of them only leave its caches
_RECOUNT = 15.0  # seconds between looks at what other harvests have done meanwhile
_POLL, _LATE = 1.0, 60.0  # seconds between looks for tokens, and after which it is said that none came
_PATIENCE = 600.0  # seconds without new tokens, times a shard's number, after which it writes them itself


@dataclass(kw_only=True, frozen=True, slots=True)
class HarvestConfig:
    """How to run a harvest; nothing here changes what is written."""

    device: torch.device
    forward_sequences: int = 32
    writer: WriterConfig = field(default_factory=WriterConfig)
    shard: Shard = ALONE


def harvest(cache: Cache, sites: tuple[Site, ...], origin: Origin, config: HarvestConfig) -> None:
    """Bring the cache to the state where every block of every wanted site is committed. Safe to kill and repeat.

    Of several shards the first one writes the tokens. Blocks are not claimed: a shard's own come first, and a shard that is
    done helps the others.
    """
    if config.shard.index:
        await_tokens(cache, config.shard)
    if cache.tokens.missing():
        origin.write_tokens(cache)
    for group, blocks in cache.missing(sites).items():
        source = origin.source(cache.spec, group, config.device)
        harvest_blocks(cache, source, in_turn(cache.spec, blocks, config.shard), config)


def await_tokens(cache: Cache, shard: Shard) -> None:
    """Wait until another process has written all tokens, or seems to have gone: then this one writes them, which is harmless
    if it has not. Raises UserError where it has taken the cache away."""
    n, came, patience = cache.spec.token_chunks, time.monotonic(), shard.index * _PATIENCE
    if (done := n - len(cache.tokens.missing())) == n:
        return
    say(f"shard {shard} waits until shard 0/{shard.count} has written the tokens", err=True)
    with Progress("waiting for tokens", n, "chunks", start=done) as progress:
        while done < n and time.monotonic() - came < patience:
            if not Cache.exists(cache.path):
                raise UserError(
                    f"shard 0/{shard.count} has given up {cache.path}: do what it says, then start all shards again"
                )
            quiet = time.monotonic() - came
            progress.update(done, f"nothing came for {format_seconds(quiet)}: is shard 0 running?" * (quiet > _LATE))
            time.sleep(_POLL)
            now = n - len(cache.tokens.missing())
            done, came = now, came if now == done else time.monotonic()
        progress.update(done)
    if done < n:
        say(f"nothing came for {format_seconds(patience)}: shard {shard} writes the tokens itself", err=True)


def in_turn(spec: CacheSpec, blocks: list[int], shard: Shard) -> list[int]:
    """These blocks in the order of a shard: its own as training reads them, then those of the others in an order that is its
    own, so that shards with nothing left of theirs seldom meet."""
    order = block_turns(spec.n_blocks, spec.train_blocks, spec.slices, seed=spec.seed)
    wanted = set(blocks)
    own = [block for block in order[shard.index :: shard.count].tolist() if block in wanted]
    others = sorted(wanted.difference(own))
    return own + [others[i] for i in permutation(len(others), shard.index, shard.count)]


def harvest_blocks(
    cache: Cache, source: ActivationSource, blocks: list[int], config: HarvestConfig, *, replace: bool = False
) -> "Shares":
    """Commit these blocks of the source's sites; returns where the time went. Their tokens are in the cache.

    Blocks that another harvest commits meanwhile are passed over, unless they are to be replaced. Raises UserError.
    """
    spec, sites, shares = cache.spec, source.sites, Shares()
    if source.d_model != spec.d_model:
        raise UserError(f"activations are {source.d_model} wide, the cache expects {spec.d_model}: name the right --model")
    done, counted = spec.n_blocks - len(blocks), time.monotonic()
    title, rows = f"harvesting layers {format_sites(sites)}", spec.block_rows
    with Progress(title, spec.n_blocks * rows, "tokens", start=done * rows) as progress:

        def count() -> int:
            """The blocks that are committed by now, whoever made them."""
            return spec.n_blocks - sum(map(len, cache.missing(sites[:1]).values()))

        def committed(block: int) -> None:
            nonlocal done, counted
            done += 1
            if time.monotonic() - counted > _RECOUNT and not replace:
                done, counted = count(), time.monotonic()
            progress.update(done * rows, str(shares))

        cuda, by = source.device.type == "cuda", maker(source.device)
        with (
            BlockWriter(cache, sites, config.writer, pinned=cuda, done=committed, replace=replace, by=by) as writer,
            ThreadPoolExecutor(1, "inputs") as reader,
        ):
            filler = (_CudaFiller if cuda else _Filler)(spec, source, config.forward_sequences, shares)
            began = time.perf_counter()
            wanted = (block for block in blocks if replace or not cache.has_block(sites, block))
            for inputs in _read_ahead(cache, wanted, reader):
                buffer = writer.buffer()
                buffer.tokens = inputs.checksum
                writer.submit(inputs.block, buffer, filler.fill(inputs, buffer))
                shares.total = time.perf_counter() - began
        filler.finish()
        shares.total = time.perf_counter() - began
        progress.update((done if replace else count()) * rows, str(shares))
    return shares


@dataclass(kw_only=True, frozen=True, slots=True)
class _Inputs:
    """What the forward pass of a block needs."""

    block: int
    tokens: Tensor  # int64 [block_sequences, context]
    checksum: str  # of the tokens
    place: Tensor  # int64 [block_rows]: the row of the block where each activation goes

    @classmethod
    def read(cls, cache: Cache, block: int) -> "_Inputs":
        place, tokens = np.argsort(cache.block_order(block), kind="stable"), cache.block_tokens(block)
        checksum = cache.tokens.checksum(tokens)
        return cls(block=block, tokens=torch.from_numpy(tokens), checksum=checksum, place=torch.from_numpy(place))


def _read_ahead(cache: Cache, blocks: Iterator[int], reader: ThreadPoolExecutor) -> Iterator[_Inputs]:
    """The inputs of every block; those of the next one are read while one is used."""
    coming = (reader.submit(_Inputs.read, cache, block) for block in blocks)
    following = next(coming, None)
    while (now := following) is not None:
        following = next(coming, None)
        yield now.result()


@dataclass(kw_only=True, slots=True)
class Shares:
    """Where a harvest's seconds went: in the source, in rows on their way to the writer's buffer, and the rest.

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


class _Filler:
    """Runs the source over a block, some sequences at a time, and puts every row at its place in the writer's buffer."""

    def __init__(self, spec: CacheSpec, source: ActivationSource, sequences: int, shares: Shares) -> None:
        self._spec, self._source, self._shares = spec, source, shares
        self._index = {site: i for i, site in enumerate(source.sites)}
        most = max(1, _CPU_TOKENS // spec.context)
        self._step = min(sequences, most) if source.device.type == "cpu" else sequences

    def fill(self, inputs: _Inputs, buffer: Buffer) -> Callable[[], None] | None:
        """Returns what waits until the buffer is full, where it is not full yet."""
        began, copied = time.perf_counter(), self._shares.copy
        self._run(inputs, buffer.data, buffer.nonfinite)
        self._shares.forward += time.perf_counter() - began - (self._shares.copy - copied)
        return None

    def finish(self) -> None:
        """Take the times of what ran last; called when every block is written."""

    def _run(self, inputs: _Inputs, data: Tensor, nonfinite: Tensor) -> None:
        """data float16 [sites, block_rows, d_model], nonfinite int64 [sites], both on the source's device."""
        spec, step, source = self._spec, self._step, self._source
        tokens, place = send(inputs.tokens, data.device), send(inputs.place, data.device)
        nonfinite.zero_()
        for first in range(0, spec.block_sequences, step):
            rows = place[first * spec.context : (first + step) * spec.context]

            def store(site: Site, output: Tensor, rows: Tensor = rows) -> None:
                began, index = time.perf_counter(), self._index[site]
                nonfinite[index] += put_rows(output.reshape(-1, spec.d_model), rows, data[index])
                if data.device.type == "cpu":  # elsewhere this only queues it
                    self._shares.copy += time.perf_counter() - began

            source.run(tokens[first : first + step], store, inputs.block * spec.block_sequences + first)


class _CudaFiller(_Filler):
    """Rows are permuted on the device; a block is copied to pinned memory on a stream of its own while the next runs."""

    def __init__(self, spec: CacheSpec, source: ActivationSource, sequences: int, shares: Shares) -> None:
        super().__init__(spec, source, sequences, shares)
        shares.overlap = True
        self._device, self._stream = source.device, new_stream(source.device)
        self._slots = [_Slot(spec, source) for _ in range(2)]
        self._turns = itertools.cycle(self._slots)

    def fill(self, inputs: _Inputs, buffer: Buffer) -> Callable[[], None]:
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
        return arrived.synchronize

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


class _Slot:
    """A block of all sites on the device, and when it was computed and copied."""

    def __init__(self, spec: CacheSpec, source: ActivationSource) -> None:
        sites, device = len(source.sites), source.device
        self.data = torch.empty(sites, spec.block_rows, spec.d_model, dtype=torch.float16, device=device)
        self.nonfinite = torch.zeros(sites, dtype=torch.int64, device=device)
        self.began, self.ran, self.copying, self.copied = (new_event(timing=True) for _ in range(4))
        self.used = False
