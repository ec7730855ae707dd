"""How float16 activations are stored in a byte a value, and what that costs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from residual_saes.shared.cache import int8
from residual_saes.shared.cache.int8 import Reference, narrow, narrow_, take, widen


def activations(rows: int = 2048, d: int = 40, context: int = 64, seed: int = 0) -> Tensor:
    """About a mean, dimensions of unlike sizes, and first positions some fifty times as long in two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(d, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    x = torch.randn(rows, d, generator=generator) * sizes + 2 * sizes
    x[::context, 3] += 600
    x[::context, d - 1] -= 900
    return x.half()


def relative(stored: Tensor, x: Tensor, reference: Reference) -> float:
    """Error of ordinary and long rows, whichever is the larger, each of their own variance."""
    error, wide = (widen(stored, reference).float() - x.float()).square(), x.float()
    long = wide.norm(dim=1) > 300
    return max(float(error[at].sum() / (wide[at] - wide[at].mean(0)).square().sum()) for at in (long, ~long))


@pytest.mark.parametrize("d", [8, 40, 41])
def test_values_come_back_of_ordinary_rows_and_of_long_ones(d: int) -> None:
    reference, x = Reference.of(activations(d=d)), activations(d=d, seed=2)
    stored, lost = narrow(x, reference)
    assert stored.shape == (len(x), d + 2) and stored.dtype == torch.int8 and lost == 0
    assert relative(stored, x, reference) < 1e-4
    scale = stored[:, d:].contiguous().view(torch.float16)[:, 0]
    assert torch.equal(scale < 0, x.float().norm(dim=1) > 300)
    assert int(stored[:, :d].abs().amax()) == 127
    step = scale.abs().float()[:, None] * reference.scale[(scale < 0).long()]
    wrong = (widen(stored, reference).float() - x.float()).abs()
    assert bool((wrong <= 0.5001 * step + x.float().abs() * 2**-10).all())  # half a step, and the rounding to float16


@pytest.mark.parametrize("d", [8, 40, 41])
def test_c_and_torch_store_the_same_bits(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C version does it in the memory of the block."""
    if int8._library() is None:
        pytest.skip("no C compiler, or a processor without F16C")
    x, reference = activations(d=d), Reference.of(activations(d=d, seed=3))
    expected, _ = narrow(x, reference)
    mine = x.clone()
    stored, lost = narrow_(mine, reference)
    assert lost == 0 and stored.ctypes.data == mine.data_ptr()
    assert np.array_equal(stored, expected.numpy())
    order, out = torch.arange(len(x)).flip(0), torch.empty(x.shape, dtype=torch.float16)
    take(torch.from_numpy(stored), order, reference, out)
    assert torch.equal(out, widen(expected[order], reference))
    monkeypatch.setattr(int8, "_library", lambda: None)
    mine, other = x.clone(), torch.empty_like(out)
    assert np.array_equal(narrow_(mine, reference)[0], expected.numpy())
    take(torch.from_numpy(stored), order, reference, other)
    assert torch.equal(out, other)


@pytest.mark.parametrize("library", [True, False])
def test_what_has_no_place_is_counted_and_nothing_becomes_infinite(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(int8, "_library", lambda: None)
    small = Reference.of(torch.randn(64, 8).half() * 1e-3)
    x = torch.full((4, 8), 65504.0).half()
    x[1], x[2, 0] = -65504.0, 0.0
    x[3] = small.mean[0].half()
    stored, lost = narrow_(x.clone(), small)
    back = widen(torch.from_numpy(stored), small)
    assert bool(back.isfinite().all()) and lost == 23  # in three rows all but the one that is near
    assert float((back[3] - x[3]).abs().max()) < 1e-5
    largest = Reference(torch.zeros(2, 8), torch.full((2, 8), 1e4))
    again = widen(torch.from_numpy(narrow_(x.clone(), largest)[0]), largest)
    assert float(again[0].max()) == 65504 and float(again[1].min()) == -65504


def test_a_dimension_that_does_not_vary_decides_no_scale() -> None:
    first = torch.randn(512, 8)
    first[:, 2] = 1.0
    later = torch.randn(512, 8)
    reference = Reference.of(first.half())
    assert float(reference.scale.min()) > 5e-3
    stored, _ = narrow(later.half(), reference)
    others = [0, 1, 3, 4, 5, 6, 7]
    error = (widen(stored, reference).float() - later)[:, others].square().mean()
    assert float(error) < 0.25 * float(later[:, others].var())


def test_a_reference_is_what_was_written() -> None:
    reference = Reference.of(activations())
    again = Reference.from_json(reference.to_json(), 40)
    assert torch.equal(again.mean, reference.mean) and torch.equal(again.scale, reference.scale)
    zero = Reference(reference.mean, reference.scale * 0).to_json()
    for damaged in ({}, {"mean": "", "scale": ""}, reference.to_json() | {"scale": "%%%"}, {"mean": 1, "scale": 1}, zero, None):
        with pytest.raises(ValueError, match="."):
            Reference.from_json(damaged, 40)
