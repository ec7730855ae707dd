"""What the machine itself can do: products, disk, memory. A hot path is judged against these.

Products: a training step of an SAE is five products of 2·B·d·F. Each can be had from operands and results
that lie either way round in memory, and on some machines one way costs several times another. So each is
timed in all eight layouts; `FiveProducts.run` does each product in its two best layouts, with nothing in
between, and counts the faster one. It is a floor, not a plan: what one product leaves may not lie as the
next one wants it.

Disk: see `ours.Writes.raw` and `ours.Reads.raw`, which move the same files as our own paths. What is here
makes a page cache cold, and shows that it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


# ------------------------------------------------------------------------------------------------- products


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How each matrix of C = A·B lies: True if its transpose is what is contiguous."""

    left_transposed: bool
    right_transposed: bool
    out_transposed: bool

    def __str__(self) -> str:
        sides = zip(("A", "B", "C"), vars(self).values(), strict=True)
        return " ".join(f"{side}.t()" if transposed else side for side, transposed in sides)


@dataclass(frozen=True, kw_only=True)
class Product:
    """C [m, n] = A [m, k] · B [k, n], in its best layout, and the best seconds of every layout."""

    name: str
    m: int
    k: int
    n: int
    seconds: float
    layout: Layout
    tried: dict[str, float]

    @property
    def flop(self) -> int:
        return 2 * self.m * self.k * self.n


@dataclass(frozen=True, kw_only=True)
class FiveProducts:
    """The five products of a step; `run` returns the seconds of each in the faster of its two best layouts, summed."""

    products: tuple[Product, ...]
    run: Callable[[], float]

    @property
    def flop(self) -> int:
        return sum(each.flop for each in self.products)


def five_products(
    *,
    tokens: int,
    d: int,
    features: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 3,
) -> FiveProducts:
    """Find each product's best layouts. The five have three shapes, so three are searched."""
    shapes = {
        "encode": (tokens, d, features),  # pre = x · W_enc
        "decode": (tokens, features, d),  # x̂ = z · W_dec
        "latent gradient": (tokens, d, features),  # dz = dx̂ · W_decᵀ
        "decoder gradient": (features, tokens, d),  # dW_dec = zᵀ · dx̂
        "encoder gradient": (features, tokens, d),  # dW_enc = dpreᵀ · x
    }
    searched = {shape: _search(*shape, device=device, dtype=dtype, rounds=rounds) for shape in set(shapes.values())}
    # One set of buffers per shape and layout: the two products that share a shape share them too.
    calls = {
        shape: [_prepared(*shape, layout, device, dtype) for layout in sorted(tried, key=tried.__getitem__)[:2]]
        for shape, tried in searched.items()
    }

    def run() -> float:
        return sum(min(_seconds(call, device) for call in calls[shape]) for shape in shapes.values())

    products = tuple(_product(name, shape, searched[shape]) for name, shape in shapes.items())
    return FiveProducts(products=products, run=run)


def _product(name: str, shape: tuple[int, int, int], tried: dict[Layout, float]) -> Product:
    best = min(tried, key=tried.__getitem__)
    m, k, n = shape
    seconds_by_layout = {str(layout): seconds for layout, seconds in tried.items()}
    return Product(name=name, m=m, k=k, n=n, seconds=tried[best], layout=best, tried=seconds_by_layout)


def _search(m: int, k: int, n: int, *, device: str, dtype: torch.dtype, rounds: int) -> dict[Layout, float]:
    """Best seconds of each layout once it is warm; one that takes twice the best so far is not timed again."""
    found: dict[Layout, float] = {}
    for left, right, out in product((False, True), repeat=3):
        layout = Layout(left_transposed=left, right_transposed=right, out_transposed=out)
        call = _prepared(m, k, n, layout, device, dtype)
        _seconds(call, device)  # compiles the kernel: it says nothing about the layout
        found[layout] = _seconds(call, device)
        if found[layout] <= 2 * min(found.values()):
            found[layout] = min([found[layout], *(_seconds(call, device) for _ in range(rounds))])
    return found


def _prepared(m: int, k: int, n: int, layout: Layout, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The product as a call with every buffer in place. C.t() = B.t()·A.t() gives the transposed result."""
    a = _matrix(m, k, layout.left_transposed, device, dtype)
    b = _matrix(k, n, layout.right_transposed, device, dtype)
    shape = (n, m) if layout.out_transposed else (m, n)
    out = torch.empty(shape, device=device, dtype=dtype).fill_(0)  # written, so that no call pays for its pages
    first, second = (b.t(), a.t()) if layout.out_transposed else (a, b)
    return lambda: torch.mm(first, second, out=out)


def _matrix(rows: int, columns: int, transposed: bool, device: str, dtype: torch.dtype) -> Tensor:
    # Filled in the target type: a float32 copy of the largest one would take half a gigabyte for nothing.
    if transposed:
        return torch.empty(columns, rows, device=device, dtype=dtype).normal_().t()
    return torch.empty(rows, columns, device=device, dtype=dtype).normal_()


def _seconds(call: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------------- page cache


def evict(path: Path) -> None:
    """Out of the page cache. Dirty pages would stay, so they are written first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def resident_share(path: Path) -> float:
    """How much of a file the page cache holds, by mincore(2)."""
    size = path.stat().st_size
    if not size:
        return 0.0
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


# --------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy between preallocated buffers; `bytes` counts what is copied, once."""

    bytes: int
    run: Callable[[], float]


def copies(*, size: int = 1 << 30, device: str = "cpu") -> dict[str, Copy]:
    """Copies in memory; with CUDA also inside the device, and both ways between it and pinned memory."""
    host = torch.empty(size, dtype=torch.uint8).fill_(1)
    pairs = {"memory copy": (host, torch.empty_like(host).fill_(0))}
    if device.startswith("cuda"):
        there = torch.ones(size, dtype=torch.uint8, device=device)
        pinned = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        pairs |= {
            "device copy": (there, torch.zeros_like(there)),
            "host to device": (pinned, torch.zeros_like(there)),
            "device to host": (there, torch.zeros(size, dtype=torch.uint8, pin_memory=True)),
        }
    return {name: Copy(bytes=size, run=_copier(*pair, device)) for name, pair in pairs.items()}


def _copier(source: Tensor, target: Tensor, device: str) -> Callable[[], float]:
    return lambda: _seconds(lambda: target.copy_(source, non_blocking=True), device)


def matmul_rate(*, side: int = 8192, device: str = "cpu", rounds: int = 5) -> float:
    """bf16 FLOP/s of one square product: what the processor reaches when the shape is kind."""
    call = _prepared(
        side, side, side, Layout(left_transposed=False, right_transposed=True, out_transposed=False),
        device, torch.bfloat16,
    )  # fmt: skip
    _seconds(call, device)
    return 2 * side**3 / min(_seconds(call, device) for _ in range(rounds))
