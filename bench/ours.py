"""Our own hot paths, as contenders: the step, the cache writer, the loader, the harvest's forward pass.

Each is the product's own code with nothing taken out. What a round needs (fresh random activations, filled buffers, an
empty folder, a cold page cache) is made before its clock starts, so every run here times itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench import limits
from bench.peers import Load
from bench.report import Contender
from shared.files import page_aligned
from train.kernels import Workspace
from train.step import StepConfig, StepResult, TrainingSae, pick_kernels

# zarr and transformers are imported where they are needed: a GPU machine may have neither, and can still time the step.
if TYPE_CHECKING:
    from harvest.harvest import HarvestConfig, Shares
    from harvest.model import ResidualModel
    from shared.cache import Cache, CacheSpec

LR = 1e-9  # the whole of Adam's work, and an SAE that stays as sparse as it was set
L1 = 1e-5
L0 = 150
LAYERS = 24
CONTEXT, BLOCK_SEQUENCES = 1024, 32  # of a full-size block
READ_BATCH, READ_WINDOW = 4096, 16
READ_CALL = 512 << 10  # bytes of a direct read; a buffered one is faster in one piece
HARVEST_BLOCKS = 3  # enough for one to be written while the next is computed


# ---------------------------------------------------------------------------------------------------- training step


@dataclass(kw_only=True, slots=True)
class Steps:
    """A round is one step of each of these SAEs on each of `batches` batches of fresh activations."""

    saes: list[TrainingSae]
    workspace: Workspace
    tokens: int
    batches: int = 1
    results: list[StepResult] = field(default_factory=list)

    def run(self) -> float:
        device = self.saes[0].device
        batches = [torch.randn(self.tokens, self.saes[0].d, device=device).half() for _ in range(self.batches)]
        synchronize(device)
        start = time.perf_counter()
        for half in batches:
            self.take(half)
        synchronize(device)
        return time.perf_counter() - start

    def take(self, half: Tensor) -> None:
        x = half.float()  # once for all, as the trainer does it
        self.results = [sae.step(x, lr=LR, l1=L1, workspace=self.workspace) for sae in self.saes]

    def note(self) -> str:
        first = self.results[0]
        way = "sparse" if first.sparse else "dense"
        return f"{way} backward at L0 {first.l0:,.0f}, {type(self.saes[0].kernels).__name__}"


def workspace(tokens: int, d: int, features: int, device: torch.device) -> Workspace:
    return Workspace(tokens, d, features, "bf16", device)


def target_l0(features: int) -> int:
    """150, or less where that would not be sparse."""
    return min(L0, features // 20)


def training_sae(
    *, d: int, features: int, device: torch.device, sparse: bool, seed: int = 0, precision: str = "bf16"
) -> TrainingSae:
    # Which way to go is settled here, not by the number of active entries: each row shows one way.
    config = StepConfig(precision=precision, sparse_below=1.0 if sparse else 0.0)
    return TrainingSae(d, features, config, pick_kernels(precision, device), device, seed)


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


def step(load: Load) -> list[Contender]:
    device = torch.device(load.device)
    workspace = Workspace(load.tokens, load.d, load.features, "bf16", device)
    l0 = target_l0(load.features)
    contenders = []
    for key, name in (("dense", "ours, dense"), ("sparse", f"ours, sparse, L0≈{l0}")):
        sae = training_sae(d=load.d, features=load.features, device=device, sparse=key == "sparse")
        if key == "sparse":
            set_l0(sae, l0)
        steps = Steps(saes=[sae], workspace=workspace, tokens=load.tokens)
        contenders.append(Contender(name=name, key=key, role="ours", work=load.tokens, run=steps.run, note=steps.note))
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
    return Cache.create(path, spec, tuple(range(spec.n_layers)))


def empty(cache: Cache) -> None:
    """Removes every block and its ledger entry; the folders and the tokens stay."""
    for layer in cache.layers:
        for file in cache.block_path(layer, 0).parent.glob("c.*"):
            file.unlink()
    for block in range(cache.spec.n_blocks):
        cache.entry_path(cache.layers, block).unlink(missing_ok=True)


def fill_random(data: Tensor) -> None:
    """Random float16 over a whole buffer, a piece of it repeated: drawing gigabytes would take longer than the round."""
    flat = data.view(-1)
    piece = torch.randn(min(8 << 20, flat.numel())).half()
    for part in torch.split(flat, piece.numel()):
        part.copy_(piece[: part.numel()])


def write_cache(cache: Cache, *, threads: int) -> float:
    """Write and commit every block of a cache from buffers that are full already; the seconds it took."""
    from harvest.writer import BlockWriter, WriterConfig

    spec = cache.spec
    config = WriterConfig(threads=threads, buffers=min(2, spec.n_blocks))
    with BlockWriter(cache, cache.layers, config, pinned=False, done=lambda block: None) as writer:
        buffers = [writer.buffer() for _ in range(config.buffers)]
        for buffer in buffers:
            fill_random(buffer.data)
        start = time.perf_counter()
        for block in range(spec.n_blocks):
            writer.submit(block, buffers[block] if block < config.buffers else writer.buffer())
    return time.perf_counter() - start


@dataclass(kw_only=True, slots=True)
class Writes:
    folder: Path
    spec: CacheSpec
    threads: int
    growth: int | None = None  # how far the resident set rose while the clock ran
    cache: Cache | None = None

    @property
    def payload(self) -> int:
        return self.spec.n_blocks * self.spec.block_bytes * self.spec.n_layers

    def run(self) -> float:
        cache = self.emptied()
        before = resident(reset=True)
        seconds = write_cache(cache, threads=self.threads)
        peak = resident()
        self.growth = None if before is None or peak is None else peak - before
        return seconds

    def emptied(self) -> Cache:
        """The folders stay and the files go. New folders' files land on parts of the disk that were never written, and on a
        virtual disk the first write to a place is several times slower than the next."""
        if self.cache is None:
            self.cache = new_cache(self.folder, self.spec)
        empty(self.cache)
        return self.cache

    def raw(self, *, direct: bool) -> float:
        """The same files at the same places from as many threads: write, fsync, and nothing else."""
        cache = self.emptied()
        data = page_aligned(len(cache.layers), self.spec.block_rows, self.spec.d_model)
        fill_random(data)
        files = [(layer, block) for block in range(self.spec.n_blocks) for layer in cache.layers]

        def work(at: tuple[int, int]) -> None:
            left = memoryview(data[at[0]].numpy().data).cast("B")
            with raw_file(cache.block_path(*at), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, direct) as fd:
                while left:
                    left = left[os.write(fd, left) :]
                os.fsync(fd)

        return in_threads(self.threads, work, files)

    def best_raw(self) -> float:
        """Direct where a block is whole pages: the faster way on every disk seen so far."""
        return self.raw(direct=self.spec.block_bytes % limits.PAGE == 0)

    def note(self) -> str:
        block = self.spec.block_bytes * self.spec.n_layers
        memory = f", resident set +{self.growth / 1e9:.2f} GB while writing" if self.growth is not None else ""
        blocks = min(2, self.spec.n_blocks)
        return (
            f"{self.spec.n_layers} layers, blocks of {self.spec.block_bytes / 1e6:.1f} MB a layer, checksums, moments and "
            f"ledger included; buffers hold {blocks} x {block / 1e9:.2f} GB{memory}"
        )


def write(load: Load) -> list[Contender]:
    spec = cache_spec(d=load.d, n_layers=LAYERS, rows=load.tokens // LAYERS)
    writes = Writes(folder=load.directory / "ours", spec=spec, threads=load.threads)
    ours = Contender(name="ours", role="ours", work=writes.payload, run=writes.run, note=writes.note)
    return [ours, *raw_limits("write", writes.raw, writes.payload, spec, load.threads)]


def raw_limits(word: str, run: Callable[..., float], work: float, spec: CacheSpec, threads: int) -> list[Contender]:
    """Buffered and, where a block is whole pages, direct: either can be the faster, and ours stands against that one."""
    return [
        Contender(
            name=f"raw {word} of the same files, {how}, {threads} threads",
            role="limit",
            work=work,
            run=partial(run, direct=how == "direct"),
        )
        for how in ("buffered", "direct")
        if how == "buffered" or spec.block_bytes % limits.PAGE == 0
    ]


@contextlib.contextmanager
def raw_file(path: Path, flags: int, direct: bool) -> Iterator[int]:
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def in_threads(threads: int, work: Callable[[Any], None], items: list[Any]) -> float:
    """Seconds for all items, the threads being there before the clock starts."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))
        start = time.perf_counter()
        list(pool.map(work, items))
        return time.perf_counter() - start


@dataclass(kw_only=True, slots=True)
class Reads:
    """One pass of the loader over a cache of one layer; its windows are kept, as they are through a training run."""

    cache: Cache
    loader: Any  # ActivationLoader
    batch: int
    batches: int
    threads: int
    before: int | None  # bytes resident before the loader was made
    growth: int | None = None  # how far they had risen at most, batches included
    shares: list[float] = field(default_factory=list)

    def run(self) -> float:
        evict_blocks(self.cache)
        resident(reset=True)
        waited, start, seen = self.loader.waited, time.perf_counter(), 0
        for x in self.loader:
            seen += len(x)
        seconds = time.perf_counter() - start
        if seen != self.batch * self.batches:
            raise RuntimeError(f"{seen} rows came, {self.batch * self.batches} were asked for")
        self.shares.append((self.loader.waited - waited) / seconds)
        peak = resident()
        self.growth = None if self.before is None or peak is None else peak - self.before
        return seconds

    def note(self) -> str:
        window = 2 * READ_WINDOW * self.cache.spec.block_bytes
        memory = f", resident set +{self.growth / 1e9:.2f} GB" if self.growth is not None else ""
        return (
            f"checksums on, shuffled batches of {self.batch}; windows hold {window / 1e9:.2f} GB{memory}; nothing trains, so "
            f"the consumer waits {statistics.median(self.shares):.0%} of the time"
        )


def raw_read(cache: Cache, threads: int, *, direct: bool) -> float:
    """The first layer's files into memory that is there already, from as many threads and in as large calls as ours, and
    nothing else; from a cold page cache."""
    evict_blocks(cache)
    spec = cache.spec
    memory: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
    for _ in range(threads):
        memory.put(page_aligned(spec.block_rows, spec.d_model).fill_(1))

    def work(block: int) -> None:
        data = memory.get()
        left = memoryview(data.numpy().data).cast("B")
        with raw_file(cache.block_path(0, block), os.O_RDONLY, direct) as fd:
            while left:
                left = left[os.readv(fd, [left[:READ_CALL] if direct else left]) :]
        memory.put(data)

    return in_threads(threads, work, list(range(spec.n_blocks)))


def evict_blocks(cache: Cache) -> None:
    """Every block of the cache out of the page cache. Raises RuntimeError where the system keeps them."""
    for layer in cache.layers:
        for block in range(cache.spec.n_blocks):
            path = cache.block_path(layer, block)
            limits.evict(path)
            if (share := limits.resident_share(path)) > 0.01:
                raise RuntimeError(f"{share:.0%} of {path.name} stayed in the page cache: this is no cold read")


def read(load: Load) -> list[Contender]:
    from train.loader import ActivationLoader, LoaderConfig

    # Long enough for its end to count little, when the last rows are handed out and nothing is read any more.
    cache = new_cache(load.directory / "ours-read", cache_spec(d=load.d, n_layers=1, rows=8 * load.tokens))
    write_cache(cache, threads=load.threads)
    batch = min(READ_BATCH, cache.spec.block_rows)
    batches = cache.spec.train_tokens // batch
    config = LoaderConfig(batch=batch, window_blocks=READ_WINDOW)  # its own number of threads, and the raw reads' too
    before = resident(reset=True)
    loader = ActivationLoader(cache, 0, config, torch.device(load.device), last=batches)
    reads = Reads(cache=cache, loader=loader, batch=batch, batches=batches, threads=config.threads, before=before)
    ours = Contender(name="ours", role="ours", work=batch * batches * load.d * 2, run=reads.run, note=reads.note)
    payload = cache.spec.n_blocks * cache.spec.block_bytes
    return [ours, *raw_limits("read", partial(raw_read, cache, config.threads), payload, cache.spec, config.threads)]


# ---------------------------------------------------------------------------------------------------------- forward


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
        from harvest.native import put_rows

        layers, rows, d = self.data.shape
        tokens = torch.randint(0, self.vocab, (rows // self.context, self.context))
        place = torch.randperm(rows).to(self.data.device)
        nonfinite = torch.zeros(layers, dtype=torch.int64, device=self.data.device)

        def store(layer: int, output: Tensor) -> None:
            nonfinite[layer] += put_rows(output.reshape(-1, d), place, self.data[layer])

        synchronize(self.data.device)
        start = time.perf_counter()
        self.model.run(tokens, store)
        synchronize(self.data.device)
        return time.perf_counter() - start


def products_of(model: nn.Module, rows: int, device: torch.device) -> Callable[[], float]:
    """The decoder blocks' linear layers alone, on ready inputs."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(rows, width, device=device).to(weights[0].dtype) for width in widths}

    @torch.inference_mode()
    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        for weight in weights:
            nn.functional.linear(inputs[weight.shape[1]], weight)
        synchronize(device)
        return time.perf_counter() - start

    return run


def plain(model: nn.Module, rows: int, context: int, vocab: int, device: torch.device) -> Callable[[], float]:
    """What anyone would write first: transformers with all hidden states, kept as they come."""

    @torch.inference_mode()
    def run() -> float:
        tokens = torch.randint(0, vocab, (rows // context, context)).to(device)
        synchronize(device)
        start = time.perf_counter()
        model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        synchronize(device)
        return time.perf_counter() - start

    return run


def cache_with_tokens(path: Path, spec: CacheSpec) -> Cache:
    """A new cache whose token array is filled at random."""
    cache = new_cache(path, spec)
    for chunk in range(spec.token_chunks):
        tokens = torch.randint(0, spec.vocab_size, (spec.token_chunk, spec.context))
        cache.commit_tokens(chunk, tokens.numpy().astype(spec.token_dtype), {}, 0)
    return cache


@dataclass(kw_only=True, slots=True)
class HarvestRuns:
    """A round is a harvest of every block of a cache: forward, checksums, durable files, ledger."""

    model: ResidualModel
    cache: Cache
    config: HarvestConfig
    shares: Shares | None = None  # of the last round

    def run(self) -> float:
        from harvest.harvest import harvest_blocks

        empty(self.cache)
        start = time.perf_counter()
        self.shares = harvest_blocks(self.cache, self.model, list(range(self.cache.spec.n_blocks)), self.config)
        return time.perf_counter() - start

    def note(self) -> str:
        spec = self.cache.spec
        return f"{spec.n_blocks} blocks of {spec.block_bytes / 1e6:.1f} MB a layer; {self.shares}"


def harvest_runs(load: Load, model: ResidualModel, context: int, vocab: int) -> HarvestRuns:
    from harvest.harvest import HarvestConfig
    from harvest.writer import WriterConfig

    rows = max(load.tokens, 2 * context)  # two contexts are one pass on a CPU
    layers = len(model.layers)
    spec = replace(cache_spec(d=load.d, n_layers=layers, rows=rows, vocab=vocab), context=context, n_blocks=HARVEST_BLOCKS)
    spec = replace(spec, block_sequences=rows // context)
    config = HarvestConfig(device=model.device, writer=WriterConfig(threads=load.threads))
    return HarvestRuns(model=model, cache=cache_with_tokens(load.directory / "ours-harvest", spec), config=config)


def forward(load: Load) -> list[Contender]:
    from transformers import AutoModelForCausalLM

    from harvest.model import ResidualModel

    device = torch.device(load.device)
    full = load.d == 1024
    config = lm_config(d=load.d, **({} if full else {"layers": 4, "vocab": 512}))
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False).to(device)
    base = base_model(config, torch.bfloat16, device, like=causal.gpt_neox)
    layers, vocab = config.num_hidden_layers, config.vocab_size
    model = ResidualModel(base, tuple(range(layers)), device)
    context = min(CONTEXT, load.tokens)
    data = torch.empty(layers, load.tokens, load.d, dtype=torch.float16, device=device)
    harvest = Harvest(model=model, data=data, context=context, vocab=vocab)
    shape = (load.tokens, context, vocab, device)
    rows = {
        ("ours, every layer to float16 in the writer's order", "ours"): harvest.run,
        ("its linear layers alone", "limit"): products_of(model.model, load.tokens, device),
        ("transformers base model, output_hidden_states", "peer"): plain(causal.gpt_neox, *shape),
        ("transformers causal LM, output_hidden_states", "peer"): plain(causal, *shape),
    }
    note = f"{layers} layers, d {load.d}, vocabulary {vocab}, random bf16 weights, the same for all"
    contenders = [
        Contender(name=name, role=role, work=load.tokens, run=run, note=note if role == "ours" else "")
        for (name, role), run in rows.items()
    ]
    runs = harvest_runs(load, model, context, vocab)
    work = runs.cache.spec.n_blocks * runs.cache.spec.block_rows
    whole = Contender(name="ours, the whole harvest to disk", role="ours", work=work, run=runs.run, note=runs.note)
    return [contenders[0], whole, *contenders[1:]]


# ----------------------------------------------------------------------------------------------------------- helpers


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(*, reset: bool = False) -> int | None:
    """Bytes resident at most since the last reset (or now, with `reset`); None where the system does not say."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
