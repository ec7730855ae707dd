"""Each C function against its definition in torch: odd sizes, poisoned outputs, extreme rows."""

import pytest
import torch
from torch import Tensor

from residual_saes.shared.compile import cpu_flags
from residual_saes.train.kernels.base import Active, AdamStep, TorchKernels, Workspace, row_norms
from residual_saes.train.kernels.cpu import AmxKernels, NativeKernels, load_native
from residual_saes.train.kernels.nested import Nested

TORCH = TorchKernels()
SIZES = [(37, 24, 100), (8, 17, 33), (130, 64, 515)]  # B, d, F
# Multiples of 32, which the AMX products take: one tile pair, a remainder of every blocking, and more than one block of each.
DENSE_SIZES = [*SIZES, (32, 32, 32), (160, 96, 544), (416, 288, 800)]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> NativeKernels:
    """The C kernels, with every buffer they are given to fill full of NaN or nonsense before."""
    kernels = load_native()
    assert kernels is not None, "no C compiler: install one to run the tests"
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t: Tensor) -> Tensor:
        return t.fill_(torch.nan if t.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    return kernels


def hidden(b: int, f: int) -> Tensor:
    """Hidden layer: a token with nothing active, one with everything, a feature never and one always active."""
    h = torch.randn(b, f) - 1
    h[1], h[2] = -1.0, 1.0
    h[:, 3], h[:, 4] = -1.0, 1.0
    return feature_major(h.bfloat16())


def feature_major(h: Tensor) -> Tensor:
    """The same [B, F], stored as the native kernels store it."""
    return h.t().clone(memory_format=torch.contiguous_format).t()


def room(b: int, d: int, f: int) -> Workspace:
    return Workspace(b, d, f, "bf16", torch.device("cpu"))


def same(got: Active, wanted: Active) -> None:
    for name in ("row_start", "feature", "value", "feature_start", "by_feature", "token"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_activate_and_compact(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    h, bias = hidden(b, f), 0.1 * torch.randn(f)
    ours, theirs = h.clone(), h.clone()
    got, wanted = native.activate_(ours, bias), TORCH.activate_(theirs, bias)
    assert torch.equal(ours, theirs)
    assert torch.equal(got.row_count, (theirs > 0).sum(1))
    assert torch.equal(got.feature_count, wanted.feature_count)
    torch.testing.assert_close(got.total.float(), wanted.total)
    n = int(got.feature_count.sum())
    assert 0 < n < b * f
    same(native.compact(ours, got, n, 0), TORCH.compact(theirs, wanted, n, 0))


class FeatureMajor(TorchKernels):
    feature_major = True


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("b", "f"), [(37, 100), (300, 515)])
def test_keep_largest(native: NativeKernels, b: int, f: int, uneven: bool, share: float) -> None:
    """Also where every other number, which are all that a sample sees of many, is larger than the rest."""
    torch.manual_seed(b)
    h = torch.randn(f, b).mul(4).round().div(4)
    if uneven:
        h = 1 + h.abs().clamp(max=1)
        h.view(-1)[::2] += 5
    z = h.bfloat16().relu_().abs().t()
    ours, theirs, count = z.clone(memory_format=torch.preserve_format), z.clone(), max(1, int(share * b * f))
    theirs = feature_major(theirs)
    got, least = native.keep_largest_(ours, count)
    wanted, wanted_least = FeatureMajor().keep_largest_(theirs, count)
    assert torch.equal(ours, theirs) and float(least) == float(wanted_least)
    assert torch.equal(got.row_count, (theirs > 0).sum(1))
    assert torch.equal(got.feature_count, wanted.feature_count)
    torch.testing.assert_close(got.total.float(), wanted.total)


@pytest.mark.parametrize(("b", "f"), [(37, 100), (300, 515)])
def test_jump(native: NativeKernels, b: int, f: int) -> None:
    torch.manual_seed(b)
    z, middle = hidden(b, f).relu_(), (0.2 + torch.rand(f)).bfloat16()
    z[0, 5], z[0, 6] = middle[5], 0.75 * middle[6]  # at the threshold, and at its lower bound
    bounds = ((0.75 * middle.float()).bfloat16(), middle, (1.25 * middle.float()).bfloat16())
    ours, theirs = z.clone(memory_format=torch.preserve_format), z.clone(memory_format=torch.preserve_format)
    (got, near), (wanted, wanted_near) = native.jump_(ours, *bounds), FeatureMajor().jump_(theirs, *bounds)
    assert torch.equal(ours, theirs) and (ours == 0).any() and 0 < len(near.token) < z.count_nonzero()
    assert torch.equal(near.token, wanted_near.token) and torch.equal(near.feature, wanted_near.feature)
    assert torch.equal(got.row_count, (theirs > 0).sum(1))
    assert torch.equal(got.feature_count, wanted.feature_count)
    torch.testing.assert_close(got.total.float(), wanted.total)


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_unfold(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    w_enc, w_dec, b_enc, db_enc = torch.randn(f, d), 3 * torch.rand(f, 1) * torch.randn(f, d), torch.randn(f), torch.randn(f)
    norms = row_norms(w_dec)
    ours = [torch.randn(f, d).bfloat16() for _ in range(2)]
    theirs = [gradient.clone() for gradient in ours]
    wanted = TORCH.unfold_(*theirs, db_enc.clone(), w_enc, w_dec, b_enc, norms)
    torch.testing.assert_close(native.unfold_(*ours, db_enc.clone(), w_enc, w_dec, b_enc, norms), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)


def test_a_nan_goes_through_what_leaves_entries_out(native: NativeKernels) -> None:
    for nan in (torch.nan, -torch.nan):
        z = feature_major(torch.rand(37, 100).bfloat16())
        z[5, 7] = nan
        bounds = [torch.full((100,), value).bfloat16() for value in (0.4, 0.5, 0.6)]
        assert not native.jump_(z.clone(memory_format=torch.preserve_format), *bounds)[0].total.isfinite()
        assert not native.keep_largest_(z, 50)[0].total.isfinite()


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_mask(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    z, gz = hidden(b, f), torch.randn(b, f).bfloat16()
    activation = TORCH.activate_(z, torch.zeros(f))
    ours, theirs = feature_major(gz), gz.clone()
    got, wanted = native.mask_(ours, z, activation, 0.3), TORCH.mask_(theirs, z, activation, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
    assert not ours[z == 0].any()
    torch.testing.assert_close(got, ours.float().sum(0))
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_residual_and_weight_grads(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    z = hidden(b, f)
    activation = TORCH.activate_(z, torch.zeros(f))
    active = TORCH.compact(z, activation, int(activation.feature_count.sum()), 0)
    w_dec, x, bias = torch.randn(f, d).bfloat16(), torch.randn(b, d).half(), torch.randn(d)
    got, wanted = (kernels.sparse_residual(active, w_dec, x, bias, 0.5, 0.1) for kernels in (native, TORCH))
    torch.testing.assert_close(got[0], wanted[0], rtol=0.01, atol=1e-3)
    torch.testing.assert_close(got[1], wanted[1], rtol=0.01, atol=0.05)
    torch.testing.assert_close(got[2].float(), wanted[2], rtol=1e-4, atol=1e-3)
    xc, g, g_hidden = torch.randn(b, d).bfloat16(), wanted[0], wanted[1]
    grads = (kernels.sparse_weight_grads(active, w_dec, g, xc, g_hidden, 0.1, room(b, d, f)) for kernels in (native, TORCH))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=1e-2)


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_nested_residual_and_weight_grads(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    z, ends = hidden(b, f), (f // 5, f // 2, f)
    activation = native.activate_(z, torch.zeros(f))
    w_dec, x, bias = torch.randn(f, d).bfloat16(), torch.randn(b, d).half(), torch.randn(d)
    xc, count = torch.randn(b, d).bfloat16(), int(activation.feature_count.sum())
    results = []
    for kernels, dtype, precision in ((native, torch.bfloat16, "bf16"), (TORCH, torch.float64, "fp64")):
        step, rows, out = Nested(kernels, ends), w_dec.to(dtype), Workspace(b, d, f, precision, torch.device("cpu"))
        active = step.compact(z if dtype == torch.bfloat16 else z.double(), activation, count, 0)
        g, g_hidden, square = step.sparse_residual(active, rows, x, bias, 0.5, 0.1)
        grads = step.sparse_weight_grads(active, rows, g, xc.to(dtype), g_hidden, 0.1, out)
        results.append([g, g_hidden, square, step.last_square, *grads])
    for ours, theirs in zip(*results, strict=True):  # off by the rounding of g and of the gradients
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_dots(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    rows, others, start = torch.randn(b, d).bfloat16(), torch.randn(f, d).bfloat16(), torch.arange(b + 1) * 3
    index = torch.randint(f, (3 * b,))
    got, wanted = (kernels.dots(start, index, rows, others) for kernels in (native, TORCH))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("b", "d", "f"), DENSE_SIZES)
def test_dense_products_are_those_of_float64(native: NativeKernels, b: int, d: int, f: int, portable: bool) -> None:
    """From bf16 operands to bf16 results: off by their rounding (0.4 %) and by float32 sums, and by nothing else."""
    torch.manual_seed(b)
    if portable:  # what a processor without AMX runs
        native = NativeKernels(native._c, native._choose)
    out, x, xc = room(b, d, f), torch.randn(b, d).half(), torch.randn(b, d).bfloat16()
    w_enc, w_dec = (torch.randn(f, d).div(d**0.5).bfloat16() for _ in range(2))
    b_enc, b_dec = 0.1 * torch.randn(f) - 0.5, torch.randn(d)
    z, activation = native.encode(xc, w_enc, b_enc, out)
    wanted = torch.relu(xc.double() @ w_enc.double().t() + b_enc.double())
    near(z, wanted)
    assert torch.equal(activation.row_count, (z > 0).sum(1))
    assert torch.equal(activation.feature_count, (z > 0).sum(0).int())
    assert float(activation.total) == pytest.approx(float(z.double().sum()), rel=1e-6)
    g, square = native.dense_residual(z, w_dec, x, b_dec, 0.5)
    residual = z.double() @ w_dec.double() + b_dec - x
    near(g, 0.5 * residual)
    assert float(square) == pytest.approx(float(residual.square().sum()), rel=5e-3)
    gz = torch.where(z > 0, g.double() @ w_dec.double().t() + 0.25, 0.0)
    dw_enc, dw_dec, db_enc = native.dense_weight_grads(z, activation, w_dec, g, xc, 0.25, out)
    near(dw_enc, gz.t() @ xc.double())
    near(dw_dec, z.double().t() @ g.double())
    near(db_enc, gz.sum(0))


def near(got: Tensor, wanted: Tensor) -> None:
    assert torch.isfinite(got).all()
    assert float((got.double() - wanted).norm()) < 4e-3 * float(wanted.norm())
    assert float((got.double() - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())


def test_amx_is_used_where_there_is_amx(native: NativeKernels) -> None:
    assert isinstance(native, AmxKernels) == ("amx_bf16" in cpu_flags())


@pytest.mark.parametrize("b", [64, 50])
def test_nan_reaches_the_total(native: NativeKernels, b: int) -> None:
    x = torch.randn(b, 32).bfloat16()
    x[3, 4] = torch.nan
    _, activation = native.encode(x, torch.randn(64, 32).bfloat16(), torch.zeros(64), room(b, 32, 64))
    assert not torch.isfinite(activation.total)


def test_square_sum(native: NativeKernels) -> None:
    for size in (1, 37, 5000):
        x = torch.randn(size).bfloat16()
        assert float(native.square_sum(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_adam(native: NativeKernels, b: int, d: int, f: int, unit_norm: bool) -> None:
    torch.manual_seed(b)
    w, m, v = torch.randn(f, d), torch.randn(f, d), torch.rand(f, d)
    grad, copies = torch.randn(f, d).bfloat16(), [torch.full((f, d), torch.nan).bfloat16() for _ in range(2)]
    adam = AdamStep(step=7, lr=1e-2, clip=0.3)
    ours, theirs = [t.clone() for t in (w, m, v)], [t.clone() for t in (w, m, v)]
    native.adam_(ours[0], ours[1], ours[2], grad, adam, unit_norm=unit_norm, copy=copies[0])
    TORCH.adam_(theirs[0], theirs[1], theirs[2], grad, adam, unit_norm=unit_norm, copy=copies[1])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(copies[0], copies[1], rtol=0.01, atol=1e-3)


def test_moments_of_a_dead_feature_do_not_become_subnormal(native: NativeKernels) -> None:
    """Those are ten times as slow. The caller's own arithmetic keeps its subnormals."""
    w, m, v, grad = torch.ones(2, 64), torch.full((2, 64), 1e-36), torch.full((2, 64), 1.18e-38), torch.zeros(2, 64).bfloat16()
    for step in range(1, 100):
        native.adam_(w, m, v, grad, AdamStep(step=step, lr=1e-3), unit_norm=False, copy=torch.empty(2, 64).bfloat16())
    for moment in (m, v):
        assert ((moment == 0) | (moment >= torch.finfo(torch.float32).tiny)).all()
    assert not m.equal(torch.full_like(m, 1e-36))
    assert float(torch.tensor(1e-39) * 0.5) > 0


def test_nothing_active_gives_zero_gradients(native: NativeKernels) -> None:
    z = feature_major(torch.full((5, 40), -1.0).bfloat16())
    active = native.compact(z, native.activate_(z, torch.zeros(40)), 0, 0)
    w_dec, x = torch.randn(40, 8).bfloat16(), torch.randn(5, 8)
    g, g_hidden, square = native.sparse_residual(active, w_dec, x, torch.zeros(8), 1.0, 0.1)
    torch.testing.assert_close(g, -x.bfloat16())
    torch.testing.assert_close(square.float(), x.square().sum())
    for grad in native.sparse_weight_grads(active, g, g, g, g_hidden, 0.1, room(5, 8, 40)):
        assert (grad == 0).all()


def test_buffers_follow_the_threads_that_the_library_will_use(native: NativeKernels) -> None:
    """More threads than when the kernels were made, and each counts into a row of its own."""
    threads = native._c.omp_get_max_threads() + 4
    h = hidden(37, 100)
    wanted = (torch.relu(h.float()).bfloat16() > 0).sum(1)
    before = native._c.omp_get_max_threads()
    native._c.omp_set_num_threads(threads)
    try:
        assert native._threads == threads
        assert torch.equal(native.activate_(h, torch.zeros(100)).row_count, wanted)
    finally:
        native._c.omp_set_num_threads(before)
