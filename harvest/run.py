"""The harvest: plan it, run it, check it, mend it.

On CUDA three things overlap: the forward pass of one block, the copy of the block before to pinned memory, and the
writing of those before that. On a CPU the hooks put rows straight into the writer's buffer. Tokens and order of the next
block are read meanwhile.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harvest.language_model import ResidualModel
from harvest.neox import put_rows
from harvest.pieces import TextSource
from harvest.tokens import write_tokens
from harvest.writer import BlockWriter, Buffer, WriterConfig
from shared.cache import LEDGER_BYTES_PER_LAYER, Cache, CacheSpec, LayerTotals
from shared.device import announce, maker, new_event, new_stream, send
from shared.errors import UserError
from shared.files import UNKNOWN_FREE, existing, write_all
from shared.identity import Model, tokenizer_hash
from shared.lm import load_model, load_tokenizer
from shared.progress import Progress, say
from shared.shuffle import block_turns, permutation
from shared.sites import Site, format_sites
from shared.stores import Location, open_store
from shared.units import ALONE, Shard, format_bytes, format_seconds

_PROBE_BYTES = 64 << 20
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


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """Bytes and time of a harvest that has not begun."""

    spec: CacheSpec
    sites: tuple[Site, ...]
    layer_bytes: int
    total_bytes: int
    free: int
    write_rate: float | None  # bytes per second, measured; a bucket is not tried

    def __str__(self) -> str:
        s = self.spec
        fits = max(0, int((self.free - s.token_bytes) // self.layer_bytes))
        return "\n".join(
            (
                f"tokens      {s.n_blocks * s.block_rows:,} ({s.train_tokens:,} to train on, the rest held out)",
                f"blocks      {s.n_blocks:,} of {s.block_rows:,} rows, {format_bytes(s.block_bytes)} a layer",
                f"per layer   {format_bytes(self.layer_bytes)} ({self.layer_bytes:,} bytes)",
                f"in all      {format_bytes(self.total_bytes)} ({self.total_bytes:,} bytes) for {len(self.sites)} layers",
                "free disk   unknown: the file system does not say"
                if self.free == UNKNOWN_FREE
                else f"free disk   {format_bytes(self.free)}: room for {min(fits, 10**6):,} layers of this size",
                "write probe none: nothing is sent to a bucket to find out"
                if self.write_rate is None
                else f"write probe {format_bytes(self.write_rate)}/s: writing takes at least "
                f"{format_seconds(self.total_bytes / self.write_rate)}",
            )
        )


def planned_bytes(spec: CacheSpec, sites: tuple[Site, ...]) -> int:
    """What a harvest of these layers writes, ledger included."""
    ledger = spec.n_blocks * LEDGER_BYTES_PER_LAYER * len(sites)
    return spec.n_blocks * spec.block_bytes * len(sites) + spec.token_bytes + ledger


def make_plan(path: Location, spec: CacheSpec, sites: tuple[Site, ...], threads: int) -> Plan:
    return Plan(
        spec=spec,
        sites=sites,
        layer_bytes=spec.n_blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER),
        total_bytes=planned_bytes(spec, sites),
        free=open_store(path).free(),
        write_rate=probe_write(path, threads) if isinstance(path, Path) else None,
    )


def probe_write(path: Path, threads: int, seconds: float = 2.0) -> float:
    """Bytes per second of durable writes by `threads` threads at `path`, over about two seconds.

    Writes to files without a name in the nearest folder that is there, so that nothing of it can stay. Raises UserError.
    """
    data = np.random.default_rng(0).integers(0, 255, _PROBE_BYTES, dtype=np.uint8)
    folder = existing(path)
    began = time.perf_counter()

    def write(_: int) -> int:
        written = 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            while not written or time.perf_counter() - began < seconds:
                file.seek(0)
                write_all(file.fileno(), data.data)
                written += data.nbytes
        return written

    try:
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(write, range(threads)))
        return total / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from None


def remaining_bytes(cache: Cache, sites: tuple[Site, ...], *, freed: bool = False) -> int:
    """What a harvest of these layers still writes; with `freed` also what was freed of them."""
    spec = cache.spec
    blocks = sum(len(group) * len(blocks) for group, blocks in cache.missing(sites, freed=freed).items())
    tokens = len(cache.tokens.missing()) * spec.token_bytes // spec.token_chunks
    return blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER) + tokens


def require_space(path: Location, needed: int) -> None:
    free = open_store(path).free()
    if needed > free:
        raise UserError(
            f"the harvest needs {format_bytes(needed)} more at {path}, and {format_bytes(free)} are free: "
            "harvest fewer --layers or --tokens, or choose a larger disk; `python -m harvest plan` says what fits"
        )


def harvest(cache: Cache, sites: tuple[Site, ...], source: TextSource, model: Model, config: HarvestConfig) -> None:
    """Bring the cache to the state where every block of every wanted layer is committed. Safe to kill and repeat.

    Model and text are those that the cache was compared with; nothing is loaded from anywhere else. Of several shards the
    first one tokenises. There are no claims: a shard's own blocks come first, and who is done helps the others.
    """
    if config.shard.index:
        await_tokens(cache, config.shard)
    if cache.tokens.missing():
        write_tokens(cache, source, load_tokenizer(str(model.folder), None))
    for group, blocks in cache.missing(sites).items():
        harvest_blocks(cache, load_residual(cache, group, model, config), in_turn(cache.spec, blocks, config.shard), config)


def await_tokens(cache: Cache, shard: Shard) -> None:
    """Returns when another process has written all tokens, or seems to have gone: then they are written here, which is harmless
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
    """These blocks as a shard does them: its own in the order in which training reads them, then those of the others in an
    order that is its own, so that shards with nothing left of theirs seldom meet."""
    order = block_turns(spec.n_blocks, spec.train_blocks, spec.slices, seed=spec.seed)
    wanted = set(blocks)
    mine = [block for block in order[shard.index :: shard.count].tolist() if block in wanted]
    others = sorted(wanted.difference(mine))
    return mine + [others[i] for i in permutation(len(others), shard.index, shard.count)]


def load_residual(cache: Cache, sites: tuple[Site, ...], model: Model, config: HarvestConfig) -> ResidualModel:
    spec = cache.spec
    loaded = ResidualModel(load_model(str(model.folder), None, spec.precision, head=False), sites, config.device)
    if loaded.d_model != spec.d_model:
        raise UserError(f"{model.name} is {loaded.d_model} wide, the cache expects {spec.d_model}: name the right --model")
    announce(config.device)
    return loaded


def harvest_blocks(
    cache: Cache, model: ResidualModel, blocks: list[int], config: HarvestConfig, *, replace: bool = False
) -> "Shares":
    """Run `model` over these blocks and commit them; returns where the time went.

    Blocks that another harvest commits meanwhile are passed over, unless they are to be replaced.
    """
    spec = cache.spec
    shares = Shares()
    title = f"harvesting layers {format_sites(model.sites)}"
    done, counted = spec.n_blocks - len(blocks), time.monotonic()
    with Progress(title, spec.n_blocks * spec.block_rows, "tokens", start=done * spec.block_rows) as progress:

        def count() -> int:
            """The blocks that are there by now, whoever made them."""
            return spec.n_blocks - sum(map(len, cache.missing(model.sites[:1]).values()))

        def committed(block: int) -> None:
            nonlocal done, counted
            done += 1
            if time.monotonic() - counted > _RECOUNT and not replace:
                done, counted = count(), time.monotonic()
            progress.update(done * spec.block_rows, str(shares))

        cuda = config.device.type == "cuda"
        with (
            BlockWriter(
                cache, model.sites, config.writer, pinned=cuda, done=committed, replace=replace, by=maker(config.device)
            ) as writer,
            ThreadPoolExecutor(1, "inputs") as reader,
        ):
            fill = (_CudaFiller if cuda else _CpuFiller)(cache, model, config, shares)
            began = time.perf_counter()
            wanted = (block for block in blocks if replace or not cache.has_block(model.sites, block))
            for inputs in _read_ahead(cache, wanted, reader):
                buffer = writer.buffer()
                buffer.tokens = inputs.checksum
                fill.fill(inputs, buffer, writer)
                shares.total = time.perf_counter() - began
        fill.finish()
        shares.total = time.perf_counter() - began
        progress.update((done if replace else count()) * spec.block_rows, str(shares))
    return shares


@dataclass(kw_only=True, frozen=True, slots=True)
class _Inputs:
    """What the forward pass of a block needs."""

    block: int
    tokens: Tensor  # int64 [block_sequences, context]
    checksum: str  # of the tokens
    place: Tensor  # int64 [block_rows]: where in the block each activation goes

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
        self._index = {site: i for i, site in enumerate(model.sites)}
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

            def store(site: Site, output: Tensor, rows: Tensor = rows) -> None:
                began = time.perf_counter()
                nonfinite[self._index[site]] += put_rows(output.reshape(-1, spec.d_model), rows, data[self._index[site]])
                if data.device.type == "cpu":  # elsewhere this only queues it
                    self._shares.copy += time.perf_counter() - began

            self._model.run(tokens[first : first + step], store)


class _CudaFiller(_CpuFiller):
    """Rows are permuted on the device; a block is copied to pinned memory on a stream of its own while the next runs."""

    def __init__(self, cache: Cache, model: ResidualModel, config: HarvestConfig, shares: Shares) -> None:
        super().__init__(cache, model, config, shares)
        shares.overlap = True
        self._device, self._stream = config.device, new_stream(config.device)
        self._slots = [_Slot.empty(cache.spec, len(model.sites), config.device) for _ in range(2)]
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
    def empty(cls, spec: CacheSpec, sites: int, device: torch.device) -> "_Slot":
        began, ran, copying, copied = (new_event(timing=True) for _ in range(4))
        return cls(
            data=torch.empty(sites, spec.block_rows, spec.d_model, dtype=torch.float16, device=device),
            nonfinite=torch.zeros(sites, dtype=torch.int64, device=device),
            began=began, ran=ran, copying=copying, copied=copied,
        )  # fmt: skip


def warnings_of_overflow(totals: dict[Site, LayerTotals]) -> list[str]:
    """A line for each layer with values that float16 cannot hold."""
    return [
        f"layer {site!s:>2}: WARNING: {layer.nonfinite:,} values did not fit float16 (stored as 0 or ±65504)"
        for site, layer in totals.items()
        if layer.nonfinite
    ]


def notes_on_mixing(totals: dict[Site, LayerTotals]) -> list[str]:
    """A line for each set of layers whose blocks were made on machines of more than one kind."""
    mixed: dict[str, list[Site]] = {}
    for site, total in totals.items():
        if total.mixed:
            mixed.setdefault(total.mixed, []).append(site)
    return [
        f"note: the blocks of layers {format_sites(sites)} were made on machines of several kinds ({what}): all are right, "
        "but their last bits are not those that one machine gives"
        for what, sites in mixed.items()
    ]


@dataclass(kw_only=True, slots=True)
class Damage:
    """What verification found, by name; {layer, block or chunk: a line for people}."""

    blocks: dict[tuple[Site, int], str] = field(default_factory=dict)
    chunks: dict[int, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [*self.blocks.values(), *self.chunks.values(), *(f"{key} is not as it was written" for key in self.metadata)]


def verify(cache: Cache, sites: tuple[Site, ...], threads: int) -> Damage:
    """Read everything committed and compare it with its checksums, and every block with the tokens that it is of."""
    spec, damage = cache.spec, Damage(metadata=cache.bad_metadata())
    work = [(site, block) for site in sites for block in sorted(cache.committed(site).intersection(cache.wanted(site)))]
    chunks = range(spec.token_chunks) if work else sorted(cache.tokens.written())
    for chunk in chunks:
        if why := _fails(partial(cache.tokens.read_chunk, chunk)):
            damage.chunks[chunk] = why

    def check(item: tuple[Site, int]) -> str | None:
        return _fails(partial(cache.whole_block, *item))

    with Progress("verifying", len(work) * spec.block_bytes, "bytes") as progress, ThreadPoolExecutor(threads) as pool:
        for item, why in zip(work, pool.map(check, work), strict=True):
            if why:
                damage.blocks[item] = why
            progress.advance(spec.block_bytes, f"{len(damage.blocks)} damaged" if damage.blocks else "")
    damage.blocks |= _of_other_tokens(cache, [item for item in work if item not in damage.blocks], set(damage.chunks))
    return damage


def _fails(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def _of_other_tokens(cache: Cache, items: list[tuple[Site, int]], damaged: set[int]) -> dict[tuple[Site, int], str]:
    """Blocks whose record says that they were made from other tokens than are there, where those are whole."""
    found, checksums = {}, dict[int, str]()
    per_chunk = cache.spec.token_chunk // cache.spec.block_sequences
    for site, block in sorted(items, key=lambda item: item[1]):
        if block // per_chunk in damaged:
            continue
        if block not in checksums:
            checksums[block] = cache.tokens.checksum(cache.block_tokens(block))
        if cache.stats(site, block).tokens != checksums[block]:
            found[site, block] = f"layer {site} block {block} of {cache.path} was made from other tokens than are there"
    return found


def require_same_text(cache: Cache, source: TextSource, model: Model) -> None:
    """Raises UserError unless text and tokeniser are those that the cache was made from."""
    tokenizer = load_tokenizer(str(model.folder), None)
    here = replace(
        cache.spec,
        dataset=source.dataset,
        dataset_revision=source.pinned_revision(),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        separator=tokenizer.eos_token_id,
    )
    if different := cache.spec.differences(here):
        raise UserError(
            f"{source.dataset} is not the text that {cache.path} was made from ({'; '.join(different)}), "
            "so nothing was changed: put it back, or name it with --dataset"
        )


def free(cache: Cache, sites: tuple[Site, ...]) -> None:
    """Remove the training blocks of these layers. Safe to kill and repeat: from its beginning on they count as freed."""
    cache.ledger.mark_freed(sites)
    work, size = [(site, block) for site in sites for block in cache.freeable(site)], cache.spec.block_bytes
    with Progress("freeing", len(work) * size, "bytes") as progress:
        for site, block in work:
            cache.free_block(site, block)
            progress.advance(size)


def repair(cache: Cache, damage: Damage, source: TextSource, model: Model, config: HarvestConfig) -> int:
    """Write again what is damaged, and nothing else; returns how many layer blocks that was.

    Model and text are compared with the cache's before a byte is touched, and what is there is replaced, never removed.
    """
    if damage.chunks:
        require_same_text(cache, source, model)
    cache.add_sites(())
    if damage.chunks:
        write_tokens(cache, source, load_tokenizer(str(model.folder), None), damage.chunks)
    committed = [(site, block) for site in cache.sites for block in cache.committed(site).intersection(cache.wanted(site))]
    bad = set(damage.blocks)
    bad |= set(_of_other_tokens(cache, [item for item in committed if item not in bad], set())) if damage.chunks else set()
    groups: dict[tuple[Site, ...], list[int]] = {}
    for block in sorted({block for _, block in bad}):
        groups.setdefault(tuple(sorted(site for site, at in bad if at == block)), []).append(block)
    for sites, blocks in groups.items():
        harvest_blocks(cache, load_residual(cache, sites, model, config), blocks, config, replace=True)
    return len(bad)
