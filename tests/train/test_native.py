"""Each C function against its definition in torch: odd sizes, poisoned outputs, extreme rows."""

import pytest
import torch
from torch import Tensor

from train.kernels import Active, AdamStep, TorchKernels
from train.native import NativeKernels, load_native

TORCH = TorchKernels()
SIZES = [(37, 24, 100), (8, 17, 33), (130, 64, 515)]  # B, d, F


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
    return h.bfloat16()


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
    assert torch.equal(got.row_count, wanted.row_count)
    assert torch.equal(got.feature_count, wanted.feature_count)
    torch.testing.assert_close(got.total, wanted.total)
    n = int(got.row_count.sum())
    assert 0 < n < b * f
    same(native.compact(ours, got, n), TORCH.compact(theirs, wanted, n))


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_mask(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    z, gz = hidden(b, f).relu_(), torch.randn(b, f).bfloat16()
    ours, theirs = gz.clone(), gz.clone()
    got, wanted = native.mask_(ours, z, 0.3), TORCH.mask_(theirs, z, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
    assert not ours[z == 0].any()
    torch.testing.assert_close(got, ours.float().sum(0))
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_residual_and_weight_grads(native: NativeKernels, b: int, d: int, f: int) -> None:
    torch.manual_seed(b)
    z = hidden(b, f)
    activation = TORCH.activate_(z, torch.zeros(f))
    active = TORCH.compact(z, activation, int(activation.row_count.sum()))
    w_dec, x, bias = torch.randn(f, d).bfloat16(), torch.randn(b, d).half(), torch.randn(d)
    got, wanted = native.residual(active, w_dec, x, bias, 0.5, 0.1), TORCH.residual(active, w_dec, x, bias, 0.5, 0.1)
    torch.testing.assert_close(got[0], wanted[0], rtol=0.01, atol=1e-3)
    torch.testing.assert_close(got[1], wanted[1], rtol=0.01, atol=0.05)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-4, atol=1e-3)
    xc, g, g_hidden = torch.randn(b, d).bfloat16(), wanted[0], wanted[1]
    for ours, theirs in zip(
        native.weight_grads(active, g, xc, g_hidden), TORCH.weight_grads(active, g, xc, g_hidden), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=1e-2)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("order", ["feature_first", "feature_last"])
@pytest.mark.parametrize(("b", "d", "f"), SIZES)
def test_adam(native: NativeKernels, b: int, d: int, f: int, order: str, unit_norm: bool) -> None:
    torch.manual_seed(b)

    def matrix(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if order == "feature_last" else t

    w, m, v = torch.randn(f, d), torch.randn(f, d), torch.rand(f, d)
    grad, copies = matrix(torch.randn(f, d).bfloat16()), [matrix(torch.full((f, d), torch.nan).bfloat16()) for _ in range(2)]
    adam = AdamStep(step=7, lr=1e-2, clip=0.3)
    ours, theirs = [t.clone() for t in (w, m, v)], [t.clone() for t in (w, m, v)]
    native.adam_(ours[0], ours[1], ours[2], grad, adam, unit_norm=unit_norm, copy=copies[0])
    TORCH.adam_(theirs[0], theirs[1], theirs[2], grad, adam, unit_norm=unit_norm, copy=copies[1])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert copies[0].stride() == copies[1].stride()
    torch.testing.assert_close(copies[0], copies[1], rtol=0.01, atol=1e-3)


def test_nothing_active_gives_zero_gradients(native: NativeKernels) -> None:
    z = torch.full((5, 40), -1.0).bfloat16()
    active = native.compact(z, native.activate_(z, torch.zeros(40)), 0)
    w_dec, x = torch.randn(40, 8).bfloat16(), torch.randn(5, 8)
    g, g_hidden, square = native.residual(active, w_dec, x, torch.zeros(8), 1.0, 0.1)
    torch.testing.assert_close(g, -x.bfloat16())
    torch.testing.assert_close(square, x.square().sum())
    for grad in native.weight_grads(active, g, g, g_hidden):
        assert (grad == 0).all()
