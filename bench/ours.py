"""Our own hot paths, as contenders: the step, the cache writer, the loader, training from the cache, the harvest.

Each is the product's own code with nothing taken out. What a round needs (fresh random activations, filled buffers, an
empty folder, a cold page cache) is made before its clock starts, so every run here times itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.clock import Run, timed
from bench.peers import Load
from bench.report import Contender
from shared.files import PAGE, page_aligned
from shared.presets import get_preset
from shared.sites import Site
from train.kernels.base import Workspace
from train.layer import queues
from train.step import Begun, StepConfig, StepResult, TrainingSae, pick_kernels

# zarr and transformers are imported where they are needed: a GPU machine may have neither, and can still time the step.
if TYPE_CHECKING:
    from harvest.language_model import ResidualModel
    from harvest.run import HarvestConfig, Shares
    from shared.cache import Cache, CacheSpec

LR = 1e-9  # the whole of Adam's work, and an SAE that stays as sparse as it was set
L1 = 1e-5
L0 = 150
WAYS = ("dense", "sparse")
SETTINGS = 3
LAYERS = 24
CONTEXT, BLOCK_SEQUENCES = 1024, 32  # of a full-size block
READ_BATCH, READ_WINDOW = 4096, 16
READ_CALL = 4 << 20  # bytes of a direct read, a slice; a buffered one is faster in one piece
HARVEST_BLOCKS = 3  # enough for one to be written while the next is computed
TRAIN_BATCHES, TRAIN_WINDOW = 16, 2  # of a training round; blocks hold two batches


# ------------------------------------------------------------------------------------------------- step and settings


@dataclass(kw_only=True, slots=True)
class Steps:
    """A round is one step of each of these SAEs on each of `batches` batches of fresh activations."""

    saes: list[TrainingSae]
    workspace: Workspace
    tokens: int
    batches: int = 1
    keep: float | None = None
    result: StepResult | None = None  # the first SAE's last one

    def run(self) -> float:
        device = self.saes[0].device
        batches = [torch.randn(self.tokens, self.saes[0].d, device=device).half() for _ in range(self.batches)]
        return timed(lambda: self.take(batches), device)

    def take(self, batches: Iterable[Tensor]) -> int:
        """As the trainer does it, and every step to its end; the number of batches."""
        ahead, seen = queues(self.saes[0].device), 0
        begun: list[Begun | None] = [None] * len(self.saes)
        for half in batches:
            x = half if ahead else half.float()
            for which, sae in enumerate(self.saes):
                self._finish(which, begun)
                begun[which] = sae.begin(x, self.workspace, self.keep)
                if not ahead:
                    self._finish(which, begun)
            seen += 1
        for which in range(len(self.saes)):
            self._finish(which, begun)
        return seen

    def _finish(self, which: int, begun: list[Begun | None]) -> None:
        one, begun[which] = begun[which], None
        if one is not None:
            result = self.saes[which].finish(one, lr=LR, l1=L1, workspace=self.workspace)
            self.result = self.result if which else result

    def note(self) -> str:
        assert self.result is not None
        way = "sparse" if self.result.sparse else "dense"
        return f"{way} backward at L0 {self.result.l0:,.0f}, {type(self.saes[0].kernels).__name__}"


def new_saes(count: int, *, d: int, features: int, device: torch.device, way: str) -> list[TrainingSae]:
    """Equally active ones, so that they cost the same: what the published settings differ in is λ and L0."""
    kernels = pick_kernels("bf16", device)
    saes = [TrainingSae(d, features, StepConfig(), kernels, device, seed) for seed in range(count)]
    for sae in saes:
        go(sae, way, target_l0(features))
    return saes


def go(sae: TrainingSae, way: str, l0: float) -> None:
    """Which way is settled here, not by the number of active entries: each row shows one way. Dense ones stay at F / 2."""
    sae.config = replace(sae.config, sparse_below=float(way == "sparse"))
    sae.b_enc.zero_()
    if way == "sparse":
        set_l0(sae, l0)


def target_l0(features: int) -> int:
    """150, or less where that would not be sparse."""
    return min(L0, features // 20)


def set_l0(sae: TrainingSae, l0: float) -> None:
    """The encoder bias at which `l0` features fire on a token of N(0, 1) activations, all equally often."""
    x = torch.randn(64, sae.d, device=sae.device)
    pre = ((x - sae.b_pre) @ sae.w_enc.t()).flatten()
    keep = max(1, round(pre.numel() * l0 / sae.n_features))
    sae.b_enc.fill_(-float(pre.topk(keep).values[-1]))


def set_skewed_l0(sae: TrainingSae, l0: float) -> None:
    """The same mean, but as uneven as trained SAEs are: most features rare, a few on a third of all tokens."""
    share = (1.5 * torch.randn(sae.n_features, device=sae.device)).exp_()
    share = (share * (l0 / share.sum())).clamp_(1e-6, 0.3)
    scale = sae.w_enc.norm(dim=1)
    sae.b_enc.copy_(-scale * torch.special.ndtri((1 - share).double()).float())


def workspace(tokens: int, d: int, features: int, device: torch.device, saes: int = 1) -> Workspace:
    return Workspace(tokens, d, features, "bf16", device, slots=saes if queues(device) else 1)


def _steps(load: Load, way: str, count: int) -> Steps:
    device = torch.device(load.device)
    saes = new_saes(count, d=load.d, features=load.features, device=device, way=way)
    return Steps(saes=saes, workspace=workspace(load.tokens, load.d, load.features, device, count), tokens=load.tokens)


def step(load: Load) -> list[Contender]:
    names = {"dense": "ours, dense", "sparse": f"ours, sparse, L0≈{target_l0(load.features)}"}
    steps = {way: _steps(load, way, 1) for way in WAYS}
    return [
        Contender(name=names[way], key=way, role="ours", work=load.tokens, run=one.run, note=one.note)
        for way, one in steps.items()
    ]


def settings(load: Load) -> list[Contender]:
    """Three SAEs that step one after another on each batch, beside one of them that takes three batches by itself.

    Both do the arithmetic of three steps; what the three can lose is the caches, to one another's weights.
    """
    contenders = []
    for way in WAYS:
        steps = _steps(load, way, SETTINGS)
        alone = replace(steps, saes=steps.saes[:1], batches=SETTINGS)
        for name, role, run, note in (
            (f"ours, three {way} SAEs, one batch", "ours", steps.run, steps.note),
            (f"one {way} SAE, three batches", "base", alone.run, ""),
        ):
            against = (way,) if role == "base" else ()
            work = SETTINGS * load.tokens
            contenders.append(Contender(name=name, role=role, key=way, work=work, run=run, note=note, against=against))
    return contenders


# ------------------------------------------------------------------------------------------------------------ cache


def cache_spec(*, d: int, n_layers: int, rows: int, context: int = CONTEXT, vocab: int = 50_304) -> CacheSpec:
    """A cache of about `rows` rows a layer, in blocks of the published job's size where there are enough of them."""
    from shared.cache import CacheSpec

    context = min(context, rows)
    sequences = min(BLOCK_SEQUENCES, rows // context)
    return CacheSpec(
        model="random", model_revision="", dataset="random", dataset_revision="", split="", text_column="",
        tokenizer_sha256="", separator=0, context=context, d_model=d, n_layers=n_layers, vocab_size=vocab,
        block_sequences=sequences, n_blocks=rows // (context * sequences), holdout_blocks=0, seed=0, precision="bf16",
    )  # fmt: skip


def new_cache(path: Path, spec: CacheSpec) -> Cache:
    from shared.cache import Cache

    shutil.rmtree(path, ignore_errors=True)
    return Cache.create(path, spec, tuple(map(Site, range(spec.n_layers))))


def cache_with_tokens(path: Path, spec: CacheSpec) -> Cache:
    """A new cache whose token array is filled at random."""
    cache = new_cache(path, spec)
    for chunk in range(spec.token_chunks):
        tokens = torch.randint(0, spec.vocab_size, (spec.token_chunk, spec.context))
        cache.commit_tokens(chunk, tokens.numpy().astype(spec.token_dtype), {}, 0)
    return cache


def empty(cache: Cache) -> None:
    """Removes every block and its ledger entry; the folders and the tokens stay. New folders' files land on parts of the disk
    that were never written, and on a virtual disk the first write to a place is several times slower than the next."""
    for layer in cache.sites:
        for file in cache.block_path(layer, 0).parent.glob("c.*"):
            file.unlink()
    for block in range(cache.spec.n_blocks):
        cache.entry_path(cache.sites, block).unlink(missing_ok=True)


def fill_random(data: Tensor) -> Tensor:
    """Random float16 over a whole buffer, a piece of it repeated: drawing gigabytes would take longer than the round."""
    flat = data.view(-1)
    piece = torch.randn(min(8 << 20, flat.numel())).half()
    for part in torch.split(flat, piece.numel()):
        part.copy_(piece[: part.numel()])
    return data


def write_cache(cache: Cache, *, threads: int) -> float:
    """Write and commit every block of a cache from buffers that are full already; the seconds it took."""
    from harvest.writer import BlockWriter, WriterConfig

    spec = cache.spec
    config = WriterConfig(threads=threads, buffers=min(2, spec.n_blocks))
    with BlockWriter(cache, cache.sites, config, pinned=False, done=lambda block: None) as writer:
        buffers = [writer.buffer() for _ in range(config.buffers)]
        for buffer in buffers:
            fill_random(buffer.data)
        start = time.perf_counter()
        for block in range(spec.n_blocks):
            writer.submit(block, buffers[block] if block < config.buffers else writer.buffer())
    return time.perf_counter() - start


def raw(cache: Cache, threads: int, *, direct: bool, write: bool) -> float:
    """The same files from or into memory that is there already, from as many threads as ours, and nothing else. What is
    written is durable."""
    spec, memory = cache.spec, queue.SimpleQueue[Tensor]()
    empty(cache) if write else evict_blocks(cache)
    for _ in range(threads):
        memory.put(fill_random(page_aligned(spec.block_rows, spec.d_model)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if write else os.O_RDONLY

    def work(at: tuple[Site, int]) -> None:
        data = memory.get()
        left = memoryview(data.numpy().data).cast("B")
        with raw_file(cache.block_path(*at), flags, direct) as fd:
            while left:
                done = os.write(fd, left) if write else os.readv(fd, [left[:READ_CALL] if direct else left])
                left = left[done:]
            if write:
                os.fsync(fd)
        memory.put(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there before the clock starts
        files = [(layer, block) for block in range(spec.n_blocks) for layer in cache.sites]
        return timed(lambda: list(pool.map(work, files)), "cpu")


def raw_limits(word: str, cache: Cache, threads: int, work: float) -> list[Contender]:
    """Buffered and, where a block is whole pages, direct: either can be the faster, and ours stands against that one."""
    return [
        Contender(
            name=f"raw {word} of the same files, {'direct' if direct else 'buffered'}, {threads} threads",
            role="limit",
            work=work,
            run=partial(raw, cache, threads, direct=direct, write=word == "write"),
        )
        for direct in (False, True)
        if not direct or whole_pages(cache.spec)
    ]


def whole_pages(spec: CacheSpec) -> bool:
    return spec.block_bytes % PAGE == 0


@contextlib.contextmanager
def raw_file(path: Path, flags: int, direct: bool) -> Iterator[int]:
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def evict_blocks(cache: Cache) -> None:
    """Every block of the cache out of the page cache. Raises RuntimeError where the system keeps them."""
    for layer in cache.sites:
        for block in range(cache.spec.n_blocks):
            path = cache.block_path(layer, block)
            with raw_file(path, os.O_RDONLY, direct=False) as fd:
                os.fsync(fd)  # dirty pages would stay
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if (share := resident_share(path)) > 0.01:
                raise RuntimeError(f"{share:.0%} of {path.name} stayed in the page cache: this is no cold read")


def resident_share(path: Path) -> float:
    """How much of a file the page cache holds, by mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // PAGE)
    seen = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), seen)
        del start  # the map cannot be closed while this points into it
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in seen) / pages


@dataclass(kw_only=True, slots=True)
class Writes:
    cache: Cache
    threads: int

    @property
    def payload(self) -> int:
        spec = self.cache.spec
        return spec.n_blocks * spec.block_bytes * spec.n_layers

    def run(self) -> float:
        empty(self.cache)
        return write_cache(self.cache, threads=self.threads)

    def best_raw(self) -> float:
        """Direct where a block is whole pages: the faster way on every disk seen so far."""
        return raw(self.cache, self.threads, direct=whole_pages(self.cache.spec), write=True)

    def note(self) -> str:
        spec = self.cache.spec
        block = spec.block_bytes * spec.n_layers
        return (
            f"{spec.n_layers} layers, blocks of {spec.block_bytes / 1e6:.1f} MB a layer, checksums, moments and ledger "
            f"included; buffers hold {min(2, spec.n_blocks)} x {block / 1e9:.2f} GB"
        )


def write(load: Load) -> list[Contender]:
    spec = cache_spec(d=load.d, n_layers=LAYERS, rows=load.tokens // LAYERS)
    writes = Writes(cache=new_cache(load.directory / "ours", spec), threads=load.threads)
    ours = Contender(name="ours", role="ours", work=writes.payload, run=writes.run, note=writes.note)
    return [ours, *raw_limits("write", writes.cache, load.threads, writes.payload)]


# ----------------------------------------------------------------------------------------------------------- loader


def new_loader(
    cache: Cache, batch: int, window: int, device: torch.device, *, epochs: int = 1, threads: int | None = None
) -> Any:
    from train.loader import ActivationLoader, LoaderConfig

    config = LoaderConfig(batch=batch, window_blocks=window)
    config = config if threads is None else replace(config, threads=threads)
    return ActivationLoader(cache, Site(0), config, device, last=epochs * cache.spec.train_tokens // batch)


@dataclass(kw_only=True, slots=True)
class Reads:
    """One pass of the loader over a cache of one layer; its windows are kept, as they are through a training run."""

    cache: Cache
    loader: Any  # ActivationLoader
    batch: int
    shares: list[float] = field(default_factory=list)

    def run(self) -> float:
        evict_blocks(self.cache)
        waited, start, seen = self.loader.waited, time.perf_counter(), 0
        for x in self.loader:
            seen += len(x)
        seconds = time.perf_counter() - start
        if seen != self.cache.spec.train_tokens // self.batch * self.batch:
            raise RuntimeError(f"{seen} rows came, {self.cache.spec.train_tokens} were asked for")
        self.shares.append((self.loader.waited - waited) / seconds)
        return seconds

    def note(self) -> str:
        window = 2 * READ_WINDOW * self.cache.spec.block_bytes
        return (
            f"checksums on, shuffled batches of {self.batch}; windows hold {window / 1e9:.2f} GB; nothing trains, "
            f"so the consumer waits {statistics.median(self.shares):.0%} of the time"
        )


def read(load: Load) -> list[Contender]:
    from train.loader import LoaderConfig

    # Long enough for its end to count little, when the last rows are handed out and nothing is read any more.
    cache = new_cache(load.directory / "ours-read", cache_spec(d=load.d, n_layers=1, rows=8 * load.tokens))
    write_cache(cache, threads=load.threads)
    batch = min(READ_BATCH, cache.spec.block_rows)
    loader = new_loader(cache, batch, READ_WINDOW, torch.device(load.device))
    reads = Reads(cache=cache, loader=loader, batch=batch)
    work = cache.spec.train_tokens // batch * batch * load.d * 2
    ours = Contender(name="ours", role="ours", work=work, run=reads.run, note=reads.note)
    # The loader's own number of threads is the raw reads' too.
    return [ours, *raw_limits("read", cache, LoaderConfig(batch=batch).threads, cache.spec.n_blocks * cache.spec.block_bytes)]


# --------------------------------------------------------------------------------------------------------- training


@dataclass(kw_only=True, slots=True)
class Training:
    """A round trains one SAE from a cold cache to the cache's end; the loader is made within the round, so its first
    window is waited for within it too."""

    cache: Cache
    steps: Steps
    shares: dict[str, list[float]] = field(default_factory=dict)  # of each round: what was not spent in steps

    def run(self) -> float:
        evict_blocks(self.cache)
        stepping, first = 0.0, 0.0
        device = self.steps.saes[0].device
        start = time.perf_counter()
        loader = new_loader(self.cache, self.steps.tokens, TRAIN_WINDOW, device)
        for x in loader:
            first = first or time.perf_counter() - start
            stepping += timed(partial(self.steps.take, [x]), device)
        seconds = time.perf_counter() - start
        for name, part in (("idle", seconds - stepping), ("waited", loader.waited), ("first", first)):
            self.shares.setdefault(name, []).append(part / seconds)
        return seconds

    def figures(self) -> Mapping[str, float]:
        return {name: statistics.median(shares[1:]) for name, shares in self.shares.items()}  # the first is the warm-up

    def note(self) -> str:
        shares = self.figures()
        windows = 2 * TRAIN_WINDOW * self.cache.spec.block_bytes
        return (
            f"{shares['idle']:.2%} of the time outside steps, all in: {shares['first']:.2%} until the first batch (a "
            f"layer of the full job has that once), {shares['waited']:.2%} with no window ready (the first one's fill "
            f"among it), the rest in gathering rows; the loader's windows hold {windows / 1e6:.0f} MB"
        )


def stream(load: Load) -> list[Contender]:
    """Training as `train` does it, loader and steps, from a cold cache: a layer in blocks of two batches."""
    context = min(CONTEXT, load.tokens)
    spec = replace(
        cache_spec(d=load.d, n_layers=1, rows=context),
        block_sequences=2 * load.tokens // context,
        n_blocks=TRAIN_BATCHES // 2,
    )
    cache = new_cache(load.directory / "ours-stream", spec)
    write_cache(cache, threads=load.threads)
    contenders = []
    for way in WAYS:
        training = Training(cache=cache, steps=_steps(load, way, 1))
        contenders.append(
            Contender(
                name=f"ours, one {way} setting", key=way, role="ours", work=TRAIN_BATCHES * load.tokens, run=training.run,
                note=training.note, figures=training.figures,
            )
        )  # fmt: skip
    return contenders


def memory_bounds() -> str:
    """Host memory of the full job, in words: what the loader and the writer may hold by their own settings."""
    from harvest.writer import WriterConfig

    job = get_preset("pythia-410m")
    rows, row = job.block_sequences * job.context, job.d_model * 2
    loader = 2 * job.window_blocks * rows * (row + 8) + job.batch * row  # 8: the order its rows are handed out in
    buffers = WriterConfig().buffers
    writer = buffers * job.n_layers * rows * row
    return (
        f"at the full job's shapes the loader holds at most {loader / 1e9:.2f} GB (two windows of {job.window_blocks} blocks "
        f"and a batch of {job.batch:,}; in GPU memory where there is one), the writer {writer / 1e9:.2f} GB ({buffers} blocks "
        f"of {job.n_layers} layers)"
    )


# ---------------------------------------------------------------------------------------------------------- harvest


def lm_config(*, d: int, layers: int = LAYERS, vocab: int = 50_304) -> Any:
    """Pythia-410M at d = 1024 and 24 layers; other sizes keep its proportions."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        intermediate_size=4 * d,
        vocab_size=vocab,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )


def base_model(config: Any, dtype: torch.dtype, device: torch.device, like: nn.Module | None = None) -> nn.Module:
    """A base model with random weights, drawn where they are to lie, or with those of another."""
    from transformers import AutoModel

    with device:
        model: nn.Module = AutoModel.from_config(config, dtype=dtype)
    if like is not None:
        model.load_state_dict(like.state_dict())
    return model.to(device).eval().requires_grad_(False)


@dataclass(kw_only=True, slots=True)
class Harvest:
    """A round does what harvest does with one pass over `sequences` contexts: the model, float16, rows to their places."""

    model: ResidualModel
    data: Tensor  # float16 [layers, rows, d]
    context: int
    vocab: int

    def run(self) -> float:
        from harvest.neox import put_rows

        layers, rows, d = self.data.shape
        tokens = torch.randint(0, self.vocab, (rows // self.context, self.context))
        place = torch.randperm(rows).to(self.data.device)
        nonfinite = torch.zeros(layers, dtype=torch.int64, device=self.data.device)

        def store(site: Site, output: Tensor) -> None:
            nonfinite[site.layer] += put_rows(output.reshape(-1, d), place, self.data[site.layer])

        return timed(lambda: self.model.run(tokens, store), self.data.device)


def products_of(model: nn.Module, rows: int, device: torch.device) -> Run:
    """The decoder blocks' linear layers alone, on ready inputs."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(rows, width, device=device).to(weights[0].dtype) for width in widths}

    @torch.inference_mode()
    def products() -> None:
        for weight in weights:
            nn.functional.linear(inputs[weight.shape[1]], weight)

    return lambda: timed(products, device)


def plain(model: nn.Module, rows: int, context: int, vocab: int, device: torch.device) -> Run:
    """What anyone would write first: transformers with all hidden states, kept as they come."""

    @torch.inference_mode()
    def run() -> float:
        tokens = torch.randint(0, vocab, (rows // context, context)).to(device)
        return timed(lambda: model(input_ids=tokens, output_hidden_states=True, use_cache=False), device)

    return run


@dataclass(kw_only=True, slots=True)
class HarvestRuns:
    """A round harvests these blocks of a cache: forward, checksums, durable files, ledger."""

    model: ResidualModel
    cache: Cache
    config: HarvestConfig
    blocks: list[int]
    shares: Shares | None = None  # of the last round

    def run(self) -> float:
        from harvest.run import harvest_blocks

        empty(self.cache)
        start = time.perf_counter()
        self.shares = harvest_blocks(self.cache, self.model, self.blocks, self.config)
        return time.perf_counter() - start

    def note(self) -> str:
        return f"{len(self.blocks)} blocks of {self.cache.spec.block_bytes / 1e6:.1f} MB a layer; {self.shares}"


def harvest_runs(load: Load, model: ResidualModel, context: int, vocab: int) -> HarvestRuns:
    from harvest.run import HarvestConfig
    from harvest.writer import WriterConfig

    sequences = max(load.tokens // context, 2)  # two contexts are one pass on a CPU
    spec = cache_spec(d=load.d, n_layers=len(model.sites), rows=context, context=context, vocab=vocab)
    spec = replace(spec, block_sequences=sequences, n_blocks=HARVEST_BLOCKS)
    config = HarvestConfig(device=model.device, writer=WriterConfig(threads=load.threads))
    cache = cache_with_tokens(load.directory / "ours-harvest", spec)
    return HarvestRuns(model=model, cache=cache, config=config, blocks=list(range(HARVEST_BLOCKS)))


def forward(load: Load) -> list[Contender]:
    from transformers import AutoModelForCausalLM

    from harvest.language_model import ResidualModel

    device = torch.device(load.device)
    config = lm_config(d=load.d, **({} if load.d == 1024 else {"layers": 4, "vocab": 512}))
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False).to(device)
    base = base_model(config, torch.bfloat16, device, like=causal.gpt_neox)
    layers, vocab = config.num_hidden_layers, config.vocab_size
    model = ResidualModel(base, tuple(map(Site, range(layers))), device)
    context = min(CONTEXT, load.tokens)
    data = torch.empty(layers, load.tokens, load.d, dtype=torch.float16, device=device)
    harvest = Harvest(model=model, data=data, context=context, vocab=vocab)
    runs = harvest_runs(load, model, context, vocab)
    shape = (load.tokens, context, vocab, device)
    note = f"{layers} layers, d {load.d}, vocabulary {vocab}, random bf16 weights, the same for all"
    rows: list[tuple[str, str, Run, float, str | Callable[[], str]]] = [
        ("ours, every layer to float16 in the writer's order", "ours", harvest.run, load.tokens, note),
        ("ours, the whole harvest to disk", "ours", runs.run, HARVEST_BLOCKS * runs.cache.spec.block_rows, runs.note),
        ("its linear layers alone", "limit", products_of(model.model, load.tokens, device), load.tokens, ""),
        ("transformers base model, output_hidden_states", "peer", plain(causal.gpt_neox, *shape), load.tokens, ""),
        ("transformers causal LM, output_hidden_states", "peer", plain(causal, *shape), load.tokens, ""),
    ]
    return [Contender(name=name, role=role, run=run, work=work, note=note) for name, role, run, work, note in rows]
