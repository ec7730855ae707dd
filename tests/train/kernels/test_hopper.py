"""The products that finish their results, against torch; in the interpreter, through the compiler, and on a GPU where
there is one of compute capability 9. How and why in processes of their own: see test_cuda."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.devices import GPU
from tests.train.kernels.test_cuda import (
    DEVICE,
    INTERPRETED,
    SUMMED,
    Size,
    assert_close,
    compiled,
    fenced,
    fences,
    mend_interpreter,
    needs_triton,
    random,
    run_in_its_own_process,
)

__all__ = ["fences"]  # a fixture
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = (*GPU, pytest.mark.skipif(not HOPPER, reason="there is no GPU of compute capability 9"))
RUNS = [("check_*", "1"), ("compile_*", "0"), pytest.param("check_*", "0", marks=ON_HOPPER)]


@needs_triton
@pytest.mark.parametrize(("functions", "interpret"), RUNS)
@pytest.mark.slow
def test_in_its_own_process(functions: str, interpret: str, tmp_path: Path) -> None:
    run_in_its_own_process(__file__, functions, interpret, tmp_path)


@pytest.fixture(scope="module")
def products() -> Any:
    if INTERPRETED:
        mend_interpreter()
        mend_products_of_bfloat16()
    from residual_saes.train.kernels import hopper

    return hopper


def mend_products_of_bfloat16() -> None:
    """The interpreter multiplies bfloat16 as the integers of the same bits."""
    from triton.runtime import interpreter

    def wide(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


def unpacked(bits: Tensor) -> Tensor:
    return (bits[:, :, None] >> torch.arange(32, device=bits.device) & 1).flatten(1).bool()


# Tiles whose edges the sizes cross, then less than a tile, then whole tiles; and d that ends within a step, or before it.
SIZES = [Size(70, 72, 48), Size(1, 8, 16), Size(256, 512, 64), Size(300, 264, 80)]
TILES = [
    {"rows": 64, "cols": 64, "depth": 32, "parts": 1, "group": 2, "warps": 4},
    {"rows": 128, "cols": 128, "depth": 64, "parts": 4, "warps": 4},
    {"rows": 256, "cols": 128, "depth": 64, "parts": 2},
]
every = pytest.mark.parametrize(("size", "tiles"), [(s, t) for s in SIZES for t in TILES], ids=str)


@every
def check_encode(products: Any, fences: None, size: Size, tiles: dict[str, int]) -> None:
    xc, w = random(size.tokens, size.d, dtype=torch.bfloat16), random(size.features, size.d, dtype=torch.bfloat16)
    bias = random(size.features) * 4 - 8
    bias[0], bias[size.features // 2] = 900.0, -900.0  # on every token, on none
    z = fenced(torch.zeros(size.tokens, size.features, dtype=torch.bfloat16))
    got = products.encode(xc, w, bias, z, products.Tiling(**tiles))
    assert_close(z, torch.relu(xc.float() @ w.float().t() + bias).bfloat16(), 1e-3)
    active = z > 0
    assert torch.equal(got.feature_count, active.sum(0, dtype=torch.int32))
    assert_close(got.total, z.sum(dtype=torch.float32), SUMMED)
    assert torch.equal(unpacked(got.bits)[:, : size.features], active)
    assert not unpacked(got.bits)[:, size.features :].any()


@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 8), (2049, 1064), (5000, 40)])
def check_feature_count(products: Any, fences: None, n_rows: int, n_cols: int) -> None:
    """Of columns that are always set and never, in words that are cut, and on more rows than a block has."""
    bits = torch.empty(n_rows, -(-n_cols // 32), dtype=torch.int32, device=DEVICE)
    bits.copy_(torch.randint(-(2**31), 2**31, bits.shape) & 0x7FFFFFFD | 1)
    bits[:, 0] |= -(2**31)
    got = products.feature_count(bits, n_cols)
    assert torch.equal(got, unpacked(bits)[:, :n_cols].sum(0, dtype=torch.int32))
    assert got[0] == n_rows and got[1] == 0 and (n_cols < 32 or got[31] == n_rows)


def check_that_no_byte_of_a_count_overflows(products: Any, fences: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that goes further down: each byte counts to 255."""
    monkeypatch.setattr(products, "COUNT_BLOCK", 255 * products.COUNT_ROWS)
    bits = fenced(torch.full((products.COUNT_BLOCK + 1, 2), -1, dtype=torch.int32))
    assert (products.feature_count(bits, 64) == len(bits)).all()


@every
def check_hidden_grad(products: Any, fences: None, size: Size, tiles: dict[str, int]) -> None:
    g, w = random(size.tokens, size.d, dtype=torch.bfloat16), random(size.features, size.d, dtype=torch.bfloat16)
    bits = torch.empty(size.tokens, -(-size.features // 32), dtype=torch.int32, device=DEVICE)
    bits.copy_(torch.randint(-(2**31), 2**31, bits.shape))
    gz = fenced(torch.zeros(size.tokens, size.features, dtype=torch.bfloat16))
    sums = products.hidden_grad(g, w, bits, 0.3125, gz, products.Tiling(**tiles))
    active = unpacked(bits)[:, : size.features]
    assert_close(gz, torch.where(active, g.float() @ w.float().t() + 0.3125, 0.0).bfloat16(), 1e-3)
    assert not gz[~active].any()
    assert_close(sums, gz.sum(0, dtype=torch.float32), SUMMED)


def check_that_nan_is_not_hidden(products: Any, fences: None) -> None:
    xc, w = random(64, 32, dtype=torch.bfloat16), random(64, 32, dtype=torch.bfloat16)
    xc[3, 17] = torch.nan
    z = fenced(torch.zeros(64, 64, dtype=torch.bfloat16))
    got = products.encode(xc, w, random(64), z)
    assert z[3].isnan().all() and got.total.isnan()
    assert torch.equal(got.feature_count, (z > 0).sum(0, dtype=torch.int32))


def check_the_edge_of_active(products: Any, fences: None) -> None:
    """Half of the smallest bfloat16 is rounded to 0, so it is not active; a little more is."""
    xc, w = fenced(torch.zeros(64, 16, dtype=torch.bfloat16)), fenced(torch.zeros(64, 16, dtype=torch.bfloat16))
    bias, z = fenced(torch.full((64,), 2.0**-134)), fenced(torch.zeros(64, 64, dtype=torch.bfloat16))
    bias[1::2] *= 1 + 2.0**-8
    got = products.encode(xc, w, bias, z)
    assert torch.equal(unpacked(got.bits), z > 0)
    assert int(got.feature_count.sum()) == 32 * 64


def check_what_fits(products: Any) -> None:
    assert products.fits(1, 8, 16) and products.fits(32768, 32768, 1024)
    assert not products.fits(8, 12, 16) and not products.fits(8, 16, 12) and not products.fits(0, 16, 16)


def compile_all(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, on tensors that have a shape and no memory."""
    launches: list[Any] = []
    monkeypatch.setattr(
        "residual_saes.train.kernels.hopper._launch", lambda kernel, grid, *args, **meta: launches.append((kernel, args, meta))
    )

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, z = make(32768, 1024), make(32768, 1024), make(32768, 32768)
    products.encode(x, w, make(32768, dtype=torch.float32), z)
    products.hidden_grad(x, w, make(32768, 1024, dtype=torch.int32), 0.1, z)
    names = []
    for launch in launches:
        kernel = compiled(launch, 90)
        ptx, name = kernel.asm["ptx"], launch[0].__name__
        names.append(name)
        if name == "_feature_count_kernel":
            assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx), "no loads of 16 bytes"
            continue
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
        assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::", ptx), "no loads"
        assert re.search(r"cp\.async\.bulk\.tensor\.2d\.global\.", ptx) and "stmatrix" in ptx
        assert kernel.metadata.shared <= 227 * 1024
    assert names == ["_encode_kernel", "_feature_count_kernel", "_hidden_grad_kernel"]
