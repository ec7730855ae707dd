"""TritonKernels against TorchKernels, the definition.

Whether Triton interprets or compiles is settled when it is imported, so the checks run in processes of their own, and
their names keep them out of every other one: `check_*` in the interpreter on CPU tensors, and on the GPU where there is
one; `compile_*` through the compiler for the GPUs these kernels are written for, which takes no GPU and finds what the
interpreter lets pass (types that change in a loop, for one).
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from residual_saes.train.kernels.base import COMPUTE, Active, AdamStep, TorchKernels, Workspace, row_norms
from tests.devices import GPU

TORCH = TorchKernels()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of float32 sums of hundreds of terms of both signs, added in two orders: each step rounds by up to 2**-24 of what is summed up
# so far, which may be larger than the sum. What it comes to depends on the processor: torch draws other numbers and adds in
# another order where its vectors have another width.
SUMMED = 1e-5
LISTS = [name for name in Active.__dataclass_fields__ if name != "frequent"]
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS = [("check_*", "1"), ("compile_*", "0"), *(pytest.param(name, "0", marks=GPU) for name in ("check_*", "large_*"))]


def run_in_its_own_process(file: str, functions: str, interpret: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", f"python_functions={functions}", file]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it is for Linux only)"
)


@needs_triton
@pytest.mark.parametrize(("functions", "interpret"), RUNS)
@pytest.mark.slow
def test_in_its_own_process(functions: str, interpret: str, tmp_path: Path) -> None:
    run_in_its_own_process(__file__, functions, interpret, tmp_path)


@dataclass(frozen=True, slots=True)
class Size:
    tokens: int
    features: int
    d: int


SMALL = [
    (Size(1, 1, 1), torch.float32),
    (Size(19, 75, 24), torch.float32),
    (Size(33, 70, 50), torch.bfloat16),
    (Size(8, 64, 32), torch.bfloat16),
]
small = pytest.mark.parametrize(("size", "dtype"), SMALL, ids=str)


# ----------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def kernels() -> Any:
    """Imported here: in other processes of this file triton may be missing, or be imported the other way."""
    if INTERPRETED:
        mend_interpreter()
    from residual_saes.train.kernels.cuda import TritonKernels

    return TritonKernels()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that the sizes above cross every edge: several slices of d, several chunks of a feature."""
    hidden = {"TILE_ROWS": 8, "TILE_COLS": 64, "TILE_BLOCK": 16, "MASK_ROWS": 8, "MASK_COLS": 64, "MASK_BLOCK": 16, "SAMPLE": 4}
    sparse = {"DECODE_ENTRIES": 4, "DECODE_COLS": 32, "GRAD_ENTRIES": 4, "GRAD_COLS": 32, "CHUNK": 8}
    rows = {"RESIDUAL_ELEMENTS": 64, "ADAM_ELEMENTS": 32}
    for part, tiles in {"hidden": hidden, "lists": {"WORDS": 2}, "sparse": sparse, "rows": rows}.items():
        for name, value in tiles.items():
            monkeypatch.setattr(f"residual_saes.train.kernels.cuda_{part}.{name}", value)


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors are poisoned (every byte 255: NaN, or -1) and lie between fences that nobody may write on."""
    fence, plain, buffers = 1024, torch.empty, []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> Tensor:
        sizes = torch.Size(shape if not shape or isinstance(shape[0], int) else shape[0])
        n_bytes = sizes.numel() * dtype.itemsize
        buffer = plain(n_bytes + 2 * fence, dtype=torch.uint8, device=device).fill_(255)
        buffers.append(buffer)
        return buffer[fence : fence + n_bytes].view(dtype).view(sizes)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for buffer in buffers:
        assert (buffer[:fence] == 255).all() and (buffer[-fence:] == 255).all(), "written outside a tensor"


def mend_interpreter() -> None:
    """The interpreter cuts float32 down to bfloat16, where the device, and torch, round to the nearest, ties to even.
    That of triton 3.6 also takes a one-element array for a number, which numpy has stopped allowing."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def mended_cast(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            exact = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return cast(data, source, target, rounding)

    def mended_patch(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._convert_float, interpreter._patch_lang_tensor = mended_cast, mended_patch


def fenced(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE).copy_(x)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return fenced(torch.randn(shape).to(dtype))


def room(n_features: int, d: int, dtype: torch.dtype, device: Any = DEVICE) -> Workspace:
    """Memory for both weight gradients; poisoned where `torch.empty` is."""
    precision = next(name for name, one in COMPUTE.items() if one == dtype)
    return Workspace(1, d, n_features, precision, torch.device(device))


def transposed(x: Tensor) -> Tensor:
    return fenced(x.t().contiguous()).t()


def hidden(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Before the relu. One feature never active, one on every token; where there is an odd number of tokens, one of
    them without entries; the first and last feature often active."""
    h, bias = torch.randn(size.tokens, size.features), torch.randn(size.features) / 2 - 2
    bias[size.features // 2], bias[size.features // 3], bias[[0, -1]] = -60.0, 60.0, 1.0
    if size.tokens % 2:
        h[size.tokens // 3] = -200.0
    return fenced(h.to(dtype)), fenced(bias)


def lists(size: Size, dtype: torch.dtype) -> Active:
    z, bias = hidden(size, dtype)
    activation = TORCH.activate_(z, bias)
    return TORCH.compact(z, activation, int(activation.feature_count.sum()), 0)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, size: float = 0.0) -> None:
    """`size` is that of what was added up, where little may be left of it."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    error, size = float((got.double() - wanted.double()).norm()), max(size, float(wanted.double().norm()))
    assert error <= tolerance * size, f"off by {error / size:.2e}"


def assert_same(got: Any, wanted: Any, names: list[str]) -> None:
    for name in names:
        one, other = getattr(got, name), getattr(wanted, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


def assert_rounded_alike(got: Tensor, wanted: Tensor) -> None:
    """Sums in another order: float32 differs in its last bits, bfloat16 in the rare sum next to a rounding edge."""
    assert_close(got, wanted, SUMMED if got.dtype == torch.float32 else 1e-3)
    assert ((got - wanted).abs() <= 2**-7 * wanted.abs() + 1e-5).all()


# ----------------------------------------------------------------------------- against the definition


@small
def check_activation_and_lists(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    h, bias = hidden(size, dtype)
    wanted_z = h.clone()
    wanted = TORCH.activate_(wanted_z, bias)
    got = kernels.activate_(h, bias)
    assert torch.equal(h, wanted_z)
    assert_same(got, wanted, ["feature_count"])
    assert_close(got.total, wanted.total, SUMMED)

    nnz = int(wanted.feature_count.sum())
    wanted_lists = TORCH.compact(wanted_z, wanted, nnz, 0)
    assert_same(kernels.compact(h, got, nnz, 0), wanted_lists, LISTS)


@pytest.mark.parametrize(
    ("size", "ties", "share"),
    [
        *((SMALL[2], ties, share) for ties, share in (("few", 0.1), ("few", 1.5), ("many", 0.0), ("many", 0.5), ("all", 0.3))),
        *((size, "many", 0.6) for size in SMALL),
    ],
    ids=str,
)
def check_keep_largest(
    kernels: Any, small_tiles: None, fences: None, size: tuple[Size, torch.dtype], ties: str, share: float
) -> None:
    """A share of those above 0. Of few or many or all that are equal."""
    size, dtype = size
    h, bias = hidden(size, dtype)
    if ties != "few":
        h.div_(8).round_().mul_(8) if ties == "many" else h.fill_(1.0)
    kernels.activate_(h, bias if ties == "few" else bias.round())
    wanted_z, count = h.clone(), min(h.numel(), max(1, round(share * int((h > 0).sum()))))
    wanted, wanted_least = TORCH.keep_largest_(wanted_z, count)
    got, least = kernels.keep_largest_(h, count)
    assert torch.equal(h, wanted_z) and torch.equal(least, wanted_least) and least.dtype == dtype
    assert_same(got, wanted, ["feature_count"])
    assert_close(got.total, wanted.total, SUMMED)
    nnz = int(wanted.feature_count.sum())
    assert_same(kernels.compact(h, got, nnz, 0), TORCH.compact(wanted_z, wanted, nnz, 0), LISTS)


@pytest.mark.parametrize("count", [1, 500])
def check_that_the_largest_do_not_hide_a_nan(kernels: Any, small_tiles: None, count: int) -> None:
    z = random(20, 50, dtype=torch.bfloat16).relu_()
    z[7, 30], z[9, 0] = -torch.nan, torch.inf
    assert not kernels.keep_largest_(z, count)[0].total.isfinite()


def check_that_a_sample_may_mislead(kernels: Any, small_tiles: None) -> None:
    """All that it meets are larger than the least one that is to stay."""
    z = random(20, 50, dtype=torch.bfloat16).abs_().clamp_(max=1.0)
    z.view(-1)[:: 1000 // 4 | 1] = 9.0
    wanted = z.clone()
    TORCH.keep_largest_(wanted, 600)
    kernels.keep_largest_(z, 600)
    assert torch.equal(z, wanted)


@small
def check_fold(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    shape = size.features, size.d
    w_enc, w_dec = random(*shape), random(*shape)
    copies = [(random(*shape, dtype=dtype), random(*shape, dtype=dtype)) for _ in range(2)]
    norms, wanted_norms = (k.fold_(w_enc, w_dec, *pair) for k, pair in zip((kernels, TORCH), copies, strict=True))
    assert_close(norms, wanted_norms, 1e-6)
    for one, other in zip(*copies, strict=True):
        assert_rounded_alike(one, other)


@small
def check_unfold(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    shape = size.features, size.d
    dw_enc, dw_dec, w_enc, w_dec = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(*shape), random(*shape)
    b_enc, db_enc, norms = random(size.features), random(size.features), row_norms(w_dec)
    wanted = dw_enc.clone(), dw_dec.clone()
    wanted_db = TORCH.unfold_(*wanted, db_enc, w_enc, w_dec, b_enc, norms)
    assert torch.equal(kernels.unfold_(dw_enc, dw_dec, db_enc, w_enc, w_dec, b_enc, norms), wanted_db)
    assert torch.equal(dw_enc, wanted[0])
    if size.d > 1:  # of a single number nothing is left but what the terms, which cancel, were rounded by
        assert_close(dw_dec, wanted[1], SUMMED if dtype == torch.float32 else 1e-3)


@small
def check_mask(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    z, bias = hidden(size, dtype)
    marked = kernels.activate_(z, bias)
    gz = random(size.tokens, size.features, dtype=dtype)
    wanted = gz.clone()
    l1_grad = 0.3125  # exact in bfloat16, to which torch rounds it first on a CPU but not on a GPU
    wanted_sums = TORCH.mask_(wanted, z, marked, l1_grad)
    assert_close(kernels.mask_(gz, z, marked, l1_grad), wanted_sums, SUMMED)
    assert torch.equal(gz, wanted)


@small
def check_centring_and_dense_residual(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    z, w, bias = random(size.tokens, size.features, dtype=dtype), random(size.features, size.d, dtype=dtype), random(size.d)
    x = random(size.tokens, size.d, dtype=torch.float16)
    assert torch.equal(kernels.centre(x, bias, dtype), TORCH.centre(x, bias, dtype))
    g, squares = kernels.dense_residual(z, w, x, bias, 0.7)
    wanted_g, wanted_squares = TORCH.dense_residual(z, w, x, bias, 0.7)
    assert_rounded_alike(g, wanted_g)
    assert_close(squares, wanted_squares, SUMMED)


@small
def check_residual(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    active = lists(size, dtype)
    x_dtype, layout = (torch.float32, transposed) if dtype == torch.float32 else (torch.float16, fenced)
    w, x, bias = random(size.features, size.d, dtype=dtype), random(size.tokens, size.d, dtype=x_dtype), random(size.d)
    wanted_g, _, wanted_squares = TORCH.sparse_residual(active, w, x, bias, 0.7, 0.3)
    g, g_hidden, squares = kernels.sparse_residual(active, layout(w), x, bias, 0.7, 0.3)
    assert_rounded_alike(g, wanted_g)
    assert_close(squares, wanted_squares, SUMMED)
    token = torch.repeat_interleave(torch.arange(size.tokens, device=DEVICE), active.row_start.diff())
    wanted_hidden = (g[token].float() * w[active.feature.long()].float()).sum(1) + 0.3  # from g as returned
    assert_close(g_hidden, wanted_hidden, SUMMED)


@small
def check_frequent_features(
    kernels: Any, small_tiles: None, fences: None, monkeypatch: pytest.MonkeyPatch, size: Size, dtype: torch.dtype
) -> None:
    """A few by dense products and the rest by their entries: what the entries alone give."""
    monkeypatch.setattr("residual_saes.train.kernels.cuda_lists.FREQUENT", 0.3)
    monkeypatch.setattr("residual_saes.train.kernels.cuda_lists.FREQUENT_STEP", 8)
    z, bias = hidden(size, dtype)
    activation = kernels.activate_(z, bias)
    often = activation.feature_count > 0.3 * size.tokens
    active, total, listed, n_frequent = kernels.counts(activation).tolist()
    assert (active, n_frequent) == (float((z > 0).sum()), float(often.sum()))
    assert total == pytest.approx(float(z.double().sum()))

    rare = z.masked_fill(often, 0.0)
    rare_activation = TORCH.activate_(rare, torch.zeros(size.features, device=DEVICE))
    got, wanted = (
        kernels.compact(z, activation, int(listed), int(n_frequent)),
        TORCH.compact(rare, rare_activation, int(listed), 0),
    )
    assert_same(got, wanted, LISTS)
    if not n_frequent:  # a single token may have nothing active at all
        assert size.tokens == 1 and got.frequent is None
        return
    assert torch.equal(got.frequent.feature, often.nonzero()[:, 0])
    assert torch.equal(got.frequent.z[:, : int(n_frequent)], z[:, often]) and not got.frequent.z[:, int(n_frequent) :].any()

    w, x, bias = random(size.features, size.d, dtype=dtype), random(size.tokens, size.d, dtype=torch.float16), random(size.d)
    xc, whole = random(size.tokens, size.d, dtype=dtype), TORCH.compact(z, activation, int(active), 0)
    results = []
    for k, entries in ((kernels, got), (TORCH, whole)):
        g, g_hidden, squares = k.sparse_residual(entries, w, x, bias, 0.7, 0.3)
        rooms = room(size.features, size.d, dtype)
        results.append([g, squares, *k.sparse_weight_grads(entries, w, g, xc, g_hidden, 0.3, rooms)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, SUMMED if dtype == torch.float32 else 2e-2)


@small
def check_weight_grads(kernels: Any, small_tiles: None, fences: None, size: Size, dtype: torch.dtype) -> None:
    compare_weight_grads(kernels, size, dtype)


def compare_weight_grads(kernels: Any, size: Size, dtype: torch.dtype) -> None:
    active = lists(size, dtype)
    g, xc = random(size.tokens, size.d, dtype=dtype), random(size.tokens, size.d, dtype=dtype)
    g_hidden = random(active.feature.numel())
    got, wanted = (
        k.sparse_weight_grads(active, g, g, xc, g_hidden, 0.3, room(size.features, size.d, dtype)) for k in (kernels, TORCH)
    )
    never = active.feature_start.diff() == 0
    for one, other in zip(got, wanted, strict=True):
        assert_rounded_alike(one, other)
        assert not one[never].any()


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 1), torch.float32), ((9, 5), torch.float32), ((7, 50), torch.bfloat16)], ids=str
)
def check_adam(
    kernels: Any, small_tiles: None, fences: None, shape: tuple[int, int], dtype: torch.dtype, unit_norm: bool
) -> None:
    w0, m0, v0 = random(*shape), random(*shape) / 9, random(*shape) ** 2
    w, m, v = fenced(w0), fenced(m0), fenced(v0)
    grad, copy = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    layouts = [(grad, copy), (transposed(grad), transposed(copy)), (grad, fenced(copy.float()))]
    for step, (a_grad, a_copy) in enumerate(layouts, start=1):
        adam = AdamStep(step=step, lr=3e-2, clip=0.4)
        TORCH.adam_(w0, m0, v0, grad, adam, unit_norm=unit_norm, copy=copy.clone())
        kernels.adam_(w, m, v, a_grad, adam, unit_norm=unit_norm, copy=a_copy)
        for one, other in zip((w, m, v), (w0, m0, v0), strict=True):
            assert_close(one, other, 1e-6, size=0.1)
        assert torch.equal(a_copy, w.to(a_copy.dtype))


# ----------------------------------------------------------------------------- with the tiles used in earnest


def compare_a_whole_step(kernels: Any, size: Size) -> None:
    """What one kernel leaves, the next one takes. Twice, to the same bits."""
    h, bias = hidden(size, torch.bfloat16)
    w, x = random(size.features, size.d, dtype=torch.bfloat16) / 9, random(size.tokens, size.d, dtype=torch.bfloat16)
    b_dec = random(size.d)

    def step(kernels: Any) -> list[Tensor]:
        z = fenced(h)
        activation = kernels.activate_(z, bias)
        active = kernels.compact(z, activation, int(activation.feature_count.sum()), 0)
        g, g_hidden, squares = kernels.sparse_residual(active, w, x, b_dec, 1e-2, 1e-3)
        d_bias = kernels.mask_(fenced(h), z, activation, 0.5)
        weight_grads = kernels.sparse_weight_grads(active, w, g, x, g_hidden, 1e-3, room(size.features, size.d, w.dtype))
        masters = [fenced(w.float()), torch.zeros_like(w.float()), torch.zeros_like(w.float())]
        kernels.adam_(*masters, weight_grads[1], AdamStep(step=1, lr=1e-3), unit_norm=True, copy=fenced(w))
        return [z, active.value, active.by_feature, g, g_hidden, squares, d_bias, *weight_grads, *masters]

    got = step(kernels)
    for one, other in zip(got, step(TORCH), strict=True):
        assert_close(one, other, 3e-3)
    if not INTERPRETED:  # programs one after the other add in one order anyway
        assert all(torch.equal(one, other) for one, other in zip(got, step(kernels), strict=True))


def check_a_whole_step(kernels: Any, fences: None) -> None:
    compare_a_whole_step(kernels, Size(tokens=13, features=70, d=300))


def check_features_longer_than_a_chunk(kernels: Any, fences: None) -> None:
    compare_weight_grads(kernels, Size(tokens=600, features=12, d=300), torch.bfloat16)


def large_whole_step(kernels: Any) -> None:
    """Minutes in the interpreter, so only by hand there: TRITON_INTERPRET=1 pytest -o python_functions=large_* <this>"""
    compare_a_whole_step(kernels, Size(512, 1000, 96) if INTERPRETED else Size(1024, 32768, 1024))


# ----------------------------------------------------------------------------- what else is promised


def check_that_nan_is_not_hidden(kernels: Any) -> None:
    h = torch.randn(5, 40, device=DEVICE)
    h[3, 17] = torch.nan
    activation = kernels.activate_(h, torch.zeros(40, device=DEVICE))
    assert h[3, 17].isnan() and activation.total.isnan()
    assert int(activation.feature_count[17]) == int((h[:, 17] > 0).sum())


def check_no_entries_at_all(kernels: Any, fences: None) -> None:
    z, n_features, d = fenced(torch.zeros(9, 70)), 70, 20
    active = kernels.compact(z, kernels.activate_(z, -torch.ones(70, device=DEVICE)), 0, 0)
    g, g_hidden, _ = kernels.sparse_residual(active, random(n_features, d), random(9, d), random(d), 1.0, 0.1)
    assert g_hidden.shape == (0,) and not g.isnan().any()
    grads = kernels.sparse_weight_grads(active, g, g, g, g_hidden, 0.1, room(n_features, d, g.dtype))
    assert not any(grad.any() for grad in grads)


def check_that_strided_columns_are_refused(kernels: Any) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        kernels.activate_(torch.randn(40, 5, device=DEVICE).t(), torch.zeros(40, device=DEVICE))
    w = torch.randn(40, 5, device=DEVICE).t()
    with pytest.raises(ValueError, match="contiguous"):
        kernels.adam_(w, w, w, w, AdamStep(step=1, lr=1e-3), unit_norm=False, copy=w)


# ----------------------------------------------------------------------------- through the compiler


def recorded_launches(kernels: Any, monkeypatch: pytest.MonkeyPatch, size: Size, dtype: torch.dtype) -> list[Any]:
    """Every launch of a step, on tensors that have a shape and no memory, so at full size."""
    launches: list[Any] = []
    for part in ("hidden", "lists", "sparse", "rows"):
        name = f"residual_saes.train.kernels.cuda_{part}._launch"
        monkeypatch.setattr(name, lambda kernel, grid, *args, **meta: launches.append((kernel, args, meta)))

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    z, nnz = make(size.tokens, size.features, dtype=dtype), 150 * size.tokens
    activation = kernels.activate_(z, make(size.features))
    kernels.keep_largest_(z.bfloat16(), nnz)
    kernels.mask_(z, z, activation, 0.1)
    kernels.counts(activation)
    active = kernels.compact(z, activation, nnz, 0)
    w, x = make(size.features, size.d, dtype=dtype), make(size.tokens, size.d, dtype=dtype)
    kernels.centre(x, make(size.d), dtype)
    kernels.dense_residual(z, w, x, make(size.d), 0.1)
    g, g_hidden, _ = kernels.sparse_residual(active, w, x, make(size.d), 0.1, 0.1)
    kernels.sparse_weight_grads(active, w, g, x, g_hidden, 0.1, room(size.features, size.d, dtype, "meta"))
    some = kernels.compact(z, activation, nnz, min(100, size.features))
    kernels.sparse_residual(some, w, x, make(size.d), 0.1, 0.1)
    master, bias = make(size.features, size.d), make(size.features)
    kernels.fold_(master, master, w, w)
    kernels.unfold_(w, w, bias, master, master, bias, bias)
    for unit_norm in (False, True):
        kernels.adam_(master, master, master, w, AdamStep(step=2, lr=1e-3), unit_norm=unit_norm, copy=w)
    return launches


def compiled(launch: Any, capability: int) -> Any:
    """The launch through the compiler, specialised as Triton does: ints of 1 are constants, multiples of 16 are known to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, meta = launch
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    divisible = {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        aligned = name not in kernel.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = pointers[value.dtype]
        elif hasattr(value, "block_shape"):
            signature[name], aligned = f"tensordesc<{pointers[value.base.dtype][1:]}{value.block_shape}>", False
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1 and aligned:
            signature[name], constants[name], aligned = "constexpr", 1, False
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = aligned and value % 16 == 0
        if aligned:
            divisible[(index,)] = [["tt.divisibility", 16]]
    constants |= {name: value for name, value in meta.items() if name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {name: value for name, value in meta.items() if name not in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "size", "dtype"),
    [
        (90, Size(32768, 32768, 1024), torch.bfloat16),
        (80, Size(1001, 3001, 77), torch.float32),
    ],
    ids=["hopper-at-full-size", "ampere-at-odd-sizes"],
)
def compile_every_kernel(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, capability: int, size: Size, dtype: torch.dtype
) -> None:
    names = set()
    for launch in recorded_launches(kernels, monkeypatch, size, dtype):
        ptx, name = compiled(launch, capability).asm["ptx"], launch[0].__name__
        names.add(name)
        # At full size every kernel that streams or gathers must do it 16 bytes at a time.
        wide = re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        assert wide or size.d % 16 or name == "_compact_kernel", name
    assert len(names) == 15
