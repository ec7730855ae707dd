"""What the machine itself can do: products, copies. A hot path is judged against these, and against `ours.raw`.

A training step of an SAE is five products of 2·B·d·F. Each can be had from operands and results that lie either way round
in memory, and on some machines one way costs several times another. So each is timed in all eight layouts;
`FiveProducts.run` does each product in its two best layouts, with nothing in between, and counts the faster one. It is a
floor, not a plan: what one product leaves may not lie as the next one wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.clock import Run, timed

Layout = tuple[bool, bool, bool]  # of A, B and C in C = A·B: is its transpose what is contiguous?


@dataclass(frozen=True, kw_only=True)
class FiveProducts:
    """`run` returns the seconds of each in the faster of its two best layouts, summed."""

    flop: int
    layouts: str  # the best of each
    run: Run


def five_products(
    *, tokens: int, d: int, features: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, rounds: int = 3
) -> FiveProducts:
    """Find each product's best layouts. The five have three shapes (m, k, n), so three are searched."""
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


def matmul_rate(*, side: int = 8192, device: str = "cpu", rounds: int = 5) -> float:
    """bf16 FLOP/s of one square product: what the processor reaches when the shape is kind."""
    call = _prepared(side, side, side, (False, True, False), device, torch.bfloat16)
    timed(call, device)
    return 2 * side**3 / min(timed(call, device) for _ in range(rounds))


def copies(*, size: int = 1 << 30, device: str = "cpu") -> dict[str, Run]:
    """Copies of `size` bytes in memory; with CUDA also inside the device, and both ways between it and pinned memory."""
    host = torch.ones(size, dtype=torch.uint8)
    pairs = {"memory copy": (host, torch.zeros_like(host))}
    if device.startswith("cuda"):
        there = torch.ones(size, dtype=torch.uint8, device=device)
        pinned = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        pairs |= {
            "device copy": (there, torch.zeros_like(there)),
            "host to device": (pinned, torch.zeros_like(there)),
            "device to host": (there, torch.zeros(size, dtype=torch.uint8, pin_memory=True)),
        }
    return {name: partial(timed, partial(target.copy_, source, True), device) for name, (source, target) in pairs.items()}
