"""Passes over rows of [B, d] and [F, d] on CUDA: centring, the residual of a dense step, free decoder rows, Adam."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch as _launch
from residual_saes.shared.launch import row_stride as _row_stride
from residual_saes.train.kernels.base import AdamStep, TorchKernels

RESIDUAL_ELEMENTS = 4096  # centre, dense_residual: elements of a program
ADAM_ELEMENTS = 1024  # adam_: elements a program updates, where rows are shorter


class RowKernels(TorchKernels):
    def centre(self, x: Tensor, b_pre: Tensor, dtype: torch.dtype) -> Tensor:
        n_rows, d = x.shape
        rows, cols = _tile(d)
        out = torch.empty(n_rows, d, dtype=dtype, device=x.device)
        _launch(
            _centre_kernel, (triton.cdiv(n_rows, rows), triton.cdiv(d, cols)),
            x, b_pre, out, n_rows, d, _row_stride(x), ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
        return out

    def dense_residual(self, z: Tensor, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        g = torch.mm(z, w_dec)
        n_rows, d = x.shape
        rows, cols = _tile(d)
        grid = (triton.cdiv(n_rows, rows), triton.cdiv(d, cols))
        squares = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
        _launch(
            _dense_residual_kernel, grid,
            g, x, bias, squares, float(scale), n_rows, d, _row_stride(x), ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
        return g, squares.sum()

    def fold_(self, w_enc: Tensor, w_dec: Tensor, enc: Tensor, dec: Tensor) -> Tensor:
        n_rows, d = w_enc.shape
        norms = torch.empty(n_rows, dtype=w_dec.dtype, device=w_dec.device)
        cols = triton.next_power_of_2(d)
        _launch(
            _fold_kernel, (n_rows,),
            w_enc, w_dec, enc, dec, norms, d, _row_stride(w_enc), _row_stride(w_dec), _row_stride(enc), _row_stride(dec),
            COLS=cols, num_warps=min(16, max(1, cols // 256)),
        )  # fmt: skip
        return norms

    def unfold_(
        self, dw_enc: Tensor, dw_dec: Tensor, db_enc: Tensor, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor, norms: Tensor
    ) -> Tensor:
        n_rows, d = w_enc.shape
        out = torch.empty_like(db_enc)
        cols = triton.next_power_of_2(d)
        _launch(
            _unfold_kernel, (n_rows,),
            dw_enc, dw_dec, db_enc, w_enc, w_dec, b_enc, norms, out, d, _row_stride(dw_enc), _row_stride(dw_dec),
            _row_stride(w_enc), _row_stride(w_dec), COLS=cols, num_warps=min(16, max(1, cols // 256)),
        )  # fmt: skip
        return out

    def adam_(
        self,
        w: Tensor,
        m: Tensor,
        v: Tensor,
        grad: Tensor,
        adam: AdamStep,
        *,
        unit_norm: bool = False,
        copy: Tensor | None = None,
    ) -> None:
        if not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise ValueError("adam_ takes contiguous w, m and v")
        n_rows, d = w.shape
        # A norm needs its row in one program; otherwise the widths of a row are independent.
        cols = triton.next_power_of_2(d) if unit_norm else slice_of(d, ADAM_ELEMENTS)
        rows = max(1, ADAM_ELEMENTS // cols)
        clip = torch.as_tensor(adam.clip, dtype=torch.float32, device=w.device)
        copy = w if copy is None else copy  # then the same numbers go to the same places twice
        _launch(
            _adam_kernel, (triton.cdiv(n_rows, rows), triton.cdiv(d, cols)),
            w, m, v, grad, copy, clip,
            1 - adam.beta1, adam.beta2, 1 - adam.beta2, 1 / (1 - adam.beta2**adam.step), adam.eps,
            adam.lr / (1 - adam.beta1**adam.step), n_rows, d,
            grad.stride(0), grad.stride(1), copy.stride(0), copy.stride(1),
            UNIT_NORM=unit_norm, ROWS=rows, COLS=cols, num_warps=min(16, max(4, cols // 512)),
        )  # fmt: skip


def slice_of(d: int, most: int) -> int:
    return int(min(most, max(16, triton.next_power_of_2(d))))


def _tile(d: int) -> tuple[int, int]:
    """Rows and columns of a program that has nothing to add up along either."""
    cols = slice_of(d, 1024)
    return max(1, RESIDUAL_ELEMENTS // cols), cols


@triton.jit
def _centre_kernel(
    x_ptr: tl.tensor, b_pre_ptr: tl.tensor, out_ptr: tl.tensor, n_rows: tl.tensor, d: tl.tensor, x_stride: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    b_pre = tl.load(b_pre_ptr + cols, mask=cols < d, other=0.0)
    tl.store(out_ptr + wide * d + cols[None, :], (x - b_pre[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dense_residual_kernel(
    g_ptr: tl.tensor, x_ptr: tl.tensor, bias_ptr: tl.tensor, squares_ptr: tl.tensor, scale: tl.tensor, n_rows: tl.tensor,
    d: tl.tensor, x_stride: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """g comes as z · w_dec and leaves as scale · (x̂ − x)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide = rows.to(tl.int64)[:, None]
    at = g_ptr + wide * d + cols[None, :]
    x = tl.load(x_ptr + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < d, other=0.0)
    error = tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias[None, :] - x
    error = tl.where(inside, error, 0.0)  # rows past the end have a bias all the same
    tl.store(squares_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(error * error))
    tl.store(at, (error * scale).to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fold_kernel(
    w_enc_ptr: tl.tensor, w_dec_ptr: tl.tensor, enc_ptr: tl.tensor, dec_ptr: tl.tensor, norms_ptr: tl.tensor, d: tl.tensor,
    w_enc_stride: tl.tensor, w_dec_stride: tl.tensor, enc_stride: tl.tensor, dec_stride: tl.tensor, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < d
    w_enc = tl.load(w_enc_ptr + wide * w_enc_stride + cols, mask=inside, other=0.0)
    w_dec = tl.load(w_dec_ptr + wide * w_dec_stride + cols, mask=inside, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(w_dec * w_dec, axis=0)), 1e-12)
    tl.store(enc_ptr + wide * enc_stride + cols, (w_enc * norm).to(enc_ptr.dtype.element_ty), mask=inside)
    tl.store(dec_ptr + wide * dec_stride + cols, (w_dec / norm).to(dec_ptr.dtype.element_ty), mask=inside)
    tl.store(norms_ptr + row, norm)


@triton.jit
def _unfold_kernel(
    dw_enc_ptr: tl.tensor, dw_dec_ptr: tl.tensor, db_enc_ptr: tl.tensor, w_enc_ptr: tl.tensor, w_dec_ptr: tl.tensor,
    b_enc_ptr: tl.tensor, norms_ptr: tl.tensor, out_ptr: tl.tensor, d: tl.tensor, dw_enc_stride: tl.tensor,
    dw_dec_stride: tl.tensor, w_enc_stride: tl.tensor, w_dec_stride: tl.tensor, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < d
    dw_enc_at = dw_enc_ptr + wide * dw_enc_stride + cols
    dw_dec_at = dw_dec_ptr + wide * dw_dec_stride + cols
    dw_enc = tl.load(dw_enc_at, mask=inside, other=0.0).to(tl.float32)
    dw_dec = tl.load(dw_dec_at, mask=inside, other=0.0).to(tl.float32)
    w_enc = tl.load(w_enc_ptr + wide * w_enc_stride + cols, mask=inside, other=0.0)
    w_dec = tl.load(w_dec_ptr + wide * w_dec_stride + cols, mask=inside, other=0.0)
    norm = tl.load(norms_ptr + row)
    db_enc = tl.load(db_enc_ptr + row)

    unit = w_dec / norm
    by_norm = tl.sum(w_enc * dw_enc, axis=0) + tl.load(b_enc_ptr + row) * db_enc
    new = dw_dec / norm + unit * (by_norm - tl.sum(unit * dw_dec, axis=0) / norm)
    tl.store(dw_dec_at, new.to(dw_dec_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_enc_at, (dw_enc * norm).to(dw_enc_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + row, db_enc * norm)


@triton.jit
def _adam_kernel(
    w_ptr: tl.tensor, m_ptr: tl.tensor, v_ptr: tl.tensor, grad_ptr: tl.tensor, copy_ptr: tl.tensor, clip_ptr: tl.tensor,
    one_minus_beta1: tl.tensor, beta2: tl.tensor, one_minus_beta2: tl.tensor, v_correction: tl.tensor, eps: tl.tensor,
    rate: tl.tensor, n_rows: tl.tensor, d: tl.tensor, grad_stride: tl.tensor, grad_col_stride: tl.tensor,
    copy_stride: tl.tensor, copy_col_stride: tl.tensor,
    UNIT_NORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip != clip:
        return  # not finite: nothing is changed
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide_row = rows.to(tl.int64)[:, None]
    wide_col = cols.to(tl.int64)[None, :]
    at = wide_row * d + wide_col
    grad = tl.load(grad_ptr + wide_row * grad_stride + wide_col * grad_col_stride, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    w = tl.load(w_ptr + at, mask=inside, other=0.0)

    g = grad.to(tl.float32) * clip
    m += one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    w -= rate * m / (tl.sqrt(v * v_correction) + eps)
    if UNIT_NORM:
        norm = tl.sqrt(tl.sum(w * w, axis=1))
        w = w / tl.maximum(norm, 1e-12)[:, None]

    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(w_ptr + at, w, mask=inside)
    copy_at = copy_ptr + wide_row * copy_stride + wide_col * copy_col_stride
    tl.store(copy_at, w.to(copy_ptr.dtype.element_ty), mask=inside)
