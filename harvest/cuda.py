"""Rows to their places in a block, as float16, in one pass on CUDA: what `to_float16` and `index_copy_` do in six.

2 or 4 bytes a value read and 2 written; nothing waits for the device. In TRITON_INTERPRET=1 it runs on CPU tensors, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch as _launch
from residual_saes.shared.launch import row_stride as _row_stride

ROWS, COLS = 4, 1024  # of a tile; 16-byte reads need 8 bfloat16 columns a thread, and 128 threads span 1024
_LARGEST = tl.constexpr(65504.0)
_TOO_LARGE = tl.constexpr(65520.0)  # from here on the nearest float16 is infinite


def put_rows(x: Tensor, rows: Tensor, data: Tensor) -> Tensor:
    """x bfloat16 or float32 [n, d] as float16 to data[rows]; how many values did not fit, int64. As `rows.put_rows`."""
    n, d = x.shape
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    cols = min(COLS, max(16, triton.next_power_of_2(d)))
    grid = (triton.cdiv(n, ROWS), triton.cdiv(d, cols))
    _launch(_put_kernel, grid, x, rows, data, count, n, d, _row_stride(x), _row_stride(data), ROWS=ROWS, COLS=cols, num_warps=4)
    return count


@triton.jit
def _put_kernel(
    x_ptr: tl.tensor, rows_ptr: tl.tensor, data_ptr: tl.tensor, count_ptr: tl.tensor, n: tl.tensor, d: tl.tensor,
    x_stride: tl.tensor, data_stride: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    fits = tl.abs(x) < _TOO_LARGE  # false for NaN
    instead = tl.where(x == x, tl.where(x > 0.0, _LARGEST, -_LARGEST), 0.0)
    half = tl.where(fits, x, instead).to(tl.float16)
    place = tl.load(rows_ptr + rows, mask=rows < n, other=0)
    tl.store(data_ptr + place.to(tl.int64)[:, None] * data_stride + cols[None, :], half, mask=inside)
    bad = tl.sum(tl.sum(tl.where(fits, 0, 1), axis=1), axis=0)  # what is outside was read as 0, which fits
    if bad > 0:  # hardly ever
        tl.atomic_add(count_ptr, bad.to(tl.int64), sem="relaxed")
