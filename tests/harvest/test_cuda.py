"""cuda.put_rows against to_float16 and index_copy_.

In processes of their own, for the reason given in tests/train/kernels/test_cuda.py.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.harvest.rows import to_float16
from tests.devices import GPU
from tests.train.kernels.test_cuda import mend_interpreter, needs_triton, run_in_its_own_process

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS = [("check_*", "1"), ("compile_*", "0"), pytest.param("check_*", "0", marks=GPU)]


@needs_triton
@pytest.mark.parametrize(("functions", "interpret"), RUNS)
@pytest.mark.slow
def test_in_its_own_process(functions: str, interpret: str, tmp_path: Path) -> None:
    run_in_its_own_process(__file__, functions, interpret, tmp_path)


@pytest.fixture(scope="module")
def rows_module() -> Any:
    """Imported here: in other processes of this file triton may be missing, or be imported the other way."""
    if INTERPRETED:
        mend_interpreter()
    from residual_saes.harvest import cuda

    return cuda


def every_float(dtype: torch.dtype) -> Tensor:
    """Every bfloat16 there is, NaN and infinity included; as float32 also every float16, its neighbours, and halves between."""
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    if dtype == torch.bfloat16:
        return x
    half = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float()
    between = half + (half.roll(-1) - half) / 2
    edge = torch.tensor([65504.0, 65519.0, 65519.996, 65520.0, 65520.004, 1e6, torch.inf, torch.nan])
    near = [torch.nextafter(between, torch.tensor(way)) for way in (torch.inf, -torch.inf)]
    return torch.cat([x.float(), half, between, *near, edge, -edge])


def compare(module: Any, x: Tensor) -> int:
    """What `x` leaves in a block, bit for bit, and the rows that are not its own; how many values did not fit."""
    n, d = x.shape
    places = torch.randperm(n + 5, generator=torch.Generator().manual_seed(1))[:n].to(DEVICE)
    data = torch.full((n + 5, d), -3.0, dtype=torch.float16, device=DEVICE)
    half, bad = to_float16(x.cpu())
    want = data.cpu().index_copy_(0, places.cpu(), half)
    count = module.put_rows(x, places, data)
    assert count.dtype == torch.int64 and count.shape == ()
    assert torch.equal(data.cpu().view(torch.int16), want.view(torch.int16))
    assert int(count) == int(bad)
    return int(bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def check_every_value(rows_module: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = every_float(dtype)
    x = x[: x.numel() // 256 * 256].view(-1, 256)  # 16 rows of a tile: the interpreter takes its time for each program
    monkeypatch.setattr(rows_module, "ROWS", 16)
    assert compare(rows_module, x.to(DEVICE)) > 0


@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 20), (4, 1024), (9, 1030), (6, 2048)])
def check_sizes_that_leave_a_rest(rows_module: Any, n: int, d: int) -> None:
    x = torch.randn(n, d)
    x[n // 2, d // 2] = torch.nan
    assert compare(rows_module, x.to(DEVICE)) == 1
    assert compare(rows_module, x.to(torch.bfloat16).to(DEVICE)) == 1


def check_rows_that_lie_apart(rows_module: Any) -> None:
    assert compare(rows_module, (torch.randn(7, 90) * 40_000).to(DEVICE)[:, :70]) > 0
    with pytest.raises(ValueError, match="contiguous"):
        rows_module.put_rows(torch.randn(7, 9).t(), torch.arange(9), torch.zeros(9, 7, dtype=torch.float16))


@pytest.mark.parametrize(("capability", "d", "dtype"), [(90, 1024, "bf16"), (80, 1024, "fp32"), (80, 77, "bf16")], ids=str)
def compile_kernel(rows_module: Any, capability: int, d: int, dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = rows_module._put_kernel.arg_names
    signature = dict(zip(names, [f"*{dtype}", "*i64", "*fp16", "*i64", *["i32"] * 4, *["constexpr"] * 2], strict=True))
    values = dict(zip(names[4:8], [32768, d, d, d], strict=True))
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names[:8]) if values.get(name, 0) % 16 == 0}
    constants = {"ROWS": rows_module.ROWS, "COLS": rows_module.COLS}
    source = ASTSource(fn=rows_module._put_kernel, signature=signature, constexprs=constants, attrs=even)
    ptx = str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"])
    assert "atom" in ptx or "red" in ptx
    if d % 16 == 0:  # 16 bytes at a time, both ways
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        assert re.search(r"st\.global[\w.:]*\.v4\.b32", ptx) or (
            dtype == "fp32" and re.search(r"st\.global[\w.:]*\.v2\.b32", ptx)
        )
