"""What is done along the active entries on CUDA: dot products with gathered rows of a matrix, and weighted sums of them.

Either reads each entry's row once and writes nothing of its size; torch's own would write the gathered rows first. Sums are in
float32 and a fixed order. A program is one row of the batch, whose entries it takes a few at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch, row_stride

ENTRIES, COLS, WARPS = 8, 128, 1


def dots(x: Tensor, w: Tensor, start: Tensor, feature: Tensor) -> Tensor:
    """x[row] · w[feature] of each entry; those of a row are from `start` [n + 1] of it on. x [n, d], w [F, d], float32."""
    out = torch.empty(len(feature), device=x.device)
    launch(
        _dots_kernel, (len(x),),
        start, feature, x, w, out, x.shape[1], row_stride(x), row_stride(w), ENTRIES=ENTRIES, COLS=COLS, num_warps=WARPS,
    )  # fmt: skip
    return out


def weighted_rows(start: Tensor, feature: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """Σ value · w[feature] over the entries of each row, float32 [n, d]."""
    n, d = len(start) - 1, w.shape[1]
    out = torch.empty(n, d, device=w.device)
    launch(
        _weighted_rows_kernel, (n, triton.cdiv(d, COLS)),
        start, feature, value, w, out, d, row_stride(w), ENTRIES=ENTRIES, COLS=COLS, num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _dots_kernel(
    start_ptr: tl.tensor, feature_ptr: tl.tensor, x_ptr: tl.tensor, w_ptr: tl.tensor, out_ptr: tl.tensor, d: tl.tensor,
    x_stride: tl.tensor, w_stride: tl.tensor, ENTRIES: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(start_ptr + row + 1)
    for first in range(tl.load(start_ptr + row), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        feature = tl.load(feature_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        total = tl.zeros([ENTRIES, COLS], dtype=tl.float32)
        for column in range(0, d, COLS):
            cols = column + tl.arange(0, COLS)
            x = tl.load(x_ptr + row * x_stride + cols, mask=cols < d, other=0.0)
            mask = (entry < end)[:, None] & (cols < d)[None, :]
            total += tl.load(w_ptr + feature[:, None] * w_stride + cols[None, :], mask=mask, other=0.0) * x[None, :]
        tl.store(out_ptr + entry, tl.sum(total, axis=1), mask=entry < end)


@triton.jit
def _weighted_rows_kernel(
    start_ptr: tl.tensor, feature_ptr: tl.tensor, value_ptr: tl.tensor, w_ptr: tl.tensor, out_ptr: tl.tensor, d: tl.tensor,
    w_stride: tl.tensor, ENTRIES: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One row and some columns; rows vary fastest, so that those columns of the matrix stay in L2."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    end = tl.load(start_ptr + row + 1)
    total = tl.zeros([ENTRIES, COLS], dtype=tl.float32)
    for first in range(tl.load(start_ptr + row), end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        feature = tl.load(feature_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        value = tl.load(value_ptr + entry, mask=entry < end, other=0.0)
        mask = (entry < end)[:, None] & (cols < d)[None, :]
        total += tl.load(w_ptr + feature[:, None] * w_stride + cols[None, :], mask=mask, other=0.0) * value[:, None]
    tl.store(out_ptr + row * d + cols, tl.sum(total, axis=0), mask=cols < d)
