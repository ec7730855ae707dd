import pytest
import torch

from residual_saes.harvest import rows as module
from residual_saes.harvest.rows import put_rows, to_float16


def test_what_float16_cannot_hold_is_counted_and_never_infinite() -> None:
    x = torch.tensor([1.0, 65504.0, 65519.0, 65520.0, -1e6, torch.inf, -torch.inf, torch.nan])
    half, bad = to_float16(x)
    assert half.tolist() == [1.0, 65504.0, 65504.0, 65504.0, -65504.0, 65504.0, -65504.0, 0.0]
    assert int(bad) == 5  # 65519 still rounds to the largest float16


@pytest.mark.skipif(module._library() is None, reason="rows.c does not compile here")
def test_rows_are_put_as_to_float16_makes_them() -> None:
    """Every bfloat16 there is, NaN and infinity included."""
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).reshape(256, 256)
    place = torch.randperm(256, generator=torch.Generator().manual_seed(0)) + 10
    data, want = torch.zeros(270, 256, dtype=torch.float16), torch.zeros(270, 256, dtype=torch.float16)
    half, bad = to_float16(x)
    want[place] = half
    assert int(put_rows(x, place, data)) == int(bad) > 0
    assert torch.equal(data.view(torch.int16), want.view(torch.int16))
    assert torch.equal(put_rows(x.float(), place, data), bad)  # the way of other types


def test_rows_are_put_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda source: None)
    data = torch.zeros(2, 8, dtype=torch.float16)
    assert int(put_rows(torch.full((1, 8), 1e9, dtype=torch.bfloat16), torch.tensor([1]), data)) == 8
    assert data.tolist() == [[0.0] * 8, [65504.0] * 8]
