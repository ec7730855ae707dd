"""The cache's hot paths: writing it, the loader alone, and training from it, beside raw reads and writes of the same files. An
empty folder, full buffers and a cold page cache are made before the clock starts."""

import itertools
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from bench import limits, steps
from bench.harness import Comparison, Contender, timed
from bench.peers import WRITERS
from bench.setup import Setup
from bench.steps import WAYS, Steps
from residual_saes.harvest.writer import BlockWriter, WriterConfig
from residual_saes.shared import files
from residual_saes.shared.cache import Cache, CacheSpec, Stored
from residual_saes.shared.sites import Site
from residual_saes.train.loader import ActivationLoader, LoaderConfig


def cache_spec(*, d: int, n_layers: int, context: int, sequences: int, blocks: int, vocab: int = 50_304) -> CacheSpec:
    """A cache of so many blocks of so many contexts, none of them held out."""
    return CacheSpec(
        model="random", model_revision="", dataset="random", dataset_revision="", split="", text_column="",
        tokenizer_sha256="", separator=0, context=context, d_model=d, n_layers=n_layers, vocab_size=vocab,
        block_sequences=sequences, n_blocks=blocks, holdout_blocks=0, seed=0, precision="bf16",
    )  # fmt: skip


def new_cache(path: Path, spec: CacheSpec) -> Cache:
    shutil.rmtree(path, ignore_errors=True)
    return Cache.create(path, spec, tuple(map(Site, range(spec.n_layers))))


def cache_with_tokens(path: Path, spec: CacheSpec) -> Cache:
    """A new cache whose token array is filled at random."""
    cache = new_cache(path, spec)
    for chunk in range(spec.token_chunks):
        tokens = torch.randint(0, spec.vocab_size, (spec.token_chunk, spec.context))
        cache.tokens.commit(chunk, tokens.numpy().astype(spec.token_dtype), {}, 0)
    return cache


def empty(cache: Cache) -> None:
    """Removes every block and its ledger entry; the folders and the tokens stay. New folders' files land on parts of the disk
    that were never written, and on a virtual disk the first write to a place is several times slower than the next."""
    for site in cache.sites:
        for file in cache.block_path(site, 0).parent.glob("c.*"):
            file.unlink()
    for block in range(cache.spec.n_blocks):
        cache.ledger.entry_path(cache.sites, block).unlink(missing_ok=True)


def block_files(cache: Cache) -> list[Path]:
    return [cache.block_path(site, block) for block in range(cache.spec.n_blocks) for site in cache.sites]


def size(cache: Cache) -> int:
    """Bytes of all activations."""
    return cache.spec.block_bytes * len(block_files(cache))


def write_cache(cache: Cache, threads: int) -> float:
    """Write and commit every block of a cache from buffers that are full already; the seconds it took."""
    spec = cache.spec
    config = WriterConfig(threads=threads, buffers=min(2, spec.n_blocks))
    with BlockWriter(cache, cache.sites, config, pinned=False, done=lambda block: None) as writer:
        buffers = [writer.buffer() for _ in range(config.buffers)]
        for buffer in buffers:
            limits.fill_random(buffer.data)
        start = time.perf_counter()
        for block in range(spec.n_blocks):
            writer.submit(block, buffers[block] if block < config.buffers else writer.buffer())
    return time.perf_counter() - start


def past_page_cache(before: Mapping[str, int]) -> str:
    """How this process has moved bytes since `files.moved` was that."""
    direct, buffered = (files.moved[way] - before.get(way, 0) for way in ("direct", "buffered"))
    return f"{direct / max(1, direct + buffered):.0%} past the page cache"


def writing(setup: Setup) -> Comparison:
    spec = cache_spec(
        d=setup.d, n_layers=setup.layers, context=setup.context, sequences=setup.sequences, blocks=setup.write_blocks
    )  # fmt: skip
    cache, before = new_cache(setup.disk / "written", spec), dict(files.moved)
    narrow = new_cache(setup.disk / "narrow", replace(spec, store="int8"))

    def run(cache: Cache) -> float:
        empty(cache)
        return write_cache(cache, setup.threads)

    def note() -> str:
        block, buffers = spec.block_bytes * spec.n_layers, min(2, spec.n_blocks)
        return (
            f"{spec.n_layers} layers, blocks of {spec.block_bytes / 1e6:.1f} MB a layer, checksums, moments and ledger "
            f"included; buffers hold {buffers} x {block / 1e9:.2f} GB; {past_page_cache(before)}"
        )

    payload = size(cache)
    with ExitStack() as stack:
        peers, absent = steps.start_peers(stack, WRITERS, setup, tokens=payload // 2 // setup.d, work=payload)
        ours = Contender(name="ours", role="ours", work=payload, run=partial(run, cache), note=note)
        narrowed = Contender(name="ours, stored as int8", role="ours", key="int8", work=payload, run=partial(run, narrow))
        raw = _raw("write", cache, setup.threads)
        name = f"Cache write, {payload / 1e6:.0f} MB of fp16, durable"
        return setup.compare("writing", name, "bytes", [ours, narrowed, *raw, *peers], absent=absent)


def _raw(word: str, cache: Cache, threads: int) -> list[Contender]:
    """Buffered and, where a block is whole pages, direct: either can be the faster, and ours stands against that one."""
    prepare = empty if word == "write" else evict_blocks
    spec, paths = cache.spec, block_files(cache)

    def run(direct: bool) -> float:
        prepare(cache)
        return limits.raw(paths, spec.block_bytes, threads, direct=direct, write=word == "write")

    return [
        Contender(
            name=f"raw {word} of the same files, {'direct' if direct else 'buffered'}, {threads} threads", role="limit",
            key="direct" if direct else "buffered", against=("",), work=size(cache), run=partial(run, direct),
        )
        for direct in (False, True)
        if not direct or spec.block_bytes % files.PAGE == 0
    ]  # fmt: skip


def evict_blocks(cache: Cache) -> None:
    for path in block_files(cache):
        limits.evict(path)


# ----------------------------------------------------------------------------------------------------------- loader


def one_layer(setup: Setup, folder: Path, *, sequences: int, blocks: int, store: Stored = "float16") -> Cache:
    spec = cache_spec(d=setup.d, n_layers=1, context=setup.context, sequences=sequences, blocks=blocks)
    cache = new_cache(folder / f"layer-{store}", replace(spec, store=store))
    write_cache(cache, setup.threads)
    return cache


def new_loader(setup: Setup, cache: Cache, window: int) -> ActivationLoader:
    """Of one epoch."""
    config = LoaderConfig(batch=setup.tokens, window_blocks=window)
    return ActivationLoader(cache, Site(0), config, setup.device, last=cache.spec.train_tokens // setup.tokens)


def reading(setup: Setup) -> Comparison:
    contenders = []
    for where, folder in setup.folders:
        cache = one_layer(setup, folder, sequences=setup.sequences, blocks=setup.read_blocks)
        narrow = one_layer(setup, folder, sequences=setup.sequences, blocks=setup.read_blocks, store="int8")
        contenders += [_loader_alone(setup, each, where, size(cache)) for each in (cache, narrow)]
        if where == "disk":  # by as many threads as the loader has
            contenders += _raw("read", cache, LoaderConfig(batch=1).threads)
    name = f"Cache read, {contenders[0].work / 1e6:.0f} MB, cold page cache"
    return setup.compare("reading", name, "bytes", contenders, min(2, setup.rounds) if setup.gpu else 0)


def _loader_alone(setup: Setup, cache: Cache, where: str, work: int) -> Contender:
    """One pass over a cache of one layer, which as float16 is of `work` bytes; windows are kept, as they are through a run."""
    loader, before, shares = new_loader(setup, cache, setup.window_blocks), dict(files.moved), list[float]()

    def run() -> float:
        if where == "disk":
            evict_blocks(cache)
        waited = loader.waited
        seconds = timed(lambda: [None for _ in loader], setup.device)
        shares.append((loader.waited - waited) / seconds)
        return seconds

    def note() -> str:
        window = 2 * setup.window_blocks * cache.spec.block_bytes
        return (
            f"checksums on, shuffled batches of {setup.tokens}; windows hold {window / 1e9:.2f} GB; nothing trains, so the "
            f"consumer waits {statistics.median(shares):.0%} of the time; {past_page_cache(before)}"
        )

    store = cache.spec.store
    key = " ".join(word for word in (where, store) if word not in ("disk", "float16"))
    name = f"ours, from {where}" + f", stored as {store}" * (store != "float16")
    return Contender(name=name, role="ours", key=key, work=work, run=run, note=note)


# --------------------------------------------------------------------------------------------------------- training


@dataclass(kw_only=True, slots=True)
class Training:
    """A round trains SAEs from a cold cache to the cache's end.

    On a CPU the loader is made within the round, so its first window is waited for within it too, and what is not spent in
    steps is counted. On a GPU steps are queued, so they stand beside as many on a batch that is there; the clock starts after
    the first window, which a layer of the full job has once and nothing to hide behind.
    """

    setup: Setup
    cache: Cache
    steps: Steps
    cold: bool
    shares: dict[str, list[float]] = field(default_factory=dict)  # of each round: what was not spent in steps, and why

    @property
    def first(self) -> int:
        """Batches before the clock starts."""
        spec = self.cache.spec
        return self.setup.stream_window * spec.block_rows // self.setup.tokens if self.setup.gpu else 0

    @property
    def batches(self) -> int:
        return self.cache.spec.train_tokens // self.setup.tokens - self.first

    def run(self) -> float:
        if self.cold:
            evict_blocks(self.cache)
        device, stepping = self.setup.device, 0.0
        start = time.perf_counter()
        loader = new_loader(self.setup, self.cache, self.setup.stream_window)
        batches = iter(loader)
        if self.setup.gpu:
            self.steps.take(itertools.islice(batches, self.first))
            return timed(lambda: self.steps.take(batches), device)
        first = None
        for x in batches:
            first = first or time.perf_counter() - start
            stepping += timed(partial(self.steps.take, [x]), device)
        seconds = time.perf_counter() - start
        parts = {"idle": seconds - stepping, "until the first batch": first or 0.0, "no window ready": loader.waited}
        for name, part in parts.items():
            self.shares.setdefault(name, []).append(part / seconds)
        return seconds

    def ready(self) -> float:
        """As many steps on a batch that is there."""
        x = self.steps.batch()
        return timed(lambda: self.steps.take(itertools.repeat(x, self.batches)), self.setup.device)

    def figures(self) -> Mapping[str, float]:
        return {name: statistics.median(shares[1:]) for name, shares in self.shares.items()}  # the first is the warm-up

    def note(self) -> str:
        windows = 2 * self.setup.stream_window * self.cache.spec.block_bytes
        shares = ", ".join(f"{name} {share:.2%}" for name, share in self.figures().items())
        return f"{shares}{'; ' * bool(shares)}the loader's windows hold {windows / 1e6:.0f} MB"


def stream(setup: Setup) -> Comparison:
    """Training as `train` does it, loader and steps, from a cold cache."""
    contenders, saes = [], setup.stream_saes
    room = steps.workspace(setup, saes)
    for where, folder in setup.folders:
        cache = one_layer(setup, folder, sequences=setup.stream_block, blocks=setup.stream_blocks)
        for way in WAYS:
            trained = Steps(saes=steps.new_saes(setup, way, saes), workspace=room, tokens=setup.tokens)
            training = Training(setup=setup, cache=cache, steps=trained, cold=where == "disk")
            key, work = way if where == "disk" else f"{way} from {where}", saes * training.batches * setup.tokens
            ours = Contender(
                name=f"ours, {saes} {way} setting{'s' * (saes > 1)} from {where}", role="ours", key=key, work=work,
                run=training.run, note=training.note, figures=training.figures,
            )  # fmt: skip
            base = replace(ours, name=f"the same on batches that are there, {key}", role="base", run=training.ready, note="")
            contenders += [ours, *[replace(base, against=(key,), figures=dict)] * setup.gpu]
    name = f"Training from a cold cache, {training.batches} batches of {setup.tokens}"
    return setup.compare("stream", name, "tokens", contenders, min(2 if setup.gpu else 3, setup.rounds))
