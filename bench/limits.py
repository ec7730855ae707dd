"""What the machine itself can do: products, reads and writes. A hot path is judged against these.

A training step of an SAE is five products of 2·B·d·F. Each can be had from operands and results that lie either way round
in memory, and on some machines one way costs several times another. So each is timed in all eight layouts;
`FiveProducts.run` does each product in its two best layouts, with nothing in between, and counts the faster one. It is a
floor, not a plan: what one product leaves may not lie as the next one wants it.
"""

import contextlib
import ctypes
import mmap
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import Run, timed
from residual_saes.shared.device import bfloat16_is_slow
from residual_saes.shared.files import PAGE, page_aligned

Layout = tuple[bool, bool, bool]  # of A, B and C in C = A·B: is its transpose what is contiguous?


@dataclass(frozen=True, kw_only=True)
class FiveProducts:
    """`run` returns the seconds of each in the faster of its two best layouts, summed."""

    flop: int
    layouts: str  # the best of each
    run: Run


def five_products(
    *, tokens: int, d: int, features: int, device: str = "cpu", dtype: torch.dtype | None = None, rounds: int = 3
) -> FiveProducts:
    """Find each product's best layouts. The five have three shapes (m, k, n), so three are searched."""
    dtype = dtype or quick_type(device)
    shapes = {
        "encode": (tokens, d, features),  # pre = x · W_enc
        "decode": (tokens, features, d),  # x̂ = z · W_dec
        "latent gradient": (tokens, d, features),  # dz = dx̂ · W_decᵀ
        "decoder gradient": (features, tokens, d),  # dW_dec = zᵀ · dx̂
        "encoder gradient": (features, tokens, d),  # dW_enc = dpreᵀ · x
    }
    ranked: dict[tuple[int, int, int], list[Layout]] = {}
    for shape in set(shapes.values()):
        tried = _search(*shape, device=device, dtype=dtype, rounds=rounds)
        ranked[shape] = sorted(tried, key=tried.__getitem__)
    # One set of buffers per shape and layout: the two products that share a shape share them too.
    calls = {shape: [_prepared(*shape, layout, device, dtype) for layout in best[:2]] for shape, best in ranked.items()}

    def run() -> float:
        return sum(min(timed(call, device) for call in calls[shape]) for shape in shapes.values())

    layouts = ", ".join(f"{name} {_shown(ranked[shape][0])}" for name, shape in shapes.items())
    return FiveProducts(flop=5 * 2 * tokens * d * features, layouts=layouts, run=run)


def quick_type(device: str) -> torch.dtype:
    """bfloat16, or float32 on a processor that has no instructions for it and would emulate it."""
    return torch.float32 if bfloat16_is_slow(torch.device(device)) else torch.bfloat16


def _shown(layout: Layout) -> str:
    return " ".join(f"{side}.t()" if transposed else side for side, transposed in zip("ABC", layout, strict=True))


def _search(m: int, k: int, n: int, *, device: str, dtype: torch.dtype, rounds: int) -> dict[Layout, float]:
    """Best seconds of each layout once it is warm; one that takes twice the best so far is not timed again."""
    found: dict[Layout, float] = {}
    for left, right, out in product((False, True), repeat=3):
        layout = (left, right, out)
        call = _prepared(m, k, n, layout, device, dtype)
        timed(call, device)  # compiles the kernel: it says nothing about the layout
        found[layout] = timed(call, device)
        if found[layout] <= 2 * min(found.values()):
            found[layout] = min([found[layout], *(timed(call, device) for _ in range(rounds))])
    return found


def _prepared(m: int, k: int, n: int, layout: Layout, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The product as a call with every buffer in place. C.t() = B.t()·A.t() gives the transposed result."""
    left, right, turned = layout
    a, b = _matrix(m, k, left, device, dtype), _matrix(k, n, right, device, dtype)
    out = torch.zeros((n, m) if turned else (m, n), device=device, dtype=dtype)  # written, so that no call pays for its pages
    first, second = (b.t(), a.t()) if turned else (a, b)
    return lambda: torch.mm(first, second, out=out)


def _matrix(rows: int, columns: int, transposed: bool, device: str, dtype: torch.dtype) -> Tensor:
    # Filled in the target type: a float32 copy of the largest one would take half a gigabyte for nothing.
    if transposed:
        return torch.empty(columns, rows, device=device, dtype=dtype).normal_().t()
    return torch.empty(rows, columns, device=device, dtype=dtype).normal_()


def square_product(*, side: int, device: str = "cpu") -> Run:
    return partial(timed, _prepared(side, side, side, (False, True, False), device, quick_type(device)), device)


# ------------------------------------------------------------------------------------------------------------- disk

READ_CALL = 4 << 20  # bytes of a direct read, a slice; a buffered one is faster in one piece


def raw(paths: Sequence[Path], size: int, threads: int, *, direct: bool, write: bool) -> float:
    """Seconds of reading files of `size` bytes into memory that is there already, or of writing them durably, and of nothing
    else."""
    memory = queue.SimpleQueue[Tensor]()
    for _ in range(threads):
        memory.put(fill_random(page_aligned(size // 2)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if write else os.O_RDONLY

    def work(path: Path) -> None:
        data = memory.get()
        left = memoryview(data.numpy().data).cast("B")
        with opened(path, flags, direct) as fd:
            while left:
                done = os.write(fd, left) if write else os.readv(fd, [left[:READ_CALL] if direct else left])
                left = left[done:]
            if write:
                os.fsync(fd)
        memory.put(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there before the clock starts
        return timed(lambda: list(pool.map(work, paths)), "cpu")


@contextlib.contextmanager
def opened(path: Path, flags: int, direct: bool) -> Iterator[int]:
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def fill_random(data: Tensor) -> Tensor:
    """Random float16 over a whole buffer, a piece of it repeated: drawing gigabytes would take longer than the round."""
    flat = data.view(-1)
    piece = torch.randn(min(8 << 20, flat.numel())).half()
    for part in torch.split(flat, piece.numel()):
        part.copy_(piece[: part.numel()])
    return data


def evict(path: Path) -> None:
    """A file out of the page cache. Raises RuntimeError where the system keeps it."""
    with opened(path, os.O_RDONLY, direct=False) as fd:
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
